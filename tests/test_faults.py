"""Killed, stopped, out of disk, out of numbers, out of media: nothing that was computed is lost."""
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, SMALL, break_media, equal_weights, logged, run

# five steps each
SCRIPTS = {"tgrpo": ["--max_steps=5", "--max_new_tokens=10", "--G=4", "--G_tilde=2",
                     "--rollout_steps=1", "--chunk_size=2", "--prompts_per_rank=2",
                     "--updates_per_rollout=2"],
           "sft": ["--num_train_epochs=0.41", "--per_rank_batch_size=4",
                   "--gradient_accumulation_steps=1", "--val_max_new_tokens=10"]}


def command(toy, script, output, stage, *more, fault=None, ranks=0):
    """Returns the command of a run. stage: ZeRO's, or the name of a config in assets."""
    output.parent.mkdir(exist_ok=True)
    config = ROOT / f"assets/{stage}.json"
    if isinstance(stage, int):
        config = output.parent / f"stage{stage}.json"
        config.write_text(json.dumps({"zero_optimization": {"stage": stage},
                                      "zero_allow_untested_optimizer": True}))
    start = [ROOT / "tests/faults.py", script, fault] if fault else [f"{script}.py"]
    data = output.parent / f"{script}.json"  # every third file is broken
    break_media(toy, {"tgrpo": "train", "sft": "cot"}[script], data, "rotten.mp4", every=3)
    own = SCRIPTS[script] + (["--per_rank_batch_size=2"] if script == "sft" and ranks == 2 else [])
    return [*start, "--model", toy / "model", "--data", data, "--media_root", toy, "--output",
            output, "--deepspeed_config", config, *SMALL, "--learning_rate=1e-3", "--save_steps=2",
            *own, *more]


def rows(output, name):
    """A log without times; of metrics.jsonl without the header, which holds the arguments."""
    found = [{key: value for key, value in row.items() if not key.startswith("time/")}
             for row in logged(output, name)]
    return found[1:] if name == "metrics" else found


def same_run(a, b, steps=5):
    for name in ("metrics", "rollouts", "skipped"):
        assert (a / f"{name}.jsonl").exists() or name == "rollouts", name
        if (a / f"{name}.jsonl").exists():
            assert rows(a, name) == rows(b, name), name
    assert [row["step"] for row in rows(a, "metrics")] == list(range(1, steps + 1))
    assert equal_weights(a, b)


@pytest.fixture(scope="module")
def whole_run(toy, tmp_path_factory):
    """Makes uninterrupted runs, one for each script, number of ranks and config. That of tgrpo.py
    on one rank at ZeRO-0 is a new process, and what is compared with it are forks."""
    kept = {}

    def make(script, ranks, stage):
        if (script, ranks, stage) not in kept:
            output = tmp_path_factory.mktemp("whole") / "run"
            run(*command(toy, script, output, stage, ranks=ranks), ranks=ranks,
                fresh=(script, ranks, stage) == ("tgrpo", 0, 0))
            kept[script, ranks, stage] = output
        return kept[script, ranks, stage]
    return make


# A step of tgrpo: 2 updates on 2 questions of 2 chunks, so 8 calls of "update". On one rank the
# first step has no usable question and makes none: the fourth step's calls are 17 to 24.
MOMENTS = [("tgrpo", "rollout:4"), ("tgrpo", "update:22"), ("tgrpo", "save:2"),
           ("tgrpo", "remove:1"), ("sft", "update:4"), ("sft", "save:2")]
QUICK = {("tgrpo", "update:22", 0, 0), ("tgrpo", "remove:1", 0, 0), ("sft", "save:2", 0, 0),
         ("tgrpo", "rollout:4", 2, 3), ("tgrpo", "update:22", 0, "one_gpu")}
SETTINGS = [(0, 0), (0, 3), (2, 0), (2, 3), (0, "one_gpu")]  # ranks, and `stage` of command
KILLS = [pytest.param(*kill, marks=[] if kill in QUICK else pytest.mark.slow)
         for kill in [(*moment, *setting) for moment in MOMENTS for setting in SETTINGS]]


@pytest.mark.parametrize("script, moment, ranks, stage", KILLS)
def test_a_run_killed_at_any_moment_resumes_as_if_nothing_had_happened(
        toy, tmp_path, whole_run, script, moment, ranks, stage):
    """Of two ranks in a rollout only one is killed: DeepSpeed's launcher names it and ends the
    other, long before --timeout_minutes. What it started is compared with forked runs."""
    output = tmp_path / "run"
    one_of_two = ranks == 2 and moment.startswith("rollout")
    fault = f"kill:{moment}:1" if one_of_two else f"kill:{moment}"
    removes = moment.startswith("remove")
    more = ["--keep_checkpoints=1"] if removes else []
    cut = run(*command(toy, script, output, stage, *more, fault=fault, ranks=ranks), ranks=ranks,
              check=False, fresh=one_of_two)
    assert cut.returncode != 0 and not (output / "model.safetensors").exists()
    if one_of_two:
        printed = cut.stdout + cut.stderr
        assert "--local_rank=1" in printed and "return code = -9" in printed
    assert (output / "latest").read_text() == ("checkpoint-4" if removes else "checkpoint-2")
    run(*command(toy, script, output, stage, "--resume", ranks=ranks), ranks=ranks)
    same_run(whole_run(script, ranks, stage), output)


@pytest.mark.parametrize("script", ["tgrpo", pytest.param("sft", marks=pytest.mark.slow)])
def test_the_config_for_one_gpu_trains_as_without_offload(whole_run, script):
    plain, offloaded = (load_file(whole_run(script, 0, stage) / "model.safetensors")
                        for stage in (0, "one_gpu"))
    for name, weights in plain.items():  # the norm that gradients are clipped by is rounded
        torch.testing.assert_close(offloaded[name], weights, rtol=0, atol=1e-5)


def test_gradient_checkpointing_changes_nothing_but_memory(toy, tmp_path, whole_run):
    run(*command(toy, "tgrpo", tmp_path / "run", 0, "--gradient_checkpointing"))
    same_run(whole_run("tgrpo", 0, 0), tmp_path / "run")


@pytest.mark.parametrize("script, place, what, name", [
    ("tgrpo", "rollout:3", "int", "SIGINT"),
    pytest.param("tgrpo", "rollout:3", "term", "SIGTERM", marks=pytest.mark.slow),
    ("sft", "update:3", "term", "SIGTERM")])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint_and_a_hint(
        toy, tmp_path, whole_run, script, place, what, name):
    """SIGTERM to the process, Ctrl-C to its whole group: data workers have to finish the step."""
    output = tmp_path / "run"
    stopped = run(*command(toy, script, output, 0, fault=f"{what}:{place}"), start_new_session=True)
    assert f"{name} after step 3" in stopped.stderr + stopped.stdout
    assert "--resume" in stopped.stderr + stopped.stdout
    assert sorted(path.name for path in output.glob("checkpoint-*")) == \
        ["checkpoint-2", "checkpoint-3"]
    assert (output / "latest").read_text() == "checkpoint-3"
    assert not (output / "model.safetensors").exists()
    run(*command(toy, script, output, 0, "--resume", "--keep_checkpoints=1"))
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-4"]
    same_run(whole_run(script, 0, 0), output)


def test_a_longer_run_that_is_stopped_in_its_last_step_makes_its_model(toy, tmp_path, whole_run):
    """Until then its folder holds none: the shorter run's is not taken for it."""
    shorter, output = whole_run("tgrpo", 0, 0), tmp_path / "run"
    shutil.copytree(shorter, output)
    longer = ["--resume", "--max_steps=6"]  # from checkpoint-4
    run(*command(toy, "tgrpo", output, 0, *longer, fault="term:rollout:2"))
    assert (output / "latest").read_text() == "checkpoint-6"
    assert not (output / "config.json").exists()
    assert "the model after 6 steps" in run(*command(toy, "tgrpo", output, 0, *longer)).stdout
    assert not equal_weights(shorter, output)


def test_a_second_ctrl_c_ends_a_run_at_once(toy, tmp_path):
    """Struck twice within a step that would take 1000 seconds more."""
    result = run(*command(toy, "tgrpo", tmp_path / "run", 0, fault="twice:rollout:1"), check=False,
                 start_new_session=True, timeout=100)
    assert result.returncode == 130 and "Traceback" not in result.stderr


def test_a_full_disk_is_a_clear_error_and_leaves_the_last_checkpoint_whole(
        toy, tmp_path, whole_run):
    """The quota of one megabyte a file begins with the second checkpoint."""
    output = tmp_path / "run"
    full = run(*command(toy, "tgrpo", output, 0, fault="full:save:2"), check=False)
    assert full.returncode == 1 and "Traceback" not in full.stderr
    assert "cannot write" in full.stderr and "--resume" in full.stderr
    assert " GB free)" in full.stderr  # as torch reports a full disk in other words
    assert (output / "latest").read_text() == "checkpoint-2"
    assert not (output / "checkpoint-4").exists()
    run(*command(toy, "tgrpo", output, 0, "--resume"))
    same_run(whole_run("tgrpo", 0, 0), output)


def test_a_damaged_checkpoint_is_named_and_after_its_removal_the_one_before_is_used(
        toy, tmp_path, whole_run):
    output = tmp_path / "run"
    shutil.copytree(whole_run("sft", 0, 0), output)
    (output / "config.json").unlink()  # as of a run that was killed before it wrote its model
    file, = (output / "checkpoint-4").glob("*model_states.pt")
    file.write_bytes(file.read_bytes()[:1000])
    damaged = run(*command(toy, "sft", output, 0, "--resume"), check=False)
    assert damaged.returncode == 1 and "Traceback" not in damaged.stderr
    assert f"cannot load {output / 'checkpoint-4'}: " in damaged.stderr
    assert "If it is damaged, remove it" in damaged.stderr
    shutil.rmtree(output / "checkpoint-4")
    run(*command(toy, "sft", output, 0, "--resume"))
    same_run(whole_run("sft", 0, 0), output)


@pytest.mark.parametrize("script, call, ranks, newest", [
    ("tgrpo", "17", 0, 3), ("tgrpo", "22", 0, 2), ("sft", "4", 0, 3),
    pytest.param("tgrpo", "25:1", 2, 3, marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_never_reaches_the_weights(
        toy, tmp_path, whole_run, script, call, ranks, newest):
    """The fourth step's, on all ranks or one; the weights from before the step are saved, but those
    from between the two updates of a step are not."""
    output = tmp_path / "run"
    broken = run(*command(toy, script, output, 0, fault=f"nan:update:{call}", ranks=ranks),
                 ranks=ranks, check=False)
    assert broken.returncode == 1 and "Traceback" not in broken.stderr
    assert "step 4: the loss or a gradient is not finite; problem_ids [" in broken.stderr
    assert rows(output, "metrics")[-1]["step"] == 4  # the metrics of that step are there
    if script == "tgrpo":
        assert rows(output, "rollouts")[-1]["step"] == 4
    assert (output / "latest").read_text() == f"checkpoint-{newest}"
    if newest == 3:  # resuming from the second step's is the test of kills
        run(*command(toy, script, output, 0, "--resume", ranks=ranks), ranks=ranks)
        same_run(whole_run(script, ranks, 0), output)


def test_too_many_broken_media_stop_the_run_with_their_names(toy, tmp_path):
    break_media(toy, "train", tmp_path / "data.json", "rotten.mp4")
    result = run(*command(toy, "tgrpo", tmp_path / "run", 0, "--data", tmp_path / "data.json",
                          "--prompts_per_rank=6", "--max_skipped=0.1"), check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "12 of 12 questions" in result.stderr and "rotten.mp4: " in result.stderr
    assert len(rows(tmp_path / "run", "skipped")) == 12

