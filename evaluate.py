"""Evaluation: the paper's six benchmarks, three about the order of frames, any file of records.

    python evaluate.py @toy/evaluate.args --model toy/sft --output toy/eval_sft \
        --order ordered shuffled
    deepspeed evaluate.py --model Qwen/Qwen2.5-VL-7B-Instruct --output eval \
        --benchmark mmvu=eval_mmvu.json mvbench=MVBench/records.json --compare paper
    python evaluate.py --diff eval_sft eval_tgrpo       # ordered, shuffled and the gap in one table
    python evaluate.py --diff eval_sft/mmvu_16_ordered.json eval_tgrpo/mmvu_16_ordered.json
    python evaluate.py --judge eval/mmvu_16_ordered.json --output eval \
        --model Qwen/Qwen2.5-VL-72B-Instruct --api_base http://localhost:8000/v1

NAME=FILE is a file of records. If NAME is in BENCHMARKS, it is scored as that benchmark: give the
released eval_*.json, or the output of `build_data.py convert`. Scores:

    score      the benchmark's own. "mean of types" and "mean of tasks" are means of the means of
               each problem type or task. VSI-Bench's numbers count by mra, or by mra_released in
               "mean of types". The easy, medium and hard forms of a task are one task
    text, video, group score  share of Vinoground's pairs with both text answers, both video
               answers, or all four right
    accuracy   mean accuracy reward; regression counts by its graded reward, not by MRA
    correct    share of responses with an accuracy reward >= --correct_threshold
    mra        mean relative accuracy as VSI-Bench defines it, in exact fractions ("mra (exact)"),
               0.2 to 0.3 points above VSI-Bench's float code; mra_released: by Video-R1's code
    format     share of well-formed responses;  truncated: share cut off at --max_new_tokens
    tokens     mean length of a response, end token included
    reflections  mean number of phrases such as "wait" or "let me check" in a response
    drop       score with ordered frames minus this score, over records answered in both orders

Each has a 95 % interval by bootstrap over images and videos, because questions share them
(Vinoground's pair scores: over pairs). Questions with an unreadable file are skipped and listed.
Every score is printed with the number of records answered. In a table of both orders, it is the
number for ordered frames.

--order changes the frames, to show what a score depends on: the order of frames (shuffled,
reversed), motion (single_frame repeats the middle frame) or pixels (blind makes frames grey).
The prompt's text, length and timing stay the same. A video question of Vinoground joins two clips.
If they are reversed, the answer can stay right, so use shuffled. With --judge, a large model
decides which questions need temporal reasoning, and which responses use it (Figure 6).

Each rank answers a share of the questions. A server (--api_base) gets pictures without timing, so
its scores differ from those of the same model on this machine. All ranks write to one --output:
`<name>_<frames>_<order>.rank<r>.jsonl` (a row for each response), `<name>_<frames>_<order>.json`
(the result: scores, settings, graded rows, skipped questions) and `<result>.judge.json`
(verdicts). The same command continues an interrupted run, on any number of ranks.

Shapes: B records of a batch, L tokens, T frames, C channels, H x W pixels, n rows, M files,
K groups, R resamples.
"""
import argparse
import hashlib
import json
import os
import re
import time
from collections import Counter, defaultdict
from fractions import Fraction
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from annotate import (Generator, add_generation_flags, collect_responses, configuration_of,
                      prepare, read_rows, refuse_repeated_ids)
from build_data import (ASSETS, FlagParser, InputError, above, add_machine_flags, add_media_flags,
                        as_in_file, benchmark_facts, load_records, make_folder_of, markdown,
                        provenance, read_file, record_seed, refuse_absent_media, run_script,
                        seeded_generator, shuffle_frames, subject_groups, write_whole)
from rewards import (accuracy_reward, extract_answer, format_reward, multiple_choice, numerical,
                     parse_number)

ORDERS = ("ordered", "shuffled", "reversed", "single_frame", "blind")
GREY = 128  # the middle of 0 to 255


def parse_args(argv=None):
    parser = FlagParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    # what to do: one of three
    what = parser.add_mutually_exclusive_group(required=True).add_argument
    what("--benchmark", type=named_file, nargs="+", metavar="NAME=FILE",
         help=f"a file of records and a name for its results; benchmarks: {[*BENCHMARKS]}")
    what("--judge", nargs="+", metavar="RESULT", help="result files that --model judges")
    what("--diff", nargs=2, metavar=("A", "B"),
         help="compare two --output folders, or two result files question by question")
    add("--compare", choices=("paper",), help="print the paper's Table 1 beside these results")
    add("--model", help="Hugging Face directory or name of the model to evaluate, or to judge with")
    add("--output", help="folder for rows and results; what it lacks is added")
    add("--limit", type=above(0, int), metavar="N", help="only the first N questions of each "
        "benchmark, as a trial; without it the same command adds the others")
    # what the model sees, and how it answers
    add("--frames", type=above(0, int), nargs="+", default=[16, 32, 64],
        help="most frames of a video; one result for each number")
    add("--order", choices=ORDERS, nargs="+", default=["ordered"],
        help="order of the frames; one result for each")
    add("--correct_threshold", type=float, default=0.5,
        help="smallest accuracy reward of a correct response")
    add_media_flags(add, max_frames=None, max_pixels=256 * 28 * 28)
    add_generation_flags(add, temperature=0.01, top_p=0.001, max_new_tokens=1024)
    add_machine_flags(add)
    parser.set_defaults(samples=1)
    args = parser.parse_args(argv)
    if not (args.diff or args.model and args.output):
        parser.error("--model and --output are needed, except with --diff")
    if min(args.frames) < args.min_frames:
        parser.error(f"--frames {min(args.frames)} is below --min_frames {args.min_frames}")
    return args


def named_file(text):
    """Returns the text, or raises ArgumentTypeError if it is not NAME=FILE."""
    if not re.fullmatch(r"[\w.-]+=.+", text):
        raise argparse.ArgumentTypeError(
            f"{text} is not NAME=FILE with a name of letters, digits, '_', '.' and '-'")
    return text


# ------------------------------------------------------------- how benchmarks are scored

class Overall(NamedTuple):
    """Defines one number for a benchmark: a mean over rows, groups or pairs."""
    metric: str  # the field to average; a row without it: the accuracy reward
    by: str = ""  # a kind of group: average the means of these groups, not rows
    pairs: tuple[str, ...] = ()  # tasks: average pairs; one is right if all its answers are

    def score(self, row):
        return row.get(self.metric, row["accuracy"])


class Benchmark(NamedTuple):
    """Describes a benchmark."""
    title: str
    size: int                     # number of questions; 0: any
    overalls: dict[str, Overall]  # its score: the first with groups of the records


PLAIN = {"all": Overall("accuracy")}
BY_TASK = {"mean of tasks": Overall("accuracy", "task"), **PLAIN}
OVERALLS = {
    "vsibench": {"mean of types (the paper's)": Overall("mra_released", "problem_type"),
                 "mean of tasks": Overall("mra", "task")},  # the benchmark's own, exact
    "videommmu": {"all": Overall("contains")},
    "mvbench": BY_TASK, "tvbench": BY_TASK,
    "vinoground": {"group score": Overall("accuracy", pairs=("text", "video")),
                   "text score": Overall("accuracy", pairs=("text",)),
                   "video score": Overall("accuracy", pairs=("video",)), **PLAIN},
}
BENCHMARKS = {name: Benchmark(facts["title"], facts["size"], OVERALLS.get(name, PLAIN))
              for name, facts in benchmark_facts().items()}
RECORDS = Benchmark("a file of records", 0, PLAIN)


def released_groups(name, row):
    """Returns the groups of a record of a released eval_*.json, {kind: name}. If no field names the
    task, problem_id does: VideoMMMU's tracks and MVBench's tasks have equally many rows each."""
    facts, number = benchmark_facts()[name], row["problem_id"]
    folders, rows_a_task = facts.get("folders", {}), facts.get("rows_a_task", 0)
    tasks = sorted(facts.get("tasks", folders))
    task = str(row.get("original_question_type", "")).lower().replace(" ", "_")
    if task not in tasks:
        numbered = isinstance(number, int) and 0 < number <= rows_a_task * len(tasks)
        task = tasks[(number - 1) // rows_a_task] if numbered else None
        roots = {folder.split("/")[0] for folder in folders.values()}
        if roots.intersection(Path(row["path"]).parts) - {folders.get(task, "").split("/")[0]}:
            task = None  # the folder belongs to another task: the rows were renumbered
    groups = {"track" if name == "videommmu" else "task": task}
    groups |= {field: row.get(field) for field in facts.get("groups", ())}
    if "subjects" in facts:
        groups |= subject_groups(row["path"], facts["subjects"])
    return {kind: group for kind, group in groups.items() if group}


# ------------------------------------------------------------------------------ scores

MRA_PERCENT = range(50, 100, 5)  # VSI-Bench's theta, .50, .55, ..., .95, in exact integers
RESAMPLES = 1000  # of the bootstrap
INTERVAL = (2.5, 97.5)  # percentiles that enclose 95 % of the resampled means
LEVELS = re.compile("_(easy|medium|hard)$")  # VSI-Bench averages these into one task
METRICS = {  # factor in printed tables (100: percent); 0: only in the result file
    "score": 100, "accuracy": 100, "correct": 0, "mra": 100, "mra_released": 0, "format": 100,
    "truncated": 100, "tokens": 1, "reflections": 1, "drop": 100}
# "wait" counts as an ordinary verb too
REFLECTION = re.compile(r"\b(?:wait|hmm+|on second thought|let(?:'s| me| us) (?:re-?|double[- ])?"
                        r"(?:check|verify|consider|examine|read))\b", re.IGNORECASE)


def mean_relative_accuracy(predicted, truth) -> float:
    """Returns MRA: the share of theta in {.50, .55, ..., .95} with |p - g| / |g| <= 1 - theta.

    p and g are numbers or text. A text that is no number scores 0. If g is 0, only p = 0 scores.
    Fractions are exact: in floats 1 - .9 < .1, and p = 9, g = 10 would miss a threshold.
    Source: VSI-Bench (Yang et al. 2024).

    >>> [mean_relative_accuracy(p, g) for p, g in ((1, 2), ("9 m", "10"), (4, 10), ("many", 3))]
    [0.1, 0.9, 0.0, 0.0]
    """
    p, g = (parse_number(x) if isinstance(x, str) else x for x in (predicted, truth))
    if p is None or g is None:
        return 0.0
    p, g = Fraction(str(p)), Fraction(str(g))
    if g == 0:
        return float(p == 0)
    error = abs(p - g) / abs(g)
    return sum(100 * error <= 100 - theta for theta in MRA_PERCENT) / len(MRA_PERCENT)


def released_relative_accuracy(predicted, truth) -> float:
    """Returns MRA by the paper's released code: a strict <, in float32, with 1e-8 added to g.

    >>> released_relative_accuracy("1", "2"), mean_relative_accuracy("1", "2")
    (0.0, 0.1)
    """
    p, g = parse_number(predicted), parse_number(truth)
    if p is None or g is None:
        return 0.0
    p, g, theta = torch.tensor(p), torch.tensor(g), torch.arange(0.5, 0.975, 0.05)  # float32
    return round(((p - g).abs() / (g.abs() + 1e-8) < 1 - theta).double().mean().item(), 1)


def open_answer(predicted, truth) -> float:
    """Returns VideoMMMU's grade of an open question, 0 or 1. A number must be equal to two
    decimals, a letter must be equal, another text must occur in the answer. If the truth is a
    list, one item is enough.

    >>> [open_answer(*pair) for pair in (("24/7", "['24/7', '3.429', '3.43]"), ("17", "['7']"),
    ...                                  ("Net income.", "net income"), ("I cannot say", "A"))]
    [1.0, 0.0, 1.0, 0.0]
    """
    def matches(item):
        if re.fullmatch("[A-Za-z]", item):
            return multiple_choice(predicted, item)
        if parse_number(item) is not None:
            return numerical(predicted, item)
        return float(item.lower() in predicted.lower())
    if not re.match(r"""\[.*['"]""", truth):
        return matches(truth)
    # the list's quotes are not always paired
    items = re.split(r"""['"],\s*['"]?|,\s*['"]""", truth.strip("[]'\" "))
    return max(map(matches, filter(None, items)), default=0.0)


def bootstrap_mean(values, files, seed, cells=None):
    """Returns (mean, low, high): the mean of n values and its 95 % bootstrap interval over files.

    values[i] belongs to files[i] and, if given, to the group cells[i]. With groups, the mean is the
    mean of their means; groups that differ only in LEVELS count as one. A resample draws M files
    with replacement, each with all its values. If M is 1, low and high are None. If files are few
    or values equal, the interval is too narrow.

    >>> bootstrap_mean([1.0, 1.0, 0.0], ["a", "a", "a"], seed=0, cells=["s", "s", "t"])
    (0.5, None, None)
    """
    names, cell = np.unique(cells or [""] * len(values), return_inverse=True)  # (K,), (n,)
    _, file = np.unique(files, return_inverse=True)  # (n,)
    sums, counts = np.zeros((2, file.max() + 1, len(names)))  # (M, K) each
    np.add.at(sums, (file, cell), values)
    np.add.at(counts, (file, cell), 1)
    tasks = [LEVELS.sub("", name) for name in names]
    weights = np.array([1 / tasks.count(task) for task in tasks])  # (K,)

    def statistic(sums, counts):  # (..., K) each -> (...)
        present = weights * (counts > 0)  # a resample may leave a cell empty
        return (sums / np.maximum(counts, 1) * present).sum(-1) / present.sum(-1)

    mean, M = float(statistic(sums.sum(0), counts.sum(0))), len(sums)
    if M == 1:
        return mean, None, None
    drawn = np.random.default_rng(seed).multinomial(M, np.full(M, 1 / M), RESAMPLES)  # (R, M)
    low, high = np.percentile(statistic(drawn @ sums, drawn @ counts), INTERVAL)
    return mean, float(low), float(high)


def grade(records, rows, threshold):
    """Returns graded rows of the records with an output in `rows`, {problem_id as text: row}."""
    keys = ("problem_id", "data_source", "problem_type", "path", "problem", "options", "solution",
            "groups", "pair", "output", "tokens", "truncated", "size", "prompt_tokens")
    graded = []
    for record in records:
        both = record | rows.get(str(record["problem_id"]), {})
        if "output" not in both:
            continue
        output, truth = both["output"], extract_answer(record["solution"])
        prediction, form = extract_answer(output), format_reward(output)
        accuracy = accuracy_reward(output, record)
        row = {key: both[key] for key in keys if key in both} | {
            "prediction": prediction, "accuracy": accuracy, "correct": accuracy >= threshold,
            "format": form, "reward": accuracy + form,
            "reflections": len(REFLECTION.findall(output))}
        if record["problem_type"] in ("free-form", "numerical"):
            row["contains"] = open_answer(prediction, truth)
        if record["problem_type"] == "regression":
            row["mra"] = mean_relative_accuracy(prediction, truth)
            row["mra_released"] = released_relative_accuracy(prediction, truth)
        graded.append(row)
    return graded


def groups_of(record):
    """Returns the groups of a record or a graded row, {kind: name}."""
    return {"problem_type": record["problem_type"], **record.get("groups", {
        "data_source": str(record.get("data_source"))})}


def score_pairs(rows, tasks):
    """Returns one row per pair with all its questions, two of each of `tasks`, among the rows. The
    pair is right if all of them are."""
    pairs = defaultdict(list)
    for row in rows:
        if groups_of(row).get("task") in tasks:
            pairs[row.get("pair")].append(row.get("accuracy"))  # None if not graded
    return [{"problem_id": pair, "path": pair, "accuracy": all(accuracies)}
            for pair, accuracies in pairs.items() if len(accuracies) == 2 * len(tasks)]


def with_score(rows, overall, ordered):
    """Returns rows with their score and the drop from that of the same question in `ordered`."""
    scored = [row | {"score": overall.score(row)} for row in rows]
    ordered_rows = {str(row["problem_id"]): row for row in ordered}
    for row in scored:
        if same := ordered_rows.get(str(row["problem_id"])):
            row["drop"] = overall.score(same) - row["score"]
    return scored


def measure(rows, metrics, seed, by=""):
    """Returns {metric: {"mean", "low", "high", "n"}} over rows with the metric. by: see Overall."""
    found = {}
    for metric in metrics:
        if having := [row for row in rows if metric in row]:
            cells = [groups_of(row)[by] for row in having] if by else None
            mean, low, high = bootstrap_mean([row[metric] for row in having],
                                             [row["path"] for row in having], seed, cells)
            found[metric] = {"mean": mean, "low": low, "high": high, "n": len(having)}
    return found


def score(records, graded, seed, overalls=PLAIN, ordered=()):
    """Returns {group: {"answered", "records", and measure's result}}.

    The groups are the overalls over pairs or over a kind of group that all records have, then
    "all", then each "<kind>: <name>" of groups_of.
    """
    usable = {name: overall for name, overall in overalls.items()
              if not overall.by or all(overall.by in groups_of(record) for record in records)}
    scores = {}
    for name, overall in usable.items():
        if overall.by or overall.pairs:
            whole, answered, before = (score_pairs(rows, overall.pairs) if overall.pairs else rows
                                       for rows in (records, graded, ordered))
            scores[name] = {"answered": len(answered), "records": len(whole), **measure(
                with_score(answered, overall, before), ("score", "drop"), seed, overall.by)}

    def labels(record):
        return ["all", *(f"{kind}: {name}" for kind, name in groups_of(record).items())]
    members = defaultdict(list)
    for row in with_score(graded, next(iter(usable.values())), ordered):
        for label in labels(row):
            members[label].append(row)
    for label, count in Counter(label for record in records for label in labels(record)).items():
        scores[label] = {"answered": len(members[label]), "records": count,
                         **measure(members[label], METRICS, seed)}
    return scores


# ------------------------------------------------------------------------------ tables

GROUPS_SHOWN = 30  # kinds with more groups are only in the result file


def cell(value, unit=100):
    """Returns a metric of measure's result as text, "62.5 [60.1, 64.9]"; "" for None."""
    if not value:
        return ""
    shown = [f"{value[key] * unit:.1f}" for key in ("mean", "low", "high")
             if value[key] is not None]
    return shown[0] if len(shown) == 1 else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def shown_groups(scores, benchmark=""):
    """Returns {group: its title in tables}, and a line for each kind of group that is not shown.

    The benchmark's overalls come first. "data_source: toy/end" of the benchmark toy is "end".
    """
    kinds = Counter(group.partition(":")[0] for group in scores)
    hidden = [kind for kind, count in kinds.items() if count > GROUPS_SHOWN]
    groups = sorted((group for group in scores if group.partition(":")[0] not in hidden),
                    key=lambda group: (": " in group, group == "all", group))
    return ({group: group.removeprefix(f"data_source: {benchmark}/") for group in groups},
            [f"({kinds[kind]} groups by {kind}: not shown)" for kind in hidden])


def model_and_order(result):
    """Returns a result's heading in a table."""
    return f"{result['arguments']['model']} ({result.get('order')})"


def table(title, scores, benchmark=""):
    """Returns one result's scores as the lines of a Markdown table."""
    units = {metric: unit for metric, unit in METRICS.items() if unit and metric in scores["all"]}
    if all(row.get("score") == row.get("accuracy") for row in scores.values()):
        units.pop("score", None)
    groups, hidden = shown_groups(scores, benchmark)
    rows = [[name, f"{scores[group]['answered']}/{scores[group]['records']}",
             *(cell(scores[group].get(metric), unit) for metric, unit in units.items())]
            for group, name in groups.items()]
    headings = ["mra (exact)" if metric == "mra" else metric for metric in units]
    return markdown([[title, "answered", *headings], *rows]).splitlines() + hidden


def summary(results, compare):
    """Returns results as the lines of a table like the paper's Table 1, with columns for other
    benchmarks. compare: adds the paper's rows. "n/N": n of N questions are answered."""
    paper, measured = read_file(ASSETS / "table1.csv"), {r["benchmark"] for r in results}
    columns = [name for name in BENCHMARKS if name in paper[0] or name in measured]
    ours = defaultdict(lambda: dict.fromkeys(columns, ""))
    for result in results:
        name, row = result["benchmark"], result["scores"][result["overall"]]
        text = cell(row.get("score"))
        size = BENCHMARKS[name].size or result["records"]
        if result["answered"] < size:
            text += f" {result['answered']}/{size}"
        if "drop" in row:
            text += f", drop {cell(row['drop'])}"
        ours[model_and_order(result), result["frames"]][name] = text.strip()
    rows = [[model, str(frames), *cells.values()]
            for (model, frames), cells in sorted(ours.items())]
    if compare:
        rows += [[f"{row['model']}, paper", row["frames"] or "-",
                  *((row[name] or "-") if name in row else "" for name in columns)]
                 for row in paper]
    heading = ["Models", "Frames", *(BENCHMARKS[name].title for name in columns)]
    return markdown([heading, *rows]).splitlines()


def comparison(folders):
    """Returns the lines of tables, after settings that differ: each group's score with ordered
    frames, with shuffled frames, and the gap. Covers the results that all --output folders have
    in both orders."""
    names = [{path.name.rpartition("_")[0] for path in Path(folder).glob(f"*_{order}.json")}
             for folder in folders for order in ("ordered", "shuffled")]
    common, lines = sorted(set.intersection(*names)), []
    if not common:
        raise InputError(f"{' and '.join(folders)} have no <name>_<frames>_shuffled.json in common"
                         ": evaluate both with --order ordered shuffled")
    for stem in common:
        pairs = [[read_result(f"{folder}/{stem}_{order}.json")
                  for order in ("ordered", "shuffled")] for folder in folders]
        groups, hidden = shown_groups(pairs[0][0]["scores"], pairs[0][0]["benchmark"])
        rows = [[f"{stem}: score, %", "answered", "model", "ordered", "shuffled", "gap"]]
        for group, name in groups.items():
            if group.startswith("problem_type"):
                continue
            for pair in pairs:
                ordered, shuffled = (result["scores"].get(group, {}) for result in pair)
                rows.append([name, ordered.get("answered", 0), pair[0]["arguments"]["model"],
                             cell(ordered.get("score")), cell(shuffled.get("score")),
                             cell(shuffled.get("drop"))])
                name = ""  # printed in the first folder's row only
        for other, _ in pairs[1:]:  # none if an evaluation compares its own orders
            lines += [f"{stem}: {line}" for line in other_settings(pairs[0][0], other)
                      if not line.startswith("model")]  # the table names the models
        lines += markdown(rows).splitlines() + hidden
    return lines


def other_settings(a, b):
    """Returns a line for each setting of result a that differs in result b."""
    return [f"{key} differs: {str(a['configuration'].get(key))[:60]} | {str(value)[:60]}"
            for key, value in b["configuration"].items() if a["configuration"].get(key) != value]


def difference(a, b):
    """Returns the changes from result a to result b as lines: settings, scores, questions."""
    if a["benchmark"] != b["benchmark"]:
        raise InputError(f"results of {a['benchmark']} and {b['benchmark']} cannot be compared: "
                         "give two of the same benchmark")
    before, after = ({str(row["problem_id"]): row for row in result["rows"]} for result in (a, b))
    old, new = ([rows[key] for key in before if key in after] for rows in (before, after))
    if not old:
        raise InputError("the results have no question in common: give two of the same records")
    lines = other_settings(a, b)
    # b's rows stand for ordered ones, so that the "drop" of a's rows is b - a
    overalls = BENCHMARKS.get(a["benchmark"], RECORDS).overalls
    of_a, of_b = (score(rows, rows, a["arguments"]["seed"], overalls, new) for rows in (old, new))
    groups, hidden = shown_groups(of_a, a["benchmark"])
    rows = [[a["benchmark"], "questions", f"A: {model_and_order(a)}", f"B: {model_and_order(b)}",
             "B - A"]]
    rows += [[name, of_a[group]["answered"], cell(of_a[group].get("score")),
              cell(of_b.get(group, {}).get("score")), cell(of_a[group].get("drop"))]
             for group, name in groups.items()]
    lines += markdown(rows).splitlines() + hidden
    lines += [f"{first['problem_id']}: {first['accuracy']:.2f} -> {second['accuracy']:.2f}, answer "
              f"{first['prediction'][:40]!r} -> {second['prediction'][:40]!r}, truth "
              f"{extract_answer(first['solution'])[:40]!r}: {first['problem'][:80]!r}"
              for first, second in zip(old, new) if first["accuracy"] != second["accuracy"]]
    return lines + [f"{len(old)} questions compared; {len(before) - len(old)} only in A, "
                    f"{len(after) - len(old)} only in B"]


# --------------------------------------------------------------------------------- data

def read_records(name, path, media_root):
    """Returns the records of a file. Adds their groups if `name` is a benchmark."""
    if Path(path).is_dir():
        raise InputError(f"{path} is a folder, not a file of records. For a benchmark's release: "
                         f"python build_data.py convert {name} {path} --out {name}.json")
    records = load_records(path, media_root)
    if name in BENCHMARKS:
        for record in records:  # convert writes groups, the released files have none
            record["groups"] = record.get("groups") or released_groups(name, record)
    return records


def read_benchmarks(args):
    """Returns the files of --benchmark, {name: records}."""
    benchmarks = {}
    for text in args.benchmark:
        name, _, path = text.partition("=")
        if name in benchmarks:
            raise InputError(f"--benchmark has two files named {name}: rename one")
        benchmarks[name] = records = read_records(name, path, args.media_root)
        refuse_repeated_ids(path, records)
        refuse_absent_media(path, records)
    return benchmarks


def reorder(vision, order, seed):
    """Returns an image or video with its frames in an order of ORDERS. Size and timing stay."""
    frames = vision.frames  # (T, C, H, W)
    if frames is None:
        grey = Image.new("RGB", vision.image.size, (GREY, GREY, GREY))
        return vision._replace(image=grey) if order == "blind" else vision
    if order == "shuffled":
        frames = shuffle_frames(frames, seeded_generator(seed))
    elif order == "reversed":
        frames = frames.flip(0)
    elif order == "single_frame":
        frames = frames[len(frames) // 2].expand_as(frames).clone()
    elif order == "blind":
        frames = torch.full_like(frames, GREY)
    return vision._replace(frames=frames)


def prompt_of(processor, args, order, record):
    """Returns prepare's sample of a record, with its frames in an order of ORDERS."""
    seed = record_seed(args.seed, record)
    return prepare(processor, args, record, partial(reorder, order=order, seed=seed))


# ------------------------------------------------------------- answers, and what a run leaves

def row_of(sample, responses, seconds):
    """Returns the row of a sample's only response."""
    (text, tokens, truncated), = responses
    row = {"problem_id": sample["record"]["problem_id"], "output": text, "truncated": truncated,
           "seconds": seconds, "size": sample["size"]}
    if tokens is not None:  # some servers omit it
        row["tokens"] = tokens
    return row if "messages" in sample else row | {
        "prompt_tokens": sample["inputs"]["input_ids"].shape[1]}


def hash_of(value):
    """Returns a hash of JSON data, the same for any order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def plan(args, benchmarks, shared):
    """Returns [(name, records, configuration), ...] for each benchmark and number of frames. Raises
    InputError if --output has rows of another configuration."""
    tasks = []
    for (name, records), frames in product(benchmarks.items(), dict.fromkeys(args.frames)):
        digest = hash_of([as_in_file(record) for record in records])
        configuration = shared | {"frames": frames, "records_sha256": digest}
        for order in ORDERS:  # all, because results are compared
            read_rows(args.output, f"{name}_{frames}_{order}", configuration)
        tasks.append((name, records[:args.limit], configuration))
    return tasks


def write_result(args, name, order, records, configuration, rows):
    """Writes <name>_<frames>_<order>.json from the rows in --output, and prints its scores."""
    benchmark, frames = BENCHMARKS.get(name, RECORDS), configuration["frames"]
    stem = f"{name}_{frames}_{order}"
    keys = [str(record["problem_id"]) for record in records]
    rows = {key: rows[key] for key in keys if key in rows}  # of the records within --limit
    graded, ordered = grade(records, rows, args.correct_threshold), []
    if order != "ordered":
        ordered = grade(records, read_rows(args.output, f"{name}_{frames}_ordered", configuration),
                        args.correct_threshold)
    scores = score(records, graded, args.seed, benchmark.overalls, ordered)
    skipped = [row for row in rows.values() if "reason" in row]
    result = {"benchmark": name, "frames": frames, "order": order,
              "overall": next(iter(scores)), "scores": scores,
              "answered": len(graded), "records": len(records),
              "tokens": sum(row.get("tokens", 0) for row in rows.values()),
              "rank_seconds": sum(row.get("seconds", 0) for row in rows.values()),
              "skipped": skipped, "arguments": vars(args), "configuration": configuration,
              "world_size": dist.get_world_size(),
              "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
              **provenance(), "rows": graded}
    write_whole({f"{args.output}/{stem}.json": [json.dumps(result, indent=1)]})
    print("\n".join(table(f"{stem}: {args.model}", scores, name)))
    if benchmark.size not in (0, len(records)):
        print(f"{name}: {len(records)} questions; {benchmark.title} has {benchmark.size}")
    if skipped:
        print(f"skipped {len(skipped)}, listed in {args.output}/{stem}.json; the first: "
              f"{skipped[0]['reason']}")


def read_result(path):
    """Returns the result in a file of write_result, or raises InputError."""
    result = read_file(Path(path))
    if not isinstance(result, dict) or not {"benchmark", "configuration", "rows"} <= result.keys():
        raise InputError(f"{path} is not a result, <name>_<frames>_<order>.json of an --output")
    return result


# ------------------------------------------------------------------------------- the judge

# This project's own wording: the paper shows its prompt only as a picture (Figure 12).
JUDGE_QUESTION = """\
Below is a question about a video. Does answering it need temporal reasoning: comparing different \
moments of the video, such as the order of events, the direction or speed of a motion, a change, \
a repeated action, or cause and effect? A question that one well-chosen frame answers does not.

{question}

Reply with one word: yes or no."""
JUDGE_RESPONSE = """\
Below are a question about a video and a response to it. Does the response use temporal \
reasoning: does it describe different moments of the video and reach its answer by their order, \
change or motion? Naming objects or describing one scene is not enough, and whether the answer is \
right does not matter.

{question}

Response: {output}

Reply with one word: yes or no."""


def verdict(text):
    """Returns True if the judge's reply, after its thought, is yes, False if it is no, else None.

    >>> [verdict(text) for text in ("<think>no?</think>Yes.", "**no**", "It depends: yes and no")]
    [True, False, None]
    """
    words = set(re.findall(r"[a-z]+", text.rpartition("</think>")[2].lower())) & {"yes", "no"}
    return words == {"yes"} if len(words) == 1 else None


def judge_prompt_of(processor, record):
    """Returns the judge's sample of a record: a text without image or video."""
    content = [{"type": "text", "text": record["judge_prompt"]}]
    sample, messages = {"record": record, "size": []}, [{"role": "user", "content": content}]
    if processor is None:
        return sample | {"messages": messages}
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    return sample | {"inputs": dict(processor(text=[prompt], return_tensors="pt"))}


def verdicts(generator, configuration, stem, prompt, rows):
    """Returns {problem_id as text: verdict} for a result's rows. Undecided and truncated ones are
    left out."""
    records = []
    for row in rows:
        question = "\n".join([row["problem"], *(row.get("options") or [])])
        text = prompt.format_map({"question": question, "output": row["output"]})
        records.append({"problem_id": row["problem_id"], "path": row["path"], "judge_prompt": text})
    configuration = configuration | {"records_sha256": hash_of(records)}
    replies = collect_responses(generator, generator.args.output, stem, records, configuration,
                                partial(judge_prompt_of, generator.processor), row_of)
    found = {key: verdict(row["output"]) for key, row in replies.items()
             if "output" in row and not row["truncated"]}  # a part of a thought is no verdict
    return {key: value for key, value in found.items() if value is not None}


def judge(generator, configuration, path):
    """Judges a result file, writes <stem>.judge.json, and returns [{"uses", "path"}, ...]: for each
    question that needs temporal reasoning, whether its response uses it."""
    rows = {str(row["problem_id"]): row for row in read_result(path)["rows"]}
    args, stem = generator.args, Path(path).stem
    needs = verdicts(generator, configuration, f"{stem}.questions", JUDGE_QUESTION, rows.values())
    needed = [row for key, row in rows.items() if needs.get(key)]
    uses = verdicts(generator, configuration, f"{stem}.responses", JUDGE_RESPONSE, needed)
    found = [{"uses": value, "path": rows[key]["path"]} for key, value in uses.items()]
    if generator.rank == 0:
        print(f"{stem}: {len(rows)} questions answered, {len(needs)} judged, {len(needed)} need "
              "temporal reasoning")
        write_whole({f"{args.output}/{stem}.judge.json": [json.dumps({
            "questions": len(rows), "judged": len(needs), "needs": len(needed),
            "uses": measure(found, ["uses"], args.seed).get("uses"), "judge": args.model,
            "configuration": configuration, "prompts": [JUDGE_QUESTION, JUDGE_RESPONSE],
            **provenance(),
            "rows": [{"problem_id": row["problem_id"], "needs": needs[key], "uses": uses.get(key)}
                     for key, row in rows.items() if key in needs]}, indent=1)]})
    return found


# ---------------------------------------------------------------------------------- main

def main(args):
    if args.diff:
        folders = all(map(os.path.isdir, args.diff))
        print("\n".join(comparison(args.diff) if folders else
                        difference(*map(read_result, args.diff))))
        return
    # --------------------------------------------- inputs, checked before a model is loaded
    make_folder_of(Path(args.output) / "rows")
    benchmarks = {} if args.judge else read_benchmarks(args)
    for path in args.judge or ():
        read_result(path)
    generator = Generator(args)
    shared = configuration_of(generator)
    tasks = plan(args, benchmarks, shared)

    # ------------------------------------------------------------------------------ verdicts
    if args.judge:
        uses = [row for path in args.judge for row in judge(generator, shared, path)]
        if generator.rank == 0:  # the number of Figure 6
            share = cell(measure(uses, ["uses"], args.seed).get("uses"))
            print(f"temporal reasoning in {share or '-'} % of {len(uses)} responses to questions "
                  "that need it")
        return

    # ---------------------------------------------------------------- answers, then scores
    orders = [order for order in ORDERS if order in args.order]  # ordered first, for the drop
    for (name, records, configuration), order in product(tasks, orders):
        frames = configuration["frames"]
        limits = argparse.Namespace(**vars(args), max_frames=frames)
        rows = collect_responses(
            generator, args.output, f"{name}_{frames}_{order}", records, configuration,
            partial(prompt_of, generator.processor, limits, order), row_of)
        if generator.rank == 0:
            write_result(args, name, order, records, configuration, rows)
    if generator.rank == 0:
        shown = "|".join({"ordered", *orders})
        names = re.compile(rf"({'|'.join(BENCHMARKS)})_\d+_({shown})[.]json")
        results = [read_result(path) for path in Path(args.output).iterdir()
                   if names.fullmatch(path.name)]
        if results or args.compare:
            print("\n".join(summary(results, args.compare)))
        elif {"ordered", "shuffled"} <= {*orders}:
            print("\n".join(comparison([args.output])))


if __name__ == "__main__":
    run_script(main, parse_args)
