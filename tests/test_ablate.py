"""ablate.py: statistics by hand, what it runs again and what not, the variants, and the README's
examples."""
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ablate
import build_data
from build_data import InputError
from conftest import ROOT, cells, run

README = (ROOT / "README.md").read_text(encoding="utf-8")
RIGHT, WRONG = (f"<think>so</think><answer>{letter}</answer>" for letter in "AB")
CHOICE = {"problem_id": 0, "problem_type": "multiple choice", "solution": "<answer>A</answer>"}
# Scripts in the place of sft.py, tgrpo.py and evaluate.py: what they leave is what ablate.py reads.
TRAIN = '''
import json, pathlib, sys
argv = " ".join(sys.argv)
out = pathlib.Path(argv.split("--output ")[1].split()[0])
name = "/".join(out.parts[out.parts.index("ablations") + 1:])
with open("calls", "a") as calls:
    calls.write(f"train {name}\\n")
print("a line\\nstep 1\\rstep 2 of", name)
if name in pathlib.Path("broken").read_text().split():
    sys.exit("no luck today")
out.mkdir(parents=True)
rows = [{"arguments": {"max_steps": 900 if "sft.py" in argv else 6}, "git_commit": "c0ffee",
         "versions": {"torch": "2"}}]
rows += [{"step": s, "time/step": 0.5, "data/skipped": s == 2, "reward/accuracy": s / 10,
          "group/p": 0.5} for s in range(1, 7)]
(out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(out / "checkpoint-6").mkdir()
(out / "config.json").write_text("{}")
'''
EVALUATE = '''
import json, pathlib, sys
argv = " ".join(sys.argv)
out, order = argv.split("--output ")[1].split()[0], argv.split("--order ")[1].split()[0]
with open("calls", "a") as calls:
    calls.write(f"{order} {out.split('ablations/')[1]}\\n")
pathlib.Path(out).mkdir(parents=True, exist_ok=True)
right = {"ordered": [1, 0.5, 1, 0], "shuffled": [0, 0.5, 1, 0]}[order]
kinds = ["direction_conflict", "end", "direction_agree", "count"]
rows = [{"data_source": f"toy/{kind}", "accuracy": a, "tokens": 20}
        for kind, a in zip(kinds, right)]
pathlib.Path(out, f"toy_8_{order}.json").write_text(json.dumps({"rows": rows, "skipped": []}))
'''


def main(*argv):
    return ablate.main(ablate.parse_args(argv))


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A folder with both toys and scripts that leave the right files at once. Calling it runs
    `ablate.py run` there, in the plain setting unless --settings come last; returns its exit status
    and what was started."""
    for toy in ("toy", "toy_shortcut"):
        (tmp_path / toy / "model").mkdir(parents=True)
        for name in ("sft.args", "tgrpo.args", "evaluate.args", "cot.json", "test.json",
                     "model/config.json"):
            (tmp_path / toy / name).write_text("{}")
    for name, text in (("sft", TRAIN), ("tgrpo", TRAIN), ("evaluate", EVALUATE)):
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "broken").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablate, "ROOT", tmp_path)

    def call(*flags):
        Path("calls").write_text("")
        status = main("run", "--steps", "6", "--settings", "plain", *flags)
        return status, Path("calls").read_text().splitlines()
    return call


def results():
    return json.loads(Path("toy/ablations.json").read_text())


# --------------------------------------------------------------------------- statistics

def entry(config, seed, setting="plain", **measures):
    return {"config": config, "setting": setting, "seed": seed, "skipped": 0, "seconds": 50 + seed,
            **dict.fromkeys(ablate.MEASURES, 0.0), **measures}


def test_mean_and_standard_error_by_hand():
    # deviations -2, 0, 2: unbiased variance 8 / 2 = 4, standard error 2 / sqrt(3)
    assert ablate.mean_and_error([1, 3, 5]) == (3, pytest.approx(1.1547005))
    assert ablate.mean_and_error([4]) == (4, None)


@pytest.mark.parametrize("values, expected", [
    ([], None), ([4], None),
    ([1, 3], (2, 2 - 12.706, 2 + 12.706)),  # standard error 1, one degree of freedom
    ([5, 5, 5], (5, 5, 5)),
    # eight seeds: standard deviation sqrt(8 / 7), standard error 1 / sqrt(7), t 2.365
    ([1, -1] * 4, (0, -2.365 / 7 ** 0.5, 2.365 / 7 ** 0.5)),
    # more seeds than the table has: a little wider than needed
    ([1, -1] * 20, (0, -2.131 / 39 ** 0.5, 2.131 / 39 ** 0.5)),
])
def test_an_interval_is_students(values, expected):
    assert ablate.interval(values) == (expected and pytest.approx(expected))


def test_differences_are_paired_by_seed_and_setting_and_need_both():
    runs = [entry("grpo", 0, gap=10), entry("grpo", 1, gap=30), entry("grpo", 2, gap=1),
            entry("tgrpo", 1, gap=28), entry("tgrpo", 0, gap=12), entry("tgrpo", 4, gap=0),
            entry("grpo", 1, "shortcut", gap=70), entry("tgrpo", 1, "shortcut", gap=77)]
    assert ablate.paired(runs, "plain", "tgrpo", "gap") == [2, -2]
    assert ablate.paired(runs, "shortcut", "tgrpo", "gap") == [7]
    assert ablate.paired(runs, "plain", "joint", "gap") == []


def table_of(runs):
    """[rows of each table, cells by the first] and the notes of a results file."""
    text = ablate.tables_of({"runs": runs, "versions": {"torch": "2"}, "steps": 9,
                             "git_commits": ["c0ffee"]})
    tables = [[[cell.strip() for cell in row.split("|")[1:-1]] for row in part.splitlines()]
              for part in text.split("\n\n") if part.startswith("|")]
    return [{first: rest for first, *rest in table} for table in tables], text


def test_the_tables_have_means_differences_and_every_setting():
    runs = [entry("grpo", seed, ordered=value) for seed, value in enumerate([70, 80, 90])]
    runs += [entry("tgrpo", seed, ordered=value) for seed, value in enumerate([71, 82, 93])]
    runs += [entry("joint", 0, ordered=12.34), entry("sft", 1, "", conflict=50)]
    (means, differences, shortcut, empty), text = table_of(runs)
    assert (means["`grpo`"][0], means["`grpo`"][-2:]) == ("80.0 ± 5.8", ["50", "3"])
    assert means["`joint`"][0] == "12.3 (1 seed)"
    # 71, 82, 93: standard deviation 11; differences 1, 2, 3: standard error 1 / sqrt(3), t 4.303
    assert means["`tgrpo`"][0] == "82.0 ± 6.4"
    assert differences["`tgrpo`: T-GRPO as written"] == [
        "+2.0 [-0.5, +4.5]", *["+0.0 [+0.0, +0.0]"] * 3, "3"]
    joint, = [cells for name, cells in differences.items() if name.startswith("`joint`: Resp")]
    assert joint == ["-"] * 4 + ["1"]
    assert "`grpo`" not in differences and set(means) & set(shortcut) > {"`sft`"}  # of both
    assert len(empty) == 2  # heading and ruler
    assert "9 steps; commit c0ffee; torch 2; one thread a run." in text
    assert "plain/strict, " in text.split("Not run: ")[1] and "shortcut/grpo" in text


def test_the_number_of_comparisons_is_told_and_every_interval_without_zero():
    runs = [entry("grpo", seed, setting) for seed in range(3) for setting in ablate.SETTINGS]
    _, text = table_of(runs)
    assert "0 comparisons, all of them shown" in text and "Those that do: none." in text
    for seed, value in enumerate([9, 10, 11]):
        runs += [entry("tgrpo", seed, conflict=value), entry("joint", seed, "shortcut", gap=-value)]
    _, text = table_of(runs)
    assert "8 comparisons, all of them shown" in text and "0.4 of their 95 % intervals" in text
    assert ("Those that do: plain, `tgrpo`, conflict +10.0 [+7.5, +12.5]; "
            "shortcut, `joint`, gap -10.0 [-12.5, -7.5].") in text


# ------------------------------------------------------------------------------- running

def test_runs_follow_their_cold_start_and_are_measured_by_group_of_questions(lab):
    status, calls = lab("--seeds", "2", "--only", "tgrpo", "grpo", "--settings", *ablate.SETTINGS)
    # two seeds, a cold start and two settings of two, one training and two orders each
    assert status == 0 and len(calls) == 30
    for seed, setting, name in product((0, 1), ablate.SETTINGS, ("tgrpo", "grpo")):
        started = calls.index(f"train seed{seed}/{setting}/{name}")
        assert calls.index(f"train seed{seed}/sft") < started
    assert [(run["setting"], run["config"], run["seed"]) for run in results()["runs"]] == [
        (*run, seed) for run in [("", "sft"), ("plain", "grpo"), ("plain", "tgrpo"),
                                 ("shortcut", "grpo"), ("shortcut", "tgrpo")] for seed in (0, 1)]
    found = results()["runs"][2]
    # accuracies 1, 0.5, 1, 0 ordered and 0, 0.5, 1, 0 shuffled; the last needs no order
    assert {key: found[key] for key in ("ordered", "shuffled", "gap", "order", "static",
                                        "conflict", "agree", "tokens", "seconds", "skipped")} == {
        "ordered": 62.5, "shuffled": 37.5, "gap": 25, "order": pytest.approx(83.33),
        "static": 0, "conflict": 100, "agree": 100, "tokens": 20, "seconds": 3, "skipped": 1}
    assert found["kinds"]["direction_conflict"] == [100, 0]
    assert results()["git_commits"] == ["c0ffee"] and results()["steps"] == 6
    assert not list(Path("toy/ablations").rglob("checkpoint-*"))


def test_only_what_is_missing_is_run_again(lab):
    lab("--seeds", "1", "--only", "tgrpo")
    Path("toy/ablations/seed0/plain/eval_tgrpo/toy_8_shuffled.json").unlink()
    status, calls = lab("--seeds", "1", "--only", "tgrpo", "grpo")
    assert status == 0 and set(calls) == {
        "shuffled seed0/plain/eval_tgrpo", "train seed0/plain/grpo",
        "ordered seed0/plain/eval_grpo", "shuffled seed0/plain/eval_grpo"}


def test_a_model_trained_again_is_evaluated_again(lab):
    lab("--seeds", "1", "--only", "tgrpo")
    shutil.rmtree("toy/ablations/seed0/plain/tgrpo")
    assert len(lab("--seeds", "1", "--only", "tgrpo")[1]) == 3


def test_other_seeds_repeat_a_result_in_another_folder(lab):
    status, calls = lab("--first_seed", "8", "--seeds", "2", "--only", "grpo", "--out",
                        "repeat/ablations")
    assert status == 0 and {call.split()[1] for call in calls if call.startswith("train")} == {
        f"seed{seed}/{run}" for seed in (8, 9) for run in ("sft", "plain/grpo")}


def test_results_of_seeds_and_names_that_were_not_asked_for_stay(lab):
    lab("--seeds", "2", "--only", "tgrpo")
    before = results()
    lab("--seeds", "1", "--only", "tgrpo")
    assert results() == before


def test_a_failed_run_is_reported_with_its_log_and_the_others_go_on(lab, capsys):
    Path("broken").write_text("seed0/plain/tgrpo seed1/sft")
    status, calls = lab("--seeds", "2", "--only", "tgrpo", "grpo", "--jobs", "1")
    said = capsys.readouterr().out
    assert status == 1
    assert "seed 0, plain/tgrpo: FAILED: tgrpo.py ended with status 1" in said
    assert "no luck today" in said and "    step 2 of seed0/plain/tgrpo" in said
    assert "step 1" not in said  # what a progress bar showed before
    assert "seed 1, plain/grpo: FAILED: its cold start failed" in said
    assert [(run["config"], run["seed"]) for run in results()["runs"]] == [("sft", 0), ("grpo", 0)]
    Path("broken").write_text("")
    status, calls = lab("--seeds", "2", "--only", "tgrpo", "grpo")
    assert status == 0 and len(results()["runs"]) == 6
    assert {call for call in calls if call.startswith("train")} == {
        "train seed1/sft", "train seed0/plain/tgrpo", "train seed1/plain/tgrpo",
        "train seed1/plain/grpo"}


def test_a_training_that_ends_without_a_model_is_no_success(lab):
    script = Path("tgrpo.py").read_text().replace('(out / "config.json")', '(out / "other.json")')
    Path("tgrpo.py").write_text(script)  # as after SIGTERM: exit status 0, a checkpoint, no model
    assert lab("--seeds", "1", "--only", "tgrpo")[0] == 1


def slow_runner():
    """A Runner whose cold starts take minutes, and a function that waits until the first runs."""
    Path("sft.py").write_text("import os, time; print('up', os.getsid(0) == os.getpid(), "
                              "flush=True); time.sleep(60)")
    Path("toy/ablations").mkdir()
    log = Path("toy/ablations/seed0/sft.log")

    def wait(future):
        while not (log.exists() and re.search("^up", log.read_text(), re.M)):
            assert not future.done()
            time.sleep(0.05)
        return log.read_text()
    args = ablate.parse_args(["run"])
    return ablate.Runner(args, ablate.lock_folder(args.out)), wait


def test_a_folder_that_another_process_trains_into_is_waited_for(lab, capsys):
    """A killed call's commands go on: they hold the lock that it held."""
    runner, wait = slow_runner()
    with ThreadPoolExecutor(2) as pool:
        future = pool.submit(runner.run, 0, "sft")
        wait(future)
        runner.lock.close()  # as when its process is killed
        locked = pool.submit(ablate.lock_folder, "toy/ablations")
        time.sleep(0.5)
        assert not locked.done()
        runner.stop()
        locked.result(timeout=10).close()
    assert "waiting until those who train into it have ended" in capsys.readouterr().out


def test_stopping_ends_what_runs_and_starts_no_more(lab):
    runner, wait = slow_runner()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(runner.run, 0, "sft")
        assert "up True" in wait(future)  # a session of its own, which no Ctrl-C reaches
        runner.stop()
        with pytest.raises(InputError, match="ended with status -15"):
            future.result(timeout=10)
    with pytest.raises(InputError, match="stopped"):
        runner.run(1, "sft")


def test_runs_of_another_number_of_steps_are_not_mixed_in(lab):
    lab("--seeds", "1", "--only", "tgrpo")
    with pytest.raises(InputError, match="plain/tgrpo is a run of 6 steps: give --steps 6"):
        lab("--seeds", "1", "--only", "tgrpo", "--steps", "7")


def test_a_missing_toy_and_missing_results_say_what_makes_them(lab, tmp_path):
    with pytest.raises(InputError, match="build_data.py toy --out elsewhere$"):
        lab("--toy", "elsewhere")
    shutil.copytree("toy", "elsewhere")
    with pytest.raises(InputError, match="build_data.py toy --out elsewhere_shortcut --shortcut$"):
        lab("--toy", "elsewhere", "--settings", "shortcut")
    with pytest.raises(InputError, match="ablate.py run makes it"):
        main("table", "--json", "absent.json")


def test_toys_of_other_questions_are_not_compared(lab):
    Path("toy_shortcut/test.json").write_text("[]")
    with pytest.raises(InputError, match="toy_shortcut/test.json is not toy's"):
        lab("--settings", "plain", "shortcut")
    assert lab("--seeds", "1", "--only", "grpo")[0] == 0  # which does not need it


def test_every_configuration_changes_what_it_says_and_nothing_else(tmp_path):
    import tgrpo
    for toy in ("toy", "toy_shortcut"):
        (tmp_path / toy).mkdir()
        (tmp_path / toy / "tgrpo.args").write_text(f"--model=m\n--data={toy}\n--output=o\n")
    args = ablate.parse_args(["run", "--toy", str(tmp_path / "toy"), "--out", str(tmp_path)])
    commands = {name: ablate.commands_of(args, 3, name)[0]
                for name in ablate.all_runs(ablate.SETTINGS, ablate.CONFIGS)[1:]}
    arguments = {name: vars(tgrpo.parse_args(command[2:])) for name, command in commands.items()}
    base = arguments["plain/tgrpo"]
    assert base["model"] == f"{tmp_path}/seed3/sft" and base["max_steps"] == 100
    changed = {name: {flag: value for flag, value in flags.items() if flag != "output"
                      and value != base[flag]} for name, flags in arguments.items()}
    flags = {"grpo": {"alpha": 0}, "strict": {"temporal_test": "gt"},
             "advantage": {"temporal_to": "advantage"}}
    assert changed == {
        f"{setting}/{name}": {**flags.get(name, {}), **data}
        for setting, data in (("plain", {}), ("shortcut", {"data": "toy_shortcut"}))
        for name in ablate.CONFIGS}
    for name, command in commands.items():
        config = name.split("/")[1]
        script = f"{tmp_path}/variants/{config}" if config in ablate.VARIANTS else str(ROOT)
        assert command[1] == f"{script}/tgrpo.py"


def test_the_shortcut_changes_the_colour_of_training_questions_and_nothing_else(tmp_path):
    """Not even the other questions: the cold start, the test and the model are the same bits."""
    for name, flags in (("plain", []), ("shortcut", ["--shortcut"])):
        build_data.build_toy(build_data.parse_args(
            ["toy", "--out", str(tmp_path / name), "--cot", "4", "--train", "24", "--test", "24",
             *flags]))
    files = {path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*")
             if path.is_file() and path.suffix != ".args"}
    plain, shortcut = (json.loads((tmp_path / name / "train.json").read_text())
                       for name in ("plain", "shortcut"))
    conflict = [i for i, record in enumerate(plain) if "conflict" in record["data_source"]]
    assert {str(path) for path in files if (tmp_path / "plain" / path).read_bytes()
            != (tmp_path / "shortcut" / path).read_bytes()} == {
        "train.json", *(f"media/train_{i:05d}.mp4" for i in conflict)}
    assert len(conflict) > 2 and shortcut == [
        record | {"data_source": record["data_source"].replace("conflict", "agree")}
        for record in plain]
    assert "conflict" in (tmp_path / "shortcut" / "test.json").read_text()


@pytest.mark.slow
def test_a_small_run_from_cold_start_to_table(toy, tmp_path):
    for folder, flags in (("toy", []), ("toy_shortcut", ["--shortcut"])):
        run("build_data.py", "toy", "--out", tmp_path / folder, "--cot", 48, "--train", 32,
            "--test", 24, *flags)
        for name, flags in (("sft", ["--num_train_epochs=1"]), ("tgrpo", ["--prompts_per_rank=2"])):
            with (tmp_path / folder / f"{name}.args").open("a") as file:
                file.write("\n".join(flags) + "\n")
    small = str(tmp_path / "toy")
    assert main("run", "--toy", small, "--seeds", "1", "--steps", "2", "--only", "tgrpo",
                "likelihood") == 0
    found = json.loads(Path(f"{small}/ablations.json").read_text())
    assert [(run["setting"], run["config"]) for run in found["runs"]] == [
        ("", "sft"), *product(ablate.SETTINGS, ("tgrpo", "likelihood"))]
    main("table", "--json", f"{small}/ablations.json")
    assert "| `likelihood` |" in cells(tmp_path / "toy" / "ablations.md")


# ---------------------------------------------------------------------------- variants

PATHS = sorted((ROOT / "tests" / "variants").glob("*.diff"))
NAMES = [path.stem for path in PATHS]


@pytest.fixture(scope="session")
def variant(tmp_path_factory):
    """Imports the present tgrpo.py with a variant's diff applied."""
    out = tmp_path_factory.mktemp("variants")

    def load(name):
        ablate.make_variant(out, name)
        spec = importlib.util.spec_from_file_location(f"tgrpo_{name}", ablate.variant_of(out, name))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    return load


@pytest.fixture
def graded(variant, monkeypatch):
    """ablate.graded by a variant: 8 responses to a choice in order, 4 shuffled, right and wrong."""
    def grade(name, right, right_shuffled, **flags):
        monkeypatch.setitem(sys.modules, "tgrpo", variant(name))
        texts = [RIGHT] * right + [WRONG] * (8 - right)
        shuffled = [RIGHT] * right_shuffled + [WRONG] * (4 - right_shuffled)
        return ablate.graded(CHOICE, texts, shuffled, [9] * 8, **flags)
    return grade


def test_the_variants_are_those_that_the_tables_know():
    assert NAMES == ["joint", "likelihood", "margin", "reversed", "tokens", "weight"]
    assert set(ablate.CONFIGS) == {"grpo", "tgrpo", "strict", "advantage", *NAMES}


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_a_variant_is_short_and_says_its_idea(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    start = lines.index("--- a/tgrpo.py")
    assert start > 1 and all(line.startswith("# ") for line in lines[:start])
    assert lines[start + 1] == "+++ b/tgrpo.py" and max(map(len, lines)) <= 100
    assert 0 < sum(line[0] in "+-" for line in lines[start + 2:] if line) <= 20


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_makes_a_step(toy, tmp_path, name):
    ablate.make_variant(tmp_path, name)
    run(ablate.variant_of(tmp_path, name), f"@{toy}/tgrpo.args", "--model", toy / "model",
        "--output", tmp_path / "run", "--max_steps", 1, "--prompts_per_rank", 4, "--G", 4,
        "--G_tilde", 2, "--max_new_tokens", 8, "--num_workers", 1, "--val_steps", 0,
        env={"PYTHONPATH": str(ROOT)})
    _, step = ablate.read_lines(tmp_path / "run" / "metrics.jsonl")
    rows = [row for row in ablate.read_lines(tmp_path / "run" / "rollouts.jsonl")
            if row["frame_order"]]
    assert step["response/tokens"] > 0 and rows
    if name == "reversed":
        assert {tuple(row["frame_order"]) for row in rows} == {(7, 6, 5, 4, 3, 2, 1, 0)}
    second = name not in ("likelihood", "tokens")
    assert all(len(row["responses_shuffled"]) == 2 * second for row in rows)
    if name == "likelihood":  # an untrained model's likelihoods change a little
        assert all(0 < abs(d) < 1 for row in rows for d in row["d"])
    assert (tmp_path / "run" / "config.json").exists()


def test_a_diff_that_does_not_fit_is_named(lab, monkeypatch, tmp_path):
    path = tmp_path / "other.diff"
    path.write_text("# an idea\n--- a/tgrpo.py\n+++ b/tgrpo.py\n@@ -1 +1 @@\n-nothing\n+new\n")
    monkeypatch.setitem(ablate.VARIANTS, "margin", path)
    with pytest.raises(InputError, match="other.diff does not apply to tgrpo.py: .*patch failed"):
        lab("--seeds", "1", "--only", "margin")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="git, which is not installed"):
        lab("--seeds", "1", "--only", "margin")


def test_ones_own_git_diff_is_applied_within_a_repository_too(lab, monkeypatch, tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    path = tmp_path / "mine.diff"
    path.write_text("# an idea\ndiff --git a/tgrpo.py b/tgrpo.py\n--- a/tgrpo.py\n+++ b/tgrpo.py\n"
                    "@@ -1,2 +1,3 @@\n \n+# mine\n import json, pathlib, sys\n")
    monkeypatch.setitem(ablate.VARIANTS, "margin", path)
    lab("--seeds", "1", "--only", "margin")
    assert "# mine" in Path("toy/ablations/variants/margin/tgrpo.py").read_text()


def test_results_of_an_earlier_diff_are_not_taken_for_those_of_the_edited_one(lab, monkeypatch,
                                                                             tmp_path):
    path = tmp_path / "mine.diff"
    diff = "--- a/tgrpo.py\n+++ b/tgrpo.py\n@@ -1,2 +1,3 @@\n \n+# {}\n import json, pathlib, sys\n"
    monkeypatch.setitem(ablate.VARIANTS, "margin", path)
    path.write_text(diff.format("mine"))
    lab("--seeds", "1", "--only", "margin")
    path.write_text(diff.format("edited"))
    for _ in range(2):
        with pytest.raises(InputError, match="has runs of another margin.* remove seed"):
            lab("--seeds", "1", "--only", "margin")
    for name in ("margin", "eval_margin"):
        shutil.rmtree(f"toy/ablations/seed0/plain/{name}")
    assert len(lab("--seeds", "1", "--only", "margin")[1]) == 3


def test_a_variant_runs_as_its_copy_that_imports_from_here(lab, monkeypatch, tmp_path):
    Path("neighbour.py").write_text("word = 'imported'")
    path = tmp_path / "mine.diff"
    path.write_text("# an idea\n--- a/tgrpo.py\n+++ b/tgrpo.py\n@@ -1,3 +1,4 @@\n \n"
                    "+import neighbour; print(neighbour.word, __file__)\n"
                    " import json, pathlib, sys\n argv = \" \".join(sys.argv)\n")
    monkeypatch.setitem(ablate.VARIANTS, "margin", path)
    assert lab("--seeds", "1", "--only", "margin", "grpo")[0] == 0
    copy = "toy/ablations/variants/margin/tgrpo.py"
    for name in ("margin", "grpo"):
        log = Path(f"toy/ablations/seed0/plain/{name}.log").read_text()
        assert (f"imported {tmp_path / copy}" in log or f"imported {copy}" in log) == \
            (name == "margin")
    assert "neighbour" not in Path("tgrpo.py").read_text()


def test_reversed_shows_the_second_group_the_frames_backwards(variant, monkeypatch):
    module = variant("reversed")
    monkeypatch.setattr(module, "encode", lambda processor, record, vision: vision.frames)
    vision = build_data.Vision(torch.arange(5), {}, None)
    args = SimpleNamespace(alpha=0.3, seed=0)
    group = module.example(args, None, {"data_type": "video"}, vision, 7)
    assert group["frame_order"] == group["shuffled"].tolist() == [4, 3, 2, 1, 0]
    assert group["ordered"].tolist() == [0, 1, 2, 3, 4]


def test_margin_adds_alpha_times_the_margin_to_correct_advantages(graded):
    for right, shuffled, r_t in ((6, 2, 0.3 * 0.25), (6, 3, 0), (2, 4, 0), (8, 1, 0.3 * 0.75)):
        group = graded("margin", right, shuffled)
        plain = graded("margin", right, shuffled, alpha=0)
        assert group["parts"]["r_t"] == pytest.approx(r_t)
        assert torch.equal(group["R"], plain["R"])
        assert (group["A"] - plain["A"]).tolist() == pytest.approx(
            [r_t] * right + [0] * (8 - right), abs=1e-6)


def test_weight_multiplies_a_questions_advantages_by_one_and_the_margin(graded):
    for right, shuffled, weight in ((6, 2, 1.25), (6, 3, 1), (2, 4, 0.25)):
        group = graded("weight", right, shuffled)
        # correct: 1 - p above the mean; unbiased deviation sqrt(k (8 - k) / 56)
        expected = weight * (1 - right / 8) / ((right * (8 - right) / 56) ** 0.5 + 1e-4)
        assert group["A"][0].item() == pytest.approx(expected, abs=1e-5)
        assert group["R"].max() == 2  # accuracy and format, no temporal reward


def test_joint_normalises_both_groups_together(graded):
    # R: eight times 2 and four times 1; mean 5/3, unbiased variance (8/9 + 16/9) / 11 = 8/33
    group = graded("joint", 8, 0)
    assert group["A"].tolist() == pytest.approx([(1 / 3) / ((8 / 33) ** 0.5 + 1e-4)] * 8, abs=1e-5)
    assert graded("joint", 8, 4)["A"].tolist() == [0] * 8
    # six of eight and none of four: mean 1.5, unbiased variance 3/11
    A = graded("joint", 6, 0)["A"].tolist()
    assert A == pytest.approx([0.5 / ((3 / 11) ** 0.5 + 1e-4)] * 6 + [-0.9572] * 2, abs=1e-3)


def test_likelihood_pays_correct_responses_for_the_nats_they_lose(variant):
    bonus = variant("likelihood").likelihood_bonus
    d, correct = torch.tensor([2.0, 0.5, -1.0, 9.0, 2.0]), torch.tensor([1, 1, 1, 1, 0]).bool()
    assert bonus(d, correct, 0.3).tolist() == pytest.approx([0.6, 0.15, 0, 1.2, 0])


def test_tokens_keeps_the_fifth_that_shuffling_moves_the_most(variant):
    logps = torch.zeros(3, 6)
    shuffled = torch.tensor([[-0.1, 0.5, -3.0, 0.2, 0.0, -9.0],  # five tokens: one, up or down
                             [-0.1, 0.5, -3.0, 0.2, 0.0, -9.0],  # six: two
                             [-0.1, 0.5, -3.0, 0.2, 0.0, -9.0]])  # one: itself
    mask = torch.tensor([[1.0] * 5 + [0], [1.0] * 6, [1.0] + [0] * 5])
    assert variant("tokens").moved_tokens(logps, shuffled, mask).tolist() == [
        [0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0]]


# -------------------------------------------------------------------- when alpha acts

@pytest.mark.parametrize("correct", [1, 3, 7])
def test_alpha_cancels_from_two_valued_rewards_and_acts_where_it_is_said_to(correct):
    texts = [RIGHT] * correct + [WRONG] * (8 - correct)

    def advantages(alpha, lengths=(9,) * 8, **flags):
        return ablate.graded(CHOICE, texts, [WRONG] * 4, lengths, alpha=alpha, l_min=16, l_max=24,
                             **flags)["A"]
    for alpha in (0.1, 0.2, 0.3, 0.4, 1.0):
        # up to the 1e-4 that is added to the standard deviation
        assert torch.allclose(advantages(alpha), advantages(0), atol=1e-3)
        for flags in ({"temporal_to": "advantage"}, {"scale_advantages": "none"}):
            moved = (advantages(alpha, **flags) - advantages(0, **flags)).abs().max()
            assert moved > alpha / 10
    if correct > 1:  # the length reward makes a third value
        lengths = [20] + [9] * 7
        assert (advantages(0.3, lengths) - advantages(0, lengths)).abs().max() > 0.01


def test_a_policy_blind_to_order_passes_the_temporal_test_as_often_as_the_readme_says():
    percent = re.search(r"between (\d+) and (\d+) % of the time .*?strict .*?between (\d+) and "
                        r"(\d+) %", " ".join(README.split())).groups()
    chances = [i / 100 for i in range(20, 91)]
    rates = [[100 * ablate.pass_rate(chance, test=test) for chance in chances]
             for test in ("ge", "gt")]
    assert [round(f(values)) for values in rates for f in (min, max)] == list(map(int, percent))


def test_the_pass_rate_by_enumeration():
    outcomes = list(product((0, 1), repeat=5))  # three ordered and two shuffled responses
    passed = sum(0.3 ** sum(o) * 0.7 ** (5 - sum(o)) for o in outcomes
                 if sum(o[:3]) / 3 >= sum(o[3:]) / 2)
    assert ablate.pass_rate(0.3, G=3, G_tilde=2) == pytest.approx(passed)
    assert ablate.pass_rate(1.0) == 1 and ablate.pass_rate(1.0, test="gt") == 0


# ---------------------------------------------- the README's figures and worked example

@pytest.mark.parametrize("name", ["ablations", "ablations_repeat"])
def test_the_committed_tables_are_what_the_results_give(tmp_path, name):
    shutil.copy(ROOT / "tests" / f"{name}.json", tmp_path)
    main("table", "--json", str(tmp_path / f"{name}.json"))
    assert (tmp_path / f"{name}.md").read_text() == \
        (ROOT / "tests" / f"{name}.md").read_text(), "python tests/ablate.py table"


def test_the_readmes_figures_of_the_ablations_stand_in_the_tables():
    section = README.split("### What was measured")[1].split("\n## ")[0]
    number = r"[+-]\d+\.\d"
    figure = rf"\d+\.\d ± \d+\.\d|{number} \[{number}, {number}\]"
    tables, repeated = ((ROOT / "tests" / f"{name}.md").read_text()
                        for name in ("ablations", "ablations_repeat"))
    seeds, new_seeds = (re.findall(figure, part) for part in section.split("On eight new seeds"))
    assert len(seeds) == 4 + 2 * 9 + 2 and [each for each in seeds if each not in tables] == []
    assert len(new_seeds) == 2 and [each for each in new_seeds if each not in repeated] == []
    # what excludes zero is told, and was repeated
    apart = re.findall(rf"`\w+`, \w+ ({figure})", tables.split("Those that do:")[1])
    assert apart == seeds[-2:] and "Those that do: none." in repeated


EXAMPLE = README.split("### One group of one step")[1].split("\n## ")[0]


def worked_example() -> tuple[list, list]:
    """The README's rows: (response, numbers) of the ordered group and of the shuffled one."""
    form = re.search("`(<think>.*</answer>)`", EXAMPLE)[1].replace("\\n", "\n")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in EXAMPLE.splitlines()
             if re.match(r"\| ~?\d", line)]
    rows = [(re.sub("(?s)5(.+)3(.+)8", rf"{starts}\g<1>{ends}\g<2>{answer}", form),
             *(float(n) for n in numbers if n)) for _, starts, ends, answer, *numbers in cells]
    return rows[:8], rows[8:]


def test_the_worked_example_is_what_the_code_computes():
    ordered, shuffled = worked_example()
    assert len(ordered) == 8 and len(shuffled) == 4
    record = {"problem_id": 1230, "problem_type": "regression", "solution": "<answer>7</answer>"}
    length = int(re.search(r"response has (\d+)", EXAMPLE)[1])

    def grade(alpha):
        return ablate.graded(record, [row[0] for row in ordered], [row[0] for row in shuffled],
                             [length] * 8, alpha=alpha, l_min=16, l_max=24)
    sample = grade(0.3)
    parts = sample["parts"]
    columns = [parts["accuracy"], parts["format"], parts["temporal"], parts["length"], sample["R"],
               sample["A"], grade(0)["A"]]
    for i, values in enumerate(zip(*(column.tolist() for column in columns))):
        assert list(ordered[i][1:]) == pytest.approx(values, abs=0.0051), i
    assert (parts["p"], parts["p_tilde"], parts["r_t"]) == (0.625, 0.5, 0.3)
    assert all(words in EXAMPLE for words in ("5/8", "2/4", "$r_t = 0.3$"))
    mean, spread = sample["R"].mean().item(), sample["R"].std().item()
    assert f"{mean:.3f}" in EXAMPLE and f"{spread:.3f}" in EXAMPLE
    assert [row[1] for row in shuffled] == pytest.approx([0.43, 0.71, 0.71, 0.43])


# -------------------------------------------------------------------------------- plots

def test_plot_without_matplotlib_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        main("plot")


def test_pictures_of_the_algorithm_and_of_the_results(tmp_path, lab):
    pytest.importorskip("matplotlib")
    lab("--seeds", "2", "--only", "tgrpo", "grpo")
    main("plot", "--json", "toy/ablations.json", "--folder", "a")
    for path in ("a/differences.png", "a/advantages.png"):
        assert 10_000 < (tmp_path / path).stat().st_size < 150_000
    lab("--seeds", "1", "--only", "grpo", "--out", "elsewhere/ablations")
    with pytest.raises(InputError, match="no two seeds of grpo and another"):
        main("plot", "--json", "elsewhere/ablations.json", "--folder", "c")
    assert [path.name for path in Path("c").iterdir()] == ["advantages.png"]  # needs no run


def test_help_and_mistakes_on_the_command_line():
    assert "resumes" in run("tests/ablate.py", "--help").stdout
    result = run("tests/ablate.py", "run", "--only", "nonsense", check=False)
    assert result.returncode == 2 and "invalid choice: 'nonsense'" in result.stderr
