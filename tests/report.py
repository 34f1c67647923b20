"""Writes a T-GRPO run as one page that needs no network: its curves, then questions.

Held-out questions come first, with their frames and the answers at each validation. Rollouts of
training follow, with both frame orders and every response's rewards.

    python tests/report.py toy/tgrpo            # writes toy/tgrpo/report.html
    python tests/report.py toy/tgrpo --picture assets/method.svg    # and one rollout as a picture

assets/report.html is the template. This script inserts the run's data, as JSON.
"""
import argparse
import base64
import hashlib
import json
import math
import re
import sys
from collections import defaultdict
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
    "groups with equal rewards": ("group/zero_std_rate",)}
POINTS = 30  # of a curve, at most
SHOWN = 8  # held-out questions, and rollouts, at most
FRAME_SIDE, IMAGE_SIDE = 128, 384  # pixels of the longer side, at most
TINY = 64  # pixels of a side up to which a picture is a PNG, which the page enlarges to squares
PARTS = ("accuracy", "format", "temporal", "length", "R", "A")  # of a response in rollouts.jsonl
FRAME_FLAGS = ("max_frames", "min_frames", "fps", "min_pixels", "max_pixels", "image_min_pixels",
               "image_max_pixels", "video_reader")  # how the run decoded videos and images
REWARD_FLAGS = ("correct_threshold", "alpha", "temporal_test", "temporal_to", "omega", "l_min",
                "l_max", "scale_advantages")  # how the run rewarded responses
PATH_FLAGS = ("data", "val_data", "media_root")


def parse_args(argv=None):
    parser = FlagParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("run", help="--output of a tgrpo.py run")
    add("--data", help="the run's records; default: the run's --data")
    add("--val_data", help="its held-out records; default: the run's --val_data")
    add("--media_root", help="folder that the records' paths are relative to; default: the run's")
    add("--output", help="folder to write report.html to; default: the run's")
    add("--picture", metavar="FILE.svg", help="also draw one rollout: the method as a picture")
    add("--decode_timeout", type=above(0, float), default=120,
        help="timeout for a file, in seconds")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------- the run's files

def read_lines(path, convert):
    """Returns convert(row) of each complete line of a .jsonl file. Raises InputError if one is
    damaged, with its number."""
    rows = []
    for number, line in enumerate(whole_lines(path).splitlines(), 1):
        try:
            rows.append(convert(json.loads(line)))
            json.dumps(rows[-1], allow_nan=False)  # a page's JSON has no NaN
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}, line {number}, is damaged: {error!r}") from None
    return rows


def read_metrics(path):
    """Returns the run's flags and, of each step, {metric: value} without those not finite."""
    rows = read_lines(path, lambda row: row if "arguments" in row else {
        name: float(value) for name, value in row.items() if math.isfinite(value)})
    flags = rows[0].get("arguments", {}) if rows else {}
    missing = [name for name in (*PATH_FLAGS, *FRAME_FLAGS, *REWARD_FLAGS) if name not in flags]
    if missing:
        raise InputError(f"{path} does not begin with the flags of a tgrpo.py run: "
                         f"{', '.join(missing)} not found; give the --output of such a run")
    return flags, rows[1:]


def response(text, **earned):
    """Returns a response as the page shows it. earned: {part of the reward: number}."""
    return {"text": text, "answer": extract_answer(text), "earned": earned}


def rollout_row(row):
    """Returns what the page shows of a row of rollouts.jsonl."""
    first, second = row["responses"], row["responses_shuffled"]
    parts = [part for part in PARTS if second or part != "temporal"]
    columns = [map(float, row[part]) for part in parts]
    shares = ("p", "p_tilde", "r_t") if second else ("p",)
    return {"problem_id": row["problem_id"], "path": row["path"], "step": int(row["step"]),
            "frame_order": [int(place) for place in row["frame_order"] or ()],
            "first": [response(text, **dict(zip(parts, values)))
                      for text, *values in zip(first, *columns, strict=True)],
            "second": [response(text) for text in second],
            **{name: float(row[name]) for name in shares}}


def validation_row(row):
    """Returns what the page shows of a row of validation.jsonl. As in a rollout, "first" has the
    answer to the frames in order; "second" has the answer to a video's shuffled frames."""
    def answer(order):
        graded = response(row[f"response{order}"], accuracy=float(row[f"accuracy{order}"]))
        return graded | {"step": int(row["step"])}
    return {"problem_id": row["problem_id"], "path": row["path"], "frame_order": [],
            "first": [answer("")],
            "second": [answer("_shuffled")] if "response_shuffled" in row else []}


def key_of(row):
    """Returns what identifies a question in records and in the run's files."""
    return str(row["problem_id"]), str(row["path"])


def read_questions(path, convert, data, media_root):
    """Returns the converted rows of a file, each with its record of the data. Raises InputError if
    the file has rows, but none of the data's questions."""
    rows = read_lines(path, convert)
    records = {key_of(record): record for record in load_records(data, media_root)} if rows else {}
    questions = [row | {"record": records[key_of(row)]} for row in rows if key_of(row) in records]
    if rows and not questions:
        raise InputError(f"{data} has no question of {path}; name the run's records with --data "
                         "and --val_data")
    return questions


# -------------------------------------------------------------------------------- what is shown

def read_curves(metrics):
    """Returns {title: {metric: its curve}}, without the metrics that the run lacks."""
    curves = {title: {name: points for name in names if (points := curve(metrics, name))}
              for title, names in CURVES.items()}
    return {title: lines for title, lines in curves.items() if lines}


def curve(rows, metric):
    """Returns [[step, value], ...] of a metric. Each point is a mean over one of POINTS equal parts
    of the run, so that noisy steps give a readable curve."""
    parts = defaultdict(list)
    for i, row in enumerate(rows):
        if metric in row:
            parts[i * POINTS // len(rows)].append((row["step"], row[metric]))
    return [[float(f"{math.fsum(column) / len(column):.6g}") for column in zip(*part)]
            for part in parts.values()]


def merge_validations(rows):
    """Returns one question for each held-out question, with its answers of all validations."""
    questions = {}
    for row in rows:
        question = questions.setdefault(key_of(row), row | {"first": [], "second": []})
        question["first"] += row["first"]
        question["second"] += row["second"]
    return [*questions.values()]


def has_changed(question, threshold):
    """Returns whether a held-out question was correct at one validation and wrong at another."""
    return len({answer["earned"]["accuracy"] >= threshold for answer in question["first"]}) > 1


def spread_rollouts(rollouts):
    """Returns up to SHOWN rollouts at equal distances over the run, of those with unequal rewards:
    only they have advantages."""
    unequal = [rollout for rollout in rollouts
               if any(response["earned"]["A"] for response in rollout["first"])]
    shown = unequal or rollouts
    return shown[::math.ceil(len(shown) / SHOWN) or 1]


def pictures(record, order, flags):
    """Returns a video's frames, or an image, as data: URLs: decoded as in the run, then made
    smaller. Raises MediaError if the run's frame order names a frame that the file lacks."""
    vision = load_vision_of(record, argparse.Namespace(**flags))
    images, side = [vision.image], IMAGE_SIDE
    if vision.frames is not None:
        frames = vision.frames.permute(0, 2, 3, 1).numpy()  # (T, H, W, C)
        images, side = [Image.fromarray(frame) for frame in frames], FRAME_SIDE
    if not {*order} <= {*range(len(images))}:
        raise MediaError(f"{record['path']} has {len(images)} frames, not those of the run")
    for image in images:
        image.thumbnail((side, side))
    return [data_url("image/png" if max(image.size) <= TINY else "image/jpeg", image)
            for image in images]


def question_data(question, flags):
    """Returns a question as the page's script reads it. The second group is graded here,
    because the run logs only its share of correct responses."""
    record = question["record"]
    for response in question["second"]:
        response["earned"] = response["earned"] or {
            "accuracy": accuracy_reward(response["text"], record),
            "format": format_reward(response["text"])}
    data = question | {
        "record": {name: record[name] for name in ("problem", "problem_type", "data_type")},
        "answer": extract_answer(record["solution"]),
        "options": record["options"] if record["problem_type"] == "multiple choice" else []}
    try:
        return data | {"pictures": pictures(record, question["frame_order"], flags)}
    except MediaError as error:
        return data | {"fault": str(error)}


def fill(page, data):
    """Returns the page with the data as JSON. Its policy allows only its own style and script."""
    for name in ("style", "script"):
        content = page.partition(f"<{name}>")[2].partition(f"</{name}>")[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        page = page.replace(f"{{{name}_hash}}", digest)
    # ASCII without "<": no text can end the script element, and every text can be encoded
    return page.replace("{run}", json.dumps(data, allow_nan=False).replace("<", "\\u003c"))


# ----------------------------------------------------------------- one rollout, as an SVG file

STYLE = ("text { font: 14px system-ui, sans-serif; fill: #1f2328 } .bold { font-weight: bold } "
         ".number { text-anchor: end } .grey { font-size: 13px; fill: #59636e } "
         ".correct { fill: #0a7a33 } .wrong { fill: #b3261e } "
         "[href^='data:image/png'] { image-rendering: pixelated }")
SIDE, STRIP, ROW = 46, 384, 24  # pixels: of a frame and all frames at most, of a response
COLUMNS = {"accuracy": 396, "R": 446, "A": 498}  # where these numbers end
SECOND = 556  # where the second group begins


def pick_rollout(rollouts):
    """Returns the rollout to draw: p is furthest above p_tilde, and not every response is correct,
    so that the advantages differ."""
    drawable = [rollout for rollout in rollouts
                if rollout["frame_order"] and rollout["second"] and 0 < rollout["p"] < 1]
    if not drawable:
        raise InputError("--picture needs a video with correct and wrong responses: there is none")
    return max(drawable, key=lambda rollout: rollout["p"] - rollout["p_tilde"])


def method_picture(rollout, threshold):
    """Returns a rollout as an SVG file: frames, responses and their rewards, both groups side by
    side. The background is white, also on a dark page."""
    if "fault" in rollout:
        raise InputError(f"--picture: {rollout['fault']}")
    order, first, second = rollout["frame_order"], rollout["first"], rollout["second"]
    end = 190 + ROW * max(len(first), len(second))
    p, p_tilde = rollout["p"], rollout["p_tilde"]
    sign = ">" if p > p_tilde else "<" if p < p_tilde else "="
    problem = f"{rollout['record']['problem']} {', '.join(rollout['options'])}"
    answer = shorten(rollout["answer"], 24, placeholder="…")
    elements = [
        text_line(16, 28, f"{shorten(problem, 90, placeholder='…')} Answer: {answer}", "bold"),
        text_line(16, 58, "First group: the frames in order"),
        text_line(SECOND, 58, "Second group: compared with, never trained on"),
        *frame_row(16, rollout["pictures"], range(len(rollout["pictures"]))),
        *frame_row(SECOND, rollout["pictures"], order),
        *response_rows(16, first, threshold), *response_rows(SECOND, second, threshold),
        text_line(16, end, f"p = {p:.3g}", "bold"),
        text_line(SECOND, end, f"p_tilde = {p_tilde:.3g}", "bold"),
        text_line(16, end + 26, f"p {sign} p_tilde, so each correct response of the first group "
                  f"earns r_t = {rollout['r_t']:.3g}. R is all that a response earns;"),
        text_line(16, end + 46, "A is R against the mean of its group: the update makes responses "
                  "with A > 0 likelier, with A < 0 less likely.")]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 970 {end + 64}">'
            f'<style>{STYLE}</style><rect width="970" height="{end + 64}" rx="8" fill="#fff"/>\n'
            + "\n".join(elements) + "\n</svg>\n")


def frame_row(x, pictures, order):
    """Yields the elements of a row of frames, numbered by their places in the video."""
    side = min(SIDE, STRIP / len(order))
    for i, place in enumerate(order):
        left = x + i * (side + 2)
        yield (f'<image x="{left:.1f}" y="70" width="{side:.1f}" height="{SIDE}" '
               f'href="{pictures[place]}"/>')
        yield text_line(left + side / 2 + 4, 134, str(place + 1), "grey number")


def response_rows(x, responses, threshold):
    """Yields the elements of responses, a row each: answer, thought, numbers."""
    columns = [name for name in COLUMNS if name in responses[0]["earned"]]
    yield from (text_line(x + COLUMNS[name], 158, name, "grey number") for name in columns)
    for i, response in enumerate(responses, 1):
        y, earned = 158 + i * ROW, response["earned"]
        mark, kind = ("✓", "correct") if earned["accuracy"] >= threshold else ("✗", "wrong")
        thought = re.sub("</?think>|<answer>.*", "", response["text"], flags=re.DOTALL)
        yield text_line(x, y, f"{mark} {shorten(response['answer'], 9, placeholder='…')}", kind)
        yield text_line(x + 90, y, shorten(thought, 38, placeholder="…"), "grey")
        yield from (text_line(x + COLUMNS[name], y, f"{earned[name]:.3g}", "number")
                    for name in columns)


def text_line(x, y, text, kind=""):
    """Returns a line of text as an SVG element. Characters that XML forbids become U+FFFD."""
    valid = re.sub("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)
    return f'<text x="{x:.1f}" y="{y}" class="{kind}">{escape(valid)}</text>'


# ------------------------------------------------------------------------------------------ main

def main(args):
    """Writes report.html into the run's folder or --output, and --picture."""
    folder = Path(args.run)
    flags, metrics = read_metrics(folder / "metrics.jsonl")
    # --data and the like replace the run's own flags
    flags |= {name: value for name, value in vars(args).items() if value is not None}
    rollouts = read_questions(folder / "rollouts.jsonl", rollout_row,
                              flags["data"], flags["media_root"])
    held_out = merge_validations(read_questions(folder / "validation.jsonl", validation_row,
                                                flags["val_data"], flags["media_root"]))
    if not rollouts and not held_out:
        raise InputError(f"{folder} has no rollouts.jsonl or validation.jsonl yet; repeat this "
                         "after the run's first step")
    threshold = float(flags["correct_threshold"])
    changed = [question for question in held_out if has_changed(question, threshold)]
    same = [question for question in held_out if not has_changed(question, threshold)]
    path = Path(args.output or folder, "report.html")
    make_folder_of(path)
    data = {
        "folder": str(folder), "curves": read_curves(metrics),
        "logged": {"held_out": len(held_out), "changed": len(changed), "rollouts": len(rollouts)},
        "flags": {name: str(flags[name]) for name in (*FRAME_FLAGS, *REWARD_FLAGS)},
        "held_out": [question_data(question, flags) for question in (changed + same)[:SHOWN]],
        "rollouts": [question_data(rollout, flags) for rollout in spread_rollouts(rollouts)]}
    page = fill((ROOT / "assets/report.html").read_text(encoding="utf-8"), data)
    write_whole({path: [page]})
    if args.picture:
        make_folder_of(args.picture)
        drawing = method_picture(question_data(pick_rollout(rollouts), flags), threshold)
        write_whole({Path(args.picture): [drawing]})
    print(f"{path}: {len(data['held_out'])} held-out questions, {len(data['rollouts'])} rollouts, "
          f"{len(page) / 1e6:.1f} MB")


if __name__ == "__main__":
    run_script(main, parse_args)
