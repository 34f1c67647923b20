"""ablate.py: statistics by hand, what it runs again and what not, and the README's examples."""
import json
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
import torch

import ablate
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
name = f"{out.parent.name}/{out.name}"
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
    """A folder with a toy and scripts that leave the right files at once. Calling it runs
    `ablate.py run` there; returns its exit status and what was started."""
    for name in ("sft.args", "tgrpo.args", "evaluate.args", "model/config.json"):
        (tmp_path / "toy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "toy" / name).write_text("{}")
    records = [{"data_type": "image"}, {"data_type": "video"}]
    (tmp_path / "toy" / "train.json").write_text(json.dumps(records))
    for name, text in (("sft", TRAIN), ("tgrpo", TRAIN), ("evaluate", EVALUATE)):
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "broken").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablate, "ROOT", tmp_path)

    def call(*flags):
        Path("calls").write_text("")
        status = main("run", "--steps", "6", *flags)
        return status, Path("calls").read_text().splitlines()
    return call


def results():
    return json.loads(Path("toy/ablations.json").read_text())


# --------------------------------------------------------------------------- statistics

def entry(config, seed, **measures):
    return {"config": config, "seed": seed, "skipped": 0, "seconds": 50 + seed,
            **dict.fromkeys(ablate.MEASURES, 0.0), **measures}


def test_mean_and_standard_error_by_hand():
    # deviations -2, 0, 2: unbiased variance 8 / 2 = 4, standard error 2 / sqrt(3)
    assert ablate.mean_and_error([1, 3, 5]) == (3, pytest.approx(1.1547005))
    assert ablate.mean_and_error([4]) == (4, None)


def test_differences_are_paired_by_seed_and_need_both():
    runs = [entry("tgrpo", 0, gap=10), entry("tgrpo", 1, gap=30), entry("tgrpo", 2, gap=1),
            entry("grpo", 1, gap=28), entry("grpo", 0, gap=12), entry("grpo", 4, gap=0)]
    assert ablate.paired(runs, "grpo", "tgrpo", "gap") == [2, -2]


def test_the_table_has_mean_error_pairs_and_says_where_there_is_no_spread():
    runs = [entry("tgrpo", seed, ordered=value) for seed, value in enumerate([70, 80, 90])]
    runs += [entry("grpo", seed, ordered=value) for seed, value in enumerate([71, 82, 93])]
    runs += [entry("zero", 0, ordered=12.34)]
    table = ablate.tables_of({"runs": runs, "versions": {"torch": "2"}, "steps": 9})
    assert "T-GRPO of 9 steps; torch 2; one thread a run." in table
    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]]
             for row in table.splitlines() if row.startswith("|")}
    assert cells["`tgrpo`: T-GRPO as written"][0] == "80.0 ± 5.8"
    ordered, *_, difference, gap, seeds = cells["`grpo`: GRPO: no temporal reward"]
    assert cells["`grpo`"][-1] == "50"  # seconds of the fastest seed
    # 71, 82, 93: standard deviation 11; differences 1, 2, 3: standard deviation 1
    assert (ordered, difference, gap, seeds) == ("82.0 ± 6.4", "+2.0 ± 0.6", "+0.0 ± 0.0", "3")
    assert cells["`zero`: no cold start"][0] == "12.3 (1 seed)"
    assert cells["`zero`: no cold start"][-3] == "-57.7 (1 seed)"
    assert cells["`tgrpo` less `grpo`"][0] == "-2.0 ± 0.6"
    assert cells["`advantage` less `grpo`"] == ["-"] * 4 + ["0"]
    assert "Not run: sft, advantage" in table


def test_curves_are_means_over_bins_and_absent_where_nothing_was_measured():
    steps = [{"step": s, "a": s} if s != 6 else {"step": 6} for s in range(1, 7)]
    assert ablate.thin(steps, "a") == [3.0, None]
    assert ablate.thin(steps[:5] + [{"step": 6, "a": 1 / 3}], "a") == [3.0, 0.3333]


def test_a_band_is_the_standard_error_over_seeds():
    seeds = [{"a": [1.0, None]}, {"a": [3.0, 1.0]}, {}]
    assert ablate.band_of(seeds, "a") == [(2.5, 2.0, 1.0)]  # the bin of steps 1 to 5


# ------------------------------------------------------------------------------- running

def test_runs_follow_their_cold_start_and_are_measured_by_group_of_questions(lab):
    status, calls = lab("--seeds", "2", "--only", "tgrpo", "grpo", "--jobs", "2")
    assert status == 0 and len(calls) == 18  # two seeds, three models, one training, two orders
    for seed, name in product((0, 1), ("tgrpo", "grpo")):
        assert calls.index(f"train seed{seed}/sft") < calls.index(f"train seed{seed}/{name}")
    assert [(run["config"], run["seed"]) for run in results()["runs"]] == [
        ("sft", 0), ("sft", 1), ("tgrpo", 0), ("tgrpo", 1), ("grpo", 0), ("grpo", 1)]
    found = results()["runs"][2]
    # accuracies 1, 0.5, 1, 0 ordered and 0, 0.5, 1, 0 shuffled; the last needs no order
    assert {key: found[key] for key in ("ordered", "shuffled", "gap", "order", "static",
                                        "conflict", "agree", "tokens", "seconds", "skipped")} == {
        "ordered": 62.5, "shuffled": 37.5, "gap": 25, "order": pytest.approx(83.33),
        "static": 0, "conflict": 100, "agree": 100, "tokens": 20, "seconds": 3, "skipped": 1}
    assert found["curves"] == {"reward/accuracy": [0.3, 0.6], "group/p": [0.5, 0.5]}
    assert found["kinds"]["direction_conflict"] == [100, 0]
    assert results()["git_commits"] == ["c0ffee"] and results()["steps"] == 6
    assert not list(Path("toy/ablations").glob("seed*/*/checkpoint-*"))


def test_only_what_is_missing_is_run_again(lab):
    lab("--seeds", "1", "--only", "tgrpo")
    Path("toy/ablations/seed0/eval_tgrpo/toy_8_shuffled.json").unlink()
    status, calls = lab("--seeds", "1", "--only", "tgrpo", "grpo")
    assert status == 0 and set(calls) == {"shuffled seed0/eval_tgrpo", "train seed0/grpo",
                                          "ordered seed0/eval_grpo", "shuffled seed0/eval_grpo"}


def test_results_of_seeds_and_names_that_were_not_asked_for_stay(lab):
    lab("--seeds", "2", "--only", "tgrpo")
    before = results()
    lab("--seeds", "1", "--only", "sft")
    assert results() == before


def test_a_failed_run_is_reported_with_its_log_and_the_others_go_on(lab, capsys):
    Path("broken").write_text("seed0/tgrpo seed1/sft")
    status, calls = lab("--seeds", "2", "--only", "tgrpo", "grpo", "zero", "--jobs", "1")
    said = capsys.readouterr().out
    assert status == 1
    assert "seed 0, tgrpo: FAILED: tgrpo.py ended with status 1" in said
    assert "no luck today" in said and "    step 2 of seed0/tgrpo" in said
    assert "step 1" not in said  # what a progress bar showed before
    assert "seed 1, grpo: FAILED: its cold start failed" in said
    assert [(run["config"], run["seed"]) for run in results()["runs"]] == [
        ("sft", 0), ("grpo", 0), ("zero", 0), ("zero", 1)]  # zero needs no cold start
    Path("broken").write_text("")
    status, calls = lab("--seeds", "2", "--only", "tgrpo", "grpo", "zero")
    assert status == 0 and len(results()["runs"]) == 8
    assert {call for call in calls if call.startswith("train")} == {
        "train seed1/sft", "train seed0/tgrpo", "train seed1/tgrpo", "train seed1/grpo"}


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
    with pytest.raises(InputError, match="seed0/tgrpo is a run of 6 steps: give --steps 6"):
        lab("--seeds", "1", "--only", "tgrpo", "--steps", "7")


def test_a_missing_toy_and_missing_results_say_what_makes_them(lab, tmp_path):
    with pytest.raises(InputError, match="build_data.py toy --out elsewhere"):
        lab("--toy", "elsewhere")
    with pytest.raises(InputError, match="ablate.py run makes it"):
        main("table", "--json", "absent.json")


def test_the_videos_only_data_has_no_images(lab):
    lab("--seeds", "1", "--only", "no-images")
    videos = json.loads(Path("toy/ablations/videos.json").read_text())
    assert videos == [{"data_type": "video"}]
    assert "--data toy/ablations/videos.json" in \
        Path("toy/ablations/seed0/no-images.log").read_text()


def test_every_configuration_changes_what_it_says_and_nothing_else(tmp_path):
    import tgrpo
    toy = tmp_path / "toy"
    toy.mkdir()
    (toy / "tgrpo.args").write_text("--model=m\n--data=d\n--output=o\n")
    args = ablate.parse_args(["run", "--toy", str(toy), "--out", str(tmp_path)])
    arguments = {name: vars(tgrpo.parse_args(ablate.commands_of(args, 3, name)[0][2:]))
                 for name in ablate.CONFIGS if name != "sft"}
    assert arguments["tgrpo"]["model"] == f"{tmp_path}/seed3/sft"
    changed = {name: {flag: value for flag, value in flags.items() if flag != "output"
                      and value != arguments["tgrpo"][flag]} for name, flags in arguments.items()}
    assert changed == {
        "tgrpo": {}, "grpo": {"alpha": 0}, "advantage": {"temporal_to": "advantage"},
        "unscaled": {"scale_advantages": "none"}, "zero": {"model": f"{toy}/model"},
        "grpo-unscaled": {"alpha": 0, "scale_advantages": "none"}, "no-length": {"omega": 0},
        "no-images": {"data": f"{tmp_path}/videos.json"}, "alpha-0.1": {"alpha": 0.1},
        "alpha-0.2": {"alpha": 0.2}, "alpha-0.4": {"alpha": 0.4}, "G_tilde-2": {"G_tilde": 2},
        "G_tilde-8": {"G_tilde": 8}, "updates-2": {"updates_per_rollout": 2},
        "updates-4": {"updates_per_rollout": 4}}


@pytest.mark.slow
def test_a_small_run_from_cold_start_to_table(toy, tmp_path):
    small = tmp_path / "toy"
    shutil.copytree(toy, small)
    for name, flags in (("sft", ["--num_train_epochs=1", "--per_rank_batch_size=16"]),
                        ("tgrpo", ["--prompts_per_rank=2"])):
        with (small / f"{name}.args").open("a") as file:
            file.write("\n".join(flags) + "\n")
    assert main("run", "--toy", str(small), "--seeds", "1", "--steps", "2", "--only", "tgrpo",
                "zero") == 0
    found = json.loads((small / "ablations.json").read_text())
    assert [run["config"] for run in found["runs"]] == ["sft", "tgrpo", "zero"]
    assert all(len(run["curves"]["reward/accuracy"]) == 1 for run in found["runs"][1:])
    main("table", "--json", str(small / "ablations.json"))
    assert "| `zero`: no cold start |" in cells(small / "ablations.md")


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

def test_the_committed_tables_are_what_the_results_give(tmp_path):
    shutil.copy(ROOT / "tests" / "ablations.json", tmp_path)
    main("table", "--json", str(tmp_path / "ablations.json"))
    assert (tmp_path / "ablations.md").read_text() == \
        (ROOT / "tests" / "ablations.md").read_text(), "python tests/ablate.py table"


def test_the_readmes_figures_of_the_ablations_stand_in_the_tables():
    section = README.split("### What was measured")[1].split("\n## ")[0]
    figures = re.findall(r"[+-]?\d+\.\d ± \d+\.\d", section)
    tables = (ROOT / "tests" / "ablations.md").read_text()
    assert len(figures) > 8 and [each for each in figures if each not in tables] == []



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
    record = {"problem_id": 1406, "problem_type": "regression", "solution": "<answer>9</answer>"}
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
    assert (parts["p"], parts["p_tilde"], parts["r_t"]) == (0.5, 0, 0.3)
    assert all(words in EXAMPLE for words in ("4/8", "0/4", "$r_t = 0.3$"))
    mean, spread = sample["R"].mean().item(), sample["R"].std().item()
    assert f"{mean:.3f}" in EXAMPLE and f"{spread:.3f}" in EXAMPLE
    assert [row[1] for row in shuffled] == pytest.approx([0, 0.11, 0.33, 0.44])


# -------------------------------------------------------------------------------- plots

def test_plot_without_matplotlib_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        main("plot")


def test_pictures_of_runs_and_of_results(tmp_path, lab):
    pytest.importorskip("matplotlib")
    lab("--seeds", "2", "--only", "tgrpo", "grpo")
    main("plot", "--json", "toy/ablations.json", "--folder", "a")
    folders = [str(path) for path in sorted(Path("toy/ablations").glob("seed*/tgrpo"))]
    main("plot", *folders)
    for path in ("a/curves.png", "a/advantages.png", f"{folders[0]}/curves.png"):
        assert 10_000 < (tmp_path / path).stat().st_size < 150_000
    assert not Path(folders[0], "advantages.png").exists()  # it is of no run
    with pytest.raises(InputError, match="RUN_DIR is an --output"):
        main("plot", "toy")
    lab("--seeds", "1", "--only", "zero", "--out", "elsewhere/ablations")
    with pytest.raises(InputError, match="no finished run of tgrpo or grpo"):
        main("plot", "--json", "elsewhere/ablations.json", "--folder", "c")
    assert [path.name for path in Path("c").iterdir()] == ["advantages.png"]  # needs no run


def test_help_and_mistakes_on_the_command_line():
    assert "resumes" in run("tests/ablate.py", "--help").stdout
    result = run("tests/ablate.py", "run", "--only", "nonsense", check=False)
    assert result.returncode == 2 and "invalid choice: 'nonsense'" in result.stderr
