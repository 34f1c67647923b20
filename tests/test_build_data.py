"""Records, prompt, frames and inputs; the toy."""
import filecmp
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import build_data
from build_data import (FlagParser, InputError, MediaError, above, add_media_flags, at_least,
                        build_messages, encode, load_records, load_vision, pad_batch)
from conftest import ROOT, run
from rewards import GRADERS

LIMITS = {"max_frames": 8, "min_frames": 4, "fps": 2, "min_pixels": 784, "max_pixels": 784}
RECORD = {"problem_id": 7, "problem": "What moves?", "data_type": "video",
          "problem_type": "multiple choice", "options": ["A. a cat", "B. a dog"],
          "solution": "<answer>B</answer>", "path": "./clip.mp4", "data_source": "x"}


def write(folder, *records, name="data.json"):
    path = folder / name
    path.write_text(json.dumps(list(records)), encoding="utf-8")
    return path


def clip(path, count=8, height=28, width=28, fps=2):
    """A clip whose frame t is a flat grey of 20 t, so that frames can be told apart."""
    frames = np.stack([np.full((height, width, 3), 20 * t % 256, np.uint8) for t in range(count)])
    build_data.write_video(path, frames, fps)
    return path


def record_of(path, data_type="video", **fields):
    return {**RECORD, "data_type": data_type, "path": path.name, "media_path": str(path),
            "media_root": str(path.parent), **fields}


# ------------------------------------------------------------------------------- records

def test_json_and_jsonl_hold_the_same_records(tmp_path):
    other = RECORD | {"problem_id": 8}
    lines = tmp_path / "data.jsonl"
    lines.write_text(json.dumps(RECORD) + "\n\n" + json.dumps(other) + "\n")
    assert load_records(write(tmp_path, RECORD, other)) == load_records(lines)
    assert load_records(lines)[0]["media_path"] == str(tmp_path / "clip.mp4")


@pytest.mark.parametrize("change, field", [
    ({"problem": None}, "problem"), ({"solution": "B"}, "solution"),
    ({"solution": "<answer> </answer>"}, "solution"), ({"problem_type": "essay"}, "problem_type"),
    ({"data_type": "audio"}, "data_type"), ({"options": []}, "options"),
    ({"options": None}, "options"), ({"options": "A"}, "options"), ({"path": 3}, "path"),
    ({"path": "../clip.mp4"}, "path"), ({"path": "/etc/passwd"}, "path"),
    ({"path": "a\0.mp4"}, "path"), ({"problem": "What \ud83d?"}, "problem"),
    ({"options": ["A. a", "B. \ud83d"]}, "options"), ({"video_start": "0:12"}, "video_start"),
    ({"problem": 0}, "problem"), ({"process": ["a"]}, "process"),
    ({"process": "\ud83d"}, "process"),
    ({"groups": "motion"}, "groups"), ({"groups": ["motion"]}, "groups"),
    ({"groups": None}, "groups"), ({"groups": {"level": 3}}, "groups"),
    # which of several is the answer?
    ({"solution": "<answer>A</answer><answer>B</answer>"}, "solution"),
    ({"solution": "<answer>B</answer>\n<answer>B</answer>"}, "solution"),
    ({"solution": "<answer>A</answer> or <answer>B</answer>"}, "solution"),
    ({"solution": "<answer>use an <answer> tag</answer>"}, "solution"),
    ({"solution": "<answer>B</answer></answer>"}, "solution"),
    ({"solution": "<answer>B</answer><answer></answer>"}, "solution"),
    ({"solution": "<answer>B</answer> it is"}, "solution")])
def test_a_bad_record_is_named_by_file_problem_id_and_field(tmp_path, change, field):
    path = write(tmp_path, RECORD, RECORD | {"problem_id": 41} | change)
    with pytest.raises(InputError) as error:
        load_records(path)
    assert all(word in str(error.value) for word in (str(path), "41", f"field {field}"))


def test_the_root_of_the_file_system_can_be_media_root(tmp_path):
    path = clip(tmp_path / "a.mp4")
    record, = load_records(write(tmp_path, RECORD | {"path": str(path)[1:]}), "/")
    assert record["media_path"] == str(path) and len(load_vision(record, **LIMITS).frames) == 8


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    """Editors on Windows write one."""
    for name, text in (("a.json", json.dumps([RECORD])), ("a.jsonl", json.dumps(RECORD) + "\n")):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert load_records(tmp_path / name)[0]["problem_id"] == 7


def test_groups_and_a_process_are_read_as_they_are(tmp_path):
    more = {"groups": {"motion": "left", "level": "3"}, "process": "<think>it moves</think>"}
    record, = load_records(write(tmp_path, RECORD | more))
    assert {key: record[key] for key in more} == more
    assert load_records(write(tmp_path, RECORD | {"groups": {}, "process": None}))


@pytest.mark.parametrize("token", ["<|video_pad|>", "<|image_pad|>", "<|vision_start|>",
                                   "<|im_start|>", "<|im_end|>", "<|endoftext|>"])
def test_a_special_token_in_a_text_is_text_to_the_model(tmp_path, processor, token):
    clip(tmp_path / "clip.mp4")
    text = f"a {token} b"
    fields = {"problem": text, "options": [f"A. {text}", "B. c"], "process": text,
              "solution": f"<answer>{text}</answer>"}
    plain, record = load_records(write(tmp_path, RECORD, RECORD | fields))
    vision, ids = load_vision(plain, **LIMITS), processor.tokenizer.all_special_ids
    plain, with_token = (encode(processor, each, vision)["input_ids"] for each in (plain, record))
    counts = [[(inputs == i).sum() for i in ids] for inputs in (plain, with_token)]
    assert counts[0] == counts[1]
    target = f"{record['process']} {record['solution']}"  # what the cold start teaches
    assert not set(processor.tokenizer(target).input_ids) & set(ids)
    assert record["problem"] == text.replace("<|", "<| ").replace("|>", " |>")


CHOICE = {"problem_type": "multiple choice", "options": ["A. left", "B. right"]}


@pytest.mark.parametrize("fields, truth", [
    (CHOICE, "C"), (CHOICE, "A, B"), (CHOICE, "up"),
    ({"problem_type": "numerical"}, "00:12"), ({"problem_type": "numerical"}, "2\\sqrt{3}"),
    ({"problem_type": "numerical"}, "3 or 4"), ({"problem_type": "numerical"}, "many " * 40),
    ({"problem_type": "regression"}, "far"), ({"problem_type": "free-form"}, "?!")])
def test_a_solution_that_no_answer_can_match_is_warned_of_once(tmp_path, capsys, monkeypatch, fields,
                                                          truth):
    bad = RECORD | fields | {"problem_id": 41, "solution": f"<answer>{truth}</answer>"}
    path = write(tmp_path, RECORD, bad, bad)
    assert len(load_records(path)) == 3
    warning, = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"{path}: no answer can match the solution of 2 of 3 records")
    assert "problem_id 41" in warning and bad["problem_type"] in warning
    monkeypatch.setenv("RANK", "1")  # another rank of the same run has said it
    load_records(path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("options, shown", [
    (["left", "right"], ["A. left", "B. right"]),
    (["E. coli", "C. elegans", "B. subtilis"], ["A. E. coli", "B. C. elegans", "C. B. subtilis"]),
    (["Staph", "E. coli"], ["A. Staph", "B. E. coli"]), (["1.5", "2.5"], ["A. 1.5", "B. 2.5"]),
    ([" up ", "down"], ["A. up", "B. down"]), (["3. Liga", "Cup"], ["A. 3. Liga", "B. Cup"]),
    (["左", "右"], ["A. 左", "B. 右"]),
    # the letters are there: unchanged to the byte
    *((same, same) for same in (["A. left", "B. right"], ["A.  left ", "B.right"],
                                ["(A) l", "(B) r"], ["a) l", "b) r"], ["A、左", "B、右"],
                                ["A. left", "B. left"]))])
def test_options_have_letters_in_the_prompt_as_they_stand_or_given(tmp_path, options, shown):
    record, = load_records(write(tmp_path, RECORD | {"options": options}))
    assert record["options"] == shown
    text = build_messages(record)[0]["content"][1]["text"]
    assert "Options:\n" + "\n".join(shown) + "\n" in text


@pytest.mark.parametrize("options, reason", [
    (["1. left", "2. right"], "options begin with 1, 2, not with A, B, C, ... in order"),
    (["1) left", "2) right", "3) up"], "options begin with 1, 2, 3"),
    (["A. left", "A. right"], "options begin with A, A"), (["A. left", "C. right"], "with A, C"),
    (["B. left", "C. right", "D. up"], "with B, C, D"), (["A. left", "up", "B. right"], "A, B"),
    (["left", ""], "an option is empty"), (["A. left", "B."], "an option is empty"),
    (["A. left", "B.  "], "an option is empty"), (["left", "right", "left"], "options are equal"),
    (["left", 2], "must be a list of strings"), (["left", None], "must be a list of strings"),
    ({"A": "left", "B": "right"}, "must be a list of strings")])
def test_options_that_are_neither_lettered_nor_plain_are_refused(tmp_path, options, reason):
    with pytest.raises(InputError, match=r"record 0 \(problem_id 7\): field options.*" + reason):
        load_records(write(tmp_path, RECORD | {"options": options}))


@pytest.mark.parametrize("file", ["records/november.jsonl", "records/records.jsonl"])
def test_the_collected_cases_of_options_are_lettered_or_refused(tmp_path, file):
    cases = ROOT.parent / "shared" / "data" / "cases" / file
    if not cases.exists():
        pytest.skip(f"no {cases}")
    for case in map(json.loads, cases.read_text().splitlines()):
        options = case["record"]["options"]
        try:
            record, = load_records(write(tmp_path, case["record"]))
        except InputError:
            continue
        assert record["options"] in (options, [f"{'ABC'[i]}. {o}" for i, o in enumerate(options)],
                                     ["A. <| video_pad |>", "B. right"])


@pytest.mark.parametrize("fields, truth", [
    (CHOICE, "B"), (CHOICE, "right"), (CHOICE, "B. right"), ({"problem_type": "OCR"}, "?!"),
    ({"problem_type": "numerical"}, "-1,000.5"), ({"problem_type": "regression"}, "0"),
    ({"problem_type": "free-form"}, "狗"), ({"problem_type": "free-form"}, "a dog " * 40)])
def test_nothing_is_warned_of_a_solution_that_can_be_matched(tmp_path, capsys, fields, truth):
    load_records(write(tmp_path, RECORD | fields | {"solution": f"<answer>{truth}</answer>"}))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", ["", "[]", "[1]", "{", '{"a": 1}\n{', "[{}]"])
def test_a_file_without_records_is_an_input_error(tmp_path, text):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(InputError):
        load_records(path)
    with pytest.raises(InputError, match="absent.json"):
        load_records(tmp_path / "absent.json")


def test_the_released_evaluation_rows_load():
    data = ROOT.parent / "shared" / "data"
    if not data.exists():
        pytest.skip("the sample rows are not on this machine")
    for name in ("eval_mmvu_30.json", "eval_videommmu_30.json"):
        records = load_records(data / name)
        assert len(records) == 30 and all(build_messages(record) for record in records)


# -------------------------------------------------------------------------------- prompt

def test_the_prompt_is_the_released_one_to_the_letter():
    text = build_messages(RECORD | {"media_path": "/m/clip.mp4"})[0]["content"][1]["text"]
    assert text == (
        "What moves?Options:\nA. a cat\nB. a dog\n\nPlease think about this question as if you "
        "were a human pondering deeply. Engage in an internal dialogue using expressions such as "
        "'let me think', 'wait', 'Hmm', 'oh, I see', 'let's break it down', etc, or other natural "
        "language thought expressions It's encouraged to include self-reflection or verification "
        "in the reasoning process. Provide your detailed reasoning between the <think> </think> "
        "tags, and then give your final answer between the <answer> </answer> tags. Please provide "
        "only the single option letter (e.g., A, B, C, D, etc.) within the <answer> </answer> "
        "tags.")


@pytest.mark.parametrize("problem_type, ending", [
    ("numerical", " Please provide the numerical value (e.g., 42 or 3.14) within the <answer> "
                  "</answer> tags."),
    ("regression", " Please provide the numerical value (e.g., 42 or 3.14) within the <answer> "
                   "</answer> tags."),
    ("OCR", " Please transcribe text from the image/video clearly and provide your text answer "
            "within the <answer> </answer> tags."),
    ("free-form", " Please provide your text answer within the <answer> </answer> tags.")])
def test_other_problem_types_have_no_options_and_their_own_suffix(problem_type, ending):
    record = RECORD | {"problem_type": problem_type, "media_path": "/m/clip.mp4"}
    text = build_messages(record)[0]["content"][1]["text"]
    assert text.startswith("What moves?\nPlease think") and text.endswith(" tags." + ending)


def test_braces_in_a_question_are_text():
    record = RECORD | {"problem": "Is {x} in {0}?", "media_path": "/m/clip.mp4"}
    assert "Is {x} in {0}?" in build_messages(record)[0]["content"][1]["text"]


# --------------------------------------------------------------------------------- media

def test_frames_come_in_order_evenly_spread(tmp_path):
    vision = load_vision(record_of(clip(tmp_path / "a.mp4", count=8)), **LIMITS)
    levels = vision.frames.float().mean((1, 2, 3))
    assert vision.frames.shape == (8, 3, 28, 28)
    assert torch.allclose(levels, 20.0 * torch.arange(8), atol=4)


@pytest.mark.parametrize("count, fps, expected", [(40, 4, 8), (6, 2, 6), (5, 2, 4), (80, 2, 8)])
def test_frame_counts_respect_fps_and_bounds_and_are_even(tmp_path, count, fps, expected):
    vision = load_vision(record_of(clip(tmp_path / "a.mp4", count=count, fps=fps)), **LIMITS)
    assert len(vision.frames) == expected


@pytest.mark.parametrize("height, width", [(64, 96), (240, 320), (30, 400)])
def test_pixels_stay_within_their_bounds(tmp_path, height, width):
    limits = LIMITS | {"min_pixels": 4 * 784, "max_pixels": 16 * 784}
    frames = load_vision(record_of(clip(tmp_path / "a.mp4", 8, height, width)), **limits).frames
    assert frames.shape[2] % 28 == 0 == frames.shape[3] % 28
    assert 4 * 784 <= frames.shape[2] * frames.shape[3] <= 16 * 784


def broken_files(folder):
    clip(folder / "good.mp4")
    data = (folder / "good.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(data[:len(data) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a video")
    clip(folder / "one.mp4", count=1)
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    Image.new("RGB", (900, 3)).save(folder / "thin.png")
    return ["cut.mp4", "empty.mp4", "text.mp4", "one.mp4", "absent.mp4", "empty.png", "text.png",
            "thin.png", "absent.png"]


def test_a_broken_medium_is_a_media_error_that_names_file_and_reason(tmp_path):
    for name in broken_files(tmp_path):
        data_type = "image" if name.endswith("png") else "video"
        with pytest.raises(MediaError) as error:
            load_vision(record_of(tmp_path / name, data_type), **LIMITS)
        message = str(error.value)
        assert message.startswith(str(tmp_path / name) + ": ") and "\n" not in message
        assert "read_video" not in message and len(message) > len(str(tmp_path / name)) + 5


def test_a_link_out_of_media_root_is_refused(tmp_path):
    (tmp_path / "root").mkdir()
    clip(tmp_path / "outside.mp4")
    os.symlink(tmp_path / "outside.mp4", tmp_path / "root" / "link.mp4")
    with pytest.raises(MediaError, match="media_root"):
        load_vision(record_of(tmp_path / "root" / "link.mp4"), **LIMITS)


def test_a_path_with_spaces_and_other_letters_is_read(tmp_path):
    vision = load_vision(record_of(clip(tmp_path / "ein schöner 视频.mp4")), **LIMITS)
    assert len(vision.frames) == 8


# -------------------------------------------------------------------------------- inputs

def test_inputs_carry_the_real_timing(tmp_path, processor):
    """Half the frame rate doubles the time between grid steps: it reaches the model."""
    for fps, seconds in ((2, 1.0), (1, 2.0)):
        record = record_of(clip(tmp_path / f"{fps}.mp4", count=8, fps=fps))
        inputs = encode(processor, record, load_vision(record, **LIMITS | {"fps": fps}))
        assert inputs["second_per_grid_ts"].tolist() == [seconds]


def test_visual_tokens_are_marked_and_counted(samples, processor):
    for medium, token, kind in (("video", "<|video_pad|>", 2), ("image", "<|image_pad|>", 1)):
        inputs = samples[medium][1]
        pads = inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids(token)
        assert torch.equal(pads, inputs["mm_token_type_ids"] == kind)
        assert pads.sum() == inputs[f"{medium}_grid_thw"].prod() // 4


def test_pixel_values_are_the_frames_normalised_and_nothing_else(tmp_path, processor):
    record = record_of(clip(tmp_path / "a.mp4"))
    vision = load_vision(record, **LIMITS)
    pixels = encode(processor, record, vision)["pixel_values_videos"]  # (16, 3 x 2 x 14 x 14)
    mean = torch.tensor(processor.video_processor.image_mean)
    std = torch.tensor(processor.video_processor.image_std)
    normal = (vision.frames / 255 - mean[:, None, None]) / std[:, None, None]  # (T, C, H, W)
    first = pixels[0].view(3, 2, 14, 14)  # the upper left patch of the first two frames
    assert torch.allclose(first, normal[:2, :, :14, :14].transpose(0, 1), atol=1e-5)


def test_an_image_as_a_video_of_one_step_is_the_same_to_the_model(model, processor, samples):
    inputs = samples["image"][1]
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits,
                           model(**build_data.image_as_video(processor, inputs)).logits)


def test_padding_does_not_change_a_record_s_logits(model, processor, samples):
    pads = {"input_ids": processor.tokenizer.pad_token_id, "attention_mask": 0,
            "mm_token_type_ids": 0}
    pair = [samples["video"][1], samples["image"][1]]
    with torch.no_grad():
        batch = model(**pad_batch(pair, pads, "left")).logits
        for row, inputs in zip(batch, pair):
            alone = model(**inputs).logits[0]
            assert torch.allclose(row[-len(alone):], alone, atol=1e-5)


# ----------------------------------------------------------------------------------- toy

def test_the_toy_repeats_for_a_seed_and_differs_for_another(tmp_path):
    sizes = ["--cot", "12", "--train", "4", "--test", "4"]
    run("build_data.py", "toy", "--out", tmp_path / "a", *sizes, "--seed", 3)
    for name, seed in (("b", "3"), ("c", "4")):
        args = build_data.parse_args(["toy", "--out", str(tmp_path / name), *sizes, "--seed", seed])
        args.run(args)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*")
             if path.suffix in (".mp4", ".png", ".json", ".safetensors")]
    assert len(files) > 25
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", files, shallow=False)[1:] == ([], [])
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "c", files, shallow=False)[1]


def test_the_toy_holds_every_problem_type_and_both_media(toy):
    records = [record for split in ("cot", "train", "test")
               for record in load_records(toy / f"{split}.json")]
    assert {record["problem_type"] for record in records} == set(GRADERS)
    assert {record["data_type"] for record in records} == {"image", "video"}
    sources = {record["data_source"] for record in load_records(toy / "cot.json")}
    assert "toy/direction_conflict" not in sources  # the shortcut always works in the cold start


def test_whoever_may_read_the_toy_may_read_its_model(toy):
    assert len({(toy / name).stat().st_mode for name in (
        "train.json", "model/config.json", "model/model.safetensors")}) == 1


def test_the_toy_is_never_written_over(toy):
    result = run("build_data.py", "toy", "--out", toy, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "not empty" in result.stderr


def test_toy_clips_show_what_their_records_say(toy):
    """The answer is recomputed from the decoded pixels: where the block is in each frame."""
    checked = 0
    for record in load_records(toy / "train.json"):
        if not record["data_source"].startswith("toy/direction"):
            continue
        frames = load_vision(record, **LIMITS).frames.float()  # (T, C, H, W)
        bright = frames.amax(1) - frames.amin(1) > 100  # (T, H, W): the block is colourful
        x = [mask.nonzero()[:, 1].float().mean() for mask in bright]
        moved = "right" if x[-1] > x[0] + 8 else "left" if x[-1] < x[0] - 8 else "nowhere"
        letter = record["solution"].removeprefix("<answer>")[0]
        assert f"{letter}. {moved}" in record["options"]
        checked += 1
    assert checked > 5


def test_what_every_prompt_of_the_toy_says_is_read_as_it_stands_in_few_tokens(toy, processor):
    for record in load_records(toy / "test.json"):
        text = build_messages(record)[0]["content"][1]["text"]
        ids = processor.tokenizer(text).input_ids
        assert processor.tokenizer.decode(ids) == text
        assert len(ids) <= 32  # as words it is more than 100


def test_the_args_files_of_the_toy_are_read_by_their_scripts(toy):
    """One `--flag=value` a line, whatever the comments between them."""
    names = {path.name for path in toy.glob("*.args")}
    assert names == {"sft.args", "tgrpo.args", "annotate.args", "evaluate.args"}
    for name in names:
        lines = (toy / name).read_text().splitlines()
        assert all(re.fullmatch(r"#.*|--\w+=\S+|", line) for line in lines)
    assert "--chunk_size=8" in (toy / "tgrpo.args").read_text().splitlines()


# -------------------------------------------------------------------- flags and start-up

def flags(*argv):
    """A parser's namespace, with the media flags and two of its own."""
    parser = FlagParser(prog="script.py", description="A script.")
    add_media_flags(parser.add_argument)
    parser.add_argument("--share", type=at_least(0, float, below=1), default=0.5, help="a share")
    parser.add_argument("--rate", type=above(0, float, most=2), help="a rate")
    parser.add_argument("--fast", action="store_true", help="be fast")
    return parser.parse_args(list(map(str, argv)))


def test_flags_come_from_a_file_with_comments_too_and_later_ones_win(tmp_path):
    path = tmp_path / "a.args"
    path.write_text("# a comment\n\n  --max_frames=32\n--media_root=a folder\n\t# more\n--fast\n")
    args = flags(f"@{path}")
    assert (args.max_frames, args.media_root, args.fast, args.share) == (32, "a folder", True, 0.5)
    assert flags(f"@{path}", "--max_frames", 64).max_frames == 64


@pytest.mark.parametrize("argv, words", [
    (["--max_frames", "x"], "argument --max_frames: invalid int value: 'x'"),
    (["--max_frames", "2.5"], "argument --max_frames: invalid int value: '2.5'"),
    (["--max_frames", "0"], "argument --max_frames: 0 must be above 0"),
    (["--fps", "nan"], "argument --fps: nan must be above 0"),
    (["--rate", "2.1"], "argument --rate: 2.1 must be above 0 and at most 2"),
    (["--rate", "nan"], "argument --rate: nan must be above 0 and at most 2"),
    (["--num_workers", "-1"], "argument --num_workers: -1 must be at least 0"),
    (["--share", "1"], "argument --share: 1 must be at least 0 and below 1"),
    (["--share", "nan"], "argument --share: nan must be at least 0 and below 1"),
    (["--min_frames", "32"], "--min_frames 32 is above --max_frames 16"),
    (["--max_pixels", "128"], "128 must be at least 784: 128 visual tokens are 128 * 28 * 28 pix"),
    (["--max_pixels", "784"], "--min_pixels 3136 is above --max_pixels 784"),
    (["--image_max_pixels", "784"], "--image_min_pixels 3136 is above --image_max_pixels 784"),
    (["--unknown"], "unrecognized arguments: --unknown"),
    (["@absent.args"], "No such file or directory: 'absent.args'")])
def test_a_wrong_flag_is_one_line_that_says_what_is_wrong(capsys, argv, words):
    with pytest.raises(SystemExit) as end:
        flags(*argv)
    text = capsys.readouterr().err
    assert end.value.code == 2 and text.startswith("script.py: ") and words in text
    assert text.endswith("(--help lists the flags)\n") and text.count("\n") == 1


def test_a_value_at_its_bound_is_taken():
    args = flags("--rate", 2, "--share", 0, "--num_workers", 0, "--min_frames", 16)
    assert (args.rate, args.share, args.num_workers, args.min_frames) == (2, 0, 0, 16)


def test_help_shows_the_defaults_that_are_values(capsys):
    with pytest.raises(SystemExit) as end:
        flags("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "a share (default: 0.5)" in text
    assert "be fast" in text and "default: None" not in text and "default: False" not in text


def test_a_command_s_flags_are_checked_and_shown_in_the_same_way(capsys):
    for argv, words in ((["toy", "--cot", "-1"], " toy: argument --cot: -1 must be at least 0"),
                        (["mix", "--out", "a"], "mix: the following arguments are required"),
                        (["check", "--data", "a", "--min_frames", "99"], "is above --max_frames")):
        with pytest.raises(SystemExit):
            build_data.parse_args(argv)
        text = capsys.readouterr().err
        assert words in text and text.count("\n") == 1


SCRIPT = """
import errno, os, signal, sys, time, warnings
import torch
from build_data import InputError, run_script
warnings.simplefilter("ignore")  # fewer processors than workers

class Records(torch.utils.data.Dataset):
    def __len__(self):
        return 9

    def __getitem__(self, i):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if i > 1:
            time.sleep(1000)
        return i

def main(fault):
    loader = iter(torch.utils.data.DataLoader(Records(), num_workers=3, prefetch_factor=1))
    next(loader)
    print("at work")
    if sys.argv[1] == "unread":
        os.close(sys.stdout.fileno())
    raise fault

faults = {"input": InputError("no such model"), "unread": InputError("no such model"),
          "full": OSError(errno.ENOSPC, "No space left on device"), "bug": KeyError("typo"),
          "file": OSError("not full"), "interrupt": KeyboardInterrupt()}
run_script(main, lambda: faults[sys.argv[1]])
"""


@pytest.mark.parametrize("fault, words", [
    ("input", "script.py: no such model"), ("interrupt", "script.py: interrupted"),
    ("full", "script.py: [Errno 28] No space left on device: make room and repeat the command "
             "(training: with --resume)"),
    ("bug", "KeyError: 'typo'"), ("file", "OSError: not full")])
def test_a_fault_ends_the_script_at_once_although_a_worker_ignores_its_signal(
        tmp_path, fault, words):
    """The worker sleeps for 1000 seconds; what was printed before is not lost."""
    (tmp_path / "script.py").write_text(SCRIPT)
    result = run(tmp_path / "script.py", fault, env={"PYTHONPATH": str(ROOT)}, check=False,
                 timeout=60)
    assert result.returncode == 1 and result.stdout == "at work\n"
    first, *others = result.stderr.splitlines()
    if words.startswith("script.py"):  # a sentence for the user; anything else with its traceback
        assert first == words and not others
    else:
        assert first == "Traceback (most recent call last):" and others[-1] == words


def test_a_fault_ends_the_script_where_nobody_reads_its_output_too(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    result = run(tmp_path / "script.py", "unread", env={"PYTHONPATH": str(ROOT)}, check=False,
                 timeout=60)
    assert (result.returncode, result.stderr) == (1, "script.py: no such model\n")


def test_importing_a_script_does_nothing(tmp_path):
    for script in ("build_data", "rewards", "annotate", "sft", "tgrpo", "evaluate"):
        shutil.copy(ROOT / f"{script}.py", tmp_path)
    shutil.copytree(ROOT / "assets", tmp_path / "assets")
    before = sorted(os.listdir(tmp_path))
    code = "import sys; sys.dont_write_bytecode = True; import annotate, sft, tgrpo, evaluate"
    run("-c", f"import os; os.chdir({str(tmp_path)!r}); {code}")
    assert sorted(os.listdir(tmp_path)) == before
