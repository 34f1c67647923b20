"""Adapters (--lora_rank): what is trained, the reference beneath them, checkpoints, the model."""
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText, GenerationConfig

import sft
import tgrpo
from conftest import PlainEngine, equal_weights, moved_weights, run, together
from test_faults import command, rows, same_run

LORA = ["--lora_rank=4", "--lora_alpha=8"]
RANK = SimpleNamespace(lora_rank=4, lora_alpha=8.0, seed=0)


@pytest.fixture(scope="module")
def learning(toy, tmp_path_factory):
    """Flags by which even an untrained model earns rewards that differ: it has many end tokens, and
    responses of 2 to 5 tokens earn the length reward, whatever they answer."""
    start = tmp_path_factory.mktemp("start") / "model"
    shutil.copytree(toy / "model", start)
    settings = GenerationConfig.from_pretrained(start)
    settings.eos_token_id = list(range(0, 488, 5))
    settings.save_pretrained(start)
    return [*LORA, "--model", start, "--correct_threshold=0", "--l_min=2", "--l_max=5"]


@pytest.fixture
def adapted(model):
    """The tiny model with adapters that are not zero, as after updates."""
    sft.add_adapters(model, RANK)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".B"):
                p.normal_(std=0.05, generator=generator)
    return model


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def test_new_adapters_change_nothing_and_adapters_off_is_the_base_model_bit_for_bit(
        toy, samples, adapted):
    base = AutoModelForImageTextToText.from_pretrained(toy / "model").eval()
    for _, inputs in samples.values():
        expected = logits(base, inputs)
        with sft.adapters_off():
            assert torch.equal(logits(adapted, inputs), expected)
        assert not torch.allclose(logits(adapted, inputs), expected, atol=1e-3)
    sft.add_adapters(base, RANK)
    assert torch.equal(logits(base, inputs), expected)


def test_an_adapter_adds_alpha_over_rank_times_b_a_x_by_hand():
    layer = torch.nn.Linear(2, 1)
    model = SimpleNamespace(requires_grad_=lambda _: None, model=SimpleNamespace(
        language_model=layer))
    sft.add_adapters(model, SimpleNamespace(lora_rank=1, lora_alpha=3.0, seed=0))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0]]))
        layer.bias.fill_(0.5)
        layer.A.copy_(torch.tensor([[1.0, -1.0]]))
        layer.B.fill_(2.0)
    # W x + b = 1 * 3 + 2 * 1 + 0.5 = 5.5; B A x = 2 * (3 - 1) = 4
    assert layer(torch.tensor([3.0, 1.0])).item() == 5.5 + 3.0 * 4


def test_all_linear_maps_of_the_language_model_have_one_and_nothing_else_is_trained(
        samples, adapted):
    """Under gradient checkpointing too, where a backward pass meets frozen layers first."""
    tgrpo.recompute_activations(adapted.train())
    responses, lengths = torch.randint(0, 400, (3, 6)), torch.tensor([6, 2, 4])
    tgrpo.backward_group(PlainEngine(adapted), samples["video"][1], responses, lengths,
                         lambda rows, logps, entropy: logps.mean(), 2, 1.0, last=True)
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    maps = [f"self_attn.{x}_proj" for x in "qkvo"]
    maps += [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    layers = range(adapted.config.text_config.num_hidden_layers)
    assert trained == {f"model.language_model.layers.{i}.{name}.{part}"
                       for i in layers for name in maps for part in "AB"}
    assert all(p.grad.any() for p in adapted.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_merged_weights_give_the_log_probs_of_the_adapted_model_within_rounding(
        toy, samples, adapted, dtype, bound):
    state = {name: p.detach().clone() for name, p in adapted.to(dtype).named_parameters()}
    sft.merge_adapters(adapted, state)
    merged = AutoModelForImageTextToText.from_pretrained(toy / "model", dtype=dtype).eval()
    assert state.keys() == dict(merged.named_parameters()).keys()
    merged.load_state_dict(state, strict=False)  # without the tied head
    inputs = samples["video"][1]
    difference = (logits(adapted, inputs).log_softmax(-1)
                  - logits(merged, inputs).log_softmax(-1)).abs().max()
    assert 0 < difference < bound


# ------------------------------------------------------------------------------------ runs

@pytest.mark.parametrize("stage, ranks", [
    (0, 0), (2, 0), pytest.param(3, 0, marks=pytest.mark.slow),
    pytest.param(3, 2, marks=pytest.mark.slow)])
def test_a_killed_run_with_adapters_resumes_as_if_nothing_had_happened(
        toy, tmp_path, learning, stage, ranks):
    """Its checkpoints hold no frozen weight; its model has the names of an ordinary one, of which
    the tower and the embeddings stayed as they were."""
    whole, cut = (tmp_path / name / "run" for name in ("whole", "cut"))
    together(
        lambda: run(*command(toy, "tgrpo", whole, stage, *learning, ranks=ranks), ranks=ranks),
        lambda: run(*command(toy, "tgrpo", cut, stage, *learning, fault="kill:rollout:4",
                             ranks=ranks), ranks=ranks, check=False))
    assert (cut / "latest").read_text() == "checkpoint-2"
    with_optimizer = sum(p.stat().st_size for p in (cut / "checkpoint-2").iterdir())
    assert with_optimizer < 0.5 * (toy / "model" / "model.safetensors").stat().st_size
    run(*command(toy, "tgrpo", cut, stage, *learning, "--resume", ranks=ranks), ranks=ranks)
    same_run(whole, cut)
    moved = moved_weights(toy / "model", cut)
    assert moved and all(re.search(r"layers\.\d+\.\w+\.\w+_proj\.weight$", name) for name in moved)


@pytest.mark.parametrize("more", [[], ["--gradient_checkpointing"]])
def test_the_first_kl_is_0_and_later_ones_are_not(toy, tmp_path, learning, more):
    run(*command(toy, "tgrpo", tmp_path / "run", 0, *learning, "--max_steps=3",
                 "--updates_per_rollout=1", *more))
    kl = [row["policy/kl"] for row in rows(tmp_path / "run", "metrics") if "policy/kl" in row]
    assert kl[0] == 0 < kl[-1]


@pytest.mark.slow
def test_a_cold_start_with_adapters_resumes_and_is_the_next_stage_s_model(toy, tmp_path):
    whole, cut = (tmp_path / name / "run" for name in ("whole", "cut"))
    together(lambda: run(*command(toy, "sft", whole, 2, *LORA)),
             lambda: run(*command(toy, "sft", cut, 2, *LORA, fault="kill:update:4"), check=False))
    run(*command(toy, "sft", cut, 2, *LORA, "--resume"))
    same_run(whole, cut)
    assert not equal_weights(cut, toy / "model")
    AutoModelForImageTextToText.from_pretrained(cut)


def test_the_sampler_of_zero3_has_the_adapters_of_the_policy(toy, tmp_path, learning):
    """Rollouts under ZeRO-3 equal those at ZeRO-0, also after updates."""
    def responses(stage):
        output = tmp_path / str(stage) / "run"
        run(*command(toy, "tgrpo", output, stage, *learning, "--max_steps=3",
                     "--learning_rate=1e-2"))
        return [row["responses"] for row in rows(output, "rollouts")]
    whole, sharded = together(lambda: responses(0), lambda: responses(3))
    assert whole and whole == sharded
