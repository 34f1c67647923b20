"""ablate.py: statistics by hand, what it runs and skips, and the figures that the README takes."""
import doctest
import json
import re
import shutil
from itertools import product
from pathlib import Path

import pytest

import ablate
import tgrpo
from build_data import InputError
from conftest import ROOT, run


def main(*argv):
    args = ablate.parse_args(list(map(str, argv)))
    return args.function(args)


def entry(config, seed, setting="plain", **measures):
    return {"config": config, "setting": setting, "seed": seed, "skipped": 0, "seconds": 50 + seed,
            **dict.fromkeys(ablate.MEASURES, 0.0), **measures}


@pytest.mark.parametrize("values, expected", [
    ([4], None), ([1, 3], (2, 2 - 12.706, 2 + 12.706)),  # standard error 1, one degree of freedom
    # eight seeds: standard deviation sqrt(8 / 7), standard error 1 / sqrt(7), t 2.365
    ([1, -1] * 4, (0, -2.365 / 7 ** 0.5, 2.365 / 7 ** 0.5)),
    # more seeds than the table has: a little wider than needed
    ([1, -1] * 20, (0, -2.131 / 39 ** 0.5, 2.131 / 39 ** 0.5))])
def test_an_interval_is_students(values, expected):
    assert ablate.interval(values) == (expected and pytest.approx(expected))
    assert doctest.testmod(ablate).failed == 0


def test_tables_have_means_and_differences_that_are_paired_by_seed_and_setting():
    runs = [entry("grpo", seed, gap=value) for seed, value in enumerate([70, 80, 90])]
    runs += [entry("tgrpo", seed, gap=value) for seed, value in ((2, 93), (0, 71), (1, 82), (9, 0))]
    runs += [entry("strict", seed, gap=value) for seed, value in enumerate([79, 90, 101])]
    runs += [entry("joint", 0, gap=12.34), entry("sft", 1, "")]
    assert ablate.paired(runs, "plain", "tgrpo", "gap") == [1, 2, 3]
    text = ablate.tables_of({"runs": runs, "versions": {"torch": "2"}, "steps": 9,
                             "git_commits": ["c0ffee"]})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert [row[0] for row in rows if row].count("`sft`") == 1  # no table of the other setting
    found = {row[0]: row[1:] for row in rows if row}
    # 70, 80, 90: standard deviation 10. Differences 1, 2, 3: standard error 1 / sqrt(3), t 4.303
    assert (found["`grpo`"][2], found["`grpo`"][-2:]) == ("80.0 ± 5.8", ["50", "3"])
    assert found["`joint`"][2] == "12.3 (1 seed)"
    zero = "+0.0 [+0.0, +0.0]"
    assert found["`tgrpo`: T-GRPO as written"] == [zero, "+2.0 [-0.5, +4.5]", zero, zero, "3"]
    assert "8 comparisons, all of them shown" in text and "0.4 of their 95 % intervals" in text
    assert "Those that do: plain, `strict`, gap +10.0 [+7.5, +12.5]." in text


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """The files that `run` had made, in a folder with a fake in the place of its commands."""
    made = []

    def call(command, log, result):
        made.append(str(result.relative_to("toy/ablations")))
        result.parent.mkdir(parents=True, exist_ok=True)
        kinds = [("direction_conflict", 1), ("end", 0.5), ("direction_agree", 1), ("count", 0)]
        for order in ablate.ORDERS:
            rows = [{"data_source": f"toy/{kind}", "accuracy": a * (order == "ordered"),
                     "tokens": 20, "output": "<think>watch: it"} for kind, a in kinds]
            (result.parent / f"toy_8_{order}.json").write_text(
                json.dumps({"rows": rows, "skipped": []}))
        header = {"arguments": {"max_steps": 6}, "versions": {"torch": "2"}, "git_commit": "c0ffee"}
        if result.name == "config.json":
            result.touch()
            (result.parent / "checkpoint-6").mkdir()
            steps = [{"time/step": 0.5, "data/skipped": step == 2} for step in range(6)]
            log = "\n".join(map(json.dumps, [header, *steps]))
            (result.parent / "metrics.jsonl").write_text(log)
            row = {"step": 1, "responses": ["look: red, so left"], "accuracy": [1], "d": [0.5]}
            (result.parent / "rollouts.jsonl").write_text(
                "\n".join(json.dumps(row | {"step": step + 1}) for step in range(6)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablate, "call", call)
    return made


def test_runs_follow_their_cold_start_and_what_is_finished_is_skipped(calls):
    flags = ["run", "--seeds", 2, "--only", "tgrpo", "grpo"]
    main(*flags)
    assert len(calls) == 2 * 5 * 2 and calls[0] == "seed0/sft/config.json"
    found = json.loads(Path("toy/ablations.json").read_text())
    assert [(one["setting"], one["config"], one["seed"]) for one in found["runs"]] == [
        (*one, seed) for one in [("", "sft"), *product(ablate.SETTINGS, ("grpo", "tgrpo"))]
        for seed in (0, 1)]
    scores = {"ordered": 62.5, "shuffled": 0, "gap": 62.5, "order": 83.33, "static": 0,
              "conflict": 100, "agree": 100, "tokens": 20,  # the last question needs no order
              "watch": [0] * 4, "d_watch": [None] * 4, "d_look": [0.5] * 4, "watch_conflict": 100}
    assert found["runs"][2] == {"setting": "plain", "config": "grpo", "seed": 0, **scores,
                                "seconds": 3, "skipped": 1}
    assert (found["git_commits"], found["steps"]) == (["c0ffee"], "6")
    assert not list(Path("toy/ablations").rglob("checkpoint-6"))
    calls.clear()
    Path("toy/ablations/seed0/plain/tgrpo/eval/toy_8_shuffled.json").unlink()
    main(*flags)
    main("run", "--first_seed", 1, "--seeds", 2, "--only", "grpo", "--settings", "plain")
    assert calls[0] == "seed0/plain/tgrpo/eval/toy_8_shuffled.json" and {
        path.split("/")[0] for path in calls[1:]} == {"seed2"}


def test_a_run_without_thoughts_about_a_direction_has_no_development(tmp_path):
    row = {"step": 1, "responses": ["look: it says cup"], "accuracy": [1]}
    (tmp_path / "rollouts.jsonl").write_text(json.dumps(row))
    assert ablate.development(tmp_path / "rollouts.jsonl") == dict.fromkeys(
        ["watch", "d_watch", "d_look"], [None] * 4)


def test_every_configuration_changes_what_it_says_and_nothing_else(tmp_path):
    for toy in ("toy", "toy_shortcut"):
        (tmp_path / toy).mkdir()
        (tmp_path / toy / "tgrpo.args").write_text(f"--model=m\n--data={toy}\n--output=o\n")
    args = ablate.parse_args(["run", "--toy", str(tmp_path / "toy"), "--out", str(tmp_path)])
    changed = {"grpo": {"alpha": 0}, "strict": {"temporal_test": "gt"},
               "advantage": {"temporal_to": "advantage"}, "likelihood_2": {"alpha": 2},
               "unscaled": {"alpha": 1, "scale_advantages": "none"}}
    changed |= {name: {"alpha": 1} for name in ablate.SECOND_ROUND if name not in changed}
    base = {}
    for setting, name in product(ablate.SETTINGS, ["tgrpo", *ablate.CONFIGS]):
        (script, *flags), _ = ablate.steps_of(args, 3, f"{setting}/{name}")[0]
        found = vars(tgrpo.parse_args(list(map(str, flags)))) | {"output": ""}
        base = base or found
        data = {"data": "toy" + ablate.SETTINGS[setting][0]}
        assert found == base | changed.get(name, {}) | data
        assert (script == ROOT / "tgrpo.py") == (not ablate.CONFIGS[name][2])
    assert base["model"] == f"{tmp_path}/seed3/sft" and base["max_steps"] == 100


def test_a_command_that_fails_or_leaves_no_result_ends_the_run_with_its_log(tmp_path):
    (tmp_path / "script.py").write_text("import sys; print('no luck'); sys.exit(int(sys.argv[1]))")
    for status in (3, 0):  # as a training run that SIGTERM has ended
        with pytest.raises(InputError, match=f"script.py ended with status {status} and without .*"
                                             f"gone: see {tmp_path}/log"):
            ablate.call([tmp_path / "script.py", status], tmp_path / "log", tmp_path / "gone")
    assert (tmp_path / "log").read_text() == "no luck\n" * 2


def test_a_diff_that_does_not_fit_or_has_changed_is_named(monkeypatch, tmp_path):
    """Within a repository too, where git would look for tgrpo.py in the top folder."""
    run("-c", f"import subprocess; subprocess.run(['git', 'init', {str(tmp_path)!r}], check=True)")
    monkeypatch.setattr(ablate, "DIFFS", tmp_path)
    first, second, *_ = (ROOT / "tgrpo.py").read_text().splitlines()
    for word in ("mine", "edited"):
        (tmp_path / "margin.diff").write_text(
            "# an idea\n--- a/tgrpo.py\n+++ b/tgrpo.py\n"
            f"@@ -1,2 +1,2 @@\n-{first}\n+{word}\n {second}\n")
        if word == "mine":
            assert ablate.make_variant(tmp_path, "margin").read_text().startswith("mine\n")
    with pytest.raises(InputError, match="runs of another margin"):
        ablate.make_variant(tmp_path, "margin")
    (tmp_path / "margin.diff").write_text("--- a/tgrpo.py\n+++ b/tgrpo.py\n@@ -1 +1 @@\n-no\n+yes\n")
    with pytest.raises(InputError, match="the diffs of margin do not fit tgrpo.py: .*patch failed"):
        ablate.make_variant(tmp_path / "other", "margin")


def test_the_committed_tables_are_what_the_results_give(tmp_path):
    shutil.copytree(ROOT / "tests/ablations", tmp_path / "ablations")
    shutil.copy(ROOT / "tests/ablations.md", tmp_path)
    main("table", "--results", tmp_path / "ablations")
    assert (tmp_path / "ablations.md").read_text() == (ROOT / "tests/ablations.md").read_text()


def test_the_readmes_figures_of_the_ablations_stand_in_the_tables():
    readme = " ".join((ROOT / "README.md").read_text().split())
    section = readme.split("## Does the temporal reward help?")[1].split(" ## ")[0]
    number = r"[+-]\d+\.\d"
    figures = re.findall(rf"\d+\.\d ± \d+\.\d|{number} \[{number}, {number}\]", section)
    tables = (ROOT / "tests/ablations.md").read_text()
    assert len(figures) == 2 * 4 and [each for each in figures if each not in tables] == []
