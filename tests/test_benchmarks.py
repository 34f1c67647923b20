"""Claims about the benchmarks: releases read, scores by hand, servers, judge, comparison."""
import base64
import io
import json
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import annotate
import build_data
import evaluate
from build_data import InputError, MediaError, build_messages, load_vision, write_video
from test_evaluate import SHARED, flags, launch, main

LIMITS = {"max_frames": 8, "min_frames": 4, "fps": 2, "min_pixels": 784, "max_pixels": 784}


def converted(name, path, out, *more):
    """Runs `convert` in this process; returns its file."""
    args = build_data.parse_args(["convert", name, str(path), "--out", str(out), *more])
    build_data.convert(args)
    return out


def read(name, path, media_root=None):
    """The records of a benchmark's file, by problem_id."""
    return {record["problem_id"]: record
            for record in evaluate.read_records(name, path, media_root)}


def put(path, content):
    """Writes a release's file: JSON, or JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, content)) if path.suffix == ".jsonl"
                    else json.dumps(content))


def ramp(count):
    """Frames (T, H, W, 3) whose brightness tells their number: 0, 10, 20, ..."""
    return np.full((count, 28, 28, 3), 10 * np.arange(count)[:, None, None, None], np.uint8)


def numbers(vision):
    """Which frames of a ramp a video shows."""
    return (vision.frames.float().mean((1, 2, 3)) / 10).round().int().tolist()


# -------------------------------------------------------------------------------- releases

VIDEOMMMU_OPTIONS = [f"option {i}" for i in range(14)]
MMVU_VIDEOS = "https://huggingface.co/datasets/yale-nlp/MMVU/resolve/main/videos"
VIDEO_MME = {"video_id": "001", "duration": "short", "domain": "Knowledge",
             "sub_category": "Astronomy", "url": "https://www.youtube.com/watch?v=fFjv93ACGo8"}
VIDEO_MME_QUESTION = {"question_id": "001-1", "task_type": "Counting", "question": "How many?",
                      "options": ["A. 1", "B. 2"], "answer": "B"}
VIDEO_MME_FLAT = [{**VIDEO_MME, **VIDEO_MME_QUESTION, "videoID": "fFjv93ACGo8"}]
VIDEO_MME_RECORD = {"001-1": {
    "path": "./data/fFjv93ACGo8.mp4", "options": ["A. 1", "B. 2"], "solution": "<answer>B</answer>",
    "groups": {"duration": "short", "domain": "Knowledge", "sub_category": "Astronomy",
               "task_type": "Counting"}}}


def videommmu_row(video, options, answer):
    return {"id": video, "question": "Q?", "options": options, "answer": answer}


def tempcompass(task, question, answer, options, letter):
    """A row of RELEASES with one question of a task of TempCompass."""
    return ("tempcompass", {f"questions/{task}.json": {
        "1034419625": {"direction": [{"question": question, "answer": answer}]}}}, {f"{task}/0": {
            "problem": question.split("\n")[0], "options": options, "groups": {
                "task": task, "dimension": "direction"}, "path": "./videos/1034419625.mp4",
            "problem_type": "multiple choice", "solution": f"<answer>{letter}</answer>"}})


def tomato_row(answer, key, demonstration, kind):
    return {"question": "Which way?", "options": [f"Way {i}." for i in range(7)], "answer": answer,
            "key": key, "video_source_url": "", "motion_type": kind, "variation": {"zoom": 1},
            "demonstration_type": demonstration, "note": ""}


def vinoground_row(idx, task, answer):
    folder = "vinoground_videos" + ("" if task == "text" else "_concated")
    return {"idx": idx, "video_name": f"{folder}/{idx}.mp4", "GT": answer,
            "question": "Which caption fits?\nLook well.\nA. he sits, then stands\n"
                        "B. he stands, then sits\nAnswer with the option's letter from the given "
                        "choices directly."}


RELEASES = {  # claim -> benchmark, its release's files, fields of every record by problem_id
    "vsi_bench_has_choices_and_numbers": ("vsibench", {"test.jsonl": [
        {"id": 0, "dataset": "scannet", "scene_name": "scene0568_00", "options": None,
         "question_type": "object_counting", "question": "How many chairs?", "ground_truth": "4"},
        {"id": 1, "dataset": "scannet", "scene_name": "scene0568_00",
         "options": ["A. left", "B. right"], "question_type": "route_planning",
         "question": "Which way?", "ground_truth": "B"}]}, {
        "0": {"problem_type": "regression", "solution": "<answer>4</answer>", "options": []},
        "1": {"problem_type": "multiple choice", "options": ["A. left", "B. right"],
              "groups": {"task": "route_planning", "dataset": "scannet"},
              "path": "./scannet/scene0568_00.mp4"}}),
    "videommmu_has_an_instruction_for_each_track_and_open_questions": ("videommmu", {
        "adaptation.json": {
            "0": videommmu_row("dev_Biology_3", VIDEOMMMU_OPTIONS, "N"),
            "1": videommmu_row("validation_Basic_Medical_Science_6", [], "12.97")},
        "comprehension.json": {"0": videommmu_row("dev_Biology_3", ["up", "down"], "A")},
        "perception.json": {"0": videommmu_row("dev_Biology_3", ["up", "down"], "B")}}, {
        "adaptation/0": {
            "options": [f"{letter}. {option}" for letter, option in
                        zip("ABCDEFGHIJKLMN", VIDEOMMMU_OPTIONS)],
            "path": "./Science/dev_Biology_3.mp4", "groups": {
                "track": "adaptation", "subject": "Biology", "discipline": "Science"},
            "problem": "You should watch and learn the video content. Then apply what you learned "
                       "to answer the following multi-choice question. The image for this question "
                       "is at the end of the video.\nQ?"},
        "adaptation/1": {"problem_type": "numerical", "groups": {
            "track": "adaptation", "subject": "Basic_Medical_Science", "discipline": "Medicine"},
            "problem": "You should watch and learn the video content. Then apply what you learned "
                       "to answer the following open-ended question. The image for this question "
                       "is at the end of the video.\nQ?"},
        **{f"{track}/0": {"problem": "Q?\nPlease ignore the Quiz question in last frame of the "
                                     "video."} for track in ("comprehension", "perception")}}),
    "videommmu_of_its_own_repository": ("videommmu", {
        "adaptation_video.json": {"Adaptation": {
            "0": videommmu_row("validation_Physics_21", ["", "", "", ""], "A"),
            "1": videommmu_row("validation_Math_15", [], "['24/7', '3.429', '3.43]")}},
        "comprehension_video.json": {"Comprehension": {
            "0": videommmu_row("dev_Biology_3", ["up", "down"], "B")}}}, {
        "adaptation/0": {"problem_type": "free-form", "options": [],
                         "solution": "<answer>A</answer>"},
        "adaptation/1": {"problem_type": "free-form",
                         "solution": "<answer>['24/7', '3.429', '3.43]</answer>"},
        "comprehension/0": {"options": ["A. up", "B. down"], "groups": {
            "track": "comprehension", "subject": "Biology", "discipline": "Science"}}}),
    "mmvu_keeps_its_multiple_choice_questions": ("mmvu", {"validation.json": [
        {"id": "validation_0", "video": f"{MMVU_VIDEOS}/Art/0.mp4", "question_type": "open-ended",
         "question": "Which?", "choices": dict.fromkeys("ABCDE", ""), "answer": "Dolly Zoom"},
        {"id": "validation_1", "video": f"{MMVU_VIDEOS}/Chemistry/0.mp4",
         "question_type": "multiple-choice", "question": "How many grams?", "answer": "D",
         "choices": {"A": "10.0", "B": "5.0", "C": "12.0", "D": "15.0", "E": ""}}]}, {
        "validation_1": {"path": "./videos/Chemistry/0.mp4", "solution": "<answer>D</answer>",
                         "options": ["A. 10.0", "B. 5.0", "C. 12.0", "D. 15.0"],
                         "groups": {"subject": "Chemistry", "discipline": "Science"}}}),
    "tempcompass_multi_choice": tempcompass(
        "multi-choice", "What is it?\nA. up\nB. down", "B. down", ["A. up", "B. down"], "B"),
    "tempcompass_option_lines_with_blanks_around": tempcompass(
        "multi-choice", "Where?\nA. to us \nB. left\n C. right\n\tD. away from us",
        "D. away from us ", ["A. to us", "B. left", "C. right", "D. away from us"], "D"),
    "tempcompass_yes_no_is_multiple_choice": tempcompass(
        "yes_no", "Does it move?", "no", ["A. yes", "B. no"], "B"),
    "tempcompass_caption_matching_of_options": tempcompass(
        "caption_matching", "Which fits?\nOption 1: It moves.\nOption 2: It rests.",
        "Option 2: It rests.", ["A. It moves.", "B. It rests."], "B"),
    "tempcompass_caption_matching_of_sentences": tempcompass(
        "caption_matching", "Which fits?\nSentence A: It moves.\nSentence B: It rests.",
        "Sentence A: It moves.", ["A. It moves.", "B. It rests."], "A"),
    "tempcompass_captioning_is_multiple_choice": tempcompass(
        "captioning", "Which fits?\nInformation A: {'speed': 'fast'}\nInformation B: {'speed': "
        "'slow'}\nGenerated Caption:", "B. slow",
        ["A. {'speed': 'fast'}", "B. {'speed': 'slow'}"], "B"),
    "tvbench_has_clips_in_two_tasks_and_numbers_as_texts": ("tvbench", {
        "json/action_sequence.json": [{"video": "clip_12.mp4", "question": "What happens first?",
                                       "candidates": ["He sits.", "He stands."],
                                       "answer": "He sits.", "start": 3.2, "end": 11}],
        "json/object_count.json": [{"video": "v.mp4", "question": "How many?", "answer": "1",
                                    "candidates": ["2", "1", "0", "3"], "start": 1, "end": 2}],
        "json/action_count.json": [{"video": "v.mp4", "question": "How often?", "answer": 3,
                                    "candidates": [4, 3]}]}, {
        "action_count/0": {"options": ["A. 4", "B. 3"], "solution": "<answer>B</answer>"},
        "action_sequence/0": {
            "path": "./video/action_sequence/clip_12.mp4", "solution": "<answer>A</answer>",
            "options": ["A. He sits.", "B. He stands."], "groups": {"task": "action_sequence"},
            "video_start": 3.2, "video_end": 11.0},
        "object_count/0": {"solution": "<answer>B</answer>",
                           "path": "./video/object_count/v.mp4"}}),
    "tomato_is_keyed_by_file_and_number": ("tomato", {
        "data/direction.json": {"4": tomato_row(1, "0999-01", "human", "direction")},
        "data/shape&trend.json": {"4": tomato_row(6, "0209-04", "simulated", "shape&trend")}}, {
        "direction/4": {"path": "./videos/human/0999-01.mp4", "solution": "<answer>B</answer>",
                        "groups": {"type": "direction", "demonstration": "human"}},
        "shape&trend/4": {"path": "./videos/simulated/0209-04.mp4", "options": [
            f"{letter}. Way {i}." for i, letter in enumerate("ABCDEFG")],
            "solution": "<answer>G</answer>"}}),
    "vinoground_s_options_are_in_its_questions": ("vinoground", {
        "vinoground_textscore.json": [vinoground_row("12_pos", "text", "B")],
        "vinoground_videoscore.json": [vinoground_row("12_neg", "video", "A")]}, {
        "text/12_pos": {"problem": "Which caption fits?\nLook well.", "pair": "12",
                        "options": ["A. he sits, then stands", "B. he stands, then sits"],
                        "solution": "<answer>B</answer>", "groups": {"task": "text"},
                        "path": "./vinoground_videos/12_pos.mp4"},
        "video/12_neg": {"solution": "<answer>A</answer>", "groups": {"task": "video"},
                         "path": "./vinoground_videos_concated/12_neg.mp4"}}),
    "vinoground_with_each_file_beside_its_videos": ("vinoground", {
        "vinoground_videos/vinoground_textscore.json": [vinoground_row("12_pos", "text", "B")]}, {
        "text/12_pos": {"path": "./vinoground_videos/12_pos.mp4"}}),
    "video_mme_nested": ("videomme", {
        "nested.json": [{**VIDEO_MME, "questions": [VIDEO_MME_QUESTION]}]}, VIDEO_MME_RECORD),
    "video_mme_flat": ("videomme", {"flat.json": VIDEO_MME_FLAT}, VIDEO_MME_RECORD),
    "video_mme_lines": ("videomme", {"flat.jsonl": VIDEO_MME_FLAT}, VIDEO_MME_RECORD),
}


@pytest.mark.parametrize("name, files, expected", RELEASES.values(), ids=RELEASES)
def test_a_release_is_read_as_records(name, files, expected, tmp_path):
    folder = tmp_path / "release"
    for file, content in files.items():
        put(folder / file, content)
    records = read(name, converted(name, folder, tmp_path / "a.json"), folder)
    assert list(records) == list(expected)
    for problem_id, fields in expected.items():
        record = records[problem_id]
        assert {key: record[key] for key in fields} == fields
        assert record["media_path"] == f"{folder}/{record['path'].removeprefix('./')}"


MATH_15 = "['24/7', '3.429', '3.43]"  # as released: no well-formed list


def open_question(truth):
    """The record of an open question of VideoMMMU."""
    found, = build_data.from_videommmu(videommmu_row("test_Manage_2", [], truth),
                                       Path("adaptation.json"))
    return {"problem_id": "adaptation/0"} | build_data.make_record(
        found, {"source": "VideoMMMU", "media": ".",
                "problem_type": build_data.CONVERTED_TYPES})


@pytest.mark.parametrize("truth, answers", [
    ("12.97", {"12.9701": 1, "about 12.97 g": 1, "12.9": 0, "112.97": 0}),
    ("Net Income", {"the net income.": 1, "income": 0, "": 0}),
    ("A", {"A": 1, "a": 1, "(A)": 1, "D, the attractive part": 0, "I cannot say": 0, "": 0}),
    (MATH_15, {"24/7": 1, "3.43": 1, "3.429 ft/s": 1, "3": 0, "24": 0, "'": 0}),
    ("['7', 'seven']", {"7": 1, "seven": 1, "Seven.": 1, "17": 0, "six": 0}),
    (["MgS", "Mg"], {"MgS": 1, "Mg": 1, "S": 0}),
    ('["Newton\'s law", "inertia"]', {"Newton's law": 1, "by inertia": 1, "law": 0, "s": 0}),
    ("['up', '']", {"up": 1, "down": 0}),  # nothing is in every answer
    ("[0, 5]", {"[0, 5]": 1, "0": 0, "5": 0}),  # an interval
])
def test_videommmu_grades_an_open_answer_by_number_letter_text_or_any_item(truth, answers):
    record = open_question(truth)
    for text, score in answers.items():
        row, = evaluate.grade([record], {"adaptation/0": {
            "output": f"<answer>{text}</answer>", "tokens": 1, "truncated": False}}, 0.5)
        assert evaluate.Overall("contains").score(row) == score, text


def test_what_videommmu_grades_as_contained_is_graded_as_free_form_text_elsewhere():
    record = open_question("Net Income")
    row, = evaluate.grade([record], {"adaptation/0": {
        "output": "<answer>the net income.</answer>", "tokens": 1, "truncated": False}}, 0.5)
    assert row["contains"] == 1 and 0 < row["accuracy"] < 1  # ROUGE


def released_row(number, path, **more):
    """A row of a released eval_*.json."""
    return {"problem_id": number, "problem": "Which?", "data_type": "video", "path": path,
            "problem_type": "multiple choice", "options": ["A. up", "B. down"],
            "original_question_type": "", "solution": "<answer>B</answer>", **more}


@pytest.mark.parametrize("name, rows, groups", [
    ("videommmu", [released_row(number, "./dev_Biology_3.mp4") for number in
                   (1, 300, 301, 600, 601, 900, 901)],
     [{**({"track": track} if track else {}), "subject": "Biology", "discipline": "Science"}
      for track in ("adaptation", "adaptation", "comprehension", "comprehension", "perception",
                    "perception", None)]),
    ("videomme", [released_row(1, "./videos/x.mp4", duration="long", domain="Knowledge",
                               sub_category="Law", task_type="Action Reasoning"),
                  released_row(2, "./videos/x.mp4", duration="long")],
     [{"duration": "long", "domain": "Knowledge", "sub_category": "Law",
       "task_type": "Action Reasoning"}, {"duration": "long"}]),
    ("mvbench", [released_row(1, "./ssv2_video/1.mp4"), released_row(200, "./ssv2_video/2.mp4"),
                 released_row(201, "./perception/videos/1.mp4"), released_row(4000, "./flat.mp4"),
                 released_row(1401, "./star/Charades_v1_480/1.mp4"),  # vlnqa's number
                 released_row(4001, "./vlnqa/1.mp4"), released_row("x1", "./vlnqa/1.mp4"),
                 released_row(7, "./1.mp4", original_question_type="State Change")],
     [{"task": "action_antonym"}, {"task": "action_antonym"}, {"task": "action_count"},
      {"task": "unexpected_action"}, {}, {}, {}, {"task": "state_change"}]),
    ("mmvu", [released_row(1, "./videos/Materials_Science/0.mp4")],
     [{"subject": "Materials_Science", "discipline": "Science"}]),
])
def test_released_rows_tell_their_groups_by_number_folder_and_field(name, rows, groups, tmp_path):
    put(tmp_path / "eval.json", rows)
    assert [r["groups"] for r in read(name, tmp_path / "eval.json").values()] == groups


def test_mvbench_s_released_rows_of_frames_are_videos_and_cost_themselves_alone(tmp_path):
    put(tmp_path / "eval.json", [
        released_row(1, "./ssv2_video/1.mp4", start=1.0, end=2.0),
        released_row(1601, "./tvqa/frames_fps3_hq/a", data_type="frame", fps=3, start=1, end=5),
        released_row(1602, "./tvqa/frames_fps3_hq/b", data_type="frame"),
        released_row(1603, "./tvqa/frames_fps3_hq/absent", data_type="frame")])
    for name in "ab":
        (tmp_path / "tvqa/frames_fps3_hq" / name).mkdir(parents=True)
        for i, frame in enumerate(ramp(24)):  # 8 seconds
            Image.fromarray(frame).save(
                tmp_path / f"tvqa/frames_fps3_hq/{name}/{i + 1:05d}.jpg", quality=95)
    whole, part, all_of_it, absent = read("mvbench", tmp_path / "eval.json").values()
    assert "video_start" not in whole  # as in the paper's code
    assert {r["groups"]["task"] for r in (part, all_of_it, absent)} == {"episodic_reasoning"}
    # 3 frames a second: seconds 1 to 5 are frames 3 to 15, of which 2 a second are 8
    assert numbers(load_vision(part, **LIMITS)) == [3, 5, 6, 8, 10, 12, 13, 15]
    assert numbers(load_vision(all_of_it, **LIMITS)) == [0, 3, 7, 10, 13, 16, 20, 23]
    with pytest.raises(MediaError, match="frames_fps3_hq/absent"):
        load_vision(absent, **LIMITS)


@pytest.mark.parametrize("name, release, expected", [
    ("videommmu", "VideoMMMU", {f"{track}/0": "A" 
                   for track in ("adaptation", "comprehension", "perception")}),
    ("tempcompass", "TempCompass", {"multi-choice/0": "B", "multi-choice/1": "C"})])
def test_the_samples_of_real_releases_are_read(name, release, expected, tmp_path):
    folder = SHARED / "cases/releases" / release
    if not folder.exists():
        pytest.skip(f"no {folder}")
    records = read(name, converted(name, folder, tmp_path / "a.json"), folder)
    assert {key: r["solution"] for key, r in records.items()} == {
        key: f"<answer>{letter}</answer>" for key, letter in expected.items()}
    if name == "tempcompass":
        assert len(records["multi-choice/0"]["options"]) == 4


def test_a_converted_release_lies_in_its_folder_or_has_paths_below_a_folder_above(tmp_path):
    put(tmp_path / "data/VideoMMMU/perception.json",
        {"0": videommmu_row("dev_Biology_3", ["up", "down"], "A")})
    folder, command = tmp_path / "data/VideoMMMU", ("build_data.py", "convert", "videommmu")
    launch(*command, folder, "--out", tmp_path / "data/v.json", "--media_root", tmp_path / "data")
    for _ in range(2):  # the second finds the first's file among the release's
        done = launch(*command, folder, "--out", folder / "all.json")
    assert done.stdout == f"{folder}/all.json: 1 records; paths in it are relative to {folder}\n"
    for file, path in ((folder / "all.json", "./Science/dev_Biology_3.mp4"),
                       (tmp_path / "data/v.json", "./VideoMMMU/Science/dev_Biology_3.mp4")):
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


@pytest.fixture
def mvbench(tmp_path):
    """MVBench's release with one question of five tasks and their media, a ramp each."""
    folder = tmp_path / "MVBench"

    def ask(task, video, **more):
        put(folder / f"json/{task}.json", [{"video": video, "question": "Which?", "answer": "down",
                                            "candidates": ["up", "down"], **more}])
    ask("moving_count", "video_1.mp4")
    ask("object_shuffle", "video_1.mp4")  # another video of the same name
    ask("action_sequence", "A1.mp4", start=2.0, end=6.0)
    ask("action_antonym", "7.webm")
    ask("fine_grained_pose", "S001_rgb.avi")
    ask("episodic_reasoning", "s07_clip", start=1.0, end=5.0)
    for path, codec in (("clevrer/video_validation/video_1.mp4", "libx264"),
                        ("perception/videos/video_1.mp4", "libx264"), ("ssv2_video/7.webm", "vp9"),
                        ("star/Charades_v1_480/A1.mp4", "libx264"),
                        ("nturgbd/S001_rgb.avi", "mpeg4")):
        (folder / "video" / path).parent.mkdir(parents=True)
        with av.open(str(folder / "video" / path), "w") as file:
            stream = file.add_stream(codec, rate=2)
            stream.width, stream.height, stream.pix_fmt = 28, 28, "yuv420p"
            for frame in ramp(16):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
            file.mux(stream.encode())
    frames = folder / "video/tvqa/frames_fps3_hq/s07_clip"
    frames.mkdir(parents=True)
    for i, frame in enumerate(ramp(24)):  # 8 seconds
        Image.fromarray(frame).save(frames / f"{i + 1:05d}.jpg", quality=95)
    return folder


def test_mvbench_keeps_folders_apart_and_times_with_the_question(mvbench, tmp_path):
    records = read("mvbench", converted("mvbench", mvbench, mvbench / "records.json"))
    assert records["moving_count/0"]["path"] == "./video/clevrer/video_validation/video_1.mp4"
    assert records["object_shuffle/0"]["path"] == "./video/perception/videos/video_1.mp4"
    assert records["action_sequence/0"]["video_start"] == 2.0
    assert records["action_sequence/0"]["video_end"] == 6.0
    assert records["action_sequence/0"]["solution"] == "<answer>B</answer>"
    assert records["episodic_reasoning/0"]["video_fps"] == 3
    assert len(build_data.benchmark_facts()["mvbench"]["folders"]) == 20


def test_mvbench_s_mp4_webm_avi_and_folders_of_frames_show_the_seconds_asked_about(
        mvbench, tmp_path):
    records = read("mvbench", converted("mvbench", mvbench, mvbench / "records.json"))
    shown = {key: load_vision(record, **LIMITS) for key, record in records.items()}
    for key in ("moving_count/0", "action_antonym/0", "fine_grained_pose/0"):
        assert numbers(shown[key]) == [0, 2, 4, 6, 9, 11, 13, 15], key  # linspace(0, 15, 8)
    # 2 frames a second: seconds 2 to 6 are frames 4 to 12
    assert numbers(shown["action_sequence/0"]) == [4, 5, 6, 7, 9, 10, 11, 12]
    # 3 frames a second: seconds 1 to 5 are frames 3 to 15, of which 2 a second are 8
    assert numbers(shown["episodic_reasoning/0"]) == [3, 5, 6, 8, 10, 12, 13, 15]
    assert shown["episodic_reasoning/0"].metadata["fps"] == 3
    assert shown["episodic_reasoning/0"].frames.shape == shown["moving_count/0"].frames.shape


def test_a_folder_without_frames_or_rate_costs_its_record(tmp_path):
    (tmp_path / "clip").mkdir()
    record = {"data_type": "video", "media_path": str(tmp_path / "clip"),
              "media_root": str(tmp_path), "video_fps": 3}
    with pytest.raises(MediaError, match="clip: a folder needs frames"):
        load_vision(record, **LIMITS)
    Image.fromarray(ramp(1)[0]).save(tmp_path / "clip/00001.jpg")
    with pytest.raises(MediaError, match="video_fps"):
        load_vision({**record, "video_fps": None}, **LIMITS)


@pytest.mark.parametrize("name, file, content, message", [
    ("tvbench", "action_sequence.json", [{"video": "1.mp4", "question": "?", "answer": "a",
                                          "candidates": ["a", "b"]}], "KeyError.'start'"),
    ("tvbench", "object_count.json", [{"video": "1.mp4", "question": "?", "answer": "0",
                                       "candidates": ["2", "1"]}], "'0' is not in list"),
    ("tvbench", "object_count.json", [{"video": "1.mp4", "question": "?", "answer": "1",
                                       "candidates": "['2', '1']"}],
     "the options are not texts.*after 0 questions"),
    ("tvbench", "episodic_reasoning.json", [{}], "none of action_antonym, "),
    ("tomato", "count.json", {"0": tomato_row(7, "1", "human", "count")},
     "answer is not one of the options.*after 0 questions"),
    ("tomato", "count.json", {"0": {"question": "?"}}, "KeyError.'demonstration_type'"),
    ("vinoground", "vinoground_textscore.json", [vinoground_row("12", "text", "A")],
     "question 12 is not <pair>_pos"),
    ("vinoground", "vinoground_textscore.json", [vinoground_row("1_pos", "text", "C")],
     "answer is not one of the options"),
    ("vinoground", "vinoground_textscore.json", [
        {**vinoground_row("1_pos", "text", "A"), "question": "Which?\nA) x\nB) y"}],
     "question 1_pos is not .* with options A. and B."),
    ("videommmu", "perception.json", {"0": videommmu_row("dev_Alchemy_3", ["up", "down"], "A")},
     "the id 'dev_Alchemy_3' names no subject of VideoMMMU"),
    ("videommmu", "other.json", [{}], "its name, or its folder's, is none of adaptation"),
    ("vsibench", "other.json", [{"question": "Which?"}], "KeyError"),
    ("vinoground", "vinoground.json", [{}], "none of vinoground_textscore, "),
])
def test_what_a_release_would_not_have_is_refused_by_name(
        name, file, content, message, tmp_path):
    put(tmp_path / file, content)
    with pytest.raises(InputError, match=f"{file} differs from the release of .*: .*{message}"):
        converted(name, tmp_path / file, tmp_path / "a.json")


def test_what_is_no_release_is_refused_by_name(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="has no questions/.* of TempCompass: give the file"):
        converted("tempcompass", tmp_path, tmp_path / "a.json")
    with pytest.raises(InputError, match="build_data.py convert mvbench .* --out mvbench.json"):
        read("mvbench", tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    with pytest.raises(InputError, match="needs the package pyarrow"):
        converted("videomme", tmp_path / "test.parquet", tmp_path / "a.json")


@pytest.mark.parametrize("name, kinds, most", [
    ("mmvu", ["subject", "discipline"], "Science"),
    ("videommmu", ["track", "subject", "discipline"], "Engineering"),
])
def test_released_rows_are_grouped_by_what_they_name(name, kinds, most, tmp_path):
    source = SHARED / f"eval_{name}_30.json"
    if not source.exists():
        pytest.skip(f"no {source}")
    records = read(name, source, str(tmp_path))
    assert len(records) == 30 and all(list(r["groups"]) == kinds for r in records.values())
    disciplines = Counter(record["groups"]["discipline"] for record in records.values())
    assert disciplines.total() == 30 and disciplines.most_common(1)[0][0] == most
    if name == "videommmu":  # open questions are in adaptation alone
        assert {r["groups"]["track"] for r in records.values()
                if r["problem_type"] == "numerical"} == {"adaptation"}


def test_videommmu_s_last_frame_the_quiz_is_always_shown(tmp_path):
    source = SHARED / "eval_videommmu_30.json"
    if not source.exists():
        pytest.skip(f"no {source}")
    record = json.loads(source.read_text())[0]
    frames = np.zeros((61, 28, 28, 3), np.uint8)
    frames[-1] = 250
    write_video(tmp_path / record["path"], frames, 2)
    (tmp_path / "one.json").write_text(json.dumps([record]))
    record, = read("videommmu", tmp_path / "one.json").values()
    for count in (8, 16, 32):
        shown = load_vision(record, **{**LIMITS, "max_frames": count}).frames
        assert len(shown) == count
        assert shown[-1].float().mean() > 200 and shown[-2].float().mean() < 50


# ---------------------------------------------------------------------------------- scores

def graded(task, problem_type, solution, answers):
    """Rows as they are graded, one for each answer, with a medium of its own."""
    records = [{"problem_id": f"{task}{i}", "path": f"{task}{i}", "problem": "Q?",
                "problem_type": problem_type, "groups": {"task": task},
                "options": ["A. x", "B. y"] if problem_type == "multiple choice" else [],
                "solution": f"<answer>{solution}</answer>"} for i in range(len(answers))]
    rows = {record["problem_id"]: {"output": f"<answer>{answer}</answer>", "tokens": 1,
                                   "truncated": False} for record, answer in zip(records, answers)}
    return records, evaluate.grade(records, rows, 0.5)


def test_vsi_bench_s_two_overalls_are_those_computed_by_hand():
    parts = [graded(task, "multiple choice", "A", answers) for task, answers in (
        ("object_rel_direction_easy", "AAAA"), ("object_rel_direction_medium", "AB"),
        ("object_rel_direction_hard", "B"), ("route_planning", "AAAB"))]
    parts.append(graded("object_counting", "regression", "2", ["2", "1"]))
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


@pytest.mark.parametrize("p, g, ours, released", [
    ("1", "2", 0.1, 0.0), ("2", "2", 1.0, 1.0), ("1.5", "2", 0.6, 0.5), ("-1", "2", 0.0, 0.0),
    ("none", "2", 0.0, 0.0), ("0", "0", 1.0, 1.0), ("1.9", "2", 1.0, None)])
def test_the_released_mra_differs_where_it_meets_a_threshold(p, g, ours, released):
    assert evaluate.mean_relative_accuracy(p, g) == ours
    if released is not None:  # 1.9: the last threshold is met up to float32's rounding
        assert evaluate.released_relative_accuracy(p, g) == released


def test_a_benchmark_without_task_names_falls_back_to_the_plain_mean():
    records, rows = graded("t", "multiple choice", "A", "AAB")
    for record in records + rows:
        record["groups"] = {}
    scores = evaluate.score(records, rows, 0, evaluate.BENCHMARKS["mvbench"].overalls)
    assert list(scores) == ["all", "problem_type: multiple choice"]  # the first is the headline
    assert scores["all"]["score"]["mean"] == pytest.approx(2 / 3)


def vinoground_graded(answers):
    """Records and graded rows of pairs: {pair: letters for text pos, text neg, video pos, video
    neg}, where A is right and a blank unanswered."""
    cells = [(f"{task}/{pair}_{side}", pair, task) for pair in answers
             for task in ("text", "video") for side in ("pos", "neg")]
    records = [{"problem_id": key, "pair": pair, "path": f"{key}.mp4", "problem": "?",
                "problem_type": "multiple choice", "options": ["A. x", "B. y"],
                "solution": "<answer>A</answer>", "groups": {"task": task}}
               for key, pair, task in cells]
    rows = {key: {"output": f"<answer>{letter}</answer>", "tokens": 1, "truncated": False}
            for (key, *_), letter in zip(cells, "".join(answers.values())) if letter != " "}
    return records, evaluate.grade(records, rows, 0.5)


def test_vinoground_counts_pairs_with_intervals_over_pairs_and_their_drop():
    overalls = evaluate.BENCHMARKS["vinoground"].overalls
    pairs = {"1": "AAAA", "2": "AABA", "3": "ABAA", "4": "AAA "}
    records, rows = vinoground_graded(pairs)
    scores = evaluate.score(records, rows, 0, overalls)
    assert list(scores)[0] == "group score"  # the headline
    # text: pairs 1, 2, 4 of four; video: 1, 3 of three; group: 1 of three
    for name, mean, answered in (("text", 3 / 4, 4), ("video", 2 / 3, 3), ("group", 1 / 3, 3)):
        whole = scores[f"{name} score"]
        assert whole["score"]["mean"] == pytest.approx(mean)
        assert (whole["answered"], whole["records"], whole["score"]["n"]) == (answered, 4, answered)
    assert scores["all"]["score"]["mean"] == pytest.approx(13 / 15)  # questions
    alone = evaluate.score(*vinoground_graded({"1": "AAAB"}), 0, overalls)["group score"]["score"]
    assert alone == {"mean": 0, "low": None, "high": None, "n": 1}  # four videos, one pair
    # shuffled, pair 1 is lost and pair 3 won: text pairs lose (1 + 0 - 1 + 0) / 4
    _, shuffled = vinoground_graded({"1": "BBAA", "2": "AABB", "3": "AABA", "4": "AAAA"})
    drops = evaluate.score(records, shuffled, 0, overalls, rows)
    assert drops["text score"]["drop"]["mean"] == 0 and drops["text score"]["drop"]["n"] == 4
    # video pairs 1, 2, 3 that both answered: 1 - 1, 0 - 0, 1 - 0
    assert drops["video score"]["drop"]["mean"] == pytest.approx(1 / 3)
    assert drops["group score"]["drop"]["mean"] == pytest.approx(1 / 3)
    text = {"benchmark": "vinoground", "rows": vinoground_graded({"1": "AA  "})[1],
            "configuration": {}, "order": "ordered", "arguments": {"seed": 0, "model": "m"}}
    groups = [line.split("|")[1:4] for line in evaluate.difference(text, text) if "score" in line]
    assert [[cell.strip() for cell in row] for row in groups] == [
        ["group score", "0", ""], ["text score", "1", "100.0"], ["video score", "0", ""]]
    printed = [line.split("|")[1].strip() for line in evaluate.table("v", scores)[2:]]
    assert printed == ["group score", "text score", "video score", "all",
                       "problem_type: multiple choice", "task: text", "task: video"]


def test_tvbench_s_headline_is_the_mean_of_its_tasks_with_their_coverage():
    parts = [graded("action_sequence", "multiple choice", "A", "AAAB"),
             graded("object_count", "multiple choice", "A", "AB"),
             (graded("action_antonym", "multiple choice", "A", "AA")[0], [])]  # no videos
    records, rows = (sum(both, []) for both in zip(*parts))
    scores = evaluate.score(records, rows, 0, evaluate.BENCHMARKS["tvbench"].overalls)
    first = next(iter(scores))
    assert first == "mean of tasks" and scores[first]["score"]["mean"] == (0.75 + 0.5) / 2
    assert (scores[first]["answered"], scores[first]["records"]) == (6, 8)
    assert (scores["task: action_antonym"]["answered"], scores["task: action_antonym"]["records"]
            ) == (0, 2)


def test_order_benchmarks_follow_table_1_s_columns_where_there_are_results():
    result = {"benchmark": "tvbench", "frames": 16, "order": "ordered", "answered": 6, "records": 6,
              "overall": "all", "scores": {"all": {"score": {"mean": 0.5, "low": 0.25, "high": 1}}},
              "arguments": {"model": "m"}}
    head, _, row, *paper = evaluate.summary([result], "paper")
    assert [text.strip() for text in head.strip("|").split("|")][-2:] == [
        "VideoMME (wo sub)", "TVBench"]
    # the whole of its file, but not of the benchmark
    assert row.startswith("| m (ordered) ") and "| 50.0 [25.0, 100.0] 6/2525 |" in row
    assert len({line.count("|") for line in (head, row, *paper)}) == 1
    assert "TVBench" not in evaluate.summary([], "paper")[0]


def test_the_interval_of_two_media_is_exact():
    # resamples of {0, 1}: 0, 1/2, 1 with chances 1/4, 1/2, 1/4
    assert evaluate.bootstrap_mean([0.0, 1.0], ["a", "b"], 0) == (0.5, 0.0, 1.0)


def test_the_interval_of_a_mean_of_tasks_is_the_formula_s():
    # 400 media a task, shares .5 and .9: sd of the mean of both = sqrt(.25/400 + .09/400) / 2
    values = [0.0, 1.0] * 200 + ([0.0] + [1.0] * 9) * 40
    media, cells = [str(i) for i in range(800)], ["s"] * 400 + ["t"] * 400
    mean, low, high = evaluate.bootstrap_mean(values, media, 0, cells)
    assert mean == pytest.approx(0.7)
    assert high - low == pytest.approx(2 * 1.96 * (0.34 / 400) ** 0.5 / 2, rel=0.1)


def test_reflections_are_counted():
    text = "Wait, that is red. Hmm... Let me check. Let's verify this. The waiter awaits."
    records = [{"problem_id": 1, "path": "m", "problem_type": "numerical",
                "solution": "<answer>1</answer>"}]
    row, = evaluate.grade(records, {"1": {"output": text, "tokens": 1, "truncated": False}}, 0.5)
    assert row["reflections"] == 4


# ----------------------------------------------------------------- whole runs and comparison

@pytest.fixture(scope="module")
def mmvu(tmp_path_factory):
    """Six questions in MMVU's own release, five of their videos, and one to miss."""
    folder = tmp_path_factory.mktemp("mmvu") / "MMVU"
    rng = np.random.default_rng(0)
    rows = [{"id": f"validation_{i}", "video": f"https://x/videos/{subject}/{i}.mp4",
             "question_type": "multiple-choice", "question": "Which?", "answer": "A",
             "choices": {"A": "up", "B": "down"}}
            for i, subject in enumerate(("Art", "Art", "Chemistry", "Chemistry", "Law", "Law"))]
    put(folder / "validation.json", rows)
    for row in rows[:5]:
        path = folder / row["video"].removeprefix("https://x/")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, rng.integers(0, 255, (8, 28, 28, 3), np.uint8), 2)
    converted("mmvu", folder, folder / "records.json")
    return folder


def evaluated(toy, mmvu, output, *more):
    """A run over the six questions; returns the result."""
    given = flags(toy, output, *more)
    given[given.index("--benchmark") + 1] = f"mmvu={mmvu}/records.json"
    del given[given.index("--media_root"):given.index("--media_root") + 2]
    main(*given)
    order = evaluate.parse_args(given).order[-1]
    return json.loads((output / f"mmvu_8_{order}.json").read_text())


def test_a_release_is_answered_and_stands_in_the_paper_s_table(toy, mmvu, tmp_path, capsys):
    result = evaluated(toy, mmvu, tmp_path, "--compare", "paper", "--max_new_tokens", 2)
    assert (result["answered"], result["records"]) == (5, 6)
    assert len(result["skipped"]) == 1 and "Law/5.mp4" in result["skipped"][0]["reason"]
    assert {"discipline: Science", "subject: Art"} <= set(result["scores"])
    row = result["rows"][0]
    assert row["reward"] == row["accuracy"] + row["format"] and row["size"] == [8, 28, 28]
    assert row["prompt_tokens"] > 0
    printed = capsys.readouterr().out
    assert "mmvu: 6 questions; MMVU (mc) has 625" in printed
    lines = printed.splitlines()
    head = next(line for line in lines if line.startswith("| Models"))
    columns = [text.strip() for text in head.strip("|").split("|")]
    assert columns == ["Models", "Frames", "VSI-Bench", "VideoMMMU", "MMVU (mc)", "MVBench",
                       "TempCompass", "VideoMME (wo sub)"]
    ours, theirs = lines[lines.index(head) + 2], lines[-1]
    assert " 5/625" in ours.split("|")[5] and f"{toy}/model (ordered) " in ours
    assert [x.strip() for x in theirs.strip("|").split("|")] == [
        "Video-R1-7B, paper", "64", "37.1", "52.4", "63.8", "64.8", "73.2", "61.4"]


def test_a_file_of_records_beside_a_benchmark_of_a_like_name_stays_out_of_its_table(
        toy, mmvu, tmp_path, capsys, server):
    server.reply = lambda content, attempt: (200, "<answer>A</answer>")
    evaluated(toy, mmvu, tmp_path, *server.flags)
    given = flags(toy, tmp_path, *server.flags, "--media_root", str(mmvu))
    given[given.index("--benchmark") + 1] = f"mmvu_again={mmvu}/records.json"
    capsys.readouterr()
    main(*given)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| served") for line in lines) == 1
    assert (tmp_path / "mmvu_again_8_ordered.json").exists()


def test_no_medium_at_all_is_an_error_before_the_model_is_loaded(toy, mmvu, tmp_path):
    with pytest.raises(InputError, match="none of its media is there.*Art/0.mp4.*--media_root"):
        evaluated(toy, mmvu, tmp_path, "--media_root", str(tmp_path))


def result_file(path, outputs, seed=0):
    """A result over four questions whose answer is A, on three videos."""
    records = [{"problem_id": i, "path": media, "problem": f"Which {i}?", "data_source": "s",
                "problem_type": "multiple choice", "options": ["A. up", "B. down"],
                "solution": "<answer>A</answer>"} for i, media in enumerate("aabc")]
    rows = {str(i): {"output": f"<answer>{text}</answer>", "tokens": 1, "truncated": False}
            for i, text in enumerate(outputs) if text != " "}
    graded = evaluate.grade(records, rows, 0.5)
    path.write_text(json.dumps({"benchmark": "toy", "rows": graded, "configuration": {"frames": 8},
                                "order": "ordered", "arguments": {"seed": seed, "model": "m"}}))
    return str(path)


def test_two_results_are_compared_by_question_without_a_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "Generator", None)
    files = [result_file(tmp_path / "a.json", "ABB "), result_file(tmp_path / "b.json", "BAAA")]
    main("--diff", *files)
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("| all"))
    # 1 of 3 right, then 2 of 3; by video: a 0, b +1 over 2 and 1 questions
    assert [x.strip().split()[0] for x in row.strip("|").split("|")] == [
        "all", "3", "33.3", "66.7", "33.3"]
    assert "33.3 [0.0, 100.0]" in row
    assert "| A: m (ordered) " in lines[0] and "| B: m (ordered) " in lines[0]
    assert [line.split(":")[0] for line in lines if "->" in line] == ["0", "1", "2"]
    assert lines[-1] == "3 questions compared; 0 only in A, 1 only in B"


def results_folder(folder, model, **answers):
    """An --output with a result for each order: four questions whose answer is A, by source."""
    folder.mkdir()
    records = [{"problem_id": i, "path": f"{i}.mp4", "problem": "Which?", "data_source": source,
                "problem_type": "multiple choice", "options": ["A. x", "B. y"],
                "solution": "<answer>A</answer>"}
               for i, source in enumerate(("toy/conflict", "toy/conflict", "toy/agree", "other"))]
    graded = {order: evaluate.grade(records, {str(i): {
        "output": f"<answer>{letter}</answer>", "tokens": 1, "truncated": False}
        for i, letter in enumerate(letters)}, 0.5) for order, letters in answers.items()}
    for order, rows in graded.items():
        scores = evaluate.score(records, rows, 0, ordered=graded["ordered"]
                                if order != "ordered" else ())
        put(folder / f"toy_8_{order}.json", {
            "benchmark": "toy", "frames": 8, "order": order, "rows": rows, "scores": scores,
            "configuration": {}, "arguments": {"model": model, "seed": 0}})
    return str(folder)


def test_two_folders_are_compared_in_one_table_of_ordered_shuffled_and_gap(tmp_path, capsys):
    folders = [results_folder(tmp_path / "a", "toy/sft", ordered="BBAA", shuffled="BABA"),
               results_folder(tmp_path / "b", "toy/tgrpo", ordered="AAAB", shuffled="ABBB")]
    main("--diff", *folders)
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines}) == 1
    head, _, *rows = [[text.strip() for text in line.strip("|").split("|")] for line in lines]
    assert head == ["toy_8: score, %", "answered", "model", "ordered", "shuffled", "gap"]
    assert [row[:3] for row in rows] == [
        ["all", "4", "toy/sft"], ["", "4", "toy/tgrpo"],
        ["data_source: other", "1", "toy/sft"], ["", "1", "toy/tgrpo"],
        ["agree", "1", "toy/sft"], ["", "1", "toy/tgrpo"],
        ["conflict", "2", "toy/sft"], ["", "2", "toy/tgrpo"]]
    assert [text.split(" ")[0] for text in rows[0][3:]] == ["50.0", "50.0", "0.0"]
    assert all("[" in text for text in rows[0][3:])  # intervals
    assert [text.split(" ")[0] for text in rows[1][3:]] == ["75.0", "25.0", "50.0"]
    assert [text.split(" ")[0] for text in rows[6][3:]] == ["0.0", "50.0", "-50.0"]
    (tmp_path / "b/toy_8_shuffled.json").unlink()
    with pytest.raises(InputError, match="a and .*b have no <name>_<frames>_shuffled.json"):
        main("--diff", *folders)


def test_what_is_no_result_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(InputError, match="is not a result"):
        main("--diff", tmp_path / "x.json", "y")


# -------------------------------------------------------------------------------- a server

@pytest.fixture
def server(monkeypatch):
    """A server on this machine: .reply(messages, attempt) gives (status, text) or raw bytes."""
    monkeypatch.setattr(annotate, "FIRST_PAUSE", 0.01)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            key = json.dumps(body["messages"])
            with lock:
                http.bodies.append(body)
                attempt = sum(json.dumps(b["messages"]) == key for b in http.bodies)
            status, text = http.reply(body["messages"][0]["content"], attempt)
            data = text if isinstance(text, bytes) else json.dumps({
                "choices": [{"message": {"content": text}, "finish_reason": "stop"}],
                "usage": {"completion_tokens": 3}}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    lock, http = threading.Lock(), ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.bodies = []
    http.flags = ["--api_base", f"http://127.0.0.1:{http.server_port}/v1", "--model", "served",
                  "--api_retries", "2", "--concurrency", "2"]
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield http
    http.shutdown()
    http.server_close()


def test_a_server_that_misbehaves_costs_at_most_the_questions_it_refuses(
        toy, mmvu, tmp_path, server):
    def reply(content, attempt):
        if attempt == 1:
            return [(500, "busy"), (200, b"not JSON"), (429, "later")][len(server.bodies) % 3]
        if server.broken:
            refused.append(json.dumps(content))  # the first is refused for good
            if refused[0] == json.dumps(content):
                return 400, "too long"
        return 200, "<think>up</think><answer>A</answer>"
    server.reply, server.broken, refused = reply, True, []
    result = evaluated(toy, mmvu, tmp_path, *server.flags)
    assert (result["answered"], len(result["skipped"])) == (4, 2)  # one has no video
    assert sum("HTTP 400" in row["reason"] for row in result["skipped"]) == 1
    assert result["scores"]["all"]["accuracy"]["mean"] == 1 and result["tokens"] == 4 * 3
    assert result["configuration"]["engine"] == "api"
    assert server.bodies[0]["temperature"] == 0.01 and server.bodies[0]["max_tokens"] == 12

    server.broken, asked = False, len(server.bodies)
    result = evaluated(toy, mmvu, tmp_path, *server.flags)
    assert result["answered"] == 5
    assert {json.dumps(body["messages"][0]["content"]) for body in server.bodies[asked:]} == {
        refused[0]}  # what was answered is not asked again


def test_released_files_of_two_benchmarks_are_asked_and_graded_in_one_command(
        tmp_path, server, capsys):
    clip, truths, given = np.zeros((8, 28, 28, 3), np.uint8), {}, []
    for name in ("mmvu", "videommmu"):
        if not (SHARED / f"eval_{name}_30.json").exists():
            pytest.skip(f"no {SHARED}/eval_{name}_30.json")
        rows = json.loads((SHARED / f"eval_{name}_30.json").read_text())
        put(tmp_path / f"eval_{name}.json", rows)
        for row in rows:
            (tmp_path / row["path"]).parent.mkdir(parents=True, exist_ok=True)
            write_video(tmp_path / row["path"], clip, 2)
        truths[name] = [row["solution"] for row in rows]
        given.append(f"{name}={tmp_path}/eval_{name}.json")
    server.reply = lambda content, attempt: (200, "<think>x</think>\n<answer>B</answer>")
    main("--benchmark", *given, "--output", tmp_path / "out", "--frames", 8, "--num_workers", 0,
         *server.flags)
    for name, solutions in truths.items():
        scores = json.loads((tmp_path / f"out/{name}_8_ordered.json").read_text())["scores"]
        assert scores["all"]["answered"] == 30 == len(solutions)
        right = sum(solution == "<answer>B</answer>" for solution in solutions)
        assert 0 < right < 30 and scores["all"]["score"]["mean"] == pytest.approx(right / 30)
    printed = capsys.readouterr().out.splitlines()
    ours = next(line for line in printed if line.startswith("| served"))
    cells = [text.strip() for text in ours.strip("|").split("|")]
    assert cells[3].endswith(" 30/900") and cells[4].endswith(" 30/625") and cells[5] == ""


def test_vinoground_is_asked_scored_by_pairs_and_compared_with_reversed_frames(
        toy, tmp_path, server, capsys):
    for task in ("text", "video"):
        rows = [vinoground_row(f"{pair}_{side}", task, "A") for pair in (1, 2)
                for side in ("pos", "neg")]
        put(tmp_path / f"Vinoground/vinoground_{task}score.json", rows)
        for row in rows:
            path = tmp_path / "Vinoground" / row["video_name"]
            path.parent.mkdir(exist_ok=True)
            write_video(path, ramp(8) if row["idx"][0] == "1" else ramp(8)[::-1], 2)

    def reply(content, attempt):  # right where the video gets brighter
        first, last = (np.asarray(Image.open(io.BytesIO(base64.b64decode(
            content[i]["image_url"]["url"].partition(",")[2])))).mean() for i in (0, 7))
        return 200, "<answer>A</answer>" if first < last else "<answer>B</answer>"
    server.reply = reply
    given = flags(toy, tmp_path / "out", *server.flags, "--media_root", tmp_path)
    given[given.index("--benchmark") + 1] = "vinoground=" + str(converted(
        "vinoground", tmp_path / "Vinoground", tmp_path / "v.json", "--media_root", str(tmp_path)))
    main(*given, "--order", "reversed", "ordered")  # whatever their order here
    for order, score, drop in (("ordered", 0.5, None), ("reversed", 0.5, 0.0)):
        result = json.loads((tmp_path / f"out/vinoground_8_{order}.json").read_text())
        for name in ("group score", "text score", "video score"):
            assert result["scores"][name]["score"]["mean"] == score
            assert result["scores"][name]["records"] == 2
            assert result["scores"][name].get("drop", {}).get("mean") == drop
    printed = capsys.readouterr().out
    assert "vinoground: 8 questions; Vinoground has 2000" in printed
    assert "| Vinoground" in printed
    assert "50.0 [0.0, 100.0] 8/2000, drop 0.0 [-100.0, 100.0]" in printed


def test_the_order_of_frames_reaches_the_server(toy, mmvu, tmp_path, server):
    server.reply = lambda content, attempt: (200, "<answer>B</answer>")
    orders, seen = ("ordered", "reversed", "blind"), {}
    result = evaluated(toy, mmvu, tmp_path, *server.flags, "--order", *orders)
    for i, body in enumerate(server.bodies):  # five questions each
        *pictures, text = body["messages"][0]["content"]
        frames = [np.asarray(Image.open(io.BytesIO(base64.b64decode(
            picture["image_url"]["url"].partition(",")[2])))).mean() for picture in pictures]
        seen.setdefault(orders[i // 5], []).append([round(value) for value in frames])
    assert sorted(seen["reversed"]) == sorted(frames[::-1] for frames in seen["ordered"])
    assert seen["blind"] == [[evaluate.GREY] * 8] * 5 and seen["ordered"] != seen["reversed"]
    assert text["text"] == build_messages(evaluate.load_records(
        mmvu / "records.json")[0])[0]["content"][1]["text"]
    assert result["scores"]["all"]["drop"] == {"mean": 0, "low": 0, "high": 0, "n": 5}


def test_the_judge_gives_the_share_of_temporal_responses_among_questions_that_need_it(
        tmp_path, server, capsys):
    path = result_file(tmp_path / "toy_8_ordered.json", "ABAB")

    def reply(content, attempt):
        text = content[0]["text"]
        if "Response:" not in text:  # three of four questions need it; one is undecided
            return 200, "Perhaps" if "Which 3?" in text else "Yes."
        return 200, "No" if "Which 1?" in text else "**yes**"
    server.reply = reply
    more = ["--judge", path, "--output", tmp_path / "judged", *server.flags]
    main(*more)
    assert "temporal reasoning in 66.7 [50.0, 100.0] % of 3 responses" in capsys.readouterr().out
    result = json.loads((tmp_path / "judged/toy_8_ordered.judge.json").read_text())
    assert (result["questions"], result["judged"], result["needs"]) == (4, 3, 3)
    assert result["uses"]["mean"] == pytest.approx(2 / 3)
    assert [row["uses"] for row in result["rows"]] == [True, False, True]
    asked = len(server.bodies)
    assert asked == 7
    main(*more)  # verdicts are kept: nobody is asked again
    assert len(server.bodies) == asked


def test_a_model_on_this_machine_can_judge(toy, tmp_path, capsys):
    path = result_file(tmp_path / "toy_8_ordered.json", "ABAB")
    main("--judge", path, "--output", tmp_path / "judged", "--model", toy / "model",
         "--max_new_tokens", 2, "--num_workers", 0)
    # the toy's untrained model says neither yes nor no
    assert "4 questions answered, 0 judged, 0 need" in capsys.readouterr().out
    rows = (tmp_path / "judged/toy_8_ordered.questions.rank0.jsonl").read_text().splitlines()
    assert len(rows) == 5
