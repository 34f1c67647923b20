"""Annotation: what a server may do, which responses are kept, and a kill in the middle."""
import base64
import doctest
import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import psutil
import pytest

import annotate
import build_data
from annotate import ApiError, api_messages, parse_args, reject_reason
from build_data import InputError, build_messages, load_records, load_vision
from conftest import ROOT, cells, run

KEY = "sk-very-secret-1234567890"
THOUGHT = "Let me think: the block starts on the left and it ends on the right."
GOOD = f"<think>{THOUGHT}</think><answer>{{}}</answer>"
LIMITS = {"max_frames": 8, "min_frames": 4, "fps": 2, "min_pixels": 784, "max_pixels": 784}
SMALL = ("--max_frames", "8", "--min_pixels", "784", "--max_pixels", "784",
         "--image_min_pixels", "784", "--image_max_pixels", "784")


def reply(*texts, finish="stop"):
    """A server's reply in OpenAI's form, 7 tokens a text."""
    choices = [{"message": {"content": text}, "finish_reason": finish} for text in texts]
    return {"choices": choices, "usage": {"completion_tokens": 7 * len(texts)}}


class Server:
    """A real HTTP server on this machine. `answer(body, number)` returns what to send: a dict, or
    (status, headers, text), or a text; or pieces of a text, with pauses; or None, to hang up."""

    def __init__(self, answer):
        outer, self.requests, self.lock = self, [], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # a connection serves many requests

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append((self.path, dict(self.headers), body, time.monotonic()))
                    number = len(outer.requests) - 1
                sent = answer(body, number)
                status, headers, text = sent if isinstance(sent, tuple) else (200, {}, sent)
                self.close_connection = sent is None or "Content-Length" in headers
                if sent is None:
                    return
                self.send_response(status)
                if isinstance(text, (str, dict)):
                    text = [json.dumps(text) if isinstance(text, dict) else text]
                    headers = {"Content-Length": str(len(text[0].encode()))} | headers
                else:
                    self.close_connection = True
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                with suppress(OSError):  # the client may have hung up
                    for piece in text:
                        self.wfile.write(piece.encode())

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(annotate, "FIRST_PAUSE", 0.01)


def flags(server, *more):
    return parse_args(["--model", "m", "--data", "d", "--out", "o.json", "--api_base", server.base,
                       "--api_timeout", "1", "--api_retries", "2", *more])


HI = [{"role": "user", "content": "Hi"}]


def ask(server, n=1, *more):
    args = flags(server, "--samples", str(n), *more)
    return annotate.request_responses(args, HI, seed=5)


# ----------------------------------------------------------------------------- the server

def test_a_request_carries_the_sampling_and_the_key_and_answers_come_with_their_tokens():
    with Server(lambda body, number: reply("a", "b")) as server:
        assert ask(server, 2) == [("a", 7, False), ("b", 7, False)]
        path, headers, body, _ = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert body == {"model": "m", "messages": HI, "n": 2, "seed": 5, "temperature": 1.0,
                    "top_p": 0.95, "max_tokens": 768}


@pytest.mark.parametrize("fault", [
    (500, {}, "out of memory"), (429, {}, "slow down"), (503, {}, ""), (204, {}, ""), None, "[",
    "[]", "{}", {"choices": []}, {"choices": [{}], "usage": {"completion_tokens": 1}},
    reply([{"type": "text", "text": "a"}]), reply("half \ud83d"),
    (200, {"Content-Length": "5000"}, '{"choices": [{"mess')])
def test_a_fault_that_passes_costs_a_repeated_request(fault):
    with Server(lambda body, number: fault if number == 0 else reply("a")) as server:
        assert ask(server) == [("a", 7, False)]
        assert len(server.requests) == 2


def choice(finish, content, usage={"completion_tokens": 30}, **message):
    """A reply of one choice, as it stands; `finish` None: it does not say how it ended."""
    said = {"message": {"content": content, **message}}
    return {"choices": [said | ({"finish_reason": finish} if finish else {})], "usage": usage}


@pytest.mark.parametrize("sent, answer", [
    (choice("stop", "a", None), ("a", None, False)),
    ({"choices": choice("stop", "a")["choices"]}, ("a", None, False)),
    (choice("stop", "a", {"completion_tokens": None}), ("a", None, False)),
    (choice("stop", "a", {}), ("a", None, False)),
    (choice(None, "a"), ("a", 30, False)),
    (choice("", "a"), ("a", 30, False)),
    (choice("STOP", "a"), ("a", 30, False)),
    (choice("eos_token", "a"), ("a", 30, False)),
    (choice("end_turn", "a"), ("a", 30, False)),
    (choice("stop", ""), ("", 30, False)),
    (choice("length", None), ("", 30, True)),
    (choice("max_tokens", "<think>a"), ("<think>a", 30, True)),
    (choice("MAX_TOKENS", "<think>a"), ("<think>a", 30, True)),
    (choice("model_length", "<think>a"), ("<think>a", 30, True)),
    (choice("stop", "b", reasoning_content="a"), ("<think>a</think>\nb", 30, False)),
    (choice("stop", "b", reasoning="a"), ("<think>a</think>\nb", 30, False)),
    (choice("stop", "b", reasoning_content=None, reasoning="a"),
     ("<think>a</think>\nb", 30, False)),
    (choice("stop", "b", reasoning_content=""), ("b", 30, False)),
    (choice("stop", "<think>a</think>b", reasoning_content="c"), ("<think>a</think>b", 30, False)),
    (choice("length", None, reasoning_content="a"), ("<think>a", 30, True)),
    (choice("length", "b", reasoning_content="a"), ("<think>a</think>\nb", 30, True))])
def test_an_answer_is_taken_with_its_thought_whatever_the_server_leaves_out(sent, answer):
    with Server(lambda body, number: sent) as server:
        assert ask(server) == [answer]
        assert len(server.requests) == 1


@pytest.mark.parametrize("sent, told", [
    (choice("abort", ""), "finish_reason 'abort' is no answer"),
    (choice("abort", "<think>the block sta"), "finish_reason 'abort'"),
    (choice("error", "half an answer"), "finish_reason 'error'"),
    (choice("content_filter", ""), "finish_reason 'content_filter'"),
    (choice("content_filter", "half an answer"), "finish_reason 'content_filter'"),
    (choice("tool_calls", None, tool_calls=[{"id": "1"}]), "finish_reason 'tool_calls'"),
    (choice("stop", None, tool_calls=[{"id": "1"}]), "finish_reason 'stop'"),
    (choice("repetition", "a a a"), "finish_reason 'repetition'"),
    (choice(None, ""), "finish_reason ''"),
    (choice(None, None), "finish_reason ''"),
    ({"choices": [{"message": {"content": ""}, "finish_reason": "error",
                   "error": {"code": 502, "message": "Upstream overloaded"}}]},
     "finish_reason 'error' is no answer: Upstream overloaded$")])
def test_what_ended_neither_by_itself_nor_by_its_length_is_no_answer(sent, told):
    """It is asked for again, and then told as the request's fault: the server lives."""
    with Server(lambda body, number: sent) as server:
        with pytest.raises(annotate.Refused, match=f"3 attempts failed, the last: {told}"):
            ask(server)
        assert len(server.requests) == 3
    with Server(lambda body, number: sent if number == 0 else reply("a")) as server:
        assert ask(server) == [("a", 7, False)]


@pytest.mark.parametrize("status, sent, told", [
    (200, {"error": {"message": "overloaded", "type": "server_error"}}, "overloaded"),
    (200, {"object": "error", "message": "overloaded", "code": 500}, "overloaded"),
    (200, {"error": "overloaded"}, "overloaded"),
    (500, {"trace": "x" * 1000, "error": {"message": "overloaded"}}, "HTTP 500: overloaded$"),
    (502, "<html>Bad Gateway</html>", "HTTP 502: <html>Bad Gateway</html>$"),
    (400, {"error": {"code": None, "message": "prompt too long"}}, "HTTP 400: prompt too long$"),
    (400, {"detail": "prompt too long"}, 'HTTP 400: {"detail": "prompt too long"}$'),
    (503, "", "HTTP 503$")])
def test_the_servers_own_words_of_an_error_are_told(status, sent, told):
    with Server(lambda body, number: (status, {}, sent)) as server:
        with pytest.raises(ApiError, match=told) as error:
            ask(server)
    assert KEY not in str(error.value) and len(str(error.value)) < 100 + annotate.ERROR_SHOWN


def pieces(text, pause, count):
    """A text again and again, with pauses."""
    for _ in range(count):
        yield text
        time.sleep(pause)


def test_a_request_has_a_total_time_however_slowly_its_reply_comes():
    sent = [lambda: pieces(" ", 0.1, 100), lambda: pieces("", 5, 1), lambda: reply("a")]
    started = time.monotonic()
    with Server(lambda body, number: (200, {}, sent[number]())) as server:
        assert ask(server) == [("a", 7, False)]
    assert time.monotonic() - started < 5


def test_a_reply_without_end_is_given_up(monkeypatch):
    monkeypatch.setattr(annotate, "LARGEST_REPLY", 2**17)
    with Server(lambda body, number: (200, {}, pieces("x" * 2**16, 0, 10**9))) as server:
        with pytest.raises(ApiError, match="no whole reply: .* more than 131072 bytes"):
            ask(server)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_named_and_not_followed(status):
    with Server(lambda body, number: reply("a")) as other:
        with Server(lambda body, number: (status, {"Location": other.base}, "")) as server:
            with pytest.raises(InputError, match=f"HTTP {status}: {other.base}. Check --api_base"):
                ask(server)
        assert len(server.requests) == 1 and other.requests == []


def times_of_requests(answer, *more):
    """When requests came to a server that gives these answers, until one is good."""
    with Server(answer) as server:
        ask(server, 1, *more)
        times = [moment for *_, moment in server.requests]
    return [after - before for before, after in zip(times, times[1:])]


def test_retry_after_is_honoured_in_seconds_and_printed_once(capsys):
    pauses = times_of_requests(lambda body, number: (
        429, {"Retry-After": "1"}, "slow down") if number < 2 else reply("a"))
    assert len(pauses) == 2 and all(1 <= pause < 1.5 for pause in pauses)
    assert capsys.readouterr().err.count("HTTP 429: slow down (Retry-After: 1)") == 1


@pytest.mark.parametrize("wait", ["601", "86400"])
def test_a_retry_after_of_hours_ends_the_run_with_what_the_server_said(wait):
    with Server(lambda body, number: (429, {"Retry-After": wait}, "daily budget spent")) as server:
        with pytest.raises(InputError, match=f"HTTP 429: daily budget spent.*Retry-After: {wait}"):
            ask(server)
        assert len(server.requests) == 1


@pytest.mark.parametrize("text", ["", "soon", "-3", "nan", "9e9", "1.5", "9" * 5000,
                                  "Wed, 21 Oct 2099 07:28:00 GMT"])
def test_any_other_retry_after_means_the_usual_pause(text):
    pauses = times_of_requests(lambda body, number: (429, {"Retry-After": text}, "")
                               if number < 2 else reply("a"))
    assert len(pauses) == 2 and max(pauses) < 1


def test_a_request_is_repeated_after_pauses_that_double(monkeypatch):
    monkeypatch.setattr(annotate, "FIRST_PAUSE", 0.2)
    first, second, third = times_of_requests(
        lambda body, number: (500, {}, "") if number < 3 else reply("a"), "--api_retries", "3")
    assert 0.2 <= first and 0.4 <= second and 0.8 <= third < 2


def test_the_last_error_is_told_without_the_key():
    for before in ("your key ", "x" * (annotate.ERROR_SHOWN - 20)):  # where it would be cut
        with Server(lambda body, number: (500, {}, f"{before}{KEY} broke me")) as server:
            with pytest.raises(ApiError) as error:
                ask(server)
            assert len(server.requests) == 3
        assert f"3 attempts failed, the last: HTTP 500: {before}<OPENAI" in str(error.value)
        assert KEY[:4] not in str(error.value)


@pytest.mark.parametrize("key, sent", [
    (KEY, f"Bearer {KEY}"), (f" {KEY}\n", f"Bearer {KEY}"), ("", None)])
def test_the_key_is_the_environments_without_spaces_and_never_that_of_netrc(
        monkeypatch, tmp_path, key, sent):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with Server(lambda body, number: reply("a")) as server:
        ask(server)
        assert server.requests[0][1].get("Authorization") == sent


@pytest.mark.parametrize("key", [f"{KEY[:9]}\n{KEY[9:]}", f"{KEY}…"])
def test_a_key_with_characters_that_no_key_has_is_refused_and_never_told(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with Server(lambda body, number: reply("a")) as server:
        with pytest.raises(InputError, match="OPENAI_API_KEY holds characters") as error:
            ask(server)
        assert server.requests == []
    assert KEY[:9] not in str(error.value)


@pytest.mark.parametrize("flag, value, told", [
    ("--api_base", "host:8000", "host:8000 must be a URL that begins with http://"),
    ("--temperature", "-1", "-1 must be at least 0"),
    ("--top_p", "0", "0 must be above 0 and at most 1"),
    ("--top_p", "1.5", "1.5 must be above 0 and at most 1"),
    ("--samples", "0", "0 must be above 0"),
    ("--api_retries", "-1", "-1 must be at least 0"),
    ("--limit", "0", "0 must be above 0"),
    ("--concurrency", "0", "0 must be above 0"),
    ("--api_body", "seed", "seed is not a JSON object: Expecting value"),
    ("--api_body", '{"top_p": NaN}', "is not a JSON object: Out of range"),
    ("--api_body", "[1]", "[1] is not a JSON object"),
    ("--api_body", '{"stream": true}', "must not have stream"),
    ("--api_body", '{"model": "x", "messages": []}', "must not have messages or model")])
def test_a_value_that_a_flag_cannot_have_is_told_at_once(flag, value, told, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--model", "m", "--data", "d", "--out", "o.json", flag, value])
    printed = capsys.readouterr().err
    assert flag in printed and told in printed


@pytest.mark.parametrize("more, told", [
    (["--samples", "2", "--temperature", "0"], "--samples 2 at --temperature 0 are all the same"),
    (["--out", "cot.jsonl"], "--out cot.jsonl must end in .json")])
def test_flags_that_do_not_go_together_are_told_before_anything_is_read(more, told, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--model", "absent", "--data", "absent", "--out", "o.json", *more])
    assert told in capsys.readouterr().err


def test_a_bad_request_is_not_repeated_and_a_wrong_key_ends_the_run():
    with Server(lambda body, number: (400, {}, "prompt too long")) as server:
        with pytest.raises(ApiError, match="HTTP 400: prompt too long"):
            ask(server)
        assert len(server.requests) == 1
    for status in (401, 402, 403, 404):
        with Server(lambda body, number: (status, {}, "no")) as server:
            with pytest.raises(InputError, match=f"refuses model m: HTTP {status}: no"):
                ask(server)
            assert len(server.requests) == 1


def test_api_body_goes_over_a_requests_own_keys_and_null_removes_one():
    """A server that returns one response, whatever n is, gets another request and seed."""
    keys = {"max_tokens": None, "max_completion_tokens": 9, "n": None, "temperature": 0.5}
    with Server(lambda body, number: reply(f"seed {body['seed']}")) as server:
        assert [text for text, *_ in ask(server, 2, "--api_body", json.dumps(keys))] == [
            "seed 5", "seed 6"]
        assert server.requests[0][2] == {"model": "m", "messages": HI, "seed": 5, "top_p": 0.95,
                                         "temperature": 0.5, "max_completion_tokens": 9}


def test_a_server_that_is_not_there_is_a_clear_error():
    with Server(lambda body, number: None) as server:
        pass
    with pytest.raises(ApiError, match="3 attempts failed, the last: no whole reply: Connection"):
        ask(server)


def test_at_most_four_requests_run_at_a_time_and_each_has_its_own_seed():
    running, most = [], []

    def answer(body, number):
        running.append(number)
        most.append(len(running))
        time.sleep(0.02)
        running.remove(number)
        return reply("a")
    samples = [{"record": {"problem_id": i, "path": ""}, "messages": HI} for i in range(20)]
    rows = []
    with Server(answer) as server:
        annotate.generate_on_server(flags(server, "--concurrency", "4"), samples, annotate.row_of,
                                    rows.extend)
        assert len(server.requests) == 20 and 1 < max(most) <= 4
        assert len({body["seed"] for _, _, body, _ in server.requests}) == 20
    assert sorted(row["problem_id"] for row in rows) == list(range(20))


# ------------------------------------------------------------------------- what it is sent

def pixels(part):
    from PIL import Image
    kind, _, data = part["image_url"]["url"].partition(";base64,")
    return kind, np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def test_a_server_gets_the_prompt_of_every_stage_and_the_decoded_pixels(toy):
    """An image to the last bit; frames of a video, in order, as near as JPEG is."""
    seen = set()
    for record in load_records(toy / "train.json"):
        if record["data_type"] in seen:
            continue
        seen.add(record["data_type"])
        vision = load_vision(record, **LIMITS)
        (message,), (ours,) = api_messages(record, vision), build_messages(record)
        assert message["role"] == "user" and message["content"][-1] == ours["content"][-1]
        sent = [pixels(part) for part in message["content"][:-1]]
        if vision.frames is None:
            (kind, image), = sent
            assert kind == "data:image/png" and (image == np.asarray(vision.image)).all()
        else:
            frames = vision.frames.permute(0, 2, 3, 1).numpy().astype(int)
            assert [kind for kind, _ in sent] == ["data:image/jpeg"] * len(frames)
            near = np.array([[abs(a - b.astype(int)).mean() for a in frames] for _, b in sent])
            assert near.diagonal().max() < 8
    assert seen == {"image", "video"}


# ------------------------------------------------------------------------------ the filter

CHOICE = {"problem_id": 1, "problem_type": "multiple choice", "problem": "Which way does it move?",
          "options": ["A. left", "B. right"], "solution": "<answer>B</answer>"}
NUMBER = CHOICE | {"problem_type": "numerical", "options": [], "solution": "<answer>3</answer>"}
TEXT = CHOICE | {"problem_type": "free-form", "options": [],
                 "solution": "<answer>a red block moves right</answer>"}


def judge(response, record=CHOICE, truncated=False, *more):
    args = parse_args(["--model", "m", "--data", "d", "--out", "o.json", *more])
    return reject_reason(response, truncated, record, args)


def thought(text, answer="B"):
    return f"<think>{text}</think>\n<answer>{answer}</answer>"


@pytest.mark.parametrize("reason, response, record", [
    (None, GOOD.format("B"), CHOICE),
    (None, GOOD.format("(b) right"), CHOICE),
    (None, GOOD.format("3.0"), NUMBER),
    (None, GOOD.format("A red block moves right"), TEXT),
    ("format", THOUGHT + "<answer>B</answer>", CHOICE),
    ("format", GOOD.format("B") * 2, CHOICE),
    ("format", "Sure! " + GOOD.format("B"), CHOICE),
    ("format", f"<think>{THOUGHT}</think><think>x</think><answer>B</answer>", CHOICE),
    ("answer", GOOD.format("left or right"), CHOICE),
    ("answer", GOOD.format("3 or 4"), NUMBER),
    ("answer", GOOD.format(" "), TEXT),
    ("accuracy", GOOD.format("A"), CHOICE),
    ("accuracy", GOOD.format("4"), NUMBER),
    ("accuracy", GOOD.format("a blue cat sits"), TEXT),
    ("length", thought("Right."), CHOICE),
    ("length", thought(" ".join(f"step {i}" for i in range(2000))), CHOICE),
    ("refusal", thought("As an AI language model I do not see, but it may well be right."), CHOICE),
    ("refusal", thought("I'm sorry, there is nothing to go by, so I just guess: right."), CHOICE),
    ("refusal", thought("No video was provided, but such blocks mostly move right."), CHOICE),
    (None, thought("Hmm, I can't see its left edge at first, but then it moves right."), CHOICE),
    ("leak", thought("I must provide my reasoning and then give your final answer between the "
                     "answer tags, so: right."), CHOICE),
    ("language", thought("让我想一想，这个方块从左边开始移动，经过画面的中间，然后一直移动到右边才停下来，"
                         "所以它是向右移动的。因此答案应该是向右。"), CHOICE),
    (None, thought("让我想一想，这个方块从左边开始移动，经过画面的中间，然后一直移动到右边才停下来，"
                   "所以它是向右移动的。"), CHOICE | {"problem": "方块向哪个方向移动？"}),
    ("repetition", thought("it moves to the right, wait, let me look again. " * 9), CHOICE)])
def test_a_response_is_kept_or_rejected_for_the_reason_given(reason, response, record):
    assert judge(response, record) == reason


LOOK = " The picture shows a street, two cars and a shop; first he is at the left edge."


@pytest.mark.parametrize("said", [
    "I’m sorry, but I can’t view the video. I will guess.", "I can´t view the video.",
    "I'm unable to watch videos, so I will guess.", "I cannot see any video, so I guess right.",
    "I don't have access to the video.", "I do not actually have access to the video content.",
    "The video is not provided, so I guess right.", "The video isn’t attached.",
    "There is no video attached, so I guess.", "I don’t see any image attached.",
    "No images were provided.", "I'm currently not able to process images.",
    "I wasn't able to view the video.", "I lack the ability to watch videos.",
    "Without access to the video, I will guess.", "I can’t assist with that.",
    "As an AI, I can only guess.", "As a large language model I have no eyes.",
    "I am a text-based model.", "My apologies, there is no clip.", "I apologize, but I guess.",
    "抱歉，我无法查看视频。", "很抱歉，没有视频。", "由于无法看到视频，我只能猜测。", "我是一个语言模型。",
    "作为一个人工智能，我没有眼睛。", "视频没有提供，所以我猜右边。"])
def test_a_thought_that_says_it_cannot_see_or_help_is_a_refusal(said):
    assert judge(thought(said + LOOK)) == "refusal"


@pytest.mark.parametrize("said", [
    "The man says \"I'm sorry\" to the shopkeeper and goes.", "The man says ‘I’m sorry’ and goes.",
    "He says “I’m sorry, I can’t see the video” and goes.", "It says „Pst, I'm sorry“ in red.",
    "He says 'I'm sorry, I can't see the video' and goes.", "A T-shirt with «I am sorry» is there.",
    "The caption says no image was given a prize; he goes.", "The sign 'Sorry, closed' is red.",
    "The robot on the poster introduces itself as an AI assistant; he goes.",
    "He can't see the video on her phone.", "She apologizes and goes.", "He is sorry.",
    "I can't help but notice that he goes right.", "I don't see any obstacle, so he goes on.",
    "I can't see the man at first, then he is at the right.", "I have access to all frames.",
    "男人说“对不起”。", "男人对店主感到抱歉。", "他无法看到画面外的球。", "字幕写着「我无法观看视频」。"])
def test_what_somebody_in_the_video_says_or_cannot_do_is_no_refusal(said):
    assert judge(thought(said + LOOK), CHOICE, False, "--min_language", "0") is None


CHINESE = "根据勾股定理，斜边等于五，所以正弦值等于对边除以斜边，也就是四除以五，最后答案是零点八，两种方法的结果一致。"
IN_FORMULAS = ("由勾股定理，$AB=\\sqrt{AC^2+BC^2}=5$，所以sinA=BC/AB=4/5=0.8，即 \\frac{4}{5}，因此答案是 0.8，"
               "两种方法的结果一致。")
ENGLISH = "By the theorem of Pythagoras the side is five, so the sine of the angle is four fifths."
RUSSIAN = "По теореме Пифагора находим второй катет, затем делим его на гипотенузу, и ответ готов."


@pytest.mark.parametrize("problem, fitting", [
    ("如图，在$\\triangle ABC$中，$\\angle ACB=90^{\\circ}$，$AC=3$，则$\\sin A$的值为", "zh"),
    ("已知函数f(x)=log2(x+1)，g(x)=1/x，求f(3)", "zh"), ("求sin(A)+cos(B)", "zh"),
    ("已知α+β=θ，求θ", "zh"), ("视频中Michael Jordan和Kobe Bryant谁先得分？", "zh"),
    ("$$\\begin{cases} x+y=1 \\\\ x-y=3 \\end{cases}$$ 求$xy$", "zh"),
    ("Найдите $\\sin\\angle ABC$, если $AB=5$, $BC=\\frac{3}{2}$, $\\angle BCA=90$", "ru"),
    ("Find x, if α = β.", "en"), ("What does the sign “请勿在此处停放车辆” mean?", "en"),
    ("$f(x)=\\log_2(x+1)$, $f(3)=?$", "en"), ("3 + 4 = ?", "zh en ru")])
def test_the_words_of_a_question_and_not_its_formulas_decide_its_language(problem, fitting):
    record = NUMBER | {"problem": problem, "solution": "<answer>0.8</answer>"}
    for language, text in (("zh", CHINESE), ("zh", IN_FORMULAS), ("en", ENGLISH), ("ru", RUSSIAN)):
        expected = None if language in fitting else "language"
        assert judge(thought(text, "0.8"), record) == expected, text


@pytest.mark.parametrize("unit", ["I can't ", "as an ai, ", "'a ", "' '", "“", "no video ", "没有提供"])
def test_a_hundred_thousand_characters_of_anything_are_judged_within_a_second(unit):
    started = time.process_time()
    judge(thought(unit * (100_000 // len(unit))), CHOICE | {"problem": unit * 1000}, False,
          "--max_think", "100000", "--min_language", "0")
    assert time.process_time() - started < 1


def test_a_response_that_was_cut_off_is_rejected_and_thresholds_are_flags():
    assert judge(GOOD.format("B"), truncated=True) == "truncated"
    assert judge(GOOD.format("B"), CHOICE, False, "--max_think", "20") == "length"
    assert judge(thought("Right."), CHOICE, False, "--min_think", "5") is None
    half = CHOICE | {"problem_type": "regression", "options": [],
                     "solution": "<answer>10</answer>"}
    assert judge(GOOD.format("6"), half) == "accuracy"  # 0.6 is not above 0.6
    assert judge(GOOD.format("6.1"), half) is None
    assert judge(GOOD.format("6"), half, False, "--min_accuracy", "0.5") is None


def test_the_best_response_that_passes_is_taken():
    args = parse_args(["--model", "m", "--data", "d", "--out", "o.json"])
    record = CHOICE | {"problem_type": "regression", "options": [], "media_path": "/x",
                       "media_root": "/", "solution": "<answer>10</answer>"}
    texts = [thought(f"{THOUGHT} That is {n}.", n) for n in ("7", "9", "10")] + [GOOD.format("10")]
    kept, judged = annotate.choose(record, {"output": texts, "truncated": [0, 0, 1, 0]}, args)
    assert [reason for reason, _ in judged] == [None, None, "truncated", None]
    assert kept["process"] == f"<think>{THOUGHT}</think>"
    assert "media_path" not in kept and kept["solution"] == "<answer>10</answer>"
    assert annotate.choose(record, {"output": texts[2:3], "truncated": [1]}, args)[0] is None


def test_worked_examples_in_the_docstrings_hold():
    assert doctest.testmod(annotate).failed == 0


# -------------------------------------------------------------------------------- whole runs

def annotate_here(*flags):
    """Runs annotate.py in this process. It joins a process group and says so in the environment,
    which other runs must not inherit."""
    before = dict(os.environ)
    try:
        annotate.main(parse_args(list(map(str, flags))))
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module")
def right(toy):
    """A server's answers to the toy's questions: right, but for those about a word."""
    solutions = {}
    for record in load_records(toy / "train.json"):
        messages = api_messages(record, load_vision(record, **LIMITS))
        solutions[json.dumps(messages)] = record["solution"]

    def answer(body, number):
        if "written" in body["messages"][0]["content"][-1]["text"]:
            return reply("I'm sorry.")
        return reply(f"<think>{THOUGHT}</think>{solutions[json.dumps(body['messages'])]}")
    return answer


def annotate_toy(toy, out, server, *more):
    """Asks the server about the toy. Returns annotated records, rejected rows and the report."""
    annotate_here("--model", "m", "--data", toy / "train.json", "--out", out, *SMALL, "--api_base",
                  server.base, "--num_workers", 0, "--concurrency", 4, "--api_retries", 1, *more)
    rejected = out.with_suffix(".rejected.jsonl").read_text().splitlines()
    return (json.loads(out.read_text()), [json.loads(line) for line in rejected],
            cells(out.with_suffix(".report.md")))


def test_a_run_resumes_and_filters_again_and_sft_trains_on_the_result(toy, right, tmp_path, capsys):
    """First a server that fails on every third request, then a whole one, then other thresholds."""
    records, out = json.loads((toy / "train.json").read_text()), tmp_path / "cot.json"
    with Server(lambda body, number: (400, {}, "no") if number % 3 == 0 else right(body, number)) \
            as server:
        kept, rejected, report = annotate_toy(toy, out, server)
        asked = len(server.requests)
        lost = len(records) - len(kept) - len({row["problem_id"] for row in rejected})
    assert asked == len(records) and lost == -(-asked // 3) and f"{lost} without response" in report
    with Server(right) as server:
        kept, rejected, report = annotate_toy(toy, out, server)
        assert len(server.requests) == lost  # only what failed is asked for again
        again = annotate_toy(toy, out, server, "--min_think", "5000")
        assert len(server.requests) == lost and again[0] == []
        assert "| length |" in again[2]
        assert annotate_toy(toy, out, server)[0] == kept
        with pytest.raises(InputError, match="temperature was 1.0, is 0.5"):
            annotate_toy(toy, out, server, "--temperature", "0.5")
        with pytest.raises(InputError, match="api_body was None, is {'seed': None}"):
            annotate_toy(toy, out, server, "--api_body", '{"seed": null}')
    by_id = {record["problem_id"]: record for record in records}
    assert kept and all(row == by_id[row["problem_id"]] | {
        "process": f"<think>{THOUGHT}</think>"} for row in kept)
    words = [r["problem_id"] for r in records if "written" in r["problem"]]
    assert [row["problem_id"] for row in rejected if row["reason"] == "format"] == words
    for path in tmp_path.iterdir():
        assert KEY not in path.read_text()
    output = capsys.readouterr()
    assert KEY not in output.out + output.err
    run("sft.py", "--model", toy / "model", "--data", out, "--media_root", toy, *SMALL, "--output",
        tmp_path / "sft", "--deepspeed_config", toy / "ds_zero0.json", "--num_train_epochs", 0.1,
        "--num_workers", 0)
    assert (tmp_path / "sft" / "model.safetensors").exists()


def test_a_repeated_problem_id_is_refused(toy, tmp_path):
    records = json.loads((toy / "train.json").read_text())
    (tmp_path / "twice.json").write_text(json.dumps(records + records[3:4]))
    with pytest.raises(InputError, match="2 records have the problem_id 3"):
        annotate_here("--model", "m", "--data", tmp_path / "twice.json", "--media_root", toy,
                      "--out", tmp_path / "o.json", "--api_base", "http://x")


def test_a_medium_that_cannot_be_read_costs_its_record_and_is_named(toy, tmp_path):
    records = json.loads((toy / "train.json").read_text())[:3]
    records[1]["path"] = "./media/absent.mp4"
    (tmp_path / "train.json").write_text(json.dumps(records))
    with Server(lambda body, number: reply("x")) as server:
        annotate_here("--model", "m", "--data", tmp_path / "train.json", *SMALL, "--media_root",
                      toy, "--out", tmp_path / "o.json", "--api_base", server.base,
                      "--num_workers", 0)
        assert len(server.requests) == 2
    assert "absent.mp4: [Errno 2] No such file" in (tmp_path / "o.report.md").read_text()


def test_a_server_that_is_gone_ends_the_run_early(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(annotate, "MOST_FAILURES", 5)
    with Server(lambda body, number: (500, {}, "broken")) as server:
        with pytest.raises(InputError, match="5 requests in a row failed, the last: .*HTTP 500"):
            annotate_toy(toy, tmp_path / "o.json", server)
    assert not (tmp_path / "o.json").exists()


def test_questions_that_a_server_refuses_do_not_end_a_run_that_it_answers(
        toy, tmp_path, monkeypatch):
    """It refuses 6 of 32 in a row, twice what would end the run; then again, with nothing else to
    ask; a server that refuses all of them is given up."""
    monkeypatch.setattr(annotate, "MOST_FAILURES", 3)
    with Server(lambda body, number: reply("x") if number == 0 or 6 < number < 32 else
                (400, {}, "too long")) as server:
        report = annotate_toy(toy, tmp_path / "o.json", server, "--concurrency", "1")[2]
        assert "6 without response" in report and len(server.requests) == 32
        assert annotate_toy(toy, tmp_path / "o.json", server, "--min_think", "5")[2] == report
        assert len(server.requests) == 32 + 6
    with Server(lambda body, number: (400, {}, "no pictures")) as server:
        with pytest.raises(InputError, match="3 requests in a row failed, .*no pictures"):
            annotate_toy(toy, tmp_path / "other.json", server)


def test_what_a_server_broke_off_is_named_never_stored_and_asked_again(
        toy, right, tmp_path, monkeypatch):
    """6 of 32 questions, twice what would end the run, and alone when they are asked again."""
    monkeypatch.setattr(annotate, "MOST_FAILURES", 3)
    out, broken = tmp_path / "cot.json", []

    def filtered(body, number):
        asked = json.dumps(body["messages"])
        if number >= 6 and len(broken) < 6 and asked not in broken:
            broken.append(asked)
        return choice("content_filter", "<think>") if asked in broken else right(body, number)
    with Server(filtered) as server:
        for _ in range(2):  # the second time only these are asked
            kept, rejected, report = annotate_toy(toy, out, server, "--concurrency", "1")
            assert "6 without response" in report and "finish_reason 'content_filter'" in report
        assert len(server.requests) == 32 + 6 + 2 * 6  # each is repeated once
    with Server(right) as server:
        assert "0 without response" in annotate_toy(toy, out, server)[2]
        assert len(server.requests) == 6


def test_a_limit_takes_the_first_records_and_the_rest_can_follow(toy, right, tmp_path):
    records, out = json.loads((toy / "train.json").read_text()), tmp_path / "cot.json"

    def asked(*more):
        with Server(right) as server:
            kept, rejected, report = annotate_toy(toy, out, server, *more)
            return len(server.requests), {row["problem_id"] for row in kept + rejected}, report
    count, ids, report = asked("--limit", "5")
    assert count == 5 and ids == {record["problem_id"] for record in records[:5]}
    assert "of 5 records annotated" in report
    assert asked()[0] == len(records) - 5 and asked("--limit", "99")[0] == 0
    assert asked("--limit", "3")[1] == {record["problem_id"] for record in records[:3]}


def test_names_of_files_are_no_patterns(tmp_path):
    with build_data.row_writer(tmp_path / "a[1].rank0.jsonl", 1, {"seed": 0}) as write:
        write([{"problem_id": 7, "output": ["x"]}])
    assert list(annotate.read_rows(tmp_path, "a[1]", {"seed": 0})) == ["7"]


def test_a_full_disk_keeps_the_answers_that_had_come_and_is_one_clear_sentence(
        toy, right, tmp_path, monkeypatch):
    """After the configuration and 6 rows there is no room for more, but by part of a row."""
    out, append, rows = tmp_path / "cot.json", build_data.append_rows, []
    log = tmp_path / "cot.rank0.jsonl"

    class FullDisk:
        def __init__(self, file):
            self.name, self.truncate, self.file = file.name, file.truncate, file

        def write(self, data):
            self.file.write(data[:9])
            raise OSError(errno.ENOSPC, "No space left on device")

    def full(file, new):
        rows.append(new)
        append(file if len(rows) <= 7 else FullDisk(file), new)
    monkeypatch.setattr(build_data, "append_rows", full)
    with Server(right) as server:
        with pytest.raises(InputError, match="^cannot write .*cot.rank0.jsonl: No space left on "
                           "device. The rows in it are whole: make room and repeat the command$"):
            annotate_toy(toy, out, server)
        assert len(list(map(json.loads, log.read_text().splitlines()))) == 7 and not out.exists()
        monkeypatch.setattr(build_data, "append_rows", append)
        asked = len(server.requests)
        annotate_toy(toy, out, server)
        assert len(server.requests) - asked == 32 - 6


def test_killed_in_the_middle_it_loses_no_answer_that_had_come(toy, right, tmp_path):
    """A server that answers 6 requests and then is silent; the process is killed and repeated. Its
    workers, whose pictures fill a pipe by then, and their decoders end with it."""
    out, command = tmp_path / "cot.json", [
        sys.executable, "annotate.py", "--model", "m", "--data", toy / "train.json", "--out",
        tmp_path / "cot.json", *SMALL, "--concurrency", "3"]
    records = json.loads((toy / "train.json").read_text())
    rows = tmp_path / "cot.rank0.jsonl"

    def answer(body, number):
        if number >= 6:
            time.sleep(30)
        return right(body, number)
    with Server(answer) as server:
        process = subprocess.Popen([*map(str, command), "--api_base", server.base], cwd=ROOT,
                                   stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and len(server.requests) < 9:
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(children) == 4 and psutil.wait_procs(children, timeout=20)[1] == []
        assert len(server.requests) == 9 and not out.exists()
    assert len(rows.read_text().splitlines()) == 1 + 6  # and the configuration
    with open(rows, "a") as file:
        file.write('{"problem_id": 3, "outp')  # a torn line
    with Server(right) as server:
        annotate_toy(toy, out, server)
        assert len(server.requests) == len(records) - 6


def test_a_model_on_this_machine_gives_each_record_its_samples(toy, tmp_path, monkeypatch):
    """Not loaded again where no answer is missing."""
    command = (f"@{toy}/annotate.args", "--model", toy / "model", "--samples", 2,
               "--max_new_tokens", 8, "--num_workers", 0, "--out", tmp_path / "cot.json")
    annotate_here(*command)
    monkeypatch.setattr(annotate, "load_answering_model", None)
    annotate_here(*command)
    rows = list(map(json.loads, (tmp_path / "cot.rank0.jsonl").read_text().splitlines()))[1:]
    assert sorted(row["problem_id"] for row in rows) == list(range(32))
    assert all(len(row["output"]) == len(row["tokens"]) == 2 for row in rows)
    assert all(0 < tokens <= 8 for row in rows for tokens in row["tokens"])
    assert len({text for row in rows for text in row["output"]}) > 32  # the samples differ
    report = (tmp_path / "cot.report.md").read_text()
    assert "0 of 32 records annotated" in report  # an untrained model's
    assert len((tmp_path / "cot.rejected.jsonl").read_text().splitlines()) == 64


def test_a_server_and_this_machine_give_an_image_the_same_greedy_answer(toy, processor, tmp_path):
    """The server builds its inputs with the processor alone, from what came over the wire. (Of a
    video it is sent single pictures, so there the two differ by design.)"""
    from PIL import Image
    flags = ["--temperature", 0, "--max_new_tokens", 6, "--num_workers", 0, *SMALL]
    records = [record for split in ("cot", "train", "test")
               for record in json.loads((toy / f"{split}.json").read_text())
               if record["data_type"] == "image"]
    for i, record in enumerate(records):
        record["problem_id"] = i
    (tmp_path / "images.json").write_text(json.dumps(records))
    data = ["--data", tmp_path / "images.json", "--media_root", toy, *flags]
    annotate_here("--model", toy / "model", "--out", tmp_path / "here.json", *data)
    args = parse_args(list(map(str, ["--model", toy / "model", "--out", "x.json", *data])))
    model, lock = annotate.load_answering_model(args, processor.tokenizer, "cpu"), threading.Lock()

    def answer(body, number):
        assert body["temperature"] == 0 and body["max_tokens"] == 6
        picture, text = body["messages"][0]["content"]
        image = Image.fromarray(pixels(picture)[1])
        chat = [{"role": "user", "content": [{"type": "image"}, text]}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(text=[prompt], images=[image], return_tensors="pt")
        with lock:
            ids = model.generate(**inputs)[0, inputs["input_ids"].shape[1]:].tolist()
        ids, cut = annotate.cut_at_end(ids, model.generation_config.eos_token_id)
        said = processor.tokenizer.decode(ids, skip_special_tokens=True)
        return reply(said, finish="length" if cut else "stop")
    with Server(answer) as server:
        annotate_here("--model", "toy", "--api_base", server.base, "--out",
                      tmp_path / "there.json", "--api_timeout", 60, *data)

    def outputs(stem):
        lines = (tmp_path / f"{stem}.rank0.jsonl").read_text().splitlines()[1:]
        return {row["problem_id"]: (row["output"], row["truncated"])
                for row in map(json.loads, lines)}
    assert len(records) > 5 and outputs("there") == outputs("here")
