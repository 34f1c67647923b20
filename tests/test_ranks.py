"""Gradients and sampling weights on two ranks: the same code as on 64 GPUs."""
import pytest
import torch

from conftest import ROOT, run
from two_ranks import SETTINGS, backward_naive, cases, difference


@pytest.fixture(scope="module")
def gradients(toy, tmp_path_factory):
    """{setting: gradients on rank 0}, all computed in one run of two ranks."""
    out = tmp_path_factory.mktemp("two_ranks")
    run(ROOT / "tests/two_ranks.py", "--toy", toy, "--out", out, ranks=2)
    return {name: torch.load(out / "rank0" / f"{name}.pt", weights_only=True)
            for name in (*SETTINGS, "sampler")}


@pytest.mark.parametrize("setting", SETTINGS)
def test_prefix_shared_gradients_with_a_video_and_an_image_on_two_ranks(
        toy, model, processor, gradients, setting):
    """ZeRO's averaged gradients equal the naive single-process ones, parameter by parameter."""
    # a rank's sum over groups, averaged over two ranks
    backward_naive(model, cases(toy, processor), setting[2] / 2)
    assert difference(model, gradients[setting]) < 1e-4


def test_recomputed_activations_under_zero3_give_the_same_gradients_in_every_bit(gradients):
    kept, recomputed = gradients[3, 2, 1, False], gradients[3, 2, 1, True]
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_the_unsharded_sampling_copy_computes_what_the_saved_model_does(
        toy, model, processor, gradients):
    inputs, *_ = next(iter(cases(toy, processor)))
    with torch.no_grad():
        assert torch.allclose(gradients["sampler"], model(**inputs).logits, atol=1e-5)
