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
    language      its words are mostly of the question's script (Latin, Han, Arabic, ...)
    repetition    it does not go round in circles

and a record gets the best response that passes. Not tested: whether the thought is true.

--out is a file of records with `process`, ready for sft.py. Beside cot.json: `cot.rank<r>.jsonl`,
each response as it came; `cot.rejected.jsonl`, responses of the records that were left out, with
the reason; `cot.report.md`, the counts. The same command resumes by problem_id, on any number of
ranks, and asks for what is missing or failed; other thresholds filter the same responses again. A
server that gives no answer to 20 requests in a row ends the run; single requests that it refuses
do not.

Shapes: B records of a batch, L tokens.
"""
import argparse
import base64
import ctypes
import hashlib
import io
import json
import mimetypes
import os
import re
import signal
import threading
import time
import unicodedata
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from datetime import timedelta
from functools import cached_property, partial
from glob import escape
from itertools import chain, islice
from pathlib import Path
from urllib.parse import quote

import requests
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader
from urllib3.exceptions import InvalidHeader, MaxRetryError
from urllib3.util import Retry

from build_data import (ANSWER_SUFFIX, TEMPLATE, UNUSABLE, FlagParser, InputError, MediaError,
                        Vision, above, add_machine_flags, add_media_flags, as_in_file, at_least,
                        build_messages, encode, encode_blank, forbidden_tokens, generate,
                        image_as_video, json_list, load_model, load_processor, load_records,
                        load_vision_of, make_folder_of, markdown, part_of, read_file, row_writer,
                        record_seed, run_script, setup_distributed, skip_row, stop_tokens,
                        whole_rows, write_whole)
from rewards import (WORD, accuracy_reward, choice_letter, extract_answer, format_reward,
                     parse_number)

REASONS_SHOWN = 20  # for which records got no response, in the report
PR_SET_PDEATHSIG = 1  # of Linux's sys/prctl.h
RUN = 6  # words: a shorter run is shared with the prompt, or repeated, by chance

# what a text quotes, in any marks, or reports ("he says I'm sorry, but ...") is not its own word
SPEECH = re.compile(
    r"(?<![a-z0-9])[\"“„「『«][^\"“”„「」『』«»\n]*[\"“”」』»]"
    r"|(?<!\w)'(?=\w)(?:[^'\n]|(?<=\w)'(?=\w))*'(?!\w)"
    r"|(?<!\bi )\b(?:says|said|saying|tells|told|reads|shouts|shouted|asks|asked|writes|wrote"
    r"|replies|replied|answers|answered|whispers|explains|states|apologi[sz](?:es|ed|ing))\b"
    r"[:,]?(?:(?!\b(?:but|and|so|since|because|while)\b|(?<!\w)')[^.,;:!?\n\"“„「『«])*",
    re.IGNORECASE)
MACHINE = r"an? (?:[\w-]+ ){0,2}?(?:ai\b|artificial intelligence|language model|text[- ]based)"
MEDIUM = (r"(?:(?:the|this|that|these|any|an?|your|of|actual|provided|attached|uploaded) ){0,4}"
          r"(?:video|image|clip|footage|picture|photo|visual|frame|media\b|attachment)s?"
          r"(?: content| files?)?")
SEE = (r"(?:see|view|watch|access|open|play|load|process|observe|perceive|examine|receive"
       r"|analy[sz]e|look at)(?:ing)?(?:,? (?:or|and) \w+(?: to)?)?")
NOT = r"(?:n?'t| ?not)(?: been| be)?"  # of can't, cannot, have not been
UNABLE = (rf"(?:(?:can|could){NOT}|(?:wo|will|was){NOT} able to"
          r"|(?:'m|am|was) (?:\w+ )?(?:unable to|not able to|incapable of|not capable of)"
          rf"|(?:do{NOT} have|have no|lack) (?:\w+ )?(?:ability|capability|means|way) (?:to|of))")
GIVEN = (r"(?:\w+ly )?(?:provided|attached|given|supplied|uploaded|included|shared|available"
         r"|accessible|accessed|loaded|opened|played|viewed)\b(?! an?\b)")
ZH_MEDIUM = "(?:视频|图片|图像|影片)"
REFUSAL = re.compile("|".join([
    # who it is, and that it is sorry
    rf"(?:^|[.,;:!?>(]|\bbut|\bso|\band|\bsince) ?\bas {MACHINE}[^.;!?\n]{{0,80}}\b(?:i|my)\b",
    rf"\bi(?:'m| am|,? as)(?: just| only| merely)? {MACHINE}",
    r"(?:\bi(?:'m| am)(?: \w+)?|\bi|\bmy|^|[.!?>\n]) ?(?:sorry|apologi[sz]e|apologies)\b(?!-)",
    # what it cannot do, what it has not, what is not there
    rf"\bi(?: \w+)? ?{UNABLE} (?:\w+ )?"
    rf"(?:{SEE} {MEDIUM}|(?:assist|comply|help (?:you|with)|answer (?:this|your))\b)",
    rf"\bi(?: \w+)? (?:do{NOT}(?: \w+)? have|have no|lack) (?:(?:\w+ )?access to )?{MEDIUM}",
    rf"\bi (?:did|was|have){NOT} (?:receive|received|given|shown|provided)(?: with)? {MEDIUM}",
    r"\bi(?: can)? only (?:have access to|process)\b",
    rf"\bwithout (?:(?:\w+ )?access to|(?:being able to )?{SEE}) {MEDIUM}",
    rf"(?:\bno|{NOT} see) {MEDIUM} (?:(?:is|are|was|were|has been|have been) )?{GIVEN}",
    rf"\b{MEDIUM} (?:is|are|was|were|has|have|can|could)(?:{NOT} {GIVEN}| unavailable\b)",
    # the same in Chinese
    r"(?:^|[，。！？,.!?>\s]|我)(?:非常|很|十分|只)?"
    r"(?:抱歉|对不起|(?:是|作为)(?:一[个名款])?(?:人工智能|AI|大?型?语言模型))",
    r"(?<![他她它们人])(?:无法|不能|没法|没办法)(?:直接)?(?:查看|观看|访问"
    rf"|(?:看到|看见|打开|播放|获取|读取)[^，。！？\n]{{0,6}}{ZH_MEDIUM})",
    rf"{ZH_MEDIUM}并?(?:没有|未)被?(?:提供|上传|加载)|(?:没有|未)(?:提供|上传)任?何?{ZH_MEDIUM}",
]), re.IGNORECASE)
# no words of a language: $...$, \(...\), \command{name}, <tag>, AB, x, sin, f(, log2, =max
FORMULA = re.compile(
    r"\${1,2}(?=[^\s$])[^$]*(?<=[^\s$])\${1,2}(?!\d)|\\\(.{0,200}?\\\)|\\\[.{0,200}?\\\]"
    r"|\\[A-Za-z]+(?:\{\w*\})?|<\w+>|(?<![A-Za-zͰ-Ͽ])(?:[A-Za-z]+(?=[\d(=^_])"
    r"|(?:[A-Z]+|[a-zͰ-Ͽ]|(?:sin|cos|tan|cot|log|ln|lg|lim|max|min)[A-ZͰ-Ͽ]*)(?![A-Za-zͰ-Ͽ]))"
    r"|(?<=[\d=^_])[A-Za-z]+", re.DOTALL)


def parse_args(argv=None):
    parser = FlagParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    # data and model
    add("--model", required=True, help="Hugging Face directory or name; with --api_base, the "
                                       "name that the server knows it by")
    add("--data", required=True, help="records to annotate, .json or .jsonl")
    add("--out", required=True, help="file of annotated records to write; its side files go beside")
    add("--limit", type=above(0, int), help="only the first records, to try it; the same command "
                                            "without it goes on with the others")
    add("--deepspeed_config", type=stage_3, help="DeepSpeed's JSON file of stage 3: splits the "
        "model over the ranks; without it every rank holds the whole model")
    # responses; the released annotation had top_p 0.95 and 512 new tokens
    add("--samples", type=above(0, int), default=1, help="responses to a record; the best is kept")
    add_generation_flags(add, temperature=1.0, top_p=0.95, max_new_tokens=768)
    add("--video_url", default="", help="how videos reach the server: '' as sampled frames; 'data' "
                                        "as files; else a URL prefix that the server can read")
    # the filter
    add("--min_accuracy", type=float, default=0.6, help="a response's reward must be above this")
    add("--min_think", type=int, default=40, help="fewest characters of a thought")
    add("--max_think", type=int, default=6000, help="most characters of a thought")
    add("--min_language", type=float, default=0.7,
        help="smallest share of a response's words that are of the question's script")
    add("--max_repetition", type=float, default=0.3,
        help="largest share of a thought's runs of 6 words that occurred before in it")
    # media and machine
    add_media_flags(add)
    add_machine_flags(add)
    args = parser.parse_args(argv)
    if args.samples > 1 and not args.temperature:
        parser.error(f"--samples {args.samples} at --temperature 0 are all the same")
    if args.api_base and args.deepspeed_config:
        parser.error("--deepspeed_config is for a model on this machine, not for --api_base")
    if Path(args.out).suffix != ".json":
        parser.error(f"--out {args.out} must end in .json")
    return args


def stage_3(path):
    """A flag's type: what a JSON file of DeepSpeed's says of ZeRO, if that is stage 3."""
    try:
        zero = read_file(path)["zero_optimization"]
        if zero["stage"] != 3:
            raise ValueError(f"only stage 3 shards weights, not {zero['stage']}")
        return zero
    except (ValueError, KeyError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{path}: {error!r}") from None


# ------------------------------------------------------------------- the filter, pure functions

def think_of(response):
    """The text of a well-formed response's thought."""
    return response.partition("<think>")[2].partition("</think>")[0].strip()


def own_words(text):
    """A text without the speech in it, composed (NFC) and with one kind of apostrophe.

    >>> own_words("I’m sure: he waves “goodbye”.")
    "I'm sure: he waves  ."
    """
    text = re.sub("[’‘ʼ＇`´]", "'", unicodedata.normalize("NFC", text))
    return SPEECH.sub(" ", text)


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
    """How many of a text's own words are of each script, by their first letter; each Han or kana
    character is a word, and Han, kana and Hangul are one script.

    >>> scripts_of("求 $x$ 与 sin(AB): 小狗 'or' dog")
    Counter({'EAST ASIAN': 4, 'LATIN': 1})
    """
    scripts = Counter()
    words = WORD.findall(FORMULA.sub(" ", own_words(text)))
    for first, count in Counter(word[0] for word in words).items():
        if first.isalpha():
            script = unicodedata.name(first, "UNKNOWN").split()[0].split("-")[0]
            asian = script in ("CJK", "HIRAGANA", "KATAKANA", "HANGUL")
            scripts["EAST ASIAN" if asian else script] += count
    return scripts


def in_language(response, problem):
    """The share of a response's words that are of the problem's most frequent script.

    It tells Chinese from English, not French from English.

    >>> in_language("这是 my dog", "What is it?"), in_language("B", "3 + 4 = ?")
    (0.5, 1.0)
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
        "refusal": REFUSAL.search(own_words(response)),
        "leak": not INSTRUCTIONS.isdisjoint(runs_of(response)),
        "language": in_language(think, record["problem"]) < args.min_language,
        "repetition": repetition(think) > args.max_repetition}
    return next((reason for reason, is_so in failed.items() if is_so), None)


def choose(record, row, args):
    """(the annotated record or None, [(reason or None, response), ...]) from a record's responses,
    of which there may be none.

    Of the responses that pass, the first with the highest accuracy reward is taken.
    """
    judged = [(reject_reason(text, cut, record, args), text)
              for text, cut in zip(row.get("output", []), row.get("truncated", []))]
    good = [text for reason, text in judged if reason is None]
    if not good:
        return None, judged
    best = max(good, key=lambda text: accuracy_reward(text, record))
    return as_in_file(record) | {"process": f"<think>{think_of(best)}</think>"}, judged


# --------------------------------------------------------------------------------- the command

def prompt_of(processor, args, record):
    """A record with its encoded inputs or, without a processor, with the messages that a server
    gets; or the row of one whose medium cannot be used. Runs in worker processes."""
    try:
        vision = load_vision_of(record, args, processor)
    except MediaError as error:
        return skip_row(record, error)
    if processor is None:
        return {"record": record, "messages": api_messages(record, vision, args.video_url)}
    # one call of the vision tower for any mixture: ranks of a sharded model stay in step
    inputs = image_as_video(processor, encode(processor, record, vision))
    return {"record": record, "inputs": inputs}


def row_of(sample, answers, seconds):
    """The row of one record's responses."""
    texts, tokens, truncated = map(list, zip(*answers))
    return {"problem_id": sample["record"]["problem_id"], "output": texts, "tokens": tokens,
            "truncated": truncated, "seconds": seconds}


def write_result(records, rows, args):
    """--out and its side files, from every record's row. Returns the report."""
    kept, rejected, reasons = [], [], Counter()
    rows = [rows[str(record["problem_id"])] for record in records]  # a longer run left others too
    for record, row in zip(records, rows):
        annotated, judged = choose(record, row, args)
        reasons.update(reason or "passed" for reason, _ in judged)
        if annotated:
            kept.append(annotated)
        else:
            rejected += [{"problem_id": record["problem_id"], "reason": reason,
                          "solution": record["solution"], "response": text}
                         for reason, text in judged]
    skipped = Counter(row["reason"] for row in rows if "reason" in row)
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


def main(args):
    # ---------------------------------------------- inputs, checked before a model is loaded
    records = load_records(args.data, args.media_root)
    refuse_repeated_ids(args.data, records)
    records = records[:args.limit]
    out = Path(args.out)
    make_folder_of(out)
    asker = Generator(args)
    configuration = configuration_of(asker, "max_frames", "samples", "video_url") | {
        "records_sha256": hashlib.sha256(Path(args.data).read_bytes()).hexdigest()}

    # ----------------------------------------------- responses, row by row, then the filter
    rows = collect_responses(asker, out.parent, out.stem, records, configuration,
                   partial(prompt_of, asker.processor, args), row_of)
    if asker.rank == 0:
        print(write_result(records, rows, args))


# ================ how a model is asked, here or behind a server; evaluate.py asks so too

def add_generation_flags(add, temperature, top_p, max_new_tokens):
    """How a model answers, here or behind a server; `add` is a parser's add_argument."""
    add("--temperature", type=at_least(0, float), default=temperature,
        help="sampling temperature; 0: greedy")
    add("--top_p", type=above(0, float, 1), default=top_p, help="nucleus sampling; 1: off")
    add("--max_new_tokens", type=above(0, int), default=max_new_tokens,
        help="most tokens of a response")
    add("--batch_size", type=above(0, int), default=8, help="records answered together on a rank")
    # a server
    add("--api_base", type=http_url, help="answer through this server, as in "
        "http://localhost:8000/v1; the key, if it wants one, is read from the environment: "
        "OPENAI_API_KEY")
    add("--api_timeout", type=above(0, float), default=600, help="seconds that an answer may take")
    add("--api_retries", type=at_least(0, int), default=6,
        help="times a failed request is repeated")
    add("--concurrency", type=above(0, int), default=32,
        help="requests of a rank under way together")


def http_url(text):
    """A flag's type: the address of a server."""
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"{text} must begin with http:// or https://")
    return text


# ------------------------------------------- questions, and rows that outlive a kill

LONGEST_WAIT = timedelta(days=7)  # of the first rank to finish for the last one


class Generator:
    """Who answers a rank's questions: a server, or a model on this machine."""

    def __init__(self, args):
        self.args = args
        self.processor = None if args.api_base else load_processor(args)
        self.rank, self.device = setup_distributed(args)
        self.ranks = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)

    @cached_property
    def model(self):  # loaded when the first question needs it
        return load_answering_model(self.args, self.processor.tokenizer, self.device)


def collect_responses(asker, output, stem, records, configuration, prompt_of, row_of):
    """{problem_id as text: row} of all ranks and runs, after each rank has asked a share of what
    was missing. prompt_of(record) is a sample, {"record", "inputs" here or "messages" to a server},
    or a row with the "reason" why there is none; row_of(sample, its answers, seconds) is its row.
    """
    args, world = asker.args, dist.get_world_size()
    todo = unanswered(records, read_rows(output, stem, configuration))
    dist.barrier(asker.ranks)  # all ranks have read the rows before one adds to them
    if todo:
        share = todo[asker.rank::world]
        # the next window is decoded while this one is answered
        ahead = -(-WINDOW * args.batch_size // args.num_workers) if args.num_workers else None
        samples = DataLoader(share, batch_size=None, collate_fn=prompt_of,
                             num_workers=args.num_workers, prefetch_factor=ahead,
                             worker_init_fn=end_with_main)
        path = output / f"{stem}.rank{asker.rank}.jsonl"
        with row_writer(path, len(share), configuration, asker.rank != 0) as write:
            if args.api_base:
                ask_server(usable(samples, write), row_of, write, args, len(todo) < len(records))
            else:
                most = -(-len(todo[::world]) // args.batch_size)  # the first rank's batches
                ask_here(asker, usable(samples, write), most, row_of, write)
    dist.barrier(asker.ranks)
    return read_rows(output, stem, configuration)


def end_with_main(_):
    """For data workers: the kernel ends them with the main process, however that ends. PyTorch's
    own watch would have them wait until somebody has read the pictures that a pipe cannot hold."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def usable(samples, write):
    """The samples that can be asked; what is a row already is written."""
    for sample in samples:
        if "reason" in sample:
            write([sample])
        else:
            yield sample


def refuse_repeated_ids(path, records):
    """InputError where records of a file share a problem_id: answers are found by it."""
    problem_id, count = Counter(str(r["problem_id"]) for r in records).most_common(1)[0]
    if count > 1:
        raise InputError(f"{path}: {count} records have the problem_id {problem_id}")


def unanswered(records, rows):
    """The records that `rows`, by problem_id as text, has no answer to; what failed comes last."""
    todo = [r for r in records if "output" not in rows.get(str(r["problem_id"]), {})]
    return sorted(todo, key=lambda r: str(r["problem_id"]) in rows)


def read_rows(output, stem, configuration):
    """Rows of all ranks and runs, by problem_id as text; an answer wins over an earlier skip."""
    rows = {}
    for path in sorted(Path(output).glob(f"{escape(stem)}.rank*.jsonl")):
        first, *others = whole_rows(path) or [configuration]
        for key, value in configuration.items():
            if first.get(key) != value:
                raise InputError(f"{path} has rows with another {key}: {str(first.get(key))[:60]}, "
                                 f"not {str(value)[:60]}; write to another place")
        for row in others:
            if "output" not in rows.get(str(row["problem_id"]), {}):
                rows[str(row["problem_id"])] = row
    return rows


def configuration_of(asker, *more):
    """What answers depend on, with these flags more: rows made with another one are refused."""
    args = asker.args
    flags = ("min_frames", "fps", "min_pixels", "max_pixels", "image_min_pixels",
             "image_max_pixels", "temperature", "top_p", "max_new_tokens", "seed", *more)
    engine = {"engine": "api", "model": args.model} if args.api_base else {
        "engine": "transformers", "model_sha256": model_hash(args.model),
        "dtype": str(precision()), "attn_implementation": args.attn_implementation,
        "chat_template": asker.processor.chat_template}
    return {flag: getattr(args, flag) for flag in flags} | engine | {
        "template": TEMPLATE, "answer_suffix": ANSWER_SUFFIX}


HASHED_BLOCKS, BLOCK_BYTES = 64, 4096  # of each weight file: seconds for any size of model


def model_hash(model):
    """A hash of config.json and, of every weight file, its name, size and some blocks spread
    evenly: it tells two checkpoints of a run apart without reading all of either."""
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


# ------------------------------------------------------------- a model behind a server

JPEG_QUALITY = 95  # of frames sent to a server; Pillow's highest sensible value


def api_messages(record, vision: Vision, video_url="") -> list[dict]:
    """build_messages for a server that speaks OpenAI's protocol: the same text and the pixels
    that load_vision decoded, as data: URLs (an image as PNG, sampled frames as JPEG pictures).

    Such a server takes the frames of a video for single pictures without timing. video_url lets
    it sample the video itself: "data" sends the file; anything else is a prefix to which the
    record's path is appended, for a server that can read it (http://... or file:///srv/data, which
    vLLM reads with --allowed-local-media-path).
    A clip within a file, or a folder of frames (CLIP_FIELDS), always goes as frames.
    """
    *_, text = build_messages(record)[0]["content"]
    kind, path = "image_url", record["path"]
    if vision.frames is None:
        urls = [data_url("image/png", vision.image)]
    elif not video_url or part_of(record):
        frames = vision.frames.permute(0, 2, 3, 1).numpy()  # (T, H, W, C)
        urls = [data_url("image/jpeg", Image.fromarray(frame)) for frame in frames]
    elif video_url == "data":
        kind, content = "video_url", Path(record["media_path"]).read_bytes()
        urls = [data_url(mimetypes.guess_type(path)[0] or "video/mp4", content)]
    else:
        kind, urls = "video_url", [f"{video_url.rstrip('/')}/{quote(os.path.normpath(path))}"]
    content = [{"type": kind, kind: {"url": url}} for url in urls]
    return [{"role": "user", "content": [*content, text]}]


def data_url(kind, content) -> str:
    """Bytes, or a picture, as a data: URL."""
    if isinstance(content, Image.Image):
        file = io.BytesIO()
        content.save(file, kind.split("/")[1], quality=JPEG_QUALITY)  # PNG takes no notice of it
        content = file.getvalue()
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


KEY_VARIABLE = "OPENAI_API_KEY"  # the only place a key is read from; it is never written
FIRST_PAUSE = 1.0  # seconds before the second repetition, doubled for each; the first is at once
CONNECT_TIMEOUT = 10.0  # seconds
HOPELESS = {401, 403, 404}  # HTTP: no request of this run can succeed
FINAL = {*range(400, 500)} - HOPELESS - {408, 409, 425, 429}  # nor this one, if repeated
ERROR_SHOWN = 300  # characters of what a server says about an error
MOST_FAILURES = 20  # requests in a row without an answer, after which the server is given up
NOT_IN_FORM = (KeyError, AttributeError, TypeError, ValueError)  # of a reply, when it is read
OWN_WORDS = re.compile(r'"message": *"((?:[^"\\]|\\.)+)"')  # in the JSON of an error
# finish_reason: OpenAI's own first, then what TGI, Together, Mistral and Bedrock call it
ENDED = {"stop", "eos_token", "eos", "stop_sequence", "end_turn"}
CUT_OFF = {"length", "max_tokens", "model_length"}


class ApiError(RuntimeError):
    """The server gave no usable answer to one request, for the reason given."""


class Refused(ApiError):
    """It says that it will not, or did not, answer: the request is at fault, not the server."""


def ask_api(session, args, messages, seed):
    """args.samples answers of an OpenAI-compatible server: [(text, tokens, cut off or not), ...].

    Raises ApiError when args.api_retries repetitions have failed too, Refused where none would
    help, InputError where no request would. urllib3's Retry counts and waits. It is asked here:
    mounted in the session it would not repeat a reply that says 200 and holds no answer.
    """
    url = args.api_base.rstrip("/") + "/chat/completions"
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):  # no header takes it, and the error quotes it
        raise InputError(f"{KEY_VARIABLE} holds characters that no key has")

    def authorise(request):  # not a header, over which ~/.netrc would win
        request.headers.update({"Authorization": f"Bearer {key}"} if key else {})
        return request
    # unseeded jitter: clients must not come back at the same moment
    retries = Retry(args.api_retries, backoff_factor=FIRST_PAUSE / 2, backoff_jitter=FIRST_PAUSE)
    answers = []
    while len(answers) < args.samples:  # some servers answer once, whatever n is
        body = {"model": args.model, "messages": messages, "n": args.samples - len(answers),
                "temperature": args.temperature, "top_p": args.top_p,
                "max_tokens": args.max_new_tokens, "seed": seed + len(answers)}
        reply = requests.Response()  # without a status: of a server that does not answer
        failure = ApiError
        try:
            reply = session.post(url, json=body, auth=authorise,
                                 timeout=(CONNECT_TIMEOUT, args.api_timeout))
            if reply.status_code == 200:
                answers += read_choices(reply.json())
                continue
            reason = f"HTTP {reply.status_code}"
        except Refused as error:
            failure, reason = Refused, str(error)
        except (requests.RequestException, *NOT_IN_FORM) as error:
            reason = f"{type(error).__name__}: {error}"
        said = OWN_WORDS.search(reply.text)
        reason = f"{reason}: {said[1] if said else reply.text}".rstrip(": ")
        if key:  # a server may quote it
            reason = reason.replace(key, f"<{KEY_VARIABLE}>")
        reason = reason[:ERROR_SHOWN]
        if reply.status_code in HOPELESS:
            raise InputError(f"{url} refuses model {args.model}: {reason} "
                             f"(the key is read from the environment variable {KEY_VARIABLE})")
        if reply.status_code in FINAL:
            raise Refused(f"{url}: {reason}")
        try:
            retries = retries.increment()
            retries.sleep(reply.raw)
        except InvalidHeader:  # a Retry-After that is neither whole seconds nor a date
            retries.sleep()
        except MaxRetryError:
            raise failure(f"{url}: {args.api_retries + 1} attempts failed, the last: {reason}") \
                from None
    return answers[:args.samples]


def read_choices(reply):
    """The answers in a server's reply. Refused where one ended neither by itself nor by its length;
    one of NOT_IN_FORM where the reply cannot be read.

    A thought that the server has taken out of the text is put back. Of several answers it tells
    only the sum of tokens: each gets the mean, None where it does not tell.

    >>> read_choices({"choices": [{"message": {"content": "Hi", "reasoning_content": "A guest."},
    ...                            "finish_reason": "stop"}], "usage": {"completion_tokens": 9}})
    [('<think>A guest.</think>\\nHi', 9, False)]
    """
    choices, answers = reply["choices"], []
    if not choices:
        raise ValueError("the reply has no choices")
    tokens = (reply.get("usage") or {}).get("completion_tokens")
    for choice in choices:
        message, finish = choice["message"], str(choice.get("finish_reason") or "").lower()
        text = message.get("content")
        thought = message.get("reasoning_content") or message.get("reasoning")
        if thought and "<think>" not in (text or ""):
            text = "<think>" + thought + ("</think>\n" + text if text else "")  # or cut off in it
        ended = finish in ENDED and text is not None if finish else text
        if not ended and finish not in CUT_OFF:
            raise Refused(f"finish_reason {finish!r} is no answer")
        if UNUSABLE.search(text or ""):  # TypeError for what is no text
            raise ValueError("the reply has half of a character")
        answers.append((text or "", tokens and round(tokens / len(choices)), finish in CUT_OFF))
    return answers


def ask_server(samples, row_of, write, args, answered=False):
    """Writes each sample's row, or why there is none; args.concurrency at a time.

    InputError when the server fails MOST_FAILURES requests in a row: it is gone. What it refuses
    counts only until it has `answered` once: some requests may be at fault, not all of them.
    """
    running, failed, own = set(), 0, threading.local()

    def begin():  # requests does not promise that threads may share a session
        own.session = requests.Session()

    def work(sample):  # in a thread: the row is on disk before anything else can go wrong
        record, started = sample["record"], time.perf_counter()
        try:
            answers = ask_api(own.session, args, sample["messages"], record_seed(args.seed, record))
        except ApiError as error:
            write([skip_row(record, error)])
            return error
        write([row_of(sample, answers, time.perf_counter() - started)])

    with ThreadPoolExecutor(args.concurrency, initializer=begin) as pool:
        for sample in chain(samples, [None]):  # None: the last ones are waited for
            if sample:
                running.add(pool.submit(work, sample))
            while len(running) >= (args.concurrency if sample else 1):
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for error in (future.result() for future in done):
                    if error is None:
                        answered, failed = True, 0
                    elif not (answered and isinstance(error, Refused)):
                        failed += 1
                    if failed >= MOST_FAILURES:
                        raise InputError(f"{failed} requests in a row failed, the last: {error}")


# -------------------------------------------------------------- a model on this machine

def cut_at_end(ids, end_ids):
    """A response up to its first end token, which is kept, and whether it had none.

    >>> cut_at_end([5, 6, 2, 0, 0], {2, 0}), cut_at_end([5, 6], {2, 0})
    (([5, 6, 2], False), ([5, 6], True))
    """
    for i, token in enumerate(ids):
        if token in end_ids:
            return ids[:i + 1], False
    return ids, True


@torch.inference_mode()
def respond(model, tokenizer, samples, seed):
    """The answers, as ask_api's, to each of B encoded samples: as many as the model's
    generation_config says."""
    config = model.generation_config
    # generate draws from torch's own generator: seeded for each batch, by its first record
    torch.manual_seed(record_seed(seed, samples[0]["record"]))
    ids = generate(model, [sample["inputs"] for sample in samples])  # (B n, L)
    responses = [cut_at_end(row, config.eos_token_id) for row in ids.tolist()]
    answers = [(tokenizer.decode(ids, skip_special_tokens=True), len(ids), cut)
               for ids, cut in responses]
    n = config.num_return_sequences
    return [answers[i:i + n] for i in range(0, len(answers), n)]


def ask_here(asker, samples, most, row_of, write):
    """Writes each sample's row; no rank has more than `most` batches of them.

    Ranks that hold one model in parts make the same number of calls: a blank question stands for
    each batch that this rank does not have.
    """
    args, processor, blank = asker.args, asker.processor, []
    if args.deepspeed_config:
        blank = [{"record": {"problem_id": "blank"},
                  "inputs": image_as_video(processor, encode_blank(processor))}]
    batches = by_length(samples, args.batch_size)
    for _ in range(most):
        batch = next(batches, [])
        if batch or blank:
            model, started = asker.model, time.perf_counter()
            answers = respond(model, processor.tokenizer, batch or blank, args.seed)
            seconds = (time.perf_counter() - started) / len(answers)
            write([row_of(sample, its, seconds) for sample, its in zip(batch, answers)])


WINDOW = 2  # batches of decoded samples among which similar lengths are looked for


def by_length(samples, size):
    """Lists of up to `size` samples, out of each WINDOW * size neighbours those of like length."""
    samples = iter(samples)
    while window := list(islice(samples, WINDOW * size)):
        window.sort(key=lambda sample: sample["inputs"]["input_ids"].shape[1])
        yield from (window[i:i + size] for i in range(0, len(window), size))


def precision():
    """bfloat16 where there is an accelerator, else float32."""
    from deepspeed.accelerator import get_accelerator
    return torch.float32 if get_accelerator().device_name() == "cpu" else torch.bfloat16


def load_answering_model(args, tokenizer, device):
    """The model, set to answer as the flags say: its own sampling defaults (a repetition penalty
    in Qwen2.5-VL's release) are put aside. With --deepspeed_config, this rank's part of it."""
    from transformers import GenerationConfig
    config = {"bf16": {"enabled": precision() == torch.bfloat16},
              "train_micro_batch_size_per_gpu": 1}  # asked for, of no consequence
    if args.deepspeed_config:
        config["zero_optimization"] = args.deepspeed_config
    model = load_model(args, config)
    sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    model.generation_config = GenerationConfig(
        max_new_tokens=args.max_new_tokens, num_return_sequences=args.samples,
        **(sampling if args.temperature else {}), eos_token_id=stop_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id, suppress_tokens=forbidden_tokens(model, tokenizer))
    if args.deepspeed_config:
        import deepspeed
        model = deepspeed.initialize(model=model, config=config)[0].module
    return model.to(device).eval()


if __name__ == "__main__":
    run_script(main, parse_args)
