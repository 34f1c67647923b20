"""A T-GRPO run at work, as one page that needs no network: questions with their frames in both
orders, every response of both groups and what it earned, at an early and a late step.

    python tests/report.py toy/tgrpo            # writes toy/tgrpo/report.html
"""
import argparse
import base64
import hashlib
import html
import json
import re
import sys
from collections import defaultdict
from itertools import zip_longest
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from annotate import data_url  # noqa: E402
from build_data import (FlagParser, InputError, MediaError, above, load_records,  # noqa: E402
                        load_vision_of, run_script, whole_lines, write_whole)
from rewards import accuracy_reward, extract_answer, format_reward  # noqa: E402


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


REPORTED = 8  # questions of a page
FRAME_SIDE, IMAGE_SIDE = 128, 384  # pixels of the longer side, at most
TINY = 64  # pixels of a side up to which a picture is enlarged to sharp squares
SHORT = 600  # characters of a response that is shown without a click
TAG = re.compile(r"(</?(?:think|answer)>)")
UNFIT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # what no page can hold
PARTS = ("accuracy", "format", "temporal", "length", "R", "A")  # of a response in rollouts.jsonl
RUN_FLAGS = ("max_frames", "min_frames", "fps", "min_pixels", "max_pixels", "image_min_pixels",
             "image_max_pixels", "correct_threshold", "alpha", "temporal_test", "temporal_to",
             "omega", "l_min", "l_max", "scale_advantages")  # what the page depends on
GLOSSARY = {
    "accuracy, format": "graded by rewards.py, 0 to 1. Correct: accuracy >= correct_threshold.",
    "p, p_tilde": "shares of correct responses to ordered and to shuffled frames.",
    "r_t": "alpha if p >= p_tilde (temporal_test gt: p > p_tilde), else 0 (Eq. 1): did the order "
           "of the frames help?",
    "temporal": "r_t for a correct response (Eq. 2); in R (temporal_to advantage: in A).",
    "length": "omega for a correct response of l_min to l_max tokens (Eq. 5).",
    "R": "accuracy + format + temporal + length: what the response earns.",
    "A": "(R - mean) / std within the group of ordered frames (scale_advantages none: R - mean; "
         "Eq. 3). The update makes responses with A > 0 likelier, with A < 0 less likely."}
STYLE = """
:root { color-scheme: light dark }
body { margin: 0 auto; max-width: 100rem; padding: 0 1rem 5rem; overflow-wrap: anywhere;
  font: clamp(1rem, 0.85rem + 0.5vw, 1.5rem)/1.45 system-ui, sans-serif }
h1, h2 { font-size: 1.3em } h3, h4 { font-size: 1em; margin: 1em 0 0.3em }
ol, ul, figure { margin: 0; padding: 0; list-style: none } figcaption { font-weight: bold }
:focus-visible { outline: 3px solid Highlight; outline-offset: 3px }
nav { position: fixed; inset: auto 0 0 0; padding: 0.3rem; background: Canvas }
nav, nav ol { display: flex; gap: 0.2rem; justify-content: center }
nav a, button { display: block; padding: 0.3em 0.5em; border: 1px solid; border-radius: 0.4em;
  font: inherit; color: CanvasText; background: Canvas; text-decoration: none }
nav a[aria-current] { background: CanvasText; color: Canvas }
.steps { display: grid; gap: 0 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)) }
.video { display: grid; gap: 0.3rem; text-align: center; max-width: 70rem;
  grid-template-columns: repeat(auto-fill, minmax(max(4rem, 5vw), 1fr)) }
img { display: block; max-width: 100% } .video img { width: 100% }
.tiny { image-rendering: pixelated } .image .tiny { min-width: 9rem }
details { margin: 0.4rem 0; padding-left: 0.6rem; border-left: 0.3rem solid }
.correct { border-color: light-dark(#0a7a33, #5fd38a) }
.wrong { border-color: light-dark(#b3261e, #ff8a80) }
label, summary span { display: inline-block; margin-right: 0.8em }
.text { white-space: pre-wrap; margin: 0.3em 0; unicode-bidi: isolate } .text b { opacity: 0.6 }
.think { font-style: italic } .answer { font-weight: bold; background: #fc04 }
@media print { [hidden] { display: block !important } nav { display: none } }
"""
SCRIPT = """
const sections = [...document.querySelectorAll("section")];
const links = [...document.querySelectorAll("nav a")];
const shown = () => Math.max(0, links.findIndex(link => link.hash === location.hash));
const show = () => sections.forEach((section, i) => {
  section.hidden = i !== shown();
  links[i].ariaCurrent = section.hidden ? null : "true";
});
const go = by => { location.hash = links.at((shown() + by) % links.length).hash; };
const keys = {j: 1, ArrowRight: 1, k: -1, ArrowLeft: -1};
onkeydown = event => {
  if (keys[event.key] && !event.ctrlKey && !event.metaKey && !event.altKey) go(keys[event.key]);
};
onhashchange = () => { show(); sections[shown()].firstChild.focus(); };
document.querySelectorAll("button").forEach(b => { b.onclick = () => go(Number(b.value)); });
show();
"""
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; base-uri 'none';
  form-action 'none'; img-src data:; style-src 'sha256-{style_hash}';
  script-src 'sha256-{script_hash}'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>T-GRPO at work</title><style>{style}</style></head><body>
<header><h1>T-GRPO at work: {run}</h1>
<p>{shown} of the {logged} questions in rollouts.jsonl: kinds in turn; in each, those logged at two
steps first, then those with advantages. Keys: j or → next, k or ← previous.</p>
<details><summary>What the numbers are</summary><dl>{terms}</dl><p>This run: {flags}</p></details>
</header><main>{sections}</main>
<nav aria-label="Questions"><button value="-1" aria-label="Previous question">←</button>
<ol>{links}</ol><button value="1" aria-label="Next question">→</button></nav>
<script>{script}</script></body></html>
"""


def read_rollouts(path):
    """{(problem_id as text, path): its rows, the earliest step first} of a rollouts.jsonl; a row
    is {"step", "texts", "shuffled" texts, "earned" by each text, "order" of frames, "p", ...}."""
    rollouts = defaultdict(list)
    for number, line in enumerate(whole_lines(path).splitlines(), 1):
        try:
            row = json.loads(line)
            texts, shuffled = row["responses"], row["responses_shuffled"]
            if not all(isinstance(text, str) for text in texts + shuffled):
                raise ValueError("a response is not a text")
            parts = [name for name in PARTS if shuffled or name != "temporal"]
            lines = zip(texts, *(map(float, row[name]) for name in parts), strict=True)
            rollouts[str(row["problem_id"]), row["path"]].append({
                "step": int(row["step"]), "texts": texts, "shuffled": shuffled,
                "earned": [dict(zip(parts, values)) for _, *values in lines],
                "order": [int(place) for place in row.get("frame_order") or ()],
                **{key: float(row[key]) for key in ("p", "p_tilde", "r_t")[:3 if shuffled else 1]}})
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}, line {number}, is damaged: {error!r}") from None
    if not rollouts:
        raise InputError(f"{path} has no rollouts: give the --output of a tgrpo.py run, "
                         "which writes them every --rollout_steps steps")
    return {key: sorted(rows, key=lambda row: row["step"]) for key, rows in rollouts.items()}


def read_run(path):
    """The flags of a tgrpo.py run, from the first line of its metrics.jsonl."""
    try:
        flags = json.loads(whole_lines(path).partition(b"\n")[0])["arguments"]
        if missing := {"data", "media_root", *RUN_FLAGS} - flags.keys():
            raise ValueError(f"without {', '.join(sorted(missing))}")
        return argparse.Namespace(**flags)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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
            dull = not any(response["A"] for row in shown for response in row["earned"])
            kinds[record["data_type"], record["problem_type"]].append(
                ((span == 0, dull, -span), record, shown))
    turns = zip_longest(*(sorted(kinds[kind], key=lambda question: question[0])
                          for kind in sorted(kinds, reverse=True)))  # videos first
    found = [question for turn in turns for question in turn if question]
    later = sorted(found[len(kinds):], key=lambda question: question[0][0])  # logged once: last
    return [question[1:] for question in (found[:len(kinds)] + later)[:REPORTED]]


def safe(value):
    """Any value as text of a page, also in an attribute; what no page can hold is U+FFFD."""
    return html.escape(UNFIT.sub("\ufffd", str(value)))


def pictures(record, orders, run, timeout):
    """A medium's frames, or its image, as the run saw them, made smaller: list items of <img>.
    MediaError where `orders`, the run's, are of another number of frames."""
    vision = load_vision_of(record, argparse.Namespace(**vars(run) | {"decode_timeout": timeout}))
    images, side, items = [vision.image], IMAGE_SIDE, []
    if vision.frames is not None:
        frames = vision.frames.permute(0, 2, 3, 1).numpy()  # (T, H, W, C)
        images, side = [Image.fromarray(frame) for frame in frames], FRAME_SIDE
    for number, image in enumerate(images, 1):
        image.thumbnail((side, side))
        tiny = max(image.size) <= TINY
        url = data_url("image/png" if tiny else "image/jpeg", image)
        items.append(f'<li><img class="{"tiny" * tiny}" alt="{record["data_type"]}, {number} of '
                     f'{len(images)}" src="{url}">'
                     f"{number if side == FRAME_SIDE else ''}</li>")
    if any(sorted(order) != [*range(len(items))] for order in orders if order):
        raise MediaError(f"{record['path']} has {len(items)} frames, not those of the run")
    return items


def strip(title, kind, items):
    """Pictures with their title; kind is image or video."""
    return (f'<figure><figcaption>{title}</figcaption><ol class="{kind}">{"".join(items)}</ol>'
            "</figure>")


def response_group(title, texts, earned, threshold):
    """Responses under their heading: what each earned, then its text with the tags set apart."""
    items = []
    for text, values in zip(texts, earned):
        word, kind, pieces = "correct" if values["accuracy"] >= threshold else "wrong", "", []
        for piece in TAG.split(text):
            if TAG.fullmatch(piece):
                kind = "" if piece.startswith("</") else piece.strip("<>")
                pieces.append(f"<b>{safe(piece)}</b>")
            else:
                pieces.append(f'<span class="{kind}">{safe(piece)}</span>')
        shown = "".join(f"<span>{key} <b>{value:.3g}</b></span>" for key, value in values.items())
        items.append(f'<li><details class="{word}"{" open" * (len(text) <= SHORT)}><summary>'
                     f'<span><strong>{word}</strong></span>{shown}</summary><p class="text" '
                     f'dir="auto">{"".join(pieces)}</p></details></li>')
    return f"<h4>{len(texts)} responses to {title}</h4><ol>{''.join(items)}</ol>"


def step_article(row, record, items, run):
    """What one step made of a question: both groups, and what their comparison earned."""
    kind, second = record["data_type"], row["shuffled"]
    pieces = [f"<article><h3>Step {row['step']}</h3>"]
    if items and row["order"]:
        pieces.append(strip("Frames, shuffled for the second group", kind,
                            [items[place] for place in row["order"]]))
    pieces += [f'<label>{name} <meter min="0" max="1" value="{row[name]}"></meter> '
               f"{row[name]:.3g}</label>" for name in ("p", "p_tilde") if name in row]
    if second:
        sign = ("=", "&gt;", "&lt;")[(row["p"] > row["p_tilde"]) - (row["p"] < row["p_tilde"])]
        pieces.append(f"<p>p {sign} p_tilde, so r_t = {row['r_t']:.3g} for every correct response "
                      f"to the {kind}.</p>")
    else:
        pieces.append("<p>No second group: images, and runs with alpha 0, have none.</p>")
    if not any(values["A"] for values in row["earned"]):
        pieces.append("<p>All rewards are equal, so every A is 0: this group teaches nothing.</p>")
    pieces.append(response_group(f"the {kind}", row["texts"], row["earned"], run.correct_threshold))
    if second:
        earned = [{"accuracy": accuracy_reward(text, record), "format": format_reward(text)}
                  for text in second]
        pieces.append(response_group("the shuffled frames, compared with and never trained on",
                                     second, earned, run.correct_threshold))
    return "".join([*pieces, "</article>"])


def question_section(number, record, rows, run, timeout):
    """A question with its medium, at its earliest and its latest step."""
    try:
        items = pictures(record, [row["order"] for row in rows], run, timeout)
        medium = strip(f"The {record['data_type']}", record["data_type"], items)
    except MediaError as error:
        items, medium = [], f"<p>The {record['data_type']} cannot be shown: {safe(error)}</p>"
    choices = record["options"] if record["problem_type"] == "multiple choice" else ()
    options = "".join(f"<li>{safe(option)}</li>" for option in choices)
    steps = "".join(step_article(row, record, items, run) for row in rows)
    once = "<p>Logged at this one step only: there is no later one to compare.</p>"
    return (f'<section id="q{number}" aria-labelledby="h{number}"><h2 id="h{number}" tabindex="-1" '
            f'dir="auto">{number}. {safe(record["problem"])}</h2><ul dir="auto">{options}</ul>'
            f'<p dir="auto">Answer: <b class="answer">{safe(extract_answer(record["solution"]))}'
            f'</b> ({safe(record["problem_type"])}, problem_id {safe(record["problem_id"])}, '
            f'{safe(record["path"])})</p>{medium}{once * (len(rows) == 1)}'
            f'<div class="steps">{steps}</div></section>')


def write_report(args):
    """Writes report.html of the run that --report names, into the run's folder or --output."""
    folder = Path(args.run)
    rollouts, run = read_rollouts(folder / "rollouts.jsonl"), read_run(folder / "metrics.jsonl")
    root = args.media_root or (None if args.data else run.media_root)
    records = {(str(record["problem_id"]), record["path"]): record
               for record in load_records(args.data or run.data, root)}
    chosen = pick_questions(rollouts, records)
    if not chosen:
        raise InputError(f"{args.data or run.data} has no question of {folder}/rollouts.jsonl; "
                         "name the run's records with --data")
    sections = [question_section(number, record, rows, run, args.decode_timeout)
                for number, (record, rows) in enumerate(chosen, 1)]
    links = "".join(f'<li><a href="#q{number}" aria-label="Question {number}">{number}</a></li>'
                    for number in range(1, len(chosen) + 1))
    terms = "".join(f"<dt><b>{name}</b></dt><dd>{safe(text)}</dd>"
                    for name, text in GLOSSARY.items())
    flags = ", ".join(f"{flag} {getattr(run, flag)}" for flag in RUN_FLAGS)
    style, script = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
                     for text in (STYLE, SCRIPT))
    page = PAGE.format_map({
        "style": STYLE, "script": SCRIPT, "style_hash": style, "script_hash": script,
        "run": safe(folder), "shown": len(chosen), "logged": len(rollouts), "terms": terms,
        "flags": safe(flags), "sections": "".join(sections), "links": links})
    path = Path(args.output or folder, "report.html")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}, name another folder as --output: {error}") from None
    write_whole({path: [page]})
    print(f"{path}: {len(chosen)} questions, {len(page) / 1e6:.1f} MB")


if __name__ == "__main__":
    run_script(write_report, parse_args)
