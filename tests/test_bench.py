"""The benchmark runs, and its two forms do the same work."""
import json

import pytest
import torch

import bench
from conftest import run

SMALL = ["--hidden=32", "--layers=1", "--heads=2", "--kv_heads=1", "--mlp=32", "--vision_hidden=32",
         "--vision_depth=1", "--vision_mlp=32", "--vocabulary=512", "--frames=4", "--height=2",
         "--width=2", "--G=2", "--G_tilde=1", "--max_new_tokens=3", "--repeats=1"]


def test_the_two_forms_give_the_same_log_probs_and_gradients():
    gradients, logps = [], []
    for form in ("naive", "ours"):
        case = bench.Case(bench.parse_args(SMALL), 4)
        actions = case.actions(form)
        actions["backward"]()
        gradients.append({name: p.grad for name, p in case.model.named_parameters()
                          if p.grad is not None})
        logps.append(actions["logps"]())
    naive, ours = gradients
    assert naive.keys() == ours.keys()
    for name, gradient in naive.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(*logps, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_tables_and_the_file(tmp_path):
    said = run("tests/bench.py", *SMALL, "--prompts", 1, 2, "--json", tmp_path / "b.json").stdout
    assert len([line for line in said.splitlines() if line.startswith("| 4 |")]) == 2
    one, two = json.loads((tmp_path / "b.json").read_text())["results"]
    assert one["memory_mb"] > 0 and two["step_ratio"] > 0
    parts = run("tests/bench.py", *SMALL, "--ablate", "--prompts", 1).stdout
    assert parts.count("\n| nothing |") == 2 and parts.count("\n|") == 9
