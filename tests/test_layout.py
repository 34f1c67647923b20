"""Two columns over one ground: an import goes back along the pipeline, no function stands
twice, and a script starts."""
import ast
import re
from collections import defaultdict

import pytest

from conftest import ROOT, run

ARROWS = {"rewards": set(), "build_data": {"rewards"}, "sft": {"rewards", "build_data"},
          "tgrpo": {"rewards", "build_data", "sft"}, "annotate": {"rewards", "build_data"},
          "evaluate": {"rewards", "build_data", "annotate"}}
SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in ROOT.glob("*.py")}


@pytest.mark.parametrize("script", SOURCES)
def test_a_script_imports_from_earlier_ones_of_its_column(script):
    names = re.findall(r"^ *(?:from|import) (\w+)", SOURCES[script], re.MULTILINE)
    assert SOURCES.keys() & {*names} <= ARROWS[script]


def test_no_function_stands_twice():
    """Functions of one line may."""
    places = defaultdict(list)
    for script, source in SOURCES.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and len(node.body) > 1:
                places[ast.dump(node)].append((script, node.name))
    assert [where for where in places.values() if len(where) > 1] == []


def test_a_script_starts_as_a_new_process_and_prints_only_its_help():
    """With all that it imports: build_data.py and annotate.py. Real runs of sft.py and tgrpo.py as
    new processes are in test_nodes.py and test_faults.py."""
    result = run("evaluate.py", "--help", fresh=True)
    assert result.stdout.startswith("usage: ") and not result.stderr
