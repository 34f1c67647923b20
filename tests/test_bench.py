"""The benchmark runs, its naive form computes the same, and what it computes of memory is so."""
import json
import re

import pytest
import torch

import bench
import sft
import tgrpo
from conftest import ROOT, PlainEngine, run

SMALL = ["--frames=4", "--height=2", "--width=2"]


def test_the_naive_form_gives_the_same_log_probs_and_gradients(model, samples):
    inputs, lengths = samples["video"][1], torch.tensor([5, 5, 5])
    responses = torch.randint(0, 400, (3, 5), generator=torch.Generator().manual_seed(0))
    results = []
    for logps, backward in ((tgrpo.group_logps, tgrpo.backward_group),
                            (bench.naive_group_logps, bench.naive_backward_group)):
        model.zero_grad()
        backward(PlainEngine(model), inputs, responses, lengths,
                 lambda rows, logps, entropy: (logps * (1 + rows[:, None])).sum(), 2, 0.7, True)
        results.append((logps(model, inputs, responses, lengths, 2, 0.7),
                        {name: p.grad.clone() for name, p in model.named_parameters()}))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_every_form_runs_and_has_a_row():
    for flags, forms in (([], ["ours", "naive"]), (["--ablate"], ["ours", *bench.ABLATIONS])):
        printed = run("tests/bench.py", *SMALL, "--repeats=1", "--max_new_tokens=3", *flags).stdout
        rows = re.findall(r"^\| (.*?) \|.* (\S+) \(\S+ to \S+\), \S+x \|$", printed, re.M)
        assert [name for name, _ in rows] == [bench.FORMS[form][0] for form in forms]
        assert all(float(memory) > 0 for _, memory in rows)


def test_an_absent_peer_is_one_sentence(monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="^--peer trl needs the package trl: pip install trl$"):
        bench.measure(*bench.parse_args(["--peer=trl"]))


# ------------------------------------------------------------ memory, computed from shapes

def flags(*more):
    return tgrpo.parse_args(["--model=", "--data=", "--output=", *map(str, more)])


def nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("name, millions", [
    ("Qwen2.5-VL-3B", 3755), ("Qwen2.5-VL-7B", 8292), ("Qwen3-VL-4B", 4438), ("Qwen3-VL-8B", 8767)])
def test_the_shapes_have_as_many_parameters_as_the_published_models(name, millions):
    sizes, _ = bench.parameter_sizes(bench.load_shape(name), flags())
    assert round(sum(sizes) / 1e6) == millions


@pytest.mark.parametrize("more", [(), ("--freeze_vision",), ("--lora_rank=4",)])
def test_weights_gradients_and_optimizer_are_counted_to_the_byte(model, more):
    """Of a real model in float32, trained by torch's AdamW for a step."""
    args = flags(*more)
    model.model.visual.requires_grad_(not args.freeze_vision)
    sft.add_adapters(model, args)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moments = nbytes(state[key] for state in optimizer.state.values()
                     for key in ("exp_avg", "exp_avg_sq"))
    needed = bench.memory(model.config, args, {"stage": 2}, size=4)["update"]
    assert needed["weights"] == nbytes(model.parameters())
    assert needed["reference"] == (0 if args.lora_rank else needed["weights"])
    assert needed["gradients"] == 2 * nbytes(trained)  # of a backward pass, and their sum so far
    assert needed["optimizer"] == nbytes(trained) + moments
    assert (needed["prompt, vision tower"] == 0) == bool(more)
    # the host's: moments; master weights, their gradients, a copy of the weights, and gradients so
    # far are pinned blocks, each a power of two
    blocks = [nbytes(trained)] * 3 + [p.nbytes for p in trained]
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert bench.memory(model.config, args, offload, size=4)["host"]["optimizer"] == \
        moments + sum(2 ** (n - 1).bit_length() for n in blocks)


def test_what_more_gpus_and_other_settings_save():
    config = bench.load_shape("Qwen2.5-VL-3B")
    P = sum(bench.parameter_sizes(config, flags())[0])

    def of(moment, part, *more, stage=2, gpus=1):
        return bench.memory(config, flags(*more), {"stage": stage}, gpus)[moment].get(part, 0)
    assert of("update", "reference", "--beta=0") == of("update", "sampling copy") == 0
    assert of("update", "weights", stage=3, gpus=8) == 2 * P // 8
    assert of("rollout", "sampling copy", stage=3, gpus=8) == 2 * P
    assert of("update", "optimizer", gpus=8) == 12 * (P // 8)
    assert of("rollout", "keys and values", "--alpha=0") < of("rollout", "keys and values")


def grow(folder, flags, picture=()):
    """Runs tgrpo.py in float32 on a picture, in a process of its own. Returns the bytes by which
    the process grows, and what is computed for it."""
    args, _ = bench.parse_args(picture)
    zero = {"stage": 2, "reduce_bucket_size": 1_000_000}
    flags = [*bench.save_start(args, folder, picture=True), "--max_frames=1", "--min_frames=1",
             f"--output={folder}/run", "--max_steps=2", *flags]
    (folder / "zero0.json").write_text(json.dumps(
        {"zero_optimization": zero, "zero_allow_untested_optimizer": True}))
    with pytest.MonkeyPatch.context() as patch:  # freed blocks from 1 MiB on leave the process
        patch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**20))
        measured = bench.in_new_process(bench.run_form, "ours", flags)["memory"]
    needed = bench.memory(bench.load_shape(args.model), tgrpo.parse_args(flags), zero, size=4)
    computed = max(sum(needed[moment].values()) for moment in ("rollout", "update", "step"))
    return measured, computed - bench.CARD_SPARE


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """The bytes of a process that are not computed: code and libraries, read at their first use."""
    measured, computed = grow(tmp_path_factory.mktemp("start"), ["--max_new_tokens=3"], SMALL)
    return measured - computed


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    "--chunk_size=1", "--chunk_size=8", "--chunk_size=8 --gradient_checkpointing",
    "--chunk_size=1 --gradient_checkpointing", "--chunk_size=8 --lora_rank=16"])
def test_a_run_grows_by_what_is_computed_within_15_percent(tmp_path, process, flags):
    """On a picture of 576 visual tokens, with responses of 192."""
    measured, computed = grow(tmp_path, ["--max_new_tokens=192", *flags.split()])
    assert computed == pytest.approx(measured - process, rel=0.15)


def test_the_readme_table_is_what_the_function_computes_and_fits_the_cards():
    """With a tenth of the card to spare."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n### One GPU\n")[1]
    row = r"\| (8 x )?(\d+) GB \| (\S+) \| (?:`(.*)`)? ?\| `(\S+)` \| (\d+) \| (\d+) \|"
    table = re.findall(row, section.split("\n## ")[0])
    assert {card for _, card, *_ in table} == {"16", "24", "48", "80"} and len(table) == 6
    for several, card, name, settings, file, of_card, of_host in table:
        zero = json.loads((ROOT / file).read_text())["zero_optimization"]
        args = flags(*settings.split(), "--gradient_checkpointing")
        needed = bench.memory(bench.load_shape(name), args, zero, 8 if several else 1)
        *moments, host = (round(sum(parts.values()) / 1e9) for parts in needed.values())
        assert (max(moments), host) == (int(of_card), int(of_host)), (name, settings)
        assert max(moments) * 1e9 < 0.9 * int(card) * 2**30


def test_the_command_takes_a_run_s_flags_and_says_that_it_computes(tmp_path, toy):
    printed = run("tests/bench.py", "memory", f"@{toy}/tgrpo.args", "--model=Qwen2.5-VL-7B",
                  "--beta=0", "--deepspeed_config", ROOT / "assets/one_gpu.json", "--gpus=2").stdout
    assert "computed, not measured" in printed and "8,292,166,656 parameters" in printed
    assert "ZeRO-2 on 2 GPU(s)" in printed and "| weights | 16.6 | 16.6 | 16.6 |" in printed
    assert "reference" not in printed
    (tmp_path / "ds.json").write_text("{}")
    refused = run("tests/bench.py", "memory", "--model", toy / "model", "--deepspeed_config",
                  tmp_path / "ds.json", check=False)
    assert refused.returncode == 2 and "ZeRO-2 and ZeRO-3" in refused.stderr
