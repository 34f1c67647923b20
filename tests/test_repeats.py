"""The scripts repeat their plumbing on purpose, so that each reads from top to bottom and can be
forked alone. What they repeat under one name has one text."""
import ast
from itertools import combinations

import pytest

from conftest import ROOT

SCRIPTS = ("annotate.py", "sft.py", "tgrpo.py", "evaluate.py")
# each script's own, under a common name
OWN = {"parse_args", "main", "load_model", "check_flags", "write_result", "row_of",
       "ask_here"}


def functions(script):
    """{name: source} of a script's module-level functions, its own file name left out."""
    text = (ROOT / script).read_text(encoding="utf-8")
    return {node.name: ast.get_source_segment(text, node).replace(script, "SCRIPT")
            for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("a, b", list(combinations(SCRIPTS, 2)))
def test_what_two_scripts_repeat_under_one_name_has_one_text(a, b):
    first, second = functions(a), functions(b)
    shared = (first.keys() & second.keys()) - OWN
    assert {"setup_distributed", "load_processor"} <= shared
    assert [name for name in shared if first[name] != second[name]] == []


def test_both_trainings_load_a_model_alike():
    assert functions("sft.py")["load_model"] == functions("tgrpo.py")["load_model"]


@pytest.mark.parametrize("a, b", list(combinations(SCRIPTS, 2)))
def test_a_flag_that_two_scripts_share_means_the_same(a, b):
    """Name and help; evaluation has limits and lengths of its own, annotation no optimizer."""
    def flags(script):
        calls = [node for node in ast.walk(ast.parse((ROOT / script).read_text()))
                 if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "add"]
        return {call.args[0].value: {key.arg: ast.dump(key.value) for key in call.keywords}
                for call in calls}
    first, second = flags(a), flags(b)
    shared = first.keys() & second.keys() - {"--model", "--data", "--output", "--temperature"}
    shared -= {"--deepspeed_config"} if a == "annotate.py" else set()
    assert len(shared) > 10
    assert [flag for flag in shared if first[flag].get("help") != second[flag].get("help")] == []


def test_scripts_import_records_and_rewards_and_never_each_other():
    allowed = {"build_data.py": {"rewards"}, "rewards.py": set(), "sft.py": {"build_data"},
               "annotate.py": {"build_data", "rewards"}, "tgrpo.py": {"build_data", "rewards"},
               "evaluate.py": {"build_data", "rewards"}}
    ours = {path.stem for path in ROOT.glob("*.py")}
    for script, may in allowed.items():
        tree = ast.parse((ROOT / script).read_text())
        names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)} | {
            alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
            for alias in node.names}
        assert names & ours <= may, script
