"""Records, prompt, inputs and files; the toy; flags and start-up of the scripts."""
import doctest
import errno
import filecmp
import json

import pytest
import torch

import annotate
import build_data
import evaluate
import rewards
from build_data import (FlagParser, InputError, above, add_media_flags, at_least, build_messages,
                        encode, load_records, load_vision)
from conftest import LIMITS, ROOT, ramp, run

RECORD = {"problem_id": 7, "problem": "What moves?", "data_type": "video",
          "problem_type": "multiple choice", "options": ["A. a cat", "B. a dog"],
          "solution": "<answer>B</answer>", "path": "./clip.mp4", "data_source": "x"}


def write(folder, *records):
    path = folder / "data.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def clip(path, fps=2):
    build_data.write_video(path, ramp(), fps)
    return path


# ------------------------------------------------------------------------------- records

@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])  # editors on Windows write a mark
def test_json_and_jsonl_hold_the_same_records_with_a_byte_order_mark_or_without(
        tmp_path, encoding):
    records, lines = [RECORD, RECORD | {"problem_id": 8}], tmp_path / "data.jsonl"
    lines.write_text("\n\n".join(map(json.dumps, records)) + "\n", encoding)
    (tmp_path / "data.json").write_text(json.dumps(records), encoding)
    assert load_records(tmp_path / "data.json") == load_records(lines)
    assert load_records(lines)[0]["media_path"] == str(tmp_path / "clip.mp4")


@pytest.mark.parametrize("field, values", [
    ("problem", (None, 0, "What \ud83d?")), ("problem_type", ("essay",)), ("data_type", ("audio",)),
    ("options", ([], None, "A", ["A. a", "B. \ud83d"])), ("video_start", ("0:12",)),
    ("path", (3, "../clip.mp4", "/etc/passwd", "a\0.mp4")), ("process", (["a"], "\ud83d")),
    ("groups", ("motion", ["motion"], None, {"level": 3})),
    ("solution", ("B", "<answer> </answer>", "<answer>B</answer> it is",
                  "<answer>A</answer> or <answer>B</answer>", "<answer>B</answer></answer>",
                  "<answer>use an <answer> tag</answer>"))])
def test_a_bad_record_is_named_by_file_problem_id_and_field(tmp_path, field, values):
    for value in values:
        path = write(tmp_path, RECORD, RECORD | {"problem_id": 41, field: value})
        with pytest.raises(InputError) as error:
            load_records(path)
        assert all(word in str(error.value) for word in (str(path), "41", f"field {field}")), value


def test_groups_and_a_process_are_read_as_they_are(tmp_path):
    more = {"groups": {"motion": "left", "level": "3"}, "process": "<think>it moves</think>"}
    record, = load_records(write(tmp_path, RECORD | more))
    assert {key: record[key] for key in more} == more
    assert load_records(write(tmp_path, RECORD | {"groups": {}, "process": None}))


def test_a_special_token_in_a_text_is_text_to_the_model(tmp_path, processor):
    clip(tmp_path / "clip.mp4")
    text = " ".join(processor.tokenizer.all_special_tokens)
    fields = {"problem": text, "options": [f"A. {text}", "B. c"], "process": text,
              "solution": f"<answer>{text}</answer>"}
    plain, record = load_records(write(tmp_path, RECORD, RECORD | fields))
    vision, ids = load_vision(plain, **LIMITS), processor.tokenizer.all_special_ids
    plain, with_tokens = (encode(processor, each, vision)["input_ids"] for each in (plain, record))
    assert [(plain == i).sum() for i in ids] == [(with_tokens == i).sum() for i in ids]
    target = f"{record['process']} {record['solution']}"  # what the cold start teaches
    assert not set(processor.tokenizer(target).input_ids) & set(ids)
    assert record["problem"] == text.replace("<|", "<| ").replace("|>", " |>")


CHOICE = {"problem_type": "multiple choice", "options": ["A. left", "B. right"]}


@pytest.mark.parametrize("fields, truth", [
    *((CHOICE, truth) for truth in ("C", "A, B", "up")),
    *(({"problem_type": "numerical"}, truth) for truth in ("00:12", "3 or 4", "many " * 40)),
    ({"problem_type": "regression"}, "far"), ({"problem_type": "free-form"}, "?!")])
def test_a_solution_that_no_answer_can_match_is_warned_of_once(
        tmp_path, capsys, monkeypatch, fields, truth):
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
    ([" up ", "down"], ["A. up", "B. down"]), (["3. Liga", "Cup"], ["A. 3. Liga", "B. Cup"]),
    # the letters are there: unchanged to the byte
    *((same, same) for same in (["A.  left ", "B.right"], ["(A) l", "(B) r"], ["a) l", "b) r"],
                                ["A、左", "B、右"], ["A. left", "B. left"]))])
def test_options_have_letters_in_the_prompt_as_they_stand_or_given(tmp_path, options, shown):
    record, = load_records(write(tmp_path, RECORD | {"options": options}))
    assert record["options"] == shown
    text = build_messages(record)[0]["content"][1]["text"]
    assert "Options:\n" + "\n".join(shown) + "\n" in text


@pytest.mark.parametrize("options, reason", [
    (["1. left", "2. right"], "options begin with 1, 2, not with A, B, C, ... in order"),
    (["A. left", "A. right"], "options begin with A, A"), (["B. left", "C. right"], "with B, C"),
    (["A. left", "up", "B. right"], "A, B"), (["left", "right", "left"], "options are equal"),
    (["left", ""], "an option is empty"), (["A. left", "B.  "], "an option is empty"),
    (["left", 2], "must be a list of strings"),
    ({"A": "left", "B": "right"}, "must be a list of strings")])
def test_options_that_are_neither_lettered_nor_plain_are_refused(tmp_path, options, reason):
    with pytest.raises(InputError, match=r"record 0 \(problem_id 7\): field options.*" + reason):
        load_records(write(tmp_path, RECORD | {"options": options}))


@pytest.mark.parametrize("text", ["", "[]", "[1]", "{", '{"a": 1}\n{', "[{}]"])
def test_a_file_without_records_is_an_input_error(tmp_path, text):
    (tmp_path / "data.json").write_text(text)
    for name in ("data", "absent"):
        with pytest.raises(InputError, match=f"{name}.json"):
            load_records(tmp_path / f"{name}.json")


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


@pytest.mark.parametrize("problem_type, words", [
    ("numerical", "provide the numerical value (e.g., 42 or 3.14)"),
    ("regression", "provide the numerical value (e.g., 42 or 3.14)"),
    ("OCR", "transcribe text from the image/video clearly and provide your text answer"),
    ("free-form", "provide your text answer")])
def test_other_problem_types_have_no_options_and_their_own_suffix(problem_type, words):
    record = RECORD | {"problem": "What is {x} in {0}?", "problem_type": problem_type,
                       "media_path": "/m/clip.mp4"}  # braces are text
    text = build_messages(record)[0]["content"][1]["text"]
    assert text.startswith("What is {x} in {0}?\nPlease think")
    assert text.endswith(f" tags. Please {words} within the <answer> </answer> tags.")


# --------------------------------------------------------------------------------- files

class FullDisk:
    """A file on a disk that has nine bytes left."""

    def __init__(self, file):
        self.file, self.name, self.truncate, self.left = file, file.name, file.truncate, 9

    def write(self, data):
        if not self.left:
            raise OSError(errno.ENOSPC, "No space left on device")
        written, self.left = self.file.write(data[:self.left]), 0
        return written


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_full_disk_keeps_whole_rows_and_is_one_clear_sentence(tmp_path, monkeypatch, at):
    """The configuration is the first row."""
    append, calls, path = build_data.append_rows, [], tmp_path / "rows.jsonl"

    def full(file, rows):
        calls.append(rows)
        append(FullDisk(file) if len(calls) > at else file, rows)
    monkeypatch.setattr(build_data, "append_rows", full)
    with pytest.raises(InputError, match="^cannot write .*rows.jsonl: No space left on device. "
                       "The rows in it are whole: make room and repeat the command$"):
        with build_data.row_writer(path, 3, {"seed": 0}) as write_rows:
            for number in range(3):
                write_rows([{"problem_id": number}])
    rows = [{"seed": 0}, {"problem_id": 0}, {"problem_id": 1}]
    assert build_data.whole_rows(path) == list(map(json.loads, path.read_text().splitlines())) \
        == rows[:at]


# -------------------------------------------------------------------------------- inputs

def test_inputs_carry_the_real_timing(tmp_path, processor):
    """Half the frame rate doubles the time between grid steps: it reaches the model."""
    for fps, seconds in ((2, 1.0), (1, 2.0)):
        clip(tmp_path / "clip.mp4", fps)
        record, = load_records(write(tmp_path, RECORD))
        inputs = encode(processor, record, load_vision(record, **LIMITS | {"fps": fps}))
        assert inputs["second_per_grid_ts"].tolist() == [seconds]


def test_pixel_values_are_the_frames_normalised_and_nothing_else(samples, processor):
    record, inputs = samples["video"]
    vision = load_vision(record, **LIMITS)
    mean = torch.tensor(processor.video_processor.image_mean)
    std = torch.tensor(processor.video_processor.image_std)
    normal = (vision.frames / 255 - mean[:, None, None]) / std[:, None, None]  # (T, C, H, W)
    # the upper left patch of the first two frames
    first = inputs["pixel_values_videos"][0].view(3, 2, 14, 14)
    assert torch.allclose(first, normal[:2, :, :14, :14].transpose(0, 1), atol=1e-5)


# ----------------------------------------------------------------------------------- toy

def test_the_toy_repeats_for_a_seed_and_differs_for_another(tmp_path):
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        args = build_data.parse_args(["toy", "--out", str(tmp_path / name), "--cot", "12",
                                      "--train", "4", "--test", "4", "--seed", seed])
        args.run(args)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*")
             if path.suffix in (".mp4", ".png", ".json", ".safetensors")]
    assert len(files) > 25
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", files, shallow=False)[1:] == ([], [])
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "c", files, shallow=False)[1]


def test_the_toy_holds_every_problem_type_and_both_media(toy):
    records = [record for split in ("cot", "train", "test")
               for record in load_records(toy / f"{split}.json")]
    assert {record["problem_type"] for record in records} == set(rewards.GRADERS)
    assert {record["data_type"] for record in records} == {"image", "video"}
    sources = {record["data_source"] for record in load_records(toy / "cot.json")}
    assert "toy/direction_conflict" not in sources  # the shortcut always works in the cold start


def test_the_toy_is_never_written_over(toy):
    with pytest.raises(InputError, match="not empty"):
        build_data.build_toy(build_data.parse_args(["toy", "--out", str(toy)]))


def test_toy_clips_show_what_their_records_say(toy):
    """The answer is recomputed from the decoded pixels: where the block is in each frame."""
    records = [record for record in load_records(toy / "train.json")
               if record["data_source"].startswith("toy/direction")]
    assert len(records) > 5
    for record in records:
        frames = load_vision(record, **LIMITS).frames.float()  # (T, C, H, W)
        bright = frames.amax(1) - frames.amin(1) > 100  # (T, H, W): the block is colourful
        x = [mask.nonzero()[:, 1].float().mean() for mask in bright]
        moved = "right" if x[-1] > x[0] + 8 else "left" if x[-1] < x[0] - 8 else "nowhere"
        letter = record["solution"].removeprefix("<answer>")[0]
        assert f"{letter}. {moved}" in record["options"]


def test_what_every_prompt_of_the_toy_says_is_read_as_it_stands_in_few_tokens(toy, processor):
    for record in load_records(toy / "test.json"):
        text = build_messages(record)[0]["content"][1]["text"]
        ids = processor.tokenizer(text).input_ids
        assert processor.tokenizer.decode(ids) == text
        assert len(ids) <= 32  # as words it is more than 100


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


def test_help_shows_the_defaults_that_are_values(capsys):
    with pytest.raises(SystemExit) as end:
        flags("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "a share (default: 0.5)" in text
    assert "be fast" in text and "default: None" not in text and "default: False" not in text


# The flags that stand before those of each row below
GIVEN = {"check": "--data a.json", "mix": "--out b.json", "toy": "--out toy",
         "annotate": "--model m --data d --out o.json", "evaluate": "--model m --output o"}
OUT_OF_BOUNDS = {
    "toy": ["--cot -1"], "mix": ["--val_share nan"],
    "check": ["--fps nan", "--num_workers -1", "--max_pixels 0"],
    "annotate": ["--temperature -1", "--top_p 0", "--top_p nan", "--samples 0", "--api_retries -1",
                 "--limit 0", "--concurrency 0"],
    "evaluate": ["--batch_size 0", "--frames 0", "--limit 0"]}
REFUSED = [
    *((script, more, f"argument {more.replace(' ', ': ')} must be ")
      for script, values in OUT_OF_BOUNDS.items() for more in values),
    ("mix", "", "arguments are required: --recipe"),
    ("mix", "--val_share 1.0", "--val_share: 1.0 must be at least 0 and below 1"),
    ("check", "--max_frames 0", "--max_frames: 0 must be above 0"),
    ("check", "--unknown", "unrecognized arguments: --unknown"),
    ("check", "@absent.args", "No such file or directory: 'absent.args'"),
    ("check", "--max_frames 2.5", "argument --max_frames: invalid int value: '2.5'"),
    ("check", "--min_frames 99", "--min_frames 99 is above --max_frames 16"),
    *(("check", f"--{kind}max_pixels 128", f"--{kind}min_pixels 3136 is above --{kind}max_pixels "
       "128; 128 visual tokens are 128 * 28 * 28 pixels") for kind in ("", "image_")),
    ("annotate", "--top_p 1.5", "--top_p: 1.5 must be above 0 and at most 1"),
    ("annotate", "--api_base host:8000", "must be a URL that begins with http://"),
    ("annotate", "--api_body seed", "seed is not a JSON object: Expecting value"),
    ("annotate", '--api_body {"top_p":NaN}', "is not a JSON object: Out of range"),
    ("annotate", "--api_body [1]", "[1] is not a JSON object"),
    ("annotate", '--api_body {"model":"x","stream":true,"messages":[]}',
     "must not have messages or model or stream"),
    ("annotate", "--samples 2 --temperature 0", "--samples 2 at --temperature 0 are all the same"),
    *((script, "--out a.jsonl", "--out: a.jsonl must be a name that ends in .json")
      for script in ("mix", "check", "annotate")),
    ("evaluate", "", "one of the arguments --benchmark --judge --diff is required"),
    ("evaluate", "--benchmark test.json", "--benchmark: test.json is not NAME=FILE"),
    ("evaluate", "--benchmark a/b=test.json", "a/b=test.json is not NAME=FILE"),
    ("evaluate", "--benchmark a=b --frames 16 2", "--frames 2 is below --min_frames 4"),
    ("evaluate", "--benchmark a=b --output=", "--model and --output are needed"),
    ("evaluate", "--benchmark a=b --judge c.json", "not allowed with argument --benchmark")]


@pytest.mark.parametrize("script, more, words", REFUSED)
def test_a_value_that_a_flag_cannot_have_is_one_line_before_anything_is_read(
        capsys, script, more, words):
    argv = f"{GIVEN[script]} {more}".split()
    parsers = {"annotate": annotate.parse_args, "evaluate": evaluate.parse_args}
    with pytest.raises(SystemExit) as end:
        parsers[script](argv) if script in parsers else build_data.parse_args([script, *argv])
    text = capsys.readouterr().err
    assert end.value.code == 2 and words in text
    assert text.endswith("(--help lists the flags)\n") and text.count("\n") == 1


SCRIPT = """
import errno, os, signal, sys, time, warnings
import torch
from build_data import InputError, run_script
warnings.simplefilter("ignore")  # fewer processors than workers

def read(i):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if i > 1:
        time.sleep(1000)
    return i

def main(fault):
    loader = iter(torch.utils.data.DataLoader(range(9), batch_size=None, collate_fn=read,
                                              num_workers=3, prefetch_factor=1))
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
    ("input", "script.py: no such model"), ("unread", "script.py: no such model"),
    ("interrupt", "script.py: interrupted"),
    ("full", "script.py: [Errno 28] No space left on device: make room and repeat the command "
             "(training: with --resume)"),
    ("bug", "KeyError: 'typo'"), ("file", "OSError: not full")])
def test_a_fault_ends_the_script_at_once_although_a_worker_ignores_its_signal(
        tmp_path, fault, words):
    """The worker sleeps for 1000 seconds; what was printed before is not lost, and it does not
    matter whether anybody reads it."""
    (tmp_path / "script.py").write_text(SCRIPT)
    result = run(tmp_path / "script.py", fault, env={"PYTHONPATH": str(ROOT)}, check=False,
                 timeout=60)
    assert result.returncode == 1 and result.stdout == "at work\n"
    first, *others = result.stderr.splitlines()
    if words.startswith("script.py"):  # a sentence for the user; anything else with its traceback
        assert first == words and not others
    else:
        assert first == "Traceback (most recent call last):" and others[-1] == words


@pytest.mark.parametrize("script", [annotate, build_data, evaluate, rewards])
def test_worked_examples_in_the_docstrings_hold(script):
    assert doctest.testmod(script).failed == 0
