"""A training run: what it writes, prints and refuses, on one and on two ranks; its learning rate,
the order of its questions, and how it is continued."""
import json
import math
import re
import textwrap
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import sft
import tgrpo as train
from build_data import InputError, find_model
from conftest import ROOT, SMALL, break_media, equal_weights, logged, moved_weights, run


def tgrpo(toy, output, *more, data=None):
    return ["tgrpo.py", "--model", toy / "model", "--data", data or toy / "train.json",
            "--media_root", toy, "--output", output, *SMALL, "--max_new_tokens=10",
            "--learning_rate=1e-3", "--rollout_steps=1", "--G=4", "--G_tilde=2", *more]


@pytest.fixture(scope="module")
def mixed(toy, tmp_path_factory):
    """A run on two ranks, ZeRO-3: images and videos; every third file is broken. With this seed,
    rank 0 has no usable question in the first step."""
    out = tmp_path_factory.mktemp("mixed")
    break_media(toy, "train", out / "data.json", "broken.mp4", every=3)
    run(*tgrpo(toy, out / "run", "--prompts_per_rank", 2, "--max_steps", 2, "--save_steps", 1,
               "--updates_per_rollout", 2, "--chunk_size", 2, "--seed", 8,
               data=out / "data.json"), ranks=2)
    return out / "run"


def test_a_broken_video_is_skipped_and_logged(mixed):
    steps, skipped = logged(mixed, "metrics")[1:], logged(mixed, "skipped")
    assert [row["step"] for row in steps] == [1, 2]
    assert len(skipped) == sum(row["data/skipped"] for row in steps) > 0
    assert all(row["path"] == "./media/broken.mp4" and "broken.mp4" in row["reason"]
               and row["problem_id"] in range(0, 32, 3) for row in skipped)
    # two updates on four questions a step, less the skipped: nothing else was left out
    assert len(logged(mixed, "rollouts")) + len(skipped) == 8


def test_advantages_can_be_recomputed_from_rollouts(mixed):
    for row in logged(mixed, "rollouts"):
        R = torch.tensor([row["accuracy"], row["format"], row["length"]]).double().sum(0)
        assert len(row["responses"]) == 4
        if row["frame_order"]:
            assert sorted(row["frame_order"]) == list(range(8)) != row["frame_order"]
            assert len(row["responses_shuffled"]) == 2
            R = R + torch.tensor(row["temporal"])
        assert row["R"] == pytest.approx(R.tolist(), abs=1e-5)
        A = (R - R.mean()) / (R.std() + 1e-4)
        assert row["A"] == pytest.approx(A.tolist(), abs=1e-3)


def test_metrics_have_the_documented_names_and_a_header(mixed):
    header, *steps = logged(mixed, "metrics")
    assert header["world_size"] == 2 and header["arguments"]["G"] == 4
    assert header["versions"]["torch"]
    assert {"reward/total", "reward/accuracy", "reward/format", "reward/length", "group/p",
            "group/zero_std_rate", "policy/kl", "policy/ratio_max", "policy/clip_rate",
            "policy/entropy", "response/tokens", "response/truncated_rate", "optim/learning_rate",
            "optim/grad_norm", "optim/loss", "time/data", "time/rollout", "time/update",
            "time/step", "data/video_share", "data/skipped"} <= set(steps[0])
    assert steps[0]["policy/kl"] >= 0 and steps[-1]["policy/ratio_max"] >= 1
    # ranks hold images and videos in the same step
    assert any(0 < row["data/video_share"] < 1 for row in steps)


def test_the_result_is_a_model_that_differs_from_its_start(mixed, toy):
    from transformers import AutoModelForImageTextToText, AutoProcessor
    files = [path for path in mixed.iterdir()
             if path.suffix in (".json", ".jsonl", ".safetensors")]
    assert len({path.stat().st_mode for path in files}) == 1  # by the user's mask
    AutoModelForImageTextToText.from_pretrained(mixed)
    AutoProcessor.from_pretrained(mixed)
    assert not equal_weights(mixed, toy / "model")
    assert sorted(path.name for path in mixed.glob("checkpoint-*")) == \
        ["checkpoint-1", "checkpoint-2"]


def test_the_readme_gets_the_weights_out_of_a_checkpoint(mixed, toy, tmp_path):
    """Of a run on two ranks, ZeRO-3, in one process: the last checkpoint's are the result's."""
    code, = [block for block in (ROOT / "README.md").read_text().split("```python\n")
             if block.lstrip().startswith("from deepspeed.utils.zero_to_fp32")]
    code = textwrap.dedent(code.split("  ```")[0])
    for name, path in (("sft", toy / "model"), ("tgrpo", mixed),
                       ("checkpoint-100", "checkpoint-2"), ("weights", tmp_path / "weights")):
        assert code.count(f'"{name}"') == 1
        code = code.replace(f'"{name}"', repr(str(path)))
    exec(code)
    assert equal_weights(tmp_path / "weights", mixed)
    train.load_processor(train.parse_args(["--model", str(tmp_path / "weights"), "--data", "d",
                                           "--output", "o"]))


def test_grpo_without_reference_or_shuffled_group_on_a_frozen_vision_tower(toy, tmp_path):
    run(*tgrpo(toy, tmp_path, "--alpha", 0, "--beta", 0, "--max_steps", 2, "--prompts_per_rank", 3,
               "--freeze_vision", "--deepspeed_config", toy / "ds_zero0.json"))
    for row in logged(tmp_path, "metrics")[1:]:
        assert not {"policy/kl", "group/p_tilde", "group/tie_rate", "reward/temporal"} & set(row)
    assert all(row["responses_shuffled"] == [] and row["frame_order"] is None
               for row in logged(tmp_path, "rollouts"))
    moved = moved_weights(toy / "model", tmp_path)
    assert moved and not any("visual" in name for name in moved)


@pytest.mark.parametrize("script, change, words", [
    (train, "--model={toy}/media", "has no usable processor"),
    (train, "--deepspeed_config=absent.json", "absent.json"),
    (train, "--media_root={toy}/model --model=absent", "none of its media is there"),
    (sft, "--media_root={toy}/model --model=absent", "none of its media is there"),
    (train, "--zzz", "--help lists the flags"), (train, "--G_tilde=0", "--alpha 0"),
    (train, "--G=1", "--G: 1 must be at least 2"),
    (train, "--l_min=513", "--l_min 513 is above --l_max 512")])
def test_bad_input_is_named_before_a_run_starts(toy, tmp_path, capsys, script, change, words):
    split = {train: "train", sft: "cot"}[script]
    flags = ["--model", toy / "model", "--data", toy / f"{split}.json", "--output",
             tmp_path / "out", *change.format(toy=toy).split()]
    with pytest.raises((InputError, SystemExit)) as error:
        script.main(script.parse_args(list(map(str, flags))))
    assert re.search(words, f"{error.value}{capsys.readouterr().err}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ranks", [0, 2])
@pytest.mark.parametrize("change, status", [("--data=absent.json", 1), ("--G=zero", 2)])
def test_bad_input_is_one_line_on_any_number_of_ranks(toy, tmp_path, change, status, ranks):
    result = run(*tgrpo(toy, tmp_path / "out"), change, ranks=ranks, check=False)
    line, = result.stderr.splitlines()
    assert result.returncode == status and not result.stdout
    assert line.startswith("tgrpo.py: ") and change.split("=")[1] in line


@pytest.mark.parametrize("model, words", [
    ("toyy/sft", "no such folder, and the hub does not give"), ("toyy", "no such folder"),
    ("./toyy", "no such folder"), ("/toyy/sft/x", "no such folder"),
    ("{run}/checkpoint-2", "holds a run's checkpoint"), ("{run}", "holds a run's checkpoint")])
def test_a_model_that_is_not_there_is_an_error_at_once(tmp_path, monkeypatch, model, words):
    """Without minutes of requests to the hub."""
    def no_network(*_, **__):
        raise OSError("no network")
    monkeypatch.setattr("socket.getaddrinfo", no_network)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "mp_rank_00_model_states.pt").touch()
    begin = time.perf_counter()
    with pytest.raises(InputError, match=words):
        find_model(model.format(run=tmp_path))
    assert time.perf_counter() - begin < 10


def test_a_run_prints_its_settings_each_step_and_its_result(toy, tmp_path):
    """Into a file: one line per step, no line of a library, and at every tenth step a question. One
    process needs no compiler, nor git: nothing is on the path."""
    result = run(*tgrpo(toy, tmp_path / "run", "--max_steps", 2, "--show_steps", 2,
                        "--prompts_per_rank", 2), fresh=True,
                 env={"PATH": "", "TORCH_EXTENSIONS_DIR": tmp_path / "built"})
    assert not result.stderr and not (tmp_path / "built").exists()
    expected = [
        r"\S+/train.json: 32 records, \d+ videos and \d+ images",
        r"\S+/model: [\d,]+ parameters, fp32, ZeRO stage 3 on 1 x cpu",
        r"a step on each rank: 2 questions x \(4 \+ 2\) responses, 2 of them in a chunk of the "
        r"update; 2 steps are 0\.125 epochs",
        r"first \w+: \d x \d x \d patches \(time x height x width\), \d+ of its \d+ tokens visual",
        r"step 1 of 2: reward [\d.]+, accuracy [\d.]+, p [\d.]+, .*kl .*",
        r"step 1, (video|image) \S+: .*<answer>.*</answer>",
        r"  p [\d.]+.*", r"  best: R [\d.]+, A [-\d.]+  .*", r"  worst: R [\d.]+, .*",
        r"step 2 of 2: .*",
        r"\S+/run: the model after 2 steps",
        r"next: python evaluate.py --model \S+/run --benchmark NAME=FILE --output FOLDER"]
    printed = result.stdout.splitlines()
    assert len(printed) == len(expected)
    for pattern, line in zip(expected, printed):
        assert re.fullmatch(pattern, line)


def test_groups_without_a_gradient_are_skipped_and_the_weights_are_the_same(toy, tmp_path):
    """At --beta 0 a group with equal rewards is skipped; compared with a run that skips none."""
    flags = ["--beta", 0, "--max_steps", 3, "--prompts_per_rank", 4, "--max_new_tokens", 6,
             "--updates_per_rollout", 2,
             "--deepspeed_config", toy / "ds_zero0.json"]
    all_of_them = tmp_path / "all.py"
    all_of_them.write_text(
        "import tgrpo, build_data, torch\n"
        "whole = torch.Tensor.any\n"
        "torch.Tensor.any = lambda x, *a: True if x.shape == (4,) else whole(x, *a)\n"
        "build_data.run_script(tgrpo.main, tgrpo.parse_args)")
    for name, script in (("saved", "tgrpo.py"), ("whole", all_of_them)):
        _, *command = tgrpo(toy, tmp_path / name, *flags)
        run(script, *command, env={"PYTHONPATH": str(ROOT)})
    saved, whole = (logged(tmp_path / name, "metrics")[1:] for name in ("saved", "whole"))
    assert {row["update/saved_share"] for row in whole} == {0}
    assert sum(row["update/saved_share"] for row in saved) > 0
    assert [row["optim/loss"] for row in saved] == [row["optim/loss"] for row in whole]
    assert equal_weights(tmp_path / "saved", tmp_path / "whole")


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Calls open_run with these flags, on one rank, in tmp_path/run."""
    monkeypatch.setattr(sft, "setup_distributed", lambda args: (0, torch.device("cpu")))
    monkeypatch.setattr(sft, "catch_signals", lambda rank: [])
    monkeypatch.setattr(sft, "model_hash", lambda model: "weights")
    monkeypatch.setattr(sft.dist, "get_rank", lambda **_: 0)
    monkeypatch.setattr(sft.dist, "get_world_size", lambda **_: 1)
    monkeypatch.setattr(sft.dist, "barrier", lambda: None)
    monkeypatch.setattr(sft, "gather_objects", lambda value: [value])

    def call(*flags, records=()):
        args = train.parse_args(["--model", "m", "--data", "d", "--output",
                                 str(tmp_path / "run"), *flags])
        return sft.open_run(args, list(records), train.parse_args, per_step=1)
    return call


def left_off(output, run, step=2, **changes):
    """Writes what open_run reads of a run with a checkpoint at a step."""
    (output / f"checkpoint-{step}").mkdir(parents=True, exist_ok=True)
    (output / "latest").write_text(f"checkpoint-{step}")
    (output / "metrics.jsonl").write_text(json.dumps(run.identity | changes) + "\n")


@pytest.mark.parametrize("name, resumed", [
    ("checkpoint-2", True), ("metrics.jsonl", True), ("config.json", False)])
def test_a_part_of_a_run_is_not_written_over(tmp_path, opened, name, resumed):
    """A checkpoint that `latest` does not name, a log alone, or a model without a log."""
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(InputError, match="holds a run or a model: continue a run with --resume"):
        opened()
    with nullcontext() if resumed else pytest.raises(InputError, match="holds a run or a model"):
        assert opened("--resume").first_step == 0
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]


def test_a_finished_run_is_not_trained_again(tmp_path, capsys, opened):
    output, flags = tmp_path / "run", ["--resume", "--max_steps", "4"]
    longer = ["--resume", "--max_steps", "5"]  # the learning rate is constant
    left_off(output, opened(*flags))
    (output / "config.json").write_text("{}")
    with (output / "metrics.jsonl").open("a") as file:
        file.writelines(f'{{"step": {step}}}\n' for step in range(1, 5))
    assert opened(*longer).first_step == 2
    with pytest.raises(InputError, match="--max_steps 1 is below .*: use 2, which writes its"):
        opened("--resume", "--max_steps", "1")
    (output / "checkpoint-2").rmdir()
    (output / "latest").unlink()
    with pytest.raises(SystemExit) as end:
        opened(*flags)
    assert not end.value.code and "is finished, at step 4" in capsys.readouterr().out
    for more, words in ((longer, "a model after 4 steps and no checkpoint"),
                        ([*flags, "--G", "4"], "--G was 8, is 4"),  # it is another run
                        (["--max_steps", "4"], "holds a run or a model")):
        with pytest.raises(InputError, match=words):
            opened(*more)


def test_an_output_that_a_node_does_not_share_is_found_at_the_start(monkeypatch, opened):
    monkeypatch.setattr(sft, "gather_objects", lambda value: [
        value, (False, "") if isinstance(value, tuple) else value])
    with pytest.raises(InputError, match="storage that all nodes share"):
        opened()


@pytest.mark.parametrize("tag", ["checkpoint-1", "mybest", "checkpoint-two", "../run", ""])
def test_latest_must_name_a_checkpoint_that_is_there(tmp_path, opened, tag):
    left_off(tmp_path / "run", opened())
    (tmp_path / "run" / "checkpoint-3").mkdir()  # cut off
    (tmp_path / "run" / "mybest").mkdir()
    (tmp_path / "run" / "latest").write_text(tag)
    with pytest.raises(InputError, match="write one of .*checkpoint-2.* into it"):
        opened("--resume")
    (tmp_path / "run" / "latest").write_text("checkpoint-2\n")  # as the message advises
    assert opened("--resume").first_step == 2


def test_what_a_run_did_not_write_stays_in_its_folder(toy, tmp_path):
    """Data beside the logs, a folder of the user's own, and one of a save that was killed."""
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(record) + "\n"
                            for record in json.loads((toy / "train.json").read_text())))
    before = data.read_bytes()
    for name in ("best", "7"):
        (tmp_path / f"checkpoint-{name}").mkdir()
    run(*tgrpo(toy, tmp_path, "--resume", "--max_steps", 2, "--save_steps", 1,
               "--keep_checkpoints", 1, "--deepspeed_config", toy / "ds_zero0.json", data=data))
    assert data.read_bytes() == before
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == \
        ["checkpoint-2", "checkpoint-7", "checkpoint-best"]


@pytest.mark.parametrize("line", ["", "{}", '{"step": 1}', "[1]", '{"argum'])
def test_a_run_without_its_identity_is_not_continued(tmp_path, opened, line):
    left_off(tmp_path / "run", opened())
    (tmp_path / "run" / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match="first line of .*metrics.jsonl"):
        opened("--resume")


@pytest.mark.parametrize("schedule, bound", [("constant", False), ("cosine", True)])
def test_a_schedule_that_decays_to_the_end_binds_the_end(tmp_path, opened, schedule, bound):
    flags = ["--resume", "--lr_schedule", schedule]
    left_off(tmp_path / "run", opened(*flags))
    assert opened(*flags).first_step == 2
    assert opened(*flags, "--max_steps", "2").first_step == 2  # only writes the checkpoint's model
    refused = pytest.raises(InputError, match="--max_steps was 1000, is 2000")
    with refused if bound else nullcontext():
        assert opened(*flags, "--max_steps", "2000").first_step == 2


def test_a_flag_that_an_older_run_does_not_have_counts_as_its_default(tmp_path, opened):
    """A new flag orphans no checkpoint; but a value that the old run cannot have had is named."""
    run = opened()
    before = {key: value for key, value in run.identity["arguments"].items() if key != "top_p"}
    left_off(tmp_path / "run", run, arguments=before | {"a_flag_that_is_gone": 1})
    assert opened("--resume").first_step == 2
    with pytest.raises(InputError, match="--top_p was 1.0, is 0.9"):
        opened("--resume", "--top_p", "0.9")


def test_other_records_ranks_or_shards_are_named(tmp_path, opened):
    left_off(tmp_path / "run", opened(), world_size=2, zero_stage=1)
    with pytest.raises(InputError, match="records of --data was .*, is .*number of processes was 2,"
                                         " is 1; ZeRO stage was 1, is 3"):
        opened("--resume", records=[{"problem_id": 1}])


def test_a_log_keeps_the_steps_up_to_its_checkpoint(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"arguments": {}}\n{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    sft.trim_log(log, 2)
    assert log.read_text() == '{"arguments": {}}\n{"step": 1}\n{"step": 2}\n'
    sft.trim_log(log, 0)  # there is no checkpoint
    assert log.read_text() == ""
    log.write_text('{"ste\n{"step": 2}\n')  # not by a kill
    with pytest.raises(InputError, match="metrics.jsonl is damaged"):
        sft.trim_log(log, 2)


@pytest.mark.parametrize("stage", [0, 3])
def test_in_bf16_the_policy_starts_as_its_reference_and_steps_are_counted_right(toy, tmp_path,
                                                                                stage):
    """Every accelerator runs in bf16; on a CPU the config has to enable it."""
    config = tmp_path / "bf16.json"  # fp16 as in files that come from elsewhere
    config.write_text(json.dumps({"bf16": {"enabled": True}, "fp16": {"enabled": "auto"},
                                  "zero_optimization": {"stage": stage}}))
    run(*tgrpo(toy, tmp_path / "run", "--deepspeed_config", config, "--max_steps", 2,
               "--prompts_per_rank", 2, "--save_steps", 2))
    first = logged(tmp_path / "run", "metrics")[1]
    assert first["policy/kl"] == 0 and "policy/ratio_max" not in first  # of one update: it is 1
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    file, = (tmp_path / "run" / "checkpoint-2").glob(
        "*optim_states.pt" if stage else "mp_rank_00_model_states.pt")
    state = str(torch.load(file, weights_only=False))
    assert {*re.findall(r"'step': (.*?),", state)} == {"tensor(2.)"}  # AdamW's


# ------------------------------------------------------------- schedule, data order, metrics

def test_every_record_comes_once_an_epoch_in_an_order_that_changes():
    first, second = ([sft.record_index(epoch * 10 + i, 10, 0) for i in range(10)]
                     for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


@pytest.mark.parametrize("schedule, expected", [
    ("constant", [0.5, 1, 1, 1]), ("linear", [0.5, 1, 1, 0.75]),
    ("cosine", [0.5, 1, 1, (1 + math.cos(math.pi / 4)) / 2])])
def test_learning_rate_by_hand(schedule, expected):
    args = SimpleNamespace(learning_rate=1.0, warmup_steps=2, max_steps=6, lr_schedule=schedule)
    assert [sft.learning_rate(step, args) for step in range(4)] == pytest.approx(expected)


def test_metrics_of_ranks_are_merged_by_their_counts_and_largest_values():
    one, other = {}, {}
    sft.note(one, "reward/total", [1.0, 2.0, 3.0])
    sft.note(other, "reward/total", [10.0])
    sft.note(one, "optim/loss", [4.0], count=8)
    sft.note(one, "policy/ratio_max", [1.0, 1.5])
    sft.note(one, "policy/ratio_max", [1.2])
    sft.note(other, "policy/ratio_max", [1.1])
    sft.note(other, "group/p_tilde", [])  # undefined in this step: absent
    assert sft.merge([one, other]) == {"reward/total": 4.0, "optim/loss": 0.5,
                                       "policy/ratio_max": 1.5}
