"""Compares forms of the temporal reward at toy scale, over several seeds.

    python build_data.py toy --out toy
    python build_data.py toy --out toy_shortcut --shortcut
    python tests/ablate.py run           # hours; the same command skips what is finished
    python tests/ablate.py table         # tests/ablations.md, from tests/ablations/*.json

`run` makes one cold start per seed. From it, it trains each of CONFIGS in each of SETTINGS, and
evaluates every model on ordered and on shuffled frames. Each diff in tests/variants/ is a
configuration: a copy of tgrpo.py to which git has applied the diff.

    OUT/variants/margin/tgrpo.py             the changed copies
    OUT/seed0/sft  OUT/seed0/plain/tgrpo     models, their metrics.jsonl, and in eval/ their scores
    OUT/seed0/sft.log ...                    what the commands printed
    OUT.json                                 all finished runs, from their eval/summary.json

tests/ablations.md says what a seed sets. Other flags are those of the toy's args files. To use more
cores, start the command again with other seeds and the same --out.
"""
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from itertools import chain, product
from operator import itemgetter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from build_data import (FlagParser, InputError, above, at_least, make_folder_of,  # noqa: E402
                        markdown, read_file, run_script, write_whole)

DIFFS = ROOT / "tests/variants"
VARIANTS = {path.stem: path for path in sorted(DIFFS.glob("*.diff"))}
# name: description, extra flags of tgrpo.py, diffs to apply one after the other
CONFIGS = {
    "grpo": ("GRPO: no temporal reward", "--alpha 0", []),
    "grpo_unscaled": ("GRPO, unscaled advantages", "--alpha 0 --scale_advantages none", []),
    "tgrpo": ("T-GRPO as written", "", []),
    "strict": ("the strict test, p > p_tilde", "--temporal_test gt", []),
    "advantage": ("temporal reward in the advantage", "--temporal_to advantage", []),
    **{name: (path.read_text(encoding="utf-8").splitlines()[0].strip("# ."), "", [name])
       for name, path in VARIANTS.items()},  # described by their first lines
    "likelihood_1": ("likelihood, alpha 1", "--alpha 1", ["likelihood"]),
    "likelihood_2": ("likelihood, alpha 2", "--alpha 2", ["likelihood"]),
    "centred": ("likelihood, alpha 1, centred", "--alpha 1", ["likelihood", "likelihood/centred"]),
    "thought": ("likelihood, alpha 1, of the thought", "--alpha 1",
                ["likelihood", "likelihood/thought"]),
    "opposite": ("likelihood, alpha 1, against reversed frames", "--alpha 1",
                 ["likelihood", "reversed"]),
    "opposite_centred": ("likelihood, alpha 1, against reversed frames, centred", "--alpha 1",
                         ["likelihood", "likelihood/centred", "reversed"]),
    "unscaled": ("as opposite_centred, unscaled advantages", "--alpha 1 --scale_advantages none",
                 ["likelihood", "likelihood/centred", "reversed"])}
BASE = "grpo"  # every other configuration is compared with it
# name: suffix of the folder with the training questions, description
SETTINGS = {
    "plain": ("", "The toy as it is: a telling colour is wrong in half of the direction questions"),
    "shortcut": ("_shortcut", "With a shortcut: in training, a telling colour is always right")}
# measure in the results file: heading; tests/ablations.md explains them
MEASURES = {"ordered": "ordered, %", "shuffled": "shuffled, %", "gap": "gap",
            "order": "needs order, %", "static": "does not, %", "conflict": "conflict, %",
            "agree": "agree, %", "tokens": "tokens", "watch_conflict": "watch, %"}
COMPARED = ("ordered", "gap", "order", "conflict")  # measures in the tables of differences
# The same for the tables of how thoughts change in training, see development()
DEVELOPMENT = {"watch": "watch, %", "d_watch": "d of watch, nats", "d_look": "d of look, nats"}
ORDERS = ("ordered", "shuffled")
SUMMARY = "eval/summary.json"  # a finished run's line of the results file, in the run's folder
# Kinds of questions of build_data.py's toy that need the order of the frames
ORDER_KINDS = ("direction_agree", "direction_conflict", "describe", "first", "end")
# In the toy's thoughts: which of two it is, and that it is of a direction
WATCH, DIRECTION = "watch:", ", so "
# Student's t that leaves 2.5 % on either side, for 1, 2, ... degrees of freedom
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
        2.145, 2.131)


def parse_args(argv=None):
    parser = FlagParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="cold starts, runs, evaluations; skips finished ones")
    run.add_argument("--toy", default="toy", help="the toy's folder; TOY_shortcut has --shortcut")
    run.add_argument("--out", default="toy/ablations", help="folder of the runs")
    run.add_argument("--seeds", type=above(0, int), default=8, help="how many seeds")
    run.add_argument("--first_seed", type=at_least(0, int), default=0, help="the first of them")
    run.add_argument("--steps", type=above(0, int), default=100, help="steps of every T-GRPO run")
    run.add_argument("--only", nargs="+", metavar="NAME", choices=CONFIGS, default=list(CONFIGS),
                     help=f"these of {', '.join(CONFIGS)}; the cold starts too")
    run.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS),
                     help="these only")
    table = commands.add_parser("table", help="all results as Markdown")
    table.add_argument("--results", default=ROOT / "tests/ablations", type=Path,
                       help="folder of results files; the tables are written to FOLDER.md")
    run.set_defaults(function=run_all)
    table.set_defaults(function=write_table)
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------- running

def steps_of(args, seed, run) -> list[tuple]:
    """Returns the training and the evaluation of a run: (command, the last file that it writes).
    run: its folder in that of the seed, "sft" or SETTING/NAME."""
    model = Path(args.out, f"seed{seed}", run)
    train = ["--seed", seed, "--output", model, "--resume", "--val_steps", 0]
    if run == "sft":
        train = [ROOT / "sft.py", f"@{args.toy}/sft.args", *train]
    else:
        setting, name = run.split("/")
        _, flags, diffs = CONFIGS[name]
        folder = Path(args.out, "variants", name) if diffs else ROOT
        train = [folder / "tgrpo.py", f"@{args.toy}{SETTINGS[setting][0]}/tgrpo.args", *train,
                 "--model", f"{args.out}/seed{seed}/sft", "--max_steps", args.steps,
                 "--num_workers", 1, *flags.split()]
    evaluate = [ROOT / "evaluate.py", f"@{args.toy}/evaluate.args", "--model", model,
                "--output", model / "eval", "--order", *ORDERS]
    return [(train, model / "config.json"), (evaluate, model / f"eval/toy_8_{ORDERS[-1]}.json")]


def make_variant(out, name) -> Path:
    """Writes the copy of tgrpo.py with a configuration's diffs. Raises InputError if the folder has
    another copy, since its runs would be mixed with this one's."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(ROOT / "tgrpo.py", folder)
        done = subprocess.run(
            ["git", "apply", *(DIFFS / f"{diff}.diff" for diff in CONFIGS[name][2])], cwd=folder,
            env={**os.environ, "GIT_CEILING_DIRECTORIES": tempfile.gettempdir()},  # no repository
            stderr=subprocess.PIPE, text=True)
        changed = Path(folder, "tgrpo.py").read_text(encoding="utf-8")
    if done.returncode:
        raise InputError(f"the diffs of {name} do not fit tgrpo.py: {done.stderr}")
    script = Path(out, "variants", name, "tgrpo.py").resolve()
    if script.exists() and script.read_text(encoding="utf-8") != changed:
        raise InputError(f"{out} has runs of another {name}: its diffs or tgrpo.py have changed. "
                         "Name another --out")
    make_folder_of(script)
    write_whole({script: [changed]})
    return script


def run_all(args):
    """Runs every configuration in every setting with every seed; skips what is finished."""
    for name in args.only:
        if CONFIGS[name][2]:
            make_variant(args.out, name)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    for seed, run in product(seeds, ["sft", *map("/".join, product(args.settings, args.only))]):
        folder = Path(args.out, f"seed{seed}", run)
        make_folder_of(folder)
        for command, result in steps_of(args, seed, run):
            if not result.exists():
                call(command, folder.with_name(f"{folder.name}.log"), result)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        write_whole({folder / SUMMARY: [json.dumps(summary_of(folder, seed, run))]})
        write_results(args.out)
        print(f"seed {seed}, {run}: finished", flush=True)


def call(command, log, result):
    """Runs a command on one thread. Raises InputError if it fails or leaves no result."""
    with log.open("a", encoding="utf-8") as file:
        status = subprocess.run(
            [sys.executable, *map(str, command)], stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}).returncode
    if status or not result.exists():  # a training run that SIGTERM has ended exits with 0
        raise InputError(f"{command[0]} ended with status {status} and without {result}: see {log}")


# ---------------------------------------------------------------------------- results

def short(number):
    """Returns a number to 4 digits, for a small file."""
    return float(f"{number:.4g}")


def scores_of(ordered, shuffled) -> dict:
    """Returns MEASURES of a model from evaluate.py's rows; accuracies and "watch" are in %."""
    by_kind = defaultdict(list)
    for row in ordered:
        by_kind[row["data_source"].removeprefix("toy/")].append(100 * row["accuracy"])

    def score(*kinds):
        return statistics.fmean(accuracy for kind in kinds for accuracy in by_kind[kind])

    watch = [WATCH in row["output"] for row in ordered if "conflict" in row["data_source"]]
    all_ordered = score(*by_kind)
    all_shuffled = statistics.fmean(100 * row["accuracy"] for row in shuffled)
    values = (all_ordered, all_shuffled, all_ordered - all_shuffled, score(*ORDER_KINDS),
              score(*by_kind.keys() - ORDER_KINDS), score("direction_conflict"),
              score("direction_agree"), statistics.fmean(row["tokens"] for row in ordered),
              100 * statistics.fmean(watch))
    return dict(zip(MEASURES, map(short, values), strict=True))


def development(rollouts, parts=4) -> dict:
    """Returns how thoughts about a direction change over equal parts of training: {"watch": share
    of "watch" among them in %; "d_watch", "d_look": mean nats that the correct ones lose by another
    order of frames, if the configuration has d}. rollouts: the rows of rollouts.jsonl."""
    found = {name: [[] for _ in range(parts)] for name in DEVELOPMENT}
    last = max(row["step"] for row in rollouts)
    for row in rollouts:
        part = (row["step"] - 1) * parts // last
        ds = row.get("d", [None] * len(row["responses"]))
        for text, accuracy, d in zip(row["responses"], row["accuracy"], ds):
            if DIRECTION in text:
                watch = WATCH in text
                found["watch"][part].append(100 * watch)
                if d is not None and accuracy == 1:
                    found["d_watch" if watch else "d_look"][part].append(d)
    return {name: [short(statistics.fmean(values)) if values else None for values in lists]
            for name, lists in found.items()}


def summary_of(folder, seed, run) -> dict:
    """Returns a finished run as a line of the results file, with its "header"."""
    results = [read_file(folder / f"eval/toy_8_{order}.json") for order in ORDERS]
    header, *steps = read_file(folder / "metrics.jsonl")
    setting, _, name = run.rpartition("/")  # the cold start has no setting: "sft"
    skipped = sum(row["data/skipped"] for row in steps) + sum(
        len(result["skipped"]) for result in results)
    return {"setting": setting, "config": name, "seed": seed,
            **scores_of(*(result["rows"] for result in results)),
            **(development(read_file(folder / "rollouts.jsonl")) if setting else {}),
            "seconds": short(sum(row["time/step"] for row in steps)), "skipped": skipped,
            "header": header}


def write_results(out):
    """Writes OUT.json: all finished runs, of any seed, one a line."""
    # not seed*/**: there another process may be removing a checkpoint's folder
    paths = (Path(out).glob(f"{run}/{SUMMARY}") for run in ("seed*/sft", "seed*/*/*"))
    runs = sorted(map(read_file, chain.from_iterable(paths)),
                  key=itemgetter("setting", "config", "seed"))
    lengths = {run["header"]["arguments"]["max_steps"] for run in runs if run["setting"]}
    headers = [run.pop("header") for run in runs]
    versions = {package: ", ".join(sorted({header["versions"][package] for header in headers}))
                for package in headers[0]["versions"]}
    commits = sorted({header["git_commit"] or "" for header in headers})
    head = json.dumps({"versions": versions, "git_commits": commits,
                       "steps": ", ".join(map(str, sorted(lengths)))})
    lines = ",\n".join(json.dumps(run, separators=(",", ":")) for run in runs)
    write_whole({f"{out}.json": [f'{head[:-1]}, "runs": [\n{lines}\n]}}\n']})


# ------------------------------------------------------------------ statistics, tables

def standard_error(values) -> float:
    """Returns the standard error of a mean over seeds, from the unbiased variance."""
    return statistics.stdev(values) / math.sqrt(len(values))


def interval(values) -> tuple:
    """Returns the mean of two or more values, and the bounds of its 95 % interval (Student's t)."""
    middle = statistics.fmean(values)
    reach = standard_error(values) * T_95[min(len(values) - 1, len(T_95)) - 1]
    return middle, middle - reach, middle + reach


def by_seed(runs, setting, name) -> dict:
    """Returns {seed: run} of a configuration in a setting. The cold start is in every setting."""
    return {run["seed"]: run for run in runs
            if run["config"] == name and run["setting"] in ("", setting)}


def cell(values) -> str:
    """Returns mean and standard error as text; a dash if the measure is not in the results."""
    if len(values) < 2:
        return f"{values[0]:.1f} (1 seed)" if values else "-"
    return f"{statistics.fmean(values):.1f} ± {standard_error(values):.1f}"


def bounds_cell(bounds) -> str:
    """Returns a mean and its interval as text, signed."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*bounds)


def series_cell(series) -> str:
    """Returns the means over runs of a measure in each part of training, as text. series: a list of
    a value, or None, for each part, of each run."""
    parts = [[value for value in values if value is not None] for values in zip(*series)]
    return ", ".join(f"{statistics.fmean(values):.1f}" if values else "-" for values in parts)


def tables_of(results) -> str:
    """Returns tables per setting: the configurations; from two seeds on their differences to BASE;
    how thoughts change in training. Then which intervals exclude zero, and what the runs were."""
    runs, parts, compared = results["runs"], [], {}
    for setting, (_, heading) in SETTINGS.items():
        base = by_seed(runs, setting, BASE)
        means = [["configuration", *MEASURES.values(), "training, s", "seeds"]]
        differences = [[f"less `{BASE}`", *map(MEASURES.get, COMPARED), "seeds"]]
        changes = [["over training, in quarters", *DEVELOPMENT.values()]]
        for name in ["sft", *CONFIGS]:
            found = by_seed(runs, setting, name)
            if not found:
                continue
            columns = ([run[measure] for run in found.values() if measure in run]
                       for measure in MEASURES)
            seconds = min(run["seconds"] for run in found.values())
            means.append([f"`{name}`", *map(cell, columns), f"{seconds:.0f}", len(found)])
            series = [[run[key] for run in found.values() if key in run] for key in DEVELOPMENT]
            if any(series):
                changes.append([f"`{name}`", *map(series_cell, series)])
            both = found.keys() & base.keys()
            if len(both) > 1 and name not in ("sft", BASE):
                bounds = {(setting, name, measure): interval(
                    [found[seed][measure] - base[seed][measure] for seed in both])
                    for measure in COMPARED}
                compared |= bounds
                differences.append([f"`{name}`: {CONFIGS[name][0]}",
                                    *map(bounds_cell, bounds.values()), len(both)])
        if len(means) > 2:  # more than the cold start
            tables = [means, differences, *([changes] if len(changes) > 1 else [])]
            parts += [f"### {heading}", *(markdown(table).strip() for table in tables)]
    apart = [f"{setting}, `{name}`, {measure} {bounds_cell(bounds)}"
             for (setting, name, measure), bounds in compared.items()
             if bounds[1] > 0 or bounds[2] < 0]
    versions = ", ".join(f"{name} {found}" for name, found in results["versions"].items())
    parts += [f"{len(compared)} comparisons, all of them shown. If nothing differed, "
              f"{len(compared) / 20:.1f} of their 95 % intervals would be expected to exclude "
              f"zero. Those that do: {'; '.join(apart) or 'none'}.",
              f"{results['steps']} steps; commit {', '.join(results['git_commits'])}; {versions}; "
              f"one thread per run; {sum(run['skipped'] for run in runs)} questions skipped."]
    return "\n\n".join(parts)


def write_table(args):
    """Writes the tables of a folder's results files into FOLDER.md, each file below a heading of
    its name. What stands there above the first such heading stays."""
    path = args.results.with_suffix(".md")
    about = path.read_text(encoding="utf-8") if path.exists() else "# Forms of the temporal reward"
    parts = [f"## {file.stem}\n\n{tables_of(read_file(file))}"
             for file in sorted(args.results.glob("*.json"))]
    write_whole({path: ["\n\n".join([about.partition("\n## ")[0].strip(), *parts]) + "\n"]})
    print(path)


if __name__ == "__main__":
    sys.exit(run_script(lambda args: args.function(args), parse_args))
