"""The paper's ablations at toy scale, each with several seeds: runs, table, pictures.

    python build_data.py toy --out toy
    python tests/ablate.py run                  # hours; killed at any time, it goes on
    python tests/ablate.py table                # Markdown, from tests/ablations.json
    python tests/ablate.py plot                 # assets/*.png, needs matplotlib
    python tests/ablate.py table --json toy/ablations.json         # from what `run` wrote here

`run` makes one cold start a seed and, from it, a run of tgrpo.py for each row of CONFIGS with its
evaluation on ordered and on shuffled frames:

    OUT/seed0/sft  OUT/seed0/tgrpo ...          cold start, trained models with metrics.jsonl
    OUT/seed0/eval_sft  OUT/seed0/eval_tgrpo ...                  what evaluate.py wrote
    OUT/seed0/sft.log  OUT/seed0/tgrpo.log ...                 what the commands printed

What is finished is read from there, so the same command does the rest. After every run the
results of all that is finished in OUT are written to --json, in place of what it held. Seeds are
those of the cold start, the order of the questions and the sampling; the toy's questions, its
untrained model and the test set are the same for all.
"""
import argparse
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# name: what it is, extra flags of tgrpo.py (None: it is not run). In the order of running.
CONFIGS = {
    "sft": ("cold start only", None),
    "tgrpo": ("T-GRPO as written", ""),
    "grpo": ("GRPO: no temporal reward", "--alpha 0"),
    "advantage": ("temporal reward in the advantage", "--temporal_to advantage"),
    "unscaled": ("T-GRPO, advantages not scaled", "--scale_advantages none"),
    "grpo-unscaled": ("GRPO, advantages not scaled", "--alpha 0 --scale_advantages none"),
    "no-length": ("no length reward", "--omega 0"),
    "no-images": ("videos only", "--data {out}/videos.json"),
    "zero": ("no cold start", "--model {toy}/model"),
    "alpha-0.1": ("alpha 0.1 (default 0.3)", "--alpha 0.1"),
    "alpha-0.2": ("alpha 0.2", "--alpha 0.2"),
    "alpha-0.4": ("alpha 0.4", "--alpha 0.4"),
    "G_tilde-2": ("2 shuffled responses (default 4)", "--G_tilde 2"),
    "G_tilde-8": ("8 shuffled responses", "--G_tilde 8"),
    "updates-2": ("2 updates a rollout (default 1)", "--updates_per_rollout 2"),
    "updates-4": ("4 updates a rollout", "--updates_per_rollout 4"),
}
# With the temporal reward, and the same without it.
PAIRS = [("tgrpo", "grpo"), ("advantage", "grpo"), ("unscaled", "grpo-unscaled")]
# Columns of the table: a measure of the results' file, and its heading.
MEASURES = {"ordered": "ordered, %", "shuffled": "shuffled, %", "gap": "gap",
            "order": "needs order, %", "static": "does not, %", "conflict": "conflict, %",
            "agree": "agree, %", "tokens": "tokens"}
MAIN_MEASURES = ("ordered", "gap", "order", "conflict")  # of the first two tables
ORDERS = ("ordered", "shuffled")
# Kinds of toy questions (build_data.py's toy_question) whose answer depends on the order of the
# frames. A telling colour gives none away: it is right in half of the direction questions.
ORDER_KINDS = ("direction_agree", "direction_conflict", "describe", "first", "end")
CURVES = ("reward/accuracy", "reward/temporal", "group/temporal_rate", "group/p", "group/p_tilde",
          "policy/kl", "response/tokens", "group/zero_std_rate")
PLOTTED = ("tgrpo", "grpo")  # the lines of the picture
# A panel: its title, and (metric, line style or None: the configuration's).
PANELS = {"accuracy reward": [("reward/accuracy", None)],
          "temporal reward (videos)": [("reward/temporal", None)],
          "response length, tokens": [("response/tokens", None)],
          "p; dotted: p_tilde (shuffled)": [("group/p", None), ("group/p_tilde", ":")],
          "KL to the cold start": [("policy/kl", None)],
          "share of zero-variance groups": [("group/zero_std_rate", None)]}
# Okabe and Ito's colours, which most colour-blind people can tell apart, and dashes for the rest.
STYLES = [("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."), ("#CC79A7", (0, (5, 1, 1, 1))),
          ("#000000", (0, (3, 2))), ("#E69F00", "-")]
PALETTE = 128  # colours of a picture's file
BIN = 5  # steps whose mean is a point of a curve
SAVE_STEPS = 25  # steps between checkpoints: what a kill costs at most
QUIET = 60  # seconds without a new line after which nobody else is training into a folder
TAIL = 15  # lines of a failed run's log that are shown


class RunFailed(Exception):
    """A command that did not finish; the message says which, and ends with its log's tail."""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="cold starts, runs, evaluations; resumes")
    run.add_argument("--toy", default="toy", help="folder that build_data.py toy wrote")
    run.add_argument("--out", help="folder of the runs; default: TOY/ablations")
    run.add_argument("--seeds", type=int, default=5, help="seeds 0 to SEEDS - 1")
    run.add_argument("--steps", type=int, default=60, help="steps of every T-GRPO run")
    run.add_argument("--jobs", type=int, default=2, help="commands at a time, a thread each")
    run.add_argument("--only", nargs="+", metavar="NAME", choices=CONFIGS, default=list(CONFIGS),
                     help=f"these and their cold starts only: {', '.join(CONFIGS)}")
    run.set_defaults(function=run_all)
    table = commands.add_parser("table", help="Markdown from the results")
    table.set_defaults(function=print_table)
    plot = commands.add_parser("plot", help="curves and advantages as PNG; needs matplotlib")
    plot.add_argument("runs", nargs="*", metavar="RUN_DIR",
                      help="outputs of tgrpo.py to draw; folders of the same name are seeds of one "
                           "line. Default: tgrpo and grpo from the results")
    plot.add_argument("--png", help="the curves; advantages.png is written beside it. Default: in "
                                    "the first RUN_DIR, or assets/curves.png")
    plot.set_defaults(function=plot_all)
    run.add_argument("--json", help="the results' file; default: OUT.json")
    for command in (table, plot):
        command.add_argument("--json", default=str(ROOT / "tests" / "ablations.json"),
                             help="the results' file")
    args = parser.parse_args(argv)
    if args.command == "plot":
        args.png = args.png or str(Path(args.runs[0] if args.runs else ROOT / "assets")
                                   / "curves.png")
    if args.command == "run":
        args.out = args.out or f"{args.toy}/ablations"
        args.json = args.json or f"{args.out}.json"
        for name in ("seeds", "steps", "jobs"):
            if getattr(args, name) < 1:
                parser.error(f"--{name} must be positive, not {getattr(args, name)}")
    return args


# ------------------------------------------------------------------- what a run did

def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def short(number):
    """A number to 4 digits, for a small file; None stays."""
    return None if number is None else float(f"{number:.4g}")


def mean(values):
    """The mean of those that are there, or None."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def thin(steps, name) -> list:
    """A metric as means over bins of BIN steps; None where no step of a bin has it.

    >>> thin([{"step": s, "a": s} for s in range(1, 11)], "a")
    [3.0, 8.0]
    """
    bins = [[] for _ in range(0, steps[-1]["step"], BIN)]
    for row in steps:
        bins[(row["step"] - 1) // BIN].append(row.get(name))
    return [short(mean(values)) for values in bins]


def scores_of(results) -> dict:
    """Accuracies in % from evaluate.py's {order: result}: all questions, and groups of kinds."""
    def score(order, kinds=None):
        kind = [row["data_source"].removeprefix("toy/") for row in results[order]["rows"]]
        return mean([100 * row["accuracy"] for row, name in zip(results[order]["rows"], kind)
                     if kinds is None or name in kinds])

    rows = results["ordered"]["rows"]
    kinds = sorted({row["data_source"].removeprefix("toy/") for row in rows})
    ordered, shuffled = score("ordered"), score("shuffled")
    scores = {"ordered": ordered, "shuffled": shuffled, "gap": ordered - shuffled,
              "order": score("ordered", ORDER_KINDS),
              "static": score("ordered", set(kinds) - set(ORDER_KINDS)),
              "conflict": score("ordered", ["direction_conflict"]),
              "agree": score("ordered", ["direction_agree"])}
    return {**{name: short(value) for name, value in scores.items()},
            "kinds": {kind: [short(score(order, [kind])) for order in ORDERS] for kind in kinds}}


def read_run(out, seed, name) -> dict | None:
    """One finished run as it stands in the results' file, or None."""
    folder = Path(out, f"seed{seed}")
    if not all(path.exists() for path in result_files(out, seed, name)):
        return None
    results = {order: json.loads(result_file(folder, name, order).read_text(encoding="utf-8"))
               for order in ORDERS}
    header, *steps = read_lines(folder / name / "metrics.jsonl")
    run = {"config": name, "seed": seed, "flags": CONFIGS[name][1], **scores_of(results),
           "tokens": short(mean([row["tokens"] for row in results["ordered"]["rows"]])),
           "seconds": short(sum(row["time/step"] for row in steps)),
           "skipped": sum(row["data/skipped"] for row in steps)
           + sum(len(result["skipped"]) for result in results.values()),
           "git_commit": header["git_commit"], "versions": header["versions"]}
    if name != "sft":
        run["curves"] = {metric: thin(steps, metric) for metric in CURVES
                         if any(metric in row for row in steps)}
    return run


def collect(args) -> dict:
    """The results of everything that is finished in --out."""
    seeds = sorted(int(path.name[4:]) for path in Path(args.out).glob("seed*")
                   if path.name[4:].isdigit())
    runs = [read_run(args.out, seed, name) for name in CONFIGS for seed in seeds]
    runs = [run for run in runs if run]
    commits = sorted({run.pop("git_commit") or "" for run in runs})
    versions = {package: sorted({run["versions"][package] for run in runs})
                for package in (runs[0]["versions"] if runs else [])}
    for run in runs:
        del run["versions"]
    return {"versions": {name: ", ".join(found) for name, found in versions.items()},
            "git_commits": commits, "threads": 1, "steps": args.steps, "bin_steps": BIN,
            "order_kinds": ORDER_KINDS, "runs": runs}


def write_results(path, results):
    """The results' file, one run a line: the whole file, or the one before."""
    head = json.dumps({key: value for key, value in results.items() if key != "runs"})
    rows = ",\n".join(json.dumps(run, separators=(",", ":")) for run in results["runs"])
    aside = Path(f"{path}.partial")
    aside.write_text(f'{head[:-1]}, "runs": [\n{rows}\n]}}\n', encoding="utf-8")
    aside.replace(path)


# ---------------------------------------------------------------------------- running

def result_file(folder, name, order):
    return folder / f"eval_{name}" / f"toy_8_{order}.json"


def result_files(out, seed, name) -> list[Path]:
    """What a run leaves when it is finished, in the order of its commands. (config.json is the
    last file of a model that is written.)"""
    folder = Path(out, f"seed{seed}")
    return [folder / name / "config.json", *(result_file(folder, name, order) for order in ORDERS)]


def commands_of(args, seed, name) -> list[list[str]]:
    """The commands of a run: training, and two evaluations."""
    folder, flags = Path(args.out, f"seed{seed}"), CONFIGS[name][1]
    common = ["--seed", str(seed), "--output", str(folder / name), "--resume"]
    if flags is None:
        train = ["sft.py", f"@{args.toy}/sft.args", *common]
    else:
        # later flags win, so a configuration's come last
        train = ["tgrpo.py", f"@{args.toy}/tgrpo.args", "--model", str(folder / "sft"), *common,
                 "--max_steps", str(args.steps), "--save_steps", str(SAVE_STEPS),
                 "--frame_cache", f"{args.out}/frames", "--num_workers", "1",
                 *(word.format(out=args.out, toy=args.toy) for word in flags.split())]
    evaluations = [["evaluate.py", f"@{args.toy}/evaluate.args", "--model", str(folder / name),
                    "--output", str(folder / f"eval_{name}"), "--order", order]
                   for order in ORDERS]
    return [[sys.executable, str(ROOT / script), *rest] for script, *rest in [train, *evaluations]]


def tail_of(log) -> str:
    """The last lines of a log; of a progress bar only what it showed last."""
    lines = log.read_bytes().decode("utf-8", "replace").split("\n")
    return "\n".join(f"    {line.split(chr(13))[-1]}" for line in lines[-TAIL:] if line.strip())


class Runner:
    """Runs a configuration's commands; `stop` ends those under way and starts no more."""

    def __init__(self, args):
        self.args, self.children, self.stopping = args, set(), threading.Event()

    def run(self, seed, name, cold_start=None):
        """All of one run, what is finished already left out. RunFailed says what went wrong."""
        folder = Path(self.args.out, f"seed{seed}")
        if cold_start:
            cold_start.exception()  # waits until it has ended, well or not
            if not (folder / "sft" / "config.json").exists():
                raise RunFailed("its cold start failed")
        folder.mkdir(parents=True, exist_ok=True)
        results = result_files(self.args.out, seed, name)
        for result, command in zip(results, commands_of(self.args, seed, name)):
            self.wait_for_others(folder / name, result)
            if not result.exists():
                self.call(command, folder / f"{name}.log", result)
        for checkpoint in (folder / name).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)

    def wait_for_others(self, output, result):
        """While another process, of a call that was killed, say, still trains into a folder."""
        metrics = output / "metrics.jsonl"
        if result.parent != output or result.exists() or not metrics.exists():
            return
        seen = metrics.stat().st_mtime
        quiet = time.time() - seen
        if quiet < QUIET:
            print(f"{output}: written to a moment ago; waiting until it is finished or has been "
                  f"quiet for {QUIET} seconds", flush=True)
        # Seconds are counted here, not read from the clock: both of us may have been suspended.
        while quiet < QUIET and not result.exists() and not self.stopping.wait(1):
            quiet = quiet + 1 if metrics.stat().st_mtime == seen else 0
            seen = metrics.stat().st_mtime

    def call(self, command, log, result):
        if self.stopping.is_set():
            raise RunFailed("stopped")
        with log.open("a", encoding="utf-8") as file:
            file.write(f"\n$ {shlex.join(command)}\n")
            file.flush()
            child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT,
                                     stdin=subprocess.DEVNULL,
                                     env={**os.environ, "OMP_NUM_THREADS": "1"})
            self.children.add(child)
            status = child.wait()
            self.children.discard(child)
        if status or not result.exists():  # a process that SIGTERM stopped exits with 0
            raise RunFailed(f"{Path(command[1]).name} ended with status {status} and no {result}; "
                            f"the end of {log}:\n{tail_of(log)}")

    def stop(self):
        self.stopping.set()
        for child in list(self.children):
            child.terminate()  # tgrpo.py and sft.py end their step and save a checkpoint


def prepare(args):
    """Checks --toy and --out; writes what configurations need beside the toy."""
    for name in ("sft.args", "tgrpo.args", "evaluate.args", "train.json", "model/config.json"):
        if not Path(args.toy, name).exists():
            raise RunFailed(f"{args.toy}/{name} is missing: python build_data.py toy "
                            f"--out {args.toy}")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for path in Path(args.out).glob("seed*/*/metrics.jsonl"):
        with path.open(encoding="utf-8") as file:
            steps = json.loads(file.readline() or "{}").get("arguments", {}).get("max_steps")
        if steps not in (None, args.steps) and CONFIGS.get(path.parent.name, ("", None))[1] \
                is not None:
            # the learning rate's schedule depends on it: the runs could not be compared
            raise RunFailed(f"{path.parent} is a run of {steps} steps: give --steps {steps}, or "
                            "name another --out")
    records = json.loads(Path(args.toy, "train.json").read_text(encoding="utf-8"))
    videos = [record for record in records if record["data_type"] == "video"]
    Path(args.out, "videos.json").write_text(json.dumps(videos), encoding="utf-8")


def run_all(args) -> int:
    """Every configuration with every seed; 1 when some failed."""
    prepare(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ablate.py: stopped; the same command goes "
                                                      "on"))
    runner, failed = Runner(args), []
    with ThreadPoolExecutor(args.jobs) as pool:
        # Cold starts stand first in the queue, so that none waits for one behind it.
        seeds = range(args.seeds)
        starts = {seed: pool.submit(runner.run, seed, "sft") for seed in seeds
                  if set(args.only) - {"zero"}}
        futures = {future: (seed, "sft") for seed, future in starts.items()}
        for name in CONFIGS:
            for seed in seeds if name in args.only and name != "sft" else []:
                start = starts[seed] if name != "zero" else None
                futures[pool.submit(runner.run, seed, name, start)] = seed, name
        try:
            for done, future in enumerate(as_completed(futures), 1):
                seed, name = futures[future]
                error = future.exception()
                if error and not isinstance(error, RunFailed):
                    raise error
                if error:
                    failed.append(f"seed {seed}, {name}")
                    print(f"[{done}/{len(futures)}] seed {seed}, {name}: FAILED: {error}",
                          flush=True)
                    continue
                write_results(args.json, collect(args))
                print(f"[{done}/{len(futures)}] {summary(read_run(args.out, seed, name))}",
                      flush=True)
        except BaseException:  # Ctrl-C and SIGTERM too: nothing goes on unattended
            pool.shutdown(wait=False, cancel_futures=True)
            runner.stop()
            raise
    if failed:
        print(f"{len(failed)} of {len(futures)} runs failed: {'; '.join(failed)}. The same "
              "command runs them again")
    return 1 if failed else 0


def summary(run) -> str:
    return (f"seed {run['seed']}, {run['config']}: ordered {run['ordered']:.1f} %, "
            f"gap {run['gap']:.1f}, conflict {run['conflict']:.1f} %, "
            f"{run['seconds']:.0f} s of training")


# -------------------------------------------------------------------------- statistics

def mean_and_error(values) -> tuple:
    """Mean and its standard error over seeds, which is None when there is but one value.

    >>> mean_and_error([1.0, 2.0, 3.0])
    (2.0, 0.5773502691896258)
    """
    n = len(values)
    return mean(values), statistics.stdev(values) / math.sqrt(n) if n > 1 else None


def by_seed(runs, name) -> dict:
    """{seed: run} of a configuration."""
    return {run["seed"]: run for run in runs if run["config"] == name}


def paired(runs, name, other, measure) -> list:
    """Differences of a measure between two configurations, over the seeds that have both."""
    ours, theirs = by_seed(runs, name), by_seed(runs, other)
    return [ours[seed][measure] - theirs[seed][measure] for seed in sorted(ours.keys() & theirs)]


def cell(values, sign="") -> str:
    """Mean and standard error as text; one seed shows no spread, none a dash."""
    if not values:
        return "-"
    middle, error = mean_and_error(values)
    middle = format(middle, f"{sign}.1f")
    return f"{middle} (1 seed)" if error is None else f"{middle} ± {error:.1f}"


# ------------------------------------------------------------------------------- table

def read_results(path) -> dict:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunFailed(f"{path} is missing: python tests/ablate.py run makes it") from None


def table_of(results) -> str:
    """Three tables: each configuration; what the temporal reward adds in each of its forms; and
    the rest that was measured."""
    runs = results["runs"]
    absent = [name for name in CONFIGS if not by_seed(runs, name)]
    rows = [["configuration", *map(MEASURES.get, MAIN_MEASURES), "ordered: less T-GRPO's",
             "gap: less T-GRPO's", "seeds"]]
    others = [measure for measure in MEASURES if measure not in MAIN_MEASURES]
    rest = [["configuration", *map(MEASURES.get, others), "training, s (fastest seed)"]]
    for name in [name for name in CONFIGS if name not in absent]:
        found = by_seed(runs, name).values()
        means = {measure: cell([run[measure] for run in found]) for measure in MEASURES}
        differences = ["", ""] if name == "tgrpo" else \
            [cell(paired(runs, name, "tgrpo", measure), "+") for measure in ("ordered", "gap")]
        rows.append([f"`{name}`: {CONFIGS[name][0]}", *map(means.get, MAIN_MEASURES),
                     *differences, str(len(found))])
        rest.append([f"`{name}`", *map(means.get, others),
                     f"{min(run['seconds'] for run in found):.0f}"])
    pairs = [["with less without the temporal reward", *map(MEASURES.get, MAIN_MEASURES), "seeds"]]
    for name, other in PAIRS:
        differences = {measure: paired(runs, name, other, measure) for measure in MAIN_MEASURES}
        pairs.append([f"`{name}` less `{other}`",
                      *(cell(values, "+") for values in differences.values()),
                      str(len(differences["ordered"]))])
    versions = ", ".join(f"{name} {found}" for name, found in results["versions"].items())
    made = [f"T-GRPO of {results['steps']} steps; {versions}; {results['threads']} thread a run."]
    unfinished = [f"Not run: {', '.join(absent)}."] if absent else []
    skipped = sum(run["skipped"] for run in runs)
    missing = [f"Questions that were skipped: {skipped}."] if skipped else []
    return "\n\n".join([*map(markdown, (rows, pairs, rest)), *made, *unfinished, *missing])


def markdown(rows) -> str:
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def print_table(args) -> int:
    print(table_of(read_results(args.json)))
    return 0


# ------------------------------------------------------------- the algorithm, looked at

def pass_rate(accuracy, G=8, G_tilde=4, test="ge") -> float:
    """How often p >= p_tilde (test "gt": >) when both groups answer right with probability
    `accuracy`, whatever the order of the frames: a sum over two binomial distributions.

    >>> round(pass_rate(0.5, G=1, G_tilde=1), 2)  # only 0 against 1 fails
    0.75
    """
    def chance(k, n):
        return math.comb(n, k) * accuracy**k * (1 - accuracy)**(n - k)

    return sum(chance(i, G) * chance(j, G_tilde) for i in range(G + 1) for j in range(G_tilde + 1)
               if i * G_tilde > j * G or (test == "ge" and i * G_tilde == j * G))


def graded(record, texts, texts_shuffled, lengths, **flags) -> dict:
    """What tgrpo.py makes of a question's responses: {"parts", "R" (G,), "A" (G,), ...}."""
    tgrpo, torch = import_tgrpo()
    args = tgrpo.parse_args(["--model=", "--data=", "--output="])
    vars(args).update(G=len(texts), **flags)
    end, known = -1, texts + texts_shuffled

    class Tokenizer:
        """A response's first token is its text's number."""
        @staticmethod
        def batch_decode(rows, **_):
            return [known[row[0]] for row in rows]

    def tokens(first, lengths):  # (n, L), the end token included in the length
        width = max(lengths)
        return torch.tensor([[first + i] * (length - 1) + [end] * (width - length + 1)
                             for i, length in enumerate(lengths)])

    sample = {"record": record, "responses": tokens(0, lengths)}  # (G, L)
    if texts_shuffled:
        sample |= {"shuffled": True,
                   "responses_shuffled": tokens(len(texts), [2] * len(texts_shuffled))}
    tgrpo.grade_group(sample, Tokenizer, [end], args)
    return sample


def import_tgrpo():
    """tgrpo.py and torch: slow to import, and only some commands need them."""
    sys.path.insert(0, str(ROOT))
    import torch
    import tgrpo
    return tgrpo, torch


# -------------------------------------------------------------------------------- plots

def import_pyplot():
    try:
        import matplotlib
    except ImportError:
        raise RunFailed("plot needs matplotlib, which is not in requirements.txt: "
                        "pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams.update({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False,
                            "lines.linewidth": 2.2, "axes.grid": True, "grid.alpha": 0.25,
                            "figure.constrained_layout.use": True})
    return pyplot


def curves_of(args) -> tuple[dict, int]:
    """{label: curves of each seed} from run folders or the results' file; steps of a bin."""
    groups = {}
    if not args.runs:
        results = read_results(args.json)
        for name in PLOTTED:
            for run in by_seed(results["runs"], name).values():
                groups.setdefault(CONFIGS[name][0].split(":")[0], []).append(run["curves"])
        if not groups:
            raise RunFailed(f"{args.json} has no finished run of {' or '.join(PLOTTED)} yet: name "
                            "folders of runs")
        return groups, results["bin_steps"]
    for folder in map(Path, args.runs):
        try:
            steps = read_lines(folder / "metrics.jsonl")[1:]
        except OSError as error:
            raise RunFailed(f"{error.filename}: {error.strerror}; RUN_DIR is an --output of "
                            "tgrpo.py") from None
        if not steps:
            raise RunFailed(f"{folder}/metrics.jsonl has no step yet")
        groups.setdefault(folder.resolve().name, []).append(
            {metric: thin(steps, metric) for metric in CURVES
             if any(metric in row for row in steps)})
    return groups, BIN


def band_of(seeds, metric) -> list[tuple]:
    """(bin, mean, standard error or 0) of a metric over seeds, for bins where all have it."""
    columns = zip(*(curves[metric] for curves in seeds if metric in curves))
    points = [(i, mean_and_error(values)) for i, values in enumerate(columns)
              if None not in values]
    return [(i, middle, error or 0.0) for i, (middle, error) in points]


def plot_curves(pyplot, groups, bin_steps, path):
    """The paper's Figure 5 and what explains it: a panel a metric, a line a configuration."""
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), sharex=True)
    for axis, (title, lines) in zip(axes.flat, PANELS.items()):
        axis.set_title(title, fontsize=13)
        for (label, seeds), (colour, style) in zip(groups.items(), STYLES):
            for metric, own_style in lines:
                points = band_of(seeds, metric)
                x = [(i + 0.5) * bin_steps for i, *_ in points]
                middle, error = ([point[k] for point in points] for k in (1, 2))
                axis.plot(x, middle, color=colour, linestyle=own_style or style,
                          label=f"{label} ({len(seeds)} seed{'s' * (len(seeds) > 1)})")
                axis.fill_between(x, [m - e for m, e in zip(middle, error)],
                                  [m + e for m, e in zip(middle, error)], color=colour, alpha=0.2,
                                  linewidth=0)
    axes[0, 0].legend(fontsize=11, frameon=False)
    for axis in axes[1]:
        axis.set_xlabel("step")
    save(pyplot, figure, path)


def save(pyplot, figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    from PIL import Image
    with Image.open(path) as image:  # a third of the bytes
        image.convert("RGB").quantize(PALETTE).save(path, optimize=True)
    print(path)


def advantage_cases() -> list[tuple]:
    """(title, lines, responses' answers and lengths, flags) of the pictures of alpha."""
    two = [("A", 9)] * 3 + [("B", 9)] * 5
    three = [("A", 20)] * 2 + [("A", 9)] * 2 + [("B", 9)] * 4
    choice = {0: "correct", 7: "wrong"}
    return [("two values: alpha cancels", choice, two, {}),
            ("length reward: three values",
             {0: "correct, in the window", 2: "correct, outside it", 7: "wrong"}, three, {}),
            ("continuous rewards 1.0 to 0.1",
             {0: "1.0", 1: "0.8", 2: "0.5", 3: "0.4", 4: "0.1"},
             [(answer, 9) for answer in ("10", "8", "5", "4", "1")], {}),
            ("two values, --temporal_to advantage", choice, two, {"temporal_to": "advantage"}),
            ("two values, --scale_advantages none", choice, two, {"scale_advantages": "none"})]


def plot_advantages(pyplot, path):
    """Advantages against alpha, by tgrpo.py's own grading, and the chance of passing the test."""
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7.4))
    alphas = [i / 20 for i in range(21)]
    for axis, (title, lines, responses, flags) in zip(axes.flat, advantage_cases()):
        numbers = responses[0][0].isdigit()
        record = {"problem_id": 0, "problem_type": "regression" if numbers else "multiple choice",
                  "solution": f"<answer>{responses[0][0]}</answer>"}
        texts = [f"<think>so</think><answer>{answer}</answer>" for answer, _ in responses]
        groups = [graded(record, texts, texts[-1:] * 4, [length for _, length in responses],
                         alpha=alpha, l_min=16, l_max=24, **flags) for alpha in alphas]
        for (i, label), (colour, style) in zip(lines.items(), STYLES):
            A = [group["A"][i].item() for group in groups]
            axis.plot(alphas, A, color=colour, linestyle=style)
            at, offset = ((1, A[-1]), (5, -4)) if numbers else ((0, max(A[0], A[8])), (2, 4))
            axis.annotate(label, at, xytext=offset, textcoords="offset points", color=colour,
                          fontsize=11)
        axis.set(title=title, xlabel="alpha", ylabel="advantage")
        axis.margins(y=0.2)
        axis.axvline(0.3, color="0.6", linewidth=1)  # the paper's alpha
    axis, chances = axes[1, 2], [i / 50 for i in range(51)]
    for (test, label), (colour, style) in zip((("ge", "p >= p_tilde"), ("gt", "p > p_tilde")),
                                              STYLES):
        axis.plot(chances, [100 * pass_rate(chance, test=test) for chance in chances],
                  color=colour, linestyle=style, label=label)
    axis.set(title="passed by chance, 8 against 4, %", xlabel="accuracy, order ignored",
             ylim=(0, 105))
    axis.legend(fontsize=10, frameon=False)
    for axis in axes.flat:
        axis.title.set_fontsize(13)
    save(pyplot, figure, path)


def plot_all(args) -> int:
    pyplot, path = import_pyplot(), Path(args.png)
    plot_advantages(pyplot, path.with_name("advantages.png"))  # needs no run
    groups, bin_steps = curves_of(args)
    if len(groups) > len(STYLES):
        raise RunFailed(f"{len(groups)} different names of folders, and {len(STYLES)} styles of "
                        "lines that can be told apart: plot fewer")
    plot_curves(pyplot, groups, bin_steps, path)
    return 0


def main(argv=None) -> int:
    args = parse_args(argv)
    try:
        return args.function(args)
    except RunFailed as error:
        sys.exit(f"ablate.py: {error}")
    except KeyboardInterrupt:
        sys.exit("ablate.py: stopped; the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
