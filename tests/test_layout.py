"""Two columns over one ground: an import goes back along the pipeline, and no text stands twice."""
import ast
from collections import defaultdict

import pytest

from conftest import ROOT, run

ARROWS = {"rewards": set(), "build_data": {"rewards"}, "sft": {"rewards", "build_data"},
          "tgrpo": {"rewards", "build_data", "sft"}, "annotate": {"rewards", "build_data"},
          "evaluate": {"rewards", "build_data", "annotate"}}


def tree_of(script):
    return ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize("script", ARROWS)
def test_a_script_imports_from_earlier_ones_of_its_column(script):
    names = {name for node in ast.walk(tree_of(script)) for name in (
        [node.module] if isinstance(node, ast.ImportFrom) else
        [alias.name for alias in node.names] if isinstance(node, ast.Import) else [])}
    assert names & ARROWS.keys() <= ARROWS[script]
    assert ARROWS.keys() == {path.stem for path in ROOT.glob("*.py")}


def test_nothing_stands_twice():
    """No function, and no flag of frames and pixels; but for two commands' flags of one line."""
    places, flags = defaultdict(list), []
    for script in ARROWS:
        for node in ast.walk(tree_of(script)):
            if isinstance(node, ast.FunctionDef) and len(node.body) > 1:
                places[ast.dump(node)].append((script, node.name))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "add":
                flags.append(node.args[0].value)
    assert [where for where in places.values() if len(where) > 1] == []
    assert [flag for flag in set(flags) if "frames" in flag or "pixels" in flag
            if flags.count(flag) > 1] == []


def test_a_script_starts_as_a_new_process_and_prints_only_its_help():
    """With all that it imports: build_data.py and annotate.py. Real runs of sft.py and tgrpo.py as
    new processes are in test_nodes.py and test_faults.py."""
    result = run("evaluate.py", "--help", fresh=True)
    assert result.stdout.startswith("usage: ") and not result.stderr
