"""Annotation: chains of thought by a large model, filtered by rules (paper, section 3.1).

    python annotate.py --data train.json --out cot.json --model Qwen/Qwen2.5-VL-72B-Instruct \
        --api_base http://localhost:8000/v1
    deepspeed annotate.py --data train.json --out cot.json --model Qwen/Qwen2.5-VL-7B-Instruct

The model gets the prompt of every stage (build_data.build_messages) and answers --samples times.
Two engines: any server that speaks OpenAI's protocol (--api_base), or transformers on this
machine, each rank answering a share with the whole model, or with a part of it and
--deepspeed_config ds_zero3.json. A response is kept if, in this order,

    truncated     it ended by itself, within --max_new_tokens
    format        it is one <think> block, then one <answer> block, and nothing else
    answer        the answer has its type's form: one option, one number, some text
    accuracy      its accuracy reward is above --min_accuracy
    length        its thought has --min_think to --max_think characters
    refusal       it does not say that it is an AI, or that it cannot see or help
    leak          it does not recite the prompt's instructions
    language      its letters are mostly of the question's script (Latin, Han, Arabic, ...)
    repetition    it does not go round in circles

and a record gets the best response that passes. Not tested: whether the thought is true.

--out is a file of records with `process`, ready for sft.py. Beside cot.json: `cot.rank<r>.jsonl`,
each response as it came; `cot.rejected.jsonl`, responses of the records that were left out, with
the reason; `cot.report.md`, the counts. The same command resumes by problem_id, on any number of
ranks, and asks only for what failed; other thresholds filter the same responses again.

Shapes: B records of a batch, L tokens.
"""
import argparse
import hashlib
import json
import os
import re
import resource
import socket
import sys
import unicodedata
import warnings
from collections import Counter
from datetime import timedelta
from functools import partial
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor

from build_data import (ANSWER_SUFFIX, TEMPLATE, InputError, MediaError, api_messages, as_in_file,
                        ask_model, ask_server, check_answering, encode, encode_blank,
                        generation_config, image_as_video, json_list, load_records,
                        load_vision_isolated, make_folder_of, markdown, model_hash, read_args_line,
                        read_rows, row_writer, sampling_of, skip_row, unanswered, write_whole)
from rewards import (WORD, accuracy_reward, choice_letter, extract_answer, format_reward,
                     parse_number)

LONGEST_WAIT = timedelta(days=7)  # of the first rank to finish for the last one
REASONS_SHOWN = 20  # for which records got no response, in the report
RUN = 6  # words: a shorter run is shared with the prompt, or repeated, by chance

REFUSED = r"(?:assist|help with|(?:see|view|access|watch|open) (?:the|this|any) (?:video|image))"
REFUSAL = re.compile(
    r"\bas an? (?:ai\b|artificial intelligence|(?:large )?language model|text[- ]based)"
    rf"|\bi(?:'m| am) (?:sorry\b|just an? ai\b|(?:unable|not able) to {REFUSED})"
    rf"|\bi (?:cannot|can't|can not|could not|couldn't) {REFUSED}"
    r"|\bno (?:image|video)s? (?:was|were|is|has been|have been) (?:provided|attached|given)\b"
    r"|抱歉|对不起|作为(?:一个|一名)?(?:人工智能|AI|语言模型)|无法(?:查看|观看)",
    re.IGNORECASE)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     fromfile_prefix_chars="@")
    parser.convert_arg_line_to_args = read_args_line
    add = parser.add_argument
    # data and model
    add("--model", required=True, help="Hugging Face directory or name; with --api_base, the "
                                       "name that the server knows it by")
    add("--data", required=True, help="records to annotate, .json or .jsonl")
    add("--media_root", help="folder that the records' paths are relative to; default: the data's")
    add("--out", required=True, help="file of annotated records to write; its side files go beside")
    # frames and pixels
    add("--max_frames", type=int, default=16, help="most frames of a video")
    add("--min_frames", type=int, default=4, help="fewest frames of a video")
    add("--fps", type=float, default=2.0, help="frames a second of video, within those bounds")
    add("--min_pixels", type=int, default=4 * 28 * 28, help="fewest pixels of a video frame")
    add("--max_pixels", type=int, default=128 * 28 * 28, help="most pixels of a video frame")
    add("--image_min_pixels", type=int, default=4 * 28 * 28, help="fewest pixels of an image")
    add("--image_max_pixels", type=int, default=512 * 28 * 28, help="most pixels of an image")
    # responses; the released annotation had top_p 0.95 and 512 new tokens
    add("--samples", type=int, default=1, help="responses to a record; the best is kept")
    add("--temperature", type=float, default=1.0, help="sampling temperature; 0: greedy")
    add("--top_p", type=float, default=0.95, help="nucleus sampling; 1: off")
    add("--max_new_tokens", type=int, default=768, help="most tokens of a response")
    # the filter
    add("--min_accuracy", type=float, default=0.6, help="a response's reward must be above this")
    add("--min_think", type=int, default=40, help="fewest characters of a thought")
    add("--max_think", type=int, default=6000, help="most characters of a thought")
    add("--min_language", type=float, default=0.7,
        help="smallest share of a response's letters that are of the question's script")
    add("--max_repetition", type=float, default=0.3,
        help="largest share of a thought's runs of 6 words that occurred before in it")
    # a server
    add("--api_base", help="answer through this server, as in http://localhost:8000/v1; the key, "
                           "if it wants one, is read from the environment: OPENAI_API_KEY")
    add("--api_timeout", type=float, default=600, help="seconds that an answer may take")
    add("--api_retries", type=int, default=6, help="times a failed request is repeated")
    add("--concurrency", type=int, default=32, help="requests of a rank under way together")
    add("--video_url", default="", help="how videos reach the server: '' as sampled frames; data: "
                                        "as files; else a URL prefix that the server can read")
    # the machine; without --deepspeed_config every rank holds the whole model
    add("--batch_size", type=int, default=8, help="records answered together on a rank")
    add("--attn_implementation", default="sdpa", help="sdpa, eager or flash_attention_2")
    add("--deepspeed_config",
        help="DeepSpeed's JSON file of stage 3: splits the model over the ranks")
    add("--num_workers", type=int, default=2, help="processes that decode media ahead of need")
    add("--decode_timeout", type=float, default=120, help="seconds until a medium is given up")
    add("--seed", type=int, default=0, help="seed of every random draw")
    add("--timeout_minutes", type=float, default=30, help="longest wait for another rank")
    add("--local_rank", type=int, default=-1, help="set by the deepspeed launcher; not used")
    return parser.parse_args(argv)


def check_flags(args):
    """Raises InputError for values that no run can work with."""
    check_answering(args)
    if args.samples > 1 and not args.temperature:
        raise InputError(f"--samples {args.samples} at --temperature 0 are all the same")
    if args.api_base and args.deepspeed_config:
        raise InputError("--deepspeed_config is for a model on this machine, not for --api_base")
    if Path(args.out).suffix != ".json":
        raise InputError(f"--out {args.out} must end in .json")


# ------------------------------------------------------------------- the filter, pure functions

def think_of(response):
    """The text of a well-formed response's thought."""
    return response.partition("<think>")[2].partition("</think>")[0].strip()


def runs_of(text):
    """Every run of 6 words of a text in lower case, in order; each Han or kana character is a word.

    >>> runs_of("Let me think, it is 小狗")
    [('let', 'me', 'think', 'it', 'is', '小'), ('me', 'think', 'it', 'is', '小', '狗')]
    """
    words = WORD.findall(text.lower())
    return list(zip(*(words[i:] for i in range(RUN))))


INSTRUCTIONS = {run for suffix in ANSWER_SUFFIX.values()
                for run in runs_of(TEMPLATE.replace("{question}", "") + suffix)}


def repetition(text):
    """The share of the runs of 6 words that occurred before in the text, in [0, 1].

    >>> repetition("a b c d e f"), repetition("wait " * 15)
    (0.0, 0.9)
    """
    runs = runs_of(text)
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def scripts_of(text):
    """How many letters of each script a text has; Han, kana and Hangul count as one script.

    >>> scripts_of("Δx = 2, 小狗")
    Counter({'EAST ASIAN': 2, 'GREEK': 1, 'LATIN': 1})
    """
    scripts = Counter()
    for letter, count in Counter(text).items():
        if letter.isalpha():
            script = unicodedata.name(letter, "UNKNOWN").split()[0].split("-")[0]
            asian = script in ("CJK", "HIRAGANA", "KATAKANA", "HANGUL")
            scripts["EAST ASIAN" if asian else script] += count
    return scripts


def in_language(response, problem):
    """The share of a response's letters that are of the problem's most frequent script.

    It tells Chinese from English, not French from English.

    >>> in_language("这是 a dog", "What is it?"), in_language("B", "3 + 4 = ?")
    (0.6666666666666666, 1.0)
    """
    asked, said = scripts_of(problem), scripts_of(response)
    if not asked or not said:
        return 1.0
    return said[asked.most_common(1)[0][0]] / said.total()


def has_form(answer, record):
    """Whether the answer is what its problem type asks for: one option, one number, some text."""
    if record["problem_type"] == "multiple choice":
        return bool(choice_letter(answer, record["options"]))
    if record["problem_type"] in ("numerical", "regression"):
        return parse_number(answer) is not None
    return bool(answer)


def reject_reason(response, truncated, record, args):
    """Why a response is not kept, as one of the words in this file's first lines; None: it is."""
    think = think_of(response)
    failed = {
        "truncated": truncated,
        "format": not format_reward(response),
        "answer": not has_form(extract_answer(response), record),
        "accuracy": accuracy_reward(response, record) <= args.min_accuracy,
        "length": not args.min_think <= len(think) <= args.max_think,
        "refusal": REFUSAL.search(response),
        "leak": not INSTRUCTIONS.isdisjoint(runs_of(response)),
        "language": in_language(think, record["problem"]) < args.min_language,
        "repetition": repetition(think) > args.max_repetition}
    return next((reason for reason, is_so in failed.items() if is_so), None)


def choose(record, row, args):
    """(the annotated record or None, [(reason or None, response), ...]) from a record's responses.

    Of the responses that pass, the first with the highest accuracy reward is taken.
    """
    judged = [(reject_reason(text, cut, record, args), text)
              for text, cut in zip(row["output"], row["truncated"])]
    good = [text for reason, text in judged if reason is None]
    if not good:
        return None, judged
    best = max(good, key=lambda text: accuracy_reward(text, record))
    return as_in_file(record) | {"process": f"<think>{think_of(best)}</think>"}, judged


# --------------------------------------------------------------------------------- data

def prompt_of(processor, args, record):
    """A record with its encoded inputs, or (without a processor) with the messages that a server
    gets; or the line of one whose medium cannot be used. Runs in worker processes."""
    try:
        vision = load_vision_isolated(record, args.decode_timeout, **sampling_of(args, record))
    except MediaError as error:
        return skip_row(record, error)
    if processor is None:
        return {"record": record, "messages": api_messages(record, vision, args.video_url)}
    # one call of the vision tower for any mixture: ranks of a sharded model stay in step
    inputs = image_as_video(processor, encode(processor, record, vision))
    return {"record": record, "inputs": inputs}


# --------------------------------------------------------- start-up, the same in each stage

def setup_distributed(args):
    """Joins the process group, under the deepspeed launcher or alone. Returns (rank, device).

    A rank that waits longer than --timeout_minutes for another ends with an error.
    """
    if "RANK" not in os.environ:  # started as `python annotate.py`: a group of one
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
    """The model, set to answer as the flags say; with --deepspeed_config, this rank's part."""
    if args.deepspeed_config:
        try:
            config = json.loads(Path(args.deepspeed_config).read_text(encoding="utf-8"))
            stage = config["zero_optimization"]["stage"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"--deepspeed_config {args.deepspeed_config}: {error!r}") from None
        if stage != 3:
            raise InputError(f"{args.deepspeed_config} has stage {stage}: only 3 shards weights")
        config = {"zero_optimization": config["zero_optimization"],
                  "bf16": {"enabled": precision() == torch.bfloat16},
                  "train_micro_batch_size_per_gpu": 1}  # asked for, of no consequence
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            args.model, dtype=precision(), attn_implementation=args.attn_implementation,
            use_safetensors=True)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"cannot load --model {args.model}: {error}") from None
    model.generation_config = generation_config(model, tokenizer, args, args.samples)
    if not args.deepspeed_config:
        return model.to(device).eval()
    deepspeed.zero.Init(module=model, config_dict_or_path=config)  # split parameter by parameter
    engine, *_ = deepspeed.initialize(model=model.to(device), config=config)  # to: the buffers
    return engine.module.eval()


# ---------------------------------------------------------- what a run leaves beside --out

def configuration_of(args, processor):
    """What responses depend on: rows that were made with another one are refused."""
    flags = ("model", "max_frames", "min_frames", "fps", "min_pixels", "max_pixels",
             "image_min_pixels", "image_max_pixels", "samples", "temperature", "top_p",
             "max_new_tokens", "seed")
    ours = {"video_url": args.video_url} if args.api_base else {
        "model_sha256": model_hash(args.model), "dtype": str(precision()),
        "chat_template": processor.chat_template}
    return {flag: getattr(args, flag) for flag in flags} | ours | {
        "engine": "api" if args.api_base else "transformers",
        "template": TEMPLATE, "answer_suffix": ANSWER_SUFFIX,
        "records_sha256": hashlib.sha256(Path(args.data).read_bytes()).hexdigest()}


def write_result(records, rows, args):
    """--out and its side files, from every row that there is. Returns the report."""
    kept, rejected, reasons, skipped = [], [], Counter(), Counter()
    for record in records:
        row = rows.get(str(record["problem_id"]), {})
        if "output" not in row:
            skipped[row.get("reason", "not asked yet")] += 1
            continue
        annotated, judged = choose(record, row, args)
        reasons.update(reason or "passed" for reason, _ in judged)
        if annotated:
            kept.append(annotated)
            continue
        rejected += [{"problem_id": record["problem_id"], "reason": reason,
                      "solution": record["solution"], "response": text} for reason, text in judged]
    table = [("responses", "count", "share"), *(
        (reason, n, f"{n / reasons.total():.1%}") for reason, n in reasons.most_common())]
    report = (f"{len(kept)} of {len(records)} records annotated ({len(kept) / len(records):.1%}; "
              f"paper: 165k of 260k), {skipped.total()} without response\n\n{markdown(table)}")
    report += "".join(f"- without response, {count}: {reason}\n"
                      for reason, count in skipped.most_common(REASONS_SHOWN))
    stem = args.out.removesuffix(".json")
    write_whole({f"{stem}.rejected.jsonl": (json.dumps(row) + "\n" for row in rejected),
                 f"{stem}.report.md": [report], args.out: json_list(map(json.dumps, kept))})
    return report


# ------------------------------------------------------------- the model, here or behind a server

def row_of(sample, answers, seconds):
    """The row of one record's responses."""
    texts, tokens, truncated = map(list, zip(*answers))
    return {"problem_id": sample["record"]["problem_id"], "output": texts, "tokens": tokens,
            "truncated": truncated, "seconds": seconds}


def ask_here(share, longest_share, write, processor, device, args):
    """Answers a rank's share of the records, a batch at a time, as often as the longest share
    takes: ranks that hold one model in parts make the same number of calls."""
    model = load_model(args, processor.tokenizer, device)
    blank = {"record": {"problem_id": "blank"},
             "inputs": image_as_video(processor, encode_blank(processor))}
    batches = iter(DataLoader(share, batch_size=args.batch_size, num_workers=args.num_workers,
                              collate_fn=lambda batch: [prompt_of(processor, args, record)
                                                        for record in batch]))
    for _ in range(-(-longest_share // args.batch_size)):
        write(ask_model(model, processor.tokenizer, next(batches, []), row_of, args.seed, blank))


# ---------------------------------------------------------------------------------- main

def main(args):
    # --------------------------------------------- inputs, checked before a model is loaded
    check_flags(args)
    records = load_records(args.data, args.media_root)
    problem_id, count = Counter(str(r["problem_id"]) for r in records).most_common(1)[0]
    if count > 1:
        raise InputError(f"{args.data}: {count} records have the problem_id {problem_id}")
    processor = None if args.api_base else load_processor(args)
    out = Path(args.out)
    make_folder_of(out)
    configuration = configuration_of(args, processor)
    rows = read_rows(out.parent, out.stem, configuration)
    todo = unanswered(records, rows)
    rank, device = setup_distributed(args)
    ranks, world = dist.new_group(backend="gloo", timeout=LONGEST_WAIT), dist.get_world_size()
    dist.barrier(ranks)  # all ranks have read the rows before one adds to them

    # -------------------------------------------------------------- responses, row by row
    share = todo[rank::world]
    path = out.parent / f"{out.stem}.rank{rank}.jsonl"
    with row_writer(path, len(share), configuration, rank != 0) as write:
        if args.api_base:
            prompts = DataLoader(share, batch_size=None, num_workers=args.num_workers,
                                 collate_fn=partial(prompt_of, None, args))
            ask_server(prompts, args.samples, row_of, write, args, len(todo) < len(records))
        elif todo:
            ask_here(share, len(todo[::world]), write, processor, device, args)
    dist.barrier(ranks)

    # ------------------------------------------------------------------ filter and report
    if rank == 0:
        rows = read_rows(out.parent, out.stem, configuration)
        print(write_result(records, rows, args))


if __name__ == "__main__":
    try:
        main(parse_args())
    except InputError as error:
        sys.exit(f"annotate.py: {error}")
