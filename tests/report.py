"""A T-GRPO run as one page that needs no network: its curves, then questions at work.

A question has its frames in both orders, and every response of both groups with what it earned,
at an early and a late step.

    python tests/report.py toy/tgrpo            # writes toy/tgrpo/report.html
    python tests/report.py toy/tgrpo --picture assets/method.svg    # and one group as a picture

What the page looks like is assets/report.html; here its data is gathered and put into it, as JSON.
"""
import argparse
import base64
import hashlib
import json
import math
import re
import sys
from collections import defaultdict
from itertools import zip_longest
from pathlib import Path
from textwrap import shorten
from xml.sax.saxutils import escape

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from annotate import data_url  # noqa: E402
from build_data import (FlagParser, InputError, MediaError, above, load_records,  # noqa: E402
                        load_vision_of, make_folder_of, run_script, whole_lines, write_whole)
from rewards import accuracy_reward, extract_answer, format_reward  # noqa: E402

CURVES = {  # of a page: {title: metrics of metrics.jsonl that share a scale}
    "accuracy": ("reward/accuracy",),
    "held-out accuracy": ("val/accuracy", "val/accuracy_shuffled"),
    "held-out gap": ("val/gap",), "share correct": ("group/p", "group/p_tilde"),
    "KL": ("policy/kl",), "response tokens": ("response/tokens",),
    "groups of zero spread": ("group/zero_std_rate",)}
GAINS = ("accuracy", "held-out accuracy", "held-out gap")  # of these a page says the gain
POINTS = 30  # of a curve, at most
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
    add("--picture", metavar="FILE.svg", help="also draw one group: the method as a picture")
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


def read_curves(path):
    """{title: {metric: its curve}} of a tgrpo.py run, for those that its metrics.jsonl has."""
    try:
        rows = [json.loads(line) for line in whole_lines(path).splitlines()[1:]]
        curves = {title: {metric: points for metric in metrics if (points := curve(rows, metric))}
                  for title, metrics in CURVES.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error!r}") from None
    return {title: lines for title, lines in curves.items() if lines}


def curve(rows, metric):
    """[[step, value], ...] of a metric, where it is defined and finite: means over up to POINTS
    parts of the run, of equally many steps, so that a curve of noisy steps can be read."""
    parts = defaultdict(list)
    for i, row in enumerate(rows):
        if metric in row and math.isfinite(row[metric]):
            parts[i * POINTS // len(rows)].append((row["step"], row[metric]))
    return [[float(f"{math.fsum(column) / len(column):.6g}") for column in zip(*part)]
            for part in parts.values()]


def gain_of(curves):
    """What a run gained, from the first to the last point of its curves, in words."""
    gains = []
    for title in GAINS:
        for points in [*curves.get(title, {}).values()][:1]:
            first, last = points[0][1], points[-1][1]
            gains.append(f"{title} {first:.3g} → {last:.3g} ({last - first:+.2g})")
    return ", ".join(gains)


def pick_questions(rollouts, records):
    """Up to REPORTED (record, its rows of the earliest and, if it is another, the latest step).

    Those logged at two steps come first, of these the ones that gained most in p, then those with
    advantages, then videos. Kinds of question, medium by problem type, take turns.
    """
    found = []
    for key, rows in rollouts.items():
        if record := records.get(key):
            once = rows[0]["step"] == rows[-1]["step"]
            shown = rows[:1] if once else [rows[0], rows[-1]]
            dull = not any(response["earned"]["A"] for row in shown for response in row["first"])
            rank = once, shown[0]["p"] - shown[-1]["p"], dull, record["data_type"] == "image"
            found.append((rank, record, shown))
    kinds = defaultdict(list)
    for _, record, shown in sorted(found, key=lambda question: question[0]):
        kinds[record["data_type"], record["problem_type"]].append((record, shown))
    turns = zip_longest(*kinds.values())
    return [question for turn in turns for question in turn if question][:REPORTED]


def pictures(record, orders, flags):
    """A medium's frames, or its image, as the run saw them, made smaller: data: URLs.
    MediaError where `orders`, the run's, name frames that it does not have."""
    flags = {"video_reader": "av"} | flags  # of a run before that flag
    vision = load_vision_of(record, argparse.Namespace(**flags))
    images, side = [vision.image], IMAGE_SIDE
    if vision.frames is not None:
        frames = vision.frames.permute(0, 2, 3, 1).numpy()  # (T, H, W, C)
        images, side = [Image.fromarray(frame) for frame in frames], FRAME_SIDE
    if not {place for order in orders for place in order} <= {*range(len(images))}:
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
    for response in [response for row in rows for response in row["first"] + row["second"]]:
        response["answer"] = extract_answer(response["text"])
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


# ------------------------------------------------------------------- one group, as an SVG file

STYLE = ("text { font: 14px system-ui, sans-serif; fill: #1f2328 } .bold { font-weight: bold } "
         ".number { text-anchor: end } .grey { font-size: 13px; fill: #59636e } "
         ".correct { fill: #0a7a33 } .wrong { fill: #b3261e } "
         "[href^='data:image/png'] { image-rendering: pixelated }")
SIDE, STRIP, ROW = 46, 384, 24  # pixels: of a frame and all frames at most, of a response
COLUMNS = {"accuracy": 396, "R": 446, "A": 498}  # where these numbers end
SECOND = 556  # where the second group begins


def pick_group(rollouts, records):
    """(record, row) of the group to draw: p is furthest above p_tilde, and not every response is
    correct, so that the update has something to tell apart."""
    groups = [(row["p"] - row["p_tilde"], key, row) for key, rows in rollouts.items()
              for row in rows
              if key in records and row["frame_order"] and row["second"] and 0 < row["p"] < 1]
    if not groups:
        raise InputError("--picture needs a video with correct and wrong responses: there is none")
    _, key, row = max(groups, key=lambda group: group[0])
    return records[key], row


def method_picture(question, threshold):
    """A question at one step as an SVG file: frames, responses and what they earned, both groups
    side by side. Its ground is white, also on a dark page."""
    row, = question["steps"]
    if "fault" in question:
        raise InputError(f"--picture: {question['fault']}")
    order, first, second = row["frame_order"], row["first"], row["second"]
    end = 190 + ROW * max(len(first), len(second))
    sign = ">" if row["p"] > row["p_tilde"] else "<" if row["p"] < row["p_tilde"] else "="
    asked = shorten(f"{question['problem']} {', '.join(question['options'])}", 90, placeholder="…")
    answer = shorten(question["answer"], 24, placeholder="…")
    pieces = [
        words(16, 28, f"{asked} Answer: {answer}", "bold"),
        words(16, 58, "First group: the frames in order"),
        words(SECOND, 58, "Second group: compared with, never trained on"),
        *frames(16, question["pictures"], range(len(question["pictures"]))),
        *frames(SECOND, question["pictures"], order),
        *answers(16, first, threshold), *answers(SECOND, second, threshold),
        words(16, end, f"p = {row['p']:.3g}", "bold"),
        words(SECOND, end, f"p_tilde = {row['p_tilde']:.3g}", "bold"),
        words(16, end + 26, f"p {sign} p_tilde, so each correct response of the first group earns "
              f"r_t = {row['r_t']:.3g}. R is all that a response earns;"),
        words(16, end + 46, "A is R against the mean of its group: the update makes responses with "
              "A > 0 likelier, with A < 0 less likely.")]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 970 {end + 64}">'
            f'<style>{STYLE}</style><rect width="970" height="{end + 64}" rx="8" fill="#fff"/>\n'
            + "\n".join(pieces) + "\n</svg>\n")


def frames(x, pictures, order):
    """The elements of a row of frames, numbered by their places in the video."""
    side = min(SIDE, STRIP / len(order))
    for i, place in enumerate(order):
        left = x + i * (side + 2)
        yield (f'<image x="{left:.1f}" y="70" width="{side:.1f}" height="{SIDE}" '
               f'href="{pictures[place]}"/>')
        yield words(left + side / 2 + 4, 134, str(place + 1), "grey number")


def answers(x, responses, threshold):
    """The elements of a group's responses, a row each: answer, thought, numbers."""
    columns = [name for name in COLUMNS if name in responses[0]["earned"]]
    yield from (words(x + COLUMNS[name], 158, name, "grey number") for name in columns)
    for i, response in enumerate(responses, 1):
        y, earned = 158 + i * ROW, response["earned"]
        mark, kind = ("✓", "correct") if earned["accuracy"] >= threshold else ("✗", "wrong")
        thought = re.sub("</?think>|<answer>.*", "", response["text"], flags=re.DOTALL)
        yield words(x, y, f"{mark} {shorten(response['answer'], 9, placeholder='…')}", kind)
        yield words(x + 90, y, shorten(thought, 38, placeholder="…"), "grey")
        yield from (words(x + COLUMNS[name], y, f"{earned[name]:.3g}", "number")
                    for name in columns)


def words(x, y, text, kind=""):
    """A line of text in an SVG, without the characters that no XML file can hold."""
    text = escape(re.sub("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text))
    return f'<text x="{x:.1f}" y="{y}" class="{kind}">{text}</text>'


# ------------------------------------------------------------------------------------------ main

def main(args):
    """Writes report.html of a run, into the run's folder or --output."""
    folder = Path(args.run)
    rollouts, flags = read_rollouts(folder / "rollouts.jsonl"), read_run(folder / "metrics.jsonl")
    curves = read_curves(folder / "metrics.jsonl")
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
    questions = [question_data(record, rows, flags) for record, rows in chosen]
    page = fill((ROOT / "assets/report.html").read_text(encoding="utf-8"), {
        "folder": str(folder), "logged": len(rollouts), "gain": gain_of(curves), "curves": curves,
        "flags": {flag: str(flags[flag]) for flag in FRAME_FLAGS + REWARD_FLAGS if flag in flags},
        "questions": questions})
    write_whole({path: [page]})
    if args.picture:
        make_folder_of(args.picture)
        record, row = pick_group(rollouts, records)
        picture = method_picture(question_data(record, [row], flags), flags["correct_threshold"])
        write_whole({Path(args.picture): [picture]})
    print(f"{path}: {len(chosen)} questions, {len(page) / 1e6:.1f} MB")


if __name__ == "__main__":
    run_script(main, parse_args)
