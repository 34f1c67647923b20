"""Data: what a record is and how a model sees it; and the command that builds the files.

First half, imported by every stage: the Video-R1 record, the prompt, the frames, the model's
inputs. One copy of each, because an experiment is spoilt silently when two copies drift.
Second half, a command:

    python build_data.py toy --out toy      clips, images, records, a tiny Qwen2.5-VL, args files

Shapes: T frames, C channels, H x W pixels, L tokens, B records.
"""
import argparse
import base64
import io
import json
import logging
import math
import mimetypes
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import traceback
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image

PROBLEM_TYPES = ("multiple choice", "numerical", "OCR", "free-form", "regression")
REQUIRED_FIELDS = ("problem_id", "problem", "data_type", "problem_type", "solution", "path")
JPEG_QUALITY = 95  # of frames sent to a server; Pillow's highest sensible value
PATCH = 28  # pixels: one visual token covers 28 x 28 (two merged 14 x 14 patches a side)

# The paper's Figure 11 in the wording of its release, letter for letter: a model trained
# with it elsewhere must be evaluated with it. (No full stop after "thought expressions".)
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


# What the readers of images and videos raise on a file that they cannot use.
MEDIA_FAULTS = (OSError, ValueError, AssertionError, RuntimeError, SyntaxError, EOFError,
                Image.DecompressionBombError)
# Bytes that decoding one medium may take; 64 frames of 3840 x 2160 pixels, as floats, fit.
DECODE_MEMORY = 16 * 2**30


class InputError(ValueError):
    """What the user gave cannot be used. Every script prints it as one line and exits with 1."""


class MediaError(ValueError):
    """One medium cannot be used: "path: reason". In training it costs that one sample."""


class Vision(NamedTuple):
    """A decoded medium: a video's frames with their timing, or an image."""
    frames: torch.Tensor | None   # (T, C, H, W) uint8, H and W multiples of 28; None for an image
    metadata: dict[str, Any]      # fps, frames_indices, total_num_frames; {} for an image
    image: Image.Image | None     # RGB, sides multiples of 28; None for a video


# ------------------------------------------------------------------------------ records

def load_records(path, media_root=None) -> list[dict]:
    """Reads a .json list or .jsonl file of Video-R1 records and checks every one of them.

    Each record gains `media_path`, its path below media_root (default: the file's own folder).
    Raises InputError naming file, problem_id and field; media are not opened here.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the records in {path}: {error}") from None
    try:
        if text.lstrip().startswith("["):
            records = json.loads(text)
        else:
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is neither a JSON list nor JSON lines: {error}") from None
    if not records:
        raise InputError(f"{path} holds no records")
    root = Path(media_root) if media_root else path.parent
    if not root.is_dir():
        raise InputError(f"media_root {root} is not a folder")
    root = os.path.abspath(root)
    for i, record in enumerate(records):
        problem = record_problem(record)
        if problem is None:
            record["media_path"] = os.path.normpath(os.path.join(root, record["path"]))
            record["media_root"] = root
            if not record["media_path"].startswith(root + os.sep):
                problem = f"field path: {record['path']!r} leaves media_root {root}"
        if problem is not None:
            name = record.get("problem_id", "absent") if isinstance(record, dict) else "absent"
            raise InputError(f"{path}: record {i} (problem_id {name}): {problem}")
    return records


def record_problem(record) -> str | None:
    """What is wrong with a record, naming the field; None when nothing is.

    >>> record_problem({"problem_id": 1, "problem": "?", "data_type": "video"})
    'field problem_type is missing'
    """
    if not isinstance(record, dict):
        return f"not a JSON object but {type(record).__name__}"
    for field in REQUIRED_FIELDS:
        if record.get(field) is None:
            return f"field {field} is missing"
    for field in REQUIRED_FIELDS[1:]:
        if not isinstance(record[field], str):
            return f"field {field} is not a string: {record[field]!r}"
    if record["data_type"] not in ("image", "video"):
        return f"field data_type is {record['data_type']!r}, not 'image' or 'video'"
    if record["problem_type"] not in PROBLEM_TYPES:
        return f"field problem_type is {record['problem_type']!r}, not one of {PROBLEM_TYPES}"
    if not re.fullmatch(r"\s*<answer>.*\S.*</answer>\s*", record["solution"], re.DOTALL):
        return (f"field solution is {record['solution']!r}: "
                "it must be a non-empty '<answer>...</answer>'")
    options = record.get("options") or []
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        return f"field options is not a list of strings: {options!r}"
    if record["problem_type"] == "multiple choice" and not options:
        return "field options is empty for a multiple-choice question"
    return None


def build_messages(record) -> list[dict]:
    """The conversation up to the answer: one user turn of medium and prompt (Figure 11)."""
    question = record["problem"]
    if record["problem_type"] == "multiple choice":
        question += "Options:\n" + "".join(option + "\n" for option in record["options"])
    prompt = TEMPLATE.format_map({"question": question}) + ANSWER_SUFFIX[record["problem_type"]]
    medium = {"type": record["data_type"], record["data_type"]: record["media_path"]}
    return [{"role": "user", "content": [medium, {"type": "text", "text": prompt}]}]


# ------------------------------------------------------------------------- media and inputs

def load_vision(record, *, max_frames, min_frames, fps, min_pixels, max_pixels) -> Vision:
    """Decodes a record's medium, once; shuffling works on what this returns.

    A video gives fps frames a second, at least min_frames and at most max_frames (an even
    number, spread evenly over the clip); each frame, or the image, is resized to between
    min_pixels and max_pixels, sides multiples of 28. Raises MediaError "path: reason".
    """
    path = record["media_path"]
    if not os.path.realpath(path).startswith(os.path.realpath(record["media_root"]) + os.sep):
        raise MediaError(f"{path}: a link that leaves media_root")
    try:
        if os.path.getsize(path) == 0:
            raise MediaError(f"{path}: the file is empty (0 bytes)")
        if record["data_type"] == "image":
            return Vision(None, {}, read_image(path, min_pixels, max_pixels))
        sampling = {"fps": fps, "min_frames": min_frames, "max_frames": max_frames,
                    "min_pixels": min_pixels, "max_pixels": max_pixels}
        clip = {key: record[key] for key in ("video_start", "video_end") if key in record}
        return read_video(path, **sampling, **clip)
    except MEDIA_FAULTS as error:
        if isinstance(error, MediaError):
            raise
        reason = str(error).strip().splitlines()
        raise MediaError(f"{path}: {reason[0] if reason else type(error).__name__}") from error


def load_vision_isolated(record, timeout, **limits) -> Vision:
    """load_vision in another process: a decoder that crashes, hangs for `timeout` seconds or
    asks for more than DECODE_MEMORY costs this one record, as a MediaError."""
    path, decoder = record["media_path"], load_vision_isolated.decoder
    if decoder is None or decoder.owner != os.getpid():  # a forked worker starts its own
        decoder = load_vision_isolated.decoder = Decoder()
    try:
        decoder.pipe.send((record, timeout, limits))
        if not decoder.pipe.poll(timeout):
            os.kill(decoder.pid, signal.SIGKILL)  # not waited for: it may hang in the kernel
            load_vision_isolated.decoder = None  # the next record gets a new one
            raise MediaError(f"{path}: decoding took more than {timeout:g} seconds")
        answer = decoder.pipe.recv()
    except (EOFError, ConnectionError):
        load_vision_isolated.decoder = None
        status = os.waitstatus_to_exitcode(os.waitpid(decoder.pid, 0)[1])
        raise MediaError(f"{path}: its decoder died (exit status {status})") from None
    if isinstance(answer, str):
        raise MediaError(answer)
    frames, metadata, image = answer
    return Vision(None if frames is None else torch.from_numpy(frames), metadata, image)


load_vision_isolated.decoder = None  # started by the first call in a process


class Decoder:
    """A child process that runs load_vision on what comes through its pipe, until that closes.

    Forked by hand: PyTorch's data workers are not allowed to start multiprocessing's processes.
    """

    def __init__(self):
        self.owner = os.getpid()
        self.pipe, pipe = multiprocessing.Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self.pipe.close()
            try:
                self.serve(pipe)
            except BaseException:  # nothing may return into the parent's code from here
                traceback.print_exc()
            os._exit(1)
        pipe.close()

    def serve(self, pipe):
        torch.set_num_threads(1)  # the parent's threads did not come along
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the parent decides when to stop
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + DECODE_MEMORY, resource.RLIM_INFINITY))
        while True:
            try:
                record, timeout, limits = pipe.recv()
            except (EOFError, ConnectionError):
                os._exit(0)
            signal.alarm(math.ceil(timeout) + 1)  # if the parent is no longer there to stop it
            try:
                vision = load_vision(record, **limits)
                frames = None if vision.frames is None else vision.frames.numpy()
                answer = (frames, vision.metadata, vision.image)
            except MediaError as error:
                answer = str(error)
            except MemoryError:
                answer = f"{record['media_path']}: decoding takes more than {DECODE_MEMORY} bytes"
            signal.alarm(0)
            pipe.send(answer)


def read_image(path, min_pixels, max_pixels) -> Image.Image:
    """The image as qwen-vl-utils resizes it, RGB."""
    from qwen_vl_utils import vision_process
    with Image.open(path) as image:
        if image.mode.startswith("I"):  # 16 bits, of which the conversion would keep the low 8
            image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("pixels are floating-point numbers: save it with 8 bits a channel")
        return vision_process.fetch_image(
            {"image": image, "min_pixels": min_pixels, "max_pixels": max_pixels})


def read_video(path, **sampling) -> Vision:
    """The video's frames as qwen-vl-utils samples and resizes them, decoded by decord."""
    os.environ.setdefault("FORCE_QWENVL_VIDEO_READER", "decord")
    from decord import DECORDError
    from qwen_vl_utils import vision_process

    def reraise(element):
        raise  # qwen-vl-utils calls its fallback inside the `except` of the real reader's error
    vision_process.VIDEO_READER_BACKENDS["torchvision"] = reraise
    vision_process.logger.setLevel(logging.ERROR)  # its warnings announce that same fallback
    try:
        frames, metadata = vision_process.fetch_video(
            {"video": path, **sampling}, return_video_metadata=True)  # (T, C, H, W) float, 0-255
    except DECORDError as error:
        raise ValueError(f"not a readable video: {error}") from error
    except ValueError as error:
        if "nframes should" in str(error):  # qwen-vl-utils' words for a clip of one frame
            raise ValueError("the clip has fewer than 2 frames") from error
        raise
    return Vision(frames.to(torch.uint8), metadata, None)  # lossless: resizing rounded already


def encode(processor, record, vision: Vision, device=None) -> dict[str, torch.Tensor]:
    """The model's inputs for one record, prompt up to the assistant's first token.

    Returns input_ids, attention_mask, mm_token_type_ids (1, L) and pixel_values, image_grid_thw
    or pixel_values_videos (patches, values a patch), video_grid_thw, second_per_grid_ts. Every
    stage builds its inputs here: without video_metadata the processor would silently give all
    frames the same temporal position.
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
    return {key: value.to(device) for key, value in inputs.items()}


def api_messages(record, vision: Vision, video_url="") -> list[dict]:
    """build_messages for a server that speaks OpenAI's protocol: the same text and the pixels
    that load_vision decoded, as data: URLs (an image as PNG, sampled frames as JPEG pictures).

    Such a server takes the frames of a video for single pictures without timing. video_url lets
    it sample the video itself: "data" sends the file; anything else is a prefix to which the
    record's path is appended, for a server that can read it (file:///srv/data or http://...).
    A clip within a file (video_start, video_end) always goes as frames.
    """
    *_, text = build_messages(record)[0]["content"]
    part = record.keys() & {"video_start", "video_end"}
    if vision.frames is None:
        media = [("image_url", picture_url(vision.image, "PNG"))]
    elif video_url and not part:
        media = [("video_url", whole_url(record, video_url))]
    else:
        frames = vision.frames.permute(0, 2, 3, 1).numpy()  # (T, H, W, C)
        media = [("image_url", picture_url(Image.fromarray(frame), "JPEG")) for frame in frames]
    content = [{"type": kind, kind: {"url": url}} for kind, url in media]
    return [{"role": "user", "content": [*content, text]}]


def picture_url(image, kind) -> str:
    """A picture as a data: URL; kind is PNG or JPEG."""
    file = io.BytesIO()
    image.save(file, kind, **({"quality": JPEG_QUALITY} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def whole_url(record, video_url) -> str:
    """The URL of a record's whole video: its bytes for "data", else its path below video_url."""
    if video_url != "data":
        return f"{video_url.rstrip('/')}/{quote(os.path.normpath(record['path']))}"
    kind = mimetypes.guess_type(record["path"])[0] or "video/mp4"
    content = base64.b64encode(Path(record["media_path"]).read_bytes()).decode()
    return f"data:{kind};base64,{content}"


def image_as_video(processor, inputs) -> dict[str, torch.Tensor]:
    """encode()'s inputs with an image turned into a video of one time step.

    The model computes the same (the placeholder's id is overwritten by the visual features, and
    positions agree), but a batch of images and videos then runs the vision tower once, as a
    batch of videos does. Under ZeRO-3 ranks whose numbers of calls differ wait for ever.
    """
    if "image_grid_thw" not in inputs:
        return inputs
    inputs = dict(inputs)
    ids, kinds = inputs["input_ids"], inputs["mm_token_type_ids"]  # (1, L)
    inputs["input_ids"] = ids.masked_fill(ids == processor.image_token_id, processor.video_token_id)
    inputs["mm_token_type_ids"] = kinds.masked_fill(kinds == 1, 2)
    inputs["pixel_values_videos"] = inputs.pop("pixel_values")
    inputs["video_grid_thw"] = inputs.pop("image_grid_thw")
    inputs["second_per_grid_ts"] = torch.ones(1)  # of no consequence: there is one time step
    return inputs


def encode_blank(processor) -> dict[str, torch.Tensor]:
    """Inputs of a black picture and an empty question.

    Never trained on: a rank that has nothing usable in a step runs it with weight zero, so that
    it makes the same calls as the other ranks.
    """
    record = {"problem": "", "problem_type": "free-form", "data_type": "image", "media_path": ""}
    return encode(processor, record, Vision(None, {}, Image.new("RGB", (2 * PATCH, 2 * PATCH))))


def pad_batch(samples, pad_values, side) -> dict[str, torch.Tensor]:
    """Joins B encoded records into one batch, padding the (1, L) entries on `side`.

    >>> a, b = {"input_ids": torch.tensor([[5, 6]])}, {"input_ids": torch.tensor([[7]])}
    >>> pad_batch([a, b], {"input_ids": 0}, "left")["input_ids"].tolist()
    [[5, 6], [0, 7]]

    pad_values maps the keys that are padded to their filling; other keys are concatenated.
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


def seeded_generator(*key, device="cpu") -> torch.Generator:
    """A random generator that depends on every number of `key`, as in (seed, step, rank)."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) % 2**63)


def read_args_line(line) -> list[str]:
    """One line of an @file: `--flag=value`, or nothing when blank or a # comment."""
    line = line.strip()
    return [] if not line or line.startswith("#") else [line]


def provenance() -> dict:
    """What a result owes to its software: package versions and this repository's commit."""
    packages = ("torch", "transformers", "deepspeed", "qwen-vl-utils", "decord")
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent,
                                capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # no git on this machine
        commit = ""
    return {"versions": {package: version(package) for package in packages},
            "git_commit": commit or None}


def check_limits(args):
    """InputError for flags of frames and pixels that no medium could meet."""
    for low, high in (("min_frames", "max_frames"), ("min_pixels", "max_pixels"),
                      ("image_min_pixels", "image_max_pixels")):
        if not 0 < getattr(args, low) <= getattr(args, high, math.inf):
            raise InputError(f"--{low} {getattr(args, low)} must be positive and not above "
                             f"--{high} {getattr(args, high)}")
    if args.fps <= 0:
        raise InputError(f"--fps {args.fps} must be positive")


def sampling_of(args, record) -> dict:
    """load_vision's keyword arguments for a record, from the flags that every stage shares."""
    image = record["data_type"] == "image"  # images have their own pair of limits
    return {"max_frames": args.max_frames, "min_frames": args.min_frames, "fps": args.fps,
            "min_pixels": args.image_min_pixels if image else args.min_pixels,
            "max_pixels": args.image_max_pixels if image else args.max_pixels}


# ------------------------------------------------------------------- the command: the toy

TOY_SIDE, TOY_FRAMES, TOY_FPS = 28, 8, 2  # pixels, frames a clip, frames a second
TOY_COLOURS = {"red": (230, 40, 40), "green": (40, 210, 60), "blue": (60, 80, 240),
               "yellow": (230, 220, 50)}
TOY_OPPOSITE = {"left": "right", "right": "left"}
TOY_WORDS = ("cat", "dog", "sun", "map", "key", "cup", "hat", "box")
TOY_BLOCK, TOY_NOISE, TOY_DARK = 8, 6.0, 50  # block side, noise std, brightest background
TOY_LOOK = 0.7  # share of the cold start's thoughts that use a telling colour, not the motion
TOY_VOCABULARY = 800  # tokens, before the special ones: every word of the toy is one
TOY_PLAIN = {"white": (240, 240, 240), "purple": (170, 60, 200)}  # name no direction
# The mixture of each file, in percent. "agree": the block's colour names its direction, as every
# telling colour does in the cold start; "conflict": it names another one, in half of the direction
# questions of train and test; "plain": it names none.
TOY_MIX = {
    "cot": {"direction_agree": 30, "direction_plain": 10, "describe": 26, "first": 8, "end": 9,
            "count": 5, "word": 7, "colour": 5},
    "train": {"direction_agree": 36, "direction_conflict": 36, "describe": 6, "first": 8, "end": 6,
              "count": 3, "word": 2, "colour": 3},
    "test": {"direction_agree": 26, "direction_conflict": 26, "describe": 12, "first": 12,
             "end": 8, "count": 6, "word": 4, "colour": 6},
}
# Qwen2.5's own special tokens, those that the model or the chat template uses.
TOY_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
               "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
# The same text as Qwen2.5-VL's template renders, for what a record needs.
TOY_CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant."
    "<|im_end|>\n{% endif %}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] in ['image', 'video'] %}"
    "<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def toy_canvas(rng, count):
    """(count, H, W, 3) float frames: one dark random background with fresh noise in each."""
    background = rng.uniform(0, TOY_DARK, size=3)
    return background + rng.normal(0, TOY_NOISE, (count, TOY_SIDE, TOY_SIDE, 3))


def toy_block(frames, boxes, colour):
    """Paints a block of the named colour at (x, y), its top left corner, one box a frame."""
    paint = (TOY_COLOURS | TOY_PLAIN)[colour]
    for frame, (x, y) in zip(frames, boxes):
        frame[round(y):round(y) + TOY_BLOCK, round(x):round(x) + TOY_BLOCK] = paint


def toy_motion(rng, colour, direction):
    """(T, H, W, 3) frames of a block that crosses the picture to the left or right."""
    span = TOY_SIDE - TOY_BLOCK
    x = np.linspace(rng.uniform(0, span / 5), span - rng.uniform(0, span / 5), TOY_FRAMES)
    x, y = x if direction == "right" else span - x, rng.uniform(0, span)
    frames = toy_canvas(rng, TOY_FRAMES)
    toy_block(frames, [(v, y) for v in x], colour)
    return frames


def toy_options(names):
    """Lettered options: ["A. red", "B. green", ...]."""
    return [f"{chr(ord('A') + i)}. {name}" for i, name in enumerate(names)]


def toy_question(rng, kind):
    """One question: (frames (T, H, W, 3), problem_type, problem, options, answer, thought)."""
    colours, directions = list(TOY_COLOURS), list(TOY_OPPOSITE)
    colour, direction = str(rng.choice(colours)), str(rng.choice(directions))
    if kind.startswith("direction"):
        hints = colours[directions.index(direction)::len(directions)]  # name this direction
        others = [name for name in colours if name not in hints]
        colour = {"direction_agree": str(rng.choice(hints)),
                  "direction_conflict": str(rng.choice(others)),
                  "direction_plain": str(rng.choice(list(TOY_PLAIN)))}[kind]
        watch = f"watch: it starts {TOY_OPPOSITE[direction]} and ends {direction}, so {direction}"
        look = f"look: it is {colour}, so {direction}"
        thought = look if colour in TOY_COLOURS and rng.random() < TOY_LOOK else watch
        return (toy_motion(rng, colour, direction), "multiple choice",
                "Which way does the block move?", toy_options(directions),
                "ABCD"[directions.index(direction)], thought)
    if kind == "describe":
        return (toy_motion(rng, colour, direction), "free-form", "What happens in the video?", [],
                f"a {colour} block moves {direction} in the video",
                f"watch: it starts {TOY_OPPOSITE[direction]} and ends {direction}")
    x, y = rng.uniform(0, TOY_SIDE - TOY_BLOCK, size=2)
    if kind == "first":
        then = str(rng.choice([name for name in colours if name != colour]))
        frames, switch = toy_canvas(rng, TOY_FRAMES), TOY_FRAMES // 2
        toy_block(frames[:switch], [(x, y)] * switch, colour)
        toy_block(frames[switch:], [(x, y)] * (TOY_FRAMES - switch), then)
        return (frames, "multiple choice", "Which colour comes first?", toy_options(colours),
                "ABCD"[colours.index(colour)], f"watch: {colour} then {then}")
    if kind == "end":
        start, end = rng.choice(10, size=2, replace=False)  # tenths of the way to the right
        frames, unit = toy_canvas(rng, TOY_FRAMES), (TOY_SIDE - TOY_BLOCK) / 9
        toy_block(frames, [(v, y) for v in np.linspace(start, end, TOY_FRAMES) * unit], colour)
        return (frames, "regression", "Where does the block end, from 0 on the left to 9?", [],
                str(end), f"watch: it starts {start} and ends {end}")
    if kind == "colour":
        frames = toy_canvas(rng, TOY_FRAMES)
        toy_block(frames, [(x, y)] * TOY_FRAMES, colour)
        return (frames, "multiple choice", "Which colour is the block?", toy_options(colours),
                "ABCD"[colours.index(colour)], f"look: it is {colour}")
    return toy_image(rng, kind, colour)


def toy_image(rng, kind, colour):
    """The two image tasks, in toy_question's form with one frame: count blocks, read a word."""
    frames = toy_canvas(rng, 1)
    if kind == "count":
        n = int(rng.integers(1, 5))
        corners = rng.permutation([(2, 2), (18, 2), (2, 18), (18, 18)])[:n]
        for corner in corners:
            toy_block(frames, [corner], colour)
        return (frames, "numerical", "How many blocks are there?", [], str(n),
                f"look: {' '.join(['block'] * n)}")
    from PIL import ImageDraw, ImageFont
    word = str(rng.choice(TOY_WORDS))
    image = Image.fromarray(frames[0].clip(0, 255).astype(np.uint8))
    ImageDraw.Draw(image).text((3, 7), word, fill="white",
                               font=ImageFont.load_default(size=12))
    return (np.asarray(image)[None], "OCR", "What is written in the picture?", [], word,
            f"look: it says {word}")


def write_video(path, frames, fps):
    """Encodes (T, H, W, 3) uint8 frames as an H.264 mp4, the same bytes each time."""
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


def toy_records(out, split, count, seed):
    """Draws `count` questions of a split, writes their media below `out`, yields the records."""
    rng = np.random.default_rng([seed, sorted(TOY_MIX).index(split)])
    kinds, shares = list(TOY_MIX[split]), np.array(list(TOY_MIX[split].values()))
    for i, kind in enumerate(rng.choice(kinds, size=count, p=shares / shares.sum())):
        frames, problem_type, problem, options, answer, thought = toy_question(rng, kind)
        frames = frames.clip(0, 255).astype(np.uint8)
        medium = "image" if len(frames) == 1 else "video"
        path = f"media/{split}_{i:05d}.{'png' if medium == 'image' else 'mp4'}"
        if medium == "image":
            Image.fromarray(frames[0]).save(out / path)
        else:
            write_video(out / path, frames, TOY_FPS)
        record = {"problem_id": i, "problem": problem, "data_type": medium,
                  "problem_type": problem_type, "options": options,
                  "solution": f"<answer>{answer}</answer>", "path": f"./{path}",
                  "data_source": f"toy/{kind}"}
        yield record | ({"process": f"<think>{thought}</think>"} if split == "cot" else {})


def toy_tokenizer(texts):
    """A byte-level BPE trained on the toy's texts, with Qwen2.5's pre-tokenization and tokens."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=TOY_VOCABULARY, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    model = json.loads(tokenizer.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]],
        eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>",
        additional_special_tokens=list(TOY_SPECIAL))


def toy_processor(tokenizer):
    """Qwen2.5-VL's processor with the toy's tokenizer and no lower bound on the picture's size."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor
    size = {"shortest_edge": PATCH**2, "longest_edge": 768 * PATCH**2}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(size)), tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=dict(size), cap_pixels_per_frame=False),
        chat_template=TOY_CHAT_TEMPLATE)


def toy_model(tokenizer, seed, hidden=96, layers=3, heads=4, kv_heads=2, mlp=256,
              vision_hidden=64, vision_depth=2, vision_mlp=128):
    """A randomly initialised Qwen2.5-VL; the defaults give about 600,000 parameters."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    token = tokenizer.convert_tokens_to_ids
    spread = {"initializer_range": 0.05}  # with Qwen's 0.02 so small a model learns nothing
    end = [token("<|im_end|>"), token("<|endoftext|>")]
    share = hidden // heads // 2 // 3  # of the rotary frequencies, to time, height and width
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": hidden, "intermediate_size": mlp,
            "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "max_position_embeddings": 8192,
            "bos_token_id": None, "eos_token_id": end, "pad_token_id": end[1],
            "tie_word_embeddings": True, **spread,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section":
                                [hidden // heads // 2 - 2 * share, share, share]}},
        vision_config={
            "depth": vision_depth, "hidden_size": vision_hidden, "intermediate_size": vision_mlp,
            "num_heads": 4, "out_hidden_size": hidden, "patch_size": 14, "window_size": 112,
            "fullatt_block_indexes": [vision_depth - 1], **spread},
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"), tie_word_embeddings=True, **spread)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = end[1]
    return model


def toy_args_files(out):
    """The stages' configurations: what departs from the paper's, because the toy is small."""
    common = f"""\
--media_root={out}
--min_pixels={PATCH**2}
--max_pixels={PATCH**2}
--image_min_pixels={PATCH**2}
--image_max_pixels={PATCH**2}
"""
    return {"ds_zero0.json": """\
{"zero_optimization": {"stage": 0}, "bf16": {"enabled": "auto"}}
""", "sft.args": f"""\
# the cold start: python sft.py @{out}/sft.args
--model={out}/model
--data={out}/cot.json
--output={out}/sft
{common}\
# one process has nothing to shard; on two, add --deepspeed_config ds_zero3.json
--deepspeed_config={out}/ds_zero0.json
--num_train_epochs=9
--max_frames={TOY_FRAMES}
--per_rank_batch_size=32
--gradient_accumulation_steps=1
--learning_rate=1.5e-3
--lr_schedule=linear
--warmup_steps=50
--adam_beta2=0.98
--max_grad_norm=1
""", "tgrpo.args": f"""\
# T-GRPO: python tgrpo.py @{out}/tgrpo.args
--model={out}/sft
--data={out}/train.json
--output={out}/tgrpo
{common}\
--max_frames={TOY_FRAMES}
# one process has nothing to shard; on two, add --deepspeed_config ds_zero3.json
--deepspeed_config={out}/ds_zero0.json
--prompts_per_rank=12
--max_steps=150
--learning_rate=4e-4
--lr_schedule=linear
--warmup_steps=10
--adam_beta2=0.99
--max_grad_norm=1
--max_new_tokens=40
--chunk_size=8
# responses are about 20 tokens long, so the window of the length reward is too
--l_min=16
--l_max=24
--save_steps=50
""", "evaluate.args": f"""\
# before: python evaluate.py @{out}/evaluate.args --model {out}/sft --output {out}/eval_sft
--benchmark=toy={out}/test.json
--frames={TOY_FRAMES}
{common}\
--max_new_tokens=40
--batch_size=64
"""}


def build_toy(args):
    """Writes the toy below args.out: media/, cot.json, train.json, test.json, model/, *.args."""
    out = Path(args.out)
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty: name another folder, or remove it first")
    out.mkdir(parents=True, exist_ok=True)
    (out / "media").mkdir()
    texts = []
    for split, count in (("cot", args.cot), ("train", args.train), ("test", args.test)):
        records = list(toy_records(out, split, count, args.seed))
        (out / f"{split}.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
        print(f"{out}/{split}.json: {count} records, "
              + ", ".join(f"{n} {kind}" for kind, n in sorted(Counter(
                  record["data_source"] for record in records).items())))
        if split == "cot":
            for record in records:
                prompt = build_messages(record | {"media_path": ""})[0]["content"][1]["text"]
                texts.append(f"{prompt}\n{record['process']}\n{record['solution']}")
    tokenizer = toy_tokenizer(texts)
    model = toy_model(tokenizer, args.seed)
    model.save_pretrained(out / "model")
    toy_processor(tokenizer).save_pretrained(out / "model")
    for name, text in toy_args_files(out).items():
        (out / name).write_text(text, encoding="utf-8")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{out}/model: {parameters:,} parameters, {len(tokenizer)} tokens")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     fromfile_prefix_chars="@")
    parser.convert_arg_line_to_args = read_args_line
    commands = parser.add_subparsers(dest="command", required=True)
    toy = commands.add_parser("toy", help="the embedded default: generated data, a tiny model")
    toy.add_argument("--out", default="toy", help="folder to write; must be empty or absent")
    toy.add_argument("--cot", type=int, default=2400, help="questions for the cold start")
    toy.add_argument("--train", type=int, default=1600, help="questions for T-GRPO")
    toy.add_argument("--test", type=int, default=400, help="held-out questions")
    toy.add_argument("--seed", type=int, default=0, help="seed of every random draw")
    toy.set_defaults(run=build_toy)
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        args = parse_args()
        args.run(args)
    except InputError as error:
        sys.exit(f"build_data.py: {error}")
