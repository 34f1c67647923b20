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
    OUT.json                                 the results of all finished runs

A seed sets the cold start, the order of the questions and the sampling. The questions, the
untrained model and the test set are the same for all. Other flags are those of the toy's args
files. To use more cores, start the command again with other seeds and the same --out.
"""
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from build_data import (FlagParser, InputError, above, at_least, markdown, run_script,  # noqa: E402
                        write_whole)

DIFFS = ROOT / "tests/variants"
VARIANTS = {path.stem: path for path in sorted(DIFFS.glob("*.diff"))}
# name: description, extra flags of tgrpo.py, diffs to apply one after the other
SECOND_ROUND = {
    "likelihood_1": ("likelihood, alpha 1", "--alpha 1", ["likelihood"]),
    "likelihood_2": ("likelihood, alpha 2", "--alpha 2", ["likelihood"]),
    "centred": ("likelihood, alpha 1, centred", "--alpha 1", ["likelihood", "likelihood/centred"]),
    "thought": ("likelihood, alpha 1, of the thought", "--alpha 1",
                ["likelihood", "likelihood/thought"]),
    "opposite": ("likelihood, alpha 1, against reversed frames", "--alpha 1",
                 ["likelihood", "reversed"]),
    "opposite_centred": ("likelihood, alpha 1, against reversed frames, centred", "--alpha 1",
                         ["likelihood", "likelihood/centred", "reversed"]),
    "unscaled": ("the same, without dividing by the standard deviation",
                 "--alpha 1 --scale_advantages none",
                 ["likelihood", "likelihood/centred", "reversed"])}
CONFIGS = {
    "grpo": ("GRPO: no temporal reward", "--alpha 0", []),
    "tgrpo": ("T-GRPO as written", "", []),
    "strict": ("the strict test, p > p_tilde", "--temporal_test gt", []),
    "advantage": ("temporal reward in the advantage", "--temporal_to advantage", []),
    **{name: (path.read_text(encoding="utf-8").splitlines()[0].strip("# ."), "", [name])
       for name, path in VARIANTS.items()},  # described by their first lines
    **SECOND_ROUND}
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
ORDERS = ("ordered", "shuffled")
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

def all_runs(settings, names) -> list[str]:
    """The runs of a seed, as their folders are called, in the order of running."""
    return ["sft", *(f"{setting}/{name}" for setting, name in product(settings, names))]


def steps_of(args, seed, run) -> list[tuple]:
    """The steps of a run, training and evaluation: (command, the last file that it writes)."""
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
    script = Path(out, "variants", name, "tgrpo.py").resolve()
    before = script.read_bytes() if script.exists() else None
    script.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "tgrpo.py", script)
    diffs = [DIFFS / f"{diff}.diff" for diff in CONFIGS[name][2]]
    # below the ceiling git finds no repository, in whose top folder it would look for tgrpo.py
    done = subprocess.run(["git", "apply", *diffs], cwd=script.parent, text=True,
                          env={**os.environ, "GIT_CEILING_DIRECTORIES": str(script.parents[1])},
                          stderr=subprocess.PIPE)
    after = script.read_bytes()
    if done.returncode or before not in (None, after):
        script.unlink() if before is None else script.write_bytes(before)
        raise InputError(done.stderr and f"the diffs of {name} do not fit tgrpo.py: {done.stderr}"
                         or f"{out} has runs of another {name}: its diffs or tgrpo.py have "
                         "changed. Name another --out")
    return script


def run_all(args):
    """Runs every configuration in every setting with every seed; skips what is finished."""
    names = [name for name in CONFIGS if name in args.only]
    for name in names:
        if CONFIGS[name][2]:
            make_variant(args.out, name)
    for seed, run in product(range(args.first_seed, args.first_seed + args.seeds),
                             all_runs(args.settings, names)):
        folder = Path(args.out, f"seed{seed}", run)
        folder.parent.mkdir(parents=True, exist_ok=True)
        for command, result in steps_of(args, seed, run):
            if not result.exists():
                call(command, folder.with_name(f"{folder.name}.log"), result)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        write_results(args)
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
    """A number to 4 digits, for a small file."""
    return float(f"{number:.4g}")


def mean_or_none(values):
    """The mean of a list, short; None of an empty one."""
    return short(statistics.fmean(values)) if values else None


def scores_of(results) -> dict:
    """MEASURES of a model, from evaluate.py's {order: result}; accuracies and "watch" in %."""
    rows = [row | {"kind": row["data_source"].removeprefix("toy/")}
            for row in results["ordered"]["rows"]]
    kinds = {row["kind"] for row in rows}

    def score(*kinds):
        return statistics.fmean(100 * row["accuracy"] for row in rows if row["kind"] in kinds)

    ordered = score(*kinds)
    shuffled = statistics.fmean(100 * row["accuracy"] for row in results["shuffled"]["rows"])
    conflict = [row for row in rows if row["kind"] == "direction_conflict"]
    values = (ordered, shuffled, ordered - shuffled, score(*ORDER_KINDS),
              score(*kinds.difference(ORDER_KINDS)), score("direction_conflict"),
              score("direction_agree"), statistics.fmean(row["tokens"] for row in rows),
              100 * statistics.fmean(WATCH in row["output"] for row in conflict))
    return dict(zip(MEASURES, map(short, values), strict=True))


def development(path, parts=4) -> dict:
    """How thoughts about a direction change in training, from rollouts.jsonl, over equal parts of
    the run: {"watch": share of "watch" among them in %; "d_watch", "d_look": mean nats that the
    correct ones lose by another order of frames, if the configuration has d}."""
    found = []  # (step, is watch, d or None)
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        ds = row.get("d", [None] * len(row["responses"]))
        found += [(row["step"], WATCH in text, d if accuracy == 1 else None)
                  for text, accuracy, d in zip(row["responses"], row["accuracy"], ds)
                  if DIRECTION in text]
    last = max((step for step, *_ in found), default=0)
    series = {"watch": [], "d_watch": [], "d_look": []}
    for part in range(parts):
        inside = [(watch, d) for step, watch, d in found if (step - 1) * parts // last == part]
        series["watch"].append(mean_or_none([100 * watch for watch, _ in inside]))
        for name, kind in (("d_watch", True), ("d_look", False)):
            series[name].append(mean_or_none([d for watch, d in inside
                                              if watch == kind and d is not None]))
    return series


def read_run(args, seed, run) -> dict | None:
    """One run as a line of the results file, with its "header"; None if it is unfinished."""
    (_, model), (_, evaluation) = steps_of(args, seed, run)
    if not (model.exists() and evaluation.exists()):
        return None
    results = {order: json.loads((evaluation.parent / f"toy_8_{order}.json").read_text(
        encoding="utf-8")) for order in ORDERS}
    log = (model.parent / "metrics.jsonl").read_text(encoding="utf-8")
    header, *steps = map(json.loads, log.splitlines())
    setting, _, name = run.rpartition("/")  # the cold start has no setting: "sft"
    skipped = sum(row["data/skipped"] for row in steps) + sum(
        len(result["skipped"]) for result in results.values())
    changes = development(model.parent / "rollouts.jsonl") if setting else {}
    return {"setting": setting, "config": name, "seed": seed, **scores_of(results), **changes,
            "seconds": short(sum(row["time/step"] for row in steps)), "skipped": skipped,
            "header": header}


def write_results(args):
    """Writes OUT.json: all finished runs, of any seed, one a line."""
    seeds = sorted(int(path.name.removeprefix("seed")) for path in Path(args.out).glob("seed*"))
    found = [read_run(args, seed, run) for run in all_runs(SETTINGS, CONFIGS) for seed in seeds]
    runs = [run for run in found if run]
    headers = [run.pop("header") for run in runs]
    versions = {package: ", ".join(sorted({header["versions"][package] for header in headers}))
                for package in headers[0]["versions"]}
    commits = sorted({header["git_commit"] or "" for header in headers})
    lengths = {header["arguments"]["max_steps"] for run, header in zip(runs, headers)
               if run["setting"]}
    head = json.dumps({"versions": versions, "git_commits": commits,
                       "steps": ", ".join(map(str, sorted(lengths)))})
    lines = ",\n".join(json.dumps(run, separators=(",", ":")) for run in runs)
    write_whole({f"{args.out}.json": [f'{head[:-1]}, "runs": [\n{lines}\n]}}\n']})


# ------------------------------------------------------------------ statistics, tables

def standard_error(values) -> float:
    """The standard error of a mean over seeds, from the unbiased variance."""
    return statistics.stdev(values) / math.sqrt(len(values))


def interval(values) -> tuple | None:
    """Mean, and the bounds of its 95 % interval by Student's t; None with fewer than two values.

    >>> [round(bound, 2) for bound in interval([1.0, 2.0, 3.0])]  # 2 ± 4.303 / sqrt(3)
    [2.0, -0.48, 4.48]
    """
    if len(values) < 2:
        return None
    middle = statistics.fmean(values)
    reach = standard_error(values) * T_95[min(len(values) - 1, len(T_95)) - 1]
    return middle, middle - reach, middle + reach


def by_seed(runs, setting, name) -> dict:
    """{seed: run} of a configuration in a setting; the cold start is in every setting."""
    return {run["seed"]: run for run in runs
            if run["config"] == name and run["setting"] in ("", setting)}


def paired(runs, setting, name, measure) -> list:
    """A configuration's differences to BASE in a measure, over the seeds that have both."""
    ours, theirs = by_seed(runs, setting, name), by_seed(runs, setting, BASE)
    return [ours[seed][measure] - theirs[seed][measure] for seed in sorted(ours.keys() & theirs)]


def comparisons(runs) -> dict:
    """{(setting, configuration, measure): interval} of all that can be compared with BASE."""
    keys = product(SETTINGS, [name for name in CONFIGS if name != BASE], COMPARED)
    found = {key: interval(paired(runs, *key)) for key in keys}
    return {key: bounds for key, bounds in found.items() if bounds}


def cell(values) -> str:
    """Mean and standard error as text; a dash if the measure is not in the results."""
    if len(values) < 2:
        return f"{values[0]:.1f} (1 seed)" if values else "-"
    return f"{statistics.fmean(values):.1f} ± {standard_error(values):.1f}"


def bounds_cell(bounds) -> str:
    """A mean and its interval as text, signed; a dash if there are fewer than two seeds."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*bounds) if bounds else "-"


def tables_of(results) -> str:
    """Two tables per setting, each configuration and its difference to BASE; then which intervals
    exclude zero, and what the runs were."""
    runs, compared, parts = results["runs"], comparisons(results["runs"]), []
    for setting, (_, heading) in SETTINGS.items():
        means = [["configuration", *MEASURES.values(), "training, s", "seeds"]]
        differences = [[f"less `{BASE}`", *map(MEASURES.get, COMPARED), "seeds"]]
        for name in ["sft", *CONFIGS]:
            found = by_seed(runs, setting, name).values()
            if not found:
                continue
            means.append([
                f"`{name}`", *(cell([run[measure] for run in found if measure in run])
                               for measure in MEASURES),
                f"{min(run['seconds'] for run in found):.0f}", str(len(found))])
            seeds = len(paired(runs, setting, name, COMPARED[0]))
            if seeds and name not in ("sft", BASE):
                differences.append([
                    f"`{name}`: {CONFIGS[name][0]}",
                    *(bounds_cell(compared.get((setting, name, measure))) for measure in COMPARED),
                    str(seeds)])
        if len(means) > 2:  # more than the cold start
            parts += [f"### {heading}", markdown(means).strip(), markdown(differences).strip()]
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
    """Writes the tables of a folder's results files to FOLDER.md, each file below a heading of its
    name. What stands there above the first such heading stays."""
    path = args.results.with_suffix(".md")
    about = path.read_text(encoding="utf-8").partition("\n## ")[0].strip() if path.exists() else \
        "# Forms of the temporal reward at toy scale"
    parts = [f"## {file.stem}\n\n{tables_of(json.loads(file.read_text(encoding='utf-8')))}"
             for file in sorted(args.results.glob("*.json"))]
    write_whole({path: ["\n\n".join([about, *parts]) + "\n"]})
    print(path)


if __name__ == "__main__":
    sys.exit(run_script(lambda args: args.function(args), parse_args))
