"""Cold start: supervised fine-tuning on annotated chains of thought (paper, section 3.3).

    python sft.py @toy/sft.args
    deepspeed sft.py --model Qwen/Qwen2.5-VL-7B-Instruct --data Video-R1-COT-165k.json \
        --output sft

The prompt is that of every stage (build_data.build_messages). The target is the record's
`process`, a newline, its `solution` and the end token. The loss is the mean of -log p over the
target tokens of the global batch, however they are split over ranks and micro-batches; prompt and
visual tokens have no loss.

Left out on purpose: packing (rows are padded to the longest of the micro-batch).

The second half, below the double ruler, is shared with T-GRPO: tgrpo.py imports it.

Shapes: B records of a micro-batch, L tokens, N target tokens, V vocabulary.
"""
import argparse
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, islice, zip_longest
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Dataset
from transformers import GenerationConfig

from build_data import (FlagParser, InputError, MediaError, above, add_machine_flags,
                        add_media_flags, as_in_file, at_least, encode, encode_blank,
                        forbidden_tokens, generate, image_as_video, load_model, load_processor,
                        load_records, load_vision_of, model_hash, pad_batch, provenance, read_file,
                        record_seed, refuse_absent_media, require_same, rope_positions, run_script,
                        seeded_generator, setup_distributed, shuffle_frames, skip_row, stop_tokens,
                        to_device, whole_rows, write_whole)
from rewards import accuracy_reward, format_reward

import deepspeed  # after build_data, which silences its import messages
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfigError

IGNORED = -100  # label of a token without loss


def parse_args(argv=None):
    parser = FlagParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--num_train_epochs", type=above(0, float), default=1.0, help="passes over the data")
    add("--max_steps", type=at_least(0, int), default=0, help="steps of the run; 0: those passes")
    add("--per_rank_batch_size", type=above(0, int), default=1,
        help="records per micro-batch on each rank")
    add("--gradient_accumulation_steps", type=above(0, int), default=2,
        help="micro-batches per step")
    add("--val_max_new_tokens", type=above(0, int), default=768,
        help="maximum tokens of a response to a held-out question")
    add_run_flags(add, lr_schedule="cosine", save_steps=500)
    return parser.parse_args(argv)


# -------------------------------------------------------------------------- pure functions

def target_text(record) -> str:
    """Returns the response that the model learns."""
    return f"{record.get('process') or ''}\n{record['solution']}"


def is_well_formed(target) -> bool:
    """Returns whether a target earns the format reward and its thought is not empty."""
    return format_reward(target) == 1 and target.split("</think>")[0].strip() != "<think>"


def sft_labels(prompt_ids, response_ids):
    """Returns ids and labels (1, L) of one example. Only response tokens have a loss.

    >>> sft_labels(torch.tensor([[1, 2]]), torch.tensor([[3, 4]]))[1].tolist()
    [[-100, -100, 3, 4]]
    """
    ids = torch.cat([prompt_ids, response_ids], dim=1)  # (1, L)
    labels = torch.cat([torch.full_like(prompt_ids, IGNORED), response_ids], dim=1)  # (1, L)
    return ids, labels


def continue_positions(positions, labels):
    """Returns rotary positions (3, B, L) in which each response continues from its prompt's largest
    position, as in generate() and in a rollout. The model's own continue from the prompt's last
    token, but the positions of a long video can be larger."""
    response = labels != IGNORED  # (B, L)
    largest = positions.masked_fill(response, 0).amax((0, 2))  # (B,)
    continued = largest[:, None] + response.cumsum(1)  # (B, L)
    return torch.where(response, continued, positions)  # (3, B, L)


def target_loss(logits, target):
    """Returns the sum of -log p of target tokens (N,) under the logits (N, V) that predict them."""
    return F.cross_entropy(logits.float(), target, reduction="sum")


# ------------------------------------------------------------------ examples and their loss

def sft_example(processor, record, vision, position):
    """Returns {"record", "inputs"}: the inputs of encode() with the target appended, and labels
    (1, L). Runs in a data worker."""
    inputs = image_as_video(processor, encode(processor, record, vision))
    response = processor.tokenizer(target_text(record), add_special_tokens=False).input_ids
    response.append(processor.tokenizer.eos_token_id)
    inputs["input_ids"], inputs["labels"] = sft_labels(
        inputs["input_ids"], torch.tensor([response]))  # (1, L) each
    longer = (0, len(response))
    inputs["attention_mask"] = F.pad(inputs["attention_mask"], longer, value=1)  # (1, L)
    inputs["mm_token_type_ids"] = F.pad(inputs["mm_token_type_ids"], longer)  # (1, L): text
    return {"record": record, "inputs": inputs}


def batch_loss(engine, batch):
    """Returns target_loss of a padded micro-batch: input_ids, labels (B, L) and the other inputs.
    Logits are computed only where they predict a target token."""
    batch = dict(batch)
    labels = batch.pop("labels")  # (B, L)
    positions, _ = rope_positions(engine, batch)
    target = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # (B, L): next tokens
    logits = engine(**batch, position_ids=continue_positions(positions, labels), use_cache=False,
                    logits_to_keep=target != IGNORED).logits  # (N, V)
    return target_loss(logits, target[target != IGNORED])


def train_on(run, step, micro_batches, metrics):
    """Does one optimizer step on this rank's micro-batches. Returns False, without that step, if
    the loss or a gradient is not finite."""
    tokens = sum((batch["labels"][:, 1:] != IGNORED).sum().item() for batch in micro_batches)
    total_tokens = sum(gather_objects(tokens))
    if not total_tokens:  # all questions of the step are skipped
        return True
    loss_sum = 0.0
    for i, batch in enumerate(micro_batches):
        run.engine.set_gradient_accumulation_boundary(i == len(micro_batches) - 1)
        loss = batch_loss(run.engine, to_device(batch, run.device))
        loss_sum += loss.item()
        run.engine.backward(loss * run.world / total_tokens)  # DeepSpeed averages over ranks
    note(metrics, "optim/loss", [loss_sum], count=tokens)
    return optimizer_step(run, step, loss_sum)


def greedy_texts(run, processor, prompts):
    """Returns the greedy responses to encoded prompts, as `respond` of validate. Collective: a rank
    without a prompt answers a blank question."""
    model, tokenizer = run.engine.module, processor.tokenizer
    # without the model's own defaults, such as the repetition penalty of Qwen2.5-VL's release
    own, model.generation_config = model.generation_config, GenerationConfig(
        do_sample=False, max_new_tokens=run.args.val_max_new_tokens,
        eos_token_id=stop_tokens(model, tokenizer), pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=forbidden_tokens(model, tokenizer))
    ids = generate(model, prompts or [image_as_video(processor, encode_blank(processor))])  # (B, L)
    model.generation_config = own
    return tokenizer.batch_decode(ids[:len(prompts)], skip_special_tokens=True)


# ---------------------------------------------------------------------------------- main

def main(args):
    # ------------------------------------------------------------- records, model, engine
    records = load_records(args.data, args.media_root)
    unusable = [record for record in records if not is_well_formed(target_text(record))]
    if unusable:
        first = unusable[0]
        raise InputError(f"{args.data}: {len(unusable)} of {len(records)} records have a process "
                         "that is not <think>a thought</think>; the first is problem_id "
                         f"{first['problem_id']}, with the target {target_text(first)[:99]!r}: "
                         "correct or remove them")
    refuse_absent_media(args.data, records)
    processor = load_processor(args)
    per_step = args.per_rank_batch_size * args.gradient_accumulation_steps  # per rank
    run = open_run(args, records, parse_args, per_step)
    questions = start_questions(run, processor, records, sft_example)
    model = load_model(args, run.config)
    add_adapters(model, args)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    start_engine(run, model)
    run.validate = partial(validate, run, processor, partial(greedy_texts, run, processor))
    pad_values = {"input_ids": processor.tokenizer.pad_token_id, "attention_mask": 0,
                  "mm_token_type_ids": 0, "labels": IGNORED}
    blank = image_as_video(processor, encode_blank(processor))
    blank["labels"] = torch.full_like(blank["input_ids"], IGNORED)  # (1, L): no loss

    # ------------------------------------------------------------------------------- loop
    work = f"{args.gradient_accumulation_steps} x {args.per_rank_batch_size} records"
    for step, drawn, metrics in steps(run, records, questions, work):
        micro_batches = []
        for i in range(0, per_step, args.per_rank_batch_size):
            good = [sample["inputs"] for sample in drawn[i:i + args.per_rank_batch_size]
                    if "record" in sample]
            # without a usable record a rank still makes the collective calls of the others
            micro_batches.append(pad_batch(good or [blank], pad_values, "right"))
            note(metrics, "response/tokens", [(inputs["labels"] != IGNORED).sum().item()
                                              for inputs in good])
        finite = train_on(run, step, micro_batches, metrics)
        lap(run, metrics, "update")
        if close_step(run, step, drawn, metrics, finite):
            return
    save_model(run, processor)
    print_end(run, f"python tgrpo.py --model {args.output} --data RECORDS --output FOLDER")


# ========================================================================================
# Shared with tgrpo.py. A script opens a run, starts its engine and iterates over its steps.
# Each step ends with close_step, which writes its logs and, if it is due, a checkpoint.
# ========================================================================================

ORDER_STREAM, ADAPTER_STREAM = 0, 3  # first number of a seed; tgrpo.py has 1 and 2
VAL_BATCH = 8  # held-out questions per batch and rank; a video runs in both orders
# A resumed run may change these: they do not affect what the model learns
FREE_ARGUMENTS = {"data", "media_root", "output", "deepspeed_config", "num_workers",
                  "decode_timeout", "save_steps", "keep_checkpoints", "max_skipped", "resume",
                  "timeout_minutes", "rollout_steps", "show_steps", "chunk_size",
                  "gradient_checkpointing", "static_decode", "val_data", "val_steps", "val_limit",
                  "val_max_new_tokens"}
# These too, if the learning rate does not decay towards the end
LENGTH_ARGUMENTS = {"max_steps", "num_train_epochs"}
# Metrics that are printed after each step, and their printed names
PRINTED = {"reward/total": "reward", "reward/accuracy": "accuracy", "group/p": "p",
           "group/p_tilde": "p_tilde", "policy/kl": "kl", "optim/loss": "loss",
           "val/accuracy": "held-out accuracy", "val/accuracy_shuffled": "shuffled",
           "val/gap": "gap"}
LOGS = ("metrics", "rollouts", "skipped", "validation")  # <name>.jsonl in --output


def add_run_flags(add, lr_schedule, save_steps):
    """Adds the flags of both trainings; add: the parser's add_argument."""
    # data and model
    add("--model", required=True, help="Hugging Face directory or name of the model to start from")
    add("--data", required=True, help="Video-R1 records, .json or .jsonl")
    add("--output", required=True, help="folder for metrics, checkpoints and the final model")
    add_media_flags(add)
    # optimizer
    add("--learning_rate", type=at_least(0, float), default=1e-6, help="peak rate of AdamW")
    add("--lr_schedule", choices=("constant", "linear", "cosine"), default=lr_schedule,
        help="decay to 0 after the warm-up")
    add("--warmup_steps", type=at_least(0, int), default=0, help="steps of linear warm-up")
    add("--adam_beta2", type=float, default=0.999, help="beta2 of AdamW")
    add("--weight_decay", type=at_least(0, float), default=0.01, help="weight decay of AdamW")
    add("--max_grad_norm", type=at_least(0, float), default=5.0,
        help="gradients are clipped to this norm")
    add("--gradient_checkpointing", action="store_true",
        help="recompute activations in the backward pass to save memory")
    # adapters
    add("--lora_rank", type=at_least(0, int), default=0,
        help="rank of adapters (LoRA), trained instead of all weights, with 10 to 100 times the "
             "learning rate; 0: none")
    add("--lora_alpha", type=above(0, float), default=32.0,
        help="the adapters' output is multiplied by alpha / rank")
    # held-out questions
    add("--val_data", help="held-out records, to evaluate on during the run")
    add("--val_steps", type=at_least(0, int), default=100,
        help="evaluate every N steps, and at the start and the end; 0: never")
    add("--val_limit", type=above(0, int), default=128, help="only the first records of --val_data")
    # the run and the machine
    add("--deepspeed_config", default=str(Path(__file__).parent / "ds_zero3.json"),
        help="DeepSpeed's JSON file: ZeRO stage, offload, precision, monitors")
    add("--save_steps", type=at_least(0, int), default=save_steps,
        help="save a checkpoint every N steps; 0: never")
    add("--keep_checkpoints", type=at_least(0, int), default=2,
        help="number of checkpoints to keep; 0: all")
    add("--max_skipped", type=at_least(0, float), default=0.1,
        help="stop if more than this share of questions is skipped, as their files are unreadable")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --output")
    add_machine_flags(add)


@dataclass
class Run:
    """Holds the state of a training run on one rank."""
    args: argparse.Namespace
    config: dict          # of DeepSpeed
    identity: dict        # first line of metrics.jsonl, which --resume compares
    rank: int
    world: int            # number of ranks
    device: torch.device
    signals: list         # SIGTERM and SIGINT received so far; one ends the run after the step
    per_step: int         # questions per step on each rank
    held_out: list        # records of --val_data
    first_step: int = 0   # step of the checkpoint to resume
    saved: int = 0        # step of the newest checkpoint
    updated: int = -1     # the last step with an optimizer step
    skipped: int = 0      # questions skipped so far, on all ranks
    lapped: float = 0.0   # time of the last lap, by perf_counter
    engine: deepspeed.DeepSpeedEngine | None = None  # the model in training
    infinite: torch.Tensor | None = None  # number of gradients with NaN or infinity so far
    validate: Callable | None = None  # validate below, as (step, metrics)


# ------------------------------------------------------------------------------ adapters

class AdaptedLinear(torch.nn.Linear):
    """Adds an adapter to a linear map (LoRA, Hu et al. 2021, section 4.1):
    y = W x + b + alpha / rank * B A x. Only A (rank, in) and B (out, rank) are trained."""
    on = True  # one switch for all maps, see adapters_off

    def forward(self, x):
        y = super().forward(x)
        if AdaptedLinear.on:
            y = y + self.scale * F.linear(F.linear(x, self.A), self.B)
        return y


def add_adapters(model, args):
    """If --lora_rank is above 0, freezes the model and adds an adapter to each torch.nn.Linear of
    its language model. B starts at 0, so that the model's output is unchanged. Experts of a
    mixture get none, because their weights are one tensor."""
    if not args.lora_rank:
        return
    model.requires_grad_(False)
    generator = seeded_generator(ADAPTER_STREAM, args.seed)  # the same on all ranks
    for layer in model.model.language_model.modules():
        if type(layer) is torch.nn.Linear:
            layer.__class__, layer.scale = AdaptedLinear, args.lora_alpha / args.lora_rank
            A = torch.empty(args.lora_rank, layer.in_features)
            torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
            layer.A = torch.nn.Parameter(A.to(layer.weight))  # dtype and device
            layer.B = torch.nn.Parameter(layer.A.new_zeros(layer.out_features, args.lora_rank))


@contextmanager
def adapters_off():
    """Turns all adapters off inside the context. Outputs then equal, bit for bit, those from before
    add_adapters."""
    AdaptedLinear.on = False
    try:
        yield
    finally:
        AdaptedLinear.on = True


def merge_adapters(model, state):
    """Merges the adapters in a state dict of the model: W becomes W + alpha / rank * B A."""
    for name, layer in model.named_modules():
        if isinstance(layer, AdaptedLinear):
            W, A, B = (state.pop(f"{name}.{part}") for part in ("weight", "A", "B"))
            merged = W.float() + layer.scale * B.float() @ A.float()  # (out, in)
            state[f"{name}.weight"] = merged.to(W.dtype)


# ------------------------------------------------------------------------------- start

def open_run(args, records, parse_args, per_step) -> Run:
    """Returns a run, checked against other ranks and --output before a model is loaded. Ends the
    process if the run in --output is finished. parse_args: the script's, for the defaults of flags
    that an older run lacks."""
    config, held_out = read_deepspeed_config(args), load_held_out(args)
    weights = model_hash(args.model)
    rank, device = setup_distributed(args)
    args.max_steps = args.max_steps or math.ceil(
        len(records) * args.num_train_epochs / (per_step * dist.get_world_size()))
    identity = {"arguments": vars(args), "records": digest_of(records),
                "model_sha256": weights, "world_size": dist.get_world_size(),
                "zero_stage": config["zero_optimization"].get("stage", 0), **provenance()}
    run = Run(args, config, identity, rank, dist.get_world_size(), device, catch_signals(rank),
              per_step, held_out)
    require_equal_ranks(run)
    run.first_step = run.saved = open_output(run)
    model = (Path(args.output) / "config.json").exists()
    if run.first_step or model:
        check_identity(run, vars(parse_args(["--model=", "--data=", "--output="])))
    if args.max_steps < run.first_step:
        raise InputError(f"--max_steps {args.max_steps} is below the newest checkpoint's step: use "
                         f"{run.first_step}, which writes its model, or more")
    if model:
        reached = whole_rows(Path(args.output) / "metrics.jsonl")[-1].get("step", 0)
        if reached >= args.max_steps:
            if rank == 0:
                print(f"{args.output} is finished, at step {reached}: nothing to do")
            sys.exit(0)
        if not run.first_step:
            raise InputError(f"--output {args.output} holds a model after {reached} steps and no "
                             "checkpoint to continue from: use another folder")
    return run


def digest_of(records) -> str:
    """Returns a short hash of records, without the fields that load_records adds."""
    text = json.dumps([as_in_file(record) for record in records])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_deepspeed_config(args):
    """Returns the config in --deepspeed_config, completed from this script's flags."""
    name = f"--deepspeed_config {args.deepspeed_config}"
    config = read_file(args.deepspeed_config)
    if not isinstance(config, dict):
        raise InputError(f"{name} is not a JSON object")
    for section in ("zero_optimization", "bf16", "fp16"):
        if not isinstance(config.setdefault(section, {}), dict):
            raise InputError(f"{name}: {section} must be an object, not {config[section]!r}")
    ours = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,
            "gradient_clipping": args.max_grad_norm}
    for key in (*ours, "train_batch_size", "optimizer", "scheduler"):
        if config.get(key, "auto") != "auto":
            raise InputError(f"{name} sets {key!r}: remove it, this script's flags set it")
    if config.pop("fp16").get("enabled", False) not in (False, "auto"):
        raise InputError(f"{name} enables fp16: use bf16, or neither for fp32")
    if config["bf16"].get("enabled") == "auto":
        config["bf16"]["enabled"] = get_accelerator().device_name() != "cpu"
    config.setdefault("zero_force_ds_cpu_optimizer", False)  # torch's AdamW, also on the host
    config = {key: value for key, value in config.items() if value != "auto"} | ours
    try:
        deepspeed.DeepSpeedConfig(config)
    except (ValueError, AssertionError, DeepSpeedConfigError) as error:
        reason = re.sub(r"For further information visit \S+", "", str(error))  # pydantic's link
        raise InputError(f"{name}: {' '.join(reason.split())}") from None
    return config


def comparable(identity):
    """Returns the settings that must be equal on all ranks, {name: value}. A resumed run may change
    the FREE_ARGUMENTS among them."""
    return {"records of --data": identity["records"],
            "number of processes": identity["world_size"], "ZeRO stage": identity["zero_stage"],
            "weights of --model": identity["model_sha256"],
            **{f"--{name}": value for name, value in identity["arguments"].items()
               if name != "local_rank"}}


def require_equal_ranks(run):
    """Raises InputError if files, software or flags differ between ranks, as they can between
    machines. Collective."""
    first, *others = gather_objects({
        **run.identity["versions"], **comparable(run.identity),
        "records of --val_data": digest_of(run.held_out), "DeepSpeed's file": run.config,
        "git commit": run.identity["git_commit"]})
    for rank, other in enumerate(others, 1):
        differs = [f"{name} {first[name]} and {other[name]}" for name in first
                   if first[name] != other[name]]
        if differs:
            raise InputError(f"ranks 0 and {rank} differ: {'; '.join(differs)}. Give every machine "
                             "the same files and software")


def open_output(run) -> int:
    """Creates --output. Returns the step of the newest complete checkpoint, or 0. `latest` names
    that checkpoint; if its folder has been removed, an older one is used.

    Raises InputError if the folder holds a run and --resume is not given, or a model but no run.
    """
    output, resume = Path(run.args.output), run.args.resume
    probe, latest = output / "shared.probe", output / "latest"
    tag = reason = ""
    try:
        output.mkdir(parents=True, exist_ok=True)
        tag = latest.read_text(encoding="utf-8").strip() if latest.exists() else ""
        if run.rank == 0:
            probe.touch()
    except OSError as error:
        reason = f"cannot write to --output {output}: {error}"
    # every rank must reach the next collective call: either all raise or none
    if reasons := list(filter(None, gather_objects(reason))):
        raise InputError(reasons[0])
    found = gather_objects((probe.exists(), tag))
    if run.rank == 0:
        probe.unlink()
    if len(set(found)) > 1:
        raise InputError(f"ranks see different files in --output {output} (newest checkpoints: "
                         f"{[tag for _, tag in found]}): use storage that all nodes share")
    there = checkpoints(output)
    logged, model = ((output / name).exists() for name in ("metrics.jsonl", "config.json"))
    taken = (model and not logged) if resume else (there or logged or model)
    if taken:
        raise InputError(f"--output {output} holds a run or a model: continue a run with --resume, "
                         "or use another folder")
    named = re.fullmatch(r"checkpoint-(\d+)", tag)
    whole = [step for step in there if named and step <= int(named[1])]
    # without `latest`, a single checkpoint is from a first save that was killed: return 0
    if not whole and (tag or len(there) > 1):
        raise InputError(f"{latest} must name the checkpoint to continue from, but holds {tag!r}: "
                         f"write one of {[folder.name for folder in there.values()]} into it, "
                         "or use another --output")
    return max(whole, default=0)


def check_identity(run, defaults):
    """Raises InputError, with both values, if the run in --output differs from this one. Flags that
    an older run lacks count as their defaults."""
    log = Path(run.args.output) / "metrics.jsonl"
    try:
        line = whole_rows(log)[0]
        # runs of older versions lack the hash
        was = comparable({"model_sha256": run.identity["model_sha256"], **line,
                          "arguments": defaults | line["arguments"]})
    except (InputError, OSError, LookupError, TypeError) as error:
        raise InputError(f"the first line of {log} must hold the run's configuration: {error!r}. "
                         "Use another --output") from None
    saves_only = run.args.max_steps == run.first_step  # no step is left
    constant = run.args.lr_schedule == "constant"
    free = FREE_ARGUMENTS | (LENGTH_ARGUMENTS if constant or saves_only else set())
    require_same(f"--resume: {run.args.output}", was, comparable(run.identity), "Use its values, "
                 "or start another --output from its weights (README, 'When something breaks')",
                 {f"--{name}" for name in free})


def start_engine(run, model):
    """Starts DeepSpeed's engine with the model and torch's AdamW, and loads the checkpoint to
    resume. From here on the run writes into --output."""
    args, output = run.args, Path(run.args.output)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0,
                                  betas=(0.9, args.adam_beta2), weight_decay=args.weight_decay,
                                  fused=run.device.type in ("cpu", "cuda"))
    run.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=run.config)
    if run.engine.zero_optimization_stage() == 0:
        optimizer.state.clear()  # DeepSpeed made a trial step in bf16, which AdamW counted
    run.engine.train()
    run.infinite = watch_gradients(run.engine.module, run.device)
    if run.first_step:
        tag = f"checkpoint-{run.first_step}"
        try:
            _, state = run.engine.load_checkpoint(str(output), tag=tag,
                                                  load_module_strict=not args.lora_rank)
            run.skipped = state["skipped"]
        except Exception as error:  # unpickling a damaged file can raise any exception
            raise InputError(f"cannot load {output / tag}: {error!r}. If it is damaged, remove it: "
                             "--resume then continues from the checkpoint before") from None
    if run.rank == 0:
        (output / "config.json").unlink(missing_ok=True)  # a longer run: its model is not yet made
        for path in (output / f"{name}.jsonl" for name in LOGS):
            if path.exists():
                trim_log(path, run.first_step)
        if not run.first_step:
            write_whole({output / "metrics.jsonl": [json.dumps(run.identity) + "\n"]})


def watch_gradients(model, device):
    """Returns a tensor that counts gradients with NaN or infinity, over all parameters and backward
    passes. optimizer_step reads it first, so that no such gradient reaches the weights."""
    count = torch.zeros((), device=device)

    def check(gradient):
        # one NaN or infinity makes the sum not finite; isfinite().all() would need a copy
        count.add_(~gradient.sum().isfinite())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(check)
    return count


def trim_log(path, first_step):
    """Removes the lines of steps after first_step from a log: these steps run again."""
    rows = whole_rows(path) if first_step else []
    kept = [row for row in rows if row.get("step", 0) <= first_step]
    write_whole({path: (json.dumps(row) + "\n" for row in kept)})


def catch_signals(rank) -> list:
    """Returns a list that collects SIGTERM (pre-emption) and SIGINT (Ctrl-C). If it is not empty,
    the run ends after its current step. A second Ctrl-C ends the process at once."""
    received = []

    def handle(number, _):
        if number == signal.SIGINT and number in received:
            os._exit(128 + number)  # exit status as in a shell
        received.append(number)
        if rank == 0:
            with suppress(OSError):  # not print: the signal may have interrupted one
                os.write(2, b"\nending after this step (a second Ctrl-C: at once)\n")
    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    return received


def leave_signals_to_main(_):
    """Makes a data worker ignore SIGTERM and Ctrl-C. They reach all processes of a run, but the
    current step needs its workers."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# ---------------------------------------------------------------------------- questions

@lru_cache(maxsize=1)  # of the current epoch
def epoch_order(epoch, count, seed) -> list[int]:
    """Returns the order of the records in an epoch."""
    return torch.randperm(count, generator=seeded_generator(ORDER_STREAM, seed, epoch)).tolist()


def record_index(position, count, seed) -> int:
    """Returns the index of the record at a position of the endless data order, reshuffled every
    epoch. Resuming needs no saved state, because this is a pure function."""
    epoch, offset = divmod(position, count)
    return epoch_order(epoch, count, seed)[offset]


class Questions(Dataset):
    """Maps a position of the data order to the script's example(processor, record, vision,
    position), or to a line of skipped.jsonl if the record's file cannot be read. Runs in data
    workers."""

    def __init__(self, processor, records, example, args):
        self.processor, self.records, self.example, self.args = processor, records, example, args

    def __getitem__(self, position):
        record = self.records[record_index(position, len(self.records), self.args.seed)]
        try:
            vision = load_vision_of(record, self.args, self.processor)
        except MediaError as error:
            return skip_row(record, error)
        return self.example(self.processor, record, vision, position)


def load_questions(run, processor, records, example, positions, together):
    """Returns an iterator over Questions at these positions. Data workers decode the next
    `together` positions in advance, and one more per worker."""
    args = run.args
    ahead = -(-together // args.num_workers) + 1 if args.num_workers else None
    return iter(DataLoader(
        Questions(processor, records, example, args), sampler=positions, batch_size=None,
        collate_fn=dict, num_workers=args.num_workers, prefetch_factor=ahead,
        pin_memory=run.device.type != "cpu", worker_init_fn=leave_signals_to_main,
        generator=torch.Generator()))  # not torch's global one, which dropout uses


def start_questions(run, processor, records, example):
    """Starts data workers. Returns an iterator over this rank's questions of all steps. Must be
    called before the model is loaded: a forked worker would share, and then copy, its memory."""
    positions = [(step * run.world + run.rank) * run.per_step + i
                 for step in range(run.first_step, run.args.max_steps) for i in range(run.per_step)]
    return load_questions(run, processor, records, example, positions, run.per_step)


def steps(run, records, questions, work):
    """Yields (step, this rank's per_step samples, a dict for metrics).

    A sample is an example, with the key "record", or the line of a skipped question. Before the
    first step, prints the run's settings. work: what a rank does in a step, in words.
    """
    for step in range(run.first_step, run.args.max_steps):
        metrics = {}
        run.lapped = time.perf_counter()
        drawn = [next(questions) for _ in range(run.per_step)]
        lap(run, metrics, "data")
        if step == run.first_step and run.rank == 0:
            print_start(run, records, work, drawn)
        if step == 0 and run.held_out:
            write_first(run)
        yield step, drawn, metrics


# -------------------------------------------------------------------- held-out questions

def load_held_out(args) -> list[dict]:
    """Returns the first --val_limit records of --val_data, none if validation is off."""
    if not args.val_data or not args.val_steps:
        return []
    records = load_records(args.val_data, args.media_root)[:args.val_limit]
    refuse_absent_media(args.val_data, records)
    return records


def held_out_example(args, processor, record, vision, position):
    """Returns {"record", "prompts"}: the encoded prompt with the ordered and, for a video, with the
    shuffled frames. evaluate.py --order shuffled shuffles alike, if the seed is the same."""
    visions = [vision]
    if vision.frames is not None:
        generator = seeded_generator(record_seed(args.seed, record))
        visions.append(vision._replace(frames=shuffle_frames(vision.frames, generator)))
    return {"record": record, "prompts": [image_as_video(processor, encode(processor, record, one))
                                          for one in visions]}


def validate(run, processor, respond, step, metrics):
    """Answers the held-out questions greedily, if validation is due after `step` steps. Adds
    val/... to the metrics and the responses to validation.jsonl. Collective.

    respond(prompts): the script's greedy_texts, with a list of encoded prompts. It is collective:
    every rank calls it equally often, also with an empty list. Validation does not change the run:
    it draws no random number and restores the model's settings.
    """
    if not run.held_out or step % run.args.val_steps and step < run.args.max_steps:
        return
    samples = load_questions(run, processor, run.held_out, partial(held_out_example, run.args),
                             range(run.rank, len(run.held_out), run.world), VAL_BATCH)
    rows = []  # of this rank's questions; None for a skipped one
    run.engine.module.eval()
    for _ in range(0, len(run.held_out), VAL_BATCH * run.world):
        batch = list(islice(samples, VAL_BATCH))
        texts = iter(respond([prompt for sample in batch for prompt in sample.get("prompts", ())]))
        for sample in batch:
            responses = [next(texts) for _ in sample.get("prompts", ())]
            rows.append(grade_held_out(metrics, sample["record"], responses) if responses else None)
    run.engine.module.train()
    note(metrics, "val/skipped", [rows.count(None)], count=int(run.rank == 0))  # a sum, not a mean
    in_order = chain(*zip_longest(*gather_objects(rows)))  # the same for any number of ranks
    if run.rank == 0:
        write_lines(run, step - 1, "validation", [row for row in in_order if row])
    lap(run, metrics, "validation")


def grade_held_out(metrics, record, responses):
    """Notes a held-out question's accuracy with ordered and, for a video, with shuffled frames. An
    image's accuracy counts as both, as in evaluate.py --order shuffled. Returns the question's line
    of validation.jsonl."""
    row = {key: record[key] for key in ("problem_id", "path", "problem", "solution")}
    if record.get("options"):
        row["options"] = record["options"]
    for suffix, text in zip(("", "_shuffled"), responses):
        row |= {f"response{suffix}": text, f"accuracy{suffix}": accuracy_reward(text, record)}
    accuracy, shuffled = row["accuracy"], row.get("accuracy_shuffled", row["accuracy"])
    note(metrics, "val/accuracy", [accuracy])
    note(metrics, f"val/accuracy/{record['problem_type']}", [accuracy])
    note(metrics, "val/accuracy_shuffled", [shuffled])
    note(metrics, "val/gap", [accuracy - shuffled])
    return row


def write_first(run):
    """Validates before the first step and writes the metrics as step 0. Collective."""
    metrics = {}
    run.validate(0, metrics)
    note(metrics, "time/step", [metrics["time/validation"][0]])
    row = merge(gather_objects(metrics))
    if run.rank == 0:
        write_metrics(run, -1, row)


# ------------------------------------------------------------------------------ metrics

def note(metrics, name, values, count=None):
    """Adds values to a metric as (sum, count), so that means over ranks are exact. count: how
    many values the sum stands for. If the name ends in _max, the largest value is kept."""
    total, n = metrics.get(name, (0.0, 0))
    if name.endswith("_max"):
        metrics[name] = max(total, *values), 1
    else:
        metrics[name] = total + sum(values), n + (len(values) if count is None else count)


def lap(run, metrics, name):
    """Notes the seconds since the last lap of the step as time/<name>."""
    now = time.perf_counter()
    note(metrics, f"time/{name}", [now - run.lapped])
    run.lapped = now


def gather_objects(value) -> list:
    """Returns the values of all ranks. Collective."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# ----------------------------------------------------------------------- the end of a step

def learning_rate(step, args):
    """Returns the learning rate of a step, counted from 0: linear warm-up, then the schedule."""
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / args.warmup_steps
    progress = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    decay = {"constant": 1.0, "linear": 1 - progress,
             "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return args.learning_rate * decay[args.lr_schedule]


def optimizer_step(run, step, loss) -> bool:
    """Does the engine's optimizer step. Returns False, without that step, if the loss or a gradient
    of any rank is not finite. Collective."""
    bad = run.infinite.item() > 0 or not math.isfinite(loss)
    if any(gather_objects(bad)):
        return False
    for group in run.engine.optimizer.param_groups:
        group["lr"] = learning_rate(step, run.args)
    run.engine.step()
    run.updated = step
    return True


def close_step(run, step, drawn, metrics, finite, rollouts=()) -> bool:
    """Ends a step: merges the ranks' metrics, writes the logs and, if it is due, a checkpoint.
    Returns True if a signal ends the run. Collective.

    Raises InputError if the step was not finite or too many questions were skipped.
    """
    args = run.args
    if finite:
        run.validate(step + 1, metrics)
    parts = [total for name, (total, _) in metrics.items() if name.startswith("time/")]
    note(metrics, "time/step", [sum(parts)])
    skipped = [sample for sample in drawn if "record" not in sample]
    ids = [sample["record"]["problem_id"] for sample in drawn if "record" in sample]
    metrics, *lists = zip(*gather_objects((metrics, [*rollouts], skipped, ids, run.signals)))
    rollouts, skipped, ids, signals = (sum(parts, []) for parts in lists)  # of all ranks
    if run.rank == 0:
        row = merge(metrics) | {"optim/learning_rate": learning_rate(step, args),
                                "data/skipped": len(skipped)}
        norm = run.engine.get_global_grad_norm() if finite and "optim/loss" in row else None
        if norm is not None:  # DeepSpeed has none at ZeRO stage 0 in fp32
            row["optim/grad_norm"] = float(norm)
        write_metrics(run, step, row)
        write_lines(run, step, "rollouts", rollouts)
        write_lines(run, step, "skipped", skipped)
    if not finite:
        stop_at_infinity(run, step, ids)
    run.skipped += len(skipped)
    check_skipped(run, (step + 1) * len(drawn) * run.world, skipped)
    if signals or args.save_steps and (step + 1) % args.save_steps == 0:
        save_checkpoint(run, step + 1)
    if signals and run.rank == 0:
        print(f"stopped by {signal.Signals(signals[0]).name} after step {step + 1}: continue with "
              "the same command and --resume")
    return bool(signals)


def write_metrics(run, step, row):
    """Writes a step's metrics to metrics.jsonl and DeepSpeed's monitor; prints the main ones."""
    write_lines(run, step, "metrics", [dict(sorted(row.items()))])
    run.engine.monitor.write_events([(name, value, step + 1) for name, value in row.items()])
    values = ", ".join(f"{PRINTED[name]} {row[name]:.3g}" for name in PRINTED if name in row)
    print(f"step {step + 1} of {run.args.max_steps}: {values}, {row['time/step']:.2g} s")


def merge(ranks) -> dict:
    """Returns {name: mean over the values of all ranks} of dicts that `note` has filled."""
    merged = {}
    for metrics in ranks:
        for name, (total, count) in metrics.items():
            note(merged, name, [total], count)
    return {name: total / count for name, (total, count) in merged.items() if count}


def write_lines(run, step, name, rows):
    """Appends a step's rows to <output>/<name>.jsonl, where steps count from 1."""
    if rows:
        with open(Path(run.args.output) / f"{name}.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step + 1, **row}) + "\n" for row in rows)


def stop_at_infinity(run, step, ids):
    """Saves the weights if this step has not changed them, and raises InputError."""
    if step and run.updated < step:
        save_checkpoint(run, step)
    raise InputError(f"step {step + 1}: the loss or a gradient is not finite; problem_ids {ids}, "
                     "see the last lines of the logs. --resume would repeat this step: start "
                     "another --output from the last checkpoint's weights (README, 'When something "
                     "breaks')")


def check_skipped(run, drawn, skipped):
    """Raises InputError if the share of skipped questions is above --max_skipped. drawn: number of
    questions so far (counted as at least 100); skipped: the lines of this step."""
    if run.skipped > run.args.max_skipped * max(drawn, 100):
        reasons = "".join(f"\n  {line['reason']}" for line in skipped)
        raise InputError(f"{run.skipped} of {drawn} questions were skipped, above --max_skipped "
                         f"{run.args.max_skipped:g}: repair their files, all listed in "
                         f"{run.args.output}/skipped.jsonl, or raise it. The last are:{reasons}")


# -------------------------------------------------------------------------- console output

def print_start(run, records, work, drawn):
    """Prints the run's settings and the size of the first usable example in drawn. The size shows
    the effect of the limits on frames and pixels."""
    args, kinds = run.args, Counter(record["data_type"] for record in records)
    epochs = args.max_steps * run.per_step * run.world / len(records)
    size = sum(getattr(p, "ds_numel", p.numel()) for p in run.engine.module.parameters())
    precision = "bf16" if run.config["bf16"].get("enabled") else "fp32"
    print(
        f"{args.data}: {len(records):,} records, {kinds['video']:,} videos and {kinds['image']:,} "
        f"images\n{args.model}: {size:,} parameters, {precision}, ZeRO stage "
        f"{run.identity['zero_stage']} on {run.world} x {run.device.type}\n"
        f"a step on each rank: {work}; {args.max_steps:,} steps are {epochs:.3g} epochs")
    for example in [sample for sample in drawn if "record" in sample][:1]:
        inputs = example.get("inputs", example.get("ordered"))
        grid = inputs.get("video_grid_thw", inputs.get("image_grid_thw"))[0].tolist()
        print(f"first {example['record']['data_type']}: {grid[0]} x {grid[1]} x {grid[2]} patches "
              f"(time x height x width), {int((inputs['mm_token_type_ids'] > 0).sum())} of its "
              f"{inputs['input_ids'].shape[1]} tokens visual")


def print_end(run, following):
    """Prints where the model is and which command comes next."""
    if run.rank == 0:
        print(f"{run.args.output}: the model after {run.args.max_steps} steps\nnext: {following}")


# ------------------------------------------------------------------ checkpoints, the model

def save_checkpoint(run, step):
    """Writes checkpoint-<step>/, a tag of DeepSpeed. Once all ranks have written their parts,
    writes `latest` and removes all but the newest --keep_checkpoints. Collective."""
    output, tag = Path(run.args.output), f"checkpoint-{step}"
    if step == run.saved:
        return
    try:
        run.engine.save_checkpoint(str(output), tag=tag, save_latest=False,
                                   client_state={"skipped": run.skipped},
                                   exclude_frozen_parameters=run.args.lora_rank > 0)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as either
        raise cannot_write(output / tag, error) from None
    dist.barrier()
    run.saved = step
    if run.rank == 0:
        write_whole({output / "latest": [tag]})
        whole = [folder for at, folder in checkpoints(output).items() if at <= step]
        for folder in whole[:-run.args.keep_checkpoints] if run.args.keep_checkpoints else ():
            shutil.rmtree(folder)
    dist.barrier()


def cannot_write(folder, error) -> InputError:
    """Removes an incomplete checkpoint or model. Returns the error to raise, with the free space:
    torch and safetensors do not always report a full disk."""
    free = shutil.disk_usage(folder.parent).free / 1e9
    shutil.rmtree(folder, ignore_errors=True)
    return InputError(f"cannot write {folder}: {error} ({free:.1f} GB free). Older checkpoints are "
                      "whole: make room if the disk is full, and continue with --resume")


def checkpoints(output) -> dict[int, Path]:
    """Returns {step: folder} of the checkpoints in a folder, oldest first. One that is newer than
    `latest` may be incomplete, if its save was killed; the run overwrites it."""
    found = {path.name.removeprefix("checkpoint-"): path for path in output.glob("checkpoint-*")}
    return {int(step): found[step] for step in sorted(filter(str.isdigit, found), key=int)}


def save_model(run, processor):
    """Writes the trained model to --output, as a Hugging Face directory. Collective."""
    sharded = run.engine.zero_optimization_partition_weights()
    state = {}
    for name, parameter in run.engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=sharded):
            if run.rank == 0:
                state[name] = parameter.detach().cpu().clone()
    if run.rank == 0:
        merge_adapters(run.engine.module, state)
        output, aside = Path(run.args.output), Path(run.args.output) / "model.partial"
        try:
            run.engine.module.save_pretrained(aside, state_dict=state)
            processor.save_pretrained(aside)
        except (OSError, SafetensorError) as error:
            raise cannot_write(aside, error) from None
        for path in sorted(aside.iterdir(), key=lambda path: path.name == "config.json"):
            path.chmod((output / "metrics.jsonl").stat().st_mode)  # safetensors sets owner-only
            path.replace(output / path.name)  # config.json last: it marks a complete model
        aside.rmdir()
    dist.barrier()


if __name__ == "__main__":
    run_script(main, parse_args)
