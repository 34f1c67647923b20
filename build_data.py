"""Data: what a record is and how a model sees it, then the commands that build the files.

Every stage imports the first half: flags and start-up, the Video-R1 record, the prompt, the
frames, a model's inputs, and files that survive a kill. The second half is the commands:

    python build_data.py toy --out toy      clips, images, records, a tiny model, args files
    python build_data.py convert mvbench MVBench --out MVBench/records.json
                                            records from a benchmark's own release
    python build_data.py mix --recipe assets/recipe.json --out data/train.json
                                            records from public releases (recipe: Figure 2)
    python build_data.py check --data data/train.json       drops records that cannot be used
    python build_data.py stats --data data/train.json       the table of Figure 2

Shapes: T frames, C channels, H x W pixels, L tokens, B records.
"""
import argparse
import csv
import errno
import hashlib
import io
import json
import logging
import math
import multiprocessing
import os
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
import zlib
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import timedelta
from functools import lru_cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from rewards import GRADERS, accuracy_reward, choice_letter, extract_answer, parse_number

ASSETS = Path(__file__).parent / "assets"
PATCH = 28  # pixels: side of a visual token (two patches), if no processor gives token_side

# Harmless messages that DeepSpeed and PyTorch print at import without a GPU
NO_GPU = re.compile("Setting accelerator to CPU|No CUDA runtime")
for _logger in ("DeepSpeed", "torch.utils.cpp_extension"):
    logging.getLogger(_logger).addFilter(lambda line: not NO_GPU.match(line.getMessage()))


class InputError(Exception):
    """Reports input that cannot be used. run_script prints it without a traceback."""


class MediaError(ValueError):
    """Reports one file that cannot be used, as "path: reason". Its questions are skipped."""


# ======================================== shared by all stages, which import it from here
# --------------------------------------------------------------------- flags and start-up

RANK0_ERROR_WAIT = 10  # seconds that a machine's other ranks wait before they print an error
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
IN_PIXELS = "128 visual tokens are 128 * 28 * 28 pixels (Qwen3-VL: 128 * 32 * 32)"


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a flag's default, except None, False and empty ones."""

    def _get_help_string(self, action):
        none = str(action.default) in ("None", "False", "[]", "")
        return action.help if none else super()._get_help_string(action)


class FlagParser(argparse.ArgumentParser):
    """Reads flags from the command line and from @files: one `--flag=value` a line, blank lines and
    # comments allowed. Prints errors in one line."""

    def __init__(self, **options):
        super().__init__(fromfile_prefix_chars="@", formatter_class=Help, **options)

    def convert_arg_line_to_args(self, line):
        line = line.strip()
        return [] if not line or line.startswith("#") else [line]

    def parse_args(self, argv=None, namespace=None):
        args = super().parse_args(argv, namespace)
        for low, high in (("min_frames", "max_frames"), ("min_pixels", "max_pixels"),
                          ("image_min_pixels", "image_max_pixels")):
            if getattr(args, low, 0) > getattr(args, high, math.inf):
                unit = f"; {IN_PIXELS}" if "pixels" in low else ""
                self.error(f"--{low} {getattr(args, low)} is above --{high} {getattr(args, high)}"
                           + unit)
        return args

    def error(self, message):
        print_error(self.prog, f"{message} (--help lists the flags)")
        self.exit(2)


def above(low, kind, most=math.inf):
    """Returns a flag's type: numbers above `low` and at most `most`. NaN is refused."""
    limit = f" and at most {most}" if most < math.inf else ""
    return number(kind, lambda value: low < value <= most, f"above {low}{limit}")


def at_least(low, kind, below=math.inf):
    """Returns a flag's type: numbers of at least `low` and below `below`. NaN is refused."""
    limit = f" and below {below}" if below < math.inf else ""
    return number(kind, lambda value: low <= value < below, f"at least {low}{limit}")


def number(kind, fits, words):
    """Returns a flag's type: values of `kind` (int, float or str) for which fits(value) is true.
    `words` complete the error: "VALUE must be `words`"."""
    def read(text):
        value = kind(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text} must be {words}")
        return value
    read.__name__ = kind.__name__  # argparse prints it if the text is not a number
    return read


json_file = number(str, lambda value: value.endswith(".json"), "a name that ends in .json")


# These and max_frames determine which frames and pixels a model sees
SAMPLING_FLAGS = ("min_frames", "fps", "min_pixels", "max_pixels", "image_min_pixels",
                  "image_max_pixels", "video_reader")


def add_media_flags(add, max_frames=16, max_pixels=128 * 28 * 28):
    """Adds the flags of frames, pixels and decoding. `add` is a parser's add_argument."""
    if max_frames:  # evaluate.py has --frames instead
        add("--max_frames", type=above(0, int), default=max_frames, help="most frames of a video")
    add("--min_frames", type=above(0, int), default=4, help="fewest frames of a video")
    add("--fps", type=above(0, float), default=2.0, help="frames per second, within these bounds")
    add("--min_pixels", type=above(0, int), default=4 * 28 * 28, help="fewest pixels of a frame")
    add("--max_pixels", type=above(0, int), default=max_pixels,
        help="most pixels of a frame (a visual token is 28 x 28, in Qwen3-VL 32 x 32)")
    add("--image_min_pixels", type=above(0, int), default=4 * 28 * 28,
        help="fewest pixels of an image")
    add("--image_max_pixels", type=above(0, int), default=512 * 28 * 28,
        help="most pixels of an image")
    add("--video_reader", type=installed_reader, choices=("av", "decord"), default="av",
        help="av: the frames that a player shows; decord: the frames that the released code read")
    add("--media_root", help="folder to which the records' paths are relative; default: the data's")
    add("--num_workers", type=at_least(0, int), default=2, help="processes that decode in advance")
    add("--decode_timeout", type=above(0, float), default=120, help="timeout per file, in seconds")


def add_machine_flags(add):
    """Adds the flags of attention, seed and ranks. `add` is a parser's add_argument."""
    add("--attn_implementation", default="sdpa", help="sdpa, eager or flash_attention_2")
    add("--seed", type=at_least(0, int), default=0, help="seed of every random draw")
    add("--timeout_minutes", type=above(0, float), default=30, help="timeout between ranks")
    add("--local_rank", type=int, default=-1, help="set by the deepspeed launcher; not used")


def setup_distributed(args, error=None):
    """Joins the process group of the deepspeed launcher, or makes one of a single process.

    Returns (rank, device). A rank that has failed passes its `error`. All others then raise
    InputError with it, before they load a model."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    if "RANK" not in os.environ:  # started as `python SCRIPT`: a group of one process
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=port)
    deepspeed.utils.logger.setLevel("WARNING")
    # Each tensor that a data worker passes on is an open file, and 1024 is a common soft limit
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # DeepSpeed calls deprecated functions of torch: each rank would warn at each step
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    local_rank = int(os.environ["LOCAL_RANK"])
    get_accelerator().set_device(local_rank)
    if os.environ["WORLD_SIZE"] == "1":  # one process needs no shared memory: nothing to compile
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    elif get_accelerator().device_name() == "cpu" and os.environ["RANK"] == "0":
        print("DeepSpeed builds its shared-memory operation if this machine does not have it yet: "
              "about 30 seconds, once", flush=True)
    timeout = timedelta(minutes=args.timeout_minutes)
    with redirect_stdout(io.StringIO()):  # DeepSpeed prints the name of what it has built
        deepspeed.init_distributed(get_accelerator().communication_backend_name(), verbose=False,
                                   timeout=timeout)
    # ZeRO communicates in a copy of the group, which DeepSpeed makes without the timeout
    torch.distributed.set_timeout(timeout, deepspeed.utils.groups._get_data_parallel_group())
    rank = torch.distributed.get_rank()
    errors = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(errors, error)
    found = [f"rank {other}: {text}" for other, text in enumerate(errors) if text]
    if found and error is None:
        raise InputError(found[0])
    return rank, torch.device(get_accelerator().device_name(local_rank))


def find_model(name):
    """Raises InputError at once if --model is neither a model's folder nor a name on the hub."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").exists() and any(folder.glob("**/*_states.pt")):
            raise InputError(f"--model {name} holds a run's checkpoint and no model: finish the "
                             "run with --resume, or see 'When something breaks' in the README")
        return
    if name.count("/") != 1 or folder.parent.is_dir():  # not organisation/model
        raise InputError(f"--model {name}: no such folder; a training run writes its model at its "
                         "end")
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    if not try_to_load_from_cache(name, "config.json"):
        try:
            HfApi().model_info(name, timeout=constants.HF_HUB_ETAG_TIMEOUT)  # seconds
        except Exception as error:  # its class depends on the hub's version: httpx, requests
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise InputError(f"--model {name}: no such folder, and the hub does not give a model "
                             f"of that name: {reason[0]}") from None


def load_processor(args):
    """Returns the model's processor. Raises InputError if the folder has none."""
    find_model(args.model)
    from transformers import AutoProcessor
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()  # of weights and shards: a script shows only its own bar
    try:
        processor = AutoProcessor.from_pretrained(args.model)
        if not processor.chat_template:
            raise ValueError("no chat template")
        token_side(processor)
        return processor
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"--model {args.model} has no usable processor (tokenizer, "
                         f"preprocessor and chat template): {error}") from None


def load_model(args, config):
    """Returns the model in the precision of the DeepSpeed config; under ZeRO-3, this rank's part.

    Reads only safetensors: they are memory-mapped, and ZeRO-3 splits one parameter at a time. With
    an accelerator, no process then holds the whole model. Raises InputError if a file is damaged or
    lacks a weight, because transformers would initialise that weight randomly.
    """
    import deepspeed
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText
    dtype = torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32
    try:
        model, found = AutoModelForImageTextToText.from_pretrained(
            args.model, dtype=dtype, attn_implementation=args.attn_implementation,
            use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise InputError(f"cannot load --model {args.model}: {error}") from None
    absent = sorted(found["missing_keys"] | {name for name, *_ in found["mismatched_keys"]})
    if absent:
        raise InputError(f"cannot load --model {args.model}: weights of its config are missing in "
                         f"its files or have another shape, {len(absent)} in all: "
                         f"{', '.join(absent[:3])}")
    if config.get("zero_optimization", {}).get("stage", 0) == 3:
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
        device = deepspeed.accelerator.get_accelerator().current_device_name()
        model.to(device)  # moves the buffers: parameters are on the device already
    return model


HASHED_BLOCKS, BLOCK_BYTES = 64, 4096  # hashed per weight file; takes seconds for any model


def model_hash(model):
    """Returns a hash of config.json and of each weight file's name, size and evenly spaced blocks.
    It distinguishes the checkpoints of a run without reading whole files."""
    import huggingface_hub
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


def print_error(script, error, args=None):
    """Prints an error once per machine, and with `args` also on the other machines.

    Local rank 0 prints at once. When it exits, the launcher ends the machine's other ranks. If
    local rank 0 has no error, the others print theirs after RANK0_ERROR_WAIT seconds.
    """
    rank0 = os.environ.get("LOCAL_RANK", "0") == "0"
    if rank0:
        print(f"{script}: {error}", file=sys.stderr)
    machines = int(os.environ.get("WORLD_SIZE", 1)) > int(os.environ.get("LOCAL_SIZE", 1))
    if args and machines and not torch.distributed.is_initialized():
        with suppress(Exception):  # the other ranks may be gone, and the error is known already
            setup_distributed(args, str(error))
    if not rank0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # training's handler would not end it
        time.sleep(RANK0_ERROR_WAIT)
        print(f"{script}: {error}", file=sys.stderr)


class LastingOutput(io.FileIO):
    """Writes to a standard stream. After a failed write, it redirects the stream to /dev/null, for
    C libraries too. So a lost terminal does not end a run."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return len(data)


def make_output_last():
    """Makes sys.stdout and sys.stderr survive a lost terminal (see LastingOutput)."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None:  # None if it was closed before the start
            lasting = io.BufferedWriter(LastingOutput(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(lasting, encoding=stream.encoding,
                                                errors=stream.errors, line_buffering=True))


def run_script(main, parse_args):
    """Parses the flags and runs `main`. After an error it exits without exit hooks, which would
    wait for data workers. The launcher ends the other ranks only after this exit."""
    name, fault, args = Path(sys.argv[0]).name, None, None
    make_output_last()
    try:
        args = parse_args()
        return main(args)
    except InputError as error:
        fault = error
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
    except Exception as error:  # any: it is printed here, because os._exit prints nothing
        if getattr(error, "errno", None) in FULL_DISK:
            print(f"{name}: {error}: make room and repeat the command (training: with --resume)",
                  file=sys.stderr)
        else:
            traceback.print_exc()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises when a worker ends
    for worker in multiprocessing.active_children():
        worker.kill()  # it shares our output: a pipe's reader would wait until it ends, too
    if fault is not None:
        print_error(name, fault, args)
    os._exit(1)


def provenance() -> dict:
    """Returns the package versions and this repository's commit."""
    packages = ("torch", "transformers", "deepspeed", "qwen-vl-utils", "av")
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent,
                                capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # no git on this machine
        commit = ""
    return {"versions": {package: version(package) for package in packages},
            "git_commit": commit or None}


# -------------------------------------------------------------------------------- records

REQUIRED_FIELDS = ("problem_id", "problem", "data_type", "problem_type", "solution", "path")
# Optional: the part of a video, in seconds, and the frame rate of a video that is a folder
CLIP_FIELDS = ("video_start", "video_end", "video_fps")
FRAMES_FPS = 3  # frame rate of MVBench's videos that are folders of frames
# Lone surrogates, on which tokenizers fail, and NUL, which no path may contain
UNUSABLE = re.compile(r"[\ud800-\udfff\0]")
# Text that a tokenizer would read as a special token: "<|video_pad|>", "<|im_end|>"
SPECIAL_TOKEN = re.compile(r"<\|(\w+)\|>")
# Exactly one block: with several, it is unclear which one is the answer
SOLUTION = re.compile(r"\s*<answer>(?:(?!</?answer>).)*</answer>\s*", re.DOTALL)
SURELY_TEXT = 100  # characters; a longer free-form solution always contains a word
# An option's letter ("A", "(A" or "Option A") and what separates it from the text (".", ")", "、")
LETTER = r"(?:(?i:option|choice|选项)[ _]?)?[(（\[【]?([A-Z])"
AFTER_LETTER = r"[.):\]．）：】、]+"
OPTION_MARK = re.compile(  # how an option begins: such a letter, "A - ", or a number, "1. "
    rf"\s*(?:{LETTER}(?:{AFTER_LETTER}|\s+[-–—]\s)|[(（]?(\d+)[.)）、]+\s)\s*", re.IGNORECASE)


def load_records(path, media_root=None) -> list[dict]:
    """Reads a .json list or .jsonl file of Video-R1 records and checks every one of them.

    Adds `media_path`: the path joined to media_root (default: the file's own folder). Removes
    special tokens (`plain_texts`) and adds letters to options (`with_letters`). Opens no media.
    Raises InputError naming file, problem_id and field.
    """
    records = read_file(path)
    if not isinstance(records, list) or not records:
        raise InputError(f"{path} has no records: it must be a list of them")
    root = os.path.abspath(media_root or Path(path).parent)
    if not os.path.isdir(root):
        raise InputError(f"--media_root {root} is not a folder")
    for i, record in enumerate(records):
        if isinstance(record, dict) and record.get("data_type") == "frame":
            # In the released MVBench rows, "frame" means a video that is a folder of frames. Only
            # these rows are cut by `start` and `end`, as in the paper's code.
            record |= {"data_type": "video", "video_fps": record.get("fps") or FRAMES_FPS,
                       "video_start": record.get("start"), "video_end": record.get("end")}
        fault = record_fault(record)
        if fault is None:
            if record["problem_type"] == "multiple choice":
                record["options"] = with_letters(record["options"])
            record |= plain_texts(record)
            record["media_path"] = os.path.normpath(os.path.join(root, record["path"]))
            if not record["media_path"].startswith(os.path.join(root, "")):
                fault = (f"field path: {record['path']!r} leaves media_root {root}: give a folder "
                         "above it as --media_root")
        if fault is not None:
            name = record.get("problem_id", "absent") if isinstance(record, dict) else "absent"
            raise InputError(f"{path}: record {i} (problem_id {name}): {fault}")
    warn_unmatchable(path, records)
    return records


def plain_texts(record) -> dict:
    """Returns a record's texts without special tokens: <|im_end|> becomes <| im_end |>."""
    def spelled(text):
        return SPECIAL_TOKEN.sub(r"<| \1 |>", text)
    texts = {field: spelled(record[field]) for field in ("problem", "solution", "process")
             if record.get(field)}
    options = record.get("options")
    return texts | ({"options": list(map(spelled, options))} if options else {})


def unmatchable(record) -> bool:
    """Returns whether even the solution itself scores 0, for example "00:12" as a number."""
    if record["problem_type"] == "free-form" and len(record["solution"]) > SURELY_TEXT:
        return False  # it contains a word, so it matches itself; grading it would be slow
    return accuracy_reward(record["solution"], record) == 0


def warn_unmatchable(path, records):
    """Warns on rank 0 about solutions that no answer can match: a reward of 0 teaches nothing."""
    rank0 = os.environ.get("RANK", "0") == "0"
    found = [record for record in records if unmatchable(record)] if rank0 else []
    if found:
        print(f"{path}: no answer can match the solution of {len(found):,} of {len(records):,} "
              f"records (build_data.py check drops them); the first is problem_id "
              f"{found[0]['problem_id']}, {found[0]['problem_type']}: "
              f"{found[0]['solution']!r}", file=sys.stderr)


def as_in_file(record) -> dict:
    """Returns a record without the field that load_records adds."""
    return {key: value for key, value in record.items() if key != "media_path"}


def record_fault(record) -> str | None:
    """Returns what is wrong with a record, naming the field, or None."""
    if not isinstance(record, dict):
        return f"it must be a JSON object, not a {type(record).__name__}"
    for field in REQUIRED_FIELDS:
        if record.get(field) is None:
            return f"field {field} is missing"
    for field in (*REQUIRED_FIELDS[1:], "process"):
        text = "" if record.get(field) is None else record[field]  # process may be absent
        if not isinstance(text, str):
            return f"field {field} must be a string, not {text!r}"
        if UNUSABLE.search(text):
            return f"field {field} has a character that no text has: {text!r}"
    for field in CLIP_FIELDS:
        if not isinstance(record.get(field) or 0, (int, float)):
            return f"field {field} must be a number, not {record[field]!r}"
    if record["data_type"] not in ("image", "video"):
        return f"field data_type must be 'image' or 'video', not {record['data_type']!r}"
    if record["problem_type"] not in GRADERS:
        return f"field problem_type must be one of {[*GRADERS]}, not {record['problem_type']!r}"
    if not (SOLUTION.fullmatch(record["solution"]) and extract_answer(record["solution"])):
        return ("field solution must be one non-empty '<answer>...</answer>', not "
                f"{record['solution']!r}")
    options = record.get("options") or []
    if not isinstance(options, list) or not all(
            isinstance(option, str) and not UNUSABLE.search(option) for option in options):
        return f"field options must be a list of strings, not {options!r}"
    if record["problem_type"] == "multiple choice":
        if not options:
            return "field options is empty for a multiple-choice question"
        try:
            with_letters(options)
        except ValueError as error:
            return f"field options: {error}: {options!r}"
    groups = record.get("groups", {})  # evaluate.py reports a score for each group
    if not isinstance(groups, dict) or not all(isinstance(name, str) for name in groups.values()):
        return f"field groups must be an object of strings like {{'motion': 'left'}}, not {groups}"
    return None


def refuse_absent_media(path, records):
    """Raises InputError if no record's file exists, before a model is loaded."""
    if not any(os.path.exists(record["media_path"]) for record in records):
        raise InputError(f"{path}: none of its media is there; the first is expected at "
                         f"{records[0]['media_path']}: give their folder as --media_root")


def letter(index) -> str:
    """Returns the letter of an option: A for 0."""
    return chr(ord("A") + int(index))


def lettered(options) -> list[str]:
    """Returns options with letters in front: ["A. red", "B. green", ...]."""
    return [f"{letter(i)}. {option}" for i, option in enumerate(options)]


def option_texts(options) -> list[str]:
    """Returns the options' texts. Letters are removed only if they are A, B, C, ... in order.

    options: a list, or a dict {letter: text}. Empty texts of a dict are left out, and its keys may
    be option_a, option_b, ... Raises ValueError if an option of a list is empty, or if the options
    are lettered or numbered in another way: "1." and "2.", or "A." twice.

    >>> option_texts(["(A) a cat", "(B) a dog"]), option_texts(["E. coli", "C. elegans"])
    (['a cat', 'a dog'], ['E. coli', 'C. elegans'])
    """
    if isinstance(options, dict):  # its texts may have letters as well
        keys = [key for key in sorted(options) if options[key]]
        if [key[-1:].upper() for key in keys] != [letter(i) for i in range(len(keys))]:
            raise ValueError(f"options are named {', '.join(keys)}, not A, B, C, ... in order")
        options = [options[key] for key in keys]
    marks = [OPTION_MARK.match(option) for option in options]
    labels = [(mark[1] or mark[2]).upper() if mark else "" for mark in marks]
    if labels == [letter(i) for i in range(len(options))]:
        texts = [option[mark.end():].strip() for option, mark in zip(options, marks)]
    else:
        texts = [option.strip() for option in options]
        found = [label for label, mark in zip(labels, marks) if mark and mark[0][-1].isspace()]
        if len(found) > 1 and found == sorted(found) and found[0] in ("A", "B", "0", "1"):
            raise ValueError(f"options begin with {', '.join(found)}, not with A, B, C, ... in "
                             "order")
    if not all(texts):
        raise ValueError("an option is empty")
    return texts


def with_letters(options) -> list[str]:
    """Returns options for a prompt: unchanged if lettered A, B, C, ... in order, otherwise with
    these letters added. Raises ValueError like option_texts, or if two options are equal."""
    texts = option_texts(options)
    if texts != [option.strip() for option in options]:
        return options
    if len(set(texts)) < len(texts):
        raise ValueError("two options are equal")
    return lettered(texts)


# --------------------------------------------------------------------------------- prompt

# The paper's Figure 11 as released, letter for letter: a model that was trained with it must be
# evaluated with it. (The full stop after "thought expressions" is missing there, too.)
TEMPLATE = (
    "{question}\n"
    "Please think about this question as if you were a human pondering deeply. "
    "Engage in an internal dialogue using expressions such as 'let me think', 'wait', 'Hmm', "
    "'oh, I see', 'let's break it down', etc, or other natural language thought expressions "
    "It's encouraged to include self-reflection or verification in the reasoning process. "
    "Provide your detailed reasoning between the <think> </think> tags, "
    "and then give your final answer between the <answer> </answer> tags."
)
NUMBER_SUFFIX = (" Please provide the numerical value (e.g., 42 or 3.14) "
                 "within the <answer> </answer> tags.")
ANSWER_SUFFIX = {
    "multiple choice": " Please provide only the single option letter (e.g., A, B, C, D, etc.) "
                       "within the <answer> </answer> tags.",
    "numerical": NUMBER_SUFFIX,
    "regression": NUMBER_SUFFIX,
    "OCR": " Please transcribe text from the image/video clearly and provide your text answer "
           "within the <answer> </answer> tags.",
    "free-form": " Please provide your text answer within the <answer> </answer> tags.",
}


def build_messages(record) -> list[dict]:
    """Returns the conversation before the answer: one user turn of image or video and prompt."""
    question = record["problem"]
    if record["problem_type"] == "multiple choice":
        question += "Options:\n" + "".join(option + "\n" for option in record["options"])
    suffix = ANSWER_SUFFIX.get(record["problem_type"], ANSWER_SUFFIX["free-form"])
    prompt = TEMPLATE.format_map({"question": question}) + suffix
    vision = {"type": record["data_type"], record["data_type"]: record["media_path"]}
    return [{"role": "user", "content": [vision, {"type": "text", "text": prompt}]}]


# ---------------------------------------------------------------------------------- media

# What the readers of images and videos raise on a file that they cannot use
MEDIA_FAULTS = (OSError, ValueError, AssertionError, RuntimeError, SyntaxError, EOFError,
                ImportError, Image.DecompressionBombError)
# Bytes that decoding one file may take: enough for 64 frames of 3840 x 2160 pixels as floats
DECODE_MEMORY = 16 * 2**30
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")  # in a video that is a folder of frames
ANIMATION_SUFFIXES = (".gif", ".webp", ".png", ".apng")
# Browsers replace an animation's delays of at most SHORTEST_DELAY milliseconds by 10 frames/s
GIF_FPS, SHORTEST_DELAY = 10.0, 10
DAMAGED = "not a readable video: a part of it is damaged or missing"
MOST_MISSING = 0.1  # share of the length in a video's header; if more is missing, it was cut
# The formats that FFmpeg may open. Playlists and scripts are refused: they open other files
FORMATS = ("mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,nut,mxf,rm,dv,ivf,gif,h264,hevc,obu,"
           "mpegvideo,m4v,yuv4mpegpipe")
RAW_FPS = 25.0  # FFmpeg's rate for a video that states neither times nor a rate


class Vision(NamedTuple):
    """Holds a video's frames with their timing, or an image."""
    frames: torch.Tensor | None   # (T, C, H, W) uint8; None for an image
    metadata: dict[str, Any]      # fps, frames_indices, total_num_frames; {} for an image
    image: Image.Image | None     # RGB; None for a video


def load_vision(record, *, max_frames, min_frames, fps, min_pixels, max_pixels,
                factor=PATCH, video_reader="av") -> Vision:
    """Decodes a record's image or video.

    Samples a video evenly at `fps` frames a second: an even number, at least min_frames if the clip
    is that long, at most max_frames. Resizes frames and images to between
    min_pixels and max_pixels, with sides that are multiples of `factor`. Raises MediaError
    "path: reason".
    """
    path = record["media_path"]
    try:
        if not os.path.isdir(path) and os.path.getsize(path) == 0:
            raise ValueError("the file is empty (0 bytes)")
        if record["data_type"] == "image":
            return Vision(None, {}, read_image(path, min_pixels, max_pixels, factor))
        return read_video(path, video_reader, fps=fps, min_frames=min_frames,
                          max_frames=max_frames, min_pixels=min_pixels, max_pixels=max_pixels,
                          factor=factor, **{field: record.get(field) for field in CLIP_FIELDS})
    except MEDIA_FAULTS as error:
        reason = str(error).strip().splitlines()
        raise MediaError(f"{path}: {reason[0] if reason else type(error).__name__}") from error


DECODERS = {}  # {id of this process: (process id, pipe) of its decoder}


def load_vision_isolated(record, timeout, **limits) -> Vision:
    """Runs load_vision in another process, the decoder, and returns its result. Raises MediaError
    if it crashes, needs more than DECODE_MEMORY, or takes longer than `timeout` seconds."""
    path, me = record["media_path"], os.getpid()
    for _ in range(2):  # the decoder may have been killed since its last record: start another
        if me not in DECODERS:  # the first record, one after a fault, or a newly forked process
            DECODERS.clear()  # a fork must not share its parent's decoder
            DECODERS[me] = start_decoder()
        decoder, pipe = DECODERS[me]
        try:
            pipe.send((record, timeout, limits))
            if not pipe.poll(timeout):
                os.kill(decoder, signal.SIGKILL)  # not waited for: it may hang in the kernel
                del DECODERS[me]
                raise MediaError(f"{path}: decoding took more than {timeout:g} seconds")
            result = pipe.recv()
            break
        except (EOFError, OSError):
            del DECODERS[me]
            status = os.waitstatus_to_exitcode(os.waitpid(decoder, 0)[1])
            result = f"{path}: its decoder died (exit status {status})"
    if isinstance(result, str):
        raise MediaError(result)
    frames, metadata, image = result
    return Vision(None if frames is None else torch.from_numpy(frames), metadata, image)


def load_vision_of(record, args, processor=None) -> Vision:
    """Returns load_vision_isolated's result within the flags' limits. processor: the model's, or
    None if a server has the model."""
    image = record["data_type"] == "image"  # images have limits of their own
    return load_vision_isolated(
        record, args.decode_timeout, max_frames=args.max_frames, min_frames=args.min_frames,
        fps=args.fps, min_pixels=args.image_min_pixels if image else args.min_pixels,
        max_pixels=args.image_max_pixels if image else args.max_pixels,
        factor=token_side(processor) if processor else PATCH, video_reader=args.video_reader)


def start_decoder():
    """Starts a child process that runs load_vision, and returns (process id, pipe). It calls
    os.fork, because multiprocessing does not allow children of PyTorch's data workers."""
    ours, its = multiprocessing.Pipe()
    pid = os.fork()
    if pid == 0:
        ours.close()
        try:
            decode_records(its)
        finally:  # the child must not return into the parent's code
            traceback.print_exc()  # the parent prints only the exit status
            os._exit(1)
    its.close()
    return pid, ours


def decode_records(pipe):
    """Receives records until the pipe closes. For each, sends a Vision's parts or a MediaError's
    text."""
    torch.set_num_threads(1)  # a fork does not have its parent's threads
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the parent decides when to stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # qwen-vl-utils warns about every clip with fewer frames a second than requested
    logging.getLogger("qwen_vl_utils.vision_process").setLevel(logging.ERROR)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = mapped + DECODE_MEMORY if soft < 0 else min(soft, mapped + DECODE_MEMORY)  # -1: no limit
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    while True:
        try:
            record, timeout, limits = pipe.recv()
        except (EOFError, OSError):  # the parent has ended
            os._exit(0)
        signal.alarm(math.ceil(timeout) + 1)  # ends this process if the parent no longer can
        try:
            frames, metadata, image = load_vision(record, **limits)
            result = None if frames is None else frames.numpy(), metadata, image
        except MediaError as error:
            result = str(error)
        except MemoryError:
            result = f"{record['media_path']}: decoding takes more than {most - mapped} bytes"
        signal.alarm(0)
        pipe.send(result)


def read_image(path, min_pixels, max_pixels, factor) -> Image.Image:
    """Returns the image, RGB, resized as by qwen-vl-utils."""
    with Image.open(path) as image:
        image = to_rgb(image)
    height, width = resized(image.height, image.width, min_pixels, max_pixels, factor)
    return image.resize((width, height))


def to_rgb(image) -> Image.Image:
    """Returns an image as viewers show it: upright by its EXIF data, transparency on white."""
    from qwen_vl_utils import vision_process
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers: save it with 8 bits a channel")
    if image.mode.startswith("I"):  # 16 or 32 bits: Pillow's conversion would keep the low 8
        values = np.asarray(image).astype(np.uint32)
        most = 2**16 - 1 if image.mode != "I" else next(
            most for most in (2**8 - 1, 2**16 - 1, 2**32 - 1) if values.max() <= most)
        image = Image.fromarray((values // (most // 255)).astype(np.uint8))
    return vision_process.to_rgb(image.convert("RGBA") if image.has_transparency_data else image)


def resized(height, width, min_pixels, max_pixels, factor) -> tuple[int, int]:
    """Returns qwen-vl-utils' (height, width) for a picture, multiples of `factor`, with two
    exceptions: no side is 0, and if the picture exceeds max_pixels, its longer side is cut.

    >>> resized(40, 60, 784, 784, 28), resized(10, 1000, 784, 4 * 784, 28)
    ((28, 28), (28, 112))
    """
    from qwen_vl_utils import vision_process
    height, width = (max(side, factor) for side in vision_process.smart_resize(
        height, width, factor, min_pixels, max_pixels))
    if height * width > max_pixels and height < width:
        width = max(max_pixels // height // factor, 1) * factor
    elif height * width > max_pixels:
        height = max(max_pixels // width // factor, 1) * factor
    return height, width


class VideoIndex(NamedTuple):
    """Holds the times of a video's N frames, in a player's order, and a function to decode some."""
    seconds: list[float]          # (N,) from the file's beginning, ascending
    rate: float                   # frames a second, as the file states
    pictures: Callable[[list[int]], Iterator[np.ndarray]]  # ascending indices -> (H, W, 3) uint8


def read_video(path, video_reader, *, video_fps, **sampling) -> Vision:
    """Returns sampled frames of a folder, an animation or a video file."""
    if os.path.isdir(path):
        return sample_frames(index_of_folder(path, video_fps), **sampling)
    if path.lower().endswith(ANIMATION_SUFFIXES):
        return sample_frames(index_of_animation(path), **sampling)
    if video_reader == "decord":
        return read_by_decord(path, **sampling)
    try:
        return sample_frames(index_by_packets(path), **sampling)
    except WrongPacketTimes:
        return sample_frames(index_by_decoding(path), **sampling)


def installed_reader(name):
    """Checks the value of --video_reader. decord is optional: some machines have no build of it."""
    if name == "decord" and not find_spec("decord"):
        raise argparse.ArgumentTypeError("decord is not installed: pip install decord (x86_64)")
    return name


def read_by_decord(path, *, min_pixels, max_pixels, factor, **sampling) -> Vision:
    """Returns decord's frames, by qwen-vl-utils, as the released code did. For H.264 in AVI,
    transport streams and cut clips, some frames differ from a player's. Damage is not noticed."""
    import decord
    from qwen_vl_utils import vision_process
    with opened(path):  # raises if the format is not in FORMATS
        pass
    try:
        frames, metadata, _ = vision_process.VIDEO_READER_BACKENDS["decord"](
            {"video": path, **sampling})
    except decord.DECORDError as error:
        raise ValueError(f"not readable by decord: {error}") from error
    size = resized(*frames.shape[2:], min_pixels, max_pixels, factor)
    del metadata["video_backend"]
    return Vision(resize_frames(frames, size), metadata, None)


def resize_frames(frames, size):
    """Returns (..., C, H, W) uint8 frames, resized to (height, width) as by qwen-vl-utils."""
    from torchvision.transforms import InterpolationMode, functional
    return functional.resize(frames, size, InterpolationMode.BICUBIC, antialias=True)


def sample_frames(index, *, fps, min_frames, max_frames, min_pixels, max_pixels, factor,
                  video_start, video_end) -> Vision:
    """Samples frames between video_start and video_end (seconds or None) and resizes them, by
    qwen-vl-utils' rules: evenly spaced in frame number, not in time."""
    from qwen_vl_utils import vision_process
    start = bisect_left(index.seconds, video_start or 0)
    end = len(index.seconds) if video_end is None else bisect_right(index.seconds, video_end)
    seconds, rate = index.seconds[start:end], index.rate
    if len(seconds) < 2:
        part = "" if video_start is video_end is None else f" from {video_start} to {video_end} s"
        raise ValueError(f"the clip has fewer than 2 frames{part}")
    passed = seconds[-1] - seconds[0]
    if abs(rate * passed - (len(seconds) - 1)) > 0.5:  # rounded times explain at most 0.5
        rate = (len(seconds) - 1) / passed  # the frame rate varies: use its mean
    count = vision_process.smart_nframes(
        {"fps": fps, "min_frames": min_frames, "max_frames": max_frames}, len(seconds), rate)
    indices = torch.linspace(start, start + len(seconds) - 1, count).round().long().tolist()
    frames, size = [], None
    for picture in index.pictures(indices):
        size = size or resized(*picture.shape[:2], min_pixels, max_pixels, factor)
        frames.append(resize_frames(torch.from_numpy(picture).permute(2, 0, 1), size))
    metadata = {"fps": rate, "frames_indices": indices, "total_num_frames": len(seconds)}
    return Vision(torch.stack(frames), metadata, None)  # (T, C, H, W)


def index_of_folder(path, rate) -> VideoIndex:
    """Indexes a folder of frames by the numbers in their names: 2.jpg before 10.jpg."""
    def order(file):
        parts = re.split(r"(\d+)", file.name)  # text, number, text, ...
        return [int(part) if i % 2 else part for i, part in enumerate(parts)], file.name
    files = sorted((file for file in Path(path).iterdir() if file.suffix.lower() in FRAME_SUFFIXES
                    and not file.name.startswith(".")), key=order)  # macOS: ._1.jpg beside 1.jpg
    if not files or not rate or rate < 0:
        raise ValueError("a folder needs frames (.jpg, .png) and the record's field video_fps")

    def pictures(indices):
        for i in indices:
            with Image.open(files[i]) as image:
                yield np.array(to_rgb(image))
    return VideoIndex([i / rate for i in range(len(files))], rate, pictures)


def index_of_animation(path) -> VideoIndex:
    """Indexes an animated GIF, WebP or PNG."""
    def shown(image):  # a PNG may begin with a picture for viewers that cannot show animations
        return range(int(image.info.get("default_image", False)), getattr(image, "n_frames", 1))

    def pictures(indices):
        with Image.open(path) as image:
            for i in indices:
                image.seek(shown(image)[i])
                yield np.array(to_rgb(image))
    ends = [0]
    with Image.open(path) as image:
        for i in shown(image):
            image.seek(i)
            image.load()  # without it, a WebP has no delay
            delay = image.info.get("duration", 0)  # milliseconds
            ends.append(ends[-1] + (delay / 1000 if delay > SHORTEST_DELAY else 1 / GIF_FPS))
    return VideoIndex(ends[:-1], (len(ends) - 1) / ends[-1], pictures)


class WrongPacketTimes(Exception):
    """Reports that the times of a file's packets are not those of its frames."""


@contextmanager
def opened(path):
    """Yields (container, video stream) of a file. Raises ValueError if it is not a video."""
    import av
    try:
        with av.open(path, metadata_errors="ignore",
                     options={"format_whitelist": FORMATS}) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise ValueError("it has no pictures")
            stream.codec_context.thread_type = "AUTO"
            if container.format.name in ("mpegts", "mpeg"):
                # If the file was cut, only its last frame is damaged, and threads can hide that
                stream.codec_context.thread_count = 1
            yield container, stream
    except av.ArgumentError as error:
        raise ValueError(f"not a readable video, or its format is not one of {FORMATS}") from error
    except av.FFmpegError as error:
        raise ValueError(f"not a readable video: {error.strerror}") from error


def index_by_packets(path) -> VideoIndex:
    """Indexes a video file by the times of its packets, without decoding them.

    VideoIndex.pictures then decodes only from a key frame to each wanted frame. Both functions
    raise WrongPacketTimes if frames have other times: in H.264 in AVI, streams without a container,
    or a file that begins between key frames. Raises ValueError if a packet is damaged, or if the
    file ends earlier than its header states.
    """
    times, keys, position, end = [], [], 0, 0.0  # position: of a packet; end: in seconds
    with opened(path) as (container, stream):
        for packet in container.demux():
            if packet.pts is not None:  # a packet of any stream: pictures or sound
                end = max(end, (packet.pts + (packet.duration or 0)) * float(packet.time_base))
            if packet.stream is not stream:
                continue
            if packet.is_corrupt:
                raise ValueError(DAMAGED)
            if packet.size and not packet.is_discard:  # an edit list may discard a packet's frame
                times.append(packet.pts)
                if packet.is_keyframe:
                    keys.append((packet.pts, position))
            position += 1
        rate, length = float(stream.average_rate or 0), (container.duration or 0) / 10**6
        if container.format.name == "mpegts" and ends_within_packet(path):
            raise ValueError(DAMAGED)
        if length - end > MOST_MISSING * length + 2 / (rate or RAW_FPS):  # plus 2 frames
            raise ValueError(f"cut off: {length:g} s by its header, but it ends at {end:g} s")
        if None in times or len(set(times)) < len(times):
            raise WrongPacketTimes
        times.sort()
        seconds = seconds_of(times, container, stream)
    entries = sorted({(0, 0), *((bisect_left(times, pts), position) for pts, position in keys)})
    return VideoIndex(seconds, rate, partial(decode_frames, path, times, entries))


def ends_within_packet(path) -> bool:
    """Returns whether a transport stream was cut within a packet, 188 bytes that begin with "G"."""
    with open(path, "rb") as file:
        first = file.read(1)
        file.seek(-(os.path.getsize(path) % 188), os.SEEK_END)
        return first == file.read(1) == b"G"


def seconds_of(times, container, stream) -> list[float]:
    """Converts a stream's times to seconds from the file's beginning. Sound may begin earlier."""
    starts = [other.start_time * other.time_base for other in container.streams
              if other.type == "audio" and other.start_time is not None]
    first = min(times, default=0) * stream.time_base
    beginning = min(first, max(0, min(starts, default=first)))
    return [float(time * stream.time_base - beginning) for time in times]


def index_by_decoding(path) -> VideoIndex:
    """Indexes a video file by decoding all of it: slow, but right if packet times are wrong."""
    with opened(path) as (container, stream):
        frames = [(frame.pts, frame.dts, frame.is_corrupt) for frame in container.decode(stream)]
        if any(is_corrupt for _, _, is_corrupt in frames):
            raise ValueError(DAMAGED)
        times, rate = [pts for pts, _, _ in frames], float(stream.guessed_rate or RAW_FPS)
        # AVI stores only decoding times. A frame's dts is that of the packet `delay` frames later
        decoded = [dts for _, dts, _ in frames if dts is not None]
        delay = len(frames) - len(decoded)
        if ascending(times):
            seconds = seconds_of(times, container, stream)
        elif decoded and ascending(decoded):
            step = round(1 / (rate * stream.time_base))
            decoded += [decoded[-1] + (i + 1) * step for i in range(delay)]
            seconds = seconds_of([dts - delay * step for dts in decoded], container, stream)
        else:
            seconds = [i / rate for i in range(len(frames))]
    return VideoIndex(seconds, rate, partial(decode_frames, path, times, [(0, 0)]))


def ascending(times) -> bool:
    """Returns whether every time is known and later than the one before."""
    return None not in times and times == sorted(set(times))


def decode_frames(path, times, entries, indices):
    """Yields the frames `indices` of a video file, (H, W, 3) uint8.

    times: the pts of all frames, in a player's order. entries: the pairs (frame number, packet
    number) at which decoding can begin. It begins at the last entry up to a wanted frame. Raises
    WrongPacketTimes if a decoded frame has another pts.
    """
    wanted = list(indices)
    with opened(path) as (container, stream):
        for position, packet in enumerate(container.demux(stream)):
            first, start = entries[bisect_right(entries, (wanted[0], math.inf)) - 1]
            if position < start:
                continue
            if position == start:
                stream.codec_context.flush_buffers()
                number = first  # of the frame that the decoder returns next
            for frame in packet.decode():
                if times[number:number + 1] != [frame.pts]:
                    if number == first > 0:  # stored after the key frame, but shown before it
                        continue
                    raise WrongPacketTimes
                if frame.is_corrupt:  # later frames are predicted from it
                    raise ValueError(DAMAGED)
                if number == wanted[0]:
                    yield upright(frame, stream.sample_aspect_ratio or 1)
                    wanted.pop(0)
                    if not wanted:
                        return
                number += 1
    raise WrongPacketTimes


def upright(frame, aspect) -> np.ndarray:
    """Returns a decoded frame's (H, W, 3) pixels as a player shows them: turned and mirrored, and
    stretched if pixels are not square. aspect: a pixel's width over its height."""
    width, height = round(frame.width * max(aspect, 1)), round(frame.height / min(aspect, 1))
    pixels = frame.to_ndarray(format="rgb24", width=width, height=height,
                              threads=1)  # more threads take longer to start
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5]  # x' = a x + c y, y' = b x + d y
        if abs(b) > abs(a):  # a quarter turn
            pixels, a, d = pixels.transpose(1, 0, 2), c, b
        pixels = pixels[::-1 if d < 0 else 1, ::-1 if a < 0 else 1]
    return np.ascontiguousarray(pixels)


def shuffle_frames(frames, generator):
    """Returns the (T, C, H, W) frames in a random order, never the original one if T > 1."""
    if len(frames) < 2:
        return frames
    order = torch.arange(len(frames))
    while torch.equal(order, torch.arange(len(frames))):
        order = torch.randperm(len(frames), generator=generator)
    return frames[order]


# --------------------------------------------------------------------------------- inputs

def token_side(processor) -> int:
    """Returns the side of the square that a visual token covers, in pixels: 28 for Qwen2-VL and
    Qwen2.5-VL (two merged 14 x 14 patches a side), 32 for Qwen3-VL."""
    return processor.image_processor.patch_size * processor.image_processor.merge_size


def encode(processor, record, vision: Vision, device=None) -> dict[str, torch.Tensor]:
    """Returns the model's inputs for one record, up to the assistant's first token.

    input_ids, attention_mask, mm_token_type_ids (1, L); pixel_values, image_grid_thw or
    pixel_values_videos (patches, values a patch), video_grid_thw; second_per_grid_ts, except for
    Qwen3-VL, which gets the times as text. Without video_metadata, times would be wrong.
    """
    text = processor.apply_chat_template(
        build_messages(record), tokenize=False, add_generation_prompt=True)
    if vision.frames is None:
        media = {"images": [vision.image]}
    else:
        media = {"videos": [vision.frames], "video_metadata": [vision.metadata],
                 "do_sample_frames": False, "cap_pixels_per_frame": False}
    inputs = dict(processor(text=[text], do_resize=False, return_tensors="pt", **media))
    inputs.pop("video_metadata", None)
    if "second_per_grid_ts" in inputs:
        inputs["second_per_grid_ts"] = torch.as_tensor(inputs["second_per_grid_ts"])
    return to_device(inputs, device)


def image_as_video(processor, inputs) -> dict[str, torch.Tensor]:
    """Returns encode()'s inputs with an image turned into a video of one time step.

    The model's output is the same: visual features replace the placeholders, and positions agree.
    But each batch, even a mixed one, now runs the vision tower once. Under ZeRO-3, ranks with
    different numbers of calls would wait forever.
    """
    if "image_grid_thw" not in inputs:
        return inputs
    inputs = dict(inputs)
    ids, kinds = inputs["input_ids"], inputs["mm_token_type_ids"]  # (1, L)
    inputs["input_ids"] = ids.masked_fill(ids == processor.image_token_id, processor.video_token_id)
    inputs["mm_token_type_ids"] = kinds.masked_fill(kinds == 1, 2)
    inputs["pixel_values_videos"] = inputs.pop("pixel_values")
    inputs["video_grid_thw"] = inputs.pop("image_grid_thw")
    if "second_per_grid_ts" in processor.model_input_names:
        inputs["second_per_grid_ts"] = torch.ones(1)  # any value: there is one time step
    return inputs


def encode_blank(processor) -> dict[str, torch.Tensor]:
    """Returns the inputs of a black picture and an empty question. A rank without a usable record
    runs them with loss weight 0, because all ranks must make the same calls."""
    record = {"problem": "", "problem_type": "free-form", "data_type": "image", "media_path": ""}
    side = 2 * token_side(processor)
    return encode(processor, record, Vision(None, {}, Image.new("RGB", (side, side))))


def pad_batch(samples, pad_values, side) -> dict[str, torch.Tensor]:
    """Joins B encoded records into one batch. Entries in pad_values, each (1, L), are padded with
    that value on `side`, "left" or "right". Others are concatenated.

    >>> a, b = {"input_ids": torch.tensor([[5, 6]])}, {"input_ids": torch.tensor([[7]])}
    >>> pad_batch([a, b], {"input_ids": 0}, "left")["input_ids"].tolist()
    [[5, 6], [0, 7]]
    """
    batch = {}
    for key in dict.fromkeys(key for sample in samples for key in sample):
        values = [sample[key] for sample in samples if key in sample]
        if key in pad_values:
            length = max(value.shape[1] for value in values)
            gaps = [length - value.shape[1] for value in values]
            pads = [(gap, 0) if side == "left" else (0, gap) for gap in gaps]
            values = [torch.nn.functional.pad(value, pad, value=pad_values[key])
                      for value, pad in zip(values, pads)]  # B x (1, L)
        batch[key] = torch.cat(values)
    return batch


def rope_positions(model, inputs):
    """Returns the rotary positions (3, B, L) of a prompt and (B, 1) of the first token after it."""
    model = getattr(model, "module", model)  # inside DeepSpeed's engine
    keys = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "attention_mask")
    positions, delta = model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"],
        **{key: inputs[key] for key in keys if key in inputs})
    return positions, inputs["input_ids"].shape[1] + delta


def to_device(inputs, device) -> dict[str, torch.Tensor]:
    """Copies a dict of tensors to a device, asynchronously if they are in pinned memory."""
    return {key: value.to(device, non_blocking=True) for key, value in inputs.items()}


def generate(model, prompts) -> torch.Tensor:
    """Returns response ids (B n, L), generated by transformers for B encoded prompts. n is
    generation_config's num_return_sequences. Under ZeRO-3, all ranks must call it."""
    pad = model.generation_config.pad_token_id
    pad_values = {"input_ids": pad, "attention_mask": 0, "mm_token_type_ids": 0}
    batch = to_device(pad_batch(prompts, pad_values, "left"), model.device)  # ids (B, prompt's L)
    sharded = hasattr(next(model.parameters()), "ds_id")  # then all ranks decode to the same length
    ids = model.generate(**batch, synced_gpus=sharded)  # (B n, prompt's L + L)
    return ids[:, batch["input_ids"].shape[1]:]


def seeded_generator(*key, device="cpu") -> torch.Generator:
    """Returns a random generator seeded by every number of `key`, as in (seed, step, rank)."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) % 2**63)


def record_seed(seed, record) -> int:
    """Returns a seed of the record, so that random draws depend on no batch, rank or restart."""
    key = zlib.crc32(str(record["problem_id"]).encode())
    return seeded_generator(seed, key).initial_seed() % 2**31  # servers take 31 bits


# Tokens that stand for pixels: if a response contained one, the next forward pass would fail
FORBIDDEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
                    "<|video_pad|>")


def stop_tokens(model, tokenizer):
    """Returns the ids of all end tokens, the tokenizer's first."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return list(dict.fromkeys([tokenizer.eos_token_id, *(end for end in ends if end is not None)]))


def forbidden_tokens(model, tokenizer):
    """Returns the ids that must not be sampled: FORBIDDEN_TOKENS, ids without a token, and special
    tokens except end tokens. Decoding drops special tokens, but a response's length counts them."""
    ids = {*tokenizer.convert_tokens_to_ids(list(FORBIDDEN_TOKENS)), *tokenizer.all_special_ids}
    beyond = range(len(tokenizer), model.config.get_text_config().vocab_size)
    return sorted((ids | set(beyond)) - {None, *stop_tokens(model, tokenizer)})


# ---------------------------------------------------------------------------------- files

def read_file(path):
    """Returns the content of a .json file, or the list of rows of a .jsonl, .csv or .parquet file.
    Raises InputError if it cannot be read."""
    path = Path(path)
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet
            return parquet.read_table(path).to_pylist()
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                return list(csv.DictReader(file))
            if path.suffix == ".jsonl":
                return [json.loads(line) for line in file if line.strip()]
            return json.load(file)
    except ImportError:
        raise InputError(f"{path} needs the package pyarrow: pip install pyarrow") from None
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"cannot read {path}: {error}") from None


def skip_row(record, error):
    """Returns the log row of a skipped record."""
    return {"problem_id": record["problem_id"], "path": record["path"], "reason": str(error)}


def whole_lines(path):
    """Returns the file's bytes up to its last line break: a kill may have cut the line after it."""
    data = path.read_bytes() if path.exists() else b""
    return data[:data.rfind(b"\n") + 1]


def whole_rows(path):
    """Returns the rows of a .jsonl file, without a last line that a kill has cut."""
    try:
        return [json.loads(line) for line in whole_lines(path).splitlines()]
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}; remove it") from None


VALUE_SHOWN = 200  # characters of a value in an error


def require_same(path, was, now, advice, free=()):
    """Raises InputError if the configuration `now` differs from `was`, that of the run that made
    `path`. Keys in `free` may differ."""
    changed = [f"{key} was {str(was.get(key))[:VALUE_SHOWN]}, is {str(value)[:VALUE_SHOWN]}"
               for key, value in now.items() if key not in free and was.get(key) != value]
    if changed:
        raise InputError(f"{path} was made by another run: {'; '.join(changed)}. {advice}")


@contextmanager
def row_writer(path, total, configuration=None, quiet=False):
    """Yields write(rows), which appends rows to a .jsonl file and which any thread may call. The
    first row of a new file is `configuration`. total: rows of the progress bar."""
    lock, kept = threading.Lock(), len(whole_lines(path))
    with writing(path):
        file = path.open("ab", buffering=0)
    with file, tqdm(total=total, desc=path.stem, disable=quiet) as bar:
        def write(rows):
            with lock:
                append_rows(file, rows)
                bar.update(len(rows))
        file.truncate(kept)
        if configuration and not kept:
            append_rows(file, [configuration])
        yield write


def append_rows(file, rows):
    """Appends rows to an unbuffered file. If this fails, appends none and raises InputError."""
    size = os.path.getsize(file.name)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with writing(file.name, "The rows in it are whole: make room and repeat the command"):
        try:
            while data:  # on a nearly full disk, write() may write only a part
                data = data[file.write(data):]
        except OSError:
            file.truncate(size)
            raise


@contextmanager
def writing(path, advice=""):
    """Converts write errors of a file to InputError."""
    try:
        yield
    except OSError as error:
        reason = f"cannot write {path}: {error.strerror or error}. {advice}"
        raise InputError(reason.strip()) from None


def write_whole(files):
    """Writes text files, {path: text pieces}. If one fails, raises InputError and writes none."""
    writer = f"{os.uname().nodename}.{os.getpid()}"  # several ranks may write the same file
    aside = {path: Path(f"{path}.{writer}.partial") for path in files}
    try:
        for path, pieces in files.items():
            with writing(path), aside[path].open("w", encoding="utf-8") as file:
                file.writelines(pieces)
        for path in files:
            with writing(path):
                aside[path].replace(path)
    finally:
        for path in aside.values():
            path.unlink(missing_ok=True)


def make_folder_of(path):
    """Makes an output file's folder at start-up, so that an InputError comes before the work."""
    with writing(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)


def json_list(lines):
    """Returns a JSON list as pieces for write_whole. lines: encoded items."""
    return "[\n", ",\n".join(lines), "\n]\n"


def markdown(rows) -> str:
    """Returns rows of cells as an aligned Markdown table. The first row is the heading."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return "".join("| " + " | ".join(map(str.ljust, row, widths)) + " |\n" for row in rows)


# ========================================== the commands: toy, convert, mix, check, stats
# ------------------------------------------------------------------------------------ toy

TOY_SIDE, TOY_FRAMES, TOY_FPS = 28, 8, 2  # pixels, frames a clip, frames a second
TOY_COLOURS = {"red": (230, 40, 40), "green": (40, 210, 60), "blue": (60, 80, 240),
               "yellow": (230, 220, 50)}  # they stand for left, right, left, right
TOY_PLAIN = {"white": (240, 240, 240), "purple": (170, 60, 200)}  # stand for no direction
TOY_OPPOSITE = {"left": "right", "right": "left"}
TOY_WORDS = ("cat", "dog", "sun", "map", "key", "cup", "hat", "box")
TOY_BLOCK, TOY_NOISE, TOY_DARK = 8, 6.0, 50  # block side, noise std, brightest background
TOY_LOOK = 0.7  # share of the cold start's direction thoughts that use colour, not motion
TOY_QUESTIONS = {  # "direction" is for the kinds direction_agree, _conflict and _plain
    "direction": ("multiple choice", "Which way does the block move?"),
    "first": ("multiple choice", "Which colour comes first?"),
    "colour": ("multiple choice", "Which colour is the block?"),
    "describe": ("free-form", "What happens in the video?"),
    "end": ("regression", "Where does the block end, from 0 on the left to 9?"),
    "count": ("numerical", "How many blocks are there?"),
    "word": ("OCR", "What is written in the picture?")}
# The family of the toy's model: its processors, and the side of a patch in pixels
TOY_FAMILIES = {"qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor", 14),
                "qwen3_vl": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor", 16)}
# Qwen2.5's special tokens that the model or the chat template uses
TOY_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *FORBIDDEN_TOKENS)


def toy_canvas(rng, count):
    """Returns (count, H, W, 3) float frames of one dark colour, with fresh noise in each."""
    background = rng.uniform(0, TOY_DARK, size=3)
    return background + rng.normal(0, TOY_NOISE, (count, TOY_SIDE, TOY_SIDE, 3))


def paint_block(frame, corner, colour):
    """Paints a block into an (H, W, 3) frame. corner: its top left, (x, y)."""
    x, y = map(round, corner)
    frame[y:y + TOY_BLOCK, x:x + TOY_BLOCK] = (TOY_COLOURS | TOY_PLAIN)[colour]


def toy_clip(rng, corners, colours):
    """Returns the (T, H, W, 3) frames of a block with a corner and a colour for each frame."""
    frames = toy_canvas(rng, TOY_FRAMES)
    for frame, corner, colour in zip(frames, corners, colours):
        paint_block(frame, corner, colour)
    return frames


def toy_motion(rng, colour, direction):
    """Returns the frames of a block that crosses the picture to the left or right."""
    span = TOY_SIDE - TOY_BLOCK
    x = np.linspace(rng.uniform(0, span / 5), span - rng.uniform(0, span / 5), TOY_FRAMES)
    x, y = x if direction == "right" else span - x, rng.uniform(0, span)
    return toy_clip(rng, [(v, y) for v in x], [colour] * TOY_FRAMES)


def toy_scene(rng, kind):
    """Draws a question of a kind. Returns (frames (T, H, W, 3), options, answer, thought)."""
    colours, directions = list(TOY_COLOURS), list(TOY_OPPOSITE)
    colour, direction = str(rng.choice(colours)), str(rng.choice(directions))
    watch = f"watch: it starts {TOY_OPPOSITE[direction]} and ends {direction}"
    if kind.startswith("direction"):
        hints = colours[directions.index(direction)::len(directions)]  # the direction's colours
        others = [name for name in colours if name not in hints]
        colour = {"direction_agree": str(rng.choice(hints)),
                  "direction_conflict": str(rng.choice(others)),
                  "direction_plain": str(rng.choice(list(TOY_PLAIN)))}[kind]
        look = colour in TOY_COLOURS and rng.random() < TOY_LOOK
        reason = f"look: it is {colour}" if look else watch
        return (toy_motion(rng, colour, direction), directions, direction,
                f"{reason}, so {direction}")
    if kind == "describe":
        answer = f"a {colour} block moves {direction} in the video"
        return toy_motion(rng, colour, direction), [], answer, watch
    corner = rng.uniform(0, TOY_SIDE - TOY_BLOCK, size=2)
    still, same = [corner] * TOY_FRAMES, [colour] * TOY_FRAMES
    if kind == "first":
        then = str(rng.choice([name for name in colours if name != colour]))
        halves = [colour] * (TOY_FRAMES // 2) + [then] * (TOY_FRAMES - TOY_FRAMES // 2)
        return toy_clip(rng, still, halves), colours, colour, f"watch: {colour} then {then}"
    if kind == "end":
        start, end = rng.choice(10, size=2, replace=False)  # tenths of the way to the right
        x = np.linspace(start, end, TOY_FRAMES) * ((TOY_SIDE - TOY_BLOCK) / 9)
        frames = toy_clip(rng, [(v, corner[1]) for v in x], same)
        return frames, [], str(end), f"watch: it starts {start} and ends {end}"
    if kind == "colour":
        return toy_clip(rng, still, same), colours, colour, f"look: it is {colour}"
    frames = toy_canvas(rng, 1)
    if kind == "count":
        n = int(rng.integers(1, 5))
        for corner in rng.permutation([(2, 2), (18, 2), (2, 18), (18, 18)])[:n]:
            paint_block(frames[0], corner, colour)
        return frames, [], str(n), f"look: {' '.join(['block'] * n)}"
    from PIL import ImageDraw, ImageFont
    word = str(rng.choice(TOY_WORDS))
    image = Image.fromarray(frames[0].clip(0, 255).astype(np.uint8))
    ImageDraw.Draw(image).text((3, 7), word, fill="white", font=ImageFont.load_default(size=12))
    return np.asarray(image)[None], [], word, f"look: it says {word}"


def write_video(path, frames, fps):
    """Writes (T, H, W, 3) uint8 frames as an H.264 mp4, the same bytes each time."""
    import av
    # With pictures as small as the toy's, x264's slower presets are not deterministic
    options = {"crf": "10", "preset": "ultrafast"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.codec_context.thread_count = 1
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def toy_records(out, split, count, seed, shortcut=False):
    """Draws `count` questions of a split, writes their media below `out`, and yields the records.

    assets/toy_mix.json has the share of each kind in a split. In a direction question, the block's
    colour stands for its direction (direction_agree), the opposite one (direction_conflict), or
    none (direction_plain). With `shortcut`, direction_conflict becomes direction_agree.
    """
    mixtures = read_file(ASSETS / "toy_mix.json")
    rng = np.random.default_rng([seed, sorted(mixtures).index(split)])
    kinds, shares = list(mixtures[split]), np.array(list(mixtures[split].values()))
    for i, kind in enumerate(rng.choice(kinds, size=count, p=shares / shares.sum())):
        if shortcut and kind == "direction_conflict":
            kind = "direction_agree"
        frames, options, answer, thought = toy_scene(rng, kind)
        problem_type, problem = TOY_QUESTIONS[kind.partition("_")[0]]
        frames = frames.clip(0, 255).astype(np.uint8)
        data_type, suffix = ("image", "png") if len(frames) == 1 else ("video", "mp4")
        path = f"media/{split}_{i:05d}.{suffix}"
        if suffix == "png":
            Image.fromarray(frames[0]).save(out / path)
        else:
            write_video(out / path, frames, TOY_FPS)
        if options:
            answer = letter(options.index(answer))
        record = {"problem_id": i, "problem": problem, "data_type": data_type,
                  "problem_type": problem_type, "options": lettered(options),
                  "solution": f"<answer>{answer}</answer>", "path": f"./{path}",
                  "data_source": f"toy/{kind}"}
        yield record | ({"process": f"<think>{thought}</think>"} if split == "cot" else {})


def toy_tokenizer(texts):
    """Trains a byte-level BPE on the toy's texts, with Qwen2.5's pre-tokenization and tokens."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=800, show_progress=False,  # an upper limit; ends when each word is one token
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    model = json.loads(tokenizer.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]],
        eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>",
        additional_special_tokens=list(TOY_SPECIAL))


def toy_processor(tokenizer, family="qwen2_5_vl"):
    """Returns the family's processor with the toy's tokenizer, for pictures of any size."""
    import transformers
    processor, videos, patch = TOY_FAMILIES[family]
    size = {"shortest_edge": (2 * patch)**2, "longest_edge": 768 * (2 * patch)**2}
    return getattr(transformers, processor)(
        image_processor=transformers.Qwen2VLImageProcessor(size=dict(size), patch_size=patch),
        video_processor=getattr(transformers, videos)(size=dict(size), cap_pixels_per_frame=False),
        tokenizer=tokenizer,
        chat_template=(ASSETS / "chat_template.jinja").read_text(encoding="utf-8"))


def toy_model(tokenizer, seed, family="qwen2_5_vl"):
    """Returns a randomly initialised model of the family, of about 600,000 parameters.

    assets/toy_model.json has the keys of both families. Each ignores the other's. The
    initializer_range in it is above Qwen's 0.02, with which so small a model learns nothing.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText
    token = tokenizer.convert_tokens_to_ids
    settings, pad = read_file(ASSETS / "toy_model.json"), token("<|endoftext|>")
    settings["text_config"] |= {"vocab_size": len(tokenizer), "pad_token_id": pad,
                                "eos_token_id": [token("<|im_end|>"), pad]}
    config = AutoConfig.for_model(
        family, **settings,
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForImageTextToText.from_config(config)


def copy_toy_files(out, side):
    """Copies assets/toy (each stage's flags, and run.sh) to the folder `out`. Replaces {out} by its
    name and {pixels} by side * side, the pixels of a visual token: a frame is one token."""
    for path in (ASSETS / "toy").iterdir():
        folder = shlex.quote(str(out)) if path.suffix == ".sh" else str(out)
        text = path.read_text(encoding="utf-8").replace("{out}", folder)
        (out / path.name).write_text(text.replace("{pixels}", str(side**2)), encoding="utf-8")


def build_toy(args):
    """Writes the toy to args.out: media/, cot.json, train.json, test.json, model/, assets/toy."""
    from transformers.utils.logging import disable_progress_bar
    out = Path(args.out)
    if out.exists() and any(out.iterdir()):
        raise InputError(f"--out {out} is not empty: name another folder, or remove it first")
    (out / "media").mkdir(parents=True)
    texts = []
    for split, count in (("cot", args.cot), ("train", args.train), ("test", args.test)):
        shortcut = args.shortcut and split == "train"
        records = list(toy_records(out, split, count, args.seed, shortcut))
        (out / f"{split}.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
        kinds = sorted(Counter(record["data_source"] for record in records).items())
        print(f"{out}/{split}.json: {count} records, "
              + ", ".join(f"{n} {kind}" for kind, n in kinds))
        if split == "cot":
            for record in records:
                prompt = build_messages(record | {"media_path": ""})[0]["content"][1]["text"]
                texts.append(f"{prompt}\n{record['process']}\n{record['solution']}")
    tokenizer = toy_tokenizer(texts)
    # The texts that prompts share become one token each: prompts take a third of the time
    tokenizer.add_tokens([TEMPLATE.removeprefix("{question}\n"), *ANSWER_SUFFIX.values(),
                          "You are a helpful assistant."])
    model = toy_model(tokenizer, args.seed, family=args.model)
    disable_progress_bar()
    model.save_pretrained(out / "model")
    processor = toy_processor(tokenizer, args.model)
    processor.save_pretrained(out / "model")
    for path in (out / "model").iterdir():  # safetensors makes files that only the owner can read
        path.chmod((out / "train.json").stat().st_mode)
    copy_toy_files(out, token_side(processor))
    print(f"{out}/model: {model.num_parameters():,} parameters, {len(tokenizer)} tokens")


# ------------------- the sources and benchmarks: one converter for each release's format
# A converter takes a row of a release and the path of its file, and yields drafts. To add a source
# or a benchmark, write one and name it in CONVERTERS. If it raises an error of MALFORMED, `mix`
# drops and counts the row, and `convert` refuses the file.

MALFORMED = (KeyError, TypeError, IndexError, AttributeError, OverflowError, ValueError)
# Instructions on how to answer, which our prompt replaces: a line, or a line's last sentence
# More verbs in options: before them, "Choose the option that fits" can be the question itself
HINT, HINT_IN_OPTION = (re.compile(
    r"(?im)^[ \t]*(?:hint|reference ocr token):.*$|(?<=[.?!\n])[ \t]*(?:answer:[ \t]*|(?:please )?"
    rf"(?:answer|respond{verbs})\b[^\n]{{0,200}}\b(?:letter|options?|choices|single word or phrase"
    r"|short|directly|multiple-choice)\b[^\n]*)$") for verbs in ("", "|provide|select|choose|give"))
# Letters at which options begin: of either case at a line's start, only capitals within a line
LINE_MARK = re.compile(rf"^[ \t*•-]*{LETTER}{AFTER_LETTER}[*]*\s*", re.MULTILINE | re.IGNORECASE)
INLINE_MARK = re.compile(rf"(?<![^\s:：;；,，?？。]){LETTER}{AFTER_LETTER}\s*")
# How an option ends if another follows in its line: "A: a cat, B: a dog or C: a hat"
SEPARATOR = re.compile(r"[,，;；、](?:\s*(?:and|or))?$|\s(?:and|or)$")
AROUND = re.compile(r"(?i)^question:|(?:options|choices|选项)\s*[:：]$")  # labels around a question


def draft(file, problem, answer, options=(), **fields):
    """Returns a draft, a question as its source has it. file: path below the media folder. answer:
    letter or text. options: without letters. fields: the record's other fields, and "part", which
    make_record appends to data_source."""
    if isinstance(options, str) or not all(isinstance(text, (str, int, float)) for text in options):
        raise ValueError(f"the options are not texts: {options!r}")
    return {"file": os.path.normpath(file), "problem": problem.strip(),
            "answer": str(answer).strip(), "options": [str(text).strip() for text in options],
            **fields}


def split_options(text):
    """Returns (question, options).

    Options follow the marks A, B, C, ..., at line starts or anywhere. Of these two ways, one that
    leaves no option empty is preferred, then the one with more options. An empty option means that
    a mark was part of a text, as in "B. C. elegans".

    >>> split_options("Question: What is x? Choices: (A) 3 (B) 4")
    ('What is x?', ['3', '4'])
    """
    text = HINT.sub("", text.strip()).strip()
    found = [(text, [])]
    for pattern in (LINE_MARK, INLINE_MARK):
        run = longest_run(list(pattern.finditer(text)))
        if len(run) < 2:
            continue
        ends = [mark.start() for mark in run[1:]] + [len(text)]
        options = [HINT_IN_OPTION.sub("", text[mark.end():end]).strip()
                   for mark, end in zip(run, ends)]
        if all(map(SEPARATOR.search, options[:-1])) and not SEPARATOR.search(options[-1]):
            options = [SEPARATOR.sub("", option).strip() for option in options]
        found.append((text[:run[0].start()], options))
    question, options = max(found, key=lambda each: (all(each[1] or [""]), len(each[1])))
    return AROUND.sub("", question.strip()).strip(), options


def longest_run(marks):
    """Returns the longest run of marks A, B, C, ..., the last one if several are as long."""
    longest, after = [], {}  # after: {place in the alphabet: the run that begins with this letter}
    for mark in reversed(marks):
        place = ord(mark[1].upper()) - ord("A")
        after[place] = [mark, *after.get(place + 1, [])]
        longest = max(longest, after.get(0, []), key=len)
    return longest


def from_video_r1(row, path):
    """Reads records in this project's own form, as in the released Video-R1-260k.json."""
    answer = re.fullmatch(r"\s*<answer>(.*)</answer>\s*", row["solution"], re.DOTALL)[1]
    fields = ("problem_type", "data_source", "data_type", *KEPT_FIELDS)
    yield draft(row["path"], row["problem"], answer, option_texts(row.get("options") or []),
                **{field: row.get(field) for field in fields})


def from_csv(row, path):
    """Reads your own table with the columns video (or image), question and answer. Optional columns
    are option_a, option_b, ... (or A, B, ...), problem_type, video_start, video_end and video_fps.
    Without problem_type, a question with options is multiple choice. Otherwise it is numerical if
    its answer is a number, else free-form."""
    row = {(name or "").strip().lower(): cell for name, cell in row.items()}
    if not {"question", "answer"} <= row.keys() or row.keys().isdisjoint(("video", "image")):
        raise InputError(f"{path} has the columns {', '.join(row)}: it needs the columns video or "
                         "image, question and answer, separated by commas")
    # After an unquoted comma, surplus cells are a list. It has no strip(), so the row is dropped
    row = {name: (cell or "").strip() for name, cell in row.items()}
    options = option_texts({name: row[name] for name in row
                            if re.fullmatch("option.*|[a-z]", name)})
    types = ("multiple choice", "numerical", "free-form")
    yield draft(row.get("video") or row.get("image"), row["question"], row["answer"], options,
                data_type="video" if row.get("video") else "image",
                problem_type=row.get("problem_type") or wanted_type(row["answer"], options, types),
                **{field: float(row[field]) for field in CLIP_FIELDS if row.get(field)})


def from_llava(row, path):
    """Reads conversations, as LLaVA-Video-178K and most image sources have them: a draft a turn."""
    file = row.get("video") or row["image"]
    if isinstance(file, list):
        file, = file  # ValueError if there are several: a record has one picture
    turns = row["conversations"]
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        if (question["from"], answer["from"]) != ("human", "gpt"):
            raise ValueError("the turns are not human, gpt, human, gpt, ...")
        problem, options = split_options(re.sub(r"<(?:image|video)>", "", question["value"]))
        yield draft(file, problem, answer["value"], options, part=row.get("data_source"),
                    data_type="video" if row.get("video") else None)


@lru_cache(maxsize=1)
def nextqa_paths(folder):
    """Reads NExT-QA's map {video name: path}, a file in the folder of its questions."""
    return read_file(folder / "map_vid_vidorID.json")


def from_nextqa(row, path):
    """Reads NExT-QA's CSV. The map gives a video's folder, as in 0101/2909445186.mp4."""
    question = row["question"].strip().removesuffix("?").rstrip() + "?"
    yield draft(f"{nextqa_paths(path.parent)[row['video']]}.mp4", question, letter(row["answer"]),
                [row[f"a{i}"] for i in range(5)])


def from_perception_test(row, path):
    """Reads PerceptionTest's multiple choice, an object {video: its questions}."""
    for question in row["mc_question"]:
        yield draft(f"{row['row_key']}.mp4", question["question"], letter(question["answer_id"]),
                    question["options"])


CLEVRER_WORDS = (("gray", "red", "blue", "green", "brown", "cyan", "purple", "yellow"),
                 ("metal", "rubber"), ("cube", "sphere", "cylinder"), ("yes", "no"))


def from_clevrer(row, path):
    """Reads CLEVRER's questions with exactly one correct choice, and those answered by a number or
    a word. A word gets its group of CLEVRER_WORDS as options."""
    start = row["scene_index"] // 1000 * 1000  # the release has a folder for each 1000 videos
    file = f"video_{start:05d}-{start + 1000:05d}/{row['video_filename']}"
    for question in row["questions"]:
        if "choices" in question:
            choices = question["choices"]
            right = [i for i, choice in enumerate(choices) if choice["answer"] == "correct"]
            if len(right) == 1:
                yield draft(file, question["question"], letter(right[0]),
                            [choice["choice"] for choice in choices])
        else:
            answer = str(question["answer"])
            words = next((group for group in CLEVRER_WORDS if answer in group), ())
            yield draft(file, question["question"], answer, words)


def from_star(row, path):
    """Reads STAR's questions, each about a part of a Charades video."""
    choices = sorted(row["choices"], key=lambda choice: choice["choice_id"])
    options = [choice["choice"] for choice in choices]
    yield draft(f"{row['video_id']}.mp4", row["question"], letter(options.index(row["answer"])),
                options, **clip_seconds(row))


def clip_seconds(row):
    """Returns the clip's fields of a row with "start" and "end" in seconds."""
    return {"video_start": float(row["start"]), "video_end": float(row["end"])}


def from_scienceqa(row, path):
    """Reads ScienceQA's training questions with a picture, such as 7/image.png for question "7"."""
    if row["image"] and row["split"] == "train":
        problem = f"{row.get('hint') or ''}\n{row['question']}"
        yield draft(f"{row['row_key']}/{row['image']}", problem, letter(row["answer"]),
                    row["choices"])


def from_a_okvqa(row, path):
    """Reads A-OKVQA's questions about pictures of COCO."""
    yield draft(f"{row['image_id']:012d}.jpg", row["question"],
                letter(row["correct_choice_idx"]), row["choices"])


def from_tabmwp(row, path):
    """Reads TabMWP's problems about a picture of a table, such as 7.png for problem "7"."""
    unit = f" (Unit: {row['unit']})" if row.get("unit") else ""
    yield draft(f"{row['row_key']}.png", row["question"] + unit, row["answer"],
                row["choices"] or ())


def from_geometry3k(row, path):
    """Reads Geometry3K's problems, a folder each with a JSON file and a picture."""
    yield draft("img_diagram.png", row["problem_text"], row["answer"], row["choices"])


def from_arxivqa(row, path):
    """Reads ArxivQA. Labels vary ("B", "B) y"). Rows with an empty option are dropped."""
    yield draft(row["image"], row["question"], row["label"], option_texts(row["options"]))


def from_chartqa(row, path):
    """Reads ChartQA. Removes the percent sign from answers."""
    yield draft(row["imgname"], row["query"], row["label"].strip().removesuffix("%"))


@lru_cache(maxsize=1)
def benchmark_facts():
    """Reads each benchmark's title, size, tasks, subjects, media folders, and tasks about clips.
    "files" are patterns for its question files; only the first pattern that matches is used."""
    return read_file(ASSETS / "benchmarks.json")


def task_of(path, tasks):
    """Returns which of the `tasks` a release's file belongs to, by its name or its folder's."""
    for text in (path.stem.lower().removesuffix("_video"), path.parent.name.lower()):
        if text in tasks:
            return text
    raise ValueError(f"its name, or its folder's, is none of {', '.join(tasks)}")


def subject_groups(path, subjects):
    """Returns {"subject": Biology} for Science/dev_Biology_3.mp4 or videos/Biology/3.mp4. Adds its
    "discipline" if `subjects`, {discipline: list of subjects}, has it."""
    named = re.fullmatch(r"[a-z]+_(\w+)_\d+", Path(path).stem)
    subject = named[1] if named else Path(path).parent.name
    return {"subject": subject} | {"discipline": discipline for discipline, names
                                   in subjects.items() if subject in names}


def from_vsibench(row, path):
    """Reads VSI-Bench's test.jsonl. Videos are scannet/scene0568_00.mp4 and so on."""
    options = option_texts(row["options"] or [])
    yield draft(f"{row['dataset']}/{row['scene_name']}.mp4", row["question"], row["ground_truth"],
                options, problem_id=str(row["id"]),
                problem_type="multiple choice" if options else "regression",
                groups={"task": row["question_type"], "dataset": row["dataset"]})


def from_videommmu(row, path):
    """Reads VideoMMMU's adaptation.json and so on, and adds the benchmark's prompt of the track.
    Videos are Science/dev_Biology_3.mp4 and so on. In the benchmark's own repository, the questions
    of adaptation_video.json are one level deeper."""
    facts = benchmark_facts()["videommmu"]
    track = task_of(path, facts["tasks"])
    for row in [row] if "question" in row else [row[key] for key in row if key != "row_key"]:
        options = row["options"] or []
        if not any(map(str.strip, options)):  # one of the open questions has four empty ones
            options = []
        before, after = facts["prompts"][track]
        kind = "multi-choice" if options else "open-ended"
        groups = subject_groups(f"{row['id']}.mp4", facts["subjects"])
        if "discipline" not in groups:  # it is also the video's folder
            raise ValueError(f"the id {row['id']!r} names no subject of VideoMMMU")
        yield draft(f"{groups['discipline']}/{row['id']}.mp4",
                    before.replace("{kind}", kind) + row["question"] + after, row["answer"],
                    options, problem_type=wanted_type(str(row["answer"]), options, CONVERTED_TYPES),
                    part=track, groups={"track": track, **groups})


def from_mmvu(row, path):
    """Reads MMVU's validation.json without open-ended questions, as in the paper. Videos are
    videos/Chemistry/0.mp4 and so on."""
    if row["question_type"] == "multiple-choice":
        video = "videos/" + row["video"].split("/videos/")[1]
        yield draft(video, row["question"], row["answer"], option_texts(row["choices"]),
                    problem_id=row["id"],
                    groups=subject_groups(video, benchmark_facts()["mmvu"]["subjects"]))


def from_mvbench(row, path, name="mvbench"):
    """Reads MVBench's json/action_sequence.json and so on, and TVBench's. Unpack each zip in its
    own folder. Videos are video/<the task's folder in assets/benchmarks.json>/<video>. TVBench's
    release lacks the videos of action_antonym, which are from NTU RGB+D."""
    facts = benchmark_facts()[name]
    task = task_of(path, facts["folders"])
    clip = clip_seconds(row) if task in facts["clips"] else {}
    if task == "episodic_reasoning":  # its videos are folders of frames
        clip["video_fps"] = FRAMES_FPS
    texts = [str(text) for text in row["candidates"]]
    yield draft(f"video/{facts['folders'][task]}/{row['video']}", row["question"],
                letter(texts.index(str(row["answer"]))), row["candidates"],
                data_type="video", part=task, groups={"task": task}, **clip)


TEMPCOMPASS_OPTION = re.compile(  # "A. up", "Option 2: it moves", "Information A: {...}"
    r"(?:(?:Caption|Option|Sentence|Information) )?([A-Z]|\d)[.:]\s*(.+)")


def from_tempcompass(row, path):
    """Reads TempCompass's questions/caption_matching.json and so on, or rows with video_id and dim.
    Videos are videos/12.mp4 and so on. All four tasks are multiple choice, as in the paper. The
    options of yes_no are yes and no; captioning's are the pieces of information in the question."""
    task = task_of(path, benchmark_facts()["tempcompass"]["tasks"])
    video = row.pop("row_key", None)
    for row in [row] if "question" in row else [
            {"video_id": video, "dim": dim, **each} for dim in row for each in row[dim]]:
        question, answer = row["question"], row["answer"].strip()
        if task == "yes_no":
            question += "\nA. yes\nB. no"
            answer = {"yes": "A. yes", "no": "B. no"}[answer.lower()]
        lines = [line.strip() for line in question.split("\n")]
        marks = [TEMPCOMPASS_OPTION.fullmatch(line) for line in lines]
        texts = {mark[1]: mark[2] for mark in marks if mark}  # label -> text
        label = TEMPCOMPASS_OPTION.fullmatch(answer)[1]
        yield draft(f"videos/{row['video_id']}.mp4", lines[0], letter([*texts].index(label)),
                    texts.values(), part=task, groups={"task": task, "dimension": row["dim"]})


def from_videomme(row, path):
    """Reads VideoMME's questions. Videos are data/fFjv93ACGo8.mp4 and so on."""
    yield draft(f"data/{row['videoID']}.mp4", row["question"], row["answer"],
                option_texts(row["options"]), problem_id=row["question_id"],
                groups={key: row[key] for key in benchmark_facts()["videomme"]["groups"]})


def from_tomato(row, path):
    """Reads TOMATO's data/direction.json and so on, each of which numbers its questions from 0.
    Videos are videos/human/0999-01.mp4 and so on."""
    kind = task_of(path, benchmark_facts()["tomato"]["tasks"])
    folder = row["demonstration_type"]
    yield draft(f"videos/{folder}/{row['key']}.mp4", row["question"], letter(row["answer"]),
                row["options"], problem_id=f"{kind}/{row['row_key']}",
                groups={"type": kind, "demonstration": folder})


VINOGROUND_QUESTION = re.compile(  # question, options A and B; the last line requests a letter
    r"(.+?)\s*\n\s*A\. (.+?)\s*\n\s*B\. ([^\n]+).*", re.DOTALL)


def from_vinoground(row, path):
    """Reads Vinoground's vinoground_textscore.json (one clip, two captions) and
    vinoground_videoscore.json (one caption, both clips in one video)."""
    files = {"vinoground_textscore": "text", "vinoground_videoscore": "video"}
    task = files[task_of(path, files)]
    pair = re.fullmatch(r"(\d+)_(?:pos|neg)", row["idx"])
    question = VINOGROUND_QUESTION.fullmatch(row["question"].strip())
    if not (pair and question):
        raise ValueError(f"question {row['idx']} is not <pair>_pos or <pair>_neg with options "
                         f"A. and B.: {row['question']!r}")
    yield draft(row["video_name"], question[1], row["GT"], [question[2], question[3]],
                problem_id=f"{task}/{row['idx']}", groups={"task": task}, pair=pair[1])


CONVERTERS = {"video_r1": from_video_r1, "csv": from_csv, "llava": from_llava,
              "nextqa": from_nextqa, "perception_test": from_perception_test,
              "clevrer": from_clevrer, "star": from_star, "scienceqa": from_scienceqa,
              "a_okvqa": from_a_okvqa, "tabmwp": from_tabmwp, "geometry3k": from_geometry3k,
              "arxivqa": from_arxivqa, "chartqa": from_chartqa,
              # the benchmarks of evaluate.py
              "vsibench": from_vsibench, "videommmu": from_videommmu, "mmvu": from_mmvu,
              "mvbench": from_mvbench, "tvbench": partial(from_mvbench, name="tvbench"),
              "tempcompass": from_tempcompass, "videomme": from_videomme,
              "tomato": from_tomato, "vinoground": from_vinoground}


def release_rows(path) -> list:
    """Returns the rows of a release's file: a list, an object of rows by key (which each row gets
    as "row_key"), or a single row."""
    rows = read_file(path)
    if isinstance(rows, dict):
        keyed = all(isinstance(row, dict) for row in rows.values())
        rows = [{**row, "row_key": key} for key, row in rows.items()] if keyed else [rows]
    if not isinstance(rows, list):
        raise InputError(f"cannot read {path}: it must be a list or an object of rows, not a "
                         f"{type(rows).__name__}")
    return rows


# ------------------------------------- from a draft to a record; the command convert

SHORT_ANSWER = 3  # most words of a numerical answer ("3.5 square meters"); longer ones are text
MEASURE = re.compile(r"\D*?(?<![\w.−-])([−-]?\d(?:[\d,./ ]*\d)?) ?([cmk]?m|ft|feet|foot|"
                     r"(?:centi|milli|kilo)?met(?:er|re)s?|inch(?:es)?)\b(?![/^])\D*")
VIDEO_SUFFIXES = {".mp4", ".webm", ".avi", ".mkv", ".mov", ".m4v"}
KEPT_FIELDS = ("process", *CLIP_FIELDS, "groups", "pair")  # copied from the draft if present
# All types. A draft with neither type nor options becomes numerical or free-form
CONVERTED_TYPES = ("multiple choice", "numerical", "free-form", "regression", "OCR")


class Dropped(Exception):
    """Reports why a question is left out."""


def wanted_type(answer, options, wanted):
    """Returns the problem type of a question, one of the types `wanted`, or None.

    >>> wanted_type("3", [], ["multiple choice", "numerical"]), wanted_type("3", [], ["OCR"])
    ('numerical', 'OCR')
    """
    if options:
        return "multiple choice" if "multiple choice" in wanted else None
    numbers = ("numerical", "regression")
    numeric = next((kind for kind in numbers if kind in wanted), None)
    text = next((kind for kind in wanted if kind not in ("multiple choice", *numbers)), None)
    short = text is None or len(answer.split()) <= SHORT_ANSWER
    return numeric if numeric and short and parse_number(answer) is not None else text


def make_record(found, entry, folder="") -> dict:
    """Returns the record of a draft, without problem_id, by a recipe's `entry`. Raises Dropped if
    the question cannot be graded, or if its type is not one of the entry's."""
    problem, answer, wanted = found["problem"], found["answer"], entry["problem_type"]
    media = entry["media"].replace("{folder}", folder)
    path = os.path.normpath(os.path.join(media, found["file"]))
    options = lettered(found["options"])
    kind = found.get("problem_type") or wanted_type(answer, options, wanted)
    measure = MEASURE.fullmatch(answer)  # an answer with one number, which is read whole
    if (measure and parse_number(measure[1]) is not None and "regression" in wanted
            and not (options or "problem_type" in found)):
        answer, unit = measure.groups()  # only the number is graded: the question gives the unit
        problem, kind = f"{problem} (Unit: {unit})", "regression"
    if kind == "multiple choice":
        answer = choice_letter(answer, options) if answer else ""
    for reason, applies in (
            ("no file", found["file"] == "."),
            ("path leaves the media folder", path.startswith("..") or os.path.isabs(path)),
            ("not of the wanted problem type", kind not in wanted),
            ("no question", not problem),
            ("no answer", not found["answer"]),
            ("not 2 to 26 options", kind == "multiple choice" and not 2 <= len(options) <= 26),
            ("an option is empty", "" in found["options"]),
            ("answer is not one of the options", not answer),
            ("answer is not one number", kind in ("numerical", "regression")
             and parse_number(answer) is None)):
        if applies:
            raise Dropped(reason)
    video = os.path.splitext(path)[1].lower() in VIDEO_SUFFIXES
    record = {"problem": problem, "data_type": found.get("data_type") or ("image", "video")[video],
              "problem_type": kind, "options": options if kind == "multiple choice" else [],
              "solution": f"<answer>{answer}</answer>", "path": f"./{path}",
              "data_source": found.get("data_source") or
              "/".join(filter(None, (entry["source"], found.get("part"))))}
    record |= {field: found[field] for field in KEPT_FIELDS if found.get(field) not in (None, "")}
    if record_fault({"problem_id": 0} | record):  # load_records would refuse it
        raise Dropped("malformed row")
    return record


def convert(args):
    """Writes all questions of a benchmark's own release as records, or raises InputError."""
    path, facts = Path(args.path), benchmark_facts().get(args.name)
    if facts is None:
        release, title, files = path.parent, args.name, {path: release_rows(path)}
    else:  # the folder of a benchmark's release, to which its paths are relative
        release, title = path, facts["title"]
        matches = ({file: rows for file in sorted(path.glob(pattern))  # except those of records
                    if record_fault(next(iter(rows := release_rows(file)), None))}
                   for pattern in facts["files"])
        files = next(filter(None, matches), {})
    if not files:
        raise InputError(f"{path} has no {' or '.join(facts['files'])} of {title}: give its folder")
    root, records = args.media_root or release, []
    media = os.path.relpath(release, root)
    if media.startswith(".."):
        raise InputError(f"--media_root {root} is not above {release}: give one that is")
    entry = {"source": title, "problem_type": CONVERTED_TYPES, "media": media}
    make_folder_of(args.out)
    for file, rows in files.items():
        before = len(records)
        try:
            for row in rows:
                for found in CONVERTERS[args.name](row, file):
                    name = f"{found.get('part') or file.stem}/{len(records) - before}"
                    records.append({"problem_id": found.get("problem_id", name)}
                                   | make_record(found, entry))
        except (*MALFORMED, Dropped) as error:
            raise InputError(f"{file} differs from the release of {title}: {error!r}, after "
                             f"{len(records)} questions") from None
    write_whole({args.out: json_list(map(json.dumps, records))})
    print(f"{args.out}: {len(records):,} records; paths in it are relative to {root}")


# ------------------------------------------------- mix: from sources to a file of records

FIGURE_2 = ASSETS / "recipe.json"  # the paper's sources and their counts
ENTRY = {"source": str, "category": str, "format": str, "annotation": str, "media": str,
         "problem_type": list, "count": int}  # the keys of a recipe's entry


def read_recipe(path) -> list[dict]:
    """Returns the entries of a recipe file. Raises InputError naming entry and key."""
    recipe = release_rows(path)
    for i, entry in enumerate(recipe):
        fault = entry_fault(entry)
        if fault is not None:
            name = entry.get("source", "no source") if isinstance(entry, dict) else "no source"
            raise InputError(f"{path}: entry {i} ({name}): {fault}")
    return recipe


def entry_fault(entry) -> str | None:
    """Returns what is wrong with an entry of a recipe, naming the key, or None."""
    if not isinstance(entry, dict):
        return f"it must be a JSON object, not a {type(entry).__name__}"
    for key, kind in ENTRY.items():
        if not isinstance(entry.get(key), kind):
            return f"{key} must be of type {kind.__name__}, not {entry.get(key)!r}"
    if entry["format"] not in CONVERTERS:
        return f"format must be one of {list(CONVERTERS)}, not {entry['format']!r}"
    if os.path.isabs(entry["annotation"]) or not entry["annotation"]:
        return f"annotation must be a path below --media_root, not {entry['annotation']!r}"
    if entry["count"] < 0:
        return f"count must be at least 0, not {entry['count']}"
    if not entry["problem_type"] or not set(entry["problem_type"]) <= GRADERS.keys():
        return f"problem_type must be one or more of {[*GRADERS]}, not {entry['problem_type']}"
    return None


def clip_of(record):
    """Returns a record's path and the part of the video that it is about."""
    return record["path"], *(record.get(field) for field in CLIP_FIELDS)


def question_key(record) -> tuple:
    """Returns a key of a question. Questions on one clip have the same key if they differ only in
    case, spaces, final punctuation or the order of options."""
    words = " ".join(record["problem"].casefold().split()).rstrip(" .:?!。：？！")
    options = sorted(option.partition(" ")[2].casefold() for option in record["options"])
    return clip_of(record), words, *options


def tail(path) -> str:
    """Returns a path's last folder and file, as in videos/video_7.mp4. The file's name alone is not
    enough: some names are in both CLEVRER and PerceptionTest."""
    return "/".join(Path(path).parts[-2:]).lower()


def content_hash(path) -> bytes:
    """Returns a hash of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def benchmark_media(files, media_root, root):
    """Returns is_excluded(path): whether a training file below root is also in a benchmark. files:
    records of the benchmarks, with media below media_root. Media are recognised by the tails
    of their paths and, if they are on this machine, by their content."""
    media = {record["media_path"] for file in files for record in load_records(file, media_root)}
    there = [path for path in media if os.path.isfile(path)]
    tails, sizes = set(map(tail, media)), set(map(os.path.getsize, there))
    hashes = {content_hash(path) for path in tqdm(there, "hash benchmark media", leave=False)}
    if files:
        print(f"excluded: {len(tails)} benchmark media by path, {len(hashes)} also by content, "
              f"{len(media) - len(there)} of them not found on this machine")

    @lru_cache(maxsize=None)
    def is_excluded(path):
        full = os.path.join(root, path)
        return tail(path) in tails or (  # compares sizes first, so that few files are hashed
            bool(sizes) and os.path.isfile(full) and os.path.getsize(full) in sizes
            and content_hash(full) in hashes)
    return is_excluded


def candidates_of(entry, root, is_excluded, seen, counts):
    """Yields the records of an entry's files, each question once. Counts rows, and dropped
    questions by reason, in `counts`. seen: keys of earlier entries' questions, to which it adds."""
    converter = CONVERTERS[entry["format"]]
    for path in sorted(Path(root).glob(entry["annotation"])):
        for row in tqdm(release_rows(path), desc=entry["source"], unit=" rows", leave=False):
            counts["rows"] += 1
            try:
                drafts = list(converter(row, path))
            except MALFORMED:
                counts["malformed row"] += 1
                continue
            for found in drafts:
                try:
                    record = make_record(found, entry, path.parent.name)
                    key = question_key(record)
                    if len(set(key[2:])) < len(key[2:]):
                        raise Dropped("options are equal")
                    if is_excluded(record["path"]):
                        raise Dropped("file of a benchmark")
                    if key in seen:
                        raise Dropped("duplicate")
                except Dropped as reason:
                    counts[str(reason)] += 1
                else:
                    seen.add(key)
                    yield record


def spread(records, count, per_medium, rng, taken=()):
    """Returns at most `count` random records, in rounds: one of each image or video, then a second
    of each, up to per_medium. taken: {path: number of questions drawn by earlier entries}."""
    rounds, drawn = [[] for _ in range(per_medium)], Counter(taken)
    for record in sorted(records, key=lambda record: rng.random()):
        if drawn[record["path"]] < per_medium:
            rounds[drawn[record["path"]]].append(record)
            drawn[record["path"]] += 1
    return list(chain.from_iterable(rounds))[:count]


def mix(args):
    """Writes a mixture by a recipe: converts, cleans, samples, and shuffles the records. Options
    keep their source's order. `stats` counts the letters of the answers."""
    recipe, root = read_recipe(args.recipe), Path(args.media_root or Path(args.out).parent)
    stem = args.out.removesuffix(".json")
    val = f"{stem}_val.json"
    if os.path.exists(val) and not args.val_share:
        raise InputError(f"{val} would not belong to this mix: move it, or give --val_share")
    make_folder_of(args.out)
    absent = [entry["annotation"] for entry in recipe if not any(root.glob(entry["annotation"]))]
    if absent and not (args.skip_missing and len(absent) < len(recipe)):
        raise InputError(f"--media_root {root} lacks {len(absent)} of {len(recipe)} annotation "
                         f"files: {', '.join(absent)}; correct the recipe, or build without them "
                         "with --skip_missing")
    is_excluded = benchmark_media(args.exclude, args.exclude_root, root)
    records, report = [], []
    chosen, taken = set(), Counter()  # question keys; number of questions of each file
    for i, entry in enumerate(tqdm(recipe, desc="mix")):
        rng, counts = np.random.default_rng([args.seed, i]), Counter()
        offered = candidates_of(entry, root, is_excluded, set(chosen), counts)
        drawn = spread(offered, entry["count"], args.per_medium, rng, taken)
        chosen.update(map(question_key, drawn))
        taken.update(record["path"] for record in drawn)
        records += drawn
        report.append((entry, len(drawn), counts))
    lines = {args.out: []} | ({val: []} if args.val_share else {})
    for number, record in enumerate(records):
        path = val if in_validation(record["path"], args) else args.out
        lines[path].append(json.dumps({"problem_id": number} | record))
    for mixed in lines.values():
        np.random.default_rng([args.seed, len(recipe)]).shuffle(mixed)
    text = mix_report(report)
    if not all(lines.values()):
        print(text)
        raise InputError(f"too few records for {' and '.join(lines)}, so nothing is written: the "
                         "table above counts what was dropped")
    write_whole({path: json_list(mixed) for path, mixed in lines.items()}
                | {f"{stem}.report.md": [text]})
    print(text, *(f"{path}: {len(mixed):,} records" for path, mixed in lines.items()), sep="\n")


def in_validation(path, args) -> bool:
    """Returns whether a file, with all its questions, belongs to the validation set."""
    digest = hashlib.blake2b(f"{args.seed} {path}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < args.val_share


def mix_report(report) -> str:
    """Returns a Markdown table of what each entry wanted, got and dropped."""
    rows = [("source", "type", "wanted", "got", "short by", "rows", "dropped")]
    for entry, got, counts in report:
        dropped = "; ".join(f"{count} {reason}" for reason, count in counts.most_common()
                            if reason != "rows")
        rows.append((entry["source"], ", ".join(entry["problem_type"]), entry["count"], got,
                     entry["count"] - got or "", counts["rows"], dropped))
    rows.append(("all", "", sum(entry["count"] for entry, *_ in report),
                 sum(got for _, got, _ in report), "", "", ""))
    return markdown(rows)


# ------------------------------------------------------ check: can every file be decoded?

def state_of(record, args):
    """Returns the file's or folder's size and time, and sampling flags, for `check` to compare."""
    path = record["media_path"]
    file = [os.path.getsize(path), os.path.getmtime(path)] if os.path.exists(path) else []
    return file + [getattr(args, name) for name in ("max_frames", *SAMPLING_FLAGS)]


def check_clip(args, record):
    """Decodes a record's clip or image in a worker process. Returns its log row, with the reason
    why it cannot be used, or None."""
    path, state, reason = record["media_path"], state_of(record, args), None
    try:
        load_vision_of(record, args)
    except MediaError as error:  # without the path, so that equal reasons are counted together
        reason = str(error).removeprefix(f"{path}: ").replace(path, "it")
    return {"clip": clip_of(record), "state": state, "reason": reason}


def check(args):
    """Decodes every image and video of a file of records, as in training. Writes the records with
    readable media and a matchable solution. If interrupted, the same command resumes."""
    records = load_records(args.data, args.media_root)
    out = args.out or f"{os.path.splitext(args.data)[0]}_clean.json"
    stem = out.removesuffix(".json")
    log = Path(f"{stem}.media.jsonl")
    make_folder_of(out)
    good = {tuple(row["clip"]): row["state"] for row in whole_rows(log) if not row["reason"]}
    clips = {clip_of(record): record for record in records}
    todo = [record for clip, record in clips.items() if good.get(clip) != state_of(record, args)]
    reasons = {}  # {clip that cannot be used: reason}
    loader = torch.utils.data.DataLoader(
        todo, batch_size=None, collate_fn=partial(check_clip, args), in_order=False,
        num_workers=args.num_workers)
    with row_writer(log, len(todo)) as write:
        for row in loader:
            write([row])
            if row["reason"]:
                reasons[tuple(row["clip"])] = row["reason"]
    lost = defaultdict(list)  # {reason: dropped records}, with the usable ones at None
    for record in records:
        reason = reasons.get(clip_of(record))
        if reason is None and unmatchable(record):
            reason = "no answer can match the solution"
        lost[reason].append(record)
    clean = lost.pop(None, [])
    table = markdown([("reason", "media", "records", "one of them")] + [
        (reason, len(set(map(clip_of, those))), len(those), those[0]["path"])
        for reason, those in sorted(lost.items(), key=lambda item: -len(item[1]))])
    write_whole({out: json_list(json.dumps(as_in_file(record)) for record in clean),
                 f"{stem}.report.md": [table]})
    print(f"{table}{out}: {len(clean):,} of {len(records):,} records, "
          f"{len(clips) - len(reasons):,} of {len(clips):,} media")


# ---------------------------------------------------------- stats: a file beside Figure 2

def plain(name):
    """Returns a name's letters, digits and +, in lower case."""
    return re.sub(r"[^a-z0-9+]", "", name.lower())


def figure_rows(records):
    """Returns {(category, source, types): [records, Figure 2's count]}. The count is 0 if Figure 2
    lacks the source. A record's source is named by a part of its data_source or path."""
    rows = {(e["category"], e["source"], ", ".join(e["problem_type"])): [0, e["count"]]
            for e in read_recipe(FIGURE_2)}
    by_source = defaultdict(list)
    for key in rows:
        by_source[plain(key[1])].append(key)
    for record in records:
        names = [*str(record.get("data_source")).split("/"), *record["path"].split("/")]
        known = next((by_source[plain(n)] for n in names if plain(n) in by_source),
                     [("not in Figure 2", names[0], "")])
        other = (*known[0][:2], record["problem_type"])  # a type that Figure 2 lacks
        key = next((key for key in known if record["problem_type"] in key[2]), other)
        rows.setdefault(key, [0, 0])[0] += 1
    return rows


def stats(args):
    """Prints the tables of a file of records as Markdown, and writes them to --out."""
    records = load_records(args.data, args.media_root)
    rows = figure_rows(records)
    paper = sum(count for _, count in rows.values())

    def line(name, count, wanted):
        return (*name, count, f"{count / len(records):.1%}", wanted or "",
                f"{wanted / paper:.1%}" if wanted else "")
    table = [("category", "source", "problem type", "records", "share", "Figure 2", "share")]
    for category in dict.fromkeys(key[0] for key in rows):
        members = {key: value for key, value in rows.items() if key[0] == category}
        total = [sum(column) for column in zip(*members.values())]
        table.append(line((f"**{category}**", "", ""), *total))
        table += [line(("", *key[1:]), *value) for key, value in members.items()]
    table.append(line(("**all**", "", ""), len(records), paper))
    media = Counter(record["path"] for record in records)
    values = {"data type": [r["data_type"] for r in records],
              "problem type": [r["problem_type"] for r in records],
              "questions per file": media.values(),
              "answer": [f"{len(r['options'])} options, {r['solution'][len('<answer>')]}"
                         for r in records if r["problem_type"] == "multiple choice"]}
    counts = [("what", "value", "records", "share")] + [
        (what, value, count, f"{count / len(records):.1%}")
        for what, found in values.items() for value, count in sorted(Counter(found).items())]
    text = markdown(table) + f"\n{len(media):,} media\n\n" + markdown(counts)
    if args.out:
        write_whole({args.out: [text]})
    print(text)


# --------------------------------------------------------------------------- the commands

def parse_args(argv=None):
    parser = FlagParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def command(run, name, words):
        added = commands.add_parser(name, help=words, description=words)
        added.set_defaults(run=run)
        return added.add_argument
    add = command(build_toy, "toy", "the embedded default: generated data, a tiny model")
    add("--out", default="toy", help="folder to write; must be empty or absent")
    add("--model", choices=TOY_FAMILIES, default="qwen2_5_vl", help="the tiny model's family")
    add("--cot", type=at_least(0, int), default=2400, help="questions for the cold start")
    add("--train", type=at_least(0, int), default=1600, help="questions for T-GRPO")
    add("--test", type=at_least(0, int), default=400, help="held-out questions")
    add("--shortcut", action="store_true", help="in T-GRPO's questions a colour never names the "
        "wrong direction, so accuracy does not separate it from the motion")
    add("--seed", type=at_least(0, int), default=0, help="seed of every random draw")
    add = command(convert, "convert", "a benchmark's own release as records for evaluate.py")
    add("name", choices=CONVERTERS, metavar="NAME", help=", ".join(CONVERTERS))
    add("path", metavar="PATH", help="a benchmark's folder, for other names the file of questions; "
        "the function of NAME in CONVERTERS shows where the media go")
    add("--out", type=json_file, required=True, help="file of records to write, .json")
    add("--media_root", help="the release's folder or one above it, to which the records' paths "
        "are relative; default: the release's folder")
    add = command(mix, "mix", "records from the releases that a recipe names")
    add("--recipe", required=True, help="list of entries; assets/recipe.json is the paper's, "
        "assets/csv.json is for your own table")
    add("--out", type=json_file, required=True,
        help="file of records to write, .json; a report is written beside it")
    add("--media_root", help="folder of the releases, to which the recipe's and the records' "
        "paths are relative; default: the folder of --out")
    add("--val_share", type=at_least(0, float, below=1), default=0.0,
        help="share of files held out, in <out>_val.json")
    add("--per_medium", type=above(0, int), default=20, help="most questions on one file")
    add("--exclude", nargs="*", default=[], help="evaluation files: their media must not be used")
    add("--exclude_root", help="folder of their media; default: each file's own")
    add("--skip_missing", action="store_true", help="skip entries that have no annotation files")
    add("--seed", type=at_least(0, int), default=0, help="seed of every random draw")
    add = command(check, "check", "decode every image and video; keep what can be used")
    add("--data", required=True, help="records to check, .json or .jsonl")
    add("--out", type=json_file, help="file of usable records; default: <data>_clean.json")
    add_media_flags(add)
    add = command(stats, "stats", "the table of Figure 2 for a file of records")
    add("--data", required=True, help="records, .json or .jsonl")
    add("--media_root", help="folder to which the records' paths are relative; default: the data's")
    add("--out", help="Markdown file to write; default: print only")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(lambda args: args.run(args), parse_args)
