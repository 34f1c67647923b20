"""Cold start: supervised fine-tuning on annotated chains of thought (paper, section 3.3).

    python sft.py @toy/sft.args
    deepspeed sft.py --model Qwen/Qwen2.5-VL-7B-Instruct --data Video-R1-COT-165k.json \
        --output sft

The prompt is the one of every stage (build_data.build_messages); the target is the record's
`process`, a newline and its `solution`, closed by the end token. The loss is the mean of
-log p over the target tokens of the global batch, whatever their split over ranks and
micro-batches; prompt and visual tokens carry none.

Left out on purpose: packing (rows are padded to the longest of the micro-batch).

Shapes: B records of a micro-batch, L tokens, N target tokens, V vocabulary.
"""
import argparse
import errno
import hashlib
import json
import math
import os
import resource
import shutil
import signal
import socket
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from build_data import (InputError, MediaError, as_in_file, check_limits, encode, encode_blank,
                        image_as_video, load_records, load_vision_of, pad_batch, provenance,
                        read_args_line, seeded_generator, skip_row)

# What a resumed run may change: it paces the run or says where things are.
FREE_ARGUMENTS = {"data", "media_root", "output", "deepspeed_config", "num_workers",
                  "decode_timeout", "frame_cache", "frame_cache_gb", "save_steps",
                  "keep_checkpoints", "max_skipped", "resume", "timeout_minutes", "local_rank"}
# As well, where the learning rate does not decay towards the end
LENGTH_ARGUMENTS = {"max_steps", "num_train_epochs"}
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
SHOWN_SKIPPED = 10  # reasons that are printed when --max_skipped stops a run
ORDER_STREAM = 0  # first key of the data order's generators
IGNORED = -100  # label of a token without loss, as in torch's cross entropy


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     fromfile_prefix_chars="@")
    parser.convert_arg_line_to_args = read_args_line
    add = parser.add_argument
    # data and model
    add("--model", required=True, help="Hugging Face directory or name of the model to start from")
    add("--data", required=True, help="records with `process`, .json or .jsonl")
    add("--media_root", help="folder that the records' paths are relative to; default: the data's")
    add("--output", required=True, help="folder for metrics, checkpoints and the final model")
    # frames and pixels
    add("--max_frames", type=int, default=16, help="most frames of a video")
    add("--min_frames", type=int, default=4, help="fewest frames of a video")
    add("--fps", type=float, default=2.0, help="frames a second of video, within those bounds")
    add("--min_pixels", type=int, default=4 * 28 * 28, help="fewest pixels of a video frame")
    add("--max_pixels", type=int, default=128 * 28 * 28, help="most pixels of a video frame")
    add("--image_min_pixels", type=int, default=4 * 28 * 28, help="fewest pixels of an image")
    add("--image_max_pixels", type=int, default=512 * 28 * 28, help="most pixels of an image")
    # optimisation
    add("--num_train_epochs", type=float, default=1.0, help="passes over the data")
    add("--per_rank_batch_size", type=int, default=1, help="records of a micro-batch on a rank")
    add("--gradient_accumulation_steps", type=int, default=2, help="micro-batches of a step")
    add("--learning_rate", type=float, default=1e-6, help="peak learning rate of AdamW")
    add("--lr_schedule", choices=("constant", "linear", "cosine"), default="cosine",
        help="decay to 0 after the warm-up")
    add("--warmup_steps", type=int, default=0, help="steps of linear warm-up")
    add("--adam_beta2", type=float, default=0.999, help="AdamW's second decay rate")
    add("--weight_decay", type=float, default=0.01, help="AdamW's decoupled weight decay")
    add("--max_grad_norm", type=float, default=5.0, help="gradients are clipped to this norm")
    add("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=False,
        help="recompute activations in the backward pass to save memory")
    # the machine
    add("--attn_implementation", default="sdpa", help="sdpa, eager or flash_attention_2")
    add("--deepspeed_config", default=str(Path(__file__).parent / "ds_zero3.json"),
        help="DeepSpeed's JSON file: ZeRO stage, offload, precision, monitors")
    add("--num_workers", type=int, default=2, help="processes that decode media ahead of need")
    add("--decode_timeout", type=float, default=120, help="seconds until a medium is given up")
    add("--frame_cache", help="folder that keeps decoded frames for later epochs and runs")
    add("--frame_cache_gb", type=float, default=200, help="gigabytes after which it keeps no more")
    add("--save_steps", type=int, default=500, help="steps between checkpoints; 0: none")
    add("--keep_checkpoints", type=int, default=2, help="newest checkpoints that stay; 0: all")
    add("--max_skipped", type=float, default=0.1,
        help="share of questions with unusable media above which the run stops")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --output")
    add("--seed", type=int, default=0, help="seed of every random draw")
    add("--timeout_minutes", type=float, default=30, help="longest wait for another rank")
    add("--local_rank", type=int, default=-1, help="set by the deepspeed launcher; not used")
    return parser.parse_args(argv)


# -------------------------------------------------------------------------- pure functions

def sft_labels(prompt_ids, response_ids):
    """Input ids and labels of one example: loss on the response only, its end token included.

    >>> sft_labels(torch.tensor([[1, 2]]), torch.tensor([[3, 4]]))[1].tolist()
    [[-100, -100, 3, 4]]
    """
    ids = torch.cat([prompt_ids, response_ids], dim=1)  # (1, L)
    labels = torch.cat([torch.full_like(prompt_ids, IGNORED), response_ids], dim=1)  # (1, L)
    return ids, labels


def continue_positions(positions, labels):
    """Rotary positions (3, B, L) with each response counted on from its prompt's largest one.

    That is where generate() and a rollout put it. In the model's own positions for prompt and
    response together it follows the prompt's text, which a long video's time axis can exceed.
    """
    response = labels != IGNORED  # (B, L)
    largest = positions.masked_fill(response, 0).amax((0, 2))  # (B,)
    counted = largest[:, None] + response.cumsum(1)  # (B, L)
    return torch.where(response, counted, positions)  # (3, B, L)


def target_loss(logits, target):
    """Summed -log p of N target tokens (N,), from the logits (N, V) that predict them."""
    return F.cross_entropy(logits.float(), target, reduction="sum")


def learning_rate(step, args):
    """Learning rate of 0-based `step`: linear warm-up, then the schedule over the other steps."""
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / args.warmup_steps
    progress = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    decay = {"constant": 1.0, "linear": 1 - progress,
             "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return args.learning_rate * decay[args.lr_schedule]


def record_index(position, count, seed):
    """Which record stands at `position` of the endless data order, reshuffled every epoch.

    A pure function, so a resumed run needs no stored state to go on where it stopped.
    """
    epoch, offset = divmod(position, count)
    if record_index.cache[:3] != (epoch, count, seed):
        generator = seeded_generator(ORDER_STREAM, seed, epoch)
        order = torch.randperm(count, generator=generator).tolist()
        record_index.cache = (epoch, count, seed, order)
    return record_index.cache[3][offset]


record_index.cache = (None, None, None, [])  # the order of the epoch asked for last


# --------------------------------------------------------------------------------- data

class Targets(Dataset):
    """position -> encoded record with labels, or its MediaError; runs in worker processes."""

    def __init__(self, records, processor, end_id, args):
        self.records, self.processor, self.end_id, self.args = records, processor, end_id, args

    def __getitem__(self, position):
        record = self.records[record_index(position, len(self.records), self.args.seed)]
        try:
            vision = load_vision_of(record, self.args)
        except MediaError as error:
            return skip_row(record, error)
        return {"problem_id": record["problem_id"],
                **sft_example(self.processor, record, vision, self.end_id)}


def sft_example(processor, record, vision, end_id):
    """encode()'s inputs, lengthened by the target, with `labels` (1, L)."""
    inputs = image_as_video(processor, encode(processor, record, vision))
    target = f"{record['process']}\n{record['solution']}"
    response = processor.tokenizer(target, add_special_tokens=False).input_ids + [end_id]
    inputs["input_ids"], inputs["labels"] = sft_labels(
        inputs["input_ids"], torch.tensor([response]))  # (1, L) each
    longer = (0, len(response))
    inputs["attention_mask"] = F.pad(inputs["attention_mask"], longer, value=1)  # (1, L)
    inputs["mm_token_type_ids"] = F.pad(inputs["mm_token_type_ids"], longer)  # (1, L): text
    return inputs


# --------------------------------------------------------- start-up, the same in each stage

def setup_distributed(args):
    """Joins the process group, under the deepspeed launcher or alone. Returns (rank, device).

    A rank that waits longer than --timeout_minutes for another ends with an error.
    """
    if "RANK" not in os.environ:  # started as `python sft.py`: a group of one
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=port)
    deepspeed.utils.logger.setLevel("WARNING")
    # every tensor that a worker hands over is an open file, and 1024 is a common soft limit
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # DeepSpeed calls functions that torch has renamed: one warning a step and rank otherwise
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    local_rank = int(os.environ["LOCAL_RANK"])
    get_accelerator().set_device(local_rank)
    deepspeed.init_distributed(get_accelerator().communication_backend_name(), verbose=False,
                               timeout=timedelta(minutes=args.timeout_minutes))
    return dist.get_rank(), torch.device(get_accelerator().device_name(local_rank))


def read_deepspeed_config(args):
    """The user's DeepSpeed file, completed with what this script's flags decide."""
    try:
        config = json.loads(Path(args.deepspeed_config).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read --deepspeed_config {args.deepspeed_config}: {error}") \
            from None
    ours = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,
            "gradient_clipping": args.max_grad_norm}
    for key in (*ours, "train_batch_size", "optimizer", "scheduler"):
        if config.get(key, "auto") != "auto":
            raise InputError(f"remove {key!r} from {args.deepspeed_config}: "
                             "this script's own flags decide it")
    if config.pop("fp16", {}).get("enabled", False) not in (False, "auto"):
        raise InputError(f"{args.deepspeed_config} enables fp16: use bf16, or neither for fp32")
    if config.get("bf16", {}).get("enabled") == "auto":  # bf16 where there is an accelerator
        config["bf16"]["enabled"] = get_accelerator().device_name() != "cpu"
    config.setdefault("zero_force_ds_cpu_optimizer", False)  # torch's AdamW, also offloaded
    return {key: value for key, value in config.items() if value != "auto"} | ours


def load_processor(args):
    """The model's processor; InputError where the directory has none."""
    try:
        processor = AutoProcessor.from_pretrained(args.model)
        if not processor.chat_template:
            raise ValueError("no chat template")
        return processor
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"--model {args.model} has no usable processor (tokenizer, "
                         f"preprocessor and chat template): {error}") from None


def load_model(args, config):
    """The model's weights, from safetensors only, in the precision of the DeepSpeed config; under
    ZeRO-3 this rank's part of them. Files of that precision are mapped, not read, and split
    parameter by parameter: with an accelerator no process holds a whole copy."""
    dtype = torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            args.model, dtype=dtype, attn_implementation=args.attn_implementation,
            use_safetensors=True)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"cannot load --model {args.model}: {error}") from None
    if config.get("zero_optimization", {}).get("stage", 0) == 3:
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
        model.to(get_accelerator().current_device_name())  # the buffers: the rest is there
    return model


def start_engine(model, args, config):
    """DeepSpeed's engine around the model, with torch's AdamW; each step sets its learning rate."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0,
                                  betas=(0.9, args.adam_beta2), weight_decay=args.weight_decay)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if engine.zero_optimization_stage() == 0:
        optimizer.state.clear()  # in bf16 DeepSpeed has tried a step, which would count as one
    return engine


# ------------------------------------------------------------ what a run leaves in --output

def run_identity(args, config, records) -> dict:
    """What a resumed run must share with the run that it continues: every argument that its
    numbers depend on, the records, and how DeepSpeed splits the state over ranks."""
    text = json.dumps([as_in_file(record) for record in records])
    free = FREE_ARGUMENTS | (LENGTH_ARGUMENTS if args.lr_schedule == "constant" else set())
    return {**{f"--{name}": value for name, value in vars(args).items() if name not in free},
            "records of --data": hashlib.sha256(text.encode()).hexdigest()[:12],
            "number of processes": dist.get_world_size(),
            "ZeRO stage": config.get("zero_optimization", {}).get("stage", 0)}


def open_output(args, identity) -> int:
    """Makes --output. Returns the step to start from: 0, or with --resume the newest checkpoint's.

    A folder that holds a model, or without --resume a run, is refused: nothing is written over.
    """
    output = Path(args.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to --output {output}: {error}") from None
    steps = checkpoint_steps(output)
    run = bool(steps) or (output / "metrics.jsonl").exists()
    used = not args.resume if run else (output / "config.json").exists()
    # the ranks agree before any of them writes; one that sees another disk is found out here
    probe = output / "shared.probe"
    if dist.get_rank() == 0:
        probe.touch()
    dist.barrier()
    found = gather_objects((used, max(steps, default=0), probe.exists()))
    if dist.get_rank() == 0:
        probe.unlink()
    if any(rank_used for rank_used, *_ in found):
        raise InputError(f"--output {output} holds a run or a model: continue a run with --resume, "
                         "or name another folder")
    if len(set(found)) > 1:
        raise InputError(f"ranks see different files in --output {output}: it must be on storage "
                         f"that all nodes share (newest checkpoints: {[n for _, n, _ in found]})")
    first_step = found[0][1]
    if first_step:
        check_identity(output / f"checkpoint-{first_step}", identity)
    if dist.get_rank() == 0:
        for rest in output.glob("checkpoint-*.partial"):  # of a run that was killed while saving
            shutil.rmtree(rest)
    return first_step


def check_identity(checkpoint, identity):
    """InputError that names what differs between a checkpoint's run and this one."""
    try:
        saved = json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{checkpoint} cannot be read: {error}; remove it to resume from the "
                         "checkpoint before it") from None
    now = json.loads(json.dumps(identity))
    changed = [f"{name} was {saved.get(name)}, is {now.get(name)}"
               for name in sorted(saved.keys() | now.keys()) if saved.get(name) != now.get(name)]
    if changed:
        raise InputError(
            f"--resume: {checkpoint} belongs to another run: {'; '.join(changed)}. Give what it "
            "had, or start another --output from its weights (README, 'When something breaks')")


def open_log(args, name, first_step):
    """<output>/<name>.jsonl for appending; on --resume without the steps that will be redone.
    The first line of metrics.jsonl says how to repeat the run."""
    path, lines = Path(args.output) / f"{name}.jsonl", []
    if first_step and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                step = json.loads(line).get("step", 0)
            except json.JSONDecodeError:  # cut short when the run was killed
                break
            if step <= first_step:
                lines.append(line)
    if name == "metrics" and not lines:
        lines = [json.dumps({"arguments": vars(args), "world_size": dist.get_world_size(),
                             **provenance()})]
    aside = path.with_suffix(".partial")
    aside.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    aside.replace(path)
    return path.open("a", encoding="utf-8", buffering=1)


def save_checkpoint(engine, args, step, identity):
    """checkpoint-<step>/, complete or absent: written aside, renamed when every rank is done.
    Only then those older than the newest --keep_checkpoints are removed."""
    output = Path(args.output)
    aside, whole = output / f"checkpoint-{step}.partial", output / f"checkpoint-{step}"
    if any(gather_objects(whole.exists())):  # all have looked before any of them writes
        return
    try:
        engine.save_checkpoint(str(aside), tag="state")
        if dist.get_rank() == 0:
            (aside / "run.json").write_text(json.dumps(identity), encoding="utf-8")
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as either
        raise InputError(f"cannot write {aside}: {error}. Checkpoints before it are whole: make "
                         "room and continue with --resume") from None
    dist.barrier()
    if dist.get_rank() == 0:
        aside.rename(whole)
        steps = sorted(checkpoint_steps(output))
        for old in steps[:-args.keep_checkpoints] if args.keep_checkpoints else []:
            # renamed first: what is left of it if we are killed now is no checkpoint
            old_aside = (output / f"checkpoint-{old}").rename(output / f"checkpoint-{old}.partial")
            shutil.rmtree(old_aside)
    dist.barrier()


def checkpoint_steps(output) -> list[int]:
    """The steps of the complete checkpoints in a folder."""
    names = [path.name.removeprefix("checkpoint-") for path in output.glob("checkpoint-*")]
    return [int(name) for name in names if name.isdigit()]


def stop_on_sigterm() -> list:
    """Lets SIGTERM (pre-emption) end the run after its current step: the list that is returned
    is no longer empty then."""
    received = []
    signal.signal(signal.SIGTERM, lambda *_: received.append("SIGTERM"))
    return received


def leave_sigterm_to_main(_):
    """For data workers, whom a launcher's SIGTERM reaches too: the current step needs them."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def watch_gradients(model, device):
    """A tensor that counts the gradients, of any parameter in any backward, that hold NaN or
    infinity. Read before an optimizer step, it keeps them from the weights."""
    count = torch.zeros((), device=device)

    def look(gradient):
        count.add_(~gradient.isfinite().all())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(look)
    return count


def check_skipped(args, skipped, drawn):
    """InputError when more than --max_skipped of the questions so far (of 100 when fewer were
    drawn) had media that cannot be used."""
    if skipped > args.max_skipped * max(drawn, 100):
        path = Path(args.output) / "skipped.jsonl"  # just written: another node may not see it yet
        lines = path.read_text(encoding="utf-8").splitlines() if dist.get_rank() == 0 else []
        shown = "".join(f"\n  {json.loads(line)['reason']}" for line in lines[-SHOWN_SKIPPED:])
        raise InputError(f"{skipped} of {drawn} questions had media that cannot be used, above "
                         f"--max_skipped {args.max_skipped:g}. All are in {args.output}/"
                         f"skipped.jsonl, the last are:{shown}")


def skipped_before(args, first_step) -> int:
    """How many questions a resumed run had skipped up to its checkpoint."""
    path = Path(args.output) / "skipped.jsonl"
    if not first_step or not path.exists():
        return 0
    steps = [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()
             if line.endswith("}")]
    return sum(step <= first_step for step in steps)


def save_model(engine, processor, output):
    """The trained model as a Hugging Face directory. Collective: every rank calls it."""
    sharded = engine.zero_optimization_partition_weights()
    state = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=sharded):
            if dist.get_rank() == 0:
                state[name] = parameter.detach().cpu().clone()
    if dist.get_rank() == 0:
        aside = Path(output) / "model.partial"
        try:
            engine.module.save_pretrained(aside, state_dict=state)
            processor.save_pretrained(aside)
        except SafetensorError as error:  # a full disk, which it does not report as OSError
            raise InputError(f"cannot write the model to {aside}: {error}. Make room and continue "
                             "from the last checkpoint with --resume") from None
        for path in sorted(aside.iterdir(), key=lambda path: path.name == "config.json"):
            path.replace(Path(output) / path.name)  # config.json last: it makes it a model
        aside.rmdir()
    dist.barrier()


def gather_objects(value) -> list:
    """The value of every rank, on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# ------------------------------------------------------------------------------ the model

def batch_loss(engine, batch):
    """target_loss of a padded micro-batch: input_ids, labels (B, L) and the rest of the inputs.
    Only the places that predict a target token reach the vocabulary."""
    batch = dict(batch)
    labels = batch.pop("labels")  # (B, L)
    keys = ("input_ids", "attention_mask", "mm_token_type_ids", "video_grid_thw",
            "second_per_grid_ts")
    positions, _ = engine.module.model.get_rope_index(**{key: batch[key] for key in keys})
    target = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # (B, L): what each place predicts
    logits = engine(**batch, position_ids=continue_positions(positions, labels), use_cache=False,
                    logits_to_keep=target != IGNORED).logits  # (N, V)
    return target_loss(logits, target[target != IGNORED])


# ---------------------------------------------------------------------------------- main

def main(args):
    # ------------------------------------------------------------- records, model, engine
    check_limits(args)
    records = load_records(args.data, args.media_root)
    without = [record["problem_id"] for record in records if not record.get("process")]
    if without:
        raise InputError(f"{args.data}: record with problem_id {without[0]}: field process is "
                         f"missing ({len(without)} records); annotate.py makes it")
    config = read_deepspeed_config(args)
    processor = load_processor(args)
    rank, device = setup_distributed(args)
    world = dist.get_world_size()
    received = stop_on_sigterm()
    args.max_steps = math.ceil(len(records) * args.num_train_epochs / (
        args.per_rank_batch_size * args.gradient_accumulation_steps * world))
    identity = run_identity(args, config, records)
    first_step = open_output(args, identity)
    model = load_model(args, config)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    engine = start_engine(model, args, config)
    engine.train()
    infinite = watch_gradients(engine.module, device)
    if first_step:
        engine.load_checkpoint(str(Path(args.output) / f"checkpoint-{first_step}"), tag="state")

    # ------------------------------------------------------------------------- data order
    step_size = args.per_rank_batch_size * args.gradient_accumulation_steps  # a rank, a step
    positions = [(step * world + rank) * step_size + i
                 for step in range(first_step, args.max_steps) for i in range(step_size)]
    tokenizer = processor.tokenizer
    loader = iter(DataLoader(
        Targets(records, processor, tokenizer.eos_token_id, args), sampler=positions,
        batch_size=args.per_rank_batch_size, collate_fn=list, num_workers=args.num_workers,
        prefetch_factor=2 if args.num_workers else None, pin_memory=device.type != "cpu",
        worker_init_fn=leave_sigterm_to_main))
    pad_values = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0,
                  "mm_token_type_ids": 0, "labels": IGNORED}
    blank = image_as_video(processor, encode_blank(processor))
    blank["labels"] = torch.full_like(blank["input_ids"], IGNORED)  # (1, L): no loss
    skipped_count = skipped_before(args, first_step)
    dist.barrier()  # all have counted before the log is rewritten
    logs = {name: open_log(args, name, first_step)
            for name in ("metrics", "skipped")} if rank == 0 else {}

    # ------------------------------------------------------------------------------- loop
    bar = tqdm(total=args.max_steps, initial=first_step, desc="sft", disable=rank != 0)
    for step in range(first_step, args.max_steps):
        started = time.perf_counter()
        micro_batches, skipped, drawn = [], [], []
        for _ in range(args.gradient_accumulation_steps):
            samples = next(loader)
            drawn += samples
            skipped += [sample for sample in samples if "labels" not in sample]
            good = [{key: value for key, value in sample.items() if torch.is_tensor(value)}
                    for sample in samples if "labels" in sample]
            # a rank whose whole micro-batch is broken still makes the calls of the others
            micro_batches.append(pad_batch(good or [blank], pad_values, "right"))
        tokens = sum((batch["labels"][:, 1:] != IGNORED).sum().item() for batch in micro_batches)
        total_tokens = sum(gather_objects(tokens))
        waited = time.perf_counter() - started

        loss_sum = 0.0
        for i, batch in enumerate(micro_batches if total_tokens else []):
            batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            engine.set_gradient_accumulation_boundary(i == len(micro_batches) - 1)
            loss = batch_loss(engine, batch)
            loss_sum += loss.item()
            engine.backward(loss * world / total_tokens)  # DeepSpeed averages over ranks
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        losses, bad = zip(*gather_objects((loss_sum / max(total_tokens, 1), infinite.item())))
        loss, trained = sum(losses), total_tokens > 0
        finite = math.isfinite(loss) and sum(bad) == 0
        if finite and trained:
            engine.step()

        ids = [sample["problem_id"] for sample in drawn if "labels" in sample]
        gathered = gather_objects((skipped, ids, len(received)))
        skipped = [row for rows, _, _ in gathered for row in rows]
        skipped_count += len(skipped)
        if rank == 0:
            row = {**({"optim/loss": loss} if trained else {}),
                   "optim/learning_rate": learning_rate(step, args),
                   "response/total_tokens": total_tokens, "data/skipped": len(skipped),
                   "time/data": waited, "time/step": time.perf_counter() - started}
            norm = engine.get_global_grad_norm() if finite and trained else None
            if norm is not None:  # DeepSpeed keeps none at stage 0 in fp32
                row["optim/grad_norm"] = float(norm)
            for line in skipped:
                logs["skipped"].write(json.dumps({"step": step + 1, **line}) + "\n")
            logs["metrics"].write(json.dumps({"step": step + 1, **row}) + "\n")
            engine.monitor.write_events([(key, value, step + 1) for key, value in row.items()])
            bar.set_postfix(loss=f"{loss:.4f}")
            bar.update()
        if not finite:
            if step:
                save_checkpoint(engine, args, step, identity)  # the weights before this step
            raise InputError(f"step {step + 1}: the loss or a gradient is not finite; problem_ids "
                             f"{[i for _, rank_ids, _ in gathered for i in rank_ids]}. "
                             f"The weights of step {step} are in {args.output}")
        check_skipped(args, skipped_count, (step + 1) * step_size * world)
        stop = any(count for _, _, count in gathered)
        if stop or args.save_steps and (step + 1) % args.save_steps == 0:
            save_checkpoint(engine, args, step + 1, identity)
        if stop:
            if rank == 0:
                tqdm.write(f"stopped by SIGTERM after step {step + 1}: the same command with "
                           "--resume continues")
            return
    bar.close()
    save_model(engine, processor, args.output)


if __name__ == "__main__":
    try:
        main(parse_args())
    except InputError as error:
        sys.exit(f"sft.py: {error}")
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        sys.exit(f"sft.py: {error}. Checkpoints are whole: make room and continue with --resume")
