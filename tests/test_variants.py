"""tests/variants: what each diff changes; when alpha acts at all; the README's worked example."""
import doctest
import importlib.util
import json
import re
from itertools import product
from types import SimpleNamespace

import pytest
import torch

import ablate
import build_data
import grading
import tgrpo
from conftest import ROOT, run
from grading import graded, pass_rate

README = (ROOT / "README.md").read_text(encoding="utf-8")
RIGHT, WRONG = (f"<think>so</think><answer>{letter}</answer>" for letter in "AB")
CHOICE = {"problem_id": 0, "problem_type": "multiple choice", "solution": "<answer>A</answer>"}
NAMES = list(ablate.VARIANTS)


@pytest.fixture(scope="session")
def variant(tmp_path_factory):
    """Imports the present tgrpo.py with a variant's diff applied."""
    out = tmp_path_factory.mktemp("variants")

    def load(name):
        path = ablate.make_variant(out, name)
        spec = importlib.util.spec_from_file_location(f"tgrpo_{name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    return load


@pytest.fixture
def grade(variant):
    """Grades by a variant: 8 responses to a choice in order, 4 shuffled, some of them right."""
    def call(name, right, right_shuffled, **flags):
        texts = [RIGHT] * right + [WRONG] * (8 - right)
        shuffled = [RIGHT] * right_shuffled + [WRONG] * (4 - right_shuffled)
        return graded(variant(name), CHOICE, texts, shuffled, [9] * 8, **flags)
    return call


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_is_short_says_its_idea_and_makes_a_step(toy, tmp_path, name):
    diff = ablate.VARIANTS[name].read_text(encoding="utf-8").splitlines()
    start = diff.index("--- a/tgrpo.py")
    assert start > 1 and all(line.startswith("# ") for line in diff[:start])
    assert 0 < sum(line[0] in "+-" for line in diff[start + 2:] if line) <= 20
    run(ablate.make_variant(tmp_path, name), f"@{toy}/tgrpo.args", "--model", toy / "model",
        "--output", tmp_path / "run", "--max_steps", 1, "--prompts_per_rank", 2, "--G", 4,
        "--G_tilde", 2, "--max_new_tokens", 8, "--num_workers", 1, "--val_steps", 0,
        env={"PYTHONPATH": str(ROOT)})
    _, step = lines(tmp_path / "run/metrics.jsonl")
    rows = [row for row in lines(tmp_path / "run/rollouts.jsonl") if row["frame_order"]]
    assert step["response/tokens"] > 0 and rows and (tmp_path / "run/config.json").exists()
    if name == "reversed":
        assert {tuple(row["frame_order"]) for row in rows} == {(7, 6, 5, 4, 3, 2, 1, 0)}
    second = name not in ("likelihood", "tokens")
    assert all(len(row["responses_shuffled"]) == 2 * second for row in rows)
    if name == "likelihood":  # an untrained model's likelihoods change a little
        assert all(0 < abs(d) < 1 for row in rows for d in row["d"])


def test_reversed_shows_the_second_group_the_frames_backwards(variant, monkeypatch):
    module = variant("reversed")
    monkeypatch.setattr(module, "encode", lambda processor, record, vision: vision.frames)
    vision = build_data.Vision(torch.arange(5), {}, None)
    args = SimpleNamespace(alpha=0.3, seed=0)
    group = module.example(args, None, {"data_type": "video"}, vision, 7)
    assert group["frame_order"] == group["shuffled"].tolist() == [4, 3, 2, 1, 0]
    assert group["ordered"].tolist() == [0, 1, 2, 3, 4]


def test_margin_adds_alpha_times_the_margin_to_correct_advantages(grade):
    for right, shuffled, r_t in ((6, 2, 0.3 * 0.25), (6, 3, 0), (2, 4, 0), (8, 1, 0.3 * 0.75)):
        group, plain = (grade("margin", right, shuffled, alpha=alpha) for alpha in (0.3, 0))
        assert group["parts"]["r_t"] == pytest.approx(r_t)
        assert torch.equal(group["R"], plain["R"])
        assert (group["A"] - plain["A"]).tolist() == pytest.approx(
            [r_t] * right + [0] * (8 - right), abs=1e-6)


def test_weight_multiplies_a_questions_advantages_by_one_and_the_margin(grade):
    for right, shuffled, weight in ((6, 2, 1.25), (6, 3, 1), (2, 4, 0.25)):
        group = grade("weight", right, shuffled)
        # correct: 1 - p above the mean; unbiased deviation sqrt(k (8 - k) / 56)
        expected = weight * (1 - right / 8) / ((right * (8 - right) / 56) ** 0.5 + 1e-4)
        assert group["A"][0].item() == pytest.approx(expected, abs=1e-5)
        assert group["R"].max() == 2  # accuracy and format, no temporal reward


def test_joint_normalises_both_groups_together(grade):
    # R: eight times 2 and four times 1; mean 5/3, unbiased variance (8/9 + 16/9) / 11 = 8/33
    A = grade("joint", 8, 0)["A"].tolist()
    assert A == pytest.approx([(1 / 3) / ((8 / 33) ** 0.5 + 1e-4)] * 8, abs=1e-5)
    assert grade("joint", 8, 4)["A"].tolist() == [0] * 8
    # six of eight and none of four: mean 1.5, unbiased variance 3/11
    A = grade("joint", 6, 0)["A"].tolist()
    assert A == pytest.approx([0.5 / ((3 / 11) ** 0.5 + 1e-4)] * 6 + [-0.9572] * 2, abs=1e-3)


def test_likelihood_pays_correct_responses_for_the_nats_they_lose(variant):
    bonus = variant("likelihood").likelihood_bonus
    d, correct = torch.tensor([2.0, 0.5, -1.0, 9.0, 2.0]), torch.tensor([1, 1, 1, 1, 0]).bool()
    assert bonus(d, correct, 0.3).tolist() == pytest.approx([0.6, 0.15, 0, 1.2, 0])


def test_tokens_keeps_the_fifth_that_shuffling_moves_the_most(variant):
    logps = torch.zeros(3, 6)
    shuffled = torch.tensor([[-0.1, 0.5, -3.0, 0.2, 0.0, -9.0]] * 3)
    mask = torch.tensor([[1.0] * 5 + [0], [1.0] * 6, [1.0] + [0] * 5])  # 5, 6 and 1 tokens
    assert variant("tokens").moved_tokens(logps, shuffled, mask).tolist() == [
        [0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0]]


# -------------------------------------------------------------------- when alpha acts

@pytest.mark.parametrize("correct", [1, 3, 7])
def test_alpha_cancels_from_two_valued_rewards_and_acts_elsewhere(correct):
    texts = [RIGHT] * correct + [WRONG] * (8 - correct)

    def advantages(alpha, lengths=(9,) * 8, **flags):
        return graded(tgrpo, CHOICE, texts, [WRONG] * 4, lengths, alpha=alpha, l_min=16, l_max=24,
                      **flags)["A"]
    for alpha in (0.1, 0.3, 1.0):
        # up to the 1e-4 that is added to the standard deviation
        assert torch.allclose(advantages(alpha), advantages(0), atol=1e-3)
        for flags in ({"temporal_to": "advantage"}, {"scale_advantages": "none"}):
            moved = (advantages(alpha, **flags) - advantages(0, **flags)).abs().max()
            assert moved > alpha / 10
    if correct > 1:  # the length reward makes a third value
        lengths = [20] + [9] * 7
        assert (advantages(0.3, lengths) - advantages(0, lengths)).abs().max() > 0.01


def test_a_policy_blind_to_order_passes_the_temporal_test_as_often_as_the_readme_states():
    percent = re.search(r"between (\d+) and (\d+) % of the time .*?strict .*?between (\d+) and "
                        r"(\d+) %", " ".join(README.split())).groups()
    chances = [i / 100 for i in range(20, 91)]
    rates = [[100 * pass_rate(chance, test=test) for chance in chances] for test in ("ge", "gt")]
    assert [round(f(values)) for values in rates for f in (min, max)] == list(map(int, percent))


def test_the_pass_rate_by_enumeration():
    outcomes = list(product((0, 1), repeat=5))  # three ordered and two shuffled responses
    passed = sum(0.3 ** sum(o) * 0.7 ** (5 - sum(o)) for o in outcomes
                 if sum(o[:3]) / 3 >= sum(o[3:]) / 2)
    assert pass_rate(0.3, G=3, G_tilde=2) == pytest.approx(passed)
    assert doctest.testmod(grading).failed == 0


# ---------------------------------------------------------------- the worked example

EXAMPLE = README.split("### One group of one step")[1].split("\n## ")[0]


def worked_example() -> tuple[list, list]:
    """The README's rows: (response, numbers) of the ordered group and of the shuffled one."""
    form = re.search("`(<think>.*</answer>)`", EXAMPLE)[1].replace("\\n", "\n")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in EXAMPLE.splitlines()
             if re.match(r"\| ~?\d", line)]
    rows = [(re.sub("(?s)0(.+)3(.+)7", rf"{starts}\g<1>{ends}\g<2>{answer}", form),
             *(float(n) for n in numbers if n)) for _, starts, ends, answer, *numbers in cells]
    return rows[:4], rows[4:]


def test_the_worked_example_is_what_the_code_computes():
    ordered, shuffled = worked_example()
    assert len(ordered) == 4 and len(shuffled) == 2
    record = {"problem_id": 922, "problem_type": "regression", "solution": "<answer>8</answer>"}
    length = int(re.search(r"response has (\d+)", EXAMPLE)[1])
    group, without = (graded(tgrpo, record, [row[0] for row in ordered],
                             [row[0] for row in shuffled], [length] * 4, alpha=alpha, l_min=16,
                             l_max=24) for alpha in (0.3, 0))
    parts = group["parts"]
    columns = [parts["accuracy"], parts["format"], parts["temporal"], parts["length"], group["R"],
               group["A"], without["A"]]
    for i, values in enumerate(zip(*(column.tolist() for column in columns))):
        assert list(ordered[i][1:]) == pytest.approx(values, abs=0.0051), i
    assert (parts["p"], parts["p_tilde"], parts["r_t"]) == (0.5, 0.5, 0.3)
    assert all(words in EXAMPLE for words in ("2/4", "1/2", "$r_t = 0.3$"))
    mean, spread = group["R"].mean().item(), group["R"].std().item()
    assert f"{mean:.3f}" in EXAMPLE and f"{spread:.3f}" in EXAMPLE
    assert [row[1] for row in shuffled] == pytest.approx([0.38, 0.75])
