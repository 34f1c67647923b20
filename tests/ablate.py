"""The paper's ablations at toy scale, each with several seeds: runs, tables, pictures.

    python build_data.py toy --out toy
    python tests/ablate.py run                  # hours; killed at any time, it goes on
    python tests/ablate.py table                # tests/ablations.md, from tests/ablations.json
    python tests/ablate.py plot                 # assets/*.png, needs matplotlib
    python tests/ablate.py table --json toy/ablations.json   # toy/ablations.md, from your own run

`run` makes one cold start a seed and, from it, a run of tgrpo.py for each row of CONFIGS with its
evaluation on ordered and on shuffled frames:

    OUT/seed0/sft  OUT/seed0/tgrpo ...          cold start, trained models with metrics.jsonl
    OUT/seed0/eval_sft  OUT/seed0/eval_tgrpo ...                  what evaluate.py wrote
    OUT/seed0/sft.log  OUT/seed0/tgrpo.log ...                 what the commands printed
    OUT.json                                    the results of all that is finished

What is finished is read from there, so the same command does the rest. Seeds are those of the
cold start, the order of the questions and the sampling; the toy's questions, its untrained model
and the test set are the same for all.
"""
import fcntl
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
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from build_data import (FlagParser, InputError, above, markdown, run_script,  # noqa: E402
                        write_whole)

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
# Columns of the tables: a measure of the results' file, and its heading.
MEASURES = {"ordered": "ordered, %", "shuffled": "shuffled, %", "gap": "gap",
            "order": "needs order, %", "static": "does not, %", "conflict": "conflict, %",
            "agree": "agree, %", "tokens": "tokens"}
MAIN_MEASURES = ("ordered", "gap", "order", "conflict")  # of the first two tables
ORDERS = ("ordered", "shuffled")
# Kinds of toy questions (build_data.py's toy_question) whose answer depends on the order of the
# frames. A telling colour gives none away: it is right in half of the direction questions.
ORDER_KINDS = ("direction_agree", "direction_conflict", "describe", "first", "end")
ABOUT = """\
# The paper's ablations at toy scale

`python tests/ablate.py table` writes this file from {json}; what it says is told in the README,
"What does the temporal reward do?".

Held-out accuracy in %, greedy, on the toy's test questions: with ordered and with shuffled frames,
and the gap between them; with ordered frames on the questions that need the order (direction,
description, which colour first, where it ends), on those that do not (colour, count, word), and on
the direction questions whose colour is in conflict or agrees with the answer; tokens of a response;
seconds of training on one thread, of the seed that other work on the machine disturbed least.

Every other number is the mean over seeds ± its standard error. A seed is another cold start, order
of questions and sampling; data and the untrained model are the same. Differences are paired: both
runs start from the same cold start. With five seeds a 95 % interval reaches 2.8 standard errors to
either side; of twenty differences that are nothing, one is expected to lie outside its own."""
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
TAIL = 15  # lines of a failed run's log that are shown


def parse_args(argv=None):
    parser = FlagParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="cold starts, runs, evaluations; resumes")
    run.add_argument("--toy", default="toy", help="folder that build_data.py toy wrote")
    run.add_argument("--out", help="folder of the runs; default: TOY/ablations")
    run.add_argument("--seeds", type=above(0, int), default=5, help="seeds 0 to SEEDS - 1")
    run.add_argument("--steps", type=above(0, int), default=60, help="steps of every T-GRPO run")
    run.add_argument("--jobs", type=above(0, int), default=2,
                     help="commands at a time, a thread each")
    run.add_argument("--only", nargs="+", metavar="NAME", choices=CONFIGS, default=list(CONFIGS),
                     help="these and their cold starts")
    run.set_defaults(function=run_all)
    table = commands.add_parser("table", help="the results as Markdown")
    table.set_defaults(function=write_table)
    plot = commands.add_parser("plot", help="curves and advantages as PNG; needs matplotlib")
    plot.add_argument("runs", nargs="*", metavar="RUN_DIR",
                      help="outputs of tgrpo.py to draw; folders of the same name are seeds of one "
                           "line. Default: tgrpo and grpo from the results")
    plot.add_argument("--folder", help="where curves.png and, without RUN_DIR, advantages.png are "
                                       "written; default: the first RUN_DIR, or assets")
    plot.set_defaults(function=plot_all)
    for command in (table, plot):
        command.add_argument("--json", default=str(ROOT / "tests" / "ablations.json"),
                             help="the results' file; its table goes beside it")
    args = parser.parse_args(argv)
    if args.command == "run":
        args.out = args.out or f"{args.toy}/ablations"
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


def curves_of(steps) -> dict:
    """{metric: a value a bin} of those of CURVES that a run has."""
    return {name: thin(steps, name) for name in CURVES if any(name in row for row in steps)}


def scores_of(results) -> dict:
    """Accuracies in % from evaluate.py's {order: result}: all questions, and groups of kinds."""
    rows = {order: [(row["data_source"].removeprefix("toy/"), 100 * row["accuracy"])
                    for row in result["rows"]] for order, result in results.items()}
    kinds = sorted({kind for kind, _ in rows["ordered"]})

    def score(order, kinds=kinds):
        return mean([accuracy for kind, accuracy in rows[order] if kind in kinds])

    ordered, shuffled = score("ordered"), score("shuffled")
    scores = {"ordered": ordered, "shuffled": shuffled, "gap": ordered - shuffled,
              "order": score("ordered", ORDER_KINDS),
              "static": score("ordered", set(kinds) - set(ORDER_KINDS)),
              "conflict": score("ordered", ["direction_conflict"]),
              "agree": score("ordered", ["direction_agree"])}
    return {**{name: short(value) for name, value in scores.items()},
            "kinds": {kind: [short(score(order, [kind])) for order in ORDERS] for kind in kinds}}


def read_run(out, seed, name) -> dict | None:
    """One run as it stands in the results' file, with its "header"; None if it is unfinished."""
    model, *evaluations = result_files(out, seed, name)
    if not all(path.exists() for path in (model, *evaluations)):
        return None
    results = {order: json.loads(path.read_text(encoding="utf-8"))
               for order, path in zip(ORDERS, evaluations)}
    header, *steps = read_lines(model.parent / "metrics.jsonl")
    return {"config": name, "seed": seed, "flags": CONFIGS[name][1], **scores_of(results),
            "tokens": short(mean([row["tokens"] for row in results["ordered"]["rows"]])),
            "seconds": short(sum(row["time/step"] for row in steps)),
            "skipped": sum(row["data/skipped"] for row in steps)
            + sum(len(result["skipped"]) for result in results.values()),
            "curves": {} if name == "sft" else curves_of(steps), "header": header}


def write_results(args):
    """OUT.json, one run a line: everything that is finished. The whole file, or the one before."""
    seeds = sorted(int(path.name[4:]) for path in Path(args.out).glob("seed*")
                   if path.name[4:].isdigit())
    found = [read_run(args.out, seed, name) for name in CONFIGS for seed in seeds]
    runs = [run for run in found if run]
    headers = [run.pop("header") for run in runs]
    versions = {package: ", ".join(sorted({header["versions"][package] for header in headers}))
                for package in headers[0]["versions"]}
    commits = sorted({header["git_commit"] or "" for header in headers})
    head = json.dumps({"versions": versions, "git_commits": commits, "steps": args.steps})
    lines = ",\n".join(json.dumps(run, separators=(",", ":")) for run in runs)
    write_whole({f"{args.out}.json": [f'{head[:-1]}, "runs": [\n{lines}\n]}}\n']})


# ---------------------------------------------------------------------------- running

def result_files(out, seed, name) -> list[Path]:
    """What a run leaves when it is finished, in the order of its commands. (config.json is the
    last file of a model that is written.)"""
    folder = Path(out, f"seed{seed}")
    return [folder / name / "config.json",
            *(folder / f"eval_{name}" / f"toy_8_{order}.json" for order in ORDERS)]


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
                 "--num_workers", "1",
                 *(word.format(out=args.out, toy=args.toy) for word in flags.split())]
    evaluations = [["evaluate.py", f"@{args.toy}/evaluate.args", "--model", str(folder / name),
                    "--output", str(folder / f"eval_{name}"), "--order", order]
                   for order in ORDERS]
    return [[sys.executable, str(ROOT / script), *rest] for script, *rest in [train, *evaluations]]


def tail_of(log) -> str:
    """The last lines of a log; of a progress bar only what it showed last."""
    lines = log.read_bytes().decode("utf-8", "replace").split("\n")
    return "\n".join(f"    {line.split(chr(13))[-1]}" for line in lines[-TAIL:] if line.strip())


def lock_folder(out):
    """The open lock file of a folder of runs, once nobody else has it: neither another call, nor
    the commands that a killed one has left behind, since they hold it too."""
    lock = open(Path(out, "lock"), "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{out}: in use; waiting until those who train into it have ended", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


class Runner:
    """Runs a configuration's commands; `stop` ends those under way and starts no more."""

    def __init__(self, args, lock):
        self.args, self.lock = args, lock
        self.children, self.stopping = set(), threading.Event()

    def run(self, seed, name, cold_start=None):
        """All of one run, what is finished already left out. InputError says what went wrong."""
        if cold_start and cold_start.exception():  # which waits until it has ended
            raise InputError("its cold start failed")
        folder = Path(self.args.out, f"seed{seed}")
        folder.mkdir(exist_ok=True)
        results = result_files(self.args.out, seed, name)
        for result, command in zip(results, commands_of(self.args, seed, name)):
            if not result.exists():
                self.call(command, folder / f"{name}.log", result)
        for checkpoint in (folder / name).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)

    def call(self, command, log, result):
        if self.stopping.is_set():
            raise InputError("stopped")
        with log.open("a", encoding="utf-8") as file:
            file.write(f"\n$ {shlex.join(command)}\n")
            file.flush()
            # a session of its own: Ctrl-C is for this process, which passes it on once
            child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT,
                                     stdin=subprocess.DEVNULL, start_new_session=True,
                                     pass_fds=[self.lock.fileno()],
                                     env={**os.environ, "OMP_NUM_THREADS": "1"})
            self.children.add(child)
            status = child.wait()
            self.children.discard(child)
        if status or not result.exists():  # a process that SIGTERM stopped exits with 0
            raise InputError(f"{Path(command[1]).name} ended with status {status} and no {result}; "
                             f"the end of {log}:\n{tail_of(log)}")

    def stop(self):
        self.stopping.set()
        for child in list(self.children):
            child.terminate()  # tgrpo.py and sft.py end their step and save a checkpoint


def prepare(args):
    """Checks --toy and --out; writes what configurations need beside the toy."""
    for name in ("sft.args", "tgrpo.args", "evaluate.args", "train.json", "model/config.json"):
        if not Path(args.toy, name).exists():
            raise InputError(f"{args.toy}/{name} is missing: python build_data.py toy "
                             f"--out {args.toy}")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for path in Path(args.out).glob("seed*/*/metrics.jsonl"):
        with path.open(encoding="utf-8") as file:
            header = json.loads(file.readline() or "{}")
        steps = header["arguments"]["max_steps"] if header else args.steps
        if path.parent.name != "sft" and steps != args.steps:
            # the learning rate's schedule depends on it: the runs could not be compared
            raise InputError(f"{path.parent} is a run of {steps} steps: give --steps {steps}, or "
                             "name another --out")
    records = json.loads(Path(args.toy, "train.json").read_text(encoding="utf-8"))
    videos = [record for record in records if record["data_type"] == "video"]
    Path(args.out, "videos.json").write_text(json.dumps(videos), encoding="utf-8")


def run_all(args) -> int:
    """Every configuration with every seed; 1 when some failed."""
    prepare(args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    starts, runs, failed = {}, {}, []
    wanted = set(args.only) | ({"sft"} if set(args.only) - {"zero"} else set())
    with lock_folder(args.out) as lock, ThreadPoolExecutor(args.jobs) as pool:
        runner = Runner(args, lock)
        # Cold starts stand first in the queue, so that none waits for one behind it.
        for name in [name for name in CONFIGS if name in wanted]:
            for seed in range(args.seeds):
                start = starts.get(seed) if name != "zero" else None
                future = pool.submit(runner.run, seed, name, start)
                runs[future] = seed, name
                if name == "sft":
                    starts[seed] = future
        try:
            for done, future in enumerate(as_completed(runs), 1):
                seed, name = runs[future]
                try:
                    future.result()
                except InputError as error:
                    failed.append(f"seed {seed}, {name}")
                    said = f"FAILED: {error}"
                else:
                    write_results(args)
                    said = summary(read_run(args.out, seed, name))
                print(f"[{done}/{len(runs)}] seed {seed}, {name}: {said}", flush=True)
        except BaseException:  # Ctrl-C and SIGTERM too: nothing goes on unattended
            pool.shutdown(wait=False, cancel_futures=True)
            runner.stop()
            raise
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed: {'; '.join(failed)}. The same command "
              "runs them again")
    return 1 if failed else 0


def summary(run) -> str:
    return (f"ordered {run['ordered']:.1f} %, gap {run['gap']:.1f}, conflict "
            f"{run['conflict']:.1f} %, {run['seconds']:.0f} s of training")


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


# ------------------------------------------------------------------------------ tables

def read_results(path) -> dict:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: python tests/ablate.py run makes it") from None


def tables_of(results) -> str:
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
        differences = [paired(runs, name, other, measure) for measure in MAIN_MEASURES]
        pairs.append([f"`{name}` less `{other}`", *(cell(values, "+") for values in differences),
                      str(len(differences[0]))])
    versions = ", ".join(f"{name} {found}" for name, found in results["versions"].items())
    notes = [f"T-GRPO of {results['steps']} steps; {versions}; one thread a run."]
    if absent:
        notes.append(f"Not run: {', '.join(absent)}.")
    if skipped := sum(run["skipped"] for run in runs):
        notes.append(f"Questions that were skipped: {skipped}.")
    tables = [markdown(table).strip() for table in (rows, pairs, rest)]
    return "\n\n".join([*tables, *notes])


def write_table(args):
    """The tables of a results' file and what their columns are, as Markdown beside it."""
    path = Path(args.json).with_suffix(".md")
    about = ABOUT.format(json=Path(args.json).name)
    write_whole({path: [f"{about}\n\n{tables_of(read_results(args.json))}\n"]})
    print(path)


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
    import tgrpo  # pictures need it, runs and tables do not
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
        sample["responses_shuffled"] = tokens(len(texts), [2] * len(texts_shuffled))
    tgrpo.grade_group(sample, Tokenizer, [end], args)
    return sample


# -------------------------------------------------------------------------------- plots

def import_pyplot():
    try:
        import matplotlib
    except ImportError:
        raise InputError("plot needs matplotlib, which is not in requirements.txt: "
                         "pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams.update({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False,
                            "lines.linewidth": 2.2, "axes.grid": True, "grid.alpha": 0.25,
                            "figure.constrained_layout.use": True})
    return pyplot


def curves_to_draw(args) -> dict:
    """{label: curves of each seed}, of run folders or of the results' file."""
    lines = defaultdict(list)
    for folder in map(Path, args.runs):
        try:
            steps = read_lines(folder / "metrics.jsonl")[1:]
        except OSError as error:
            raise InputError(f"{error.filename}: {error.strerror}; RUN_DIR is an --output of "
                             "tgrpo.py") from None
        if not steps:
            raise InputError(f"{folder}/metrics.jsonl has no step yet")
        lines[folder.resolve().name].append(curves_of(steps))
    for run in [] if args.runs else read_results(args.json)["runs"]:
        if run["config"] in PLOTTED:
            lines[CONFIGS[run["config"]][0].split(":")[0]].append(run["curves"])
    if not lines:
        raise InputError(f"{args.json} has no finished run of {' or '.join(PLOTTED)} yet: name "
                         "folders of runs")
    if len(lines) > len(STYLES):
        raise InputError(f"{len(lines)} different names of folders, and {len(STYLES)} styles of "
                         "lines that can be told apart: plot fewer")
    return lines


def band_of(seeds, metric) -> list[tuple]:
    """(step in the middle of a bin, mean, standard error or 0) of a metric over seeds, for the
    bins where all have it."""
    columns = zip(*(curves[metric] for curves in seeds if metric in curves))
    return [((i + 0.5) * BIN, middle, error or 0.0) for i, values in enumerate(columns)
            if None not in values for middle, error in [mean_and_error(values)]]


def plot_curves(pyplot, lines, path):
    """The paper's Figure 5 and what explains it: a panel a metric, a line a configuration."""
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), sharex=True)
    for axis, (title, metrics) in zip(axes.flat, PANELS.items()):
        axis.set_title(title, fontsize=13)
        for (label, seeds), (colour, style) in zip(lines.items(), STYLES):
            label = f"{label} ({len(seeds)} seed{'s' * (len(seeds) > 1)})"
            for metric, own_style in metrics:
                # (3, bins), also where there is no bin
                step, middle, error = torch.tensor(band_of(seeds, metric)).reshape(-1, 3).T
                axis.plot(step, middle, color=colour, linestyle=own_style or style, label=label)
                axis.fill_between(step, middle - error, middle + error, color=colour, alpha=0.2,
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


def plot_all(args):
    pyplot = import_pyplot()
    folder = Path(args.folder or (args.runs[0] if args.runs else ROOT / "assets"))
    if not args.runs:
        plot_advantages(pyplot, folder / "advantages.png")  # of no run, but of the algorithm
    plot_curves(pyplot, curves_to_draw(args), folder / "curves.png")


def main(args):
    return args.function(args)


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args))
