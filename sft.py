"""Cold start: supervised fine-tuning on annotated chains of thought (paper, section 3.3).

    python sft.py @toy/sft.args
    deepspeed sft.py --model Qwen/Qwen2.5-VL-7B-Instruct --data Video-R1-COT-165k.json \
        --output sft

The prompt is the one of every stage (build_data.build_messages); the target is the record's
`process`, a newline and its `solution`, closed by the end token. The loss is the mean of
-log p over the target tokens of the global batch, whatever their split over ranks and
micro-batches; prompt and visual tokens carry none.

Left out on purpose: packing (rows are padded to the longest of the micro-batch).

The second half, behind a ruler, is what any training run here is; tgrpo.py trains by it too.

Shapes: B records of a micro-batch, L tokens, N target tokens, V vocabulary.
"""
import argparse
import errno
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

from build_data import (FULL_DISK, FlagParser, InputError, MediaError, above, add_machine_flags,
                        add_media_flags, as_in_file, at_least, encode, encode_blank,
                        forbidden_tokens, generate, image_as_video, load_model, load_processor,
                        load_records, load_vision_of, model_hash, pad_batch, provenance, read_file,
                        record_seed, refuse_absent_media, require_same, rope_positions, run_script,
                        seeded_generator, setup_distributed, shuffle_frames, skip_row, stop_tokens,
                        to_device, whole_rows, write_whole)
from rewards import accuracy_reward, format_reward

import deepspeed  # after build_data, which quiets its first words
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfigError

IGNORED = -100  # label of a token without loss, as in torch's cross entropy


def parse_args(argv=None):
    parser = FlagParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--num_train_epochs", type=above(0, float), default=1.0, help="passes over the data")
    add("--max_steps", type=at_least(0, int), default=0, help="steps of the run; 0: those passes")
    add("--per_rank_batch_size", type=above(0, int), default=1,
        help="records of a micro-batch on a rank")
    add("--gradient_accumulation_steps", type=above(0, int), default=2,
        help="micro-batches of a step")
    add("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=False,
        help="recompute activations in the backward pass to save memory")
    add("--val_max_new_tokens", type=above(0, int), default=768,
        help="most tokens of a held-out answer")
    add_run_flags(add, lr_schedule="cosine", save_steps=500)
    return parser.parse_args(argv)


# -------------------------------------------------------------------------- pure functions

def target_text(record) -> str:
    """Returns what the model learns to answer."""
    return f"{record.get('process') or ''}\n{record['solution']}"


def is_well_formed(target) -> bool:
    """Whether a target earns the format reward and its thought is not empty."""
    return format_reward(target) == 1 and target.split("</think>")[0].strip() != "<think>"


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


# ------------------------------------------------------------------ examples and their loss

def sft_example(processor, record, vision, position):
    """What a worker makes of a record: "inputs", those of encode() lengthened by the target, with
    `labels` (1, L)."""
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
    """target_loss of a padded micro-batch: input_ids, labels (B, L) and the rest of the inputs.
    Only the places that predict a target token reach the vocabulary."""
    batch = dict(batch)
    labels = batch.pop("labels")  # (B, L)
    positions, _ = rope_positions(engine, batch)
    target = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # (B, L): what each place predicts
    logits = engine(**batch, position_ids=continue_positions(positions, labels), use_cache=False,
                    logits_to_keep=target != IGNORED).logits  # (N, V)
    return target_loss(logits, target[target != IGNORED])


def train_on(run, step, micro_batches, metrics):
    """One optimizer step on this rank's micro-batches; False when it was not finite."""
    tokens = sum((batch["labels"][:, 1:] != IGNORED).sum().item() for batch in micro_batches)
    total_tokens = sum(gather_objects(tokens))
    if not total_tokens:  # nothing on any rank could be used
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
    """validate's answers, by transformers' generate, which keeps ranks in step where they hold the
    model in parts; for a batch that only other ranks have, a blank question stands in."""
    model, tokenizer = run.engine.module, processor.tokenizer
    # the model's own defaults, in Qwen2.5-VL's release a repetition penalty, are put aside
    own, model.generation_config = model.generation_config, GenerationConfig(
        do_sample=False, max_new_tokens=run.args.val_max_new_tokens,
        eos_token_id=stop_tokens(model, tokenizer), pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=forbidden_tokens(model, tokenizer))
    ids = generate(model, prompts or [image_as_video(processor, encode_blank(processor))])
    model.generation_config = own
    return tokenizer.batch_decode(ids[:len(prompts)], skip_special_tokens=True)  # of (B, L)


# ---------------------------------------------------------------------------------- main

def main(args):
    # ------------------------------------------------------------- records, model, engine
    records = load_records(args.data, args.media_root)
    unusable = [record for record in records if not is_well_formed(target_text(record))]
    if unusable:
        first = unusable[0]
        raise InputError(f"{args.data}: {len(unusable)} of {len(records)} records have a process "
                         "that is not just <think>a thought</think>; the first is problem_id "
                         f"{first['problem_id']}, with the target {target_text(first)[:99]!r}")
    refuse_absent_media(args.data, records)
    processor = load_processor(args)
    per_step = args.per_rank_batch_size * args.gradient_accumulation_steps  # a rank, a step
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
            # a rank whose whole micro-batch is broken still makes the calls of the others
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
# What a training run is. A stage opens a run, starts its engine and goes through its steps; each
# ends in close_step, which writes what the step was and, where one is due, a checkpoint.
# ========================================================================================

ORDER_STREAM = 0  # first key of the data order's generators; a stage's own streams begin at 1
ADAPTER_STREAM = 3  # of the adapters' first weights
VAL_BATCH = 8  # held-out questions that a rank answers together, videos in both orders
# A resumed run may change these: they affect speed or paths only
FREE_ARGUMENTS = {"data", "media_root", "output", "deepspeed_config", "num_workers",
                  "decode_timeout", "save_steps", "keep_checkpoints", "max_skipped", "resume",
                  "timeout_minutes", "local_rank", "rollout_steps", "show_steps", "chunk_size",
                  "gradient_checkpointing", "static_decode", "val_data", "val_steps", "val_limit",
                  "val_max_new_tokens"}
# As well, where the learning rate does not decay towards the end
LENGTH_ARGUMENTS = {"max_steps", "num_train_epochs"}
PRINTED = {"reward/total": "reward", "reward/accuracy": "accuracy", "group/p": "p",
           "group/p_tilde": "p_tilde", "policy/kl": "kl", "optim/loss": "loss",
           "val/accuracy": "held-out accuracy", "val/accuracy_shuffled": "shuffled",
           "val/gap": "gap"}  # of each step
FULL_BELOW = 2**24  # bytes: with less, a failed write is taken for a full disk
LOGS = ("metrics", "rollouts", "skipped", "validation")  # <name>.jsonl in --output


def add_run_flags(add, lr_schedule, save_steps):
    """Data, optimizer, checkpoints and machine; `add` is a parser's add_argument."""
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
    add("--adam_beta2", type=float, default=0.999, help="AdamW's second decay rate")
    add("--weight_decay", type=at_least(0, float), default=0.01, help="AdamW's, decoupled")
    add("--max_grad_norm", type=at_least(0, float), default=5.0,
        help="gradients are clipped to this norm")
    # adapters
    add("--lora_rank", type=at_least(0, int), default=0,
        help="rank of adapters, trained in the place of all weights; they need a learning rate 10 "
             "to 100 times as high; 0: none")
    add("--lora_alpha", type=above(0, float), default=32.0,
        help="an adapter counts alpha / rank times")
    # held-out questions
    add("--val_data", help="records that are not trained on, to answer during the run")
    add("--val_steps", type=at_least(0, int), default=100,
        help="steps between such answers, besides those at the start and the end; 0: none at all")
    add("--val_limit", type=above(0, int), default=128, help="only the first records of --val_data")
    # the run and the machine
    add("--deepspeed_config", default=str(Path(__file__).parent / "ds_zero3.json"),
        help="DeepSpeed's JSON file: ZeRO stage, offload, precision, monitors")
    add("--save_steps", type=at_least(0, int), default=save_steps,
        help="steps between checkpoints; 0: none")
    add("--keep_checkpoints", type=at_least(0, int), default=2,
        help="newest checkpoints that stay; 0: all")
    add("--max_skipped", type=at_least(0, float), default=0.1,
        help="share of questions with unusable media above which the run stops")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --output")
    add_machine_flags(add)


@dataclass
class Run:
    """The state of a training run on one rank."""
    args: argparse.Namespace
    config: dict          # DeepSpeed's
    identity: dict        # first line of metrics.jsonl: what made this run, and what resumes it
    rank: int
    world: int            # number of ranks
    device: torch.device
    signals: list         # SIGTERM or SIGINT, once received: the run ends after its step
    per_step: int         # questions of a step on a rank
    held_out: list        # records that are answered during the run
    first_step: int = 0   # the newest checkpoint's, where one is resumed
    saved: int = 0        # step of the newest checkpoint
    updated: int = -1     # the last step with an optimizer step
    skipped: int = 0      # questions without a usable medium so far, on all ranks
    lapped: float = 0.0   # when the last part of a step ended, by perf_counter
    engine: deepspeed.DeepSpeedEngine | None = None  # the policy in training; start_engine
    infinite: torch.Tensor | None = None  # counts gradients that hold NaN or infinity
    validate: Callable | None = None  # validate, as far as it is the same at every step


# ------------------------------------------------------------------------------ adapters

class AdaptedLinear(torch.nn.Linear):
    """A linear map with an adapter (LoRA, Hu et al. 2021, section 4.1), of which only A
    (rank, in) and B (out, rank) are trained: y = W x + b + alpha / rank * B A x."""
    on = True  # of all maps at once: adapters_off

    def forward(self, x):
        y = super().forward(x)
        if AdaptedLinear.on:
            y = y + self.scale * F.linear(F.linear(x, self.A), self.B)
        return y


def add_adapters(model, args):
    """With --lora_rank: freezes the model and adds an adapter to each torch.nn.Linear of its
    language model. B is 0 at first: the model computes what it did. Experts that share one tensor
    have none."""
    if not args.lora_rank:
        return
    model.requires_grad_(False)
    generator = seeded_generator(ADAPTER_STREAM, args.seed)  # the same draws on all ranks
    for layer in model.model.language_model.modules():
        if type(layer) is torch.nn.Linear:
            layer.__class__, layer.scale = AdaptedLinear, args.lora_alpha / args.lora_rank
            A = torch.empty(args.lora_rank, layer.in_features)
            torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
            layer.A = torch.nn.Parameter(A.to(layer.weight))  # its type and device
            layer.B = torch.nn.Parameter(layer.A.new_zeros(layer.out_features, args.lora_rank))


@contextmanager
def adapters_off():
    """Inside, models compute what they did before they got adapters, bit for bit."""
    AdaptedLinear.on = False
    try:
        yield
    finally:
        AdaptedLinear.on = True


def merge_adapters(model, state):
    """Adds the adapters in a state dict of the model to its weights: W + alpha / rank * B A."""
    for name, layer in model.named_modules():
        if isinstance(layer, AdaptedLinear):
            W, A, B = (state.pop(f"{name}.{part}") for part in ("weight", "A", "B"))
            merged = W.float() + layer.scale * B.float() @ A.float()  # (out, in)
            state[f"{name}.weight"] = merged.to(W.dtype)


# ------------------------------------------------------------------------------- start

def open_run(args, records, parse_args, per_step) -> Run:
    """Everything before a model is loaded: DeepSpeed's file, ranks, --output, what to resume; the
    end of the process where --output is finished. parse_args is the script's own: a flag that an
    older run does not have counts as its default of today."""
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
    if model:
        reached = whole_rows(Path(args.output) / "metrics.jsonl")[-1].get("step", 0)
        if reached >= args.max_steps:
            if rank == 0:
                print(f"{args.output} is finished, at step {reached}: nothing is left to do")
            sys.exit(0)
        if not run.first_step:
            raise InputError(f"--output {args.output} holds a model after {reached} steps and no "
                             "checkpoint to go on from: name another folder")
    return run


def digest_of(records) -> str:
    """Returns a short hash of records as their file has them."""
    text = json.dumps([as_in_file(record) for record in records])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_deepspeed_config(args):
    """Returns the user's DeepSpeed file, completed with what this script's flags decide."""
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
            raise InputError(f"remove {key!r} from {args.deepspeed_config}: "
                             "this script's own flags decide it")
    if config.pop("fp16").get("enabled", False) not in (False, "auto"):
        raise InputError(f"{name} enables fp16: use bf16, or neither for fp32")
    if config["bf16"].get("enabled") == "auto":  # bf16 where there is an accelerator
        config["bf16"]["enabled"] = get_accelerator().device_name() != "cpu"
    config.setdefault("zero_force_ds_cpu_optimizer", False)  # torch's AdamW, also offloaded
    config = {key: value for key, value in config.items() if value != "auto"} | ours
    try:
        deepspeed.DeepSpeedConfig(config)
    except (ValueError, AssertionError, DeepSpeedConfigError) as error:
        reason = re.sub(r"For further information visit \S+", "", str(error))  # pydantic's
        raise InputError(f"{name}: {' '.join(reason.split())}") from None
    return config


def require_equal_ranks(run):
    """Raises InputError that names what differs between two ranks, as it can on two machines:
    files, software, flags. Collective."""
    flags = {f"--{name}": value for name, value in vars(run.args).items() if name != "local_rank"}
    first, *others = gather_objects({
        "records of --data": run.identity["records"], "git commit": run.identity["git_commit"],
        "records of --val_data": digest_of(run.held_out), "DeepSpeed's file": run.config,
        "weights of --model": run.identity["model_sha256"], **run.identity["versions"], **flags})
    for rank, other in enumerate(others, 1):
        differs = [f"{name} {first[name]} and {other[name]}" for name in first
                   if first[name] != other[name]]
        if differs:
            raise InputError(f"ranks 0 and {rank} differ: {'; '.join(differs)}. Every machine "
                             "needs the same files and software")


def open_output(run) -> int:
    """Makes --output. Returns the step to start from: 0, or with --resume that of the newest
    checkpoint up to the one that `latest` names, the last that is known to be whole.

    A folder that holds another's model, or without --resume a run, is refused: nothing is written
    over.
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
    # the ranks agree before any of them writes more; one that sees another disk is found out here
    if reasons := list(filter(None, gather_objects(reason))):
        raise InputError(reasons[0])
    found = gather_objects((probe.exists(), tag))
    if run.rank == 0:
        probe.unlink()
    if len(set(found)) > 1:
        raise InputError(f"ranks see different files in --output {output}: it must be on storage "
                         f"that all nodes share (newest checkpoints: {[tag for _, tag in found]})")
    there = checkpoints(output)
    logged, model = ((output / name).exists() for name in ("metrics.jsonl", "config.json"))
    if (there or logged or model) if not resume else (model and not logged):
        raise InputError(f"--output {output} holds a run or a model: continue a run with --resume, "
                         "or name another folder")
    named = re.fullmatch(r"checkpoint-(\d+)", tag)
    whole = [step for step in there if named and step <= int(named[1])]
    # a kill leaves at most one checkpoint that `latest` does not name
    if not whole and (tag or len(there) > 1):
        raise InputError(f"{latest} must name the checkpoint to go on from, and says {tag!r}: "
                         f"write one of {[folder.name for folder in there.values()]} into it, "
                         "or name another --output")
    return max(whole, default=0)


def check_identity(run, defaults):
    """Raises InputError that names what differs between the run in --output and this one."""
    output = Path(run.args.output)

    def flat(line):
        return {f"--{name}": value for name, value in (defaults | line["arguments"]).items()} | {
            "records of --data": line["records"], "number of processes": line["world_size"],
            "ZeRO stage": line["zero_stage"],  # older runs lack the next one
            "weights of --model": line.get("model_sha256", run.identity["model_sha256"])}
    try:
        was = flat(whole_rows(output / "metrics.jsonl")[0])
    except (InputError, OSError, LookupError, TypeError) as error:
        raise InputError(f"the first line of {output / 'metrics.jsonl'} must say what run this is: "
                         f"{error!r}") from None
    saves_only = run.args.max_steps == run.first_step  # the model, without another step
    constant = run.args.lr_schedule == "constant"
    free = FREE_ARGUMENTS | (LENGTH_ARGUMENTS if constant or saves_only else set())
    require_same(f"--resume: {output}", was, flat(run.identity), "Give what it had, or start "
                 "another --output from its weights (README, 'When something breaks')",
                 {f"--{name}" for name in free})


def start_engine(run, model):
    """DeepSpeed's engine around the model, with torch's AdamW, as the newest checkpoint left it;
    each step sets its learning rate. From here on the run writes into --output."""
    args, output = run.args, Path(run.args.output)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0,
                                  betas=(0.9, args.adam_beta2), weight_decay=args.weight_decay,
                                  fused=run.device.type in ("cpu", "cuda"))
    run.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=run.config)
    if run.engine.zero_optimization_stage() == 0:
        optimizer.state.clear()  # in bf16 DeepSpeed has tried a step, which would count as one
    run.engine.train()
    run.infinite = watch_gradients(run.engine.module, run.device)
    if run.first_step:
        tag = f"checkpoint-{run.first_step}"
        try:
            _, state = run.engine.load_checkpoint(str(output), tag=tag,
                                                  load_module_strict=not args.lora_rank)
            run.skipped = state["skipped"]
        except Exception as error:  # what torch and DeepSpeed raise on a damaged file has no end
            if "DataLoader worker" in str(error):  # torch raises wherever a worker's end is met
                raise
            raise InputError(f"{output / tag} is damaged ({type(error).__name__}: "
                             f"{str(error).splitlines()[:1]}): remove this folder, and --resume "
                             "goes on from the checkpoint before it") from None
    if run.rank == 0:
        for path in (output / f"{name}.jsonl" for name in LOGS):
            if path.exists():
                trim_log(path, run.first_step)
        if not run.first_step:
            write_whole({output / "metrics.jsonl": [json.dumps(run.identity) + "\n"]})


def watch_gradients(model, device):
    """A tensor that counts the gradients, of any parameter in any backward, that hold NaN or
    infinity. Read before an optimizer step, it keeps them from the weights."""
    count = torch.zeros((), device=device)

    def look(gradient):
        count.add_(~gradient.sum().isfinite())  # inf - inf is NaN; of its size nothing is made
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(look)
    return count


def trim_log(path, first_step):
    """Leaves the lines of a log up to first_step: later steps will be done again."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if first_step else ():
        try:
            if json.loads(line).get("step", 0) <= first_step:
                kept.append(line)
        except json.JSONDecodeError:  # cut short when the run was killed
            break
    write_whole({path: (line + "\n" for line in kept)})


def catch_signals(rank) -> list:
    """Lets SIGTERM (pre-emption) and Ctrl-C end the run after its current step: the list that is
    returned is no longer empty then. A second Ctrl-C ends it at once."""
    received = []

    def handle(number, _):
        if number == signal.SIGINT and number in received:
            os._exit(128 + number)  # the shells' convention
        received.append(number)
        if rank == 0:
            with suppress(OSError):  # not by print, which may be in the middle of a line
                os.write(2, b"\nending after this step (a second Ctrl-C: at once)\n")
    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    return received


def leave_signals_to_main(_):
    """For data workers, whom a launcher's SIGTERM or a terminal's Ctrl-C reaches too: the current
    step needs them."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# ---------------------------------------------------------------------------- questions

@lru_cache(maxsize=1)  # of the epoch asked for last
def epoch_order(epoch, count, seed) -> list[int]:
    return torch.randperm(count, generator=seeded_generator(ORDER_STREAM, seed, epoch)).tolist()


def record_index(position, count, seed) -> int:
    """Which record stands at `position` of the endless data order, reshuffled every epoch.

    A pure function, so a resumed run needs no stored state to go on where it stopped.
    """
    epoch, offset = divmod(position, count)
    return epoch_order(epoch, count, seed)[offset]


class Questions(Dataset):
    """position -> what the stage's example(processor, record, vision, position) makes of the
    record there, or the line of skipped.jsonl where its medium cannot be used; runs in worker
    processes."""

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
    """Iterates over Questions at these positions; the next `together` of them, and one more a
    worker, are decoded while the model is at work."""
    args = run.args
    ahead = -(-together // args.num_workers) + 1 if args.num_workers else None
    return iter(DataLoader(
        Questions(processor, records, example, args), sampler=positions, batch_size=None,
        collate_fn=dict, num_workers=args.num_workers, prefetch_factor=ahead,
        pin_memory=run.device.type != "cpu", worker_init_fn=leave_signals_to_main,
        generator=torch.Generator()))  # else it draws from that of the model's dropout


def start_questions(run, processor, records, example):
    """Starts the workers that prepare this rank's questions of all steps, and returns an iterator.
    They are forked before model and optimizer are loaded: a write to shared memory copies it."""
    positions = [(step * run.world + run.rank) * run.per_step + i
                 for step in range(run.first_step, run.args.max_steps) for i in range(run.per_step)]
    return load_questions(run, processor, records, example, positions, run.per_step)


def steps(run, records, questions, work):
    """Yields (step, this rank's per_step samples, an empty dict for the step's metrics).

    An example has the key "record", the line of a skipped question does not. Before the first step
    the run is described; `work` is what a rank does in a step.
    """
    for step in range(run.first_step, run.args.max_steps):
        metrics = {}
        run.lapped = time.perf_counter()
        drawn = [next(questions) for _ in range(run.per_step)]
        lap(run, metrics, "data")
        if step == run.first_step and run.rank == 0:
            print_start(run, records, work, [sample for sample in drawn if "record" in sample][:1])
        if step == 0 and run.held_out:
            write_first(run)
        yield step, drawn, metrics


# -------------------------------------------------------------------- held-out questions

def load_held_out(args) -> list[dict]:
    """The records of --val_data that are asked about; none where nothing is."""
    if not args.val_data or not args.val_steps:
        return []
    records = load_records(args.val_data, args.media_root)[:args.val_limit]
    refuse_absent_media(args.val_data, records)
    return records


def held_out_example(args, processor, record, vision, position):
    """What a worker makes of a held-out record: its prompts, to the ordered frames and, of a
    video, to the shuffled ones, in the order that evaluate.py's --order shuffled gives
    with the same seed."""
    seen = [vision]
    if vision.frames is not None:
        generator = seeded_generator(record_seed(args.seed, record))
        seen.append(vision._replace(frames=shuffle_frames(vision.frames, generator)))
    return {"record": record, "prompts": [image_as_video(processor, encode(processor, record, part))
                                          for part in seen]}


def validate(run, processor, respond, step, metrics):
    """Validates after `step` steps if that is due: adds val/... to the metrics and appends the
    greedy responses to validation.jsonl. Collective.

    respond(prompts), the stage's, returns the greedy responses to a list of encoded prompts. Every
    rank calls it equally often, if need be with an empty list. The run's random numbers, its
    weights and the model's mode and settings stay as they were.
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
            row = None
            if "record" in sample:
                row = held_out_row(sample["record"], [next(texts) for _ in sample["prompts"]])
                note_held_out(metrics, sample["record"]["problem_type"], row)
            rows.append(row)
    run.engine.module.train()
    note(metrics, "val/skipped", [rows.count(None)], count=int(run.rank == 0))  # the sum over ranks
    in_order = chain(*zip_longest(*gather_objects(rows)))  # the same on any number of ranks
    if run.rank == 0:
        write_lines(run, step - 1, "validation", [row for row in in_order if row])
    lap(run, metrics, "validation")


def held_out_row(record, responses):
    """Returns a line of validation.jsonl, from a held-out question's responses to the ordered and,
    for a video, the shuffled frames."""
    row = {key: record[key] for key in ("problem_id", "path", "problem", "solution")}
    if record.get("options"):
        row["options"] = record["options"]
    for suffix, text in zip(("", "_shuffled"), responses):
        row |= {f"response{suffix}": text, f"accuracy{suffix}": accuracy_reward(text, record)}
    return row


def note_held_out(metrics, problem_type, row):
    """Notes a held-out question's grades. An image's one grade counts in both accuracies, as in
    evaluate.py --order shuffled: its gap is 0."""
    accuracy, shuffled = row["accuracy"], row.get("accuracy_shuffled", row["accuracy"])
    note(metrics, "val/accuracy", [accuracy])
    note(metrics, f"val/accuracy/{problem_type}", [accuracy])
    note(metrics, "val/accuracy_shuffled", [shuffled])
    note(metrics, "val/gap", [accuracy - shuffled])


def write_first(run):
    """Step 0 of metrics.jsonl: how the model answers before it is trained. Collective."""
    metrics = {}
    run.validate(0, metrics)
    note(metrics, "time/step", [metrics["time/validation"][0]])
    row = merge(gather_objects(metrics))
    if run.rank == 0:
        write_metrics(run, -1, row)


# ------------------------------------------------------------------------------ metrics

def note(metrics, name, values, count=None):
    """Adds values to a metric: sums and counts, so that means over ranks are exact. Of a metric
    whose name ends in _max the largest value is kept."""
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
    """The value of every rank, on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# ----------------------------------------------------------------------- the end of a step

def learning_rate(step, args):
    """Learning rate of 0-based `step`: linear warm-up, then the schedule over the other steps."""
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / args.warmup_steps
    progress = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    decay = {"constant": 1.0, "linear": 1 - progress,
             "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return args.learning_rate * decay[args.lr_schedule]


def optimizer_step(run, step, loss) -> bool:
    """The engine's step on the gradients that it holds; False, and no step, where the loss or a
    gradient of any rank is not finite. Collective."""
    bad = run.infinite.item() > 0 or not math.isfinite(loss)
    if any(gather_objects(bad)):
        return False
    for group in run.engine.optimizer.param_groups:
        group["lr"] = learning_rate(step, run.args)
    run.engine.step()
    run.updated = step
    return True


def close_step(run, step, drawn, metrics, finite, rollouts=()) -> bool:
    """What every step ends with; collective. Merges the ranks' metrics, writes the step's lines
    and a checkpoint where one is due. True when a signal has asked for the run's end.

    InputError when the step was not finite, or too many questions had to be skipped.
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
        if norm is not None:  # DeepSpeed keeps none at stage 0 in fp32
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
        print(f"stopped by {signal.Signals(signals[0]).name} after step {step + 1}: the same "
              "command with --resume continues")
    return bool(signals)


def write_metrics(run, step, row):
    """Writes a step's row to metrics.jsonl and to DeepSpeed's monitor, and prints a line of it."""
    write_lines(run, step, "metrics", [dict(sorted(row.items()))])
    run.engine.monitor.write_events([(name, value, step + 1) for name, value in row.items()])
    values = ", ".join(f"{PRINTED[name]} {row[name]:.3g}" for name in PRINTED if name in row)
    print(f"step {step + 1} of {run.args.max_steps}: {values}, {row['time/step']:.2g} s")


def merge(ranks) -> dict:
    """{name: mean over all ranks' values} of the dicts that `note` fills."""
    merged = {}
    for metrics in ranks:
        for name, (total, count) in metrics.items():
            note(merged, name, [total], count)
    return {name: total / count for name, (total, count) in merged.items() if count}


def write_lines(run, step, name, rows):
    """Adds a step's rows to <output>/<name>.jsonl."""
    if rows:
        with open(Path(run.args.output) / f"{name}.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step + 1, **row}) + "\n" for row in rows)


def stop_at_infinity(run, step, ids):
    """Saves the weights from before the step, which its gradients never reached, and raises."""
    if step and run.updated < step:
        save_checkpoint(run, step)
    raise InputError(f"step {step + 1}: the loss or a gradient is not finite; problem_ids {ids}, "
                     "see the ends of the logs. --resume would come to this step again: start "
                     "another --output from the last checkpoint's weights (README, 'When something "
                     "breaks')")


def check_skipped(run, drawn, skipped):
    """InputError when more than --max_skipped of the questions drawn so far (of 100 when fewer
    were) had media that cannot be used; `skipped` are the lines of the last ones."""
    if run.skipped > run.args.max_skipped * max(drawn, 100):
        reasons = "".join(f"\n  {line['reason']}" for line in skipped)
        raise InputError(f"{run.skipped} of {drawn} questions had media that cannot be used, above "
                         f"--max_skipped {run.args.max_skipped:g}. All are in {run.args.output}/"
                         f"skipped.jsonl, the last are:{reasons}")


# -------------------------------------------------------------------------- console output

def print_start(run, records, work, first):
    """Prints what the run is. The size of `first`, the first usable example if there is one, shows
    whether flags and limits of frames and pixels act as they were meant."""
    args, kinds = run.args, Counter(record["data_type"] for record in records)
    epochs = args.max_steps * run.per_step * run.world / len(records)
    size = sum(getattr(p, "ds_numel", p.numel()) for p in run.engine.module.parameters())
    precision = "bf16" if run.config["bf16"].get("enabled") else "fp32"
    print(
        f"{args.data}: {len(records):,} records, {kinds['video']:,} videos and {kinds['image']:,} "
        f"images\n{args.model}: {size:,} parameters, {precision}, ZeRO stage "
        f"{run.identity['zero_stage']} on {run.world} x {run.device.type}\n"
        f"a step on each rank: {work}; {args.max_steps:,} steps are {epochs:.3g} epochs")
    for example in first:
        inputs = example.get("inputs", example.get("ordered"))
        grid = inputs.get("video_grid_thw", inputs.get("image_grid_thw"))[0].tolist()
        print(f"first {example['record']['data_type']}: {grid[0]} x {grid[1]} x {grid[2]} patches "
              f"(time x height x width), {int((inputs['mm_token_type_ids'] > 0).sum())} of its "
              f"{inputs['input_ids'].shape[1]} tokens visual")


def print_end(run, following):
    """Prints where the model is, and the command that follows."""
    if run.rank == 0:
        print(f"{run.args.output}: the model after {run.args.max_steps} steps\nnext: {following}")


# ------------------------------------------------------------------ checkpoints, the model

def save_checkpoint(run, step):
    """checkpoint-<step>/, a tag of DeepSpeed's. `latest` names it when every rank has written its
    part; only then those older than the newest --keep_checkpoints are removed. Collective."""
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
    """Removes what a checkpoint or model has become so far. Returns the error to raise, which names
    a full disk in plain words: torch and safetensors have words of their own."""
    free = shutil.disk_usage(folder.parent).free
    full = getattr(error, "errno", None) in FULL_DISK or free < FULL_BELOW
    shutil.rmtree(folder, ignore_errors=True)
    reason = f"{os.strerror(errno.ENOSPC)}: make room" if full else error
    return InputError(f"cannot write {folder}: {reason}. Checkpoints before it are whole: continue "
                      "with --resume")


def checkpoints(output) -> dict[int, Path]:
    """{step: folder} of the checkpoints in a folder, oldest first. One that is later than `latest`
    may be incomplete: the run was killed meanwhile, and will write over it."""
    found = {path.name.removeprefix("checkpoint-"): path for path in output.glob("checkpoint-*")}
    return {int(step): found[step] for step in sorted(filter(str.isdigit, found), key=int)}


def save_model(run, processor):
    """The trained model as a Hugging Face directory: the end of a run. Collective."""
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
            path.chmod((output / "metrics.jsonl").stat().st_mode)  # safetensors': the owner's alone
            path.replace(output / path.name)  # config.json last: it makes it a model
        aside.rmdir()
    dist.barrier()


if __name__ == "__main__":
    run_script(main, parse_args)
