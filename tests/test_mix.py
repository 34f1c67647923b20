"""Files of records: mixed from releases by a recipe, checked against their media, and counted."""
import json
import os
import shutil
import time
from collections import Counter

import numpy as np
import pytest
import qwen_vl_utils  # noqa: F401  a decoder is a fork: each would import it, slowly
from PIL import Image

import annotate
import build_data
import rewards
from build_data import (FIGURE_2, Dropped, InputError, draft, figure_rows, load_records,
                        make_record, option_texts, read_recipe, split_options, spread,
                        wanted_type, write_video)
from conftest import ROOT, cells, logged, put

ALL_TYPES = ["multiple choice", "numerical", "OCR", "free-form", "regression"]


def entry(form, annotation, media=".", kinds=ALL_TYPES, count=100, **more):
    return {"source": "S", "category": "Chart", "problem_type": list(kinds), "count": count,
            "format": form, "annotation": annotation, "media": media, **more}


def command(*argv):
    """Runs a command of build_data.py in this process."""
    args = build_data.parse_args(list(map(str, argv)))
    args.run(args)


def mix(folder, recipe, *flags):
    """Runs `mix`; returns the records of its file and its report."""
    put(folder / "recipe.json", recipe)
    command("mix", "--recipe", folder / "recipe.json", "--out", folder / "out.json", *flags)
    return json.loads((folder / "out.json").read_text()), cells(folder / "out.report.md")


def llava(file, *turns):
    return {"image": file, "conversations": [
        {"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]}


# ----------------------------------------------------------------------------- the recipe

def test_the_recipe_is_figure_2():
    """Counts read off the figure, in thousands, by category."""
    recipe, thousands = read_recipe(FIGURE_2), Counter()
    for item in recipe:
        thousands[item["category"]] += item["count"] / 1000
    assert len(recipe) == 46
    assert {key: round(value, 1) for key, value in thousands.items()} == {
        "General (video)": 116, "General (image)": 15, "Chart": 24, "OCR": 18, "Math": 35.5,
        "Knowledge": 37.5, "Spatial": 20}


def test_the_paper_s_recipe_says_what_is_missing_below_the_folder_of_the_records(tmp_path):
    """Where the stages will look for the media of the records; the recipe lies elsewhere."""
    flags = ("mix", "--recipe", FIGURE_2, "--out", tmp_path / "data" / "out.json")
    with pytest.raises(InputError, match=f"{tmp_path}/data lacks 46 of 46 annotation files"):
        command(*flags)
    assert not (tmp_path / "data" / "out.json").exists()
    put(tmp_path / "sources/Chart/ChartQA/train/train_human.json",
          [{"imgname": "1.png", "query": "How many?", "label": "3"}])
    command(*flags, "--media_root", tmp_path / "sources", "--skip_missing")
    record, = json.loads((tmp_path / "data" / "out.json").read_text())
    assert record["path"] == "./Chart/ChartQA/train/png/1.png"


GOOD = entry("llava", "a.json")


@pytest.mark.parametrize("recipe, words", [
    ("{", "cannot read .*recipe.json"), ("7", "cannot read .*recipe.json"),
    (["llava"], "entry 0 .*: it must be a JSON object, not a str"),
    *(([GOOD, GOOD | change], r"entry 1 \(S\).*" + words) for change, words in (
        ({"count": "5"}, "count must be of type int, not '5'"),
        ({"count": -1}, "count must be at least 0, not -1"),
        ({"format": "x"}, "format must be one of .*'video_r1'.*, not 'x'"),
        ({"problem_type": ["mc"]}, r"must be one or more of .*'OCR'.*, not \['mc'\]"),
        ({"problem_type": []}, r"problem_type must be one or more of .*, not \[\]"),
        ({"media": None}, "media must be of type str, not None"),
        ({"annotation": ""}, "annotation must be a path below --media_root, not ''"),
        ({"annotation": "/data/a.json"}, "a path below --media_root, not '/data/a.json'")))])
def test_a_wrong_recipe_names_file_or_entry_and_key(tmp_path, recipe, words):
    put(tmp_path / "recipe.json", recipe)
    with pytest.raises(InputError, match=words):
        read_recipe(tmp_path / "recipe.json")


# ---------------------------------------------------------------------- the release formats

def convert(folder, form, annotation, media=".", kinds=ALL_TYPES):
    """The records that a release yields, without numbers, letters as in the release; the counts."""
    counts, item = Counter(), entry(form, annotation, media, kinds)
    records = list(build_data.candidates_of(item, folder, lambda path: False, set(), counts))
    return records, counts


def question(path, problem, answer, *options, kind="multiple choice", **more):
    """The record that a converter should give."""
    return {"problem": problem, "problem_type": kind, "options": list(options), "path": path,
            "data_type": "video" if path.endswith("mp4") else "image",
            "solution": f"<answer>{answer}</answer>", "data_source": "S", **more}


# {"sources": {claim: a release's format, annotation files, media folder, files and records}}
RELEASES = json.loads((ROOT / "tests/releases.json").read_text(encoding="utf-8"))["sources"]


@pytest.mark.parametrize("claim", RELEASES)
def test_a_release_becomes_records(claim, tmp_path):
    form, annotation, media, files, expected = RELEASES[claim].values()
    for name, content in files.items():
        put(tmp_path / name, content)
    assert convert(tmp_path, form, annotation, media)[0] == expected


def test_the_map_that_nextqa_needs_is_named(tmp_path):
    put(tmp_path / "train.csv", "video,question,answer,a0,a1\n1,what moves,1,cat,dog\n")
    with pytest.raises(InputError, match="cannot read .*map_vid_vidorID.json"):
        convert(tmp_path, "nextqa", "train.csv")


@pytest.mark.parametrize("options, texts", [
    # every form of a mark, which is found whatever the forms beside it
    ("Option A: t\nchoice (B). u\n[C] v\nd) w\n- E. x\n**F.** y\nAnswer:", [*"tuvwxy"]),
    ("A、猫\nB．狗\n（C）马\n选项D：鱼\nE】鸟", [*"猫狗马鱼鸟"]),
    ("(A) x\n(B) y\nAnswer with the option's letter from the given choices directly.", ["x", "y"]),
    ("A: see C. elegans\nB: y\nC: z", ["see C. elegans", "y", "z"]),
    ("A. int x;\nB. int y;", ["int x;", "int y;"]), ("A. and\nB. or\nC. not", ["and", "or", "not"]),
    ("A. E. coli\nB. C. elegans", ["E. coli", "C. elegans"]),
    ("A. yeast\nB. a C. elegans\nC. z", ["yeast", "a C. elegans", "z"]),
    ("A. x\nB. \nC. z", ["x", "", "z"])])  # which then is dropped
def test_options_are_taken_out_of_a_question(options, texts):
    assert split_options(f"What?\n{options}") == ("What?", texts)


@pytest.mark.parametrize("text, problem, options", [
    ("Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at "
     "the end.\nQuestion: What?\nChoices:\n(A) 3\n(B) 4", "What?", ["3", "4"]),
    ("What? Options: A. x B. y", "What?", ["x", "y"]),
    ("What? Options: A: x, B: y, C: z", "What?", ["x", "y", "z"]),
    ("What? A. x; B. y or C. z", "What?", ["x", "y", "z"]),
    ("What? (A) x (B) see A. Lee (C) z", "What?", ["x", "see A. Lee", "z"]),
    ("Where is John A. Lee?\nA. x\nB. Sam A. Ray\nC. z", "Where is John A. Lee?",
     ["x", "Sam A. Ray", "z"]),
    ("Is it vitamin A. or not?", "Is it vitamin A. or not?", []),
    ("How many?\nAnswer the question using a single word or phrase.", "How many?", []),
    *((f"{text}\n{end}", text, options) for text in (
        "Select the option that fits.", "It is AB. Select the option that fits.",
        "See it.\nGive a short summary.") for end, options in (
            ("", []), ("A. x\nB. y", ["x", "y"]),
            ("A. x\nB. y\nPlease provide only the letter.", ["x", "y"]))),
    ("什么？选项：A：猫；B：狗", "什么？", ["猫", "狗"]),
    ("点A、B、C在圆上，求角度", "点A、B、C在圆上，求角度", []),
    ("Of\nA. p\nB. q\nwhat? (A) x (B) y (C) z", "Of\nA. p\nB. q\nwhat?", ["x", "y", "z"])])
def test_hints_are_taken_out_and_a_question_s_own_letters_stay(text, problem, options):
    assert split_options(text) == (problem, options)


@pytest.mark.parametrize("unit", [
    "A. ", "(A) x\n", "A. x B. y ", "A: a, ", "a) x\n", "Options: ", "? give ", " ", " \n",
    ", and ", "-"])
def test_the_options_of_a_hundred_thousand_characters_are_found_within_a_second(unit):
    started = time.process_time()
    split_options("What? " + unit * (100_000 // len(unit)) + "!")
    assert time.process_time() - started < 1


def test_released_video_r1_records_come_through_unchanged(tmp_path):
    record = {"problem_id": 7, "problem": "Which?", "data_type": "video", "path": "./STAR/7.mp4",
              "problem_type": "multiple choice", "options": ["A. A. Lee", "B. B. Ray"], "pair": "1",
              "solution": "<answer>B</answer>", "data_source": "STAR", "groups": {"level": "3"}}
    number = record | {"problem": "How many?", "problem_type": "regression", "options": [],
                       "solution": "<answer>3.5</answer>", "video_start": 0.0, "video_end": 2.0}
    put(tmp_path / "a.json", [record | {"process": ""}, number])
    records, _ = mix(tmp_path, [entry("video_r1", "a.json")])
    ours = {"problem_id": 0}  # only the number is ours
    assert [r | ours for r in sorted(records, key=lambda r: r["problem"] == "How many?")] == [
        record | ours, number | ours]
    assert [r["problem_id"] for r in load_records(tmp_path / "out.json")] in ([0, 1], [1, 0])


@pytest.mark.parametrize("options, texts", [
    (["A. s", "(B) t", "c) u", "D: v", "Option E: w", "F - x", "G、y", "（H）z"], [*"stuvwxyz"]),
    *((texts, texts) for texts in (
        ["E. coli", "C. elegans", "B. subtilis"], ["Staph", "E. coli", "Strep"], ["1.5", "2.5"],
        ["10:30", "11:30"], ["A", "B"], ["A-frame", "B-movie"], [])),
    # by letter: sorted, without those that a question lacks
    *((options, ["x", "y"]) for options in (
        {"B": "y", "A": "x"}, {"A": "A. x", "B": "B. y"}, {"A": "x", "B": "y", "C": None},
        {"option_a": "x", "option_b": "y"}))])
def test_letters_are_taken_off_options_where_all_have_theirs(options, texts):
    assert option_texts(options) == texts


def test_a_table_of_one_s_own_becomes_records_by_the_recipe_for_it(tmp_path):
    """As spreadsheets write it: a byte order mark, empty cells where a question needs none."""
    (tmp_path / "mine.csv").write_text(
        "Video,image,question,answer,option_a,option_b,option_c,problem_type,video_start\n"
        "a/1.mp4,,Which way?,B,left,right,,,\n1.mp4,,Which way?,a dog,a cat,a dog,a hat,,1.5\n"
        "1.mp4,,How many?,3,,,,,\n,2.png,\"What, here?\",a red dog,,,,,\n"
        "1.mp4,,How far?,3,,,,regression,\n,2.png,What is written?,STOP,,,,OCR,\n"
        "1.mp4,,Of which type?,3,,,,essay,\n,,Without a medium?,3,,,,,\n"
        "1.mp4,,Which one?,C,left,,right,,\n1.mp4,,Cells without quotes?,a, b, c,d,,,,\n",
        encoding="utf-8-sig")
    item, = read_recipe(ROOT / "assets" / "csv.json")
    records, counts = convert(tmp_path, item["format"], item["annotation"], item["media"],
                              item["problem_type"])
    assert records == [
        question("./a/1.mp4", "Which way?", "B", "A. left", "B. right"),
        question("./1.mp4", "Which way?", "B", "A. a cat", "B. a dog", "C. a hat", video_start=1.5),
        question("./1.mp4", "How many?", "3", kind="numerical"),
        question("./2.png", "What, here?", "a red dog", kind="free-form"),
        question("./1.mp4", "How far?", "3", kind="regression"),
        question("./2.png", "What is written?", "STOP", kind="OCR")]
    assert counts == {"rows": 10, "not of the wanted problem type": 1, "no file": 1,
                      "malformed row": 2}


def test_numbered_options_of_a_table_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("image,question,answer,option_1,option_2\n1.png,Which?,B,x,y\n")
    assert convert(tmp_path, "csv", "a.csv") == ([], {"rows": 1, "malformed row": 1})


@pytest.mark.parametrize("header", ["video;question;answer", "video,question", "question,answer"])
def test_the_columns_that_a_table_lacks_are_named(tmp_path, header):
    (tmp_path / "a.csv").write_text(f"{header}\n1.mp4,What?,x\n")
    with pytest.raises(InputError, match="needs the columns video or image, question and answer"):
        mix(tmp_path, [entry("csv", "a.csv")])


# ---------------------------------------------------------------------------- verification

@pytest.mark.parametrize("found, reason", [
    ({"problem": " "}, "no question"), ({"answer": " "}, "no answer"),
    ({"answer": "A", "options": ["x"]}, "not 2 to 26 options"),
    ({"answer": "A", "options": list("abcdefghijklmnopqrstuvwxyz0")}, "not 2 to 26 options"),
    ({"answer": "A", "options": ["x", " "]}, "an option is empty"),
    ({"answer": "C", "options": ["x", "y"]}, "answer is not one of the options"),
    ({"answer": "A or B", "options": ["x", "y"]}, "answer is not one of the options"),
    ({"answer": "3 or 4", "problem_type": "numerical"}, "answer is not one number"),
    ({"answer": "many", "problem_type": "regression"}, "answer is not one number"),
    ({"file": "../../etc/x.png"}, "path leaves the media folder"),
    ({"file": "/etc/x.png"}, "path leaves the media folder")])
def test_what_cannot_be_a_question_is_dropped_with_its_reason(found, reason):
    with pytest.raises(Dropped) as dropped:
        make_record(draft(**{"file": "1.png", "problem": "?", "answer": "x"} | found),
                    entry("llava", ""), "")
    assert str(dropped.value) == reason


def test_problem_types_are_found_out_not_assumed():
    assert wanted_type("3", [], ALL_TYPES) == "numerical"
    assert wanted_type("three dogs and 2 cats", [], ALL_TYPES) == "OCR"
    assert wanted_type("2 cats", [], ["numerical"]) == "numerical"
    assert wanted_type("3", [], ["multiple choice"]) is None
    assert wanted_type("Blue", [], ["numerical"]) is None
    assert wanted_type("A", ["A. x", "B. y"], ["free-form"]) is None


@pytest.mark.parametrize("answer, number, unit", [
    ("The dog is 3.2 meters away.", "3.2", "meters"), ("1,200 mm", "1,200", "mm"),
    ("About 1 1/2 feet", "1 1/2", "feet"), ("-2.5 m", "-2.5", "m"),
    *((text, text, "") for text in ("between 2 and 3 meters", "2-3 meters", "1,5 m to it"))])
def test_a_distance_is_its_number_and_several_numbers_are_text(answer, number, unit):
    record = make_record(draft("1.png", "How far?", answer),
                         entry("llava", "", kinds=["regression", "free-form"]), "")
    assert record["problem"] == "How far?" + (f" (Unit: {unit})" if unit else "")
    assert record["problem_type"] == ("regression" if unit else "free-form")
    assert record["solution"] == f"<answer>{number}</answer>"


def test_a_new_problem_type_is_one_entry_in_one_table(tmp_path, monkeypatch):
    """From the recipe to the reward: the one of rewards.GRADERS. Its prompt asks for a text."""
    monkeypatch.setitem(rewards.GRADERS, "interval",
                        lambda answer, truth: float(answer.split("-") == truth.split("-")))
    one = entry("llava", "", kinds=["interval"])
    record = make_record(draft("1.png", "When?", "3-5"), one, "")
    assert (record["problem_type"], record["solution"]) == ("interval", "<answer>3-5</answer>")
    put(tmp_path / "a.json", [record | {"problem_id": 1}])
    record, = load_records(tmp_path / "a.json", tmp_path)
    assert build_data.build_messages(record)[0]["content"][1]["text"].endswith(
        "your text answer within the <answer> </answer> tags.")
    assert rewards.accuracy_reward("<answer>3-5</answer>", record) == 1.0
    assert annotate.has_form("3-5", record) and not annotate.has_form("", record)


OKVQA = {"image_id": 7, "question": "What?", "choices": ["cat", "dog"], "correct_choice_idx": 1}
CHART = {"imgname": "1.png", "query": "How many?", "label": "3"}
LETTERED = llava("1.png", "What?\nA. x\nB. y", "A")
RELEASED = {"problem": "Which?", "problem_type": "multiple choice", "options": ["x", "y"],
            "solution": "<answer>A</answer>", "path": "1.mp4"}


@pytest.mark.parametrize("form, good, changes", [
    ("llava", LETTERED, [{"image": ["1.png", "2.png"]}, {"image": 3},
                         {"conversations": LETTERED["conversations"][:1]}]),
    # what json reads and a record cannot hold: no text, no path, half of a character
    ("a_okvqa", OKVQA, [{"question": None}, {"question": 3}, {"question": "What \ud83d?"},
                        {"choices": ["cat", "\udc00 dog"]}]),
    ("chartqa", CHART, [{"imgname": None}, {"imgname": "1\0.png"}]),
    ("video_r1", RELEASED, [{"data_type": "audio"}, {"video_start": "0:12"}, *(
        {"options": options} for options in (
            "A. x\nB. y", ["x", None], [["x"], ["y"]], ["A. x", "A. y"],
            {"A": "x", "B": "", "C": "z"}, {"A": {"text": "x"}, "B": {"text": "y"}}))])])
def test_malformed_rows_are_dropped_and_counted(tmp_path, form, good, changes):
    bad = [{}, "text", None, *(good | change for change in changes)]
    put(tmp_path / "a.json", [good, *bad])
    records, counts = convert(tmp_path, form, "a.json")
    assert len(records) == 1 and counts == {"rows": 1 + len(bad), "malformed row": len(bad)}


# ------------------------------------------------------------------ duplicates, benchmarks

def test_exact_and_near_duplicates_go_and_other_questions_stay(tmp_path):
    def row(file, question, *options):
        lines = [f"\n{'ABCD'[i]}. {option}" for i, option in enumerate(options)]
        return llava(file, question + "".join(lines), "A" if options else "yes")
    put(tmp_path / "a.json", [
        row("1.png", "Is the car red?"), row("1.png", "Is the car red?"),
        row("1.png", "is the car  RED"),  # near
        row("2.png", "Is the car red?"),  # another file
        row("1.png", "Is the car left of the tree?"), row("1.png", "Is the tree left of the car?"),
        row("1.png", "Which?", "x", "y"), row("1.png", "Which?", "y", "x"),  # order of options
        row("1.png", "Which?", "x", "z"), row("1.png", "Which one?", "x", "X"),
        *(row("1.png", f"Is a {sign} b?") for sign in "<>")])
    records, report = mix(tmp_path, [entry("llava", "a.json"), entry("llava", "*.json")])
    assert len(records) == 8 and "3 duplicate" in report and "11 duplicate" in report
    assert report.count("1 options are equal") == 2


def test_a_question_that_was_not_drawn_is_no_duplicate_for_the_next_entry(tmp_path):
    put(tmp_path / "a.json", [llava(f"{i}.png", "What?", f"text {i}") for i in range(10)])
    records, _ = mix(tmp_path, [entry("llava", "a.json", count=count) for count in (4, 9)])
    assert len(records) == 10 and len({r["path"] for r in records}) == 10


def test_media_of_benchmarks_are_left_out_by_folder_and_name_and_by_content(tmp_path):
    put(tmp_path / "bench/eval.json", [
        question(path, "?", "x", kind="free-form", problem_id=i) for i, path in enumerate((
            "./MVB/perception/videos/video_1.mp4", "./MVB/clevrer/video_9.mp4"))])
    media = {"videos/video_1.mp4": "a", "clevrer2/video_1.mp4": "b",
             "copy/other.mp4": "same content", "copy/third.mp4": "not the same"}
    for name, content in {**media, "bench/MVB/clevrer/video_9.mp4": "same content"}.items():
        put(tmp_path / name, content)
    put(tmp_path / "a.json", [llava(name, "What?", "text") for name in media])
    records, report = mix(tmp_path, [entry("llava", "a.json")], "--exclude",
                          tmp_path / "bench" / "eval.json")
    assert {r["path"] for r in records} == {"./clevrer2/video_1.mp4", "./copy/third.mp4"}
    assert "2 file of a benchmark" in report


# -------------------------------------------------------------------------------- sampling

def test_questions_are_spread_over_files_and_none_has_too_many():
    """3 media with 100, 3 and 1 questions: 8 drawn are 4 + 3 + 1; at most 2 each are 2 + 2 + 1."""
    records = [{"path": path, "n": n} for path, count in (("a", 100), ("b", 3), ("c", 1))
               for n in range(count)]

    def drawn(count, per_medium, seed=0):
        chosen = spread(iter(records), count, per_medium, np.random.default_rng(seed))
        return Counter(record["path"] for record in chosen), chosen
    assert drawn(8, 20)[0] == {"a": 4, "b": 3, "c": 1}
    assert drawn(8, 2)[0] == {"a": 2, "b": 2, "c": 1}
    assert drawn(3, 20)[0] == {"a": 1, "b": 1, "c": 1}
    assert drawn(8, 20, seed=1)[1] == drawn(8, 20, seed=1)[1] != drawn(8, 20, seed=2)[1]
    assert drawn(0, 20)[1] == []
    after = spread(iter(records), 8, 2, np.random.default_rng(0), Counter({"a": 2, "b": 1}))
    assert Counter(record["path"] for record in after) == {"b": 1, "c": 1}  # earlier entries' count


# ------------------------------------------------------------------------------- the files

def test_shortfalls_are_reported_and_a_seed_gives_the_same_file(tmp_path):
    put(tmp_path / "a.json", [llava(f"{i % 7}.png", f"What {i}?\nA. x\nB. y", "A")
                                for i in range(50)])
    recipe = [entry("llava", "a.json", count=30), entry("llava", "absent.json", count=5)]
    with pytest.raises(InputError, match="lacks 1 of 2 annotation files: absent.json"):
        mix(tmp_path, recipe)
    first, report = mix(tmp_path, recipe, "--skip_missing")
    assert "| 30 | 30 | | 50 |" in report and "| 5 | 0 | 5 | 0 |" in report
    assert "| all | | 35 | 30 |" in report
    assert mix(tmp_path, recipe, "--skip_missing")[0] == first
    assert mix(tmp_path, recipe, "--skip_missing", "--seed", 1)[0] != first
    assert sorted(record["problem_id"] for record in first) == list(range(30))
    assert load_records(tmp_path / "out.json")


def test_validation_is_split_by_file(tmp_path):
    put(tmp_path / "a.json", [llava(f"{i % 40}.png", f"What {i}?", f"text {i}")
                                for i in range(400)])
    train, _ = mix(tmp_path, [entry("llava", "a.json", count=400)], "--val_share", 0.25)
    val = json.loads((tmp_path / "out_val.json").read_text())
    media = [{record["path"] for record in records} for records in (train, val)]
    assert len(train) + len(val) == 400 and not media[0] & media[1]
    assert 4 <= len(media[1]) <= 16  # 10 of 40 expected
    assert len({r["problem_id"] for r in train + val}) == 400
    with pytest.raises(InputError, match="out_val.json would not belong to this mix: move it"):
        mix(tmp_path, [])


def test_a_mix_that_leaves_a_file_without_a_record_fails_and_writes_nothing(tmp_path, capsys):
    put(tmp_path / "a.json", [{}, llava("1.png", "What?", " "), llava("1.png", "What?", "x")])
    for count, flags in ((0, ()), (1, ("--val_share", 0.01)), (1, ("--val_share", 0.99))):
        with pytest.raises(InputError, match="too few records for .*out.json"):
            mix(tmp_path, [entry("llava", "a.json", count=count)], *flags)
        assert "1 malformed row; 1 no answer" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "recipe.json"}


def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    """Killed while it reads: nothing is written; failing while it writes: nothing is replaced."""
    put(tmp_path / "a.json", [llava("1.png", "What?", "text")])
    mix(tmp_path, [entry("llava", "a.json")])

    def contents():
        return {path: path.read_bytes() for path in tmp_path.iterdir()}
    before = contents()

    def candidates_of(*_):
        yield question("./2.png", "What?", "text", kind="free-form")
        assert contents() == before
        raise KeyboardInterrupt

    def fails():
        yield "half a file"
        raise OSError("disk full")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(build_data, "candidates_of", candidates_of)
        mix(tmp_path, [entry("llava", "a.json")])
    with pytest.raises(InputError, match="cannot write .*out.json: disk full"):
        build_data.write_whole({tmp_path / "new.json": ["x"], tmp_path / "out.json": fails()})
    assert contents() == before  # no half of a file either, which would keep a full disk full


# --------------------------------------------------------------------------------- check

@pytest.fixture
def data(tmp_path):
    """Six records over five files: two good ones (one in two records), and three broken."""
    write_video(tmp_path / "good.mp4", np.zeros((8, 28, 28, 3), np.uint8), fps=2)
    Image.new("RGB", (56, 56)).save(tmp_path / "good.png")
    (tmp_path / "noise.mp4").write_bytes(b"no video" * 100)
    (tmp_path / "empty.png").write_bytes(b"")
    names = ("good.mp4", "good.png", "noise.mp4", "empty.png", "absent.png", "good.mp4")
    put(tmp_path / "a.json", [free_form(i, name) for i, name in enumerate(names)])
    return tmp_path


def free_form(number, path, **more):
    return question(path, "?", "x", kind="free-form", problem_id=number, **more)


def check(folder, *flags):
    """Runs `check`; returns the usable records' ids and the report."""
    command("check", "--data", folder / "a.json", "--num_workers", 0, *flags)
    records = json.loads((folder / "a_clean.json").read_text())
    return [r["problem_id"] for r in records], cells(folder / "a_clean.report.md")


def decoded(folder):
    """Returns the files in the order in which `check` has decoded them."""
    return [row["clip"][0] for row in logged(folder, "a_clean.media")]


def test_records_with_usable_media_stay_as_they_are_and_others_are_named(data):
    ids, report = check(data, "--num_workers", 2)
    assert ids == [0, 1, 5]
    before = json.loads((data / "a.json").read_text())
    assert json.loads((data / "a_clean.json").read_text()) == [before[i] for i in ids]
    assert "| the file is empty (0 bytes) | 1 | 1 | empty.png |" in report
    assert "| [Errno 2] No such file or directory: 'it' | 1 | 1 | absent.png |" in report
    assert "noise.mp4" in report
    assert sorted(decoded(data)) == ["absent.png", "empty.png", "good.mp4", "good.png", "noise.mp4"]
    assert load_records(data / "a_clean.json")


def test_a_second_run_decodes_only_what_failed_or_changed(data):
    check(data)
    with open(data / "a_clean.media.jsonl", "a") as file:
        file.write('{"clip": ["good.png"')  # a kill tore this line
    shutil.copy(data / "good.png", data / "absent.png")  # repaired
    os.utime(data / "good.mp4", (1, 1))  # changed
    ids, report = check(data)
    assert ids == [0, 1, 4, 5] and "absent" not in report
    assert decoded(data)[5:] == ["good.mp4", "noise.mp4", "empty.png", "absent.png"]
    assert check(data, "--min_pixels", 5 * 28 * 28)[0] == [0, 1, 4, 5]  # other limits
    assert decoded(data)[9:].count("good.mp4") == 1
    pytest.importorskip("decord")
    check(data, "--min_pixels", 5 * 28 * 28, "--video_reader", "decord")
    assert decoded(data)[14:].count("good.mp4") == 1


def test_a_damaged_log_is_named(data):
    (data / "a_clean.media.jsonl").write_text("no row\n")
    with pytest.raises(InputError, match="a_clean.media.jsonl is damaged: .*; remove it"):
        check(data)


def test_a_folder_that_cannot_be_is_named_before_the_work(data):
    with pytest.raises(InputError, match="cannot write .*a.json/out.json"):
        check(data, "--out", data / "a.json" / "out.json")


def test_parts_of_one_video_are_checked_one_by_one(data):
    put(data / "a.json", [free_form(0, "good.mp4", video_start=0.0, video_end=4.0),
                            free_form(1, "good.mp4", video_start=90.0, video_end=95.0)])
    ids, report = check(data)
    assert ids == [0] and "| 1 | 1 | good.mp4 |" in report


def test_records_that_nothing_can_be_earned_on_are_dropped_with_their_reason(data):
    put(data / "a.json", [
        *(question("good.mp4", "?", answer, kind="numerical", problem_id=i)
          for i, answer in enumerate(("12", "00:12", "many"))), free_form(3, "absent.png")])
    ids, report = check(data)
    assert ids == [0]
    assert "| no answer can match the solution | 1 | 2 | good.mp4 |" in report
    assert "absent.png" in report and decoded(data).count("good.mp4") == 1


# --------------------------------------------------------------------------------- stats

def test_stats_stand_beside_figure_2(tmp_path, capsys):
    records = [question(path, "?", "A", *(["A. x", "B. y"] if kind == "multiple choice" else []),
                        kind=kind, data_source=source, problem_id=i)
               for i, (source, kind, path) in enumerate((
                   ("LLaVA-Video-178K/30_60_s_youtube_v0_1", "multiple choice", "./a/1.mp4"),
                   ("Multimath-300k", "numerical", "./Math/1.mp4"),
                   ("unnamed", "OCR", "./OCR/TextVQA/1.mp4"), ("mine", "OCR", "./b/1.mp4"),
                   ("TabMWP", "numerical", "./Chart/TabMWP/1.mp4")))]
    rows = {key: value for key, value in figure_rows(records).items() if value[0]}
    assert rows == {("General (video)", "LLaVA-Video-178K", "multiple choice"): [1, 73000],
                    ("Math", "Multimath-300K", "multiple choice, numerical"): [1, 27000],
                    ("OCR", "TextVQA", "OCR"): [1, 2000],
                    ("not in Figure 2", "mine", "OCR"): [1, 0],
                    ("Chart", "TabMWP", "numerical"): [1, 2000]}
    put(tmp_path / "a.json", records)
    command("stats", "--data", tmp_path / "a.json", "--out", tmp_path / "s.md")
    assert (tmp_path / "s.md").read_text() in capsys.readouterr().out
    text = cells(tmp_path / "s.md")
    assert "| **General (video)** | | | 1 | 20.0% | 116000 | 43.6% |" in text
    assert "| | TextVQA | OCR | 1 | 20.0% | 2000 | 0.8% |" in text
    assert "| answer | 2 options, A | 1 | 20.0% |" in text and "5 media" in text
