"""Claims about the benchmarks: releases read, scores by hand, servers, judge, comparison."""
import json
import sys

import numpy as np
import pytest
from PIL import Image

import build_data
import evaluate
from build_data import InputError, MediaError, load_vision, write_video
from conftest import (LIMITS, ROOT, Server, logged, picture_of, put, ramp, reply, run_here,
                      table_rows)
from test_evaluate import answered, choice, flags


def converted(name, path, out, *more):
    """Runs `convert` in this process; returns its file."""
    args = build_data.parse_args(["convert", name, str(path), "--out", str(out), *more])
    build_data.convert(args)
    return out


def read(name, path, media_root=None):
    """The records of a benchmark's file, by problem_id."""
    return {record["problem_id"]: record
            for record in evaluate.read_records(name, path, media_root)}


def numbers(vision):
    """Which frames of a ramp a video shows."""
    return (vision.frames.float().mean((1, 2, 3)) / 10).round().int().tolist()


def folder_of_frames(folder, count):
    """A folder with a ramp's frames, as MVBench releases one of its tasks."""
    folder.mkdir(parents=True)
    for i, frame in enumerate(ramp(count)):
        Image.fromarray(frame).save(folder / f"{i + 1:05d}.jpg", quality=95)


def put_ramp(path):
    """Writes a video of eight frames that gets brighter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, ramp(), 2)


# -------------------------------------------------------------------------------- releases

# {"benchmarks": {claim: a release's format, its files and fields of every record by problem_id},
#  "refused": {claim: a format, a file of no release, and why}}
RELEASES = json.loads((ROOT / "tests/releases.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("claim", RELEASES["benchmarks"])
def test_a_release_is_read_as_records(claim, tmp_path):
    name, files, expected = RELEASES["benchmarks"][claim].values()
    for file, content in files.items():
        put(tmp_path / "release" / file, content)
    records = read(name, converted(name, tmp_path / "release", tmp_path / "a.json"),
                   tmp_path / "release")
    assert list(records) == list(expected)
    for problem_id, fields in expected.items():
        record = records[problem_id]
        assert {key: record[key] for key in fields} == fields
        assert record["media_path"] == f"{tmp_path}/release/{record['path'].removeprefix('./')}"


@pytest.mark.parametrize("truth, answers", [
    ("12.97", {"12.9701": 1, "about 12.97 g": 1, "12.9": 0, "112.97": 0}),
    ("Net Income", {"the net income.": 1, "income": 0, "": 0}),
    ("A", {"A": 1, "a": 1, "(A)": 1, "D, the attractive part": 0, "I cannot say": 0, "": 0}),
    ("['24/7', '3.429', '3.43]", {"24/7": 1, "3.43": 1, "3.429 ft/s": 1, "3": 0, "24": 0, "'": 0}),
    ("['7', 'seven']", {"7": 1, "Seven.": 1, "17": 0, "six": 0}),
    ('["Newton\'s law", "inertia"]', {"Newton's law": 1, "by inertia": 1, "law": 0, "s": 0}),
    ("['up', '']", {"up": 1, "down": 0}),  # nothing is in every answer
    ("[0, 5]", {"[0, 5]": 1, "0": 0, "5": 0}),  # an interval
])
def test_videommmu_grades_an_open_answer_by_number_letter_text_or_any_item(truth, answers):
    for text, score in answers.items():
        assert evaluate.open_answer(text, truth) == score, text


def released_row(number, path, **more):
    """A row of a released eval_*.json."""
    return {"problem_id": number, "problem": "Which?", "data_type": "video", "path": path,
            "problem_type": "multiple choice", "options": ["A. up", "B. down"],
            "original_question_type": "", "solution": "<answer>B</answer>", **more}


@pytest.mark.parametrize("name, rows, groups", [
    ("videommmu", [released_row(number, "./dev_Biology_3.mp4") for number in (300, 301, 900, 901)],
     [{**({"track": track} if track else {}), "subject": "Biology", "discipline": "Science"}
      for track in ("adaptation", "comprehension", "perception", None)]),
    ("videomme", [released_row(1, "./videos/x.mp4", duration="long", domain="Knowledge",
                               sub_category="Law", task_type="Action Reasoning"),
                  released_row(2, "./videos/x.mp4", duration="long")],
     [{"duration": "long", "domain": "Knowledge", "sub_category": "Law",
       "task_type": "Action Reasoning"}, {"duration": "long"}]),
    ("mvbench", [released_row(200, "./ssv2_video/2.mp4"), released_row(4000, "./flat.mp4"),
                 released_row(201, "./perception/videos/1.mp4"),
                 released_row(1401, "./star/Charades_v1_480/1.mp4"),  # vlnqa's number
                 released_row(4001, "./vlnqa/1.mp4"), released_row("x1", "./vlnqa/1.mp4"),
                 released_row(7, "./1.mp4", original_question_type="State Change")],
     [{"task": "action_antonym"}, {"task": "unexpected_action"}, {"task": "action_count"}, {}, {},
      {}, {"task": "state_change"}]),
    ("mmvu", [released_row(1, "./videos/Materials_Science/0.mp4")],
     [{"subject": "Materials_Science", "discipline": "Science"}]),
])
def test_released_rows_have_groups_by_number_folder_and_field(name, rows, groups, tmp_path):
    put(tmp_path / "eval.json", rows)
    assert [r["groups"] for r in read(name, tmp_path / "eval.json").values()] == groups


def test_mvbench_s_released_rows_of_frames_are_videos_and_fail_alone(tmp_path):
    put(tmp_path / "eval.json", [
        released_row(1, "./ssv2_video/1.mp4", start=1.0, end=2.0),
        released_row(1601, "./tvqa/frames_fps3_hq/a", data_type="frame", fps=3, start=1, end=5),
        released_row(1602, "./tvqa/frames_fps3_hq/a", data_type="frame"),
        released_row(1603, "./tvqa/frames_fps3_hq/absent", data_type="frame")])
    folder_of_frames(tmp_path / "tvqa/frames_fps3_hq/a", 24)  # 8 seconds
    whole, part, all_of_it, absent = read("mvbench", tmp_path / "eval.json").values()
    assert "video_start" not in whole  # as in the paper's code
    assert {r["groups"]["task"] for r in (part, all_of_it, absent)} == {"episodic_reasoning"}
    # 3 frames a second: seconds 1 to 5 are frames 3 to 15, of which 2 a second are 8
    shown = load_vision(part, **LIMITS)
    assert numbers(shown) == [3, 5, 6, 8, 10, 12, 13, 15] and shown.metadata["fps"] == 3
    assert numbers(load_vision(all_of_it, **LIMITS)) == [0, 3, 7, 10, 13, 16, 20, 23]
    with pytest.raises(MediaError, match="frames_fps3_hq/absent"):
        load_vision(absent, **LIMITS)


def test_a_converted_release_lies_in_its_folder_or_has_paths_below_a_folder_above(
        tmp_path, capsys):
    folder = tmp_path / "data/VideoMMMU"
    put(folder / "perception.json", [{"id": "dev_Biology_3", "question": "Q?", "answer": "A",
                                      "options": ["up", "down"]}])
    above = converted("videommmu", folder, tmp_path / "data/v.json", "--media_root",
                      f"{tmp_path}/data")
    for name in ("all", "again"):  # the second finds the first's file among the release's
        inside = converted("videommmu", folder, folder / f"{name}.json")
        assert capsys.readouterr().out.endswith(
            f"{folder}/{name}.json: 1 records; paths in it are relative to {folder}\n")
    for file, path in ((inside, "./Science/dev_Biology_3.mp4"),
                       (above, "./VideoMMMU/Science/dev_Biology_3.mp4")):
        record, = read("videommmu", file).values()
        assert record["path"] == path and record["data_source"] == "VideoMMMU/perception"
        assert record["media_path"] == f"{folder}/Science/dev_Biology_3.mp4"
    with pytest.raises(InputError, match="--media_root .*/elsewhere is not above"):
        converted("videommmu", folder, tmp_path / "a.json", "--media_root", f"{tmp_path}/elsewhere")


def test_subjects_of_like_names_are_distinguished():
    subjects = build_data.benchmark_facts()["videommmu"]["subjects"]
    assert sum(map(len, subjects.values())) == 30
    for discipline, names in subjects.items():
        for name in names:
            assert build_data.subject_groups(f"./Art/validation_{name}_12.mp4", subjects) == {
                "subject": name, "discipline": discipline}


def test_a_folder_without_frames_or_rate_is_a_media_error(tmp_path):
    (tmp_path / "empty").mkdir()
    folder_of_frames(tmp_path / "clip", 8)
    for name, rate in (("empty", 3), ("clip", None)):
        record = {"data_type": "video", "media_path": f"{tmp_path}/{name}", "video_fps": rate}
        with pytest.raises(MediaError, match=f"{name}: a folder needs frames .* video_fps"):
            load_vision(record, **LIMITS)


@pytest.mark.parametrize("claim", RELEASES["refused"])
def test_what_a_release_would_not_have_is_refused_by_name(claim, tmp_path):
    name, file, content, message = RELEASES["refused"][claim].values()
    put(tmp_path / file, content)
    with pytest.raises(InputError, match=f"{file} differs from the release of .*: .*{message}"):
        converted(name, tmp_path, tmp_path / "a.json")


def test_what_is_no_release_is_refused_by_name(tmp_path, monkeypatch):
    put(tmp_path / "videomme/test.parquet", "")
    for path in (tmp_path, tmp_path / "videomme/test.parquet"):  # of a file, the root is unknown
        with pytest.raises(InputError, match="has no test.jsonl .* of VSI-Bench: give its folder"):
            converted("vsibench", path, tmp_path / "a.json")
    with pytest.raises(InputError, match="build_data.py convert mvbench .* --out mvbench.json"):
        read("mvbench", tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    with pytest.raises(InputError, match="needs the package pyarrow"):
        converted("videomme", tmp_path, tmp_path / "a.json")


# ---------------------------------------------------------------------------------- scores

def result_of(rows, **fields):
    """A result with what a comparison needs."""
    return {"benchmark": "toy", "frames": 8, "order": "ordered", "rows": rows, "configuration": {},
            "arguments": {"model": "m", "seed": 0}} | fields


def graded(task, solution, answers, **fields):
    """Questions of a task, one for each answer, and their rows as they are graded."""
    records = [choice(f"{task}{i}", groups={"task": task}, solution=f"<answer>{solution}</answer>",
                      **fields) for i in range(len(answers))]
    return records, answered(records, answers)


def test_vsi_bench_s_two_overalls_are_those_computed_by_hand_with_their_coverage():
    """A task of which nothing was answered is not in the mean."""
    parts = [graded("object_counting", "2", ["2", "1"], problem_type="regression"), *(
        graded(task, "A", answers) for task, answers in (
            ("object_rel_direction_easy", "AAAA"), ("object_rel_direction_medium", "AB"),
            ("object_rel_direction_hard", "B"), ("route_planning", "AAAB"),
            ("object_rel_distance", [None, None])))]
    records, rows = (sum(both, []) for both in zip(*parts))
    scores = evaluate.score(records, rows, 0, evaluate.BENCHMARKS["vsibench"].overalls)
    # mra: 1 and .1 (the boundary counts); as released: 1 and 0
    assert scores["task: object_counting"]["mra"]["mean"] == pytest.approx(0.55)
    assert scores["task: object_counting"]["mra_released"]["mean"] == 0.5
    # the paper: mean of accuracy 8/11 and released MRA .5
    assert scores["mean of types (the paper's)"]["score"]["mean"] == pytest.approx(
        (8 / 11 + 0.5) / 2)
    # the benchmark: direction (1 + .5 + 0) / 3 = .5, route .75, counting .55
    assert scores["mean of tasks"]["score"]["mean"] == pytest.approx((0.5 + 0.75 + 0.55) / 3)
    for group, coverage in (("mean of tasks", (13, 15)), ("task: object_rel_distance", (0, 2))):
        assert (scores[group]["answered"], scores[group]["records"]) == coverage


def test_a_benchmark_without_task_names_falls_back_to_the_plain_mean():
    records = [choice(number, groups={}) for number in range(3)]
    scores = evaluate.score(records, answered(records, "AAB"), 0,
                            evaluate.BENCHMARKS["mvbench"].overalls)
    assert list(scores) == ["all", "problem_type: multiple choice"]  # the first is the headline
    assert scores["all"]["score"]["mean"] == pytest.approx(2 / 3)


def vinoground_graded(answers):
    """Records and graded rows of pairs: {pair: letters for text pos, text neg, video pos, video
    neg}, where A is right and a blank unanswered."""
    records = [choice(f"{task}/{pair}_{side}", pair=pair, groups={"task": task})
               for pair in answers for task in ("text", "video") for side in ("pos", "neg")]
    letters = [None if letter == " " else letter for letter in "".join(answers.values())]
    return records, answered(records, letters)


def test_vinoground_counts_pairs_with_intervals_over_pairs_and_their_drop():
    overalls = evaluate.BENCHMARKS["vinoground"].overalls
    records, rows = vinoground_graded({"1": "AAAA", "2": "AABA", "3": "ABAA", "4": "AAA "})
    scores = evaluate.score(records, rows, 0, overalls)
    # text: pairs 1, 2, 4 of four; video: 1, 3 of three; group: 1 of three
    for name, mean, count in (("text", 3 / 4, 4), ("video", 2 / 3, 3), ("group", 1 / 3, 3)):
        whole = scores[f"{name} score"]
        assert whole["score"]["mean"] == pytest.approx(mean)
        assert (whole["answered"], whole["records"], whole["score"]["n"]) == (count, 4, count)
    assert scores["all"]["score"]["mean"] == pytest.approx(13 / 15)  # questions
    assert list(scores)[0] == "group score"  # the headline
    alone = evaluate.score(*vinoground_graded({"1": "AAAB"}), 0, overalls)["group score"]["score"]
    assert alone == {"mean": 0, "low": None, "high": None, "n": 1}  # four videos, one pair
    # shuffled, pair 1 is lost and pair 3 won: text pairs lose (1 + 0 - 1 + 0) / 4
    _, shuffled = vinoground_graded({"1": "BBAA", "2": "AABB", "3": "AABA", "4": "AAAA"})
    drops = evaluate.score(records, shuffled, 0, overalls, rows)
    assert drops["text score"]["drop"]["mean"] == 0 and drops["text score"]["drop"]["n"] == 4
    # video pairs 1, 2, 3 that both answered: 1 - 1, 0 - 0, 1 - 0
    assert drops["video score"]["drop"]["mean"] == pytest.approx(1 / 3)
    assert drops["group score"]["drop"]["mean"] == pytest.approx(1 / 3)


def test_reflections_are_counted():
    row, = answered([choice(1)], ["Wait, that is red. Hmm... Let me check. Let's verify this. "
                                  "The waiter awaits."])
    assert row["reflections"] == 4


# ----------------------------------------------------------------- whole runs and comparison

def test_a_release_is_answered_and_stands_in_the_paper_s_table(toy, tmp_path, capsys):
    folder, out = tmp_path / "MMVU", tmp_path / "out"
    put(folder / "validation.json", [
        {"id": f"validation_{i}", "video": f"https://x/videos/{subject}/0.mp4",
         "question_type": "multiple-choice", "question": "Which?", "answer": "A",
         "choices": {"A": "up", "B": "down"}}
        for i, subject in enumerate(("Biology", "Art", "Chemistry"))])
    for subject in ("Biology", "Art"):
        put_ramp(folder / f"videos/{subject}/0.mp4")
    records = converted("mmvu", folder, folder / "records.json")
    run_here(evaluate, *flags(toy, out, "--media_root", folder, "--benchmark", f"mmvu={records}",
                              f"mine={records}", "--compare", "paper", "--max_new_tokens", 2))
    result = json.loads((out / "mmvu_8_ordered.json").read_text())
    skipped, = result["skipped"]
    assert (result["answered"], result["records"]) == (2, 3) and "Chemistry" in skipped["reason"]
    assert {"discipline: Science", "subject: Art"} <= {*result["scores"]}
    row = result["rows"][0]
    assert row["reward"] == row["accuracy"] + row["format"] and row["size"] == [8, 28, 28]
    assert row["prompt_tokens"] > 0
    printed = capsys.readouterr().out
    assert "mmvu: 3 questions; MMVU (mc) has 625" in printed
    assert "| 2/3 " in printed and "skipped 1, listed in" in printed
    head, ours, *_, theirs = table_rows(printed[printed.index("| Models"):].splitlines())
    assert head == ["Models", "Frames", "VSI-Bench", "VideoMMMU", "MMVU (mc)", "MVBench",
                    "TempCompass", "VideoMME (wo sub)"]
    assert ours[4].endswith(" 2/625") and ours[0] == f"{toy}/model (ordered)"
    assert (out / "mine_8_ordered.json").exists()  # which the table leaves out
    assert theirs == ["Video-R1-7B, paper", "64", "37.1", "52.4", "63.8", "64.8", "73.2", "61.4"]


def result_file(path, answers):
    """A result over four questions whose answer is A, on three videos."""
    put(path, result_of(answered([choice(number, path=path) for number, path in enumerate("aabc")],
                                 [None if letter == " " else letter for letter in answers])))
    return str(path)


def test_two_results_are_compared_by_question_without_a_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "Generator", None)
    run_here(evaluate, "--diff", result_file(tmp_path / "a.json", "ABB "),
             result_file(tmp_path / "b.json", "BAAA"))
    lines = capsys.readouterr().out.splitlines()
    head, row, *_ = table_rows(lines)
    # 1 of 3 right, then 2 of 3; by video: a 0, b +1 over 2 and 1 questions
    assert [cell.split()[0] for cell in row] == ["all", "3", "33.3", "66.7", "33.3"]
    assert row[-1] == "33.3 [0.0, 100.0]"
    assert head[2:4] == ["A: m (ordered)", "B: m (ordered)"]
    assert [line.split(":")[0] for line in lines if "->" in line] == ["0", "1", "2"]
    assert lines[-1] == "3 questions compared; 0 only in A, 1 only in B"


def results_folder(folder, model, **answers):
    """An --output with a result for each order: four questions whose answer is A, by source."""
    records = [choice(number, data_source=source) for number, source in enumerate(
        ("toy/conflict", "toy/conflict", "toy/agree", "other"))]
    ordered = ()
    for order, letters in answers.items():  # ordered first
        rows = answered(records, letters)
        put(folder / f"toy_8_{order}.json", result_of(
            rows, order=order, scores=evaluate.score(records, rows, 0, ordered=ordered),
            arguments={"model": model, "seed": 0},
            configuration={"model": model, "fps": len(model)}))
        ordered = rows
    return str(folder)


def test_two_folders_are_compared_in_one_table_of_ordered_shuffled_and_gap(tmp_path, capsys):
    folders = [results_folder(tmp_path / "a", "toy/sft", ordered="BBAA", shuffled="BABA"),
               results_folder(tmp_path / "b", "toy/tgrpo", ordered="AAAB", shuffled="ABBB")]
    run_here(evaluate, "--diff", *folders)
    settings, *lines = capsys.readouterr().out.splitlines()
    assert settings == "toy_8: fps differs: 7 | 9" and len({len(line) for line in lines}) == 1
    head, *rows = table_rows(lines)
    assert head == ["toy_8: score, %", "answered", "model", "ordered", "shuffled", "gap"]
    assert [row[:3] for row in rows] == [
        ["all", "4", "toy/sft"], ["", "4", "toy/tgrpo"],
        ["data_source: other", "1", "toy/sft"], ["", "1", "toy/tgrpo"],
        ["agree", "1", "toy/sft"], ["", "1", "toy/tgrpo"],
        ["conflict", "2", "toy/sft"], ["", "2", "toy/tgrpo"]]
    assert all("[" in text for text in rows[0][3:])  # intervals
    for row, expected in ((rows[0], ["50.0", "50.0", "0.0"]), (rows[1], ["75.0", "25.0", "50.0"]),
                          (rows[6], ["0.0", "50.0", "-50.0"])):
        assert [text.split(" ")[0] for text in row[3:]] == expected
    (tmp_path / "b/toy_8_shuffled.json").unlink()
    with pytest.raises(InputError, match="a and .*b have no <name>_<frames>_shuffled.json"):
        run_here(evaluate, "--diff", *folders)


def test_what_is_no_result_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(InputError, match="is not a result"):
        run_here(evaluate, "--diff", tmp_path / "x.json", "y")


# -------------------------------------------------------------------------------- a server

@pytest.fixture
def server():
    with Server() as http:
        http.flags = ["--api_base", http.base, "--model", "served", "--concurrency", "2"]
        yield http


def greys_of(body):
    """The mean brightness of each picture of a request."""
    *pictures, _ = body["messages"][0]["content"]
    return [np.asarray(picture_of(picture["image_url"]["url"])).mean() for picture in pictures]


def test_vinoground_is_answered_scored_by_pairs_and_compared_with_reversed_frames(
        toy, tmp_path, server, capsys):
    put_ramp(tmp_path / "ramp.mp4")
    put(tmp_path / "v.json", [record | {"data_type": "video", "path": "./ramp.mp4"}
                              for record in vinoground_graded({"1": "AAAA", "2": "AAAA"})[0]])

    def answer(body, number):  # right where the video gets brighter
        first, *_, last = greys_of(body)
        return reply(f"<answer>{'A' if first < last else 'B'}</answer>")
    server.answer = answer
    run_here(evaluate, *flags(toy, tmp_path / "out", *server.flags, "--media_root", tmp_path,
                              "--benchmark", f"vinoground={tmp_path}/v.json",
                              "--order", "reversed", "ordered",  # whatever their order here
                              "--compare", "paper"))
    for order, mean, drop in (("ordered", 1, None), ("reversed", 0, 1)):
        result = json.loads((tmp_path / f"out/vinoground_8_{order}.json").read_text())
        for name in ("group score", "text score", "video score"):
            whole = result["scores"][name]
            assert (whole["score"]["mean"], whole["records"]) == (mean, 2)
            assert whole.get("drop", {}).get("mean") == drop
    printed = capsys.readouterr().out
    assert "vinoground: 8 questions; Vinoground has 2000" in printed
    head, *rows = table_rows(printed[printed.index("| Models"):].splitlines())
    assert head[-2:] == ["VideoMME (wo sub)", "Vinoground"]
    assert [row[-1] for row in rows[:3]] == [
        "100.0 [100.0, 100.0] 8/2000", "0.0 [0.0, 0.0] 8/2000, drop 100.0 [100.0, 100.0]", ""]
    assert {len(row) for row in rows} == {len(head)}


def test_the_judge_gives_the_share_of_temporal_responses_among_questions_that_need_it(
        tmp_path, server, capsys):
    path = result_file(tmp_path / "toy_8_ordered.json", "ABAB")

    def answer(body, number):
        text = body["messages"][0]["content"][0]["text"]
        if "Response:" not in text:  # three of four questions need it; one reply is cut off
            return reply("<think>No", finish="length") if "Which 3?" in text else reply("Yes.")
        return reply("No" if "Which 1?" in text else "**yes**")
    server.answer = answer
    more = ["--judge", path, "--output", tmp_path / "judged", *server.flags]
    run_here(evaluate, *more)
    assert "temporal reasoning in 66.7 [50.0, 100.0] % of 3 responses" in capsys.readouterr().out
    result = json.loads((tmp_path / "judged/toy_8_ordered.judge.json").read_text())
    assert (result["questions"], result["judged"], result["needs"]) == (4, 3, 3)
    assert result["uses"]["mean"] == pytest.approx(2 / 3)
    assert [row["uses"] for row in result["rows"]] == [True, False, True]
    assert len(server.requests) == 7
    run_here(evaluate, *more)  # verdicts are kept: nothing is requested again
    assert len(server.requests) == 7


def test_a_model_on_this_machine_can_judge(toy, tmp_path, capsys):
    path = result_file(tmp_path / "toy_8_ordered.json", "ABAB")
    run_here(evaluate, "--judge", path, "--output", tmp_path / "judged", "--model", toy / "model",
             "--max_new_tokens", 2, "--num_workers", 0)
    assert "4 questions answered, 0 judged, 0 need" in capsys.readouterr().out
    assert len(logged(tmp_path / "judged", "toy_8_ordered.questions.rank0")) == 5
