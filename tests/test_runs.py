"""tgrpo.py from the command line: alone and on two ranks, killed, resumed, and fed bad input."""
import json
import textwrap

import pytest
import torch
from safetensors.torch import load_file

import tgrpo as train
from conftest import ROOT, break_media, equal_weights, run

SMALL = ["--min_pixels=784", "--max_pixels=784", "--image_min_pixels=784", "--max_frames=8",
         "--max_new_tokens=10", "--learning_rate=1e-3", "--num_workers=1", "--rollout_steps=1",
         "--G=4", "--G_tilde=2"]


def tgrpo(toy, output, *more, data=None):
    return ["tgrpo.py", "--model", toy / "model", "--data", data or toy / "train.json",
            "--media_root", toy, "--output", output, *SMALL, *more]


def lines(output, name):
    return [json.loads(line) for line in (output / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def mixed(toy, tmp_path_factory):
    """A run on two ranks, ZeRO-3: images and videos, and every third medium broken."""
    out = tmp_path_factory.mktemp("mixed")
    records = break_media(toy, "train", out / "data.json", "broken.mp4", every=3)
    run(*tgrpo(toy, out / "run", "--prompts_per_rank", 2, "--max_steps", 4, "--save_steps", 2,
               "--updates_per_rollout", 2, "--chunk_size", 2, data=out / "data.json"), ranks=2)
    return out / "run", records


def test_a_broken_video_costs_its_sample_and_one_line(mixed):
    output, records = mixed
    steps, skipped = lines(output, "metrics")[1:], lines(output, "skipped")
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert len(skipped) == sum(row["data/skipped"] for row in steps) > 0
    assert {row["path"] for row in skipped} == {"./media/broken.mp4"}
    assert all("broken.mp4" in row["reason"] and row["problem_id"] in range(0, 32, 3)
               for row in skipped)
    # two updates on four questions a step, less the skipped: nothing else was left out
    rollouts = lines(output, "rollouts")
    assert len(rollouts) + len(skipped) == 16


def test_ranks_hold_images_and_videos_in_the_same_step(mixed):
    shares = [row["data/video_share"] for row in lines(mixed[0], "metrics")[1:]]
    assert any(0 < share < 1 for share in shares)


def test_rollouts_hold_what_a_reader_needs_to_recompute_the_advantages(mixed):
    for row in lines(mixed[0], "rollouts"):
        R = torch.tensor([row["accuracy"], row["format"], row["length"]]).sum(0)
        assert len(row["responses"]) == 4
        if row["frame_order"]:
            assert sorted(row["frame_order"]) == list(range(8)) != row["frame_order"]
            assert len(row["responses_shuffled"]) == 2
            R = R + torch.tensor(row["temporal"])
        assert torch.allclose(R, torch.tensor(row["R"]), atol=1e-5)
        spread = R.std()
        expected = (R - R.mean()) / (spread + 1e-4) if spread > 0 else torch.zeros(4)
        assert torch.allclose(expected, torch.tensor(row["A"]), atol=1e-3)


def test_metrics_have_the_documented_names_and_a_header(mixed):
    header, *steps = lines(mixed[0], "metrics")
    assert header["world_size"] == 2 and header["arguments"]["G"] == 4
    assert header["versions"]["torch"]
    assert {"reward/total", "reward/accuracy", "reward/format", "reward/length", "group/p",
            "group/zero_std_rate", "policy/kl", "policy/ratio_max", "policy/clip_rate",
            "policy/entropy", "response/tokens", "response/truncated_rate", "optim/learning_rate",
            "optim/grad_norm", "optim/loss", "time/data", "time/rollout", "time/update",
            "time/step", "data/video_share", "data/skipped"} <= set(steps[0])
    assert steps[0]["policy/kl"] >= 0 and steps[-1]["policy/ratio_max"] >= 1


def test_the_result_is_a_model_that_differs_from_its_start(mixed, toy):
    from transformers import AutoModelForImageTextToText, AutoProcessor
    AutoModelForImageTextToText.from_pretrained(mixed[0])
    AutoProcessor.from_pretrained(mixed[0])
    assert not equal_weights(mixed[0], toy / "model")
    assert sorted(path.name for path in mixed[0].glob("checkpoint-*")) == \
        ["checkpoint-2", "checkpoint-4"]


def test_the_readme_gets_the_weights_out_of_a_checkpoint(mixed, toy, tmp_path):
    """Of a run on two ranks, ZeRO-3, in one process: the last checkpoint's are the result's."""
    code, = [block for block in (ROOT / "README.md").read_text().split("```python\n")
             if block.lstrip().startswith("from deepspeed.utils.zero_to_fp32")]
    code = textwrap.dedent(code.split("  ```")[0])
    for name, path in (("sft", toy / "model"), ("tgrpo/checkpoint-100", mixed[0] / "checkpoint-4"),
                       ("weights", tmp_path / "weights")):
        assert code.count(f'"{name}"') == 1
        code = code.replace(f'"{name}"', repr(str(path)))
    exec(code)
    assert equal_weights(tmp_path / "weights", mixed[0])
    train.load_processor(train.parse_args(["--model", str(tmp_path / "weights"), "--data", "d",
                                           "--output", "o"]))


def test_grpo_without_reference_or_shuffled_group_on_a_frozen_vision_tower(toy, tmp_path):
    run(*tgrpo(toy, tmp_path, "--alpha", 0, "--beta", 0, "--max_steps", 2, "--prompts_per_rank", 3,
               "--freeze_vision", "--frame_cache", tmp_path / "frames"))
    for row in lines(tmp_path, "metrics")[1:]:
        assert not {"policy/kl", "group/p_tilde", "group/tie_rate", "reward/temporal"} & set(row)
    assert all(row["responses_shuffled"] == [] and row["frame_order"] is None
               for row in lines(tmp_path, "rollouts"))
    # and a frozen vision tower stays as it was, while the language model learns
    before = load_file(toy / "model" / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any("visual" in name for name in moved)
    assert list((tmp_path / "frames").glob("*.npz"))


@pytest.mark.slow
def test_a_compiled_decoding_step_makes_the_same_run(toy, tmp_path):
    """Where the policy samples (ZeRO-0), and where a copy of its weights does (ZeRO-3)."""
    for output, flags in (("plain", []), ("compiled", ["--compile"])):
        run(*tgrpo(toy, tmp_path / output, "--prompts_per_rank", 2, "--max_steps", 4,
                   "--deepspeed_config", toy / "ds_zero0.json", *flags))
    one, other = (lines(tmp_path / output, "rollouts") for output in ("plain", "compiled"))
    assert [row["responses"] for row in one] == [row["responses"] for row in other]
    run(*tgrpo(toy, tmp_path / "two", "--prompts_per_rank", 2, "--max_steps", 2, "--compile"),
        ranks=2)
    assert len(lines(tmp_path / "two", "metrics")) == 3


@pytest.mark.parametrize("change, words", [
    (["--data", "absent.json"], "absent.json"),
    (["--model", "{media}"], "processor"),
    (["--deepspeed_config", "absent.json"], "absent.json"),
    (["--media_root", "absent"], "absent"),
    (["--G", "0"], "--G"),
    (["--min_pixels", "1000"], "--min_pixels 1000"),
    (["--nonsense", "1"], "--nonsense"),
    (["--G_tilde", "0"], "--alpha 0"),
    (["--G", "1"], "--G must be at least 2"),
    (["--top_p", "0"], "--top_p 0.0"),
    (["--temperature", "nan"], "--temperature nan"),
    (["--keep_checkpoints", "-1"], "--keep_checkpoints -1 must not be negative"),
    (["--max_steps", "0"], "--max_steps 0 must be positive"),
])
def test_bad_input_is_named_before_a_run_starts(toy, tmp_path, capsys, change, words):
    _, *flags = tgrpo(toy, tmp_path / "out")
    change = [word.format(media=toy / "media") for word in change]
    with pytest.raises((train.InputError, SystemExit)) as error:
        train.main(train.parse_args([str(flag) for flag in [*flags, *change]]))
    assert words in f"{error.value}{capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change, status", [(["--data", "absent.json"], 1), (["--G", "zero"], 2)])
def test_bad_input_is_one_line(toy, tmp_path, change, status):
    result = run(*tgrpo(toy, tmp_path / "out"), *change, check=False)
    assert result.returncode == status and "Traceback" not in result.stderr
    assert change[1] in result.stderr.splitlines()[-1]


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """open_output of a run of one rank in tmp_path/run, with these flags."""
    monkeypatch.setattr(train.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(train.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(train.dist, "barrier", lambda: None)
    monkeypatch.setattr(train, "gather_objects", lambda value: [value])

    def call(*flags):
        args = train.parse_args(["--model", "m", "--data", "d", "--output",
                                 str(tmp_path / "run"), *flags])
        return train.open_output(args, train.run_identity(args, {}, []))
    return call


def test_a_model_or_a_lone_checkpoint_is_not_written_over(tmp_path, opened):
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(train.InputError, match="--resume"):
        opened()
    (tmp_path / "run" / "checkpoint-2").rmdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    for flags in ([], ["--resume"]):
        with pytest.raises(train.InputError, match="a model"):
            opened(*flags)
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(train.InputError, match="--resume"):
        opened()
    assert opened("--resume") == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == \
        ["config.json", "metrics.jsonl"]


def test_an_output_that_a_node_does_not_share_is_found_at_the_start(monkeypatch, opened):
    monkeypatch.setattr(train, "gather_objects", lambda value: [value, (False, 0, False)])
    with pytest.raises(train.InputError, match="storage that all nodes share"):
        opened()


def test_a_schedule_that_decays_to_the_end_binds_the_end(tmp_path, opened):
    for schedule, bound in (("constant", False), ("cosine", True)):
        flags = ["--lr_schedule", schedule]
        (tmp_path / "run" / "checkpoint-2").mkdir(parents=True, exist_ok=True)
        args = train.parse_args(["--model", "m", "--data", "d", "--output", "o", *flags])
        (tmp_path / "run" / "checkpoint-2" / "run.json").write_text(
            json.dumps(train.run_identity(args, {}, [])))
        assert opened("--resume", *flags) == 2
        if bound:
            with pytest.raises(train.InputError, match="--max_steps was 1000, is 2000"):
                opened("--resume", "--max_steps", "2000", *flags)
        else:
            assert opened("--resume", "--max_steps", "2000", *flags) == 2


def test_a_log_that_no_checkpoint_vouches_for_starts_anew(tmp_path, opened):
    (tmp_path / "metrics.jsonl").write_text('{"arguments": "of another run"}\n{"step": 1}\n')
    args = train.parse_args(["--model", "m", "--data", "d", "--output", str(tmp_path), "--resume"])
    train.open_log(args, "metrics", 0).close()
    header, = lines(tmp_path, "metrics")
    assert header["arguments"]["model"] == "m"


@pytest.mark.parametrize("stage", [0, 3])
def test_in_bf16_the_policy_starts_as_its_reference_and_steps_are_counted_right(toy, tmp_path,
                                                                                stage):
    """What every accelerator runs in: on CPU the config has to say so."""
    config = tmp_path / "bf16.json"  # fp16 as in files that come from elsewhere
    config.write_text(json.dumps({"bf16": {"enabled": True}, "fp16": {"enabled": "auto"},
                                  "zero_optimization": {"stage": stage}}))
    run(*tgrpo(toy, tmp_path / "run", "--deepspeed_config", config, "--max_steps", 2,
               "--prompts_per_rank", 2, "--save_steps", 2))
    first = lines(tmp_path / "run", "metrics")[1]
    assert first["policy/kl"] == 0 and first["policy/ratio_max"] == 1
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    state = tmp_path / "run" / "checkpoint-2" / "state"
    file, = state.glob("*optim_states.pt" if stage else "mp_rank_00_model_states.pt")
    counts = set()

    def look(value):
        if isinstance(value, dict):
            counts.update([int(value["step"])] if "exp_avg" in value else [])
            for part in value.values():
                look(part)
        elif isinstance(value, list):
            for part in value:
                look(part)
    look(torch.load(file, weights_only=False))
    assert counts == {2}
