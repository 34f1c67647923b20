"""Claims about evaluate.py, on a toy with an untrained model."""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import annotate
import build_data
import evaluate
from build_data import InputError, Vision, load_records
from conftest import run as launch
from conftest import run_here, table_rows


def flags(toy, output, *more):
    """A short run over the toy's test questions, decoding in the process itself."""
    return [f"@{toy}/evaluate.args", "--model", toy / "model", "--output", output, "--num_workers",
            0, "--max_new_tokens", 12, *more]


def run(toy, output, *more):
    """Runs in this process; returns the rows by problem_id and the whole result."""
    given = flags(toy, output, *more)
    run_here(evaluate, *given)
    result = json.loads((output / f"toy_8_{parsed(*given).order[-1]}.json").read_text())
    return {row["problem_id"]: row for row in result["rows"]}, result


def parsed(*argv):
    return evaluate.parse_args(list(map(str, argv)))


@pytest.fixture(scope="module")
def uninterrupted(toy, tmp_path_factory):
    """Rows and result of one run from beginning to end, in one process."""
    return run(toy, tmp_path_factory.mktemp("uninterrupted"))


# ---------------------------------------------------------------------------------- scores

@pytest.mark.parametrize("p, g, expected", [
    (2, 2, 1.0),         # error 0 passes all ten thresholds
    (1, 2, 0.1),         # error .5 passes theta = .5 alone, whose boundary it is
    (3, 2, 0.1),
    (9, 10, 0.9),        # .1 <= 1 - .9, which floats deny
    (9.5, 10, 1.0),      # .05 <= 1 - .95, the last threshold
    (1.05, 1.0, 1.0),    # in floats the error is .05000000000000004
    (0.7, 1, 0.5),       # .3 passes .50, .55, .60, .65, .70
    (0.49, 1, 0.0), (-1, 2, 0.0), (-1, -2, 0.1),
    (0, 0, 1.0), (1e-9, 0, 0.0),  # g = 0: only 0 is right
    ("about 9 metres", "10", 0.9), ("3 or 4", "3", 0.0)])
def test_mra_is_vsi_bench_s_on_and_off_the_boundaries(p, g, expected):
    assert evaluate.mean_relative_accuracy(p, g) == expected


@pytest.mark.parametrize("p, g, released", [
    ("1", "2", 0.0), ("2", "2", 1.0), ("1.5", "2", 0.5), ("-1", "2", 0.0), ("none", "2", 0.0),
    ("0", "0", 1.0)])
def test_the_released_mra_does_not_count_a_threshold_that_is_met(p, g, released):
    assert evaluate.released_relative_accuracy(p, g) == released


def test_the_interval_of_two_media_is_exact():
    # resamples of {0, 1}: 0, 1/2, 1 with chances 1/4, 1/2, 1/4
    assert evaluate.bootstrap_mean([0.0, 1.0], ["a", "b"], 0) == (0.5, 0.0, 1.0)


def test_the_interval_of_a_share_is_the_binomial_one_and_wider_if_questions_share_videos():
    # 400 questions, half of them right: 1.96 * sqrt(.5 * .5 / 400) = .049
    values, question = np.repeat([0.0, 1.0], 200), np.arange(400)
    mean, low, high = evaluate.bootstrap_mean(values, question, 0)
    assert (mean, low, high) == pytest.approx((0.5, 0.451, 0.549), abs=0.006)
    # ten equal questions on each of 40 videos carry the information of 40: sqrt(10) wider
    _, low_shared, high_shared = evaluate.bootstrap_mean(values, question // 10, 0)
    assert (high_shared - low_shared) / (high - low) == pytest.approx(10**0.5, rel=0.1)


def test_the_interval_of_a_mean_of_tasks_is_the_formula_s():
    # 400 media a task, shares .5 and .9: sd of the mean of both = sqrt(.25/400 + .09/400) / 2
    values = [0.0, 1.0] * 200 + ([0.0] + [1.0] * 9) * 40
    media, cells = [str(i) for i in range(800)], ["s"] * 400 + ["t"] * 400
    mean, low, high = evaluate.bootstrap_mean(values, media, 0, cells)
    assert mean == pytest.approx(0.7)
    assert high - low == pytest.approx(2 * 1.96 * (0.34 / 400) ** 0.5 / 2, rel=0.1)


def answered(records, answers):
    """The graded rows of records, given the text of each one's answer, or None without one."""
    return evaluate.grade(records, {str(record["problem_id"]): {
        "output": f"<answer>{text}</answer>", "tokens": 1, "truncated": False}
        for record, text in zip(records, answers) if text is not None}, 0.5)


def choice(number, **fields):
    """A question whose answer is A."""
    return {"problem_id": number, "path": f"{number}.mp4", "problem": f"Which {number}?",
            "data_source": "s", "problem_type": "multiple choice", "options": ["A. x", "B. y"],
            "solution": "<answer>A</answer>", **fields}


def rows_for_scores():
    """Two videos, three questions: one right, one 8 for 10, one wrong and cut off."""
    records = [choice(1, path="a"), choice("3"), choice(4),
               choice(2, path="a", problem_type="regression", data_source="t",
                      solution="<answer>10</answer>")]
    rows = {"1": {"output": "<think>t</think><answer>A</answer>", "tokens": 6, "truncated": False},
            "2": {"output": "<answer>8</answer>", "tokens": 4, "truncated": False},
            "3": {"output": "<think>hm", "tokens": 8, "truncated": True},
            "4": {"problem_id": 4, "path": "c", "reason": "c: broken"}}
    return records, evaluate.grade(records, rows, threshold=0.5)


def test_scores_are_those_computed_by_hand():
    records, graded = rows_for_scores()
    scores = evaluate.score(records, graded, seed=0)
    whole = scores["all"]
    assert (whole["answered"], whole["records"]) == (3, 4)
    assert whole["accuracy"]["mean"] == pytest.approx((1 + 0.8 + 0) / 3)
    assert whole["correct"]["mean"] == pytest.approx(2 / 3)
    assert whole["mra"] == {"mean": 0.7, "low": None, "high": None, "n": 1}  # .2: .50 to .80
    assert whole["format"]["mean"] == whole["truncated"]["mean"] == pytest.approx(1 / 3)
    assert whole["tokens"]["mean"] == 6
    assert "drop" not in whole and "mra" not in scores["problem_type: multiple choice"]
    assert scores["data_source: s"]["accuracy"]["mean"] == 0.5
    assert scores["data_source: s"]["records"] == 3


def test_the_drop_is_paired_over_the_questions_answered_in_both_orders():
    records, ordered = rows_for_scores()  # right, .8 and wrong
    blind = [row | {"accuracy": 0.5} for row in ordered if row["problem_id"] != "3"]
    drop = evaluate.score(records, blind, 0, ordered=ordered)["all"]["drop"]
    assert drop["n"] == 2 and drop["mean"] == pytest.approx((1 - 0.5 + 0.8 - 0.5) / 2)


def test_the_table_shows_coverage_and_interval_and_hides_no_group_silently():
    records, graded = rows_for_scores()
    lines = evaluate.table("toy", evaluate.score(records, graded, seed=0))
    assert len({len(line) for line in lines}) == 1
    assert "| all" in lines[2] and "| 3/4 " in lines[2] and "[" in lines[2]
    assert "score" not in lines[0]  # it is the accuracy here
    assert "| mra (exact) |" in lines[0]  # the benchmark's own floats give a little less
    many = [record | {"problem_id": i, "data_source": f"url {i}"} for i, record in
            enumerate(records * 10)]
    lines = evaluate.table("toy", evaluate.score(many, [], seed=0))
    assert lines[-1] == "(40 groups by data_source: not shown)" and "0/40" in lines[2]


# -------------------------------------------------------------------------- order of frames

def video(count=6):
    frames = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 3, 28, 28)
    return Vision(frames, {"fps": 2.0}, None)


def first_values(vision):
    return vision.frames[:, 0, 0, 0].tolist()


def test_each_record_has_its_own_shuffle_whatever_else_is_evaluated():
    def shuffled(problem_id, seed=0):
        own = annotate.record_seed(seed, {"problem_id": problem_id})
        return first_values(evaluate.reorder(video(16), "shuffled", own))
    assert sorted(shuffled(7)) == list(range(16)) != shuffled(7)
    assert shuffled(7) == shuffled(7) != shuffled(8) and shuffled(7) != shuffled(7, seed=1)


def test_each_order_shows_what_it_says_and_keeps_size_and_timing():
    expected = {"ordered": [0, 1, 2, 3, 4, 5], "reversed": [5, 4, 3, 2, 1, 0],
                "single_frame": [3] * 6, "blind": [evaluate.GREY] * 6}
    for order, values in expected.items():
        vision = evaluate.reorder(video(), order, None)
        assert first_values(vision) == values and vision.metadata == {"fps": 2.0}
        assert vision.frames.shape == (6, 3, 28, 28) and vision.frames.dtype == torch.uint8


def test_an_image_changes_in_blind_alone():
    vision = Vision(None, {}, Image.new("RGB", (56, 28), "red"))
    for order in ("ordered", "shuffled", "reversed", "single_frame"):
        assert evaluate.reorder(vision, order, None) is vision
    image = evaluate.reorder(vision, "blind", None).image
    assert image.size == (56, 28) and image.getcolors() == [(56 * 28, (128, 128, 128))]


# ------------------------------------------------------------------------------- generation

def test_vision_tokens_are_not_sampled_and_draws_repeat_with_the_seed(toy, processor):
    """That a batch is answered as its samples one by one is in test_families.py."""
    args = parsed(*flags(toy, "unused", "--temperature", 3, "--top_p", 1, "--max_new_tokens", 40))
    args.max_frames = 8
    samples = [evaluate.prompt_of(processor, args, "ordered", record)
               for record in load_records(toy / "test.json")[:8]]
    model = annotate.load_answering_model(args, processor.tokenizer, torch.device("cpu"))
    assert model.generation_config.top_k == 0  # a default of 50 would cut the distribution
    as_ids = SimpleNamespace(decode=lambda ids, skip_special_tokens: ids)

    def respond(seed):
        return [ids for (ids, *_), in annotate.respond(model, as_ids, samples, seed)]
    first = respond(0)
    assert first == respond(0) != respond(1)
    pads = processor.tokenizer.convert_tokens_to_ids(list(build_data.FORBIDDEN_TOKENS))
    assert len(pads) == 5 and not {*sum(first, [])} & {*pads}


# -------------------------------------------------------------------------------- whole runs

def test_the_result_holds_everything_needed_to_repeat_it(toy, uninterrupted):
    rows, result = uninterrupted
    assert list(rows) == [r["problem_id"] for r in json.loads((toy / "test.json").read_text())]
    assert (result["answered"], result["records"], result["skipped"]) == (24, 24, [])
    configuration = result["configuration"]
    assert configuration["template"] == build_data.TEMPLATE and configuration["frames"] == 8
    assert configuration["temperature"] == 0.01 and configuration["max_new_tokens"] == 12
    assert configuration["max_pixels"] == 28 * 28 and len(configuration["model_sha256"]) == 64
    assert result["arguments"]["model"] and result["versions"]["transformers"]
    assert result["tokens"] == sum(row["tokens"] for row in rows.values())
    assert {"output", "prediction", "accuracy", "correct", "truncated"} <= set(rows[0])


def test_two_ranks_give_the_rows_of_one(toy, uninterrupted, tmp_path):
    launch("evaluate.py", *flags(toy, tmp_path, "--num_workers", 1), ranks=2)
    result = json.loads((tmp_path / "toy_8_ordered.json").read_text())
    assert {row["problem_id"]: row for row in result["rows"]} == uninterrupted[0]
    assert result["scores"] == uninterrupted[1]["scores"]
    assert len(list(tmp_path.glob("*.rank*.jsonl"))) == 2


def test_several_orders_in_one_run_load_the_model_once_and_end_with_their_gap(
        toy, uninterrupted, tmp_path, capsys, monkeypatch):
    """A table names model and order, and the toy's groups as the README does."""
    loaded, load = [], annotate.load_answering_model
    monkeypatch.setattr(annotate, "load_answering_model",
                        lambda *given: loaded.append(1) or load(*given))
    run_here(evaluate, *flags(toy, tmp_path, "--order", "shuffled", "ordered"))
    assert len(loaded) == 1
    ordered, shuffled = (json.loads((tmp_path / f"toy_8_{order}.json").read_text())
                         for order in ("ordered", "shuffled"))
    assert {row["problem_id"]: row for row in ordered["rows"]} == uninterrupted[0]
    assert shuffled["order"] == "shuffled" and shuffled["scores"]["all"]["drop"]["n"] == 24
    printed = capsys.readouterr().out
    rows = table_rows(printed.splitlines())
    heads = [row for row in rows if row[0].startswith("toy_8")]
    assert [head[0] for head in heads] == [
        f"toy_8_ordered: {toy}/model", f"toy_8_shuffled: {toy}/model", "toy_8: score, %"]
    assert "drop" in heads[1] and {"ordered", "gap"} <= {*heads[2]}
    assert rows[1][0] == "all" and "data_source" not in printed
    assert {"direction_agree", "problem_type: multiple choice"} <= {row[0] for row in rows}


def test_a_limited_or_killed_run_continues_to_the_rows_of_a_whole_one(
        toy, uninterrupted, tmp_path):
    """A real kill is in test_annotate.py."""
    rows, result = run(toy, tmp_path, "--limit", 5)
    assert list(rows) == list(uninterrupted[0])[:5] and result["records"] == 5
    now, earlier = (tmp_path / f"toy_8_ordered.rank{rank}.jsonl" for rank in (0, 3))
    now.rename(earlier)  # there were more ranks before
    earlier.write_text(earlier.read_text()[:-9])  # a kill leaves a torn line
    rows, result = run(toy, tmp_path)
    assert rows == uninterrupted[0] and result["scores"] == uninterrupted[1]["scores"]
    assert len(now.read_text().splitlines()) == 1 + 24 - 4  # what was kept is not answered again
    assert run(toy, tmp_path, "--limit", 2)[1]["tokens"] == sum(
        row["tokens"] for row in list(rows.values())[:2])  # of what the result is about


# --------------------------------------------------------------------------------- bad input

def test_the_defaults_are_the_papers():
    args = parsed("--model", "m", "--benchmark", "a=b", "--output", "o")
    assert args.frames == [16, 32, 64] and args.max_pixels == 256 * 28 * 28
    assert (args.temperature, args.top_p, args.max_new_tokens) == (0.01, 0.001, 1024)


@pytest.mark.parametrize("more, message", [
    (["--benchmark", "toy=absent.json"], "absent.json"),
    (["--benchmark", "a=TOY/test.json", "a=TOY/train.json"], "two files named a"),
    (["--benchmark", "toy=TMP/twice.json"], "2 records have the problem_id 3"),
    (["--output", "TOY/test.json"], "cannot write .*/test.json"),
    (["--model", "no/model/here"], "--model no/model/here: .*no such folder"),
    (["--media_root", "TOY/model"], "none of its media is there.*/media/.*--media_root"),
])
def test_bad_flags_end_in_one_sentence_before_the_model_is_loaded(
        toy, tmp_path, monkeypatch, more, message):
    monkeypatch.setattr(annotate, "load_answering_model", None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    records = json.loads((toy / "test.json").read_text())
    (tmp_path / "twice.json").write_text(json.dumps(records + records[3:4]))
    more = [text.replace("TOY", str(toy)).replace("TMP", str(tmp_path)) for text in more]
    with pytest.raises(InputError, match=message):
        run_here(evaluate, *flags(toy, tmp_path / "out", *more))


def test_rows_of_another_configuration_are_refused_and_named(toy, tmp_path, monkeypatch):
    model, later, out = tmp_path / "model", tmp_path / "later", tmp_path / "out"
    shutil.copytree(toy / "model", model)

    def evaluated(model, *more):
        return run(toy, out, "--limit", 2, "--model", model, *more)

    def train_a_little_more(folder):
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[len(data) // 2:] = bytes(byte ^ 1 for byte in data[len(data) // 2:])
        (folder / "model.safetensors").write_bytes(data)
    evaluated(model)
    monkeypatch.setattr(annotate, "load_answering_model", None)
    with pytest.raises(InputError, match="max_new_tokens was 12, is 13"):
        evaluated(model, "--max_new_tokens", 13)
    with pytest.raises(InputError, match="max_pixels was 784, is 3136"):
        evaluated(model, "--order", "blind", "--max_pixels", 4 * 28 * 28)
    evaluated(model)  # complete: no model is needed
    train_a_little_more(model)  # under the same name
    with pytest.raises(InputError, match="model_sha256 was .*, is "):
        evaluated(model)
    model.rename(later)  # another name says more than a hash
    with pytest.raises(InputError, match=f"It is of --model {model}: write to another"):
        evaluated(later)
