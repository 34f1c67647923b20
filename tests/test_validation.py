"""Held-out questions during a run: their metrics, and that they do not change the run."""
import json
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import sft
import tgrpo
from build_data import InputError, forbidden_tokens, load_records, stop_tokens
from conftest import SMALL, break_media, equal_weights, run
from test_faults import SCRIPTS, command, rows


def metrics_of(output, held_out):
    """{step: its metrics} of a run: those of held-out questions, or the others."""
    found = {row.pop("step"): {name: value for name, value in row.items()
                               if name.startswith("val/") == held_out}
             for row in rows(output, "metrics")}
    return {step: row for step, row in found.items() if row}


# ------------------------------------------------------------------------------ the numbers

RECORDS = [{"problem_type": "multiple choice", "options": ["A. x", "B. y"], "problem_id": 0,
            "path": "a.mp4", "problem": "Which?", "solution": "<answer>B</answer>"},
           {"problem_type": "regression", "problem_id": 1, "path": "b.png",
            "problem": "How long?", "solution": "<answer>10</answer>"}]
SAMPLES = [  # a prompt is its own answer here
    {"record": RECORDS[0], "prompts": ["<answer>B</answer>", "<answer>A</answer>"]},  # 1 and 0
    {"record": RECORDS[0], "prompts": ["<answer>A</answer>", "<answer>B</answer>"]},  # 0 and 1
    {"record": RECORDS[1], "prompts": ["<answer>9</answer>", "<answer>4</answer>"]},  # 0.9 and 0.4
    {"problem_id": 3, "path": "rotten.mp4", "reason": "rotten"},
    {"record": RECORDS[1], "prompts": ["<answer>5</answer>"]}]  # an image: 0.5


def fake_run(rank=0, world=1, module=None, **flags):
    flags = {"val_steps": 10, "max_steps": 25} | flags
    module = module or torch.nn.Dropout().train()
    engine = SimpleNamespace(module=module, zero_optimization_partition_weights=lambda: False)
    return SimpleNamespace(rank=rank, world=world, args=SimpleNamespace(**flags), engine=engine,
                           held_out=SAMPLES, lapped=0.0, device=torch.device("cpu"))


@pytest.fixture
def written(monkeypatch):
    """Lines that validate writes. As ranks run in turn here, rank 0 must be the last."""
    gathered, written = [], []

    def gather(value):
        gathered.insert(0, value)
        return gathered
    monkeypatch.setattr(sft, "gather_objects", gather)
    monkeypatch.setattr(sft, "write_lines", lambda run, step, name, rows: written.extend(
        (name, step + 1, row) for row in rows))
    return written


@pytest.mark.parametrize("world", [1, 2, 3, 9])
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_metrics_and_lines_of_held_out_answers_by_hand_on_any_number_of_ranks(
        monkeypatch, written, world, batch):
    monkeypatch.setattr(sft, "VAL_BATCH", batch)
    monkeypatch.setattr(sft, "load_questions", lambda run, processor, records, example, positions,
                        together: iter([records[i] for i in positions]))
    ranks, calls = [], []
    for rank in reversed(range(world)):
        answered = []

        def respond(prompts):
            answered.append(len(prompts))
            return prompts
        ranks.append({})
        sft.validate(fake_run(rank, world), None, respond, 10, ranks[-1])
        calls.append(answered)
    assert len({len(answered) for answered in calls}) == 1  # or ranks would wait for each other
    assert sum(map(sum, calls)) == 7
    found = sft.merge(ranks)
    assert found.pop("time/validation") >= 0
    assert found == pytest.approx({
        "val/accuracy": (1 + 0 + 0.9 + 0.5) / 4, "val/accuracy/multiple choice": 0.5,
        "val/accuracy/regression": 0.7, "val/accuracy_shuffled": (0 + 1 + 0.4 + 0.5) / 4,
        "val/gap": (1 - 1 + 0.5 + 0) / 4, "val/skipped": 1})
    names, steps, (_, second, third, image) = zip(*written)  # without the skipped one
    assert {*names} == {"validation"} and {*steps} == {10}
    assert second == {
        "problem_id": 0, "path": "a.mp4", "problem": "Which?", "options": ["A. x", "B. y"],
        "solution": "<answer>B</answer>", "response": "<answer>A</answer>", "accuracy": 0,
        "response_shuffled": "<answer>B</answer>", "accuracy_shuffled": 1}
    assert [third["response"], third["response_shuffled"]] == SAMPLES[2]["prompts"]
    assert image == {"problem_id": 1, "path": "b.png", "problem": "How long?",
                     "solution": "<answer>10</answer>", "response": "<answer>5</answer>",
                     "accuracy": 0.5}


@pytest.mark.parametrize("val_steps, max_steps, due", [
    (10, 25, [0, 10, 20, 25]), (10, 20, [0, 10, 20]), (1, 3, [0, 1, 2, 3]), (100, 7, [0, 7])])
def test_validation_is_due_at_the_start_every_val_steps_and_at_the_end(
        monkeypatch, written, val_steps, max_steps, due):
    monkeypatch.setattr(sft, "load_questions", lambda *_: iter(SAMPLES))
    answered = []
    for step in range(max_steps + 1):
        metrics = {}
        sft.validate(fake_run(val_steps=val_steps, max_steps=max_steps), None, list, step, metrics)
        answered += [step] * bool(metrics)
    assert answered == due


# ---------------------------------------------------------------------- answers and the model

@pytest.fixture
def held_out(toy, processor, written):
    """Returns validated(model, answer, script): the metrics of a run of the script on eight
    questions of the toy, which answer(the run, prompts) answers."""
    def validated(model, answer, script, num_workers=1):
        args = script.parse_args(["--model=m", "--data=d", "--output=o",
                                  f"--val_data={toy}/test.json", "--val_limit=8", *SMALL,
                                  *SCRIPTS[script.__name__], f"--num_workers={num_workers}"])
        one = fake_run(module=model, **vars(args))
        one.held_out = sft.load_held_out(args)
        metrics = {}
        sft.validate(one, processor, partial(answer, one), 0, metrics)
        return metrics
    return validated


@pytest.mark.parametrize("num_workers", [0, 1])
def test_validation_draws_no_random_number_and_leaves_the_model_as_it_was(
        held_out, model, processor, num_workers):
    model.train()
    model.generation_config.repetition_penalty = 7.0  # a default that a release may have
    before = model.generation_config.to_dict(), torch.get_rng_state()

    def answer(one, prompts):
        assert not model.training
        return sft.greedy_texts(one, processor, prompts)
    assert held_out(model, answer, sft, num_workers)["val/accuracy"][1] == 8
    assert all(module.training for module in model.modules())
    assert model.generation_config.to_dict() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_both_stages_give_the_same_answers_and_a_record_is_always_shuffled_alike(
        held_out, model, processor):
    """By generate and by the rollout, in a batch of images and videos."""
    model.generation_config.repetition_penalty = 7.0
    seen = []
    tgrpo.forbid_tokens(model, forbidden_tokens(model, processor.tokenizer), "cpu")
    rest = model, processor.tokenizer, stop_tokens(model, processor.tokenizer)
    respond = {sft: lambda one, prompts: sft.greedy_texts(one, processor, prompts),
               tgrpo: lambda one, prompts: tgrpo.greedy_texts(one, *rest, prompts)}
    for script in (sft, tgrpo):
        def answer(one, prompts):
            seen.append((prompts, respond[script](one, prompts)))
            return seen[-1][1]
        held_out(model, answer, script)
    (prompts, texts), (again, others) = seen
    assert texts == others and any(texts)
    for one, other in zip(prompts, again, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    grids = [prompt["video_grid_thw"][0, 0].item() for prompt in prompts]
    assert 1 in grids and max(grids) > 1  # an image, and videos: these are answered in both orders
    twice = [(one, other) for one, other in zip(prompts, prompts[1:])
             if torch.equal(one["input_ids"], other["input_ids"])]
    assert twice and not any(torch.equal(one["pixel_values_videos"], other["pixel_values_videos"])
                             for one, other in twice)


# --------------------------------------------------------------------------------- a run

@pytest.fixture(scope="module")
def broken(toy, tmp_path_factory):
    """Held-out records, of which every fourth has no usable file."""
    path = tmp_path_factory.mktemp("held_out") / "test.json"
    break_media(toy, "test", path, "rotten_test.mp4", every=4)
    return path


def require_answers(output, broken, toy, limit, steps):
    """Checks that these steps have a line for each usable question, in the order of validation,
    and that the metrics are of these lines. Returns the metrics."""
    records = load_records(broken, toy)
    order = [records[sft.record_index(position, limit, 0)] for position in range(limit)]
    usable = [record["problem_id"] for record in order if "rotten" not in record["path"]]
    lines, found = rows(output, "validation"), metrics_of(output, held_out=True)
    assert list(found) == steps
    assert [(line["step"], line["problem_id"]) for line in lines] == \
        [(step, problem_id) for step in steps for problem_id in usable]
    for step, row in found.items():
        assert row["val/skipped"] == limit - len(usable)
        accuracies = [line["accuracy"] for line in lines if line["step"] == step]
        assert row["val/accuracy"] == pytest.approx(sum(accuracies) / len(usable))
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_is_the_same_without_validation_also_resumed_with_other_flags(
        toy, tmp_path, broken, script):
    """Validated at steps 0 and 2, stopped, resumed, and validated at 3 and 4; ZeRO-0. A line of a
    step that is repeated, and one that a kill has cut, do not stay."""
    plain, output, config = tmp_path / "without", tmp_path / "with", tmp_path / "ds.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 0}, "csv_monitor": {
        "enabled": True, "output_path": str(tmp_path), "job_name": "csv"}}))
    common = ["--lr_schedule=constant", "--deepspeed_config", config]
    flags = [*common, "--val_data", broken, "--val_limit=10"]

    run(*command(toy, script, plain, 0, *common, "--max_steps=4"))
    first = run(*command(toy, script, output, 0, *flags, "--max_steps=2", "--val_steps=5"))
    with (output / "validation.jsonl").open("a") as file:
        file.write('{"step": 3, "problem_id": "repeated"}\n{"step": 3, "prob')
    run(*command(toy, script, output, 0, *flags, "--max_steps=4", "--val_steps=3", "--resume"))
    assert equal_weights(output, plain) and not (plain / "validation.jsonl").exists()
    trained = metrics_of(plain, held_out=False)
    assert list(trained) == [1, 2, 3, 4] and trained == metrics_of(output, held_out=False)
    assert not metrics_of(plain, held_out=True)
    found = require_answers(output, broken, toy, 10, steps=[0, 2, 3, 4])
    assert {"val/accuracy_shuffled", "val/gap"} < found[0].keys()

    events = (tmp_path / "csv" / "val_accuracy.csv").read_text().split()
    assert [line.split(",")[0] for line in events if line[0].isdigit()] == ["0", "2", "3", "4"]
    assert not first.stderr
    printed = re.findall("^step (.) .*held-out accuracy .*, shuffled .*, gap ", first.stdout, re.M)
    assert printed == ["0", "2"]


@pytest.mark.parametrize("script, limit", [
    ("sft", 1), pytest.param("tgrpo", 3, marks=pytest.mark.slow)])
def test_a_run_is_the_same_without_validation_on_two_ranks_under_zero_3(
        toy, tmp_path, broken, script, limit):
    """Also if one rank has more questions than the other, or none (the only file of rank 0 is
    broken, rank 1 has no question)."""
    plain, output = tmp_path / "without", tmp_path / "with"
    flags = ["--val_data", broken, "--val_limit", limit, "--val_steps=1"]
    run(*command(toy, script, plain, 3, "--max_steps=1", ranks=2), ranks=2)
    run(*command(toy, script, output, 3, "--max_steps=1", *flags, ranks=2), ranks=2)
    assert equal_weights(output, plain) and not equal_weights(output, toy / "model")
    assert metrics_of(output, held_out=False) == metrics_of(plain, held_out=False)
    if limit > 1:
        require_answers(output, broken, toy, limit, steps=[0, 1])
    else:
        assert metrics_of(output, held_out=True) == {0: {"val/skipped": 1}, 1: {"val/skipped": 1}}


def test_held_out_files_must_be_there_and_zero_steps_switch_them_off(toy, tmp_path):
    flags = ["--model=m", "--data=d", "--output=o", f"--val_data={toy}/test.json"]
    with pytest.raises(InputError, match="absent.json"):
        sft.load_held_out(sft.parse_args([*flags, "--val_data=absent.json"]))
    with pytest.raises(InputError, match="none of its media is there"):
        sft.load_held_out(sft.parse_args([*flags, f"--media_root={tmp_path}"]))
    assert sft.load_held_out(sft.parse_args([*flags, "--val_steps=0"])) == []
    assert len(sft.load_held_out(sft.parse_args([*flags, "--val_limit=5"]))) == 5
