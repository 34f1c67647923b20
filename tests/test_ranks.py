"""Two ranks under DeepSpeed's launcher, the same code as on 64 GPUs."""
import json

import pytest
import torch
from safetensors.torch import load_file

import tgrpo
from conftest import ROOT, run
from test_tgrpo import naive_logits


@pytest.mark.parametrize("stage, chunk_size, groups", [
    (3, 2, 1), (3, 5, 1), (3, 5, 2), (2, 5, 1), (2, 2, 2), (1, 5, 2), (0, 5, 1)])
def test_prefix_shared_gradients_with_a_video_and_an_image_on_two_ranks(
        toy, model, processor, tmp_path, stage, chunk_size, groups):
    """ZeRO's averaged gradients equal the naive single-process ones, parameter by parameter."""
    from two_ranks import cases
    run(ROOT / "tests/two_ranks.py", "--toy", toy, "--out", tmp_path, "--stage", stage,
        "--chunk_size", chunk_size, "--groups", groups, ranks=2)
    gradients = torch.load(tmp_path / "gradients.pt", weights_only=True)
    for inputs, responses, mask, A in cases(toy, processor):
        logps, _ = tgrpo.token_logps(naive_logits(model, inputs, responses), responses, 1.0)
        loss = tgrpo.tgrpo_loss(logps, logps.detach(), None, A, mask, 0.0, 0.2)
        (loss * groups / 2).backward()  # each rank's sum over its groups, averaged over ranks
    scale = max(p.grad.abs().max() for p in model.parameters())
    for name, p in model.named_parameters():
        error = (gradients[name] - p.grad).norm()
        assert error <= 1e-4 * p.grad.norm() + 1e-7 * scale, name
