"""Run by test_ranks.py on two ranks: saves the gradients of prefix-shared updates.

With one group a rank, rank 0 holds a video and rank 1 an image; with two, rank 0 runs the video
first and rank 1 the image.
"""
import argparse
import json
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_grad

from conftest import LIMITS  # first, as it finds the scripts
import sft
import tgrpo
from bench import naive_logits
from build_data import (encode, encode_blank, load_model, load_processor, load_records,
                        load_vision, setup_distributed, token_side, write_whole)

# (ZeRO stage, chunk size of five responses, groups a rank, recomputed activations)
SETTINGS = [(3, 2, 1, False), (3, 5, 2, False), (2, 2, 2, False), (1, 5, 2, False),
            (0, 5, 1, False), (3, 2, 1, True)]


def cases(toy, processor):
    """One video and one image with made-up responses of different length and advantages."""
    records = load_records(toy / "train.json")
    for medium, L, seed in (("video", 9, 0), ("image", 6, 1)):
        record = next(record for record in records if record["data_type"] == medium)
        generator = torch.Generator().manual_seed(seed)
        responses = torch.randint(0, 400, (5, L), generator=generator)
        lengths = torch.tensor([L, 2, L - 1, 3, 1])
        mask = (torch.arange(L) < lengths[:, None]).float()
        A = torch.randn(5, generator=generator)
        vision = load_vision(record, factor=token_side(processor), **LIMITS)
        yield encode(processor, record, vision), responses, mask, A


def backward_naive(model, groups, share):
    """Adds a share of the sum of the groups' naive gradients to the model's."""
    for inputs, responses, mask, A in groups:
        logps = tgrpo.token_logps(naive_logits(model, inputs, responses), responses, 1.0)
        loss = tgrpo.tgrpo_loss(logps, logps.detach(), None, A, mask, 0.0, 0.2)
        (loss * share).backward()


def difference(model, gradients):
    """The largest difference of the model's gradients to others, relative to the parameter's."""
    scale = max(p.grad.abs().max() for p in model.parameters())
    assert scale > 0
    return max((gradients[name] - p.grad).norm() / (p.grad.norm() + 1e-3 * scale)
               for name, p in model.named_parameters())


def gradients(toy, out, groups, blank, stage, chunk_size, count, recomputed):
    """Full averaged gradients of the first `count` groups, by parameter name: in the second step,
    when those of the first must be gone. The learning rate is 0."""
    config = out.parent / f"ds{stage}.json"  # one path for all ranks, which may write at once
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}  # shard small ones too
    write_whole({config: [json.dumps({"zero_optimization": zero,
                                      "zero_allow_untested_optimizer": True})]})
    run = sft.open_run(tgrpo.parse_args([
        f"--model={toy}/model", f"--data={toy}/train.json", f"--deepspeed_config={config}",
        f"--output={out.parent}/{stage}.{chunk_size}.{count}.{recomputed}", "--learning_rate=0"]),
        [], tgrpo.parse_args, 1)
    model = load_model(run.args, run.config)
    if recomputed:
        tgrpo.recompute_activations(model)
    sft.start_engine(run, model)
    engine = run.engine
    if stage == 3:  # what rollouts sample from
        sampler = tgrpo.start_sampler(run, [])
        tgrpo.gather_weights(engine, sampler)
        torch.save(sampler(**groups[0][0]).logits, out / "sampler.pt")
    for step in range(2):
        tgrpo.begin_backward(engine, blank)
        for i, (inputs, responses, mask, A) in enumerate(groups[:count]):

            def loss(rows, logps, entropy):
                part = mask[rows, :logps.shape[1]]
                return tgrpo.tgrpo_loss(logps, logps.detach(), None, A[rows], part, 0.0,
                                        0.2) * len(rows) / len(A)
            tgrpo.backward_group(engine, inputs, responses, mask.sum(1).int(), loss, chunk_size,
                                 1.0, last=i == count - 1)
        if step == 0:
            engine.step()
    result = {name: safe_get_full_grad(p).clone() for name, p in  # collective
              engine.module.named_parameters()}
    engine.destroy()
    return result


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--toy", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--settings", type=int, default=len(SETTINGS), help="how many of them")
    parser.add_argument("--local_rank", type=int, default=0)
    options = parser.parse_args()
    rank, _ = setup_distributed(argparse.Namespace(timeout_minutes=10))
    processor = load_processor(argparse.Namespace(model=options.toy / "model"))
    groups = list(cases(options.toy, processor))[::-1 if rank else 1]
    out = options.out / f"rank{rank}"
    out.mkdir()
    for setting in SETTINGS[:options.settings]:
        torch.save(gradients(options.toy, out, groups, encode_blank(processor), *setting),
                   out / f"{setting}.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
