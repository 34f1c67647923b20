"""tests/variants: what each diff changes; when alpha acts at all; the README's worked example."""
import importlib.util
import math
import re
from types import SimpleNamespace

import pytest
import torch

import ablate
import tgrpo
from build_data import Vision, read_file
from conftest import ROOT, run, table_rows

README = (ROOT / "README.md").read_text(encoding="utf-8")
RIGHT, WRONG = (f"<think>so</think><answer>{letter}</answer>" for letter in "AB")
CHOICE = {"problem_id": 0, "problem_type": "multiple choice", "solution": "<answer>A</answer>"}


def pass_rate(accuracy, G=8, G_tilde=4, test="ge") -> float:
    """How often p >= p_tilde (test "gt": >) when both groups answer right with probability
    `accuracy`, whatever the order of the frames: a sum over two binomial distributions."""
    def chance(k, n):
        return math.comb(n, k) * accuracy**k * (1 - accuracy)**(n - k)

    return sum(chance(i, G) * chance(j, G_tilde) for i in range(G + 1) for j in range(G_tilde + 1)
               if i * G_tilde > j * G or (test == "ge" and i * G_tilde == j * G))


def graded(tgrpo, record, texts, texts_shuffled, lengths, **flags) -> dict:
    """The group {"parts", "R" (G,), "A" (G,), ...} that tgrpo.py's module, or a variant's, makes of
    responses with these texts and lengths in tokens."""
    args = tgrpo.parse_args(["--model=", "--data=", "--output="])
    vars(args).update(G=len(texts), **flags)
    end, known = -1, texts + texts_shuffled
    # a response's first token is its text's number
    tokenizer = SimpleNamespace(batch_decode=lambda rows, **_: [known[row[0]] for row in rows])

    def tokens(first, lengths):  # (n, L), the end token included in the length
        width = max(lengths)
        return torch.tensor([[first + i] * (length - 1) + [end] * (width - length + 1)
                             for i, length in enumerate(lengths)])

    group = {"record": record, "responses": tokens(0, lengths)}  # (G, L)
    if texts_shuffled:
        group["responses_shuffled"] = tokens(len(texts), [2] * len(texts_shuffled))
    tgrpo.grade_group(group, tokenizer, [end], args)
    return group


@pytest.fixture(scope="session")
def variant(tmp_path_factory):
    """Imports the present tgrpo.py with a configuration's diffs applied."""
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


def test_a_diff_says_its_idea_and_changes_at_most_20_lines():
    for path in ablate.DIFFS.rglob("*.diff"):
        diff = path.read_text(encoding="utf-8").splitlines()
        start = diff.index("--- a/tgrpo.py")
        assert start > 1 and all(line.startswith("# ") for line in diff[:start]), path
        assert 0 < sum(line[0] in "+-" for line in diff[start + 2:] if line) <= 20, path


@pytest.mark.parametrize("name", [*ablate.VARIANTS, "thought"])
def test_a_variant_makes_a_step(toy, tmp_path, name):
    run(ablate.make_variant(tmp_path, name), f"@{toy}/tgrpo.args", "--model", toy / "model",
        "--output", tmp_path / "run", "--max_steps", 1, "--prompts_per_rank", 2, "--G", 4,
        "--G_tilde", 2, "--max_new_tokens", 8, "--num_workers", 1, "--val_steps", 0,
        env={"PYTHONPATH": str(ROOT)})
    _, step = read_file(tmp_path / "run/metrics.jsonl")
    rows = [row for row in read_file(tmp_path / "run/rollouts.jsonl") if row["frame_order"]]
    assert step["response/tokens"] > 0 and rows and (tmp_path / "run/config.json").exists()
    second = name not in ("likelihood", "thought", "tokens")
    assert all(len(row["responses_shuffled"]) == 2 * second for row in rows)
    if name in ("likelihood", "thought"):  # an untrained model's likelihoods change a little
        assert all(0 < abs(d) < 1 for row in rows for d in row["d"])


@pytest.mark.parametrize("name", ["reversed", "opposite"])
def test_reversed_shows_the_second_group_the_frames_backwards(variant, monkeypatch, name):
    module = variant(name)
    monkeypatch.setattr(module, "encode", lambda processor, record, vision: vision.frames)
    group = module.example(SimpleNamespace(alpha=0.3, seed=0), None, {"data_type": "video"},
                           Vision(torch.arange(5), {}, None), 7)
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


@pytest.mark.parametrize("name, expected", [
    ("likelihood", [0.6, 0.15, 0, 1.2, 0]),
    # the nats that count, 2, 0.5, 0 and 4, have mean 1.625
    ("opposite_centred", [0.1125, -0.3375, -0.4875, 0.7125, 0])])
def test_likelihood_pays_correct_responses_for_the_nats_they_lose(variant, name, expected):
    d, correct = torch.tensor([2.0, 0.5, -1.0, 9.0, 2.0]), torch.tensor([1, 1, 1, 1, 0]).bool()
    bonus = variant(name).likelihood_bonus(d, correct, 0.3)
    assert bonus.tolist() == pytest.approx(expected, abs=1e-6)


def test_tokens_keeps_the_fifth_that_shuffling_moves_the_most(variant):
    logps = torch.zeros(3, 6)
    shuffled = torch.tensor([[-0.1, 0.5, -3.0, 0.2, 0.0, -9.0]] * 3)
    mask = torch.tensor([[1.0] * 5 + [0], [1.0] * 6, [1.0] + [0] * 5])  # 5, 6 and 1 tokens
    assert variant("tokens").moved_tokens(logps, shuffled, mask).tolist() == [
        [0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0]]


# -------------------------------------------------------------------- when alpha acts

def test_alpha_cancels_from_two_valued_rewards_and_acts_elsewhere():
    def advantages(alpha, lengths=(9,) * 8, **flags):
        return graded(tgrpo, CHOICE, [RIGHT] * 3 + [WRONG] * 5, [WRONG] * 4, lengths, alpha=alpha,
                      l_min=16, l_max=24, **flags)["A"]
    for alpha in (0, 0.3, 1):  # the README rounds them
        assert advantages(alpha).tolist() == pytest.approx([1.207] * 3 + [-0.724] * 5, abs=1e-3)
    for changed in ({"temporal_to": "advantage"}, {"scale_advantages": "none"},
                    {"lengths": [20] + [9] * 7}):  # the length reward makes a third value
        assert (advantages(0.3, **changed) - advantages(0, **changed)).abs().max() > 0.01


def test_a_policy_blind_to_order_passes_the_temporal_test_as_often_as_is_stated():
    text = " ".join((ROOT / "tests/ablations.md").read_text(encoding="utf-8").split())
    percent = re.search(r"between (\d+) and (\d+) % of the time .*?strict .*?between (\d+) and "
                        r"(\d+) %", text).groups()
    assert pass_rate(0.5, G=1, G_tilde=1) == 0.75  # only 0 against 1 fails
    chances = [i / 100 for i in range(20, 91)]
    rates = [[100 * pass_rate(chance, test=test) for chance in chances] for test in ("ge", "gt")]
    assert [round(f(values)) for values in rates for f in (min, max)] == list(map(int, percent))


def test_the_worked_example_is_what_the_code_computes():
    example = README.split("### One group of one step")[1].split("\n## ")[0]
    form = re.search("`(<think>.*</answer>)`", example)[1].replace("\\n", "\n")
    _, *cells = table_rows(example.splitlines())
    rows = [(re.sub("(?s)0(.+)3(.+)7", rf"{starts}\g<1>{ends}\g<2>{answer}", form),
             *(float(n) for n in numbers if n)) for _, starts, ends, answer, *numbers in cells]
    ordered, shuffled = rows[:4], rows[4:]
    assert len(ordered) == 4 and len(shuffled) == 2
    record = {"problem_id": 922, "problem_type": "regression", "solution": "<answer>8</answer>"}
    length = int(re.search(r"response has (\d+)", example)[1])
    group, without = (graded(tgrpo, record, [row[0] for row in ordered],
                             [row[0] for row in shuffled], [length] * 4, alpha=alpha, l_min=16,
                             l_max=24) for alpha in (0.3, 0))
    parts = group["parts"]
    columns = [*map(parts.get, ("accuracy", "format", "temporal", "length")), group["R"],
               group["A"], without["A"]]
    for i, values in enumerate(zip(*(column.tolist() for column in columns))):
        assert list(ordered[i][1:]) == pytest.approx(values, abs=0.0051), i
    assert (parts["p"], parts["p_tilde"], parts["r_t"]) == (0.5, 0.5, 0.3)
    assert all(words in example for words in ("2/4", "1/2", "$r_t = 0.3$"))
    mean, spread = group["R"].mean().item(), group["R"].std().item()
    assert f"{mean:.3f}" in example and f"{spread:.3f}" in example
    assert [row[1] for row in shuffled] == pytest.approx([0.38, 0.75])
