"""The benchmark runs, its two forms do the same work, and what it computes of memory is so."""
import json
import multiprocessing
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench
import sft
import tgrpo
from conftest import ROOT, run

SMALL = ["--hidden=32", "--layers=1", "--heads=2", "--kv_heads=1", "--mlp=32", "--vision_hidden=32",
         "--vision_depth=1", "--vision_mlp=32", "--vocabulary=512", "--frames=4", "--height=2",
         "--width=2", "--G=2", "--G_tilde=1", "--max_new_tokens=3", "--repeats=1"]


def test_the_two_forms_give_the_same_log_probs_and_gradients():
    gradients, logps = [], []
    for form in ("naive", "ours"):
        case = bench.Case(bench.parse_args(SMALL), 4)
        actions = case.actions(form)
        actions["backward"]()
        gradients.append({name: p.grad for name, p in case.model.named_parameters()
                          if p.grad is not None})
        logps.append(actions["logps"]())
    naive, ours = gradients
    assert naive.keys() == ours.keys()
    for name, gradient in naive.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(*logps, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_tables_and_the_file(tmp_path):
    said = run("tests/bench.py", *SMALL, "--prompts", 1, 2, "--json", tmp_path / "b.json").stdout
    assert len([line for line in said.splitlines() if line.startswith("| 4 |")]) == 2
    one, two = json.loads((tmp_path / "b.json").read_text())["results"]
    assert one["memory_mb"] > 0 and two["step_ratio"] > 0
    parts = run("tests/bench.py", *SMALL, "--ablate", "--prompts", 1).stdout
    assert parts.count("\n| nothing |") == 2 and parts.count("\n|") == 10


# ------------------------------------------------------------ memory, computed from shapes

def flags(*more):
    return tgrpo.parse_args(["--model=", "--data=", "--output=", *map(str, more)])


OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 1000}


@pytest.mark.parametrize("name, millions, tower", [
    ("Qwen2.5-VL-3B", 3755, 669), ("Qwen2.5-VL-7B", 8292, 677), ("Qwen3-VL-4B", 4438, 415),
    ("Qwen3-VL-8B", 8767, 576)])
def test_the_shapes_have_as_many_parameters_as_the_published_models(name, millions, tower):
    found = bench.count_parameters(bench.load_shape(name))
    assert [round(n / 1e6) for n in found[:2]] == [millions, tower]


@pytest.mark.parametrize("frozen", [False, True])
def test_weights_and_optimizer_are_counted_to_the_byte(model, frozen):
    """Of a real model in float32, trained by torch's AdamW for a step."""
    model.model.visual.requires_grad_(not frozen)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()

    def nbytes(tensors):
        return sum(tensor.nbytes for tensor in tensors)
    moments = nbytes(state[key] for state in optimizer.state.values()
                     for key in ("exp_avg", "exp_avg_sq"))
    args = flags(*["--freeze_vision"] * frozen)
    offload = OFFLOAD | {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
    needed = bench.memory(model.config, args, {"stage": 2}, size=4)
    assert needed["update"]["weights"] == needed["update"]["reference"] == nbytes(
        model.parameters())
    assert needed["update"]["optimizer"] == nbytes(trained) + moments
    # the host's: master weights and gradients, moments, gradients so far, a copy of the weights
    assert bench.memory(model.config, args, offload, size=4)["host"]["optimizer"] == \
        4 * nbytes(trained) + moments
    # pinned, each block but the moments takes a power of two
    blocks = [nbytes(trained)] * 3 + [p.nbytes for p in trained]
    assert bench.memory(model.config, args, OFFLOAD, size=4)["host"]["optimizer"] == \
        moments + sum(2 ** (n - 1).bit_length() for n in blocks)


def test_adapters_are_counted_and_need_no_reference_and_no_gradients_of_the_rest(model):
    sft.add_adapters(model, SimpleNamespace(lora_rank=4, lora_alpha=8, seed=0))
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    needed = bench.memory(model.config, flags("--lora_rank=4"), {"stage": 2}, size=4)["update"]
    assert needed["weights"] == sum(p.nbytes for p in model.parameters())
    assert needed["reference"] == needed["prompt, vision tower"] == 0
    assert needed["optimizer"] == 12 * sum(sizes) and needed["gradients"] == 8 * sum(sizes)


def test_what_more_gpus_and_other_settings_save():
    config = bench.load_shape("Qwen2.5-VL-3B")

    def of(moment, part, *more, zero=OFFLOAD, gpus=1):
        return bench.memory(config, flags(*more), zero, gpus)[moment].get(part, 0)
    two, three = {"stage": 2}, {"stage": 3}
    P = bench.count_parameters(config)[0]
    assert of("update", "reference", "--beta=0") == 0
    assert of("update", "optimizer") == of("update", "sampling copy", zero=two) == 0
    assert of("update", "weights", zero=two, gpus=8) == 2 * P
    assert of("update", "weights", zero=three, gpus=8) == 2 * P // 8
    assert of("rollout", "sampling copy", zero=three, gpus=8) == 2 * P
    assert of("update", "optimizer", zero=two, gpus=8) == 12 * (P // 8)
    assert of("update", "prompt, vision tower", "--freeze_vision") == 0
    assert of("update", "prompt, vision tower", "--max_frames=32") == \
        2 * of("update", "prompt, vision tower")
    assert of("update", "chunk, layers", "--chunk_size=1") * 2 == of("update", "chunk, layers")
    assert of("rollout", "keys and values", "--alpha=0") < of("rollout", "keys and values")


# enough layers and tokens for what a layer keeps of a token to outweigh the rest
MEDIUM = ["--hidden=256", "--layers=3", "--heads=4", "--kv_heads=1", "--mlp=1024",
          "--vision_hidden=160", "--vision_depth=4", "--vision_mlp=428", "--height=4", "--width=4",
          "--G=4", "--max_new_tokens=96", "--chunk_size=2"]
SEEN = ["--max_frames=16", f"--max_pixels={16 * 28 * 28}", "--image_max_pixels=3136", "--G=4",
        "--max_new_tokens=96", "--chunk_size=2"]


def kept(model, function):
    """Bytes of the tensors that autograd keeps of a function's call, but for parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = []  # the tensors themselves: an address may serve again
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (found.append(t), t)[1], lambda t: t):
        result = function()
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
    del result
    return sum(size for address, size in sizes.items() if address not in own)


@pytest.mark.parametrize("dtype, size", [("float32", 4), ("bfloat16", 2)])
def test_activations_are_what_autograd_keeps_of_a_prompt(dtype, size):
    """Of the vision tower within a seventh, of the language model within a twentieth."""
    case = bench.Case(bench.parse_args([*MEDIUM, f"--dtype={dtype}"]), 16)
    model, inputs, tower = case.model.train(), case.inputs, case.model.model.visual
    _, patches = bench.prompt_size(model.config, flags(*SEEN))
    assert patches == len(inputs["pixel_values_videos"])
    computed = bench.update_activations(model.config, flags(*SEEN), size)

    def see():
        return tower(inputs["pixel_values_videos"].to(model.dtype),
                     grid_thw=inputs["video_grid_thw"])
    of_tower = kept(model, see)
    assert computed["prompt, vision tower"] == pytest.approx(of_tower, rel=1 / 7)
    of_layers = kept(model, lambda: tgrpo.run_prompt(model, inputs)) - of_tower
    length = inputs["input_ids"].shape[1]
    layer = bench.kept_of_token(model.config.text_config, size)
    assert 3 * length * layer == pytest.approx(of_layers, rel=1 / 20)
    tower.activation_checkpointing_enable({"use_reentrant": False})
    less = bench.update_activations(model.config, flags(*SEEN, "--gradient_checkpointing"), size)
    assert kept(model, see) < less["prompt, vision tower"] < of_tower / 2


@pytest.mark.parametrize("form, more", [("ours", []), ("recompute", ["--gradient_checkpointing"])])
def test_an_update_takes_at_its_peak_what_is_computed(form, more):
    """Within a fifth of the memory that a process of its own grows by."""
    args = bench.parse_args(MEDIUM)
    worker = bench.Worker(args, form, 16)
    measured = worker("memory")
    worker.stop()
    config = bench.Case(args, 16).model.config
    computed = sum(bench.update_activations(config, flags(*SEEN, *more), 4).values())
    assert computed == pytest.approx(measured, rel=1 / 5)


def grow_by_logits(pipe, rows, length, vocabulary):
    """Sends the bytes by which the log-probs of a chunk and their backward grow this process."""
    def backward(rows, length):
        hidden = torch.zeros(rows, length, 8, requires_grad=True)
        logits = torch.nn.functional.linear(hidden, torch.ones(vocabulary, 8))  # (n, L, V)
        ids = torch.zeros(rows, length, dtype=torch.long)
        tgrpo.token_logps(logits, ids, 1.0).sum().backward()
    backward(1, 1)  # what torch takes at its first use
    Path("/proc/self/clear_refs").write_text("5")
    before = bench.resident_maximum()
    backward(rows, length)
    pipe.send(bench.resident_maximum() - before)


def test_the_logits_of_a_long_chunk_take_what_is_computed():
    """Of 8 x 384 tokens, in float32: the pieces' gradients outweigh a piece's float32 forms."""
    config = bench.shape("qwen2_5_vl", True, (64, 64, 1, 2, 1, 20_000), (1, 64, 64, {}))
    args = flags("--G=8", "--chunk_size=8", "--max_new_tokens=384")
    spawn = multiprocessing.get_context("spawn")
    pipe, its = spawn.Pipe()
    process = spawn.Process(target=grow_by_logits, args=(its, 8, 384, 20_000))
    process.start()
    measured = pipe.recv()
    process.join()
    computed = bench.update_activations(config, args, 4)["chunk, logits"]
    assert computed == pytest.approx(measured, rel=1 / 10)


def test_the_readme_table_is_what_the_function_computes_and_fits_the_cards():
    """With a tenth of the card to spare."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n### One GPU\n")[1]
    row = r"\| (8 x )?(\d+) GB \| (\S+) \| (?:`(.*)`)? ?\| `(\S+)` \| (\d+) \| (\d+) \|"
    table = re.findall(row, section.split("\n## ")[0])
    assert {card for _, card, *_ in table} == {"16", "24", "48", "80"} and len(table) == 7
    for several, card, name, settings, file, of_card, of_host in table:
        zero = json.loads((ROOT / file).read_text())["zero_optimization"]
        args = flags(*settings.split(), "--gradient_checkpointing")
        needed = bench.memory(bench.load_shape(name), args, zero, 8 if several else 1)
        *moments, host = (round(sum(parts.values()) / 1e9) for parts in needed.values())
        assert (max(moments), host) == (int(of_card), int(of_host)), (name, settings)
        assert max(moments) * 1e9 < 0.9 * int(card) * 2**30


def test_the_command_takes_a_run_s_flags_and_says_that_it_computes(tmp_path, toy):
    config = ROOT / "assets" / "one_gpu.json"
    said = run("tests/bench.py", "memory", "--model", "Qwen2.5-VL-7B", "--deepspeed_config", config,
               "--beta=0").stdout
    assert "computed, not measured" in said and "8,292,166,656 parameters" in said
    assert "ZeRO-2" in said and "| weights | 16.6 | 16.6 | 16.6 |" in said
    assert "reference" not in said
    said = run("tests/bench.py", "memory", f"@{toy}/tgrpo.args", "--model", toy / "model",
               "--deepspeed_config", ROOT / "ds_zero3.json", "--gpus=2").stdout
    assert "ZeRO-3 on 2 GPU(s)" in said and "sampling copy" in said
    config = tmp_path / "ds.json"
    config.write_text("{}")
    refused = run("tests/bench.py", "memory", "--model", toy / "model", "--deepspeed_config",
                  config, check=False)
    assert refused.returncode == 2 and "ZeRO-2 and ZeRO-3" in refused.stderr
