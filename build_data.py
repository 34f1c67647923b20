"""Data: what a record is and how a model sees it; then the commands that build the files.

The first half is imported by every stage: the flags and the start that the stages share, the
Video-R1 record, the prompt, the frames, a model's inputs, files that outlive a kill. Each stands
once: two copies could diverge unnoticed. The second half is the commands:

    python build_data.py toy --out toy      clips, images, records, a tiny model, args files
    python build_data.py convert mvbench MVBench --out MVBench/records.json
                                            records from a benchmark's own release
    python build_data.py mix --recipe assets/recipe.json --out data/train.json
                                            records from public releases, here as in Figure 2
    python build_data.py check --data data/train.json       decodes all media, keeps the usable
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
import unicodedata
import warnings
import zlib
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import timedelta
from difflib import get_close_matches
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

REQUIRED_FIELDS = ("problem_id", "problem", "data_type", "problem_type", "solution", "path")
# Optional: the seconds that a question is about; the rate of a video kept as a folder of frames
CLIP_FIELDS = ("video_start", "video_end", "video_fps")
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")  # in such a folder
ANIMATION_SUFFIXES = (".gif", ".webp", ".png", ".apng")
# Browsers show a frame of an animation at 10 a second if its delay is at most these milliseconds.
GIF_FPS, SHORTEST_DELAY = 10.0, 10
DAMAGED = "not a readable video: a part of it is damaged or missing"
MOST_MISSING = 0.1  # of a video's length by its header: more is a file that was cut off
# FFmpeg's names of the formats that hold all of their pictures: no playlists or scripts.
FORMATS = ("mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,nut,mxf,rm,dv,ivf,gif,h264,hevc,obu,"
           "mpegvideo,m4v,yuv4mpegpipe")
RAW_FPS = 25.0  # of a video file that has neither times nor a rate, as FFmpeg's
# Half of a character beyond 16 bits, which no tokenizer takes, and zero, which no file name has
UNUSABLE = re.compile(r"[\ud800-\udfff\0]")
ASSETS = Path(__file__).parent / "assets"
PATCH = 28  # pixels: side of a visual token where no processor says it, see token_side

# What the readers of images and videos raise on a file that they cannot use.
MEDIA_FAULTS = (OSError, ValueError, AssertionError, RuntimeError, SyntaxError, EOFError,
                ImportError, Image.DecompressionBombError)
# Bytes that decoding one file may take: enough for 64 frames of 3840 x 2160 pixels as floats
DECODE_MEMORY = 16 * 2**30
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


# Harmless messages that they print at import without a GPU
NO_GPU = re.compile("Setting accelerator to CPU|No CUDA runtime")
for _logger in ("DeepSpeed", "torch.utils.cpp_extension"):
    logging.getLogger(_logger).addFilter(lambda line: not NO_GPU.match(line.getMessage()))


class InputError(Exception):
    """The user's input cannot be used. Scripts print it without a traceback and exit with 1."""


class MediaError(ValueError):
    """One file cannot be used: "path: reason". Its questions are skipped."""


# ======================================== shared by all stages, which import it from here
# --------------------------------------------------------------------- flags and start-up

RANK0_ERROR_WAIT = 10  # seconds that other ranks wait before they print an error
IN_PIXELS = "128 visual tokens are 128 * 28 * 28 pixels (Qwen3-VL: 128 * 32 * 32)"


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that are values."""

    def _get_help_string(self, action):
        none = str(action.default) in ("None", "False", "[]", "")
        return action.help if none else super()._get_help_string(action)


class FlagParser(argparse.ArgumentParser):
    """Prints errors in one line, and reads flags from @files too: one `--flag=value` a line, blank
    lines and # comments allowed."""

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
        unknown = re.match("unrecognized arguments: ([^ =]+)", message)
        near = get_close_matches(unknown[1], self._option_string_actions, 1) if unknown else ()
        hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
        wait_for_rank0_error()
        self.exit(2, f"{self.prog}: {message} ({hint})\n")


def above(low, kind, most=math.inf):
    """Returns a flag's type: numbers above `low` and at most `most`, so not NaN."""
    limit = f" and at most {most}" if most < math.inf else ""
    return number(kind, lambda value: low < value <= most, f"above {low}{limit}")


def at_least(low, kind, below=math.inf):
    """Returns a flag's type: numbers from `low` on, below `below`."""
    limit = f" and below {below}" if below < math.inf else ""
    return number(kind, lambda value: low <= value < below, f"at least {low}{limit}")


def number(kind, fits, words):
    """Returns a flag's type: int or float, limited as `words` say."""
    def read(text):
        value = kind(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text} must be {words}")
        return value
    read.__name__ = kind.__name__  # argparse names it where the text is no number
    return read


most_pixels = number(int, lambda value: value >= PATCH**2, f"at least {PATCH**2}: {IN_PIXELS}")


# With max_frames, what decides the frames and pixels that a model sees
SAMPLING_FLAGS = ("min_frames", "fps", "min_pixels", "max_pixels", "image_min_pixels",
                  "image_max_pixels", "video_reader")


def add_media_flags(add, max_frames=16, max_pixels=128 * 28 * 28):
    """Which frames and pixels a model sees; `add` is a parser's add_argument."""
    if max_frames:  # evaluate.py has a list of them
        add("--max_frames", type=above(0, int), default=max_frames, help="most frames of a video")
    add("--min_frames", type=above(0, int), default=4, help="fewest frames of a video")
    add("--fps", type=above(0, float), default=2.0,
        help="frames a second of video, within those bounds")
    add("--min_pixels", type=above(0, int), default=4 * 28 * 28,
        help="fewest pixels of a video frame")
    add("--max_pixels", type=most_pixels, default=max_pixels,
        help="most pixels of a video frame (a visual token is 28 x 28, in Qwen3-VL 32 x 32)")
    add("--image_min_pixels", type=above(0, int), default=4 * 28 * 28,
        help="fewest pixels of an image")
    add("--image_max_pixels", type=most_pixels, default=512 * 28 * 28,
        help="most pixels of an image")
    add("--video_reader", type=installed_reader, choices=("av", "decord"), default="av",
        help="av: the frames that a player shows; decord: those that the released code read")
    add("--media_root", help="folder that the records' paths are relative to; default: the data's")
    add("--num_workers", type=at_least(0, int), default=2,
        help="processes that decode media ahead of need")
    add("--decode_timeout", type=above(0, float), default=120,
        help="timeout for a file, in seconds")


def add_machine_flags(add):
    """Model, ranks and seed; `add` is a parser's add_argument."""
    add("--attn_implementation", default="sdpa", help="sdpa, eager or flash_attention_2")
    add("--seed", type=at_least(0, int), default=0, help="seed of every random draw")
    add("--timeout_minutes", type=above(0, float), default=30,
        help="longest wait for another rank")
    add("--local_rank", type=int, default=-1, help="set by the deepspeed launcher; not used")


def setup_distributed(args, error=None):
    """Joins the process group, under the deepspeed launcher or alone. Returns (rank, device).

    If one rank passes an `error`, the others raise InputError with it, before they load a model.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    if "RANK" not in os.environ:  # started as `python SCRIPT`: a group of one
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
    if os.environ["WORLD_SIZE"] == "1":  # nobody to share memory with: nothing to compile for it
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    elif get_accelerator().device_name() == "cpu" and os.environ["RANK"] == "0":
        print("DeepSpeed builds its shared-memory operation if this machine does not have it yet: "
              "about 30 seconds, once", flush=True)
    timeout = timedelta(minutes=args.timeout_minutes)
    with redirect_stdout(io.StringIO()):  # the name of what it has built
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
            raise InputError(f"--model {name} holds a run's checkpoint, not yet a model: end the "
                             "run with --resume, or see 'When something breaks' in the README")
        return
    if name.count("/") != 1 or folder.parent.is_dir():  # no organisation/model
        raise InputError(f"--model {name}: there is no such folder (a training run writes its "
                         "model at its end)")
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    if not try_to_load_from_cache(name, "config.json"):
        try:
            HfApi().model_info(name, timeout=constants.HF_HUB_ETAG_TIMEOUT)  # seconds
        except Exception as error:  # also what its HTTP client raises
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise InputError(f"--model {name}: there is no such folder, and the hub does not give "
                             f"a model of that name: {reason[0]}") from None


def load_processor(args):
    """Returns the model's processor. Raises InputError if the folder has none."""
    find_model(args.model)
    from transformers import AutoProcessor
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()  # of weights and shards: the scripts have one bar, their own
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

    Reads safetensors only, which are mapped and split parameter by parameter: with an accelerator
    no process holds a whole copy. Raises InputError if a file is damaged or lacks a weight, which
    transformers would replace by random numbers.
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
        raise InputError(f"cannot load --model {args.model}: weights of the config's names and "
                         f"shapes are not in its files, {len(absent)} in all: "
                         f"{', '.join(absent[:3])}")
    if config.get("zero_optimization", {}).get("stage", 0) == 3:
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
        device = deepspeed.accelerator.get_accelerator().current_device_name()
        model.to(device)  # the buffers: the rest is there
    return model


HASHED_BLOCKS, BLOCK_BYTES = 64, 4096  # of each weight file: seconds for any size of model


def model_hash(model):
    """Returns a hash of config.json and, of every weight file, its name, size and some blocks
    spread evenly: it distinguishes checkpoints of a run without reading all of either."""
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


def wait_for_rank0_error():
    """Delays the error of a machine's other ranks. If its first rank has the same error, the
    launcher ends them meanwhile, so that the error is printed once."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a training run has its own
        time.sleep(RANK0_ERROR_WAIT)


def share_error(args, error):
    """Ends the ranks of other machines with an error from before the process group existed. On one
    machine the launcher ends them."""
    machines = int(os.environ.get("WORLD_SIZE", 1)) > int(os.environ.get("LOCAL_SIZE", 1))
    if machines and not torch.distributed.is_initialized():
        setup_distributed(args, str(error))


class LastingOutput(io.FileIO):
    """A standard stream that becomes /dev/null when a write fails: a lost terminal must not end a
    run. The output of C libraries goes there too."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return len(data)


def make_output_last():
    """Replaces sys.stdout and sys.stderr by a LastingOutput each."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None:  # closed before the start
            lasting = io.BufferedWriter(LastingOutput(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(lasting, encoding=stream.encoding,
                                                errors=stream.errors, line_buffering=True))


def run_script(main, parse_args):
    """Runs a script from its flags to its end. After an error it exits at once: the exit hooks
    would wait for data workers, and the launcher ends the other ranks when this one is gone."""
    name, fault = Path(sys.argv[0]).name, None
    make_output_last()
    try:
        args = parse_args()
        return main(args)
    except InputError as error:
        fault = error
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
    except Exception as error:
        if getattr(error, "errno", None) in FULL_DISK:
            print(f"{name}: {error}: make room and repeat the command (training: with --resume)",
                  file=sys.stderr)
        else:
            traceback.print_exc()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises at a worker's end
    for worker in multiprocessing.active_children():
        worker.kill()  # it would hold our output open, for whoever reads that to its end
    if fault is not None:
        rank0 = os.environ.get("LOCAL_RANK", "0") == "0"  # of this machine
        if rank0:
            print(f"{name}: {fault}", file=sys.stderr)
        with suppress(Exception):  # the other machines' ranks may be gone
            share_error(args, fault)
        if not rank0:
            wait_for_rank0_error()
            print(f"{name}: {fault}", file=sys.stderr)
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

# What a tokenizer reads as pixels or the end of a turn: "<|video_pad|>", "<|im_end|>"
SPECIAL_TOKEN = re.compile(r"<\|(\w+)\|>")
# One block and nothing else: of several, any could be the answer
SOLUTION = re.compile(r"\s*<answer>(?:(?!</?answer>).)*</answer>\s*", re.DOTALL)
SURELY_TEXT = 100  # characters of a free-form solution, which then has a word in it
# An option's letter, "A", "(A" or "Option A", and what sets it apart from the text: ".", ")", "、"
LETTER = r"(?:(?i:option|choice|选项)[ _]?)?[(（\[【]?([A-ZＡ-Ｚ])"
AFTER_LETTER = r"[.):\]．）：】、]+"
OPTION_MARK = re.compile(  # of a whole option; or a number: "1. "
    rf"\s*(?:{LETTER}(?:{AFTER_LETTER}|\s+[-–—]\s)|[(（]?(\d+)[.)）、]+\s)\s*",
    re.IGNORECASE)
FRAMES_FPS = 3  # of MVBench's task that is released as folders of frames


def load_records(path, media_root=None) -> list[dict]:
    """Reads a .json list or .jsonl file of Video-R1 records and checks every one of them.

    Adds `media_path`, the path below media_root (default: the file's own folder). Spells out
    special tokens (`plain_texts`) and gives options letters (`with_letters`). Opens no media.
    Raises InputError naming file, problem_id and field.
    """
    records = read_file(path)
    if not isinstance(records, list) or not records:
        raise InputError(f"{path} holds no list of records")
    root = os.path.abspath(media_root or Path(path).parent)
    if not os.path.isdir(root):
        raise InputError(f"media_root {root} is not a folder")
    for i, record in enumerate(records):
        if isinstance(record, dict) and record.get("data_type") == "frame":
            # MVBench's released rows that are folders of frames. Other released rows' start and end
            # are not used, as in the paper's code
            record |= {"data_type": "video", "video_fps": record.get("fps") or FRAMES_FPS,
                       "video_start": record.get("start"), "video_end": record.get("end")}
        problem = record_problem(record)
        if problem is None:
            if record["problem_type"] == "multiple choice":
                record["options"] = with_letters(record["options"])
            record |= plain_texts(record)
            record["media_path"] = os.path.normpath(os.path.join(root, record["path"]))
            record["media_root"] = root
            if not record["media_path"].startswith(os.path.join(root, "")):
                problem = (f"field path: {record['path']!r} leaves media_root {root}: give a "
                           "folder above it as --media_root")
        if problem is not None:
            name = record.get("problem_id", "absent") if isinstance(record, dict) else "absent"
            raise InputError(f"{path}: record {i} (problem_id {name}): {problem}")
    warn_unmatchable(path, records)
    return records


def plain_texts(record) -> dict:
    """Returns the fields that a model reads or learns, with <|im_end|> spelled <| im_end |>."""
    def spelled(text):
        return SPECIAL_TOKEN.sub(r"<| \1 |>", text)
    texts = {field: spelled(record[field]) for field in ("problem", "solution", "process")
             if record.get(field)}
    options = record.get("options")
    return texts | ({"options": list(map(spelled, options))} if options else {})


def unmatchable(record) -> bool:
    """Whether no answer can match the solution, as not even itself does: "00:12" as a number."""
    if record["problem_type"] == "free-form" and len(record["solution"]) > SURELY_TEXT:
        return False  # and grading a long text takes as long as all the rest
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
    """Returns a record without the fields that load_records adds."""
    return {key: value for key, value in record.items() if key not in ("media_path", "media_root")}


def record_problem(record) -> str | None:
    """Returns what is wrong with a record, naming the field, or None."""
    if not isinstance(record, dict):
        return f"not a JSON object but {type(record).__name__}"
    for field in REQUIRED_FIELDS:
        if record.get(field) is None:
            return f"field {field} is missing"
    for field in (*REQUIRED_FIELDS[1:], "process"):
        text = "" if record.get(field) is None else record[field]  # only process may be absent
        if not isinstance(text, str):
            return f"field {field} is not a string: {text!r}"
        if UNUSABLE.search(text):
            return f"field {field} has a character that no text has: {text!r}"
    for field in CLIP_FIELDS:
        if not isinstance(record.get(field) or 0, (int, float)):
            return f"field {field} is not a number: {record[field]!r}"
    if record["data_type"] not in ("image", "video"):
        return f"field data_type is {record['data_type']!r}, not 'image' or 'video'"
    if record["problem_type"] not in GRADERS:
        return f"field problem_type is {record['problem_type']!r}, not one of {[*GRADERS]}"
    if not (SOLUTION.fullmatch(record["solution"]) and extract_answer(record["solution"])):
        return (f"field solution is {record['solution']!r}: "
                "it must be one non-empty '<answer>...</answer>'")
    options = record.get("options") or []
    if not isinstance(options, list) or not all(
            isinstance(option, str) and not UNUSABLE.search(option) for option in options):
        return f"field options is not a list of strings: {options!r}"
    if record["problem_type"] == "multiple choice":
        if not options:
            return "field options is empty for a multiple-choice question"
        try:
            with_letters(options)
        except ValueError as error:
            return f"field options: {error}: {options!r}"
    groups = record.get("groups", {})  # that evaluate.py scores the question in
    if not isinstance(groups, dict) or not all(isinstance(name, str) for name in groups.values()):
        return f"field groups is {groups!r}, not an object of strings as {{'motion': 'left'}}"
    return None


def refuse_absent_media(path, records):
    """Raises InputError if not one record's file exists, before any model is loaded."""
    if not any(os.path.exists(record["media_path"]) for record in records):
        raise InputError(f"{path}: none of its media is there, the first would be "
                         f"{records[0]['media_path']}; give their folder as --media_root")


def letter(index) -> str:
    """Returns the letter of an option: A for 0."""
    return chr(ord("A") + int(index))


def lettered(options) -> list[str]:
    """Returns options with letters in front: ["A. red", "B. green", ...]."""
    return [f"{letter(i)}. {option}" for i, option in enumerate(options)]


def plain_mark(text) -> str:
    """Returns an option's letter or number as a plain one: A for "a" and "Ａ"."""
    return unicodedata.normalize("NFKC", text).upper()


def without_letters(options) -> list[str]:
    """Returns the options' texts without letters. Only A, B, C, ... in order are letters."""
    marks = [OPTION_MARK.match(option) for option in options]
    found = [plain_mark(mark[1] or mark[2]) if mark else "" for mark in marks]
    if found != [letter(i) for i in range(len(options))]:
        return [option.strip() for option in options]
    return [option[mark.end():].strip() for option, mark in zip(options, marks)]


def option_texts(options) -> list[str]:
    """Returns the options' texts without letters, as without_letters does.

    Raises ValueError if an option is empty, or if several begin with other letters or numbers in
    rising order from the first ones: "1." and "2.", "A." twice. "E. coli" is a text.

    >>> option_texts(["(A) a cat", "(B) a dog"]), option_texts(["E. coli", "C. elegans"])
    (['a cat', 'a dog'], ['E. coli', 'C. elegans'])
    """
    texts = without_letters(options)
    marks = [mark for mark in map(OPTION_MARK.match, options) if mark and mark[0][-1].isspace()]
    found = [plain_mark(mark[1] or mark[2]) for mark in marks]
    if texts == [option.strip() for option in options] and len(found) > 1 and (
            found == sorted(found) and found[0] in ("A", "B", "0", "1")):
        raise ValueError(f"options begin with {', '.join(found)}, not with A, B, C, ... in order")
    if not all(texts):
        raise ValueError("an option is empty")
    return texts


def with_letters(options) -> list[str]:
    """Returns the options of a prompt: unchanged if they have the letters A, B, C, ... in order,
    else with these in front. Raises ValueError like option_texts, or if two are equal."""
    texts = option_texts(options)
    if texts != [option.strip() for option in options]:
        return options
    if len(set(texts)) < len(texts):
        raise ValueError("two options are equal")
    return lettered(texts)


# --------------------------------------------------------------------------------- prompt

# The paper's Figure 11 as released, letter for letter: a model trained with it elsewhere must be
# evaluated with it. (No full stop after "thought expressions".)
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
    medium = {"type": record["data_type"], record["data_type"]: record["media_path"]}
    return [{"role": "user", "content": [medium, {"type": "text", "text": prompt}]}]


# ---------------------------------------------------------------------------------- media

class Vision(NamedTuple):
    """A video's frames with their timing, or an image."""
    frames: torch.Tensor | None   # (T, C, H, W) uint8; None for an image
    metadata: dict[str, Any]      # fps, frames_indices, total_num_frames; {} for an image
    image: Image.Image | None     # RGB; None for a video


def load_vision(record, *, max_frames, min_frames, fps, min_pixels, max_pixels,
                factor=PATCH, video_reader="av") -> Vision:
    """Decodes a record's image or video.

    Of a video: fps frames a second, at least min_frames and at most max_frames (an even number,
    spread evenly over the clip). Each frame, or the image, is resized to between min_pixels and
    max_pixels, with sides that are multiples of `factor`. Raises MediaError "path: reason".
    """
    path, root = record["media_path"], os.path.realpath(record["media_root"])
    try:
        files = [path, *(Path(path).iterdir() if os.path.isdir(path) else ())]
        if not all(os.path.realpath(file).startswith(os.path.join(root, "")) for file in files):
            raise ValueError("a link that leaves media_root")
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


DECODERS = {}  # the decoder of this process, (id, pipe), under this process's id


def load_vision_isolated(record, timeout, **limits) -> Vision:
    """Returns load_vision's result from another process. Raises MediaError if that decoder
    crashes, needs more than DECODE_MEMORY, or hangs for `timeout` seconds."""
    path, me, tries = record["media_path"], os.getpid(), 0
    while True:
        if me not in DECODERS:  # the first record, one after a fault, or a newly forked worker
            DECODERS.clear()  # of its parent's, which is not for two
            DECODERS[me] = start_decoder()
        (decoder, pipe), taken = DECODERS[me], False
        try:
            pipe.send((record, timeout, limits))
            for taken in (False, True):  # two replies: the receipt, then the result
                if not pipe.poll(timeout):
                    os.kill(decoder, signal.SIGKILL)  # not waited for: it may hang in the kernel
                    del DECODERS[me]
                    raise MediaError(f"{path}: decoding took more than {timeout:g} seconds")
                answer = pipe.recv()
            break
        except (EOFError, OSError):
            del DECODERS[me]
            status = os.waitstatus_to_exitcode(os.waitpid(decoder, 0)[1])
            tries += 1
            if taken or tries == 2:  # if it died while idle, this record gets another decoder
                raise MediaError(f"{path}: its decoder died (exit status {status})") from None
    if isinstance(answer, str):
        raise MediaError(answer)
    frames, metadata, image = answer
    return Vision(None if frames is None else torch.from_numpy(frames), metadata, image)


def load_vision_of(record, args, processor=None) -> Vision:
    """Returns load_vision_isolated's result within the flags' limits. processor: the model's, or
    None for a server's."""
    image = record["data_type"] == "image"  # images have their own pair of limits
    return load_vision_isolated(
        record, args.decode_timeout, max_frames=args.max_frames, min_frames=args.min_frames,
        fps=args.fps, min_pixels=args.image_min_pixels if image else args.min_pixels,
        max_pixels=args.image_max_pixels if image else args.max_pixels,
        factor=token_side(processor) if processor else PATCH, video_reader=args.video_reader)


def start_decoder():
    """Returns (id, pipe) of a child process that runs load_vision. It is forked by hand, because
    PyTorch's data workers must not start multiprocessing's processes."""
    ours, its = multiprocessing.Pipe()
    pid = os.fork()
    if pid == 0:
        ours.close()
        try:
            decode_records(its)
        finally:  # nothing may return into the parent's code from here
            traceback.print_exc()  # the parent prints only the exit status
            os._exit(1)
    its.close()
    return pid, ours


def decode_records(pipe):
    """Receives records until the pipe closes. Sends for each a receipt, then a Vision's parts or a
    MediaError's text."""
    torch.set_num_threads(1)  # the parent's threads did not come along
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the parent decides when to stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # it warns of every clip that has fewer frames a second than are asked for
    logging.getLogger("qwen_vl_utils.vision_process").setLevel(logging.ERROR)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = mapped + DECODE_MEMORY if soft < 0 else min(soft, mapped + DECODE_MEMORY)  # -1: no limit
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    while True:
        try:
            record, timeout, limits = pipe.recv()
            pipe.send("taken")
        except (EOFError, OSError):  # the parent has ended
            os._exit(0)
        signal.alarm(math.ceil(timeout) + 1)  # if the parent is no longer there to stop it
        try:
            frames, metadata, image = load_vision(record, **limits)
            answer = None if frames is None else frames.numpy(), metadata, image
        except MediaError as error:
            answer = str(error)
        except MemoryError:
            answer = f"{record['media_path']}: decoding takes more than {most - mapped} bytes"
        signal.alarm(0)
        pipe.send(answer)


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
    if image.mode.startswith("I"):  # 16 or 32 bits, of which the conversion would keep the low 8
        values = np.asarray(image).astype(np.uint32)
        most = 2**16 - 1 if image.mode != "I" else next(
            most for most in (2**8 - 1, 2**16 - 1, 2**32 - 1) if values.max() <= most)
        image = Image.fromarray((values // (most // 255)).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("pixels are floating-point numbers: save it with 8 bits a channel")
    return vision_process.to_rgb(image.convert("RGBA") if image.has_transparency_data else image)


def resized(height, width, min_pixels, max_pixels, factor) -> tuple[int, int]:
    """Returns qwen-vl-utils' (height, width) for a picture, multiples of `factor`. But no side of a
    narrow picture is 0, and if rounding up exceeds max_pixels, the longer side is cut.

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
    """The N frames of a video, not yet decoded, in the order in which a player shows them."""
    seconds: list[float]          # (N,) when each is shown, ascending, from the file's beginning
    rate: float                   # frames a second, as the file says
    pictures: Callable[[list[int]], Iterator[np.ndarray]]  # ascending indices to (H, W, 3) uint8


def read_video(path, video_reader, *, video_fps, **sampling) -> Vision:
    """Returns the frames of a folder, an animation or a video file."""
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
    """The type of --video_reader. decord is optional: it has no builds for every machine."""
    if name == "decord" and not find_spec("decord"):
        raise argparse.ArgumentTypeError("decord is not installed: pip install decord (x86_64)")
    return name


def read_by_decord(path, *, min_pixels, max_pixels, factor, **sampling) -> Vision:
    """Returns decord's frames by qwen-vl-utils, as the released code read them. Some are not those
    of a player (H.264 in AVI, transport streams, cut clips), and damage is not noticed."""
    import decord
    from qwen_vl_utils import vision_process
    with opened(path):  # refuses formats that are not in FORMATS
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
    """Returns frames between video_start and video_end (seconds or None), sampled evenly by number
    and resized, by qwen-vl-utils' rules."""
    from qwen_vl_utils import vision_process
    start = bisect_left(index.seconds, video_start or 0)
    end = len(index.seconds) if video_end is None else bisect_right(index.seconds, video_end)
    seconds, rate = index.seconds[start:end], index.rate
    if len(seconds) < 2:
        part = "" if video_start is video_end is None else f" from {video_start} to {video_end} s"
        raise ValueError(f"the clip has fewer than 2 frames{part}")
    passed = seconds[-1] - seconds[0]
    if abs(rate * passed - (len(seconds) - 1)) > 0.5:  # frames: more than rounded times explain
        rate = (len(seconds) - 1) / passed  # it varies
    count = vision_process.smart_nframes(
        {"fps": fps, "min_frames": min_frames, "max_frames": max_frames}, len(seconds), rate)
    indices = torch.linspace(start, start + len(seconds) - 1, count).round().long().tolist()
    frames, size = [], None
    for picture in index.pictures(indices):
        size = size or resized(*picture.shape[:2], min_pixels, max_pixels, factor)
        frames.append(resize_frames(torch.from_numpy(picture).permute(2, 0, 1), size))
    metadata = {"fps": rate, "frames_indices": indices, "total_num_frames": len(seconds)}
    return Vision(torch.stack(frames), metadata, None)


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
    def shown(image):  # a PNG may begin with a picture for viewers without animation
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
            image.load()  # only then a WebP has its delay
            delay = image.info.get("duration", 0)  # milliseconds
            ends.append(ends[-1] + (delay / 1000 if delay > SHORTEST_DELAY else 1 / GIF_FPS))
    return VideoIndex(ends[:-1], (len(ends) - 1) / ends[-1], pictures)


class WrongPacketTimes(Exception):
    """The times of a file's packets are not those of its frames."""


@contextmanager
def opened(path):
    """Yields (container, stream of pictures) of a video file, or raises ValueError."""
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
    """Indexes a video file by its packets' times, without decoding. Then only the way from a key
    frame to each wanted frame is decoded.

    If these are not the times of the frames (H.264 in AVI, a bare stream, a file that begins
    between key frames), this or reading the pictures raises WrongPacketTimes. Raises ValueError if
    a packet is damaged or the file ends before its header says.
    """
    times, keys, position, ends = [], [], 0, Counter()
    with opened(path) as (container, stream):
        for packet in container.demux():
            if packet.pts is not None:
                ends[packet.stream.index] = max(ends[packet.stream.index],
                                                packet.pts + (packet.duration or 0))
            if packet.stream is not stream:
                continue
            if packet.is_corrupt:
                raise ValueError(DAMAGED)
            if packet.size and not packet.is_discard:  # by an edit list
                times.append(packet.pts)
                if packet.is_keyframe:
                    keys.append((packet.pts, position))
            position += 1
        rate, length = float(stream.average_rate or 0), (container.duration or 0) / 10**6
        end = max((float(container.streams[i].time_base * ends[i]) for i in ends), default=0)
        if container.format.name == "mpegts" and ends_within_packet(path):
            raise ValueError(DAMAGED)
        if length - end > MOST_MISSING * length + 2 / (rate or RAW_FPS):  # or of 2 frames
            raise ValueError(f"cut off: {length:g} s by its header, but it ends at {end:g} s")
        if None in times or len(set(times)) < len(times):
            raise WrongPacketTimes
        times.sort()
        seconds = seconds_of(times, container, stream)
    entries = sorted({(0, 0), *((bisect_left(times, pts), position) for pts, position in keys)})
    return VideoIndex(seconds, rate, partial(decode_frames, path, times, entries))


def ends_within_packet(path) -> bool:
    """Whether a transport stream ends within one of its packets, 188 bytes that begin with "G"."""
    with open(path, "rb") as file:
        first = file.read(1)
        file.seek(-(os.path.getsize(path) % 188), os.SEEK_END)
        return first == file.read(1) == b"G"


def seconds_of(times, container, stream) -> list[float]:
    """Returns seconds from a file's beginning. Its sound may begin before its pictures."""
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
        # AVI stores when a packet is decoded: `delay` frames before its own frame is shown
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
    """Whether every time is known and later than the one before."""
    return None not in times and times == sorted(set(times))


def decode_frames(path, times, entries, indices):
    """Yields the frames `indices` of a video file, (H, W, 3) uint8.

    times: of every frame, in the order in which they are shown. entries: (frame, packet) pairs at
    which decoding can begin; it begins at the last one before each wanted frame. Raises
    WrongPacketTimes if the decoded frames have other times.
    """
    wanted = list(indices)
    with opened(path) as (container, stream):
        for position, packet in enumerate(container.demux(stream)):
            first, start = entries[bisect_right(entries, (wanted[0], math.inf)) - 1]
            if position < start:
                continue
            if position == start:
                stream.codec_context.flush_buffers()
                number = first  # of the frame that comes next
            for frame in packet.decode():
                if times[number:number + 1] != [frame.pts]:
                    if number == first > 0:  # frames before a key frame may follow it in the file
                        continue
                    raise WrongPacketTimes
                if frame.is_corrupt:  # the frames after it build on it
                    raise ValueError(DAMAGED)
                if number == wanted[0]:
                    yield upright(frame, stream.sample_aspect_ratio or 1)
                    wanted.pop(0)
                    if not wanted:
                        return
                number += 1
    raise WrongPacketTimes


def upright(frame, aspect) -> np.ndarray:
    """Returns a decoded frame's (H, W, 3) pixels as a player shows them: turned, mirrored, and
    stretched if pixels are not square. aspect: a pixel's width over its height."""
    width, height = round(frame.width * max(aspect, 1)), round(frame.height / min(aspect, 1))
    pixels = frame.to_ndarray(format="rgb24", width=width, height=height,
                              threads=1)  # more take longer to start
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5]  # x' = a x + c y, y' = b x + d y
        if abs(b) > abs(a):  # a quarter turn
            pixels, a, d = pixels.transpose(1, 0, 2), c, b
        pixels = pixels[::-1 if d < 0 else 1, ::-1 if a < 0 else 1]
    return np.ascontiguousarray(pixels)


def shuffle_frames(frames, generator):
    """Returns the (T, C, H, W) frames in a random order, never the given one when T > 1."""
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
    Qwen3-VL, whose prompt has the times as text. Without video_metadata times would be wrong.
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

    The model computes the same: visual features overwrite the placeholder, and positions agree. But
    a batch of images and videos then runs the vision tower once, as a batch of videos does. Under
    ZeRO-3 ranks with different numbers of calls wait forever.
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
    runs them with weight zero, so that it makes the same calls as the other ranks."""
    record = {"problem": "", "problem_type": "free-form", "data_type": "image", "media_path": ""}
    side = 2 * token_side(processor)
    return encode(processor, record, Vision(None, {}, Image.new("RGB", (side, side))))


def pad_batch(samples, pad_values, side) -> dict[str, torch.Tensor]:
    """Joins B encoded records into one batch. Entries named in pad_values, (1, L), are padded with
    its value on `side`; others are concatenated.

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
    """Copies a dict of tensors to a device, from pinned memory without waiting."""
    return {key: value.to(device, non_blocking=True) for key, value in inputs.items()}


def generate(model, prompts) -> torch.Tensor:
    """Returns transformers' responses (B n, L) to B encoded prompts, n to each by the model's
    generation_config. Collective under ZeRO-3."""
    pad = model.generation_config.pad_token_id
    pad_values = {"input_ids": pad, "attention_mask": 0, "mm_token_type_ids": 0}
    batch = to_device(pad_batch(prompts, pad_values, "left"), model.device)  # ids (B, prompt's L)
    sharded = hasattr(next(model.parameters()), "ds_id")  # ranks must keep step
    ids = model.generate(**batch, synced_gpus=sharded)  # (B n, prompt's L + L)
    return ids[:, batch["input_ids"].shape[1]:]


def seeded_generator(*key, device="cpu") -> torch.Generator:
    """Returns a random generator seeded by every number of `key`, as in (seed, step, rank)."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) % 2**63)


def record_seed(seed, record) -> int:
    """Returns the record's own seed, so that its draws depend on no batch, rank or restart."""
    key = zlib.crc32(str(record["problem_id"]).encode())
    return seeded_generator(seed, key).initial_seed() % 2**31  # servers take 31 bits


# Tokens that stand for pixels: a policy that emits one would break its own next forward.
FORBIDDEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
                    "<|video_pad|>")


def stop_tokens(model, tokenizer):
    """Returns every end token of the model, the tokenizer's own first."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return list(dict.fromkeys([tokenizer.eos_token_id, *(end for end in ends if end is not None)]))


def forbidden_tokens(model, tokenizer):
    """Returns the ids that must not be sampled: visual placeholders, other special tokens but the
    ends (a decoded text lacks them, its length counts them), and ids that no token has."""
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
    """Returns the file's bytes up to its last line break: a kill may have cut the next line."""
    data = path.read_bytes() if path.exists() else b""
    return data[:data.rfind(b"\n") + 1]


def whole_rows(path):
    """Returns the rows of a file whose last line a kill may have cut."""
    try:
        return [json.loads(line) for line in whole_lines(path).splitlines()]
    except ValueError as error:
        raise InputError(f"{path} is damaged, remove it: {error}") from None


VALUE_SHOWN = 200  # characters of a value in an error


def require_same(path, was, now, advice, free=()):
    """Raises InputError, with the values, if a key of `now` but those in `free` differs from `was`,
    the configuration of the run that made a file or folder."""
    changed = [f"{key} was {str(was.get(key))[:VALUE_SHOWN]}, is {str(value)[:VALUE_SHOWN]}"
               for key, value in now.items() if key not in free and was.get(key) != value]
    if changed:
        raise InputError(f"{path} was made by another run: {'; '.join(changed)}. {advice}")


@contextmanager
def row_writer(path, total, configuration=None, quiet=False):
    """Yields write(rows), for any thread. It appends to a file that begins with configuration."""
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
    """Appends rows to an unbuffered file: all of them, or none and raises InputError."""
    size = os.path.getsize(file.name)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with writing(file.name, "The rows in it are whole: make room and repeat the command"):
        try:
            while data:  # a disk that is nearly full takes a part
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
    """Writes text files, {path: pieces}: all of them complete, or none and raises InputError."""
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
    """Makes the folder of a file that will be written, or raises InputError before the work."""
    with writing(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)


def json_list(lines):
    """Returns the pieces of a JSON list of encoded items, one a line."""
    return "[\n", ",\n".join(lines), "\n]\n"


def markdown(rows) -> str:
    """Returns rows of cells, the first the heading, as an aligned Markdown table."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return "".join("| " + " | ".join(map(str.ljust, row, widths)) + " |\n" for row in rows)


# ========================================== the commands: toy, convert, mix, check, stats
# ------------------------------------------------------------------------------------ toy

TOY_SIDE, TOY_FRAMES, TOY_FPS = 28, 8, 2  # pixels, frames a clip, frames a second
TOY_COLOURS = {"red": (230, 40, 40), "green": (40, 210, 60), "blue": (60, 80, 240),
               "yellow": (230, 220, 50)}
TOY_OPPOSITE = {"left": "right", "right": "left"}
TOY_WORDS = ("cat", "dog", "sun", "map", "key", "cup", "hat", "box")
TOY_BLOCK, TOY_NOISE, TOY_DARK = 8, 6.0, 50  # block side, noise std, brightest background
TOY_LOOK = 0.7  # share of the cold start's thoughts that use the colour, not the motion
TOY_PLAIN = {"white": (240, 240, 240), "purple": (170, 60, 200)}  # name no direction
# Family of the toy's model: its processor, that of its videos, the side of a patch in pixels
TOY_FAMILIES = {"qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor", 14),
                "qwen3_vl": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor", 16)}
# Qwen2.5's own special tokens, those that the model or the chat template uses.
TOY_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *FORBIDDEN_TOKENS)


def toy_canvas(rng, count):
    """Returns (count, H, W, 3) float frames of one dark colour, with fresh noise in each."""
    background = rng.uniform(0, TOY_DARK, size=3)
    return background + rng.normal(0, TOY_NOISE, (count, TOY_SIDE, TOY_SIDE, 3))


def toy_block(frames, corners, colours):
    """Paints a block into each frame, its top left corner at (x, y), and returns the frames."""
    for frame, (x, y), colour in zip(frames, corners, colours):
        paint = (TOY_COLOURS | TOY_PLAIN)[colour]
        frame[round(y):round(y) + TOY_BLOCK, round(x):round(x) + TOY_BLOCK] = paint
    return frames


def toy_motion(rng, colour, direction):
    """Returns the frames of a block that crosses the picture to the left or right."""
    span = TOY_SIDE - TOY_BLOCK
    x = np.linspace(rng.uniform(0, span / 5), span - rng.uniform(0, span / 5), TOY_FRAMES)
    x, y = x if direction == "right" else span - x, rng.uniform(0, span)
    return toy_block(toy_canvas(rng, TOY_FRAMES), [(v, y) for v in x], [colour] * TOY_FRAMES)


def toy_question(rng, kind):
    """Returns (frames (T, H, W, 3), problem_type, problem, options, answer, thought)."""
    colours, directions = list(TOY_COLOURS), list(TOY_OPPOSITE)
    colour, direction = str(rng.choice(colours)), str(rng.choice(directions))
    watch = f"watch: it starts {TOY_OPPOSITE[direction]} and ends {direction}"
    if kind.startswith("direction"):
        hints = colours[directions.index(direction)::len(directions)]  # name this direction
        others = [name for name in colours if name not in hints]
        colour = {"direction_agree": str(rng.choice(hints)),
                  "direction_conflict": str(rng.choice(others)),
                  "direction_plain": str(rng.choice(list(TOY_PLAIN)))}[kind]
        look = colour in TOY_COLOURS and rng.random() < TOY_LOOK
        return (toy_motion(rng, colour, direction), "multiple choice",
                "Which way does the block move?", lettered(directions),
                letter(directions.index(direction)),
                f"{f'look: it is {colour}' if look else watch}, so {direction}")
    if kind == "describe":
        return (toy_motion(rng, colour, direction), "free-form", "What happens in the video?", [],
                f"a {colour} block moves {direction} in the video", watch)
    still = [rng.uniform(0, TOY_SIDE - TOY_BLOCK, size=2)] * TOY_FRAMES
    if kind == "first":
        then = str(rng.choice([name for name in colours if name != colour]))
        shown = [colour] * (TOY_FRAMES // 2) + [then] * (TOY_FRAMES - TOY_FRAMES // 2)
        return (toy_block(toy_canvas(rng, TOY_FRAMES), still, shown), "multiple choice",
                "Which colour comes first?", lettered(colours), letter(colours.index(colour)),
                f"watch: {colour} then {then}")
    if kind == "end":
        start, end = rng.choice(10, size=2, replace=False)  # tenths of the way to the right
        x = np.linspace(start, end, TOY_FRAMES) * ((TOY_SIDE - TOY_BLOCK) / 9)
        corners = [(v, still[0][1]) for v in x]
        return (toy_block(toy_canvas(rng, TOY_FRAMES), corners, [colour] * TOY_FRAMES),
                "regression", "Where does the block end, from 0 on the left to 9?", [],
                str(end), f"watch: it starts {start} and ends {end}")
    if kind == "colour":
        return (toy_block(toy_canvas(rng, TOY_FRAMES), still, [colour] * TOY_FRAMES),
                "multiple choice", "Which colour is the block?", lettered(colours),
                letter(colours.index(colour)), f"look: it is {colour}")
    frames = toy_canvas(rng, 1)
    if kind == "count":
        n = int(rng.integers(1, 5))
        for corner in rng.permutation([(2, 2), (18, 2), (2, 18), (18, 18)])[:n]:
            toy_block(frames, [corner], [colour])
        return (frames, "numerical", "How many blocks are there?", [], str(n),
                f"look: {' '.join(['block'] * n)}")
    from PIL import ImageDraw, ImageFont
    word = str(rng.choice(TOY_WORDS))
    image = Image.fromarray(frames[0].clip(0, 255).astype(np.uint8))
    ImageDraw.Draw(image).text((3, 7), word, fill="white", font=ImageFont.load_default(size=12))
    return (np.asarray(image)[None], "OCR", "What is written in the picture?", [], word,
            f"look: it says {word}")


def write_video(path, frames, fps):
    """Writes (T, H, W, 3) uint8 frames as an H.264 mp4, the same bytes each time."""
    import av
    # x264's slower presets gave other bytes from run to run for pictures as small as the toy's
    options = {"crf": "10", "preset": "ultrafast"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.codec_context.thread_count = 1
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def toy_records(out, split, count, seed, shortcut=False):
    """Draws `count` questions of a split, writes their media below `out`, yields the records.

    assets/toy_mix.json has the kinds of each split, in percent. direction_agree: the block's colour
    names its direction; direction_conflict: it names the other one, in half of the direction
    questions but those of the cold start; direction_plain: it names none. shortcut: colours that
    would conflict with the direction agree with it.
    """
    mixtures = read_file(ASSETS / "toy_mix.json")
    rng = np.random.default_rng([seed, sorted(mixtures).index(split)])
    kinds, shares = list(mixtures[split]), np.array(list(mixtures[split].values()))
    for i, kind in enumerate(rng.choice(kinds, size=count, p=shares / shares.sum())):
        if shortcut and kind == "direction_conflict":
            kind = "direction_agree"
        frames, problem_type, problem, options, answer, thought = toy_question(rng, kind)
        frames = frames.clip(0, 255).astype(np.uint8)
        data_type, suffix = ("image", "png") if len(frames) == 1 else ("video", "mp4")
        path = f"media/{split}_{i:05d}.{suffix}"
        if suffix == "png":
            Image.fromarray(frames[0]).save(out / path)
        else:
            write_video(out / path, frames, TOY_FPS)
        record = {"problem_id": i, "problem": problem, "data_type": data_type,
                  "problem_type": problem_type, "options": options,
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
        vocab_size=800, show_progress=False,  # at most: every word of the toy is a token
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    model = json.loads(tokenizer.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]],
        eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>",
        additional_special_tokens=list(TOY_SPECIAL))


def toy_processor(tokenizer, family="qwen2_5_vl"):
    """Returns the family's processor with the toy's tokenizer and pictures of any size."""
    import transformers
    processor, videos, patch = TOY_FAMILIES[family]
    size = {"shortest_edge": (2 * patch)**2, "longest_edge": 768 * (2 * patch)**2}
    return getattr(transformers, processor)(
        image_processor=transformers.Qwen2VLImageProcessor(size=dict(size), patch_size=patch),
        video_processor=getattr(transformers, videos)(size=dict(size), cap_pixels_per_frame=False),
        tokenizer=tokenizer,
        chat_template=(ASSETS / "chat_template.jinja").read_text(encoding="utf-8"))


def toy_model(tokenizer, seed, hidden=96, layers=3, heads=4, kv_heads=2, mlp=256,
              vision_hidden=64, vision_depth=2, vision_mlp=128, family="qwen2_5_vl"):
    """Returns a randomly initialised model of the family, by default of about 600,000 parameters.
    Its configuration ignores keys that only the other family has."""
    from transformers import AutoConfig, AutoModelForImageTextToText
    token = tokenizer.convert_tokens_to_ids
    spread = {"initializer_range": 0.05}  # at Qwen's 0.02 so small a model learns nothing
    end = [token("<|im_end|>"), token("<|endoftext|>")]
    share = hidden // heads // 2 // 3  # of the rotary frequencies, to time, height and width
    config = AutoConfig.for_model(
        family,
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": hidden, "intermediate_size": mlp,
            "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "head_dim": hidden // heads,
            "max_position_embeddings": 8192,
            "bos_token_id": None, "eos_token_id": end, "pad_token_id": end[1],
            "tie_word_embeddings": True, **spread,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section":
                                [hidden // heads // 2 - 2 * share, share, share]}},
        vision_config={
            "depth": vision_depth, "hidden_size": vision_hidden, "intermediate_size": vision_mlp,
            "num_heads": 4, "out_hidden_size": hidden, "window_size": 112,
            "fullatt_block_indexes": [vision_depth - 1], "tokens_per_second": 1,
            # Qwen3-VL only: layers whose features also go to the language model's first layers
            "deepstack_visual_indexes": [0], "num_position_embeddings": 16, **spread},
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"), tie_word_embeddings=True, **spread)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = end[1]
    return model


def copy_toy_files(out, side):
    """Copies assets/toy to the toy's folder, with its name and its pixels a frame: each stage's
    flags where they differ from the paper's, because the toy is small, and the main job."""
    for path in (ASSETS / "toy").iterdir():
        folder = shlex.quote(str(out)) if path.suffix == ".sh" else str(out)
        text = path.read_text(encoding="utf-8").replace("{out}", folder)
        (out / path.name).write_text(text.replace("{pixels}", str(side**2)), encoding="utf-8")


def build_toy(args):
    """Writes the toy to args.out: media/, cot.json, train.json, test.json, model/, assets/toy."""
    from transformers.utils.logging import disable_progress_bar
    out = Path(args.out)
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty: name another folder, or remove it first")
    (out / "media").mkdir(parents=True)
    texts = []
    for split, count in (("cot", args.cot), ("train", args.train), ("test", args.test)):
        shortcut = args.shortcut and split == "train"
        records = list(toy_records(out, split, count, args.seed, shortcut))
        (out / f"{split}.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
        print(f"{out}/{split}.json: {count} records, "
              + ", ".join(f"{n} {kind}" for kind, n in sorted(Counter(
                  record["data_source"] for record in records).items())))
        if split == "cot":
            for record in records:
                prompt = build_messages(record | {"media_path": ""})[0]["content"][1]["text"]
                texts.append(f"{prompt}\n{record['process']}\n{record['solution']}")
    tokenizer = toy_tokenizer(texts)
    # each text that all prompts share is one token: prompts take a third of the time
    tokenizer.add_tokens([TEMPLATE.removeprefix("{question}\n"), *ANSWER_SUFFIX.values(),
                          "You are a helpful assistant."])
    model = toy_model(tokenizer, args.seed, family=args.model)
    disable_progress_bar()
    model.save_pretrained(out / "model")
    processor = toy_processor(tokenizer, args.model)
    processor.save_pretrained(out / "model")
    for path in (out / "model").iterdir():  # safetensors' are the owner's alone
        path.chmod((out / "train.json").stat().st_mode)
    copy_toy_files(out, token_side(processor))
    print(f"{out}/model: {model.num_parameters():,} parameters, {len(tokenizer)} tokens")


# ------------------- the sources and benchmarks: one converter for each release's format
# A converter takes a row of a release and the path of its file, and yields drafts. To add a source
# or a benchmark, write one and name it in CONVERTERS. If it raises one of MALFORMED, `mix` drops
# the row and counts it, and `convert` refuses the file.

MALFORMED = (KeyError, TypeError, IndexError, AttributeError, OverflowError, ValueError)
# How to answer, which our own prompt says: a line after the question, or the last sentence of one
HINT = re.compile(
    r"(?im)^[ \t]*(?:hint|reference ocr token):.*$|(?<=[.?!\n])[ \t]*(?:answer:[ \t]*"
    r"|(?:please )?(?:answer|respond|provide|select|choose|give)\b[^\n]{0,200}\b"
    r"(?:letter|options?|choices|single word or phrase|short|directly|multiple-choice)\b[^\n]*)$")
# Options begin at such marks, at the start of lines or, if capital, anywhere
LINE_MARK = re.compile(rf"^[ \t*•-]*{LETTER}{AFTER_LETTER}[*]*\s*", re.MULTILINE | re.IGNORECASE)
INLINE_MARK = re.compile(rf"(?<![^\s:：;；,，?？。]){LETTER}{AFTER_LETTER}\s*")
# What stands between options in one line: "A: a cat, B: a dog or C: a hat"
SEPARATOR = re.compile(r"[,，;；、](?:\s*(?:and|or))?$|\s(?:and|or)$")
AROUND = re.compile(r"(?i)^question:|(?:options|choices|选项)\s*[:：]$")  # around a question


def draft(medium, problem, answer, options=(), **fields):
    """Returns a question as its source has it, which make_record checks. medium: a path below the
    media folder. answer: a letter or a text. options: lettered or not. fields: the record's, and
    "part", the part of the source that data_source names."""
    if isinstance(options, str) or not all(isinstance(text, (str, int, float)) for text in options):
        raise ValueError(f"the options are not texts: {options!r}")
    return {"medium": os.path.normpath(medium), "problem": problem.strip(),
            "answer": str(answer).strip(), "options": without_letters(list(map(str, options))),
            **fields}


def texts_by_letter(options) -> list[str]:
    """Returns the options of an object of texts by letter, without the empty ones."""
    texts = option_texts([f"{key}. " + options[key] for key in sorted(options) if options[key]])
    return option_texts(texts)  # they may say their letters again


def split_options(text):
    """Returns (question, options). Options follow the marks A, B, C, ..., one on each line or all
    in one line, whichever gives more. If an option is empty, as in "B. C. elegans", that way counts
    less: a mark was part of a text.

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
        options = [text[mark.end():end].strip() for mark, end in zip(run, ends)]
        *first, last = options
        if all(map(SEPARATOR.search, first)) and not SEPARATOR.search(last):
            options = [SEPARATOR.sub("", option).strip() for option in options]
        found.append((text[:run[0].start()], options))
    question, options = max(found, key=lambda each: (all(each[1] or [""]), len(each[1])))
    return AROUND.sub("", question.strip()).strip(), options


def longest_run(marks):
    """Returns the longest run of marks A, B, C, ...; of equally long ones the last."""
    longest, after = [], {}  # place -> the run that the next mark of this place begins
    for mark in reversed(marks):
        place = ord(plain_mark(mark[1])) - ord("A")
        after[place] = [mark, *after.get(place + 1, [])]
        longest = max(longest, after.get(0, []), key=len)
    return longest


def from_video_r1(row, path):
    """Reads records in this project's own form, as in the released Video-R1-260k.json."""
    answer = re.fullmatch(r"\s*<answer>(.*)</answer>\s*", row["solution"], re.DOTALL)[1]
    options = row.get("options") or []
    texts = texts_by_letter(options) if isinstance(options, dict) else option_texts(options)
    yield draft(row["path"], row["problem"], answer, texts, **{
        field: row.get(field) for field in
        ("problem_type", "data_source", "data_type", "process", *CLIP_FIELDS)})


CSV_OPTION = re.compile("option.*|[a-z]")  # the column of an option: option_a, or A


def from_csv(row, path):
    """Reads a table of one's own: columns video (or image), question, answer, and for a choice its
    options, option_a, option_b, ... or A, B, ...; problem_type, video_start and video_end may be
    there too. Without a problem_type options make a choice, a number is numerical, else free-form.
    """
    row = {(name or "").strip().lower(): cell for name, cell in row.items()}
    if not {"question", "answer"} <= row.keys() or row.keys().isdisjoint(("video", "image")):
        raise InputError(f"{path} needs the columns video or image, question and answer, "
                         f"separated by commas; it has {', '.join(row)}")
    # cells beyond the heading are a list, which has no strip: a comma without quotes costs its row
    row = {name: (cell or "").strip() for name, cell in row.items()}
    options = texts_by_letter({name: row[name] for name in row if CSV_OPTION.fullmatch(name)})
    types = ("multiple choice", "numerical", "free-form")
    yield draft(row.get("video") or row.get("image"), row["question"], row["answer"], options,
                data_type="video" if row.get("video") else "image",
                problem_type=row.get("problem_type") or wanted_type(row["answer"], options, types),
                **{field: float(row[field]) for field in CLIP_FIELDS if row.get(field)})


def from_llava(row, path):
    """Reads conversations, as LLaVA-Video-178K and most image sources have them: a draft a turn."""
    medium = row.get("video") or row["image"]
    if isinstance(medium, list):
        medium, = medium  # several pictures in one question are no record
    turns = row["conversations"]
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        if (question["from"], answer["from"]) != ("human", "gpt"):
            raise ValueError("the turns are not human, gpt, human, gpt, ...")
        problem, options = split_options(re.sub(r"<(?:image|video)>", "", question["value"]))
        yield draft(medium, problem, answer["value"], options, part=row.get("data_source"),
                    data_type="video" if row.get("video") else None)


@lru_cache(maxsize=1)
def nextqa_paths(folder):
    """Reads NExT-QA's map from video names to their paths, a file beside its questions."""
    return read_file(folder / "map_vid_vidorID.json")


def from_nextqa(row, path):
    """Reads NExT-QA's CSV. The map gives a video's folder, as in 0101/2909445186.mp4."""
    question = row["question"].strip().removesuffix("?").rstrip() + "?"
    yield draft(f"{nextqa_paths(path.parent)[row['video']]}.mp4", question, letter(row["answer"]),
                [row[f"a{i}"] for i in range(5)])


def from_perception_test(row, path):
    """Reads PerceptionTest's multiple choice, an object of videos by name."""
    for question in row["mc_question"]:
        yield draft(f"{row['row_key']}.mp4", question["question"], letter(question["answer_id"]),
                    question["options"])


CLEVRER_WORDS = (("gray", "red", "blue", "green", "brown", "cyan", "purple", "yellow"),
                 ("metal", "rubber"), ("cube", "sphere", "cylinder"), ("yes", "no"))


def from_clevrer(row, path):
    """Reads CLEVRER's questions about a video: those with exactly one correct choice, and those
    answered by a word, which gets its group of CLEVRER_WORDS as options."""
    start = row["scene_index"] // 1000 * 1000  # the release has a folder for each 1000 videos
    medium = f"video_{start:05d}-{start + 1000:05d}/{row['video_filename']}"
    for question in row["questions"]:
        if "choices" in question:
            choices = question["choices"]
            right = [i for i, choice in enumerate(choices) if choice["answer"] == "correct"]
            if len(right) == 1:
                yield draft(medium, question["question"], letter(right[0]),
                            [choice["choice"] for choice in choices])
        else:
            answer = str(question["answer"])
            words = next((group for group in CLEVRER_WORDS if answer in group), ())
            yield draft(medium, question["question"], answer, words)


def from_star(row, path):
    """Reads STAR's questions, each about some seconds of a video of Charades."""
    choices = sorted(row["choices"], key=lambda choice: choice["choice_id"])
    options = [choice["choice"] for choice in choices]
    yield draft(f"{row['video_id']}.mp4", row["question"], letter(options.index(row["answer"])),
                options, **clip_seconds(row))


def clip_seconds(row):
    """Returns the clip's fields of a record whose release has "start" and "end" in seconds."""
    return {"video_start": float(row["start"]), "video_end": float(row["end"])}


def from_scienceqa(row, path):
    """Reads ScienceQA's training questions that have a picture: 7/image.png of the question "7"."""
    if row["image"] and row["split"] == "train":
        problem = f"{row.get('hint') or ''}\n{row['question']}"
        yield draft(f"{row['row_key']}/{row['image']}", problem, letter(row["answer"]),
                    row["choices"])


def from_a_okvqa(row, path):
    """Reads A-OKVQA's questions about pictures of COCO."""
    yield draft(f"{row['image_id']:012d}.jpg", row["question"],
                letter(row["correct_choice_idx"]), row["choices"])


def from_tabmwp(row, path):
    """Reads TabMWP's problems about the picture of a table, 7.png of the problem "7"."""
    unit = f" (Unit: {row['unit']})" if row.get("unit") else ""
    yield draft(f"{row['row_key']}.png", row["question"] + unit, row["answer"],
                row["choices"] or ())


def from_geometry3k(row, path):
    """Reads Geometry3K's problems, a folder with a file and a picture for each."""
    yield draft("img_diagram.png", row["problem_text"], row["answer"], row["choices"])


def from_arxivqa(row, path):
    """Reads ArxivQA. Its labels come in many spellings; those that mean no option are dropped."""
    yield draft(row["image"], row["question"], row["label"], option_texts(row["options"]))


def from_chartqa(row, path):
    """Reads ChartQA. Percentages lose their sign."""
    yield draft(row["imgname"], row["query"], row["label"].strip().removesuffix("%"))


@lru_cache(maxsize=1)
def benchmark_facts():
    """Reads each benchmark's title and size, patterns of its files of questions (the first that
    matches is used), tasks, subjects, folders of media, and tasks about a part of a video."""
    return read_file(ASSETS / "benchmarks.json")


def task_of(path, tasks):
    """Returns which of the `tasks` a release's file is about, by its name or its folder's."""
    for text in (path.stem.lower().removesuffix("_video"), path.parent.name.lower()):
        if text in tasks:
            return text
    raise ValueError(f"its name, or its folder's, is none of {', '.join(tasks)}")


def subject_groups(path, subjects):
    """Returns {"subject"} of Science/dev_Biology_3.mp4 or videos/Biology/3.mp4, and its
    "discipline" if it is in `subjects`, {discipline: its subjects}."""
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
    Videos are Science/dev_Biology_3.mp4 and so on. In its own repository's adaptation_video.json
    the questions are one level deeper."""
    facts = benchmark_facts()["videommmu"]
    track = task_of(path, facts["tasks"])
    for row in [row] if "question" in row else [row[key] for key in row if key != "row_key"]:
        options = row["options"] or []
        if not any(map(str.strip, options)):  # one of the open questions has four empty ones
            options = []
        before, after = facts["prompts"][track]
        kind = "multi-choice" if options else "open-ended"
        groups = subject_groups(f"{row['id']}.mp4", facts["subjects"])
        if "discipline" not in groups:  # the folder of its video
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
        yield draft(video, row["question"], row["answer"], texts_by_letter(row["choices"]),
                    problem_id=row["id"],
                    groups=subject_groups(video, benchmark_facts()["mmvu"]["subjects"]))


def from_mvbench(row, path, name="mvbench"):
    """Reads MVBench's json/action_sequence.json and so on, and TVBench's, with their zips unpacked
    where they lie. Videos are video/<the task's folder in assets/benchmarks.json>/<video>. Those of
    TVBench's action_antonym are NTU RGB+D's and not in the release."""
    facts = benchmark_facts()[name]
    task = task_of(path, facts["folders"])
    clip = clip_seconds(row) if task in facts["clips"] else {}
    if task == "episodic_reasoning":  # folders of frames
        clip["video_fps"] = FRAMES_FPS
    places = [str(text) for text in row["candidates"]]  # a number is a text, not a place
    yield draft(f"video/{facts['folders'][task]}/{row['video']}", row["question"],
                letter(places.index(str(row["answer"]))), row["candidates"],
                data_type="video", part=task, groups={"task": task}, **clip)


TEMPCOMPASS_OPTION = re.compile(  # "A. up", "Option 2: it moves", "Information A: {...}"
    r"(?:(?:Caption|Option|Sentence|Information) )?([A-Z]|\d)[.:]\s*(.+)")


def from_tempcompass(row, path):
    """Reads TempCompass's questions/caption_matching.json and so on, or rows with video_id and dim.
    Videos are videos/12.mp4 and so on. All four tasks are multiple choice, as in the paper: yes_no
    of "yes" and "no", captioning of the pieces of information that it offers."""
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


YOUTUBE_ID = re.compile(r"(?:v=|/)([\w-]{11})(?:[?&].*)?$")


def from_videomme(row, path):
    """Reads VideoMME's questions, a row each or a list in each video's row. Videos are
    data/fFjv93ACGo8.mp4 and so on."""
    for question in row.get("questions", [row]):
        question = row | question
        name = question.get("videoID") or YOUTUBE_ID.search(question["url"])[1]
        yield draft(f"data/{name}.mp4", question["question"], question["answer"],
                    option_texts(question["options"]), problem_id=question["question_id"],
                    groups={key: question[key] for key in benchmark_facts()["videomme"]["groups"]})


def from_tomato(row, path):
    """Reads TOMATO's data/direction.json and so on, which number their questions alike. Videos are
    videos/human/0999-01.mp4 and so on."""
    kind = task_of(path, benchmark_facts()["tomato"]["tasks"])
    folder = row["demonstration_type"]
    yield draft(f"videos/{folder}/{row['key']}.mp4", row["question"], letter(row["answer"]),
                row["options"], problem_id=f"{kind}/{row['row_key']}",
                groups={"type": kind, "demonstration": folder})


VINOGROUND_QUESTION = re.compile(  # then a line that asks for the letter
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
        raise InputError(f"cannot read {path}: it holds a {type(rows).__name__}, no rows")
    return rows


# ------------------------------------- from a draft to a record; the command convert

SHORT_ANSWER = 3  # words: "3.5 square meters" is a number, a sentence with a number is text
MEASURE = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?) ?(m|cm|mm|km|ft|meters?|metres?|centimeters?|"
                     r"centimetres?|millimeters?|kilometers?|feet|foot|inch(?:es)?)\b")
VIDEO_SUFFIXES = {".mp4", ".webm", ".avi", ".mkv", ".mov", ".m4v"}
KEPT_FIELDS = ("process", *CLIP_FIELDS, "groups", "pair")  # of a draft, by its record
# The types of `convert`, in the order in which a text without options is one of them
CONVERTED_TYPES = ("multiple choice", "numerical", "free-form", "regression", "OCR")


class Dropped(Exception):
    """A question that is left out, for the reason given."""


def wanted_type(answer, options, wanted):
    """Returns the problem type of a question, among those that an entry wants, or None.

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
    """Returns the record, without problem_id, of a draft by an entry of a recipe. Raises Dropped if
    the question cannot be graded or the entry does not want its type."""
    problem, answer, wanted = found["problem"], found["answer"], entry["problem_type"]
    media = entry["media"].replace("{folder}", folder)
    path = os.path.normpath(os.path.join(media, found["medium"]))
    options = lettered(found["options"])
    kind = found.get("problem_type") or wanted_type(answer, options, wanted)
    measure = MEASURE.findall(answer)
    if not (options or "problem_type" in found) and "regression" in wanted and len(measure) == 1:
        (answer, unit), = measure  # the answer is a sentence; the model must know the unit
        problem, kind = f"{problem} (Unit: {unit})", "regression"
    if kind == "multiple choice":
        answer = choice_letter(answer, options) if answer else ""
    for reason, applies in (
            ("no medium", found["medium"] == "."),
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
    if record_problem({"problem_id": 0} | record):  # no stage would read it
        raise Dropped("malformed row")
    return record


def convert(args):
    """Writes all questions of a benchmark's own release as records, or raises InputError."""
    path, facts = Path(args.path), benchmark_facts().get(args.name, {})
    title, patterns = facts.get("title", args.name), facts.get("files", ["known file"])
    depth = next((pattern.count("/") for pattern in patterns if path.match(pattern)), 0)
    release = path if path.is_dir() else Path(os.path.abspath(path)).parents[depth]
    root, files, records = args.media_root or release, [path], []
    if path.is_dir():  # an earlier --out may lie there
        out = Path(args.out).resolve()
        found = ([file for file in path.glob(pattern) if file.resolve() != out]
                 for pattern in patterns)
        files = sorted(next(filter(None, found), ()))
    if not files:
        raise InputError(f"{path} has no {' or '.join(patterns)} of {title}: give the file of its "
                         "questions")
    media = os.path.relpath(release, root)
    if media.startswith(".."):
        raise InputError(f"--media_root {root} is no folder above {release}")
    entry = {"source": title, "problem_type": CONVERTED_TYPES, "media": media}
    make_folder_of(args.out)
    for file in files:
        before = len(records)
        try:
            for row in release_rows(file):
                for found in CONVERTERS[args.name](row, file):
                    name = f"{found.get('part') or file.stem}/{len(records) - before}"
                    records.append({"problem_id": found.get("problem_id", name)}
                                   | make_record(found, entry))
        except (*MALFORMED, Dropped) as error:
            raise InputError(f"{file} is not as {title} is released: {error!r}, after "
                             f"{len(records)} questions") from None
    write_whole({args.out: json_list(map(json.dumps, records))})
    print(f"{args.out}: {len(records):,} records; paths in it are relative to {root}")


# ------------------------------------------------- mix: from sources to a file of records

FIGURE_2 = ASSETS / "recipe.json"  # the paper's count of each source
ENTRY = {"source": str, "category": str, "format": str, "annotation": str, "media": str,
         "problem_type": list, "count": int}  # the keys of a recipe's entry
# A letter alone, but not the words "A" and "I", nor a unit: "B", "(a) and (b)"; or "option 2"
NAMED_LETTER = re.compile(r"(?<![\w'’])(?<!\d )(?:[b-hj-zB-HJ-Z]|[AI](?! [a-z]))(?![\w'’])"
                          r"|\([ai]\)|(?i:\b(?:option|choice|answer)s? \d)")
# Words that refer to other options. A word too many is safe: options then keep their order
OTHERS = re.compile(
    r"\b(?:all|none|both|neither|either|any|above|below|former|latter|other|others|these|those"
    r"|same|only|listed|mentioned|given|options?|choices?|answers?|(?:one|two) of)\b"
    r"|[以上前后两二都均皆全选没无有和或与及]", re.IGNORECASE)


def read_recipe(path) -> list[dict]:
    """Returns the entries of a recipe file. Raises InputError naming entry and key."""
    recipe = release_rows(path)
    for i, entry in enumerate(recipe):
        problem = entry_problem(entry)
        if problem is not None:
            name = entry.get("source", "no source") if isinstance(entry, dict) else "no entry"
            raise InputError(f"{path}: entry {i} ({name}): {problem}")
    return recipe


def entry_problem(entry) -> str | None:
    """Returns what is wrong with an entry of a recipe, naming the key, or None."""
    if not isinstance(entry, dict):
        return f"not a JSON object but {type(entry).__name__}"
    for key, kind in ENTRY.items():
        if not isinstance(entry.get(key), kind):
            return f"{key} must be a {kind.__name__}, not {entry.get(key)!r}"
    if entry["format"] not in CONVERTERS:
        return f"format {entry['format']!r} is none of {list(CONVERTERS)}"
    if os.path.isabs(entry["annotation"]) or not entry["annotation"]:
        return f"annotation {entry['annotation']!r} must be a path below --media_root"
    if entry["count"] < 0:
        return f"count {entry['count']} is negative"
    if not entry["problem_type"] or not set(entry["problem_type"]) <= GRADERS.keys():
        return f"problem_type {entry['problem_type']} must be one or more of {[*GRADERS]}"
    return None


def clip_of(record):
    """Returns a record's path and the part of the video that it is about."""
    return record["path"], *(record.get(field) for field in CLIP_FIELDS)


def question_key(record) -> tuple:
    """Returns a key that is equal for questions on one clip that differ only in case, punctuation
    or the order of options."""
    words = " ".join(re.findall(r"\w+", record["problem"].lower())) or record["problem"]
    options = sorted(option.partition(" ")[2].casefold() for option in record["options"])
    return clip_of(record), words, *options


def tail(path) -> str:
    """Returns a path's last folder and file, as in videos/video_7.mp4. Names of files alone would
    not do: CLEVRER and PerceptionTest share some."""
    return "/".join(Path(path).parts[-2:]).lower()


def content_hash(path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def benchmark_media(files, media_root, root):
    """Returns is_excluded(path): whether the file at this path below root is one of the evaluation
    files' media, by its path's tail or, if they are on this machine, by its content."""
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
        return tail(path) in tails or (  # sizes are compared so that few media need to be hashed
            bool(sizes) and os.path.isfile(full) and os.path.getsize(full) in sizes
            and content_hash(full) in hashes)
    return is_excluded


def candidates_of(entry, root, is_excluded, seen, counts):
    """Yields the records of an entry's files, each once, and counts dropped ones by reason."""
    convert = CONVERTERS[entry["format"]]
    for path in sorted(Path(root).glob(entry["annotation"])):
        for row in tqdm(release_rows(path), desc=entry["source"], unit=" rows", leave=False):
            counts["rows"] += 1
            try:
                drafts = list(convert(row, path))
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
                        raise Dropped("medium of a benchmark")
                    if key in seen:
                        raise Dropped("duplicate")
                except Dropped as reason:
                    counts[str(reason)] += 1
                else:
                    seen.add(key)
                    yield record


def spread(records, count, per_medium, rng, taken=()):
    """Returns at most `count` random records: first one of each file, then a second one of each, up
    to per_medium. taken: {path: number of questions that other entries have drawn}."""
    rounds, of_medium = [[] for _ in range(per_medium)], Counter(taken)
    for record in sorted(records, key=lambda record: rng.random()):
        if of_medium[record["path"]] < per_medium:
            rounds[of_medium[record["path"]]].append(record)
            of_medium[record["path"]] += 1
    return list(chain.from_iterable(rounds))[:count]


def shuffle_options(record, rng) -> dict:
    """Returns the record with its options in a random order, lettered A, B, C, ... If an option may
    refer to others, or the question or a thought may name a letter, it stays as it is."""
    texts = [option.partition(" ")[2] for option in record["options"]]
    names_letter = any(map(NAMED_LETTER.search, [record["problem"], *texts]))
    if not texts or "process" in record or names_letter or any(map(OTHERS.search, texts)):
        return record
    order = rng.permutation(len(texts)).tolist()
    answer = order.index(ord(record["solution"][len("<answer>")]) - ord("A"))
    return record | {"options": lettered(texts[i] for i in order),
                     "solution": f"<answer>{letter(answer)}</answer>"}


def mix(args):
    """Writes a mixture by a recipe: converts, cleans, samples and shuffles."""
    recipe, root = read_recipe(args.recipe), Path(args.media_root or Path(args.out).parent)
    make_folder_of(args.out)
    absent = [entry["annotation"] for entry in recipe if not any(root.glob(entry["annotation"]))]
    if absent and not (args.skip_missing and len(absent) < len(recipe)):
        raise InputError(f"--media_root {root} lacks {len(absent)} of {len(recipe)} annotation "
                         f"files: {', '.join(absent)}; correct the recipe, or build without them "
                         "with --skip_missing")
    is_excluded = benchmark_media(args.exclude, args.exclude_root, root)
    records, report = [], []
    chosen, taken = set(), Counter()  # question keys; questions of each file
    for i, entry in enumerate(tqdm(recipe, desc="mix")):
        rng, counts = np.random.default_rng([args.seed, i]), Counter()
        offered = candidates_of(entry, root, is_excluded, set(chosen), counts)
        drawn = spread(offered, entry["count"], args.per_medium, rng, taken)
        chosen.update(map(question_key, drawn))
        taken.update(record["path"] for record in drawn)
        records += [shuffle_options(record, rng) for record in drawn]
        report.append((entry, len(drawn), counts))
    stem = args.out.removesuffix(".json")
    val = f"{stem}_val.json"
    lines = {args.out: []} | ({val: []} if args.val_share else {})
    for number, record in enumerate(records):
        path = val if in_validation(record["path"], args) else args.out
        lines[path].append(json.dumps({"problem_id": number} | record))
    for mixed in lines.values():
        np.random.default_rng([args.seed, len(recipe)]).shuffle(mixed)
    text = mix_report(report)
    if not lines[args.out]:
        print(text)
        raise InputError(f"no record is left for {args.out}, which is not written: see above why "
                         "each entry's were dropped")
    write_whole({path: json_list(mixed) for path, mixed in lines.items()}
                | {f"{stem}.report.md": [text]})
    print(text, *(f"{path}: {len(mixed):,} records" for path, mixed in lines.items()), sep="\n")


def in_validation(path, args) -> bool:
    """Whether a file, with all its questions, is held out."""
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
    """Returns the file's size and time of change, and the flags of sampling. If one of them
    changes, the file is decoded again."""
    path = record["media_path"]
    file = [os.path.getsize(path), os.path.getmtime(path)] if os.path.exists(path) else []
    return file + [getattr(args, name) for name in ("max_frames", *SAMPLING_FLAGS)]


def judge_medium(args, record):
    """Decodes a record's file in a worker process. Returns the log row with the reason why it
    cannot be used, or None."""
    path, state, reason = record["media_path"], state_of(record, args), None
    try:
        load_vision_of(record, args)
    except MediaError as error:  # without the path, so that equal reasons are counted together
        reason = str(error).removeprefix(f"{path}: ").replace(path, "it")
    return {"clip": clip_of(record), "state": state, "reason": reason}


def check(args):
    """Decodes every image and video of a file of records, as training will. Writes the records that
    can be used and whose solution an answer can match. The same command resumes."""
    records = load_records(args.data, args.media_root)
    out = args.out or f"{os.path.splitext(args.data)[0]}_clean.json"
    stem = out.removesuffix(".json")
    log = Path(f"{stem}.media.jsonl")
    make_folder_of(out)
    good = {tuple(row["clip"]): row["state"] for row in whole_rows(log) if not row["reason"]}
    clips = {clip_of(record): record for record in records}
    todo = [record for clip, record in clips.items()
            if good.get(clip) != state_of(record, args)]
    reasons = {}  # of the clips that cannot be used
    loader = torch.utils.data.DataLoader(
        todo, batch_size=None, collate_fn=partial(judge_medium, args), in_order=False,
        num_workers=args.num_workers)
    with row_writer(log, len(todo)) as write:
        for row in loader:
            write([row])
            if row["reason"]:
                reasons[tuple(row["clip"])] = row["reason"]
    lost = defaultdict(list)  # reason -> dropped records; None -> usable ones
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
    """Returns {(category, source, types): [records, Figure 2's count]}. Sources that are not in
    Figure 2 count 0. A record's source is a folder of that name in data_source or path."""
    rows = {(e["category"], e["source"], ", ".join(e["problem_type"])): [0, e["count"]]
            for e in read_recipe(FIGURE_2)}
    by_source = defaultdict(list)
    for key in rows:
        by_source[plain(key[1])].append(key)
    for record in records:
        names = [*str(record.get("data_source")).split("/"), *record["path"].split("/")]
        known = next((by_source[plain(n)] for n in names if plain(n) in by_source),
                     [("not in Figure 2", names[0], "")])
        other = (*known[0][:2], record["problem_type"])  # of a type that Figure 2 does not have
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
    values = {"medium": [r["data_type"] for r in records],
              "problem type": [r["problem_type"] for r in records],
              "questions a medium": media.values(),
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
    add("path", metavar="PATH", help="the release's folder, or the file of its questions; where "
        "its media go: NAME's function in CONVERTERS")
    add("--out", required=True, help="file of records to write")
    add("--media_root", help="folder above the release that the records' paths are relative to; "
        "default: the release's own")
    add = command(mix, "mix", "records from the releases that a recipe names")
    add("--recipe", required=True, help="list of entries; assets/recipe.json is the paper's, "
        "assets/csv.json is for your own table")
    add("--out", required=True, help="file of records to write; a report goes beside it")
    add("--media_root", help="folder of the releases, which the recipe's and the records' paths "
        "are relative to; default: the folder of --out")
    add("--val_share", type=at_least(0, float, below=1), default=0.0,
        help="share of files held out, in <out>_val.json")
    add("--per_medium", type=above(0, int), default=20, help="most questions on one file")
    add("--exclude", nargs="*", default=[], help="evaluation files whose media must not be used")
    add("--exclude_root", help="folder of their media; default: each file's own")
    add("--skip_missing", action="store_true", help="do without entries that have no annotations")
    add("--seed", type=at_least(0, int), default=0, help="seed of every random draw")
    add = command(check, "check", "decode every image and video; keep what can be used")
    add("--data", required=True, help="records to check, .json or .jsonl")
    add("--out", help="file of usable records to write; default: <data>_clean.json")
    add_media_flags(add)
    add = command(stats, "stats", "the table of Figure 2 for a file of records")
    add("--data", required=True, help="records, .json or .jsonl")
    add("--media_root", help="folder of the records' paths; default: the data's")
    add("--out", help="Markdown file to write; default: print only")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(lambda args: args.run(args), parse_args)
