"""Mixtures: each release format, what is dropped and why, sampling, and the recipe."""
import csv
import doctest
import json
import os
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

import annotate
import build_data
import rewards
from build_data import (FIGURE_2, Dropped, InputError, draft, figure_rows, load_records,
                        make_record, option_texts, read_recipe, release_rows, shuffle_options,
                        split_options, spread, wanted_type)
from conftest import ROOT, cells, run

ALL_TYPES = ["multiple choice", "numerical", "OCR", "free-form", "regression"]


def entry(form, annotation, media=".", kinds=ALL_TYPES, count=100, **more):
    return {"source": "S", "category": "Chart", "problem_type": list(kinds), "count": count,
            "format": form, "annotation": annotation, "media": media, **more}


def nothing_excluded(path):
    return False


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")


def mix(folder, recipe, *flags):
    """Runs `mix` in this process; returns the records of its file and its report."""
    write(folder / "recipe.json", recipe)
    args = build_data.parse_args(["mix", "--recipe", str(folder / "recipe.json"), "--out",
                                  str(folder / "out.json"), *map(str, flags)])
    build_data.mix(args)
    return (json.loads((folder / "out.json").read_text()),
            cells(folder / "out.report.md"))


def llava(medium, *turns):
    return {"image": medium, "conversations": [
        {"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]}


def dropped(found):
    """Why a draft becomes no record."""
    with pytest.raises(Dropped) as reason:
        make_record(draft(**{"file": "1.png"} | found), entry("llava", ""), "")
    return str(reason.value)


def test_worked_examples_in_the_docstrings_hold():
    assert doctest.testmod(build_data).failed == 0


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
    total = sum(thousands.values())
    shares = {key: round(100 * value / total) for key, value in thousands.items()}
    assert shares["General (video)"] == 44 and shares["General (image)"] == 6  # as the figure says
    assert shares["Knowledge"] == 14 and shares["Spatial"] == 8
    multimath = next(item for item in recipe if item["source"] == "Multimath-300K")
    assert multimath["problem_type"] == ["multiple choice", "numerical"]
    assert multimath["count"] == 27000


def test_the_paper_s_recipe_says_what_is_missing_below_the_folder_of_the_records(tmp_path):
    """Where the stages will look for the media of the records; the recipe lies elsewhere."""
    flags = ("mix", "--recipe", FIGURE_2, "--out", tmp_path / "data" / "out.json")
    result = run("build_data.py", *flags, check=False)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert f"{tmp_path}/data lacks 46 of 46 annotation files" in result.stderr
    assert not (tmp_path / "data" / "out.json").exists()
    write(tmp_path / "sources/Chart/ChartQA/train/train_human.json",
          [{"imgname": "1.png", "query": "How many?", "label": "3"}])
    result = run("build_data.py", *flags, "--media_root", tmp_path / "sources", "--skip_missing")
    record, = json.loads((tmp_path / "data" / "out.json").read_text())
    assert record["path"] == "./Chart/ChartQA/train/png/1.png"


@pytest.mark.parametrize("change, words", [
    ({"count": "5"}, "count must be of type int, not '5'"),
    ({"count": -1}, "count must be at least 0, not -1"),
    ({"format": "x"}, f"format must be one of {list(build_data.CONVERTERS)}, not 'x'"),
    ({"problem_type": ["mc"]}, f"must be one or more of {[*rewards.GRADERS]}, not ['mc']"),
    ({"problem_type": []}, f"problem_type must be one or more of {[*rewards.GRADERS]}, not []"),
    ({"media": None}, "media must be of type str, not None"),
    ({"annotation": ""}, "annotation must be a path below --media_root, not ''"),
    ({"annotation": "/data/a.json"}, "a path below --media_root, not '/data/a.json'")])
def test_a_wrong_recipe_names_entry_and_key(tmp_path, change, words):
    write(tmp_path / "recipe.json", [entry("llava", "a.json"), entry("llava", "a.json") | change])
    with pytest.raises(InputError) as error:
        read_recipe(tmp_path / "recipe.json")
    assert "entry 1 (S)" in str(error.value) and words in str(error.value)


@pytest.mark.parametrize("text, words", [
    ("{", "cannot read .*recipe.json"), ("7", "cannot read .*recipe.json"),
    ('["llava"]', "entry 0 .*: it must be a JSON object, not a str")])
def test_a_file_that_is_no_recipe_is_named(tmp_path, text, words):
    write(tmp_path / "recipe.json", text)
    with pytest.raises(InputError, match=words):
        read_recipe(tmp_path / "recipe.json")


# ---------------------------------------------------------------------- the release formats

def convert(folder, form, annotation, media=".", kinds=ALL_TYPES):
    """The records that a release yields, without numbers, letters as in the release; the counts."""
    counts, item = Counter(), entry(form, annotation, media, kinds)
    records = list(build_data.candidates_of(item, folder, nothing_excluded, set(), counts))
    return records, counts


def question(path, problem, answer, *options, kind="multiple choice", **more):
    """The record that a converter should give."""
    return {"problem": problem, "problem_type": kind, "options": list(options), "path": path,
            "data_type": "video" if path.endswith("mp4") else "image",
            "solution": f"<answer>{answer}</answer>", "data_source": "S", **more}


def choices(*answers):
    """CLEVRER's choices."""
    return [{"choice_id": i, "choice": f"event {i}", "program": [], "answer": answer}
            for i, answer in enumerate(answers)]


SCIENCEQA = {"question": "Which is it?", "choices": ["cat", "dog"], "answer": 1, "hint": "",
             "image": "image.png", "split": "train", "grade": "grade2"}
TABMWP = {"table": "", "unit": None, "split": "train", "table_title": None, "solution": ""}
LLAVA = {"id": "7", "data_source": "0_30_s_academic_v0_1", "video": "academic/7.mp4"}
# Of each format: its file and what is in it, the media folder, and the records of it.
CONVERTED = {
    "perception_test, several questions a video": (
        "perception_test", "a.json", {"video_7": {
            "metadata": {"split": "train"}, "object_tracking": [], "mc_question": [
                {"id": 0, "question": "What moves?", "options": ["cat", "dog", "hat"],
                 "answer_id": 2, "area": "physics", "reasoning": "descriptive", "tag": ["motion"]},
                {"id": 1, "question": "What rests?", "options": ["cat", "dog", "hat"],
                 "answer_id": 0}]}}, "videos",
        [question("./videos/video_7.mp4", "What moves?", "C", "A. cat", "B. dog", "C. hat"),
         question("./videos/video_7.mp4", "What rests?", "A", "A. cat", "B. dog", "C. hat")]),
    "clevrer keeps choices with one right and makes choices of words": (
        "clevrer", "train.json", [{"scene_index": 42, "video_filename": "video_00042.mp4",
                                   "questions": [
            {"question": "What comes next?", "question_type": "predictive",
             "choices": choices("wrong", "correct")},
            {"question": "Why?", "choices": choices("correct", "correct", "wrong")},
            {"question": "Why not?", "choices": choices("wrong", "wrong")},
            {"question": "How many?", "question_type": "descriptive", "answer": "3"},
            {"question": "Does it move?", "question_type": "descriptive", "answer": "no"}]}],
        "video_train/v",
        [question(path := "./video_train/v/video_00000-01000/video_00042.mp4",
                  "What comes next?", "B", "A. event 0", "B. event 1"),
         question(path, "How many?", "3", kind="numerical"),
         question(path, "Does it move?", "B", "A. yes", "B. no")]),
    "star keeps the part of the video and sorts choices": (
        "star", "a.json", [{
            "question_id": "Interaction_T1_13", "video_id": "6H78U", "start": 11.1, "end": 19.6,
            "question": "What moves?", "answer": "The dog.", "situations": {}, "choices": [
                {"choice_id": 2, "choice": "The dog."}, {"choice_id": 0, "choice": "The cat."},
                {"choice_id": 1, "choice": "The hat."}]}], "Charades_v1_480",
        [question("./Charades_v1_480/6H78U.mp4", "What moves?", "C", "A. The cat.", "B. The hat.",
                  "C. The dog.", video_start=11.1, video_end=19.6)]),
    "scienceqa keeps training rows with a picture": (
        "scienceqa", "a.json", {"5": SCIENCEQA, "6": SCIENCEQA | {"image": None},
                                "7": SCIENCEQA | {"split": "test"}}, "images/train",
        [question("./images/train/5/image.png", "Which is it?", "B", "A. cat", "B. dog")]),
    "a_okvqa": (
        "a_okvqa", "a.json", [{
            "split": "train", "image_id": 299207, "question_id": "22M", "question": "What moves?",
            "choices": ["cat", "dog", "hat", "car"], "correct_choice_idx": 3,
            "direct_answers": ["car"] * 10, "difficult_direct_answer": False}], "train2017",
        [question("./train2017/000000299207.jpg", "What moves?", "D", "A. cat", "B. dog", "C. hat",
                  "D. car")]),
    "tabmwp has choices, numbers and units": (
        "tabmwp", "a.json", {
            "1": TABMWP | {"question": "Which?", "choices": ["cat", "dog"], "answer": "dog",
                           "ques_type": "multi_choice", "ans_type": "extractive_text"},
            "2": TABMWP | {"question": "How much?", "choices": None, "answer": "1,200.50",
                           "unit": "$", "ques_type": "free_text", "ans_type": "decimal_number"}},
        "tables",
        [question("./tables/1.png", "Which?", "B", "A. cat", "B. dog"),
         question("./tables/2.png", "How much? (Unit: $)", "1,200.50", kind="numerical")]),
    "geometry3k has a file and a folder a problem": (
        "geometry3k", "train/17/data.json", {
            "problem_text": "Find x.", "choices": ["1", "2.5", "3", "4"], "answer": "B", "id": 17,
            "problem_type_graph": ["Triangle"], "problem_type_goal": ["Length"]},
        "train/{folder}",
        [question("./train/17/img_diagram.png", "Find x.", "B", "A. 1", "B. 2.5", "C. 3", "D. 4")]),
    "chartqa strips percent": (
        "chartqa", "a.json", [{"imgname": "1.png", "query": "How many percent?", "label": "12%"}],
        "png", [question("./png/1.png", "How many percent?", "12", kind="numerical")]),
    "llava, multiple choice": (
        "llava", "0_30_s/x.json", [LLAVA | {"conversations": [
            {"from": "human", "value": "<image>\nWhat moves?\nA. A cat.\nB. A dog.\nC. A car.\n"
             "D. A hat.\nPlease respond with only the letter of the correct answer."},
            {"from": "gpt", "value": "B."}]}], "V/{folder}",
        [question("./V/0_30_s/academic/7.mp4", "What moves?", "B", "A. A cat.", "B. A dog.",
                  "C. A car.", "D. A hat.", data_source="S/0_30_s_academic_v0_1")]),
    "llava, several free turns": (
        "llava", "x.json", [LLAVA | {"conversations": [
            {"from": "human", "value": "<image>\nWhat happens?"},
            {"from": "gpt", "value": "A dog crosses 2 streets."},
            {"from": "human", "value": "And then?"}, {"from": "gpt", "value": "It sits."}]}], ".",
        [question("./academic/7.mp4", "What happens?", "A dog crosses 2 streets.", kind="OCR",
                  data_source="S/0_30_s_academic_v0_1"),
         question("./academic/7.mp4", "And then?", "It sits.", kind="OCR",
                  data_source="S/0_30_s_academic_v0_1")]),
}


@pytest.mark.parametrize("form, name, data, media, expected", CONVERTED.values(), ids=CONVERTED)
def test_a_release_becomes_records(tmp_path, form, name, data, media, expected):
    write(tmp_path / name, data)
    annotation = name.replace("17/", "*/").replace("0_30_s/", "*/")
    assert convert(tmp_path, form, annotation, media)[0] == expected


def test_nextqa_is_a_table_with_a_map_of_paths_beside_it(tmp_path):
    with open(tmp_path / "train.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow("video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4"
                        .split(","))
        writer.writerow([2909445186, 100, 640, 480, "what moves", 1, 0, "TN",
                         "cat", "dog, big", "hat", "car", "sun"])
    write(tmp_path / "map_vid_vidorID.json", {"2909445186": "0101/2909445186"})
    assert convert(tmp_path, "nextqa", "train.csv", "NExTVideo")[0] == [
        question("./NExTVideo/0101/2909445186.mp4", "what moves?", "B",
                 "A. cat", "B. dog, big", "C. hat", "D. car", "E. sun")]
    (tmp_path / "map_vid_vidorID.json").unlink()
    build_data.nextqa_paths.cache_clear()
    with pytest.raises(InputError, match="cannot read .*map_vid_vidorID.json"):
        convert(tmp_path, "nextqa", "train.csv")


@pytest.mark.parametrize("label, solution", [
    ("B", "B"), ("B)", "B"), ("B) y grows", "B"), ("y grows", "B"), ("A and B", None), ("E", None)])
def test_arxivqa_labels_are_normalised_or_dropped(tmp_path, label, solution):
    row = {"id": "q-1", "image": "images/1.jpg", "question": "What grows?",
           "options": ["A) x grows", "B) y grows"], "label": label, "rationale": ""}
    write(tmp_path / "a.jsonl", json.dumps(row) + "\n\n")
    records, counts = convert(tmp_path, "arxivqa", "a.jsonl")
    if solution:
        assert records == [question("./images/1.jpg", "What grows?", solution, "A. x grows",
                                    "B. y grows")]
    else:
        assert not records and counts["answer is not one of the options"] == 1


def test_questions_of_other_types_than_the_wanted_are_counted(tmp_path):
    write(tmp_path / "a.json", [{"imgname": "1.png", "query": "How many percent?", "label": "12%"},
                                {"imgname": "1.png", "query": "Which bar?", "label": "Blue"}])
    records, counts = convert(tmp_path, "chartqa", "a.json", kinds=["numerical"])
    assert len(records) == 1 and counts == {"rows": 2, "not of the wanted problem type": 1}


@pytest.mark.parametrize("text, problem, options", [
    ("What?\nA. x\nB. y", "What?", ["x", "y"]),
    ("What?\n(A) x\n(B) y\nAnswer with the option's letter from the given choices directly.",
     "What?", ["x", "y"]),
    ("Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at "
     "the end.\nQuestion: What?\nChoices:\n(A) 3\n(B) 4", "What?", ["3", "4"]),
    ("What? Options: A. x B. y", "What?", ["x", "y"]),
    ("What?\nA: see C. elegans\nB: y\nC: z", "What?", ["see C. elegans", "y", "z"]),
    ("Where is John A. Lee?\nA. x\nB. Sam A. Ray\nC. z", "Where is John A. Lee?",
     ["x", "Sam A. Ray", "z"]),
    ("Is it vitamin A. or not?", "Is it vitamin A. or not?", []),
    ("How many?\nAnswer the question using a single word or phrase.", "How many?", []),
    ("Select the option that fits.", "Select the option that fits.", []),
    ("Select the option that fits.\nA. x\nB. y", "Select the option that fits.", ["x", "y"]),
    ("What?\nOption A: x\nOption B: y", "What?", ["x", "y"]),
    ("What?\nOption (A): x\nOption (B): y", "What?", ["x", "y"]),
    ("What?\nchoice A. x\nchoice B. y", "What?", ["x", "y"]),
    ("What?\n[A] x\n[B] y", "What?", ["x", "y"]),
    ("What? Options: A: x, B: y, C: z", "What?", ["x", "y", "z"]),
    ("What? A. x; B. y or C. z", "What?", ["x", "y", "z"]),
    ("What?\nA. int x;\nB. int y;", "What?", ["int x;", "int y;"]),
    ("What?\nA. and\nB. or\nC. not", "What?", ["and", "or", "not"]),
    ("什么?\nA、猫\nB、狗", "什么?", ["猫", "狗"]), ("什么?\nA．猫\nB．狗", "什么?", ["猫", "狗"]),
    ("什么?\n（A）猫\n（B）狗", "什么?", ["猫", "狗"]), ("什么？选项：A：猫；B：狗", "什么？", ["猫", "狗"]),
    ("什么?\n选项A：猫\n选项B：狗", "什么?", ["猫", "狗"]),
    ("什么?\nＡ、猫\nＢ、狗", "什么?", ["猫", "狗"]),
    ("What? (A) x (B) see A. Lee (C) z", "What?", ["x", "see A. Lee", "z"]),
    ("What?\nA. x\nB. \nC. z", "What?", ["x", "", "z"]),  # which then is dropped
    ("What?\na) x\nb) y", "What?", ["x", "y"]), ("What?\n- A. x\n- B. y", "What?", ["x", "y"]),
    ("What?\n**A.** x\n**B.** y\nAnswer:", "What?", ["x", "y"]),
    ("点A、B、C在圆上，求角度", "点A、B、C在圆上，求角度", []),
    ("What?\nA. E. coli\nB. C. elegans", "What?", ["E. coli", "C. elegans"]),
    ("What?\nA. yeast\nB. a C. elegans\nC. z", "What?", ["yeast", "a C. elegans", "z"]),
    ("Of\nA. p\nB. q\nwhat? (A) x (B) y (C) z", "Of\nA. p\nB. q\nwhat?", ["x", "y", "z"])])
def test_options_and_hints_are_taken_out_of_a_question(text, problem, options):
    assert split_options(text) == (problem, options)


@pytest.mark.parametrize("unit", [
    "A. ", "(A) x\n", "A. x B. y ", "A: a, ", "a) x\n", "Options: ", "? give ", " ", " \n",
    ", and ", "-"])
def test_the_options_of_a_hundred_thousand_characters_are_found_within_a_second(unit):
    started = time.process_time()
    split_options("What? " + unit * (100_000 // len(unit)) + "!")
    assert time.process_time() - started < 1


def test_released_video_r1_records_come_through_unchanged(tmp_path):
    record = {"problem_id": 7, "problem": "Which?", "data_type": "video", "problem_type":
              "multiple choice", "options": ["A. all of these", "B. no"], "data_source": "STAR",
              "solution": "<answer>B</answer>", "path": "./STAR/7.mp4"}
    number = record | {"problem": "How many?", "problem_type": "regression", "options": [],
                       "solution": "<answer>3.5</answer>", "video_start": 0.0, "video_end": 2.0}
    write(tmp_path / "a.json", [record | {"process": ""}, number])
    records, _ = mix(tmp_path, [entry("video_r1", "a.json")])
    ours = {"problem_id": 0}  # only the number is ours
    assert [r | ours for r in sorted(records, key=lambda r: r["problem"] == "How many?")] == [
        record | ours, number | ours]
    assert [r["problem_id"] for r in load_records(tmp_path / "out.json")] in ([0, 1], [1, 0])


@pytest.mark.parametrize("options, texts", [
    (["A. x", "B. y"], ["x", "y"]), (["(A) x", "(B) y"], ["x", "y"]),
    (["a) x", "b) y"], ["x", "y"]), (["A: x", "B: y"], ["x", "y"]),
    (["Option A: x", "Option B: y"], ["x", "y"]),
    (["A - x", "B - y"], ["x", "y"]), (["A、左", "B、右"], ["左", "右"]),
    (["Ａ．左", "Ｂ．右"], ["左", "右"]), (["（A）左", "（B）右"], ["左", "右"]),
    (["E. coli", "C. elegans", "B. subtilis"], ["E. coli", "C. elegans", "B. subtilis"]),
    (["Staph", "E. coli", "Strep"], ["Staph", "E. coli", "Strep"]),
    (["1.5", "2.5"], ["1.5", "2.5"]), (["10:30", "11:30"], ["10:30", "11:30"]),
    (["A", "B"], ["A", "B"]), (["A-frame", "B-movie"], ["A-frame", "B-movie"]),
    ([], [])])
def test_letters_are_taken_off_options_where_all_have_theirs(options, texts):
    assert option_texts(options) == texts


@pytest.mark.parametrize("options, texts", [
    ({"A": "x", "B": "y"}, ["x", "y"]), ({"B": "y", "A": "x"}, ["x", "y"]),
    ({"A": "A. x", "B": "B. y"}, ["x", "y"]), ({"A": "x", "B": "y", "C": None}, ["x", "y"]),
    ({"option_a": "x", "option_b": "y"}, ["x", "y"]), ({}, [])])
def test_options_by_letter_are_sorted_and_those_that_a_question_lacks_left_out(options, texts):
    assert option_texts(options) == texts


@pytest.mark.parametrize("options", ["A. x\nB. y", ["x", None], [["x"], ["y"]], [{"A": "x"}],
                                     {"1": "x", "2": "y"}, {"A": "x", "B": "", "C": "z"},
                                     ["A. x", "A. y"], ["B. x", "C. y", "D. z"], ["x", " "],
                                     ["1. x", "2. y"], ["A. x", "y", "C. z"], ["A. x", "B."],
                                     {"A": {"text": "x"}, "B": {"text": "y"}}])
def test_options_of_another_kind_cost_their_row(tmp_path, options):
    write(tmp_path / "a.json", [{"problem": "Which?", "problem_type": "multiple choice", "options":
                                 options, "solution": "<answer>A</answer>", "path": "./7.mp4"}])
    assert convert(tmp_path, "video_r1", "a.json") == ([], {"rows": 1, "malformed row": 1})


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
    item, = json.loads((ROOT / "assets" / "csv.json").read_text())
    counts = Counter()
    records = list(build_data.candidates_of(item, tmp_path, nothing_excluded, set(), counts))
    own = {"data_source": "own"}
    assert records == [each | own for each in (
        question("./a/1.mp4", "Which way?", "B", "A. left", "B. right"),
        question("./1.mp4", "Which way?", "B", "A. a cat", "B. a dog", "C. a hat", video_start=1.5),
        question("./1.mp4", "How many?", "3", kind="numerical"),
        question("./2.png", "What, here?", "a red dog", kind="free-form"),
        question("./1.mp4", "How far?", "3", kind="regression"),
        question("./2.png", "What is written?", "STOP", kind="OCR"))]
    assert counts == {"rows": 10, "not of the wanted problem type": 1, "no file": 1,
                      "malformed row": 2}


def test_options_of_a_table_may_be_in_columns_of_one_letter(tmp_path):
    (tmp_path / "a.csv").write_text("image,question,answer,A,B\n1.png,Which?,B,x,y\n")
    assert convert(tmp_path, "csv", "a.csv")[0] == [
        question("./1.png", "Which?", "B", "A. x", "B. y")]


@pytest.mark.parametrize("header", ["video;question;answer", "video,question", "question,answer"])
def test_a_table_without_its_columns_is_told_which_it_needs(tmp_path, header):
    (tmp_path / "a.csv").write_text(f"{header}\n1.mp4,What?,x\n")
    with pytest.raises(InputError, match="needs the columns video or image, question and answer"):
        mix(tmp_path, [entry("csv", "a.csv")])


def test_real_evaluation_rows_convert(tmp_path):
    """Rows of the released MMVU file, where they are on this machine."""
    path = ROOT.parent / "shared" / "data" / "eval_mmvu_30.json"
    if not path.exists():
        pytest.skip("no released rows here")
    rows = json.loads(path.read_text())
    records, _ = convert(path.parent, "video_r1", path.name, kinds=["multiple choice"])
    assert len(records) == len(rows)
    assert [r["options"] for r in records] == [row["options"] for row in rows]
    assert [r["solution"] for r in records] == [row["solution"] for row in rows]


def test_files_are_read_as_lists_objects_lines_or_tables(tmp_path):
    rows = [{"a": "x] ,[{\"" * n, "b": [n, {"c": None}]} for n in range(20)]
    write(tmp_path / "a.json", json.dumps(rows, indent=2))
    write(tmp_path / "b.jsonl", "\n".join(map(json.dumps, rows)))
    write(tmp_path / "c.json", {str(i): row for i, row in enumerate(rows)})
    write(tmp_path / "d.json", " \n[ ]")
    assert list(release_rows(tmp_path / "a.json")) == rows
    assert list(release_rows(tmp_path / "b.jsonl")) == rows
    assert list(release_rows(tmp_path / "c.json")) == [
        row | {"row_key": str(i)} for i, row in enumerate(rows)]
    assert list(release_rows(tmp_path / "d.json")) == []
    for text in (json.dumps(rows)[:-9], "", "7", "{", "[", "[1, 2"):
        write(tmp_path / "e.json", text)
        with pytest.raises(InputError, match="cannot read .*e.json"):
            list(release_rows(tmp_path / "e.json"))


# ---------------------------------------------------------------------------- verification

@pytest.mark.parametrize("found, reason", [
    ({"problem": " ", "answer": "x"}, "no question"),
    ({"problem": "?", "answer": " "}, "no answer"),
    ({"problem": "?", "answer": "A", "options": ["x"]}, "not 2 to 26 options"),
    ({"problem": "?", "answer": "A", "options": list("abcdefghijklmnopqrstuvwxyz0")},
     "not 2 to 26 options"),
    ({"problem": "?", "answer": "A", "options": ["x", " "]}, "an option is empty"),
    ({"problem": "?", "answer": "C", "options": ["x", "y"]}, "answer is not one of the options"),
    ({"problem": "?", "answer": "A or B", "options": ["x", "y"]},
     "answer is not one of the options"),
    ({"problem": "?", "answer": "3 or 4", "problem_type": "numerical"}, "answer is not one number"),
    ({"problem": "?", "answer": "many", "problem_type": "regression"}, "answer is not one number"),
    ({"problem": "?", "answer": "x", "file": "../../etc/x.png"}, "path leaves the media folder"),
    ({"problem": "?", "answer": "x", "file": "/etc/x.png"}, "path leaves the media folder")])
def test_what_cannot_be_a_question_is_dropped_with_its_reason(found, reason):
    assert dropped(found) == reason


def test_problem_types_are_found_out_not_assumed():
    assert wanted_type("3", [], ALL_TYPES) == "numerical"
    assert wanted_type("three dogs and 2 cats", [], ALL_TYPES) == "OCR"
    assert wanted_type("2 cats", [], ["numerical"]) == "numerical"
    assert wanted_type("3", [], ["multiple choice"]) is None
    assert wanted_type("A", ["A. x", "B. y"], ["free-form"]) is None
    record = make_record(draft("1.png", "How far?", "The dog is 3.2 meters away."),
                         entry("llava", "", kinds=["regression", "free-form"]), "")
    assert (record["problem"], record["problem_type"], record["solution"]) == (
        "How far? (Unit: meters)", "regression", "<answer>3.2</answer>")


def test_a_new_problem_type_is_one_entry_in_one_table(tmp_path, monkeypatch):
    """From the recipe to the reward: the one of rewards.GRADERS. Its prompt asks for a text."""
    monkeypatch.setitem(rewards.GRADERS, "interval",
                        lambda answer, truth: float(answer.split("-") == truth.split("-")))
    one = entry("llava", "", kinds=["interval"])
    record = make_record(draft("1.png", "When?", "3-5"), one, "")
    assert (record["problem_type"], record["solution"]) == ("interval", "<answer>3-5</answer>")
    write(tmp_path / "a.json", [record | {"problem_id": 1}])
    record, = load_records(tmp_path / "a.json", tmp_path)
    assert build_data.build_messages(record)[0]["content"][1]["text"].endswith(
        "your text answer within the <answer> </answer> tags.")
    assert rewards.accuracy_reward("<answer>3-5</answer>", record) == 1.0
    assert annotate.has_form("3-5", record) and not annotate.has_form("", record)


def test_malformed_rows_cost_themselves_and_are_counted(tmp_path):
    good = llava("1.png", "What?\nA. x\nB. y", "A")
    write(tmp_path / "a.json", [good, {}, {"image": 3}, llava("2.png", "no answer"), "text", None,
                                good | {"image": ["1.png", "2.png"]}])
    records, report = mix(tmp_path, [entry("llava", "a.json", count=3)])
    assert len(records) == 1
    assert "| S | multiple choice, numerical, OCR, free-form, regression | 3 | 1 | 2 | 7 | " \
           "6 malformed row |" in report


def test_a_field_of_another_kind_costs_its_row_and_not_the_run(tmp_path):
    """What json reads and a record cannot hold: no text, no path, half of a character."""
    row = {"image_id": 7, "question": "What?", "choices": ["cat", "dog"], "correct_choice_idx": 1}
    write(tmp_path / "a.json", [row, row | {"question": None}, row | {"question": 3},
                                row | {"question": "What \ud83d?"},
                                row | {"choices": ["cat", "\udc00 dog"]}])
    write(tmp_path / "b.json", [{"imgname": None, "query": "How many?", "label": "3"},
                                {"imgname": "1\0.png", "query": "How many?", "label": "3"}])
    released = {"problem": "How many?", "problem_type": "numerical", "path": "1.mp4",
                "solution": "<answer>3</answer>"}
    write(tmp_path / "c.json", [released | {"data_type": "audio"},
                                released | {"data_type": "video", "video_start": "0:12"}])
    recipe = [entry("a_okvqa", "a.json"), entry("chartqa", "b.json"), entry("video_r1", "c.json")]
    records, report = mix(tmp_path, recipe)
    assert [r["path"] for r in records] == ["./000000000007.jpg"]
    assert [f"{n} malformed row" in report for n in (4, 2)] == [True, True]
    assert load_records(tmp_path / "out.json")


# ------------------------------------------------------------------ duplicates, benchmarks

def test_exact_and_near_duplicates_go_and_other_questions_stay(tmp_path):
    def ask(medium, question, *options):
        lines = [f"\n{'ABCD'[i]}. {option}" for i, option in enumerate(options)]
        return llava(medium, question + "".join(lines), "A" if options else "yes")
    write(tmp_path / "a.json", [
        ask("1.png", "Is the car red?"), ask("1.png", "Is the car red?"),
        ask("1.png", "is the car  RED"),  # near
        ask("2.png", "Is the car red?"),  # another medium
        ask("1.png", "Is the car left of the tree?"), ask("1.png", "Is the tree left of the car?"),
        ask("1.png", "Which?", "x", "y"), ask("1.png", "Which?", "y", "x"),  # order of options
        ask("1.png", "Which?", "x", "z")])
    records, report = mix(tmp_path, [entry("llava", "a.json"), entry("llava", "*.json")])
    assert len(records) == 6 and "3 duplicate" in report and "9 duplicate" in report


def test_a_question_that_was_not_drawn_is_no_duplicate_for_the_next_entry(tmp_path):
    write(tmp_path / "a.json", [llava(f"{i}.png", "What?", f"text {i}") for i in range(10)])
    recipe = [entry("llava", "a.json", count=4), entry("llava", "a.json", count=9)]
    records, _ = mix(tmp_path, recipe)
    assert len(records) == 10 and len({r["path"] for r in records}) == 10


def test_media_of_benchmarks_are_left_out_by_folder_and_name_and_by_content(tmp_path):
    def record(i, path):
        return {"problem_id": i, "problem": "?", "data_type": "video", "problem_type": "free-form",
                "options": [], "solution": "<answer>x</answer>", "path": path}
    write(tmp_path / "bench" / "eval.json", [record(0, "./MVB/perception/videos/video_1.mp4"),
                                             record(1, "./MVB/clevrer/video_9.mp4")])
    (tmp_path / "bench/MVB/clevrer").mkdir(parents=True)
    (tmp_path / "bench/MVB/clevrer/video_9.mp4").write_bytes(b"same content")
    for name, content in (("videos/video_1.mp4", b"a"), ("clevrer2/video_1.mp4", b"b"),
                          ("copy/other.mp4", b"same content"), ("copy/third.mp4", b"not the same")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    names = ("videos/video_1.mp4", "clevrer2/video_1.mp4", "copy/other.mp4", "copy/third.mp4")
    write(tmp_path / "a.json", [llava(name, "What?", "text") for name in names])
    records, report = mix(tmp_path, [entry("llava", "a.json")], "--exclude",
                          tmp_path / "bench" / "eval.json")
    assert {r["path"] for r in records} == {"./clevrer2/video_1.mp4", "./copy/third.mp4"}
    assert "2 file of a benchmark" in report


# -------------------------------------------------------------------- sampling and balance

def test_questions_are_spread_over_media_and_no_medium_has_too_many():
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


def shuffled(*options, seed=0, **more):
    """A question whose right option comes first, as shuffled by a seed."""
    record = {"problem": "Which?", "options": list(options), "solution": "<answer>A</answer>"}
    return shuffle_options(record | more, np.random.default_rng(seed))


def test_answer_letters_are_drawn_evenly_and_answers_stay_right():
    rng, answers = np.random.default_rng(0), Counter()
    record = {"problem": "Which?", "options": ["A. right", "B. red", "C. one", "D. no"],
              "solution": "<answer>A</answer>"}  # the source always puts the right option first
    for _ in range(400):
        found = shuffle_options(record, rng)
        letter = found["solution"][8]
        answers[letter] += 1
        assert f"{letter}. right" in found["options"]
        assert sorted(o[3:] for o in found["options"]) == ["no", "one", "red", "right"]
        assert [o[:2] for o in found["options"]] == ["A.", "B.", "C.", "D."]
    assert all(70 < answers[letter] < 130 for letter in "ABCD")  # 100 expected, 3.5 deviations


@pytest.mark.parametrize("option", [
    "all of the above", "None of these", "both A and B", "A and C", "Both", "neither.", "None",
    "options 1 and 2", "the latter", "Both of them", "B", "(c)", "as mentioned above",
    "All the above", "None above", "neither A nor B", "A, B", "A, B, and C", "All are correct",
    "Both are true", "more than one of the above", "Only A", "B only", "Same as A",
    "(a) and (b)", "(a), (b) and (c)", "a and b", "A/B", "None of the given options",
    "none of the listed", "以上都不是", "以上皆是", "都不对", "两者都是", "A和B", "A、B", "前者", "全部",
    "None of the other options", "two of these", "a, c", "D and E", "(a)",
    "无正确答案", "没有正确答案", "都有可能", "全选"])
def test_options_that_refer_to_others_stay_in_their_place(option):
    options = ["A. right", "B. red", f"C. {option}"]
    assert all(shuffled(*options, seed=seed)["options"] == options for seed in range(9))


@pytest.mark.parametrize("option", ["A cat runs.", "two dogs", "12", "5 m", "北京", "TV",
                                    "the dog's hat", "I am here"])
def test_options_that_stand_for_themselves_are_shuffled(option):
    found = [shuffled("A. right", f"B. {option}", seed=seed) for seed in range(9)]
    assert any(record["options"] == [f"A. {option}", "B. right"] for record in found)


@pytest.mark.parametrize("more", [{"problem": "Why is option B wrong?"},
                                  {"problem": "Why not choice 2?"}, {"problem": "Is it A or B?"},
                                  {"process": "<think>so A</think>"}])
def test_a_question_or_a_thought_that_names_letters_keeps_its_options(more):
    assert all(shuffled("A. right", "B. red", seed=seed, **more)["solution"] ==
               "<answer>A</answer>" for seed in range(9))


# ------------------------------------------------------------------------------- the files

def test_shortfalls_are_reported_and_a_seed_gives_the_same_file(tmp_path):
    write(tmp_path / "a.json", [llava(f"{i % 7}.png", f"What {i}?\nA. x\nB. y", "A")
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


def test_validation_is_split_by_medium(tmp_path, capsys):
    write(tmp_path / "a.json", [llava(f"{i % 40}.png", f"What {i}?", f"text {i}")
                                for i in range(400)])
    train, _ = mix(tmp_path, [entry("llava", "a.json", count=400)], "--val_share", 0.25)
    val = json.loads((tmp_path / "out_val.json").read_text())
    media = [{record["path"] for record in records} for records in (train, val)]
    assert len(train) + len(val) == 400 and not media[0] & media[1]
    assert 4 <= len(media[1]) <= 16  # 10 of 40 expected
    with pytest.raises(SystemExit):
        mix(tmp_path, [entry("llava", "a.json")], "--val_share", 1.0)
    assert "--val_share: 1.0 must be at least 0 and below 1" in capsys.readouterr().err
    assert len({r["problem_id"] for r in train + val}) == 400


def test_a_mix_without_a_record_fails_and_writes_nothing(tmp_path, capsys):
    write(tmp_path / "a.json", [{}, llava("1.png", "What?", " ")])
    for flags in ((), ("--val_share", 0.5)):
        with pytest.raises(InputError, match="no record is left for .*out.json"):
            mix(tmp_path, [entry("llava", "a.json")], *flags)
        assert "1 malformed row; 1 no answer" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "recipe.json"}


def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path):
    """Killed while it reads: nothing is written; failing while it writes: nothing is replaced."""
    write(tmp_path / "a.json", [llava("1.png", "What?", "text")])
    mix(tmp_path, [entry("llava", "a.json")])
    before = (tmp_path / "out.json").read_bytes()
    os.mkfifo(tmp_path / "pipe.json")  # reading it waits for ever
    write(tmp_path / "recipe.json", [entry("llava", "*.json")])
    process = subprocess.Popen([sys.executable, "build_data.py", "mix", "--recipe",
                                tmp_path / "recipe.json", "--out", tmp_path / "out.json"], cwd=ROOT,
                               stderr=subprocess.DEVNULL)
    writer = None
    while writer is None and process.poll() is None:
        try:
            writer = os.open(tmp_path / "pipe.json", os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads it yet
            time.sleep(0.05)
    process.kill()
    process.wait()
    os.close(writer)
    assert (tmp_path / "out.json").read_bytes() == before

    def fails():
        yield "half a file"
        raise OSError("disk full")
    with pytest.raises(InputError, match="cannot write .*out.json: disk full"):
        build_data.write_whole({tmp_path / "new.json": ["x"], tmp_path / "out.json": fails()})
    assert (tmp_path / "out.json").read_bytes() == before and not (tmp_path / "new.json").exists()
    assert not list(tmp_path.glob("*.partial"))  # a full disk is not kept full


# --------------------------------------------------------------------------------- stats

def test_stats_stand_beside_figure_2(tmp_path):
    def record(i, source, kind, path):
        return {"problem_id": i, "problem": "?", "data_type": "video", "problem_type": kind,
                "options": ["A. x", "B. y"] if kind == "multiple choice" else [],
                "solution": "<answer>A</answer>", "path": path, "data_source": source}
    records = [record(0, "LLaVA-Video-178K/30_60_s_youtube_v0_1", "multiple choice", "./a/1.mp4"),
               record(1, "Multimath-300k", "numerical", "./Math/1.mp4"),
               record(2, "unnamed", "OCR", "./OCR/TextVQA/1.mp4"),
               record(3, "mine", "OCR", "./b/1.mp4"),
               record(4, "TabMWP", "numerical", "./Chart/TabMWP/1.mp4")]
    rows = {key: value for key, value in figure_rows(records).items() if value[0]}
    assert rows == {("General (video)", "LLaVA-Video-178K", "multiple choice"): [1, 73000],
                    ("Math", "Multimath-300K", "multiple choice, numerical"): [1, 27000],
                    ("OCR", "TextVQA", "OCR"): [1, 2000],
                    ("not in Figure 2", "mine", "OCR"): [1, 0],
                    ("Chart", "TabMWP", "numerical"): [1, 2000]}
    write(tmp_path / "a.json", records)
    out = run("build_data.py", "stats", "--data", tmp_path / "a.json", "--out", tmp_path / "s.md")
    text = cells(tmp_path / "s.md")
    assert (tmp_path / "s.md").read_text() in out.stdout
    assert "| **General (video)** | | | 1 | 20.0% | 116000 | 43.6% |" in text
    assert "| | TextVQA | OCR | 1 | 20.0% | 2000 | 0.8% |" in text
    assert "| answer | 2 options, A | 1 | 20.0% |" in text and "5 media" in text
