"""Annotation: chains of thought by a large model, filtered by rules (paper, section 3.1).

    python annotate.py --data train.json --out cot.json --model Qwen/Qwen2.5-VL-72B-Instruct \
        --api_base http://localhost:8000/v1
    deepspeed annotate.py --data train.json --out cot.json --model Qwen/Qwen2.5-VL-7B-Instruct

The model gets the prompt of training and evaluation, and generates --samples responses to each
record. It runs behind any server that speaks OpenAI's protocol (--api_base), or with transformers
on this machine. Each rank then holds the whole model: if it does not fit, use a server. The filter
rejects a response for the first of these reasons:

    truncated     it did not end within --max_new_tokens
    format        it is not one <think> block, then one <answer> block, and nothing else
    answer        the answer is not of its problem type: one option, one number, or some text
    accuracy      its accuracy reward is not above --min_accuracy
    length        the thought has fewer than --min_think or more than --max_think characters
    refusal       the thought has a phrase such as "I'm sorry" or "unable to view the video"
    leak          it repeats six words in a row of the prompt's instructions
    language      too few words of the thought are in the question's script (Latin, Han, ...)
    repetition    too many of the thought's 6-grams occurred before in it

A record gets the most accurate response that passes. Whether a thought is true is not checked.

--out has the annotated records for sft.py: the thought is the field `process`. Beside cot.json are
`cot.rank<r>.jsonl` with all responses, `cot.rejected.jsonl` with the responses and reasons of
records without a passing response, and `cot.report.md` with the counts. The same command resumes,
on any number of ranks. It generates what is missing or failed, and always filters again.

Shapes: B records of a batch, n responses to each, L tokens, T frames, C channels, H x W pixels.
"""
import argparse
import base64
import ctypes
import hashlib
import io
import json
import os
import random
import re
import signal
import sys
import time
import unicodedata
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, as_completed, wait
from datetime import timedelta
from functools import cached_property, lru_cache, partial
from glob import escape
from itertools import islice
from pathlib import Path

import requests
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm
from urllib3.exceptions import HTTPError

from build_data import (ANSWER_SUFFIX, SAMPLING_FLAGS, TEMPLATE, UNUSABLE, FlagParser, InputError,
                        MediaError, Vision, above, add_machine_flags, add_media_flags, as_in_file,
                        at_least, build_messages, encode, forbidden_tokens, generate, json_file,
                        json_list, load_model, load_processor, load_records, load_vision_of,
                        make_folder_of, markdown, model_hash, number, record_seed, require_same,
                        row_writer, run_script, setup_distributed, skip_row, stop_tokens,
                        whole_rows, write_whole)
from rewards import (WORD, accuracy_reward, choice_letter, extract_answer, format_reward,
                     parse_number)

REASONS_SHOWN = 20  # in the report: the most frequent reasons why a record has no response
NGRAM = 6  # words; so many in a row are rarely shared with the prompt, or repeated, by chance
EAST_ASIAN = {"HIRAGANA", "KATAKANA", "HANGUL"}  # counted as Han, which Unicode's names call CJK

QUOTATION = re.compile(r"\"[^\"\n]*\"|(?<!\w)'(?=\w).{1,200}?'(?!\w)")
VIDEO = r"(?:(?:the|this|any|your) )?(?:video|image|clip|picture|frame)s?\b"
VIEW = rf"(?:\w+ly )?(?:see|view|watch|access|open|process) {VIDEO}"
REFUSAL = re.compile("|".join([
    r"\bi(?:'m| am) sorry|\bi apologi[sz]e\b|\bmy apologies|\bi (?:can't|cannot) assist\b",
    r"\bas an ai,|\b(?:i(?:'m| am)|as)(?: \w+,?)? an? (?:[\w-]+ ){0,3}(?:language|text-based)"
    r" model\b",
    rf"\bi (?:can't|cannot|couldn't|could not) {VIEW}",
    rf"(?:\bunable|\bnot able|n't able|\bno way|\bthe ability) to {VIEW}",
    rf"\b(?:i (?:don't|do not) (?:\w+ )?have|without) access to {VIDEO}",
    rf"\b(?:no|any) {VIDEO} (?:is |was |were )?(?:provided|attached)\b",
    rf"\b{VIDEO} (?:is|was|were)(?: not|n't) (?:provided|attached|available)\b",
    "抱歉,|(?:作为|是)(?:一个)?(?:人工智能|语言模型)",
    "(?:无法|不能)(?:直接)?(?:查看|观看|看到)(?:视频|图片|图像)|(?:视频|图片|图像)(?:没有|未)提供",
]), re.IGNORECASE)


def parse_args(argv=None):
    parser = FlagParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    # data and model
    add("--model", required=True,
        help="Hugging Face directory or name; with --api_base, the server's name for it")
    add("--data", required=True, help="records to annotate, .json or .jsonl")
    add("--out", type=json_file, required=True, help="file of annotated records to write, .json")
    add("--limit", type=above(0, int),
        help="only the first records, as a trial; without it the same command adds the others")
    # responses; the released annotation had top_p 0.95 and 512 new tokens
    add("--samples", type=above(0, int), default=1,
        help="responses to each record, of which the best is kept")
    add_generation_flags(add, temperature=1.0, top_p=0.95, max_new_tokens=768)
    # the filter
    add("--min_accuracy", type=float, default=0.6, help="a kept accuracy reward is above this")
    add("--min_think", type=int, default=40, help="fewest characters of a thought")
    add("--max_think", type=int, default=6000, help="most characters of a thought")
    add("--min_language", type=float, default=0.7,
        help="smallest share of a thought's words in the question's script")
    add("--max_repetition", type=float, default=0.3,
        help="largest share of a thought's 6-grams that occurred before in it")
    # media and machine
    add_media_flags(add)
    add_machine_flags(add)
    args = parser.parse_args(argv)
    if args.samples > 1 and not args.temperature:
        parser.error(f"--samples {args.samples} at --temperature 0 are all the same: raise it")
    return args


# ------------------------------------------------------------------- the filter, pure functions

def thought_of(response):
    """Returns the text of a well-formed response's <think> block."""
    return response.partition("<think>")[2].partition("</think>")[0].strip()


def without_quotations(text):
    """Returns a text in the Unicode form NFKC, without quotations.

    >>> without_quotations("I’m sure: he waves “goodbye”。")
    "I'm sure: he waves  。"
    """
    text = re.sub("[“”„「」『』«»]", '"', re.sub("[’‘ʼ＇`´]", "'", text))
    return QUOTATION.sub(" ", unicodedata.normalize("NFKC", text))


def ngrams(text):
    """Returns the 6-grams of a text in lower case. Each Han or kana character is a word.

    >>> ngrams("Let me think, it is 小狗")
    [('let', 'me', 'think', 'it', 'is', '小'), ('me', 'think', 'it', 'is', '小', '狗')]
    """
    words = WORD.findall(text.lower())
    return list(zip(*(words[i:] for i in range(NGRAM))))


# without 'oh, I see' and the other quoted expressions, which a thought is to use
INSTRUCTIONS = {ngram for suffix in ANSWER_SUFFIX.values() for ngram in
                ngrams(without_quotations(TEMPLATE.replace("{question}", "")) + suffix)}


def repetition(text):
    """Returns the share of 6-grams that occurred before in the text, in [0, 1].

    >>> repetition("a b c d e f"), repetition("wait " * 15)
    (0.0, 0.9)
    """
    found = ngrams(text)
    return 1 - len(set(found)) / len(found) if found else 0.0


def count_scripts(text):
    """Counts a text's words outside quotations by the script of their first letter.

    Each Han or kana character is a word. Han, kana and Hangul are counted as one script.

    >>> count_scripts("求 sin(AB): 小狗 'or' dog")
    Counter({'CJK': 3, 'LATIN': 3})
    """
    words = WORD.findall(without_quotations(text))
    scripts = [unicodedata.name(word[0], "UNKNOWN").split()[0] for word in words
               if word[0].isalpha()]
    return Counter("CJK" if script in EAST_ASIAN else script for script in scripts)


def language_share(thought, problem):
    """Returns the share of a thought's words that are in the problem's most frequent script.

    Latin and Greek letters also occur in formulas, so another script in the problem wins.

    >>> language_share("这是 my dog", "What is it?"), language_share("两只狗", "求 sin x")
    (0.5, 1.0)
    """
    expected, found = count_scripts(problem), count_scripts(thought)
    if not expected or not found:
        return 1.0
    script = max(expected, key=lambda name: (name not in ("LATIN", "GREEK"), expected[name]))
    return found[script] / found.total()


def has_form(answer, record):
    """Returns whether the answer is of its problem type: one option, one number, or some text."""
    if record["problem_type"] == "multiple choice":
        return bool(choice_letter(answer, record["options"]))
    if record["problem_type"] in ("numerical", "regression"):
        return parse_number(answer) is not None
    return bool(answer)


def reject_reason(response, truncated, record, args):
    """Returns the first reason to reject a response (list: top of this file), or None."""
    thought = thought_of(response)
    checks = {
        "truncated": lambda: truncated,
        "format": lambda: not format_reward(response),
        "answer": lambda: not has_form(extract_answer(response), record),
        "accuracy": lambda: accuracy_reward(response, record) <= args.min_accuracy,
        "length": lambda: not args.min_think <= len(thought) <= args.max_think,
        "refusal": lambda: REFUSAL.search(without_quotations(thought)),
        "leak": lambda: not INSTRUCTIONS.isdisjoint(ngrams(response)),
        "language": lambda: language_share(thought, record["problem"]) < args.min_language,
        "repetition": lambda: repetition(thought) > args.max_repetition}
    return next((reason for reason, fails in checks.items() if fails()), None)


def choose(record, row, args):
    """Returns (the annotated record or None, [(reason or None, response), ...]) for a record and
    its row. Takes the first response with the highest accuracy reward, of those that pass."""
    judged = [(reject_reason(text, cut, record, args), text)
              for text, cut in zip(row.get("output", []), row.get("truncated", []))]
    passed = [text for reason, text in judged if reason is None]
    if not passed:
        return None, judged
    best = max(passed, key=lambda text: accuracy_reward(text, record))
    return as_in_file(record) | {"process": f"<think>{thought_of(best)}</think>"}, judged


# --------------------------------------------------------------------------------- the command

def row_of(sample, responses, seconds):
    """Returns the log row of one record's responses, [(text, tokens, truncated), ...]."""
    texts, tokens, truncated = map(list, zip(*responses))
    return {"problem_id": sample["record"]["problem_id"], "output": texts, "tokens": tokens,
            "truncated": truncated, "seconds": seconds}


def write_result(records, rows, args):
    """Writes --out, the rejected responses and the report, and returns the report."""
    kept, rejected, reasons = [], [], Counter()
    rows = [rows[str(record["problem_id"])] for record in records]  # not those beyond --limit
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

    # ------------------------------------------------- responses, row by row, then the filter
    rows = collect_responses(generator, out.parent, out.stem, records, configuration,
                             partial(prepare, generator.processor, args), row_of)
    if generator.rank == 0:
        print(write_result(records, rows, args))


# ============ generating responses, on this machine or through a server; shared with evaluate.py

http_url = number(str, lambda text: text.startswith(("http://", "https://")),
                  "a URL that begins with http:// or https://")


def add_generation_flags(add, temperature, top_p, max_new_tokens):
    """Adds the flags of generation. `add`: a parser's add_argument. The others: defaults."""
    add("--temperature", type=at_least(0, float), default=temperature,
        help="sampling temperature; 0: greedy")
    add("--top_p", type=above(0, float, 1), default=top_p, help="nucleus sampling; 1: off")
    add("--max_new_tokens", type=above(0, int), default=max_new_tokens,
        help="most tokens of a response")
    add("--batch_size", type=above(0, int), default=8, help="records of a batch on a rank")
    # a server
    add("--api_base", type=http_url, help="generate through this server, for example "
        "http://localhost:8000/v1; if it needs a key, set the environment variable OPENAI_API_KEY")
    add("--api_body", type=request_keys, help="JSON object that is merged into each request; null "
        'removes a key: {"max_tokens": null, "max_completion_tokens": 1024}')
    add("--api_timeout", type=above(0, float), default=600,
        help="timeout of a request, in seconds until its last byte")
    add("--api_retries", type=at_least(0, int), default=6, help="retries of a failed request")
    add("--concurrency", type=above(0, int), default=32, help="concurrent requests of a rank")


def request_keys(text):
    """Parses --api_body, a JSON object. Refuses keys that the run sets itself."""
    try:
        keys = json.loads(text)
        json.dumps(keys, allow_nan=False)  # a server cannot read NaN
        fixed = keys.keys() & {"messages", "model", "stream"}
    except (ValueError, AttributeError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text} is not a JSON object: {error}") from None
    if fixed:
        raise argparse.ArgumentTypeError(f"{text} must not have {' or '.join(sorted(fixed))}")
    return keys


# ------------------------------------------------------------------- rows, which survive a kill

LONGEST_WAIT = timedelta(days=7)  # how long the first rank to finish waits for the last
PR_SET_PDEATHSIG = 1  # of Linux's sys/prctl.h


class Generator:
    """Generates a rank's responses, through a server or with a model on this machine."""

    def __init__(self, args):
        self.args = args
        self.processor = None if args.api_base else load_processor(args)
        self.rank, self.device = setup_distributed(args)
        self.ranks = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)

    @cached_property
    def model(self):  # loaded when the first batch needs it
        return load_answering_model(self.args, self.processor.tokenizer, self.device)


def prepare(processor, args, record, change=None):
    """Returns a record's sample, or its skip row if the file cannot be used.

    A sample is {"record", "size": [T, H, W], "inputs"}. Without a processor, it has "messages" for
    a server instead of "inputs". change(vision) returns other pixels to use.
    """
    try:
        vision = load_vision_of(record, args, processor)
    except MediaError as error:
        return skip_row(record, error)
    vision = change(vision) if change else vision
    frames = vision.frames  # (T, C, H, W)
    size = [1, *vision.image.size[::-1]] if frames is None else [*frames[:, 0].shape]
    sample = {"record": record, "size": size}
    if processor is None:
        return sample | {"messages": api_messages(record, vision)}
    return sample | {"inputs": encode(processor, record, vision)}


def collect_responses(generator, output, stem, records, configuration, prepare, row_of):
    """Generates the missing responses, each rank its share. Returns the rows of all ranks and
    earlier runs, {problem_id as text: row}. They are in the files output/stem.rank<r>.jsonl.

    prepare(record) runs in worker processes and returns a sample or a skip row.
    row_of(sample, its responses, seconds) returns the row to write.
    """
    args, world = generator.args, dist.get_world_size()
    rows = read_rows(output, stem, configuration)
    missing = [record for record in records
               if "output" not in rows.get(str(record["problem_id"]), {})]
    # earlier failures come last: at the start, they could end the run (see MOST_FAILURES)
    missing.sort(key=lambda record: str(record["problem_id"]) in rows)
    dist.barrier(generator.ranks)  # all ranks have read the rows before one of them adds more
    if missing:
        share = missing[generator.rank::world]
        # the next batch is decoded while this one is generated
        ahead = -(-args.batch_size // args.num_workers) if args.num_workers else None
        samples = DataLoader(share, batch_size=None, collate_fn=prepare, prefetch_factor=ahead,
                             num_workers=args.num_workers, worker_init_fn=die_with_parent)
        path = Path(output) / f"{stem}.rank{generator.rank}.jsonl"
        with row_writer(path, len(share), configuration, generator.rank != 0) as write:
            samples = write_skipped(samples, write)
            if args.api_base:
                generate_on_server(args, samples, row_of, write, len(missing) < len(records))
            else:
                generate_locally(generator, samples, row_of, write)
    dist.barrier(generator.ranks)
    return read_rows(output, stem, configuration)


def die_with_parent(_):
    """Makes the kernel kill a data worker if the main process is killed. Otherwise the worker could
    block forever on a full pipe that no process reads."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def write_skipped(samples, write):
    """Writes the skip rows among the samples, and yields the others."""
    for sample in samples:
        if "reason" in sample:
            write([sample])
        else:
            yield sample


def refuse_repeated_ids(path, records):
    """Raises InputError if two records have the same problem_id, which is the key of a row."""
    problem_id, count = Counter(str(r["problem_id"]) for r in records).most_common(1)[0]
    if count > 1:
        raise InputError(f"{path}: {count} records have the problem_id {problem_id}: number them")


def read_rows(output, stem, configuration):
    """Returns the rows of all ranks and earlier runs, {problem_id as text: row}. If a record has
    both responses and a skip row, the responses count.

    Raises InputError if the rows have another configuration. The model's path may differ if its
    hash is equal.
    """
    free, rows = {"model"} if "model_sha256" in configuration else (), {}
    for path in sorted(Path(output).glob(f"{escape(stem)}.rank*.jsonl")):
        first, *others = whole_rows(path) or [configuration]
        require_same(path, first, configuration, f"It is of --model {first.get('model')}: write to "
                     "another place, or remove it", free)
        for row in others:
            if "output" not in rows.get(str(row["problem_id"]), {}):
                rows[str(row["problem_id"])] = row
    return rows


def configuration_of(generator, *more):
    """Returns all settings that affect the responses. more: names of further flags."""
    args = generator.args
    flags = ("model", *SAMPLING_FLAGS, "temperature", "top_p", "max_new_tokens", "seed", *more)
    engine = {"engine": "api", "api_body": args.api_body} if args.api_base else {
        "engine": "transformers", "model_sha256": model_hash(args.model),
        "dtype": str(precision()), "attn_implementation": args.attn_implementation,
        "chat_template": generator.processor.chat_template}
    return {flag: getattr(args, flag) for flag in flags} | engine | {
        "template": TEMPLATE, "answer_suffix": ANSWER_SUFFIX}


# ------------------------------------------------------------------------------------ a server

JPEG_QUALITY = 95  # of frames sent to a server; Pillow's highest sensible value


def api_messages(record, vision: Vision) -> list[dict]:
    """Returns build_messages in OpenAI's protocol. An image is sent as PNG, a video as its sampled
    frames in JPEG. The server sees them as separate images, without times."""
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


KEY_VARIABLE = "OPENAI_API_KEY"  # the key is read only from here, and never written
CONNECT_TIMEOUT = 10.0  # seconds
FIRST_PAUSE = 1.0  # seconds before the first retry, doubled for each further one
LONGEST_PAUSE = 600  # seconds; if Retry-After is longer, the run ends
REPLY_PART = 2**16  # bytes that are read at once
LARGEST_REPLY = 2**21  # bytes; the filter would take seconds for each megabyte
FATAL_STATUS = {*range(300, 400), 401, 402, 403, 404}  # HTTP: every request of the run would fail
NO_RETRY_STATUS = {*range(400, 500)} - FATAL_STATUS - {408, 409, 425, 429}  # this request fails
ERROR_SHOWN = 300  # characters of an error in a message
MOST_FAILURES = 20  # failed requests in a row that end the run
MALFORMED_REPLY = (LookupError, AttributeError, TypeError, ValueError, ArithmeticError,
                   RecursionError)  # errors of parsing an unexpected reply
ERROR_MESSAGE = re.compile(r'"message": *"((?:[^"\\]|\\.)+)"')  # in the JSON of an error
# finish_reason: OpenAI's own first, then those of TGI, Together, Mistral and Bedrock
ENDED = {"stop", "eos_token", "eos", "stop_sequence", "end_turn"}
CUT_OFF = {"length", "max_tokens", "model_length"}


class ApiError(RuntimeError):
    """Reports that a request failed, and all its retries."""


class Refused(ApiError):
    """Reports that the server refused a request or broke off a response. Others can succeed."""


def request_responses(args, messages, seed):
    """Returns args.samples responses of a server, [(text, tokens, truncated), ...].

    Raises ApiError if the last retry fails, Refused if a retry cannot help, and InputError if no
    request of this run can succeed.
    """
    url = args.api_base.rstrip("/") + "/chat/completions"
    responses, failures = [], 0
    while len(responses) < args.samples:  # some servers ignore n and return one response
        body = {"model": args.model, "messages": messages, "n": args.samples - len(responses),
                "temperature": args.temperature, "top_p": args.top_p,
                "max_tokens": args.max_new_tokens, "seed": seed + len(responses)}
        body |= args.api_body or {}
        status, header, text = send(args, url, {
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
        message = ERROR_MESSAGE.search(text)
        reason = f"{reason}: {message[1] if message else text}"[:ERROR_SHOWN].rstrip(". :")
        seconds = int(header) if re.fullmatch(r"\d{1,9}", header) else 0
        reason += f" (Retry-After: {seconds})" if seconds else ""
        if status in FATAL_STATUS or seconds > LONGEST_PAUSE:
            raise InputError(f"{url} refuses model {args.model}: {reason}. Check --model, "
                             f"--api_base and {KEY_VARIABLE}, or repeat the command later: it "
                             "resumes")
        if status in NO_RETRY_STATUS:
            raise Refused(f"{url}: {reason}")
        pause = min(max(seconds, FIRST_PAUSE * 2**failures), LONGEST_PAUSE)
        failures += 1
        if failures > args.api_retries:
            raise failure(f"{url}: {failures} attempts failed, the last: {reason}")
        if seconds:
            print_once(f"{url}: {reason}")
        # unseeded jitter: requests that failed together must not be retried together
        time.sleep(pause + random.uniform(0, FIRST_PAUSE))
    return responses[:args.samples]


def send(args, url, body):
    """Sends a request and returns (status, Retry-After, text) of the reply. The key is removed from
    the text. If no complete reply arrives in --api_timeout, or if it is too large, the status is 0
    and the text is the reason."""
    deadline = time.monotonic() + args.api_timeout
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):  # `requests` would print it in an error
        raise InputError(f"{KEY_VARIABLE} holds characters that no key has: set it again")

    def add_key(request):  # passed as `auth`, because ~/.netrc would replace a plain header
        request.headers.update({"Authorization": f"Bearer {key}"} if key else {})
        return request
    try:  # a redirect is not followed: it would send the pictures and the key elsewhere
        with requests.post(url, json=body, auth=add_key, stream=True, allow_redirects=False,
                           timeout=(CONNECT_TIMEOUT, args.api_timeout)) as reply:
            status, header = reply.status_code, reply.headers.get("Retry-After", "")
            data = bytearray()
            while part := reply.raw.read1(REPLY_PART, decode_content=True):  # what has arrived
                data += part
                if time.monotonic() > deadline:
                    raise requests.Timeout("the reply was not complete within --api_timeout")
                if len(data) > LARGEST_REPLY:
                    raise ValueError(f"the reply has more than {LARGEST_REPLY} bytes")
            text = reply.headers["Location"] if reply.is_redirect else data.decode(
                errors="strict" if status == 200 else "replace")
    except (requests.RequestException, HTTPError, ValueError) as error:
        status, header, text = 0, "", f"{type(error).__name__}: {error}"
    return status, header, text.replace(key, f"<{KEY_VARIABLE}>") if key else text


@lru_cache(maxsize=100)
def print_once(text):
    """Prints a text only once, because many requests have the same error."""
    tqdm.write(text, file=sys.stderr)


def read_choices(reply):
    """Returns the responses in a server's reply, [(text, tokens, truncated), ...]. Raises Refused
    if one was broken off, and one of MALFORMED_REPLY if the reply cannot be read.

    If the server returns the thought in a field of its own, it is put back into the text. A reply
    has only the token count of all its responses: each gets the mean, or None without a count.

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
            text = "<think>" + thought + ("</think>\n" + text if text else "")
        # without a finish_reason, a response that has a text counts as ended
        ended = finish in ENDED and text is not None if finish else text
        if not ended and not cut:
            raise Refused(f"finish_reason {finish!r} is no answer")
        text = text or ""
        if UNUSABLE.search(text):  # raises TypeError if it is not a string
            raise ValueError("a response has a character that no text has")
        responses.append((text, tokens and round(tokens / len(choices)), cut))
    return responses


def generate_on_server(args, samples, row_of, write, answered=False):
    """Generates responses to samples, args.concurrency requests at a time, and writes their rows.
    A request that fails gets a skip row.

    Raises InputError if MOST_FAILURES requests in a row fail. If the server has `answered` any
    request, Refused ones do not count, because the fault is then in the request.
    """
    running, failed = set(), 0

    def work(sample):  # each thread writes its row at once, so that a kill loses none
        record, started = sample["record"], time.perf_counter()
        try:
            seed = record_seed(args.seed, record)
            responses = request_responses(args, sample["messages"], seed)
        except ApiError as error:
            write([skip_row(record, error)])
            return error
        write([row_of(sample, responses, time.perf_counter() - started)])

    def check(futures):
        nonlocal answered, failed
        for error in (future.result() for future in futures):
            if error is None:
                answered, failed = True, 0
            elif not (answered and isinstance(error, Refused)):
                failed += 1
            if failed >= MOST_FAILURES:
                raise InputError(f"{failed} requests in a row failed, the last: {error} "
                                 "(--api_body changes what a request holds)")

    pool = ThreadPoolExecutor(args.concurrency)
    try:
        for sample in samples:
            if len(running) == args.concurrency:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                check(done)
            running.add(pool.submit(work, sample))
        check(as_completed(running))
    finally:  # after an error, the other requests' retries are not awaited
        pool.shutdown(wait=False, cancel_futures=True)


# ------------------------------------------------------------------- a model on this machine

def cut_at_end(ids, end_ids):
    """Returns (the ids up to and with the first end token, whether there is no end token).

    >>> cut_at_end([5, 6, 2, 0, 0], {2, 0}), cut_at_end([5, 6], {2, 0})
    (([5, 6, 2], False), ([5, 6], True))
    """
    end = next((i + 1 for i, token in enumerate(ids) if token in end_ids), None)
    return ids[:end], end is None


@torch.inference_mode()
def respond(model, tokenizer, samples, seed):
    """Returns the n responses [(text, tokens, truncated), ...] to each of B samples."""
    config = model.generation_config
    # transformers samples with torch's global generator, seeded here by the batch's first record
    torch.manual_seed(record_seed(seed, samples[0]["record"]))
    ids = generate(model, [sample["inputs"] for sample in samples])  # (B n, L)
    cut = [cut_at_end(row, config.eos_token_id) for row in ids.tolist()]
    responses = [(tokenizer.decode(ids, skip_special_tokens=True), len(ids), truncated)
                 for ids, truncated in cut]
    n = config.num_return_sequences
    return [responses[i:i + n] for i in range(0, len(responses), n)]


def generate_locally(generator, samples, row_of, write):
    """Generates responses to samples, batch by batch, and writes their rows."""
    args, tokenizer = generator.args, generator.processor.tokenizer
    while batch := list(islice(samples, args.batch_size)):
        model, started = generator.model, time.perf_counter()
        responses = respond(model, tokenizer, batch, args.seed)
        seconds = (time.perf_counter() - started) / len(batch)
        write([row_of(sample, its, seconds) for sample, its in zip(batch, responses)])


def precision():
    """Returns bfloat16 with an accelerator, otherwise float32."""
    from deepspeed.accelerator import get_accelerator
    return torch.float32 if get_accelerator().device_name() == "cpu" else torch.bfloat16


def load_answering_model(args, tokenizer, device):
    """Returns the model with a generation config made from the flags. The model's own, such as
    the repetition penalty of Qwen2.5-VL's release, is not used."""
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
