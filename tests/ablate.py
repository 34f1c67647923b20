"""Forms of the temporal reward at toy scale, each with several seeds: runs, tables, pictures.

    python build_data.py toy --out toy
    python build_data.py toy --out toy_shortcut --shortcut
    python tests/ablate.py run                  # hours; killed at any time, it goes on
    python tests/ablate.py table                # tests/ablations.md, from tests/ablations.json
    python tests/ablate.py plot                 # assets/*.png, needs matplotlib
    python tests/ablate.py table --json toy/ablations.json   # toy/ablations.md, from your own run
    git apply tests/variants/margin.diff        # makes tgrpo.py a variant; -R takes it back

`run` makes one cold start a seed and, from it, in each of SETTINGS, a run of tgrpo.py for each of
CONFIGS, with its evaluation on ordered and on shuffled frames. A variant is a run of a copy of
tgrpo.py to which git has applied tests/variants/NAME.diff: each diff there is a configuration.

    OUT/variants/margin/tgrpo.py                         the changed copies
    OUT/seed0/sft  OUT/seed0/plain/tgrpo ...    cold start, trained models with metrics.jsonl
    OUT/seed0/eval_sft  OUT/seed0/plain/eval_tgrpo ...            what evaluate.py wrote
    OUT/seed0/sft.log  OUT/seed0/plain/tgrpo.log ...           what the commands printed
    OUT.json                                    the results of all that is finished

What is finished is read from there, so the same command does the rest. Seeds are those of the
cold start, the order of the questions and the sampling; the toy's questions, its untrained model
and the test set are the same for all. Flags are those of the toy's own *.args.
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
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from build_data import (FlagParser, InputError, above, at_least, markdown, run_script,  # noqa: E402
                        write_whole)

VARIANTS = {path.stem: path for path in sorted((ROOT / "tests" / "variants").glob("*.diff"))}
# name: what it is, extra flags of tgrpo.py. A variant is told by its diff's first line.
CONFIGS = {
    "grpo": ("GRPO: no temporal reward", "--alpha 0"),
    "tgrpo": ("T-GRPO as written", ""),
    "strict": ("the strict test, p > p_tilde", "--temporal_test gt"),
    "advantage": ("temporal reward in the advantage", "--temporal_to advantage"),
    **{name: (path.read_text(encoding="utf-8").splitlines()[0].strip("# ."), "")
       for name, path in VARIANTS.items()},
}
BASE = "grpo"  # what every other one is compared with
# name: what the toy's folder is called after --toy's, and what it is.
SETTINGS = {
    "plain": ("", "The toy as it is: a telling colour is wrong in half of the direction questions"),
    "shortcut": ("_shortcut", "With a shortcut: in training, a telling colour is always right"),
}
# Columns of the tables: a measure of the results' file, and its heading.
MEASURES = {"ordered": "ordered, %", "shuffled": "shuffled, %", "gap": "gap",
            "order": "needs order, %", "static": "does not, %", "conflict": "conflict, %",
            "agree": "agree, %", "tokens": "tokens"}
COMPARED = ("ordered", "gap", "order", "conflict")  # measures whose differences are told
ORDERS = ("ordered", "shuffled")
# Kinds of toy questions (build_data.py's toy_question) whose answer depends on the order of the
# frames. A telling colour gives none away: it is right in half of the direction questions.
ORDER_KINDS = ("direction_agree", "direction_conflict", "describe", "first", "end")
ABOUT = """\
# Forms of the temporal reward at toy scale

`python tests/ablate.py table` writes this file from {json}; what it says is told in the README,
"What does the temporal reward do?". Variants are in tests/variants/, each with idea and source.

Held-out accuracy in %, greedy, on the toy's test questions: with ordered and with shuffled frames,
and the gap between them; with ordered frames on the questions that need the order (direction,
description, which colour first, where it ends), on those that do not (colour, count, word), and on
the direction questions whose colour is in conflict or agrees with the answer; tokens of a response;
seconds of training on one thread, of the seed that other work on the machine disturbed least.

Every other number is the mean over seeds ± its standard error. A seed is another cold start, order
of questions and sampling; questions and the untrained model are the same. Differences are paired,
since both runs start from the same cold start, and stand with their 95 % interval (Student's t over
seeds, not corrected for the number of comparisons)."""
# Student's t that leaves 2.5 % on either side, for 1, 2, ... degrees of freedom.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
        2.145, 2.131)
# Okabe and Ito's colours, which most colour-blind people can tell apart, and dashes for the rest.
STYLES = [("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."), ("#CC79A7", (0, (5, 1, 1, 1))),
          ("#000000", (0, (3, 2)))]
PALETTE = 128  # colours of a picture's file
SAVE_STEPS = 25  # steps between checkpoints: what a kill costs at most
TAIL = 15  # lines of a failed run's log that are shown


def parse_args(argv=None):
    parser = FlagParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="cold starts, runs, evaluations; resumes")
    run.add_argument("--toy", default="toy",
                     help="folder of the toy; TOY_shortcut: of the one made with --shortcut")
    run.add_argument("--out", help="folder of the runs; default: TOY/ablations")
    run.add_argument("--seeds", type=above(0, int), default=8, help="how many seeds")
    run.add_argument("--first_seed", type=at_least(0, int), default=0,
                     help="the first of them: other seeds repeat a result, into another --out")
    run.add_argument("--steps", type=above(0, int), default=100, help="steps of every T-GRPO run")
    run.add_argument("--jobs", type=above(0, int), default=2,
                     help="commands at a time, a thread each")
    run.add_argument("--only", nargs="+", metavar="NAME", choices=CONFIGS, default=list(CONFIGS),
                     help=f"these of {', '.join(CONFIGS)}; the cold starts too")
    run.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS),
                     help="these only")
    run.set_defaults(function=run_all)
    table = commands.add_parser("table", help="the results as Markdown")
    table.set_defaults(function=write_table)
    plot = commands.add_parser("plot", help="the differences as a picture; needs matplotlib")
    plot.add_argument("--folder", default=str(ROOT / "assets"),
                      help="where differences.png and advantages.png are written")
    plot.set_defaults(function=plot_all)
    for command in (table, plot):
        command.add_argument("--json", default=str(ROOT / "tests" / "ablations.json"),
                             help="the results' file; its table goes beside it")
    args = parser.parse_args(argv)
    if args.command == "run":
        args.toy = str(Path(args.toy))  # without a slash at its end
        args.out = args.out or f"{args.toy}/ablations"
    return args


# ------------------------------------------------------------------- what a run did

def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def short(number):
    """A number to 4 digits, for a small file."""
    return float(f"{number:.4g}")


def scores_of(results) -> dict:
    """Accuracies in % from evaluate.py's {order: result}: all questions, and groups of kinds."""
    rows = {order: [(row["data_source"].removeprefix("toy/"), 100 * row["accuracy"])
                    for row in result["rows"]] for order, result in results.items()}
    kinds = sorted({kind for kind, _ in rows["ordered"]})

    def score(order, kinds=kinds):
        return statistics.fmean(accuracy for kind, accuracy in rows[order] if kind in kinds)

    ordered, shuffled = score("ordered"), score("shuffled")
    scores = {"ordered": ordered, "shuffled": shuffled, "gap": ordered - shuffled,
              "order": score("ordered", ORDER_KINDS),
              "static": score("ordered", set(kinds) - set(ORDER_KINDS)),
              "conflict": score("ordered", ["direction_conflict"]),
              "agree": score("ordered", ["direction_agree"])}
    return {**{name: short(value) for name, value in scores.items()},
            "kinds": {kind: [short(score(order, [kind])) for order in ORDERS] for kind in kinds}}


def read_run(out, seed, run) -> dict | None:
    """One run as it stands in the results' file, with its "header"; None if it is unfinished."""
    model, *evaluations = result_files(out, seed, run)
    if not all(path.exists() for path in (model, *evaluations)):
        return None
    results = {order: json.loads(path.read_text(encoding="utf-8"))
               for order, path in zip(ORDERS, evaluations)}
    header, *steps = read_lines(model.parent / "metrics.jsonl")
    setting, _, name = run.rpartition("/")  # the cold start has no setting: "sft"
    return {"setting": setting, "config": name, "seed": seed, **scores_of(results),
            "tokens": short(statistics.fmean(row["tokens"] for row in results["ordered"]["rows"])),
            "seconds": short(sum(row["time/step"] for row in steps)),
            "skipped": sum(row["data/skipped"] for row in steps)
            + sum(len(result["skipped"]) for result in results.values()), "header": header}


def write_results(args):
    """OUT.json, one run a line: everything that is finished. The whole file, or the one before."""
    seeds = sorted(int(path.name[4:]) for path in Path(args.out).glob("seed*")
                   if path.name[4:].isdigit())
    found = [read_run(args.out, seed, run) for run in all_runs(SETTINGS, CONFIGS) for seed in seeds]
    runs = [run for run in found if run]
    headers = [run.pop("header") for run in runs]
    versions = {package: ", ".join(sorted({header["versions"][package] for header in headers}))
                for package in headers[0]["versions"]}
    commits = sorted({header["git_commit"] or "" for header in headers})
    head = json.dumps({"versions": versions, "git_commits": commits, "steps": args.steps})
    lines = ",\n".join(json.dumps(run, separators=(",", ":")) for run in runs)
    write_whole({f"{args.out}.json": [f'{head[:-1]}, "runs": [\n{lines}\n]}}\n']})


# ---------------------------------------------------------------------------- running

def all_runs(settings, names) -> list[str]:
    """The runs of a seed, as their folders are called, in the order of running."""
    return ["sft", *(f"{setting}/{name}" for setting, name in product(settings, names))]


def result_files(out, seed, run) -> list[Path]:
    """What a run leaves when it is finished, in the order of its commands. (config.json is the
    last file of a model that is written.)"""
    folder = Path(out, f"seed{seed}", run)
    evaluations = folder.with_name(f"eval_{folder.name}")
    return [folder / "config.json", *(evaluations / f"toy_8_{order}.json" for order in ORDERS)]


def commands_of(args, seed, run) -> list[list[str]]:
    """The commands of a run: training, and two evaluations."""
    model, *evaluations = result_files(args.out, seed, run)
    common = ["--seed", str(seed), "--output", str(model.parent), "--resume",
              "--val_steps", "0"]  # it is scored at the end
    if run == "sft":
        toy, train = args.toy, [str(ROOT / "sft.py"), f"@{args.toy}/sft.args", *common]
    else:
        setting, name = run.split("/")
        toy = args.toy + SETTINGS[setting][0]
        script = variant_of(args.out, name) if name in VARIANTS else ROOT / "tgrpo.py"
        # later flags win, so a configuration's come last
        train = [str(script), f"@{toy}/tgrpo.args", "--model", f"{args.out}/seed{seed}/sft",
                 *common, "--max_steps", str(args.steps), "--save_steps", str(SAVE_STEPS),
                 "--num_workers", "1", *CONFIGS[name][1].split()]
    evaluate = [str(ROOT / "evaluate.py"), f"@{toy}/evaluate.args", "--model", str(model.parent)]
    return [[sys.executable, *command] for command in (
        train, *([*evaluate, "--output", str(path.parent), "--order", order]
                 for path, order in zip(evaluations, ORDERS)))]


def variant_of(out, name) -> Path:
    """The copy of tgrpo.py with a variant's diff."""
    return Path(out, "variants", name, "tgrpo.py")


def make_variant(out, name):
    """Copies tgrpo.py and applies a variant's diff to the copy. InputError where there are runs of
    another copy, whose results are not this one's."""
    script, diff = variant_of(out, name), VARIANTS[name].resolve()
    # Not in the repository: there git would look for a diff's tgrpo.py at the top.
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copy(ROOT / "tgrpo.py", folder))
        try:
            subprocess.run(["git", "apply", diff], cwd=folder, check=True, capture_output=True,
                           text=True)
        except FileNotFoundError:
            raise InputError("variants are applied by git, which is not installed") from None
        except subprocess.CalledProcessError as error:
            raise InputError(f"{diff} does not apply to tgrpo.py: {error.stderr}") from None
        text = copy.read_text(encoding="utf-8")
    if any(Path(out).glob(f"seed*/*/{name}")) and script.read_text(encoding="utf-8") != text:
        raise InputError(f"{out} has runs of another {name}, by an earlier diff or tgrpo.py: "
                         f"remove seed*/*/{name} and seed*/*/eval_{name}, or name another --out")
    script.parent.mkdir(parents=True, exist_ok=True)
    write_whole({script: [text]})


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

    def run(self, seed, run, cold_start=None):
        """All of one run, what is finished already left out. InputError says what went wrong."""
        if cold_start and cold_start.exception():  # which waits until it has ended
            raise InputError("its cold start failed")
        results = result_files(self.args.out, seed, run)
        folder = results[0].parent
        folder.parent.mkdir(parents=True, exist_ok=True)
        again = False  # what follows a command that was run is of an earlier model
        for result, command in zip(results, commands_of(self.args, seed, run)):
            if again or not result.exists():
                again = True
                self.call(command, folder.with_name(f"{folder.name}.log"), result)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)

    def call(self, command, log, result):
        if self.stopping.is_set():
            raise InputError("stopped")
        with log.open("a", encoding="utf-8") as file:
            file.write(f"\n$ {shlex.join(command)}\n")
            file.flush()
            # a variant's copy of tgrpo.py imports the others from here
            path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            # a session of its own: Ctrl-C is for this process, which passes it on once
            child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT,
                                     stdin=subprocess.DEVNULL, start_new_session=True,
                                     pass_fds=[self.lock.fileno()],
                                     env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path})
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
    """Checks the toys and --out, before anything runs."""
    made = ("sft.args", "tgrpo.args", "evaluate.args", "cot.json", "test.json", "model/config.json")
    for setting in dict.fromkeys(["plain", *args.settings]):
        toy = args.toy + SETTINGS[setting][0]
        for name in made:
            if not Path(toy, name).exists():
                raise InputError(f"{toy}/{name} is missing: python build_data.py toy --out {toy}"
                                 + " --shortcut" * (setting == "shortcut"))
        for name in ("cot.json", "test.json"):
            if Path(toy, name).read_bytes() != Path(args.toy, name).read_bytes():
                raise InputError(f"{toy}/{name} is not {args.toy}'s: cold start and test are "
                                 "shared, make both toys with the same flags")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for path in Path(args.out).glob("seed*/*/*/metrics.jsonl"):
        with path.open(encoding="utf-8") as file:
            header = json.loads(file.readline() or "{}")
        steps = header["arguments"]["max_steps"] if header else args.steps
        if steps != args.steps:
            # the learning rate's schedule depends on it: the runs could not be compared
            raise InputError(f"{path.parent} is a run of {steps} steps: give --steps {steps}, or "
                             "name another --out")


def run_all(args) -> int:
    """Every configuration in every setting with every seed; 1 when some failed."""
    prepare(args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    cold_start, *others = all_runs(args.settings, [name for name in CONFIGS if name in args.only])
    failed = []
    with lock_folder(args.out) as lock, ThreadPoolExecutor(args.jobs) as pool:
        for name in VARIANTS.keys() & set(args.only):
            make_variant(args.out, name)
        runner = Runner(args, lock)
        # Cold starts stand first in the queue, so that none waits for one behind it; then all of
        # a seed, so that what is finished at any time can be compared.
        starts = {seed: pool.submit(runner.run, seed, cold_start) for seed in seeds}
        runs = {start: (seed, cold_start) for seed, start in starts.items()}
        runs |= {pool.submit(runner.run, seed, run, starts[seed]): (seed, run)
                 for seed in seeds for run in others}
        try:
            for done, future in enumerate(as_completed(runs), 1):
                seed, run = runs[future]
                try:
                    future.result()
                except InputError as error:
                    failed.append(f"seed {seed}, {run}")
                    said = f"FAILED: {error}"
                else:
                    write_results(args)
                    said = summary(read_run(args.out, seed, run))
                print(f"[{done}/{len(runs)}] seed {seed}, {run}: {said}", flush=True)
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
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(n) if n > 1 else None


def interval(values) -> tuple | None:
    """Mean, and the bounds of its 95 % interval by Student's t; None with fewer than two values.

    >>> [round(bound, 2) for bound in interval([1.0, 2.0, 3.0])]  # 2 ± 4.303 / sqrt(3)
    [2.0, -0.48, 4.48]
    """
    middle, error = mean_and_error(values) if values else (None, None)
    if error is None:
        return None
    reach = error * T_95[min(len(values) - 1, len(T_95)) - 1]
    return middle, middle - reach, middle + reach


def by_seed(runs, setting, name) -> dict:
    """{seed: run} of a configuration in a setting; the cold start is of every setting."""
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
    """Mean and standard error as text; one seed shows no spread."""
    middle, error = mean_and_error(values)
    return f"{middle:.1f} (1 seed)" if error is None else f"{middle:.1f} ± {error:.1f}"


def bounds_cell(bounds) -> str:
    """A mean and its interval as text, signed; a dash where two seeds are not there."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*bounds) if bounds else "-"


# ------------------------------------------------------------------------------ tables

def read_results(path) -> dict:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: python tests/ablate.py run makes it") from None


def tables_of(results) -> str:
    """Two tables a setting: each configuration, and what it differs from BASE; and what to make
    of so many comparisons."""
    runs, compared = results["runs"], comparisons(results["runs"])
    parts = []
    for setting, (_, heading) in SETTINGS.items():
        means = [["configuration", *MEASURES.values(), "training, s", "seeds"]]
        differences = [[f"less `{BASE}`", *map(MEASURES.get, COMPARED), "seeds"]]
        for name in ["sft", *CONFIGS]:
            if not (found := by_seed(runs, setting, name).values()):
                continue
            means.append([f"`{name}`", *(cell([run[measure] for run in found])
                                         for measure in MEASURES),
                          f"{min(run['seconds'] for run in found):.0f}", str(len(found))])
            if name not in ("sft", BASE):
                differences.append([
                    f"`{name}`: {CONFIGS[name][0]}",
                    *(bounds_cell(compared.get((setting, name, measure))) for measure in COMPARED),
                    str(len(paired(runs, setting, name, COMPARED[0])))])
        parts += [f"## {heading}", markdown(means).strip(), markdown(differences).strip()]
    return "\n\n".join([*parts, *notes_of(results, compared)])


def notes_of(results, compared) -> list[str]:
    """How many comparisons there are, which intervals exclude zero, and what the runs were."""
    apart = [f"{setting}, `{name}`, {measure} {bounds_cell(bounds)}"
             for (setting, name, measure), bounds in compared.items()
             if bounds[1] > 0 or bounds[2] < 0]
    notes = [f"{len(compared)} comparisons, all of them shown. If nothing differed, "
             f"{len(compared) / 20:.1f} of their 95 % intervals would be expected to exclude zero. "
             f"Those that do: {'; '.join(apart) or 'none'}."]
    versions = ", ".join(f"{name} {found}" for name, found in results["versions"].items())
    notes.append(f"{results['steps']} steps; commit {', '.join(results['git_commits'])}; "
                 f"{versions}; one thread a run.")
    absent = [f"{setting}/{name}" for setting, name in product(SETTINGS, CONFIGS)
              if not by_seed(results["runs"], setting, name)]
    if absent:
        notes.append(f"Not run: {', '.join(absent)}.")
    if skipped := sum(run["skipped"] for run in results["runs"]):
        notes.append(f"Questions that were skipped: {skipped}.")
    return notes


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


def plot_differences(pyplot, compared, path):
    """Every comparison with BASE: a row of panels a setting, a panel a measure."""
    names = [name for name in CONFIGS if name != BASE][::-1]  # the first on top
    figure, axes = pyplot.subplots(len(SETTINGS), len(COMPARED), figsize=(13, 7), sharey=True)
    for axis, (setting, measure) in zip(axes.flat, product(SETTINGS, COMPARED)):
        for y, name in enumerate(names):
            if bounds := compared.get((setting, name, measure)):
                middle, low, high = bounds
                colour = STYLES[0][0] if low <= 0 <= high else STYLES[1][0]
                axis.errorbar(middle, y, xerr=[[middle - low], [high - middle]], fmt="o",
                              color=colour, capsize=3)
        axis.axvline(0, color="0.4", linewidth=1)
        axis.set_title(f"{setting}: {MEASURES[measure]}", fontsize=13)
        axis.set_yticks(range(len(names)), names)
    figure.supxlabel(f"difference to {BASE} in points, 95 % interval over seeds")
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
    pyplot, folder = import_pyplot(), Path(args.folder)
    plot_advantages(pyplot, folder / "advantages.png")  # of no run, but of the algorithm
    compared = comparisons(read_results(args.json)["runs"])
    if not compared:
        raise InputError(f"{args.json} has no two seeds of {BASE} and another configuration yet")
    plot_differences(pyplot, compared, folder / "differences.png")


def main(args):
    return args.function(args)


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args))
