"""The algorithm against hand-computed numbers, the fast forms against the naive ones."""
import doctest
import math
from itertools import permutations
from types import SimpleNamespace

import pytest
import torch

import sft
import tgrpo
from bench import naive_logits
from build_data import pad_batch, seeded_generator

RULES = SimpleNamespace(G=4, alpha=0.3, omega=0.2, l_min=10, l_max=20, correct_threshold=0.5,
                        temporal_test="ge", temporal_to="reward", scale_advantages="std")
CHOICE = {"problem_type": "multiple choice", "solution": "<answer>B</answer>",
          "options": ["A. left", "B. right"], "problem_id": 1}
RIGHT = "<think>so</think><answer>B</answer>"
WRONG = "<think>so</think><answer>A</answer>"


# ------------------------------------------------------------------ shuffling, Eq. 1 to 5

def test_the_examples_in_docstrings_hold():
    assert doctest.testmod(tgrpo).failed == doctest.testmod(sft).failed == 0


def test_shuffling_reaches_every_order_of_whole_frames_but_the_identity():
    frames = torch.arange(3 * 2 * 2 * 2).view(3, 2, 2, 2)
    orders = [tgrpo.shuffle_frames(frames, seeded_generator(seed)) for seed in range(200)]
    places = {tuple((shuffled[:, 0, 0, 0] // 8).tolist()) for shuffled in orders}
    assert places == {*permutations(range(3))} - {(0, 1, 2)}
    assert all((shuffled.flatten(1) % 8 == torch.arange(8)).all() for shuffled in orders)
    assert tgrpo.shuffle_frames(torch.arange(1), seeded_generator(0)).tolist() == [0]


@pytest.mark.parametrize("correct, shuffled, test, expected", [
    ([1, 1, 0, 0], [1, 0, 0, 0], "ge", 0.3),
    ([1, 1, 0, 0], [1, 1], "ge", 0.0),
    ([1, 1, 0, 0], [1, 0], "ge", 0.3),  # a tie passes Eq. 1 ...
    ([1, 1, 0, 0], [1, 0], "gt", 0.0),  # ... and not the strict test
    ([0, 0], [0], "ge", 0.3),
])
def test_temporal_reward_compares_shares_of_correct_responses(correct, shuffled, test, expected):
    assert tgrpo.temporal_reward(correct, shuffled, 0.3, test) == expected


def test_advantages_by_hand():
    A = tgrpo.group_advantages(torch.tensor([1.0, 1.0, 2.0, 4.0]))
    # mean 2, unbiased variance (1 + 1 + 0 + 4) / 3 = 2
    expected = torch.tensor([-1.0, -1.0, 0.0, 2.0]) / (math.sqrt(2) + 1e-4)
    assert torch.allclose(A, expected)
    assert tgrpo.group_advantages(torch.tensor([1.0, 3.0]), "none").tolist() == [-1, 1]
    for equal in ([1.3] * 8, [2.2]):  # the mean of the eight is rounded
        assert tgrpo.group_advantages(torch.tensor(equal)).tolist() == [0] * len(equal)


def test_rewards_of_a_group_by_part():
    parts = tgrpo.group_rewards([RIGHT, WRONG, RIGHT, "B"], [WRONG, WRONG], [9, 15, 20, 15],
                                CHOICE, RULES)
    assert parts["accuracy"].tolist() == [1, 0, 1, 0]
    assert parts["format"].tolist() == [1, 1, 1, 0]
    assert torch.allclose(parts["temporal"], torch.tensor([0.3, 0, 0.3, 0]))
    assert torch.allclose(parts["length"], torch.tensor([0, 0, 0.2, 0]))  # correct, 10 to 20 long
    assert (parts["p"], parts["p_tilde"], parts["r_t"]) == (0.5, 0.0, 0.3)


def test_continuous_rewards_are_correct_from_the_threshold_on():
    record = {"problem_type": "regression", "solution": "<answer>10</answer>", "problem_id": 1}
    text = "<think>so</think><answer>{}</answer>"
    parts = tgrpo.group_rewards([text.format(5), text.format(4)], [text.format(0)], [1, 1],
                                record, RULES)
    assert torch.allclose(parts["accuracy"], torch.tensor([0.5, 0.4]))
    assert torch.allclose(parts["temporal"], torch.tensor([0.3, 0.0]))


# --------------------------------------------------------------------------- Eq. 4, masks

def loss_inputs(n=3, L=5, seed=0):
    generator = seeded_generator(seed)
    logps = -torch.rand(n, L, generator=generator, dtype=torch.float64) * 3
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]).double()
    return logps.requires_grad_(), mask, torch.tensor([1.5, -0.5, 0.25]).double()


@pytest.mark.parametrize("mean, expected", [
    ("response", [1 / (3 * 5), 1 / (3 * 2), 1 / (3 * 3)]), ("token", [1 / 10, 1 / 10, 1 / 10]),
    ("length", [1 / (3 * 8), 1 / (3 * 8), 1 / (3 * 8)])])
def test_each_mean_of_the_loss_by_hand_and_whatever_the_chunks(mean, expected):
    """Responses of 5, 2 and 3 tokens, of at most 8: the gradient of a token is -A times its
    weight, by default A over G times the length. A chunk that is cut to its longest response
    changes nothing."""
    logps, mask, A = loss_inputs()
    weights = tgrpo.token_weights(mask, mean, longest=8)
    assert torch.allclose(weights, torch.tensor(expected)[:, None].double() * mask)
    given = () if mean == "response" else (weights,)
    tgrpo.tgrpo_loss(logps, logps.detach(), None, A, mask, 0.0, 0.2, *given).backward()
    assert torch.allclose(logps.grad, -A[:, None] * weights)
    group = {"old": logps.detach(), "ref": None, "A": A, "mask": mask, "weights": weights}
    args = SimpleNamespace(beta=0.0, epsilon=0.2)
    for chunk_size in (1, 2, 3):
        chunks = tgrpo.chunks_of(logps.detach(), mask.sum(1).int(), chunk_size)
        loss = sum(tgrpo.group_loss(group, rows, chunk, args) for rows, chunk in chunks)
        assert loss.item() == pytest.approx(-(A[:, None] * weights).sum().item(), abs=1e-12)


def test_gradient_equals_finite_differences():
    logps, mask, A = loss_inputs()
    old = logps.detach() + 0.1 * torch.randn(3, 5, generator=seeded_generator(1)).double()
    ref = logps.detach() - 0.3
    assert torch.autograd.gradcheck(
        lambda x: tgrpo.tgrpo_loss(x, old, ref, A, mask, 0.04, 0.5), (logps,))


@pytest.mark.parametrize("advantage, ratio, moves", [
    (1.0, 1.5, False), (1.0, 0.5, True), (-1.0, 1.5, True), (-1.0, 0.5, False)])
def test_the_clip_stops_a_step_that_has_gone_far_enough(advantage, ratio, moves):
    logps = torch.zeros(1, 1, requires_grad=True)
    old = -torch.log(torch.full((1, 1), ratio))
    tgrpo.tgrpo_loss(logps, old, None, torch.tensor([advantage]), torch.ones(1, 1), 0.0,
                     0.2).backward()
    assert bool(logps.grad.abs().item() > 0) is moves


def test_kl_term_by_hand():
    logps, ref = torch.tensor([[math.log(0.5)]]), torch.tensor([[math.log(0.25)]])
    # k3: r - log r - 1 with r = 0.25 / 0.5
    kl = 0.5 + math.log(2) - 1
    loss = tgrpo.tgrpo_loss(logps, logps, ref, torch.zeros(1), torch.ones(1, 1), 0.04, 0.2)
    assert loss.item() == pytest.approx(0.04 * kl, abs=1e-7)


def test_k3_is_an_unbiased_estimate_of_the_kl_divergence():
    p, q = torch.tensor([0.2, 0.5, 0.3]).double(), torch.tensor([0.4, 0.4, 0.2]).double()
    expectation = (p * tgrpo.kl_k3(p.log(), q.log())).sum()
    assert expectation.item() == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-12)


def test_the_loss_ignores_what_stands_after_the_end_token():
    logps, mask, A = loss_inputs()
    old = logps.detach()
    other = old.masked_fill(mask == 0, torch.inf)  # times 0, it would be NaN
    args = (old, old, A, mask, 0.04, 0.2)
    assert torch.equal(tgrpo.tgrpo_loss(logps, *args), tgrpo.tgrpo_loss(other, *args))


def test_the_mask_ends_with_the_first_end_token_of_either_kind():
    ids = torch.tensor([[5, 9, 9, 9], [8, 5, 9, 5], [5, 6, 7, 5], [5, 6, 7, 8]])
    assert tgrpo.response_mask(ids, [9, 8]).tolist() == [
        [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]


# -------------------------------------------------------------------------------- rollout

def sampling(processor, model, **changes):
    return {"max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0,
            "eos_ids": tgrpo.stop_tokens(model, processor.tokenizer),
            "generator": seeded_generator(0), **changes}


def forbid(processor, model):
    """The model as a run has it: its forbidden tokens, after their logits are set to -inf."""
    ids = tgrpo.forbidden_tokens(model, processor.tokenizer)
    tgrpo.forbid_tokens(model, ids, model.device)
    return ids


@pytest.fixture
def recorded(monkeypatch):
    """The logits that a rollout samples from, one entry a decoding step."""
    entries, sample = [], tgrpo.sample_tokens

    def record(logits, *options):
        entries.append(logits.clone())
        return sample(logits, *options)
    monkeypatch.setattr(tgrpo, "sample_tokens", record)
    return entries


def test_logits_along_the_cache_equal_a_full_forward(model, processor, samples, recorded):
    """Recorded while decoding prompts of different length side by side, a video's two orders among
    them, and rows leave early: end tokens fill these up."""
    video, image = samples["video"][1], samples["image"][1]
    other = video | {"pixel_values_videos": video["pixel_values_videos"].flip(0)}
    model.generation_config.eos_token_id = list(range(0, 488, 5))  # rows end often
    forbid(processor, model)
    options = sampling(processor, model)
    groups = tgrpo.rollout(model, [pad_batch([video, other], {}, "left"), image], [[3, 2], [2]],
                           **options)
    full = torch.cat([naive_logits(model, *pair) for pair in zip((video, other, image), groups)])
    assert not torch.allclose(full[0, 0], full[3, 0], atol=1e-2)  # by the order of the frames
    mask = torch.cat([tgrpo.response_mask(g, options["eos_ids"]) for g in groups]).bool()
    assert (torch.cat(groups)[~mask] == options["eos_ids"][0]).all()
    assert len({int(n) for n in mask.sum(1)}) > 1, "no row left early: the test tests nothing"
    for t, logits in enumerate(recorded):
        assert torch.allclose(logits, full[mask[:, t], t], atol=1e-4), t


def test_static_decoding_needs_attention_that_a_cuda_graph_can_hold(capsys):
    with pytest.raises(SystemExit):
        tgrpo.parse_args(["--model=m", "--data=d", "--output=o", "--static_decode",
                          "--attn_implementation=flash_attention_2"])
    assert "--static_decode needs --attn_implementation sdpa" in capsys.readouterr().err


@pytest.mark.parametrize("temperature, top_p, nucleus", [
    (1.0, 1.0, [0, 1, 2, 3, 4]), (0.5, 1.0, [0, 1, 2, 3, 4]), (1.0, 0.6, [1, 4])])
def test_sampling_frequencies_match_the_softmax_over_the_nucleus(temperature, top_p, nucleus):
    """The nucleus is the smallest set that reaches top_p, here 0.56 + 0.21. Chi-squared of 20,000
    draws; the bound 23.5 is passed by chance once in 10,000 seeds (4 degrees of freedom), and the
    seed is fixed."""
    logits = torch.tensor([[0.0, 2.0, -1.0, 0.5, 1.0]])
    tokens = tgrpo.sample_tokens(logits.expand(20000, -1), temperature, top_p, seeded_generator(7))
    observed = torch.bincount(tokens, minlength=5)[nucleus].double()
    expected = torch.softmax(logits[0, nucleus].double() / temperature, 0) * 20000
    assert observed.sum() == 20000 and ((observed - expected) ** 2 / expected).sum() < 23.5


def test_a_token_is_clipped_where_its_gradient_is_cut_off(monkeypatch):
    """Of four, too far up where A > 0 and too far down where A < 0; never where A is 0."""
    A, ratio = torch.tensor([1.0, 1.0, 0.0, -1.0]), torch.tensor([1.3, 0.5, 0.5, 0.7])
    metrics, zeros = {}, torch.zeros(4, 1)
    group = {"mask": zeros + 1, "A": A, "old": zeros, "ref": None}
    chunk = group, torch.arange(4), ratio.log()[:, None], zeros
    tgrpo.note_policy(metrics, *chunk, u=1, epsilon=0.2)
    assert metrics["policy/clip_rate"] == (2, 4)
    assert metrics["policy/ratio_max"] == (pytest.approx(1.3), 1)
    # the ratio of the loss, whatever that is: a fork changes one function
    monkeypatch.setattr(tgrpo, "policy_ratio", lambda logps, *_: 2 * torch.ones_like(logps))
    tgrpo.note_policy(metrics, *chunk, u=1, epsilon=0.2)
    assert metrics["policy/ratio_max"] == (2, 1)
    # in the first update it is 1, and the clip never acts: nothing is logged
    metrics = {}
    tgrpo.note_policy(metrics, *chunk, u=0, epsilon=0.2)
    assert metrics.keys() == {"policy/entropy"}


# ------------------------------------------------------------- log-probabilities of an update

@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_sampler_and_update_have_the_same_distributions_at_the_same_positions(
        model, processor, samples, recorded, dtype, bound):
    """Their log-probs agree, and no entropy is left for forbidden tokens. If only the sampler
    excluded them, its log-probs would all lie above the update's, here by up to 2e-2. Time steps of
    20 s: the video's largest position exceeds that of the text after it."""
    forbidden_ids = forbid(processor, model.to(dtype))
    inputs = samples["video"][1] | {"second_per_grid_ts": torch.tensor([20.0])}
    _, (last, following) = tgrpo.run_prompt(model, inputs)
    assert following - last > 1, "the video is too short: the test tests nothing"
    ids, = tgrpo.rollout(model, [inputs], [[4]],
                         **sampling(processor, model, eos_ids=[-1]))  # no row ends early
    sampled = torch.stack(recorded, 1).float().log_softmax(-1)  # (4, L, V)
    assert (sampled[:, :, forbidden_ids] == -torch.inf).all()
    sampled = sampled.gather(-1, ids[..., None])[..., 0]  # (4, L)
    logps = tgrpo.group_logps(model, inputs, ids, torch.full((4,), ids.shape[1]), 2)
    assert (logps - sampled).abs().max() < bound
    assert abs((logps - sampled).mean()) < bound / 10  # to neither side
    logits = torch.zeros(1, 1, 8).index_fill(-1, torch.tensor([2, 3, 5, 6]), -torch.inf)
    assert tgrpo.token_entropy(logits, 1.0).item() == pytest.approx(math.log(4))


def test_log_probs_and_entropies_in_pieces_are_those_of_all_logits_over_the_temperature(
        monkeypatch):
    """So is the gradient of the log-probs."""
    monkeypatch.setattr(tgrpo, "PIECE", 4)
    logits = (3 * torch.randn(2, 5, 7, generator=seeded_generator(0))).requires_grad_()
    ids, weights = torch.arange(10).view(2, 5) % 7, torch.linspace(-1, 1, 10).view(2, 5)
    expected = torch.distributions.Categorical(logits=logits / 0.7)
    assert torch.allclose(tgrpo.token_entropy(logits, 0.7), expected.entropy(), atol=1e-6)
    logps = tgrpo.token_logps(logits, ids, 0.7), expected.log_prob(ids)
    assert torch.allclose(*logps, atol=1e-6)
    ours, theirs = (torch.autograd.grad((x * weights).sum(), logits)[0] for x in logps)
    assert torch.allclose(ours, theirs, atol=1e-6)
