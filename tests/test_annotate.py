"""Annotation: what a server may do, which responses are kept, and a kill in the middle."""
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import annotate
from annotate import ApiError, api_session, ask_api, parse_args
from build_data import InputError

KEY = "sk-very-secret-1234567890"
GOOD = "<think>Let me think: the block starts left and it ends right.</think><answer>{}</answer>"


def reply(*texts, finish="stop"):
    """A server's reply in OpenAI's form, 7 tokens a text."""
    choices = [{"message": {"content": text}, "finish_reason": finish} for text in texts]
    return {"choices": choices, "usage": {"completion_tokens": 7 * len(texts)}}


class Server:
    """A real HTTP server on this machine. `answer(body, number)` returns what to send: a dict, or
    (status, headers, text), or a text; or None, to hang up."""

    def __init__(self, answer):
        outer, self.requests, self.lock = self, [], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append((self.path, dict(self.headers), body, time.monotonic()))
                    number = len(outer.requests) - 1
                sent = answer(body, number)
                if sent is None:
                    return
                status, headers, text = sent if isinstance(sent, tuple) else (200, {}, sent)
                data = (json.dumps(text) if isinstance(text, dict) else text).encode()
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(data))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

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
                       "--api_timeout", "0.5", "--api_retries", "2", *more])


def ask(server, n=1, *more):
    args = flags(server, *more)
    return ask_api(api_session(2), args, [{"role": "user", "content": "Hi"}], n, seed=5)


# ----------------------------------------------------------------------------- the server

def test_a_request_carries_the_sampling_and_the_key_and_answers_come_with_their_tokens():
    with Server(lambda body, number: reply("a", "b")) as server:
        assert ask(server, 2) == [("a", "stop", 7), ("b", "stop", 7)]
        path, headers, body, _ = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert body == {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "n": 2, "seed": 5,
                    "temperature": 1.0, "top_p": 0.95, "max_tokens": 768}


def test_a_server_that_answers_once_whatever_n_is_gets_asked_again_with_another_seed():
    with Server(lambda body, number: reply(f"seed {body['seed']}")) as server:
        assert [text for text, *_ in ask(server, 3)] == ["seed 5", "seed 6", "seed 7"]


@pytest.mark.parametrize("fault", [
    (500, {}, "out of memory"), (429, {}, "slow down"), (503, {}, ""), None, "{\"choices\": [",
    "[]", "{}", {"choices": []}, {"choices": [{}], "usage": {"completion_tokens": 1}},
    (200, {"Content-Length": "5000"}, '{"choices": [{"mess')])
def test_a_fault_that_passes_costs_a_repeated_request(fault):
    with Server(lambda body, number: fault if number == 0 else reply("a")) as server:
        assert ask(server) == [("a", "stop", 7)]
        assert len(server.requests) == 2


def test_a_slow_answer_is_given_up_and_asked_for_again():
    def answer(body, number):
        time.sleep(1 if number == 0 else 0)
        return reply("a")
    with Server(answer) as server:
        assert ask(server) == [("a", "stop", 7)]
        assert len(server.requests) == 2


def test_retry_after_is_honoured_as_seconds_and_as_a_date():
    from email.utils import formatdate
    waits = ["1", formatdate(time.time() + 3, usegmt=True)]
    with Server(lambda body, number: (429, {"Retry-After": waits[number]}, "") if number < 2
                else reply("a")) as server:
        ask(server)
        times = [moment for *_, moment in server.requests]
    assert 1 <= times[1] - times[0] < 1.5
    assert 0 < times[2] - times[1] < 3
    assert [annotate.retry_after(text) for text in ("", "soon", "-3", "nan", "9e9", "99999")] == [
        0, 0, 0, 0, 0, 3600]


def test_pauses_grow_and_the_last_error_is_told_without_the_key():
    with Server(lambda body, number: (500, {}, f"your key {KEY} broke me")) as server:
        with pytest.raises(ApiError) as error:
            ask(server)
        assert len(server.requests) == 3
    assert "3 attempts failed, the last: HTTP 500: your key <OPENAI_API_KEY>" in str(error.value)
    assert KEY not in str(error.value)


def test_a_bad_request_is_not_repeated_and_a_wrong_key_ends_the_run():
    with Server(lambda body, number: (400, {}, "prompt too long")) as server:
        with pytest.raises(ApiError, match="HTTP 400: prompt too long"):
            ask(server)
        assert len(server.requests) == 1
    for status in (401, 403, 404):
        with Server(lambda body, number: (status, {}, "no")) as server:
            with pytest.raises(InputError, match=f"refuses model m: HTTP {status}: no"):
                ask(server)


def test_a_server_that_is_not_there_is_a_clear_error():
    with Server(lambda body, number: None) as server:
        pass
    with pytest.raises(ApiError, match="3 attempts failed, the last: ConnectionError"):
        ask(server)
