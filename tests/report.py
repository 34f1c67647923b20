"""A T-GRPO run at work, as one page that needs no network: questions with their frames in both
orders, every response of both groups and what it earned, at an early and a late step.

    python tests/report.py toy/tgrpo            # writes toy/tgrpo/report.html

What the page looks like is assets/report.html; here its data is gathered and put into it, as JSON.
"""
import argparse
import base64
import hashlib
import json
import sys
from collections import defaultdict
from itertools import zip_longest
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from annotate import data_url  # noqa: E402
from build_data import (FlagParser, InputError, MediaError, above, load_records,  # noqa: E402
                        load_vision_of, make_folder_of, run_script, whole_lines, write_whole)
from rewards import accuracy_reward, extract_answer, format_reward  # noqa: E402

REPORTED = 8  # questions of a page
FRAME_SIDE, IMAGE_SIDE = 128, 384  # pixels of the longer side, at most
TINY = 64  # pixels of a side up to which a picture is a PNG, which the page enlarges to squares
PARTS = ("accuracy", "format", "temporal", "length", "R", "A")  # of a response in rollouts.jsonl
FRAME_FLAGS = ("max_frames", "min_frames", "fps", "min_pixels", "max_pixels", "image_min_pixels",
               "image_max_pixels")  # what the run saw of a medium
REWARD_FLAGS = ("correct_threshold", "alpha", "temporal_test", "temporal_to", "omega", "l_min",
                "l_max", "scale_advantages")  # what its rewards depend on


def parse_args(argv=None):
    parser = FlagParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("run", help="--output of a tgrpo.py run")
    add("--data", help="the run's records; default: where the run read them")
    add("--media_root", help="folder that the records' paths are relative to; default: the data's")
    add("--output", help="folder to write report.html to; default: the run's")
    add("--decode_timeout", type=above(0, float), default=120,
        help="seconds until a medium is given up")
    return parser.parse_args(argv)


def read_rollouts(path):
    """{(problem_id as text, path): its rows, the earliest step first} of a rollouts.jsonl."""
    rollouts = defaultdict(list)
    for number, line in enumerate(whole_lines(path).splitlines(), 1):
        try:
            row = json.loads(line)
            rollouts[str(row["problem_id"]), row["path"]].append(checked_row(row))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}, line {number}, is damaged: {error!r}") from None
    if not rollouts:
        raise InputError(f"{path} has no rollouts: give the --output of a tgrpo.py run, "
                         "which writes them every --rollout_steps steps")
    return {key: sorted(rows, key=lambda row: row["step"]) for key, rows in rollouts.items()}


def checked_row(row):
    """What the page shows of a row: {"step", "frame_order", "first": [{"text", "earned": {part:
    number}}], "second": [{"text"}], "p", and, with a second group, "p_tilde" and "r_t"}."""
    json.dumps(row, allow_nan=False)  # a page's JSON knows no NaN
    first, second = row["responses"], row["responses_shuffled"]
    if not all(isinstance(text, str) for text in first + second):
        raise ValueError("a response is not a text")
    parts = [part for part in PARTS if second or part != "temporal"]
    columns = [map(float, row[part]) for part in parts]
    shares = ("p", "p_tilde", "r_t") if second else ("p",)
    return {"step": int(row["step"]),
            "frame_order": [int(place) for place in row["frame_order"] or ()],
            "first": [{"text": text, "earned": dict(zip(parts, values))}
                      for text, *values in zip(first, *columns, strict=True)],
            "second": [{"text": text} for text in second],
            **{name: float(row[name]) for name in shares}}


def read_run(path):
    """The flags of a tgrpo.py run, from the first line of its metrics.jsonl."""
    try:
        flags = json.loads(whole_lines(path).partition(b"\n")[0])["arguments"]
        if missing := [flag for flag in ("data", "media_root", *FRAME_FLAGS) if flag not in flags]:
            raise ValueError(f"without {', '.join(missing)}")
        return flags
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} does not begin with the flags of a run: {error}") from None


def pick_questions(rollouts, records):
    """Up to REPORTED (record, its rows of the earliest and, if it is another, the latest step).

    Kinds of question, video or image by problem type, take turns. In each, those logged at two
    steps come first, then those with advantages, then those whose steps lie furthest apart.
    """
    kinds = defaultdict(list)
    for key, rows in rollouts.items():
        if record := records.get(key):
            span = rows[-1]["step"] - rows[0]["step"]
            shown = [rows[0], rows[-1]] if span else rows[:1]
            dull = not any(response["earned"]["A"] for row in shown for response in row["first"])
            kinds[record["data_type"], record["problem_type"]].append(
                ((span == 0, dull, -span), record, shown))
    queues = [sorted(kinds[kind], key=lambda question: question[0])
              for kind in sorted(kinds, reverse=True)]  # videos first
    found = [question for turn in zip_longest(*queues) for question in turn if question]
    return [question[1:] for question in found[:REPORTED]]


def pictures(record, orders, flags):
    """A medium's frames, or its image, as the run saw them, made smaller: data: URLs.
    MediaError where `orders`, the run's, are of another number of frames."""
    vision = load_vision_of(record, argparse.Namespace(**flags))
    images, side = [vision.image], IMAGE_SIDE
    if vision.frames is not None:
        frames = vision.frames.permute(0, 2, 3, 1).numpy()  # (T, H, W, C)
        images, side = [Image.fromarray(frame) for frame in frames], FRAME_SIDE
    if any(sorted(order) != [*range(len(images))] for order in orders if order):
        raise MediaError(f"{record['path']} has {len(images)} frames, not those of the run")
    for image in images:
        image.thumbnail((side, side))
    return [data_url("image/png" if max(image.size) <= TINY else "image/jpeg", image)
            for image in images]


def question_data(record, rows, flags):
    """A question as the page gets it, with its rows. The second group's responses are graded
    again: a run logs only their share of correct ones."""
    for response in [response for row in rows for response in row["second"]]:
        response["earned"] = {"accuracy": accuracy_reward(response["text"], record),
                              "format": format_reward(response["text"])}
    question = {
        "problem": record["problem"], "answer": extract_answer(record["solution"]),
        "options": record["options"] if record["problem_type"] == "multiple choice" else [],
        "source": f"{record['problem_type']}, problem_id {record['problem_id']}, {record['path']}",
        "medium": record["data_type"], "steps": rows}
    try:
        question["pictures"] = pictures(record, [row["frame_order"] for row in rows], flags)
    except MediaError as error:
        question["fault"] = str(error)
    return question


def fill(page, data):
    """The page with the data as its JSON island, and a policy that allows its style and script."""
    for name in ("style", "script"):
        content = page.partition(f"<{name}>")[2].partition(f"</{name}>")[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        page = page.replace(f"{{{name}_hash}}", digest)
    # ASCII without a "<": no text can end the island, or be one that no file can hold
    return page.replace("{run}", json.dumps(data, allow_nan=False).replace("<", "\\u003c"))


def main(args):
    """Writes report.html of a run, into the run's folder or --output."""
    folder = Path(args.run)
    rollouts, flags = read_rollouts(folder / "rollouts.jsonl"), read_run(folder / "metrics.jsonl")
    root = args.media_root or (None if args.data else flags["media_root"])
    records = {(str(record["problem_id"]), record["path"]): record
               for record in load_records(args.data or flags["data"], root)}
    chosen = pick_questions(rollouts, records)
    if not chosen:
        raise InputError(f"{args.data or flags['data']} has no question of "
                         f"{folder}/rollouts.jsonl; name the run's records with --data")
    path = Path(args.output or folder, "report.html")
    make_folder_of(path)
    flags = flags | {"decode_timeout": args.decode_timeout}
    page = fill((ROOT / "assets/report.html").read_text(encoding="utf-8"), {
        "folder": str(folder), "logged": len(rollouts),
        "flags": {flag: str(flags[flag]) for flag in FRAME_FLAGS + REWARD_FLAGS if flag in flags},
        "questions": [question_data(record, rows, flags) for record, rows in chosen]})
    write_whole({path: [page]})
    print(f"{path}: {len(chosen)} questions, {len(page) / 1e6:.1f} MB")


if __name__ == "__main__":
    run_script(main, parse_args)
