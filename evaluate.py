"""Evaluation: answers to files of Video-R1 records, graded, with an interval on every number.

    python evaluate.py @toy/evaluate.args --model toy/sft --output toy/eval_sft
    deepspeed evaluate.py --model Qwen/Qwen2.5-VL-7B-Instruct --output eval \
        --benchmark mmvu=eval_mmvu.json vsibench=eval_vsibench.json --frames 16 32 64

Scores over all answered records, and over those of each problem type and data source:

    accuracy   mean accuracy reward; regression counts with its graded reward, not with its MRA
    correct    share of accuracy rewards >= --correct_threshold
    mra        mean relative accuracy as VSI-Bench defines it, regression only
    format     share of well-formed responses;  truncated: share cut off at --max_new_tokens
    tokens     mean length of a response, end token included
    drop       accuracy with ordered frames minus this accuracy, over records answered in both

Each has a 95 % interval: bootstrap over media, since questions share videos. A medium that cannot
be read is skipped and named, never replaced; every score stands beside answered/records.

--order tells what a score needs. shuffled, reversed: the order of frames; single_frame (the middle
one, in every place): motion; blind (grey in every place): sight. Each keeps the prompt's text,
length and timing: only pixels differ from `ordered`. Images change in blind alone.

Every rank holds the whole model and answers a share. --output (one folder for all ranks) gets
`<name>_<frames>_<order>.rank<r>.jsonl` with a row for each answer, `<name>_<frames>_<order>.json`
with scores, settings and graded rows, `skipped.jsonl`. The same command, with any number of ranks,
resumes by problem_id; scores are computed from all rows, old and new.

Shapes: B records of a batch, L tokens, T frames, C channels, H x W pixels, n rows, M media,
R resamples.
"""
import argparse
import hashlib
import json
import os
import re
import resource
import socket
import sys
import time
import warnings
import zlib
from collections import Counter, defaultdict
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import deepspeed
import huggingface_hub
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from build_data import (ANSWER_SUFFIX, TEMPLATE, InputError, MediaError, check_limits, encode,
                        load_records, load_vision, pad_batch, provenance, read_args_line,
                        sampling_of, seeded_generator)
from rewards import accuracy_reward, extract_answer, format_reward, parse_number

ORDERS = ("ordered", "shuffled", "reversed", "single_frame", "blind")
GREY = 128  # the middle of 0 to 255
MRA_PERCENT = range(50, 100, 5)  # VSI-Bench's theta, .50, .55, ..., .95, in exact integers
RESAMPLES = 1000  # of the bootstrap
INTERVAL = (2.5, 97.5)  # percentiles that enclose 95 % of the resampled means
METRICS = ("accuracy", "correct", "mra", "format", "truncated", "tokens", "drop")
SOURCES_SHOWN = 20  # more data sources than this are in the result file only
# Tokens that stand for pixels: a policy that emits one would break its own next forward.
FORBIDDEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
                    "<|video_pad|>")
FRAME_STREAM, TOKEN_STREAM = 1, 2  # last key of the generators: no two draws share one
HASHED_BLOCKS, BLOCK_BYTES = 64, 4096  # of each weight file: seconds for any size of model
LONGEST_WAIT = timedelta(days=7)  # of the first rank to finish for the last one


class Task(NamedTuple):
    """One result to make: a benchmark at one number of frames, in one order."""
    stem: str            # <name>_<frames>_<order>, how its files' names begin
    frames: int
    records: list[dict]
    configuration: dict  # what the answers depend on: rows made with another one are refused
    todo: list[dict]     # the records that earlier runs have not answered


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     fromfile_prefix_chars="@")
    parser.convert_arg_line_to_args = read_args_line
    add = parser.add_argument
    # data and model
    add("--model", required=True, help="Hugging Face directory or name of the model to evaluate")
    add("--benchmark", required=True, nargs="+", metavar="NAME=FILE",
        help="records to answer, .json or .jsonl, and the name of their results")
    add("--media_root", help="folder that the records' paths are relative to; default: the data's")
    add("--output", required=True, help="folder for rows and results; completed if it has some")
    # frames and pixels
    add("--frames", type=int, nargs="+", default=[16, 32, 64],
        help="most frames of a video; one result for each number")
    add("--min_frames", type=int, default=4, help="fewest frames of a video")
    add("--fps", type=float, default=2.0, help="frames a second of video, within those bounds")
    add("--min_pixels", type=int, default=4 * 28 * 28, help="fewest pixels of a video frame")
    add("--max_pixels", type=int, default=256 * 28 * 28, help="most pixels of a video frame")
    add("--image_min_pixels", type=int, default=4 * 28 * 28, help="fewest pixels of an image")
    add("--image_max_pixels", type=int, default=512 * 28 * 28, help="most pixels of an image")
    add("--order", choices=ORDERS, default="ordered", help="what is done to the frames")
    # responses
    add("--temperature", type=float, default=0.01, help="sampling temperature; 0: greedy")
    add("--top_p", type=float, default=0.001, help="nucleus sampling; 1: off")
    add("--max_new_tokens", type=int, default=1024, help="most tokens of a response")
    add("--correct_threshold", type=float, default=0.5,
        help="accuracy reward from which a response is correct")
    # the machine
    add("--batch_size", type=int, default=8, help="records answered together on a rank")
    add("--attn_implementation", default="sdpa", help="sdpa, eager or flash_attention_2")
    add("--num_workers", type=int, default=2, help="processes that decode media ahead of need")
    add("--seed", type=int, default=0, help="seed of every random draw")
    add("--local_rank", type=int, default=-1, help="set by the deepspeed launcher; not used")
    return parser.parse_args(argv)


def check_flags(args):
    """Raises InputError for values that no run can work with."""
    check_limits(args)
    for flag in ("max_new_tokens", "batch_size", "min_frames"):
        if getattr(args, flag) < 1:
            raise InputError(f"--{flag} is {getattr(args, flag)}: it must be at least 1")
    if args.temperature < 0 or not 0 < args.top_p <= 1:
        raise InputError(f"--temperature {args.temperature} must not be negative, "
                         f"and --top_p {args.top_p} must be above 0 and at most 1")
    if min(args.frames) < args.min_frames:
        raise InputError(f"--frames {min(args.frames)} is below --min_frames {args.min_frames}")


# -------------------------------------------------------------------------- pure functions

def mean_relative_accuracy(predicted, truth) -> float:
    """MRA: the share of theta in {.50, .55, ..., .95} with |p - g| / |g| <= 1 - theta.

    Takes numbers, or text that holds one; anything else predicted scores 0. g = 0 asks for
    exactly 0. In exact fractions of the written decimals, because the boundaries are met in
    practice: in floats 1 - .9 < .1, and p = 9, g = 10 would lose a threshold.
    Source: VSI-Bench (Yang et al. 2024).

    >>> [mean_relative_accuracy(p, g) for p, g in ((1, 2), ("9 m", "10"), (4, 10), ("many", 3))]
    [0.1, 0.9, 0.0, 0.0]
    """
    p, g = (parse_number(x) if isinstance(x, str) else x for x in (predicted, truth))
    if p is None or g is None:
        return 0.0
    p, g = Fraction(str(p)), Fraction(str(g))
    if g == 0:
        return float(p == 0)
    error = abs(p - g) / abs(g)
    return sum(100 * error <= 100 - theta for theta in MRA_PERCENT) / len(MRA_PERCENT)


def bootstrap_mean(values, media, seed):
    """(mean, low, high): the mean of n values and its 95 % bootstrap interval over media.

    values[i] belongs to the medium named media[i]. A resample draws M media with replacement,
    each with all its values: sum of their sums / sum of their counts. One medium alone says
    nothing about others: its low and high are None. With few media, or equal values, the
    interval is too narrow.

    >>> bootstrap_mean([1.0, 1.0, 1.0], ["a", "a", "b"], seed=0)
    (1.0, 1.0, 1.0)
    """
    _, medium = np.unique(media, return_inverse=True)  # (n,)
    sums, counts = np.bincount(medium, weights=values), np.bincount(medium)  # (M,) each
    mean = float(sums.sum() / counts.sum())
    if len(sums) == 1:
        return mean, None, None
    drawn = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))  # (R, M)
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)  # (R,)
    low, high = np.percentile(means, INTERVAL)
    return mean, float(low), float(high)


def shuffle_frames(frames, generator):
    """The (T, C, H, W) frames in a random order that is never the given one when T > 1."""
    if len(frames) < 2:
        return frames
    order = torch.arange(len(frames))
    while torch.equal(order, torch.arange(len(frames))):
        order = torch.randperm(len(frames), generator=generator)
    return frames[order]  # (T, C, H, W)


def reorder(vision, order, generator):
    """The medium as `order`, one of ORDERS, shows it; sizes, timing and token count are kept."""
    if vision.frames is None:
        if order != "blind":
            return vision
        return vision._replace(image=Image.new("RGB", vision.image.size, (GREY, GREY, GREY)))
    frames = vision.frames  # (T, C, H, W)
    if order == "shuffled":
        frames = shuffle_frames(frames, generator)
    elif order == "reversed":
        frames = frames.flip(0)
    elif order == "single_frame":
        frames = frames[len(frames) // 2].expand_as(frames).clone()
    elif order == "blind":
        frames = torch.full_like(frames, GREY)
    return vision._replace(frames=frames)


def cut_at_end(ids, end_ids):
    """A response up to its first end token, which is kept, and whether it had none.

    >>> cut_at_end([5, 6, 2, 0, 0], {2, 0}), cut_at_end([5, 6], {2, 0})
    (([5, 6, 2], False), ([5, 6], True))
    """
    for i, token in enumerate(ids):
        if token in end_ids:
            return ids[:i + 1], False
    return ids, True


def grade(records, rows, threshold):
    """A graded row for each record that has an output in `rows`, keyed by problem_id as text."""
    graded = []
    for record in records:
        row = rows.get(str(record["problem_id"]), {})
        if "output" not in row:
            continue
        output, accuracy = row["output"], accuracy_reward(row["output"], record)
        keys = ("problem_id", "data_source", "problem_type", "path")
        graded.append({key: record.get(key) for key in keys} | {
            "output": output, "prediction": extract_answer(output), "accuracy": accuracy,
            "correct": accuracy >= threshold, "format": format_reward(output),
            "tokens": row["tokens"], "truncated": row["truncated"]})
        if record["problem_type"] == "regression":
            graded[-1]["mra"] = mean_relative_accuracy(
                extract_answer(output), extract_answer(record["solution"]))
    return graded


def groups_of(record):
    """The groups that a record, or its graded row, is scored in."""
    return ["all", f"problem_type: {record['problem_type']}",
            f"data_source: {record.get('data_source')}"]


def score(records, graded, seed):
    """Group -> {"answered", "records", each metric with rows: {"mean", "low", "high", "n"}}."""
    members, scores = defaultdict(list), {}
    for row in graded:
        for group in groups_of(row):
            members[group].append(row)
    for group, count in Counter(group for record in records for group in groups_of(record)).items():
        rows = members[group]
        scores[group] = {"answered": len(rows), "records": count}
        for metric in METRICS:
            values = [float(row[metric]) for row in rows if metric in row]
            media = [row["path"] for row in rows if metric in row]
            if values:
                interval = zip(("mean", "low", "high"), bootstrap_mean(values, media, seed))
                scores[group][metric] = {**dict(interval), "n": len(values)}
    return scores


def table(stem, scores):
    """The scores of one result as the lines of a Markdown table; all but tokens in percent."""
    def cell(metric, value):
        unit = 1 if metric == "tokens" else 100
        if not value or value["low"] is None:
            return f"{value['mean'] * unit:.1f}" if value else ""
        return "{:.1f} [{:.1f}, {:.1f}]".format(*(value[k] * unit for k in ("mean", "low", "high")))

    shown = [metric for metric in METRICS if metric in scores["all"]]
    sources = [group for group in scores if group.startswith("data_source")]
    hidden = sources if len(sources) > SOURCES_SHOWN else []
    lines = [[stem, "answered", *shown], []]
    for group in sorted(set(scores) - set(hidden), key=lambda group: (group != "all", group)):
        row = scores[group]
        lines.append([group, f"{row['answered']}/{row['records']}",
                      *(cell(metric, row.get(metric)) for metric in shown)])
    widths = [max(map(len, column)) for column in zip(*filter(None, lines))]
    lines[1] = ["-" * width for width in widths]
    return ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
            for line in lines] + [f"({len(hidden)} data sources: in the file)"] * bool(hidden)


# --------------------------------------------------------------------------------- data

def read_benchmarks(args):
    """--benchmark as {name: (records, hash of the file)}; InputError for what cannot be used."""
    benchmarks = {}
    for text in args.benchmark:
        name, _, path = text.partition("=")
        if not re.fullmatch(r"[\w.-]+", name) or not path:
            raise InputError(f"--benchmark {text!r} is not NAME=FILE with a name of letters, "
                             "digits, '_', '.' and '-'")
        if name in benchmarks:
            raise InputError(f"--benchmark has two files named {name}")
        records = load_records(path, args.media_root)
        problem_id, count = Counter(str(r["problem_id"]) for r in records).most_common(1)[0]
        if count > 1:
            raise InputError(f"{path}: {count} records have the problem_id {problem_id}")
        benchmarks[name] = (records, hashlib.sha256(Path(path).read_bytes()).hexdigest())
    return benchmarks


def record_generator(seed, record, stream):
    """A generator of the record's own: its draws depend on no batch, no rank and no restart."""
    return seeded_generator(seed, zlib.crc32(str(record["problem_id"]).encode()), stream)


class Prompts(Dataset):
    """index -> record and encoded inputs, or the MediaError; runs in worker processes."""

    def __init__(self, records, processor, frames, args):
        self.records, self.processor, self.args = records, processor, args
        self.sampling_args = argparse.Namespace(**vars(args), max_frames=frames)

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        record = self.records[index]
        try:
            vision = load_vision(record, **sampling_of(self.sampling_args, record))
        except MediaError as error:
            return {"problem_id": record["problem_id"], "path": record["path"],
                    "reason": str(error)}
        generator = record_generator(self.args.seed, record, FRAME_STREAM)
        vision = reorder(vision, self.args.order, generator)
        return {"record": record, "inputs": encode(self.processor, record, vision)}


# --------------------------------------------------------- start-up, the same in each stage

def setup_distributed():
    """Joins the process group, under the deepspeed launcher or alone. Returns (rank, device)."""
    if "RANK" not in os.environ:  # started as `python evaluate.py`: a group of one
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
    deepspeed.init_distributed(get_accelerator().communication_backend_name(), verbose=False)
    return dist.get_rank(), torch.device(get_accelerator().device_name(local_rank))


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


def precision():
    """bfloat16 where there is an accelerator, else float32."""
    return torch.float32 if get_accelerator().device_name() == "cpu" else torch.bfloat16


def load_model(args, tokenizer, device):
    """The model, set to answer as the flags say: its own sampling defaults (a repetition penalty
    in Qwen2.5-VL's release) are put aside."""
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            args.model, dtype=precision(), attn_implementation=args.attn_implementation,
            use_safetensors=True)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"cannot load --model {args.model}: {error}") from None
    sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    model.generation_config = GenerationConfig(
        max_new_tokens=args.max_new_tokens, **(sampling if args.temperature else {}),
        eos_token_id=stop_tokens(model, tokenizer), pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=forbidden_tokens(model, tokenizer))
    return model.to(device).eval()


def stop_tokens(model, tokenizer):
    """Every end token of the model; the tokenizer's own first."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return list(dict.fromkeys([tokenizer.eos_token_id, *(end for end in ends if end is not None)]))


def forbidden_tokens(model, tokenizer):
    """Ids that must not be sampled: visual placeholders, and ids that no token has."""
    ids = tokenizer.convert_tokens_to_ids(list(FORBIDDEN_TOKENS))
    beyond = range(len(tokenizer), model.config.get_text_config().vocab_size)
    return sorted({i for i in ids if i is not None} | set(beyond))


# ------------------------------------------------------------ what a run leaves in --output

def model_hash(model):
    """A hash of config.json and, of every weight file, its name, size and some blocks spread
    evenly: it tells two checkpoints of a run apart without reading all of either."""
    try:
        folder = model if Path(model).is_dir() else huggingface_hub.snapshot_download(
            model, allow_patterns=["*.json", "*.safetensors"])
        digest = hashlib.sha256((Path(folder) / "config.json").read_bytes())
        for path in sorted(Path(folder).glob("*.safetensors")):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for block in range(HASHED_BLOCKS):
                    file.seek(size * block // HASHED_BLOCKS)
                    digest.update(file.read(BLOCK_BYTES))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read --model {model}: {error}") from None
    return digest.hexdigest()


def plan_tasks(args, benchmarks, processor):
    """The tasks of a run. InputError where --output has rows of another configuration."""
    flags = ("min_frames", "fps", "min_pixels", "max_pixels", "image_min_pixels",
             "image_max_pixels", "temperature", "top_p", "max_new_tokens", "seed",
             "attn_implementation")
    shared = {flag: getattr(args, flag) for flag in flags} | {
        "model_sha256": model_hash(args.model), "dtype": str(precision()), "template": TEMPLATE,
        "answer_suffix": ANSWER_SUFFIX, "chat_template": processor.chat_template}
    tasks = []
    for name, (records, records_hash) in benchmarks.items():
        for frames in dict.fromkeys(args.frames):
            configuration = shared | {"frames": frames, "records_sha256": records_hash}
            rows = {order: read_rows(args.output, f"{name}_{frames}_{order}", configuration)
                    for order in ORDERS}[args.order]  # all orders: they are compared
            todo = [record for record in records
                    if "output" not in rows.get(str(record["problem_id"]), {})]
            stem = f"{name}_{frames}_{args.order}"
            tasks.append(Task(stem, frames, records, configuration, todo))
    return tasks


def whole_lines(path):
    """The file's bytes up to its last line break: a kill may have torn the line after it."""
    data = path.read_bytes() if path.exists() else b""
    return data[:data.rfind(b"\n") + 1]


def read_rows(output, stem, configuration):
    """Rows of all ranks and runs, by problem_id as text; an answer wins over an earlier skip."""
    rows = {}
    for path in sorted(Path(output).glob(f"{stem}.rank*.jsonl")):
        try:
            first, *others = map(json.loads, whole_lines(path).splitlines() or [b"{}"])
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is damaged, remove it: {error}") from None
        for key, value in configuration.items() if first else ():
            if first.get(key) != value:
                raise InputError(f"{path} has rows with another {key}: {str(first.get(key))[:60]}, "
                                 f"not {str(value)[:60]}; name another --output")
        for row in others:
            if "output" not in rows.get(str(row["problem_id"]), {}):
                rows[str(row["problem_id"])] = row
    return rows


def open_rows(path, configuration):
    """The file to append rows to: rid of a torn line, and begun with the configuration."""
    kept = whole_lines(path)
    file = path.open("a", encoding="utf-8")
    file.truncate(len(kept))
    if not kept:
        file.write(json.dumps(configuration) + "\n")
    return file


def write_result(task, args):
    """<stem>.json, complete or absent, from every row that --output has. Returns its content."""
    rows = read_rows(args.output, task.stem, task.configuration)
    graded = grade(task.records, rows, args.correct_threshold)
    if args.order != "ordered":
        stem = task.stem.removesuffix(args.order) + "ordered"
        ordered = grade(task.records, read_rows(args.output, stem, task.configuration),
                        args.correct_threshold)
        accuracy = {str(row["problem_id"]): row["accuracy"] for row in ordered}
        for row in graded:
            if str(row["problem_id"]) in accuracy:
                row["drop"] = accuracy[str(row["problem_id"])] - row["accuracy"]
    answers = [row for row in rows.values() if "output" in row]
    result = {"scores": score(task.records, graded, args.seed),
              "answered": len(graded), "records": len(task.records),
              "tokens": sum(row["tokens"] for row in answers),
              "rank_seconds": sum(row["seconds"] for row in answers),  # of generation
              "skipped": [row for row in rows.values() if "reason" in row],
              "arguments": vars(args), "configuration": task.configuration,
              "world_size": dist.get_world_size(), **provenance(), "rows": graded}
    aside = Path(args.output) / f"{task.stem}.partial"
    aside.write_text(json.dumps(result, indent=1), encoding="utf-8")
    aside.replace(Path(args.output) / f"{task.stem}.json")
    return result


# ------------------------------------------------------------------------------- the model

@torch.inference_mode()
def respond(model, samples, seed):
    """Responses to B samples of Prompts, as ids up to the end token: [(ids, truncated), ...]."""
    config = model.generation_config
    pad_values = {"input_ids": config.pad_token_id, "attention_mask": 0, "mm_token_type_ids": 0}
    batch = pad_batch([sample["inputs"] for sample in samples], pad_values, "left")
    batch = {key: value.to(model.device) for key, value in batch.items()}  # ids (B, L)
    # generate draws from torch's own generator: seeded for each batch, by its first record
    torch.manual_seed(record_generator(seed, samples[0]["record"], TOKEN_STREAM).initial_seed())
    ids = model.generate(**batch)[:, batch["input_ids"].shape[1]:]  # (B, response's L)
    return [cut_at_end(row, config.eos_token_id) for row in ids.tolist()]


def answer(model, processor, share, task, args):
    """Answers a rank's share of the records and writes a row each, a batch at a time."""
    loader = DataLoader(Prompts(share, processor, task.frames, args), batch_size=args.batch_size,
                        collate_fn=list, num_workers=args.num_workers)
    rank, output = dist.get_rank(), Path(args.output)
    with open_rows(output / f"{task.stem}.rank{rank}.jsonl", task.configuration) as file, \
            open(output / "skipped.jsonl", "a", encoding="utf-8") as skipped_file, \
            tqdm(total=len(share), desc=task.stem, disable=rank != 0) as bar:
        for samples in loader:
            started = time.perf_counter()
            good = [sample for sample in samples if "inputs" in sample]
            rows = [sample for sample in samples if "reason" in sample]
            skipped_file.writelines(json.dumps({"result": task.stem, **row}) + "\n" for row in rows)
            responses = respond(model, good, args.seed) if good else []
            seconds = (time.perf_counter() - started) / max(len(good), 1)
            for sample, (ids, truncated) in zip(good, responses):
                text = processor.tokenizer.decode(ids, skip_special_tokens=True)
                rows.append({"problem_id": sample["record"]["problem_id"], "output": text,
                             "tokens": len(ids), "truncated": truncated, "seconds": seconds})
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            bar.update(len(samples))


# ---------------------------------------------------------------------------------- main

def main(args):
    # --------------------------------------------- inputs, checked before a model is loaded
    check_flags(args)
    benchmarks = read_benchmarks(args)
    processor = load_processor(args)
    try:
        Path(args.output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to --output {args.output}: {error}") from None
    tasks = plan_tasks(args, benchmarks, processor)
    rank, device = setup_distributed()
    ranks = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
    dist.barrier(ranks)  # all ranks have read the rows before one adds to them

    # ---------------------------------------------------------------- answers, then scores
    model = None
    for task in tasks:
        share = task.todo[rank::dist.get_world_size()]
        if share:
            model = model or load_model(args, processor.tokenizer, device)
            answer(model, processor, share, task, args)
        dist.barrier(ranks)
        if rank == 0:
            result = write_result(task, args)
            print("\n".join(table(task.stem, result["scores"])))
            if result["skipped"]:
                print(f"skipped {len(result['skipped'])}, named in {args.output}/skipped.jsonl; "
                      f"the first: {result['skipped'][0]['reason']}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except InputError as error:
        sys.exit(f"evaluate.py: {error}")
