"""ablate.py: statistics by hand, what it runs and skips, and the figures that the README takes."""
import doctest
import json
import re
import shutil
from itertools import product
from pathlib import Path

import pytest

import ablate
import build_data
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
    assert [row[0] for row in rows if row].count("`sft`") == 2  # in both settings
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
        rows = [{"data_source": f"toy/{kind}", "accuracy": 0.0 if "shuffled" in result.name else a,
                 "tokens": 20} for kind, a in kinds]
        result.write_text(json.dumps({"rows": rows, "skipped": []}))
        header = {"arguments": {"max_steps": 6}, "versions": {"torch": "2"}, "git_commit": "c0ffee"}
        if result.name == "config.json":
            (result.parent / "checkpoint-6").mkdir()
            steps = [{"time/step": 0.5, "data/skipped": step == 2} for step in range(6)]
            log = "\n".join(map(json.dumps, [header, *steps]))
            (result.parent / "metrics.jsonl").write_text(log)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablate, "call", call)
    return made


def test_runs_follow_their_cold_start_and_what_is_finished_is_skipped(calls):
    flags = ["run", "--seeds", 2, "--only", "tgrpo", "grpo"]
    main(*flags)
    assert len(calls) == 2 * 5 * 3 and calls[0] == "seed0/sft/config.json"
    found = json.loads(Path("toy/ablations.json").read_text())
    assert [(one["setting"], one["config"], one["seed"]) for one in found["runs"]] == [
        (*one, seed) for one in [("", "sft"), *product(ablate.SETTINGS, ("grpo", "tgrpo"))]
        for seed in (0, 1)]
    scores = {"ordered": 62.5, "shuffled": 0, "gap": 62.5, "order": 83.33, "static": 0,
              "conflict": 100, "agree": 100, "tokens": 20}  # the last question needs no order
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


def test_every_configuration_changes_what_it_says_and_nothing_else(tmp_path):
    for toy in ("toy", "toy_shortcut"):
        (tmp_path / toy).mkdir()
        (tmp_path / toy / "tgrpo.args").write_text(f"--model=m\n--data={toy}\n--output=o\n")
    args = ablate.parse_args(["run", "--toy", str(tmp_path / "toy"), "--out", str(tmp_path)])
    changed = {"grpo": {"alpha": 0}, "strict": {"temporal_test": "gt"},
               "advantage": {"temporal_to": "advantage"}}
    base = {}
    for setting, name in product(ablate.SETTINGS, ["tgrpo", *ablate.CONFIGS]):
        (script, *flags), _ = ablate.steps_of(args, 3, f"{setting}/{name}")[0]
        found = vars(tgrpo.parse_args(list(map(str, flags)))) | {"output": ""}
        base = base or found
        data = {"data": "toy" + ablate.SETTINGS[setting][0]}
        assert found == base | changed.get(name, {}) | data
        assert (script == ROOT / "tgrpo.py") == (name not in ablate.VARIANTS)
    assert base["model"] == f"{tmp_path}/seed3/sft" and base["max_steps"] == 100


def test_a_command_that_fails_or_leaves_no_result_ends_the_run_with_its_log(tmp_path):
    (tmp_path / "script.py").write_text("import sys; print('no luck'); sys.exit(int(sys.argv[1]))")
    for status in (3, 0):  # as a training run that SIGTERM has ended
        with pytest.raises(InputError, match=f"script.py ended with status {status} and without .*"
                                             f"gone: see {tmp_path}/log"):
            ablate.call([tmp_path / "script.py", status], tmp_path / "log", tmp_path / "gone")
    assert (tmp_path / "log").read_text() == "no luck\n" * 2


def test_a_diff_that_does_not_fit_or_has_changed_is_named(monkeypatch, tmp_path):
    """Within a repository too, where ones own diff is applied to the copy alone."""
    run("-c", f"import subprocess; subprocess.run(['git', 'init', {str(tmp_path)!r}], check=True)")
    diff = tmp_path / "mine.diff"
    monkeypatch.setitem(ablate.VARIANTS, "margin", diff)
    first, second, *_ = (ROOT / "tgrpo.py").read_text().splitlines()
    for word in ("mine", "edited"):
        diff.write_text("# an idea\ndiff --git a/tgrpo.py b/tgrpo.py\n--- a/tgrpo.py\n"
                        f"+++ b/tgrpo.py\n@@ -1,2 +1,3 @@\n {first}\n+{word}\n {second}\n")
        if word == "mine":
            script = ablate.make_variant(tmp_path, "margin")
            assert script.read_text().splitlines()[:2] == [first, "mine"]
    for _ in range(2):
        with pytest.raises(InputError, match="runs of another margin"):
            ablate.make_variant(tmp_path, "margin")
    diff.write_text("--- a/tgrpo.py\n+++ b/tgrpo.py\n@@ -1 +1 @@\n-nothing\n+new\n")
    with pytest.raises(InputError, match="mine.diff does not fit tgrpo.py: .*patch failed"):
        ablate.make_variant(tmp_path / "other", "margin")


def test_the_shortcut_changes_the_colour_of_training_questions_and_nothing_else(tmp_path):
    """Not even the other questions: the cold start, the test and the model are the same bits."""
    for name, flags in (("plain", []), ("shortcut", ["--shortcut"])):
        build_data.build_toy(build_data.parse_args(
            ["toy", "--out", str(tmp_path / name), "--cot", "4", "--train", "24", "--test", "24",
             *flags]))
    files = {path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*")
             if path.is_file() and path.suffix not in (".args", ".sh")}
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


@pytest.mark.parametrize("name", ["ablations", "ablations_repeat"])
def test_the_committed_tables_are_what_the_results_give(tmp_path, name):
    for suffix in (".json", ".md"):
        shutil.copy(ROOT / f"tests/{name}{suffix}", tmp_path)
    main("table", "--json", tmp_path / f"{name}.json")
    assert (tmp_path / f"{name}.md").read_text() == (ROOT / f"tests/{name}.md").read_text()


def test_the_readmes_figures_of_the_ablations_stand_in_the_tables():
    readme = " ".join((ROOT / "README.md").read_text().split())
    section = readme.split("## Does the temporal reward help?")[1].split(" ## ")[0]
    number = r"[+-]\d+\.\d"
    figures = re.findall(rf"\d+\.\d ± \d+\.\d|{number} \[{number}, {number}\]", section)
    tables, repeated = ((ROOT / f"tests/{name}.md").read_text()
                        for name in ("ablations", "ablations_repeat"))
    assert len(figures) == 2 * 4 and [each for each in figures if each not in tables] == []
    assert "Two of 72 intervals exclude zero" in section and "neither does" in section
    apart = re.findall(r"`\w+`, \w+ [+-]", tables.split("Those that do:")[1])
    assert len(apart) == 2 and "Those that do: none." in repeated


def test_pictures_of_the_results_and_of_the_algorithm(tmp_path):
    pytest.importorskip("matplotlib")
    main("plot", "--folder", tmp_path / "new")
    assert all((tmp_path / f"new/{name}.png").stat().st_size > 10_000
               for name in ("differences", "advantages"))
