"""ablate.py: statistics by hand, what it runs and skips, and the figures that the README takes."""
import json
import re
import shutil
from pathlib import Path

import pytest

import ablate
import tgrpo
from build_data import InputError
from conftest import ROOT, table_rows


def main(*argv):
    args = ablate.parse_args(list(map(str, argv)))
    return args.function(args)


def entry(config, seed, setting="plain", **measures):
    return {"config": config, "setting": setting, "seed": seed, "skipped": 0, "seconds": 50 + seed,
            **dict.fromkeys(ablate.MEASURES, 0.0), **measures}


def test_tables_have_means_and_differences_that_are_paired_by_seed_and_setting():
    runs = [entry("grpo", seed, gap=value) for seed, value in enumerate([70, 80, 90])]
    runs += [entry("tgrpo", seed, gap=value) for seed, value in ((2, 93), (0, 71), (1, 82), (9, 0))]
    runs += [entry("strict", seed, gap=value, watch=[value, 50.0], d_watch=[4.0, None],
                   d_look=[None, None]) for seed, value in enumerate([79, 90, 101])]
    runs += [entry("joint", 0, gap=12.34), entry("sft", 1, "")]
    text = ablate.tables_of({"runs": runs, "versions": {}, "steps": 9, "git_commits": ["c0"]})
    rows = table_rows(text.splitlines())
    assert [row[0] for row in rows].count("`sft`") == 1  # no table of the other setting
    found = {row[0]: row[1:] for row in rows}
    # 70, 80, 90: standard deviation 10. Differences 1, 2, 3: standard error 1 / sqrt(3), t 4.303
    assert (found["`grpo`"][2], found["`grpo`"][-2:]) == ("80.0 ± 5.8", ["50", "3"])
    assert found["`joint`"][2] == "12.3 (1 seed)"
    zero = "+0.0 [+0.0, +0.0]"
    assert found["`tgrpo`: T-GRPO as written"] == [zero, "+2.0 [-0.5, +4.5]", zero, zero, "3"]
    assert found["`strict`"] == ["90.0, 50.0", "4.0, -", "-, -"]  # over training, the last table
    assert "8 comparisons, all of them shown" in text and "0.4 of their 95 % intervals" in text
    assert "Those that do: plain, `strict`, gap +10.0 [+7.5, +12.5]." in text


TEXTS = ["look: red, so left", "watch: 1 to 3, so left", "look: it says cup"]
KINDS = {"direction_conflict": 1, "end": 0.5, "direction_agree": 1, "count": 0}
FILES = {  # of a run: {name: rows}
    "metrics.jsonl": [
        {"arguments": {"max_steps": 6}, "versions": {"torch": "2"}, "git_commit": "c0"},
        *({"time/step": 0.5, "data/skipped": step == 2} for step in range(6))],
    "rollouts.jsonl": [{"step": step, "responses": TEXTS, "accuracy": [1, step > 3, 1],
                        "d": [0.5, step, 9]} for step in (1, 2, 4, 8)],
    **{f"toy_8_{order}.json": [{"skipped": [], "rows": [
        {"data_source": f"toy/{kind}", "accuracy": accuracy * share, "tokens": 20,
         "output": "<think>watch: it"} for kind, accuracy in KINDS.items()]}]
       for order, share in (("ordered", 1), ("shuffled", 0))}}


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """The files that `run` had made, in a folder with a fake in the place of its commands."""
    made = []

    def call(command, log, result):
        made.append(str(result.relative_to("toy/ablations")))
        (result.parent / "checkpoint-6").mkdir(parents=True, exist_ok=True)
        result.touch()
        for name, rows in FILES.items():
            (result.parent / name).write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablate, "call", call)
    return made


def test_runs_follow_their_cold_start_and_what_is_finished_is_skipped(calls):
    flags = ["run", "--seeds", 2, "--only", "tgrpo", "grpo"]
    main(*flags)
    assert len(calls) == 2 * 5 * 2 and calls[0] == "seed0/sft/config.json"
    found = json.loads(Path("toy/ablations.json").read_text())
    assert [run["config"] for run in found["runs"]] == [
        "sft", "sft", *["grpo", "grpo", "tgrpo", "tgrpo"] * 2]
    scores = {"ordered": 62.5, "shuffled": 0, "gap": 62.5, "order": 83.33, "static": 0,
              "conflict": 100, "agree": 100, "tokens": 20, "watch_conflict": 100}
    # steps 1 and 2, 4, none, 8; the last text is of no direction
    changes = {"watch": [50, 50, None, 50], "d_watch": [None, 4, None, 8],
               "d_look": [0.5, 0.5, None, 0.5]}
    assert found["runs"][2] == {"setting": "plain", "config": "grpo", "seed": 0, **scores,
                                **changes, "seconds": 3, "skipped": 1}
    assert (found["git_commits"], found["steps"]) == (["c0"], "6")
    assert not Path("toy/ablations/seed0/plain/tgrpo/checkpoint-6").exists()
    calls.clear()
    Path("toy/ablations/seed0/plain/tgrpo/eval/toy_8_shuffled.json").unlink()
    main(*flags)
    main("run", "--first_seed", 1, "--seeds", 2, "--only", "grpo", "--settings", "plain")
    assert calls[0] == "seed0/plain/tgrpo/eval/toy_8_shuffled.json" and {
        path.split("/")[0] for path in calls[1:]} == {"seed2"}
    assert len(json.loads(Path("toy/ablations.json").read_text())["runs"]) == 12  # of all seeds


def test_a_configuration_changes_what_it_says_and_nothing_else(tmp_path):
    for toy in ("toy", "toy_shortcut"):
        (tmp_path / toy).mkdir()
        (tmp_path / toy / "tgrpo.args").write_text(f"--model=m\n--data={toy}\n--output=o\n")
    args = ablate.parse_args(["run", "--toy", f"{tmp_path}/toy", "--out", str(tmp_path)])

    def training(run):
        (script, *flags), _ = ablate.steps_of(args, 3, run)[0]
        return script, vars(tgrpo.parse_args(list(map(str, flags)))) | {"output": ""}
    script, base = training("plain/tgrpo")
    assert script == ROOT / "tgrpo.py"
    assert (base["model"], base["max_steps"]) == (f"{tmp_path}/seed3/sft", 100)
    unscaled = {"alpha": 1, "scale_advantages": "none"}
    for name, changed in (("grpo", {"alpha": 0}), ("margin", {}), ("unscaled", unscaled)):
        script, flags = training(f"shortcut/{name}")
        assert flags == base | changed | {"data": "toy_shortcut"}
        assert (script == tmp_path / "variants" / name / "tgrpo.py") == (name != "grpo")


def test_a_diff_that_does_not_fit_or_has_changed_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(ablate, "DIFFS", tmp_path)
    first, second, *_ = (ROOT / "tgrpo.py").read_text().splitlines()

    def make(out, before, after):
        (tmp_path / "margin.diff").write_text(
            "diff --git a/tgrpo.py b/tgrpo.py\n--- a/tgrpo.py\n+++ b/tgrpo.py\n"
            f"@@ -1,2 +1,2 @@\n-{before}\n+{after}\n {second}\n")
        return ablate.make_variant(tmp_path / out, "margin")
    for _ in range(2):
        assert make("out", first, "mine").read_text().startswith("mine\n")
    with pytest.raises(InputError, match="runs of another margin"):
        make("out", first, "edited")
    with pytest.raises(InputError, match="the diffs of margin do not fit tgrpo.py: .*patch failed"):
        make("other", "no", "yes")


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
    assert len(figures) == 4 + 6 + 2 + 2 and [each for each in figures if each not in tables] == []
    runs = json.loads((ROOT / "tests/ablations/claim.json").read_text())["runs"]
    for mark, config in (("bar", "unscaled"), ("line", "grpo")):
        rows = ablate.by_seed(runs, "shortcut", config).values()
        conflict = ", ".join(f"{row['conflict']:.0f}" for row in rows)
        assert f"{mark} [{conflict}]" in section, config
