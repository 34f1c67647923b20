"""Run by test_ranks.py under DeepSpeed's launcher: saves the gradients of a prefix-shared update.

With one group a rank, rank 0 holds a video and rank 1 an image; with two, rank 0 runs the video
first and rank 1 the image.
"""
import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad

import conftest  # noqa: F401  puts the scripts on the path
import tgrpo
from build_data import encode, load_records, load_vision


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--toy")
    parser.add_argument("--out")
    parser.add_argument("--stage", type=int)
    parser.add_argument("--chunk_size", type=int)
    parser.add_argument("--groups", type=int)
    parser.add_argument("--local_rank", type=int, default=0)
    options = parser.parse_args()
    toy, out = Path(options.toy), Path(options.out)
    config_file = out / f"ds{options.stage}.json"
    args = tgrpo.parse_args(["--model", str(toy / "model"), "--data", str(toy / "train.json"),
                             "--output", str(out), "--deepspeed_config", str(config_file)])
    rank, _ = tgrpo.setup_distributed()
    if rank == 0:
        config_file.write_text(json.dumps({"zero_optimization": {"stage": options.stage},
                                           "zero_allow_untested_optimizer": True}))
    dist.barrier()
    config = tgrpo.read_deepspeed_config(args)
    engine = tgrpo.start_engine(tgrpo.load_model(args, config), args, config)
    engine.train()
    processor = tgrpo.load_processor(args)
    groups = list(cases(toy, processor))
    mine = (groups if rank == 0 else groups[::-1])[:options.groups]
    for i, (inputs, responses, mask, A) in enumerate(mine):

        def loss(rows, logps, entropy):
            return tgrpo.tgrpo_loss(logps, logps.detach(), None, A[rows], mask[rows], 0.0,
                                    0.2) * len(rows) / len(A)
        tgrpo.backward_group(engine, inputs, responses, loss, options.chunk_size, 1.0,
                             last=i == len(mine) - 1)
    gradients = {name: safe_get_full_grad(p).clone() for name, p in
                 engine.module.named_parameters()}  # collective
    if rank == 0:
        torch.save(gradients, out / "gradients.pt")


def cases(toy, processor):
    """One video and one image with made-up responses of different length and advantages."""
    limits = {"max_frames": 8, "min_frames": 4, "fps": 2, "min_pixels": 784, "max_pixels": 784}
    records = load_records(toy / "train.json")
    for medium, L, seed in (("video", 9, 0), ("image", 6, 1)):
        record = next(record for record in records if record["data_type"] == medium)
        generator = torch.Generator().manual_seed(seed)
        responses = torch.randint(0, 400, (5, L), generator=generator)
        lengths = torch.tensor([L, 2, L - 1, 3, 1])
        mask = (torch.arange(L) < lengths[:, None]).float()
        A = torch.randn(5, generator=generator)
        yield encode(processor, record, load_vision(record, **limits)), responses, mask, A


if __name__ == "__main__":
    main()
