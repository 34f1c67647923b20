"""Annotation: chains of thought by a large model, filtered by rules (paper, section 3.1).

    python annotate.py --data train.json --out cot.json --model Qwen/Qwen2.5-VL-72B-Instruct \
        --api_base http://localhost:8000/v1
    deepspeed annotate.py --data train.json --out cot.json --model Qwen/Qwen2.5-VL-7B-Instruct

The model gets the prompt of every stage and generates --samples responses: behind any server that
speaks OpenAI's protocol (--api_base), or with transformers on this machine, where each rank holds
the whole model. A larger model is run behind a server. A response is kept if, in this order,

    truncated     it ended by itself, within --max_new_tokens
    format        it is one <think> block, then one <answer> block, and nothing else
    answer        the answer has its type's form: one option, one number, some text
    accuracy      its accuracy reward is above --min_accuracy
    length        its thought has --min_think to --max_think characters
    refusal       its thought has no phrase of refusal, as "I'm sorry" or "unable to view the video"
    leak          it does not recite the prompt's instructions
    language      its words are mostly of the question's script (Latin, Han, Arabic, ...)
    repetition    it does not go round in circles

and a record gets the best response that passes. Not tested: whether the thought is true.

--out is a file of records with `process`, ready for sft.py. Beside cot.json: `cot.rank<r>.jsonl`,
each response as it came; `cot.rejected.jsonl`, responses of the records that were left out, with
the reason; `cot.report.md`, the counts. The same command resumes, on any number of ranks, and
requests what is missing or failed; other thresholds filter the same responses again.

Shapes: B records of a batch, L tokens.
"""
import argparse
import base64
import ctypes
import hashlib
import io
import json
import os
import re
import signal
import sys
import threading
import time
import unicodedata
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from datetime import timedelta
from functools import cached_property, lru_cache, partial
from glob import escape
from itertools import chain, islice
from pathlib import Path

import requests
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm
from urllib3.exceptions import HTTPError, InvalidHeader, MaxRetryError
from urllib3.util import Retry

from build_data import (ANSWER_SUFFIX, SAMPLING_FLAGS, TEMPLATE, UNUSABLE, FlagParser, InputError,
                        MediaError, Vision, above, add_machine_flags, add_media_flags, as_in_file,
                        at_least,
                        build_messages, encode, forbidden_tokens, generate, json_list, load_model,
                        load_processor, load_records, load_vision_of, make_folder_of, markdown,
                        model_hash, number, record_seed, require_same, row_writer, run_script,
                        setup_distributed, skip_row, stop_tokens, whole_rows, write_whole)
from rewards import (WORD, accuracy_reward, choice_letter, extract_answer, format_reward,
                     parse_number)

REASONS_SHOWN = 20  # for which records got no response, in the report
PR_SET_PDEATHSIG = 1  # of Linux's sys/prctl.h
EAST_ASIAN = {"HIRAGANA", "KATAKANA", "HANGUL"}  # and CJK, in names of Unicode
RUN = 6  # words: a shorter run is shared with the prompt, or repeated, by chance

SPEECH = re.compile(r"\"[^\"\n]*\"|(?<!\w)'(?=\w).{1,200}?'(?!\w)")  # in quotation marks
VIDEO = r"(?:(?:the|this|any|your) )?(?:video|image|clip|picture|frame)s?\b"
VIEW = rf"(?:\w+ly )?(?:see|view|watch|access|open|process) {VIDEO}"
REFUSAL = re.compile("|".join([
    r"\bi(?:'m| am) sorry", r"\bi apologi[sz]e\b", r"\bmy apologies", r"\bas an ai,",
    r"\b(?:language|text-based) model\b", r"\bi (?:can't|cannot) assist\b",
    rf"\bi (?:can't|cannot|couldn't|could not) {VIEW}",
    rf"(?:\bunable|\bnot able|n't able|\bno way|\bthe ability) to {VIEW}",
    rf"\b(?:i (?:don't|do not) (?:\w+ )?have|without) access to {VIDEO}",
    rf"\b(?:no|any) {VIDEO} (?:is |was |were )?(?:provided|attached)\b",
    rf"\b{VIDEO} (?:is|was|were)(?: not|n't) (?:provided|attached|available)\b",
    "抱歉,", "(?:作为|是)(?:一个)?(?:人工智能|语言模型)",
    "(?:无法|不能)(?:直接)?(?:查看|观看|看到)(?:视频|图片|图像)", "(?:视频|图片|图像)(?:没有|未)提供",
]), re.IGNORECASE)


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
    # responses; the released annotation had top_p 0.95 and 512 new tokens
    add("--samples", type=above(0, int), default=1, help="responses to a record; the best is kept")
    add_generation_flags(add, temperature=1.0, top_p=0.95, max_new_tokens=768)
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
    if Path(args.out).suffix != ".json":
        parser.error(f"--out {args.out} must end in .json")
    return args


# ------------------------------------------------------------------- the filter, pure functions

def think_of(response):
    """Returns the text of a well-formed response's thought."""
    return response.partition("<think>")[2].partition("</think>")[0].strip()


def own_words(text):
    """Returns a text in compatibility form (NFKC), without what stands in quotation marks.

    >>> own_words("I’m sure: he waves “goodbye”。")
    "I'm sure: he waves  。"
    """
    text = re.sub("[“”„「」『』«»]", '"', re.sub("[’‘ʼ＇`´]", "'", text))
    return SPEECH.sub(" ", unicodedata.normalize("NFKC", text))


def runs_of(text):
    """Returns every run of 6 words of a text in lower case; each Han or kana character is a word.

    >>> runs_of("Let me think, it is 小狗")
    [('let', 'me', 'think', 'it', 'is', '小'), ('me', 'think', 'it', 'is', '小', '狗')]
    """
    words = WORD.findall(text.lower())
    return list(zip(*(words[i:] for i in range(RUN))))


INSTRUCTIONS = {run for suffix in ANSWER_SUFFIX.values()
                for run in runs_of(TEMPLATE.replace("{question}", "") + suffix)}


def repetition(text):
    """Returns the share of the runs of 6 words that occurred before in the text, in [0, 1].

    >>> repetition("a b c d e f"), repetition("wait " * 15)
    (0.0, 0.9)
    """
    runs = runs_of(text)
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def scripts_of(text):
    """Counts a text's own words by the script of their first letter. Each Han or kana character is
    a word; Han, kana and Hangul are one script.

    >>> scripts_of("求 sin(AB): 小狗 'or' dog")
    Counter({'CJK': 3, 'LATIN': 3})
    """
    firsts = [word[0] for word in WORD.findall(own_words(text)) if word[0].isalpha()]
    scripts = [unicodedata.name(first, "UNKNOWN").split()[0] for first in firsts]
    return Counter("CJK" if script in EAST_ASIAN else script for script in scripts)


def in_language(think, problem):
    """Returns the share of a thought's words that are of the problem's script: its most frequent
    one except for Latin and Greek, which also stand in formulas, or else the one of these.

    >>> in_language("这是 my dog", "What is it?"), in_language("两只狗", "求 sin x")
    (0.5, 1.0)
    """
    asked, said = scripts_of(problem), scripts_of(think)
    if not asked or not said:
        return 1.0
    script = max(asked, key=lambda script: (script not in ("LATIN", "GREEK"), asked[script]))
    return said[script] / said.total()


def has_form(answer, record):
    """Returns whether the answer has its problem type's form: one option, one number, some text."""
    if record["problem_type"] == "multiple choice":
        return bool(choice_letter(answer, record["options"]))
    if record["problem_type"] in ("numerical", "regression"):
        return parse_number(answer) is not None
    return bool(answer)


def reject_reason(response, truncated, record, args):
    """Returns why a response is not kept, a word of this file's first lines, or None if it is."""
    think = think_of(response)
    checks = {
        "truncated": lambda: truncated,
        "format": lambda: not format_reward(response),
        "answer": lambda: not has_form(extract_answer(response), record),
        "accuracy": lambda: accuracy_reward(response, record) <= args.min_accuracy,
        "length": lambda: not args.min_think <= len(think) <= args.max_think,
        "refusal": lambda: REFUSAL.search(own_words(think)),
        "leak": lambda: not INSTRUCTIONS.isdisjoint(runs_of(response)),
        "language": lambda: in_language(think, record["problem"]) < args.min_language,
        "repetition": lambda: repetition(think) > args.max_repetition}
    return next((reason for reason, fails in checks.items() if fails()), None)


def choose(record, row, args):
    """Returns (the annotated record or None, [(reason or None, response), ...]) from a record's
    row. Of the responses that pass, it takes the first with the highest accuracy reward."""
    judged = [(reject_reason(text, cut, record, args), text)
              for text, cut in zip(row.get("output", []), row.get("truncated", []))]
    good = [text for reason, text in judged if reason is None]
    if not good:
        return None, judged
    best = max(good, key=lambda text: accuracy_reward(text, record))
    return as_in_file(record) | {"process": f"<think>{think_of(best)}</think>"}, judged


# --------------------------------------------------------------------------------- the command

def prompt_of(processor, args, record):
    """Returns a record with its encoded inputs or, without a processor, with the messages for a
    server. If its file cannot be used, returns a row with the reason. Runs in worker processes."""
    try:
        vision = load_vision_of(record, args, processor)
    except MediaError as error:
        return skip_row(record, error)
    if processor is None:
        return {"record": record, "messages": api_messages(record, vision)}
    return {"record": record, "inputs": encode(processor, record, vision)}


def row_of(sample, responses, seconds):
    """Returns the row of one record's responses."""
    texts, tokens, truncated = map(list, zip(*responses))
    return {"problem_id": sample["record"]["problem_id"], "output": texts, "tokens": tokens,
            "truncated": truncated, "seconds": seconds}


def write_result(records, rows, args):
    """Writes --out and its side files from every record's row. Returns the report."""
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
    generator = Generator(args)
    configuration = configuration_of(generator, "max_frames", "samples") | {
        "records_sha256": hashlib.sha256(Path(args.data).read_bytes()).hexdigest()}

    # ----------------------------------------------- responses, row by row, then the filter
    rows = collect_responses(generator, out.parent, out.stem, records, configuration,
                             partial(prompt_of, generator.processor, args), row_of)
    if generator.rank == 0:
        print(write_result(records, rows, args))


# ================== generating responses, here or through a server; evaluate.py does so too

http_url = number(str, lambda text: text.startswith(("http://", "https://")),
                  "a URL that begins with http:// or https://")


def add_generation_flags(add, temperature, top_p, max_new_tokens):
    """Adds how responses are generated; `add` is a parser's add_argument."""
    add("--temperature", type=at_least(0, float), default=temperature,
        help="sampling temperature; 0: greedy")
    add("--top_p", type=above(0, float, 1), default=top_p, help="nucleus sampling; 1: off")
    add("--max_new_tokens", type=above(0, int), default=max_new_tokens,
        help="most tokens of a response")
    add("--batch_size", type=above(0, int), default=8, help="records of a batch on a rank")
    # a server
    add("--api_base", type=http_url, help="generate through this server, as in "
        "http://localhost:8000/v1; its key, if it has one, is read from the environment: "
        "OPENAI_API_KEY")
    add("--api_body", type=request_keys, help="JSON object whose keys replace those of each "
        "request; null removes one, as in "
        '{"max_tokens": null, "max_completion_tokens": 1024}')
    add("--api_timeout", type=above(0, float), default=600,
        help="timeout of a request, in seconds until its last byte")
    add("--api_retries", type=at_least(0, int), default=6, help="retries of a failed request")
    add("--concurrency", type=above(0, int), default=32, help="concurrent requests of a rank")


def request_keys(text):
    """Reads a flag: a JSON object without the keys that a run decides."""
    try:
        keys = json.loads(text)
        json.dumps(keys, allow_nan=False)  # a server cannot read NaN
        fixed = keys.keys() & {"messages", "model", "stream"}
    except (ValueError, AttributeError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text} is not a JSON object: {error}") from None
    if fixed:
        raise argparse.ArgumentTypeError(f"{text} must not have {' or '.join(sorted(fixed))}")
    return keys


# ------------------------------------------- rows, which outlive a kill

LONGEST_WAIT = timedelta(days=7)  # of the first rank to finish for the last one


class Generator:
    """Generates a rank's responses: through a server, or with a model on this machine."""

    def __init__(self, args):
        self.args = args
        self.processor = None if args.api_base else load_processor(args)
        self.rank, self.device = setup_distributed(args)
        self.ranks = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)

    @cached_property
    def model(self):  # loaded when the first batch needs it
        return load_answering_model(self.args, self.processor.tokenizer, self.device)


def collect_responses(generator, output, stem, records, configuration, prompt_of, row_of):
    """Returns {problem_id as text: row} of all ranks and runs, after each rank has generated its
    share of what was missing. What failed before comes last.

    prompt_of(record) is a sample, {"record", "inputs" here or "messages" for a server}, or a row
    with the "reason" why there is none; row_of(sample, its responses, seconds) is its row.
    """
    args, world = generator.args, dist.get_world_size()
    rows = read_rows(output, stem, configuration)
    todo = [record for record in records
            if "output" not in rows.get(str(record["problem_id"]), {})]
    todo.sort(key=lambda record: str(record["problem_id"]) in rows)
    dist.barrier(generator.ranks)  # all ranks have read the rows before one adds to them
    if todo:
        share = todo[generator.rank::world]
        # the next window is decoded while this one is generated
        ahead = -(-WINDOW * args.batch_size // args.num_workers) if args.num_workers else None
        samples = DataLoader(share, batch_size=None, collate_fn=prompt_of,
                             num_workers=args.num_workers, prefetch_factor=ahead,
                             worker_init_fn=end_with_main)
        path = output / f"{stem}.rank{generator.rank}.jsonl"
        with row_writer(path, len(share), configuration, generator.rank != 0) as write:
            samples = usable(samples, write)
            if args.api_base:
                generate_on_server(args, samples, row_of, write, len(todo) < len(records))
            else:
                generate_locally(generator, samples, row_of, write)
    dist.barrier(generator.ranks)
    return read_rows(output, stem, configuration)


def end_with_main(_):
    """Has the kernel end a data worker with the main process, however that ends. PyTorch's own
    watch would wait until somebody has read the pictures that a pipe cannot hold."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def usable(samples, write):
    """Yields the samples that have a prompt; writes those that are rows already."""
    for sample in samples:
        if "reason" in sample:
            write([sample])
        else:
            yield sample


def refuse_repeated_ids(path, records):
    """Raises InputError if records of a file share a problem_id: rows are found by it."""
    problem_id, count = Counter(str(r["problem_id"]) for r in records).most_common(1)[0]
    if count > 1:
        raise InputError(f"{path}: {count} records have the problem_id {problem_id}")


def read_rows(output, stem, configuration):
    """Returns the rows of all ranks and runs by problem_id as text; a response wins over a skip.

    Raises InputError if they are of another configuration. A model's folder may have moved.
    """
    free, rows = {"model"} if "model_sha256" in configuration else (), {}
    for path in sorted(Path(output).glob(f"{escape(stem)}.rank*.jsonl")):
        first, *others = whole_rows(path) or [configuration]
        require_same(path, first, configuration, f"It has rows of --model {first.get('model')}: "
                     "write to another place", free)
        for row in others:
            if "output" not in rows.get(str(row["problem_id"]), {}):
                rows[str(row["problem_id"])] = row
    return rows


def configuration_of(generator, *more):
    """Returns what responses depend on, with these flags more."""
    args = generator.args
    flags = ("model", *SAMPLING_FLAGS, "temperature", "top_p", "max_new_tokens", "seed", *more)
    engine = {"engine": "api", "api_body": args.api_body} if args.api_base else {
        "engine": "transformers", "model_sha256": model_hash(args.model),
        "dtype": str(precision()), "attn_implementation": args.attn_implementation,
        "chat_template": generator.processor.chat_template}
    return {flag: getattr(args, flag) for flag in flags} | engine | {
        "template": TEMPLATE, "answer_suffix": ANSWER_SUFFIX}


# ------------------------------------------------------------- a model behind a server

JPEG_QUALITY = 95  # of frames sent to a server; Pillow's highest sensible value


def api_messages(record, vision: Vision) -> list[dict]:
    """Returns build_messages for a server that speaks OpenAI's protocol: the same text and the
    pixels that load_vision decoded, as data: URLs. An image is sent as PNG, a video as its sampled
    frames in JPEG; the server takes them for single pictures without timing."""
    *_, text = build_messages(record)[0]["content"]
    if vision.frames is None:
        urls = [data_url("image/png", vision.image)]
    else:
        frames = vision.frames.permute(0, 2, 3, 1).numpy()  # (T, H, W, C)
        urls = [data_url("image/jpeg", Image.fromarray(frame)) for frame in frames]
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*content, text]}]


def data_url(kind, picture) -> str:
    """Returns a picture as a data: URL."""
    file = io.BytesIO()
    picture.save(file, kind.split("/")[1], quality=JPEG_QUALITY)  # PNG ignores it
    return f"data:{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


KEY_VARIABLE = "OPENAI_API_KEY"  # the only place a key is read from; it is never written
CONNECT_TIMEOUT = 10.0  # seconds
FIRST_PAUSE = 1.0  # seconds before the second retry, doubled for each; the first is at once
LONGEST_PAUSE = 600  # seconds; a server that asks for more ends the run
LARGEST_REPLY, REPLY_PART = 2**24, 2**16  # bytes
LONGEST_TEXT = 200_000  # characters of a response; to grade so many takes seconds
FATAL_STATUS = {*range(300, 400), 401, 402, 403, 404}  # HTTP: no request of this run can succeed
NO_RETRY_STATUS = {*range(400, 500)} - FATAL_STATUS - {408, 409, 425, 429}
ERROR_SHOWN = 300  # characters of a server's error message
MOST_FAILURES = 20  # failed requests in a row that end the run
MALFORMED_REPLY = (LookupError, AttributeError, TypeError, ValueError, ArithmeticError,
                   RecursionError)  # when it is read
ERROR_MESSAGE = re.compile(r'"message": *"((?:[^"\\]|\\.)+)"')  # in the JSON of an error
# finish_reason: OpenAI's own first, then what TGI, Together, Mistral and Bedrock call it
ENDED = {"stop", "eos_token", "eos", "stop_sequence", "end_turn"}
CUT_OFF = {"length", "max_tokens", "model_length"}


class ApiError(RuntimeError):
    """A request failed, for the reason given."""


class Refused(ApiError):
    """The server will not, or did not, answer this request; others may succeed."""


def request_responses(session, args, messages, seed):
    """Returns args.samples responses of a server: [(text, tokens, truncated or not), ...].

    Raises ApiError if the retries fail too, Refused if none would help, InputError if no request
    of the run would succeed. urllib3's Retry counts and waits. It is used here: mounted in the
    session it would not retry a malformed reply of status 200.
    """
    url = args.api_base.rstrip("/") + "/chat/completions"
    # unseeded jitter: clients must not come back at the same moment
    retries = Retry(args.api_retries, backoff_factor=FIRST_PAUSE / 2, backoff_jitter=FIRST_PAUSE)
    responses = []
    while len(responses) < args.samples:  # some servers return one, whatever n is
        body = {"model": args.model, "messages": messages, "n": args.samples - len(responses),
                "temperature": args.temperature, "top_p": args.top_p,
                "max_tokens": args.max_new_tokens, "seed": seed + len(responses)}
        body |= args.api_body or {}
        status, wait, text = send(session, args, url, {
            name: value for name, value in body.items() if value is not None})
        reason, failure = f"HTTP {status}" if status else "no whole reply", ApiError
        try:
            if status == 200:
                responses += read_choices(json.loads(text))
                continue
        except Refused as error:
            reason, failure = str(error), Refused
        except MALFORMED_REPLY as error:
            reason = f"{type(error).__name__}: {error}"
        said = ERROR_MESSAGE.search(text)
        reason = f"{reason}: {said[1] if said else text}"[:ERROR_SHOWN].rstrip(": ")
        if status in FATAL_STATUS:
            raise InputError(f"{url} refuses model {args.model}: {reason}. Check --api_base and "
                             f"the key in the environment variable {KEY_VARIABLE}")
        if status in NO_RETRY_STATUS:
            raise Refused(f"{url}: {reason}")
        pause = retry_after(retries, wait, f"{url}: {reason}")
        try:
            retries = retries.increment()
        except MaxRetryError:
            raise failure(f"{url}: {args.api_retries + 1} attempts failed, the last: {reason}") \
                from None
        if pause:
            time.sleep(pause)
        else:
            retries.sleep()
    return responses[:args.samples]


def send(session, args, url, body):
    """Sends one request. Returns (status, Retry-After, text) of the reply, never with the key in
    it. If no whole reply comes within --api_timeout, the status is 0 and the text says why."""
    deadline = time.monotonic() + args.api_timeout
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):  # no header takes it, and the error quotes it
        raise InputError(f"{KEY_VARIABLE} holds characters that no key has")

    def authorise(request):  # not a header, over which ~/.netrc would win
        request.headers.update({"Authorization": f"Bearer {key}"} if key else {})
        return request
    try:  # redirects are not followed: the pictures and the key would go along
        with session.post(url, json=body, auth=authorise, stream=True, allow_redirects=False,
                          timeout=(CONNECT_TIMEOUT, args.api_timeout)) as reply:
            status, wait = reply.status_code, reply.headers.get("Retry-After", "")
            text = reply.headers["Location"] if reply.is_redirect else read_text(reply, deadline)
    except (requests.RequestException, HTTPError, ValueError) as error:
        status, wait, text = 0, "", f"{type(error).__name__}: {error}"
    return status, wait, text.replace(key, f"<{KEY_VARIABLE}>") if key else text


def read_text(reply, deadline):
    """Returns the text of a streamed reply. Raises Timeout after the deadline (time.monotonic),
    which a slow stream would outlive, and ValueError if the reply is too large."""
    data = bytearray()
    while part := reply.raw.read1(REPLY_PART, decode_content=True):  # what has come so far
        data += part
        if len(data) > LARGEST_REPLY:
            raise ValueError(f"the reply has more than {LARGEST_REPLY} bytes")
        if time.monotonic() > deadline:
            raise requests.Timeout("the reply was not complete within --api_timeout")
    return data.decode(errors="strict" if reply.status_code == 200 else "replace")


def retry_after(retries, text, reason):
    """Returns the seconds that a Retry-After asks for, 0 if it names none, and prints the reason of
    the pause. Raises InputError if they are more than LONGEST_PAUSE."""
    try:
        pause = retries.parse_retry_after(text)
    except (InvalidHeader, ValueError, OverflowError):  # neither whole seconds nor a date
        return 0
    reason += f". It asks to wait (Retry-After: {text})"
    if pause > LONGEST_PAUSE:
        raise InputError(f"{reason}: repeat the command then, it resumes")
    if pause:
        print_once(reason, time.monotonic() // 60)
    return pause


@lru_cache(maxsize=100)
def print_once(text, minute):
    """Prints a text once a minute, however many requests have it."""
    tqdm.write(text, file=sys.stderr)


def read_choices(reply):
    """Returns the responses in a server's reply. Raises Refused if one ended neither by itself nor
    by its length, one of MALFORMED_REPLY if the reply cannot be read.

    A thought that the server has taken out of the text is put back. Of several responses the reply
    has only the sum of tokens: each gets the mean, or None without a sum.

    >>> read_choices({"choices": [{"message": {"content": "Hi", "reasoning_content": "A guest."},
    ...                            "finish_reason": "stop"}], "usage": {"completion_tokens": 9}})
    [('<think>A guest.</think>\\nHi', 9, False)]
    """
    choices, responses = reply["choices"], []
    if not choices:
        raise ValueError("the reply has no choices")
    tokens = (reply.get("usage") or {}).get("completion_tokens")
    for choice in choices:
        message, finish = choice["message"], str(choice.get("finish_reason") or "").lower()
        text, cut = message.get("content"), finish in CUT_OFF
        thought = message.get("reasoning_content") or message.get("reasoning")
        if thought and "<think>" not in (text or ""):
            text = "<think>" + thought + ("</think>\n" + text if text else "")  # or cut off in it
        ended = finish in ENDED and text is not None if finish else text
        if not ended and not cut:
            raise Refused(f"finish_reason {finish!r} is no answer")
        text = text or ""
        if len(text) > LONGEST_TEXT or UNUSABLE.search(text):  # TypeError for what is no text
            raise ValueError(f"a response has more than {LONGEST_TEXT} characters, or half of one")
        responses.append((text, tokens and round(tokens / len(choices)), cut))
    return responses


def generate_on_server(args, samples, row_of, write, answered=False):
    """Writes each sample's row, or why there is none; args.concurrency requests at a time.

    Raises InputError if MOST_FAILURES requests in a row fail. Refused ones count only until the
    server has `answered` once: some requests may be at fault, not all of them.
    """
    running, failed, own = set(), 0, threading.local()

    def begin():  # requests does not promise that threads may share a session
        own.session = requests.Session()

    def work(sample):  # in a thread: the row is on disk before anything else can go wrong
        record, started = sample["record"], time.perf_counter()
        try:
            responses = request_responses(own.session, args, sample["messages"],
                                          record_seed(args.seed, record))
        except ApiError as error:
            write([skip_row(record, error)])
            return error
        write([row_of(sample, responses, time.perf_counter() - started)])

    pool = ThreadPoolExecutor(args.concurrency, initializer=begin)
    try:
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
                        raise InputError(f"{failed} requests in a row failed, the last: {error} "
                                         "(--api_body changes what a request holds)")
    finally:  # after an error nobody waits for the pauses of the others
        pool.shutdown(wait=False, cancel_futures=True)


# -------------------------------------------------------------- a model on this machine

def cut_at_end(ids, end_ids):
    """Returns a response up to its first end token, which is kept, and whether it had none.

    >>> cut_at_end([5, 6, 2, 0, 0], {2, 0}), cut_at_end([5, 6], {2, 0})
    (([5, 6, 2], False), ([5, 6], True))
    """
    end = next((i + 1 for i, token in enumerate(ids) if token in end_ids), None)
    return ids[:end], end is None


@torch.inference_mode()
def respond(model, tokenizer, samples, seed):
    """Returns the responses, as request_responses does, to each of B encoded samples: as many as
    the model's generation_config says."""
    config = model.generation_config
    # generate draws from torch's own generator: seeded for each batch, by its first record
    torch.manual_seed(record_seed(seed, samples[0]["record"]))
    ids = generate(model, [sample["inputs"] for sample in samples])  # (B n, L)
    cut = [cut_at_end(row, config.eos_token_id) for row in ids.tolist()]
    responses = [(tokenizer.decode(ids, skip_special_tokens=True), len(ids), truncated)
                 for ids, truncated in cut]
    n = config.num_return_sequences
    return [responses[i:i + n] for i in range(0, len(responses), n)]


def generate_locally(generator, samples, row_of, write):
    """Writes each sample's row, batch by batch."""
    args, tokenizer = generator.args, generator.processor.tokenizer
    for batch in by_length(samples, args.batch_size):
        model, started = generator.model, time.perf_counter()
        responses = respond(model, tokenizer, batch, args.seed)
        seconds = (time.perf_counter() - started) / len(batch)
        write([row_of(sample, its, seconds) for sample, its in zip(batch, responses)])


WINDOW = 2  # batches of decoded samples among which similar lengths are looked for


def by_length(samples, size):
    """Yields lists of up to `size` samples: of WINDOW * size neighbours, those of like length."""
    samples = iter(samples)
    while window := list(islice(samples, WINDOW * size)):
        window.sort(key=lambda sample: sample["inputs"]["input_ids"].shape[1])
        yield from (window[i:i + size] for i in range(0, len(window), size))


def precision():
    """Returns bfloat16 with an accelerator, otherwise float32."""
    from deepspeed.accelerator import get_accelerator
    return torch.float32 if get_accelerator().device_name() == "cpu" else torch.bfloat16


def load_answering_model(args, tokenizer, device):
    """Returns the model, which generates as the flags say: its own sampling defaults (a repetition
    penalty in Qwen2.5-VL's release) are put aside."""
    from transformers import GenerationConfig
    model = load_model(args, {"bf16": {"enabled": precision() == torch.bfloat16}})
    sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    model.generation_config = GenerationConfig(
        max_new_tokens=args.max_new_tokens, num_return_sequences=args.samples,
        **(sampling if args.temperature else {}), eos_token_id=stop_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id, suppress_tokens=forbidden_tokens(model, tokenizer))
    return model.to(device).eval()


if __name__ == "__main__":
    run_script(main, parse_args)
