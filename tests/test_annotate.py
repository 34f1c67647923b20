"""Annotation: what a server may do, which responses are kept, and a kill in the middle."""
import base64
import io
import json
import subprocess
import sys
import threading
import time
from time import sleep

import numpy as np
import psutil
import pytest
from PIL import Image

import annotate
import build_data
from annotate import ApiError, api_messages, parse_args, reject_reason
from build_data import InputError, build_messages, load_records, load_vision
from conftest import LIMITS, ROOT, Server, cells, reply, run, run_here

KEY = "sk-very-secret-1234567890"
THOUGHT = "Let me think: the block starts on the left and it ends on the right."
GOOD = f"<think>{THOUGHT}</think><answer>{{}}</answer>"
SMALL = ("--max_frames", "8", "--min_pixels", "784", "--max_pixels", "784",
         "--image_min_pixels", "784", "--image_max_pixels", "784")


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """The seconds that the client pauses, without the time they would take."""
    found = []
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(annotate.time, "sleep", found.append)
    return found


def flags(server, *more):
    return parse_args(["--model", "m", "--data", "d", "--out", "o.json", "--api_base", server.base,
                       "--api_timeout", "1", "--api_retries", "2", *more])


HI = [{"role": "user", "content": "Hi"}]


def request(server, n=1, *more):
    args = flags(server, "--samples", str(n), *more)
    return annotate.request_responses(args, HI, seed=5)


# ----------------------------------------------------------------------------- the server

def test_a_request_carries_the_sampling_and_the_key_and_answers_come_with_their_tokens():
    with Server(lambda body, number: reply("a", "b")) as server:
        assert request(server, 2) == [("a", 7, False), ("b", 7, False)]
        sent, = server.requests
    assert sent.path == "/v1/chat/completions" and sent.headers["Authorization"] == f"Bearer {KEY}"
    assert sent.body == {"model": "m", "messages": HI, "n": 2, "seed": 5, "temperature": 1.0,
                         "top_p": 0.95, "max_tokens": 768}


@pytest.mark.parametrize("fault", [
    (500, {}, "out of memory"), (429, {}, "slow down"), (503, {}, ""), (204, {}, ""), None, "[",
    "[]", "{}", {"choices": []}, {"choices": [{}], "usage": {"completion_tokens": 1}},
    reply([{"type": "text", "text": "a"}]), reply("half \ud83d"), reply("", finish="abort"),
    (200, {"Content-Length": "5000"}, '{"choices": [{"mess')])
def test_a_fault_that_passes_is_retried(fault):
    with Server(lambda body, number: fault if number == 0 else reply("a")) as server:
        assert request(server) == [("a", 7, False)]
        assert len(server.requests) == 2


def choice(finish, content, usage={"completion_tokens": 30}, **message):
    """A reply of one choice, as it stands; `finish` None: it does not say how it ended."""
    said = {"message": {"content": content, **message}}
    return {"choices": [said | ({"finish_reason": finish} if finish else {})], "usage": usage}


@pytest.mark.parametrize("sent, answer", [
    ({"choices": choice("stop", "a")["choices"]}, ("a", None, False)),
    *((choice("stop", "a", usage), ("a", None, False))
      for usage in (None, {}, {"completion_tokens": None})),
    *((choice(finish, "a"), ("a", 30, False))
      for finish in (None, "", "STOP", "eos", "eos_token", "stop_sequence", "end_turn")),
    (choice("stop", ""), ("", 30, False)),
    (choice("length", None), ("", 30, True)),
    *((choice(finish, "<think>a"), ("<think>a", 30, True))
      for finish in ("max_tokens", "MAX_TOKENS", "model_length")),
    *((choice("stop", "b", **thought), ("<think>a</think>\nb", 30, False)) for thought in (
        {"reasoning_content": "a"}, {"reasoning": "a"},
        {"reasoning_content": None, "reasoning": "a"})),
    (choice("stop", "b", reasoning_content=""), ("b", 30, False)),
    (choice("stop", "<think>a</think>b", reasoning_content="c"), ("<think>a</think>b", 30, False)),
    (choice("length", None, reasoning_content="a"), ("<think>a", 30, True)),
    (choice("length", "b", reasoning_content="a"), ("<think>a</think>\nb", 30, True))])
def test_an_answer_is_taken_with_its_thought_whatever_the_server_leaves_out(sent, answer):
    with Server(lambda body, number: sent) as server:
        assert request(server) == [answer]
        assert len(server.requests) == 1


@pytest.mark.parametrize("finish, content, more", [
    ("abort", "", {}), ("error", "half an answer", {}), ("content_filter", "half an answer", {}),
    ("repetition", "a a a", {}), ("tool_calls", None, {"tool_calls": [{"id": "1"}]}),
    ("stop", None, {"tool_calls": [{"id": "1"}]}), (None, "", {}), (None, None, {})])
def test_what_ended_neither_by_itself_nor_by_its_length_is_no_answer(finish, content, more):
    """It is retried. The last error is of the request, not of the server."""
    with Server(lambda body, number: choice(finish, content, **more)) as server:
        with pytest.raises(annotate.Refused, match="3 attempts failed, the last: finish_reason "
                                                   f"'{finish or ''}' is no answer"):
            request(server)
        assert len(server.requests) == 3


@pytest.mark.parametrize("status, sent, message", [
    (200, {"error": {"message": "overloaded", "type": "server_error"}}, "overloaded"),
    (200, {"object": "error", "message": "overloaded", "code": 500}, "overloaded"),
    (200, {"error": "overloaded"}, "overloaded"),
    (200, {"choices": [{"message": {"content": ""}, "finish_reason": "error",
                        "error": {"message": "overloaded"}}]}, "'error' is no answer: overloaded$"),
    (500, {"trace": "x" * 1000, "error": {"message": "overloaded"}}, "HTTP 500: overloaded$"),
    (502, "<html>Bad Gateway</html>", "HTTP 502: <html>Bad Gateway</html>$"),
    (400, {"error": {"code": None, "message": "prompt too long"}}, "HTTP 400: prompt too long$"),
    (400, {"detail": "prompt too long"}, 'HTTP 400: {"detail": "prompt too long"}$'),
    (503, "", "HTTP 503$")])
def test_an_error_shows_the_servers_message_and_a_bad_request_is_not_retried(
        status, sent, message):
    with Server(lambda body, number: (status, {}, sent)) as server:
        with pytest.raises(ApiError, match=message) as error:
            request(server)
        assert len(server.requests) == (1 if status == 400 else 3)
    assert len(str(error.value)) < 100 + annotate.ERROR_SHOWN


def pieces(text, pause, count):
    """A text again and again, with pauses."""
    for _ in range(count):
        yield text
        sleep(pause)


def test_a_request_has_a_total_time_however_slowly_its_reply_comes():
    sent = [lambda: pieces(" ", 0.1, 50), lambda: pieces("", 5, 1), lambda: reply("a")]
    started = time.monotonic()
    with Server(lambda body, number: (200, {}, sent[number]())) as server:
        assert request(server, 1, "--api_timeout", "0.3") == [("a", 7, False)]
    assert time.monotonic() - started < 4


def test_a_reply_without_end_is_given_up_by_its_size(monkeypatch):
    monkeypatch.setattr(annotate, "LARGEST_REPLY", 2**17)
    with Server(lambda body, number: (200, {}, pieces("x" * 2**16, 0, 10**9))) as server:
        with pytest.raises(ApiError, match="no whole reply: .* more than 131072 bytes"):
            request(server)


@pytest.mark.parametrize("status", [301, 302, 307, 308, 401, 402, 403, 404])
def test_a_redirect_or_a_wrong_key_ends_the_run_and_a_redirect_is_not_followed(status):
    with Server(lambda body, number: reply("a")) as other:
        headers = {"Location": other.base} if status < 400 else {}
        with Server(lambda body, number: (status, headers, "")) as server:
            with pytest.raises(InputError, match=f"refuses model m: HTTP {status}.*{other.base}"
                               if headers else f"refuses model m: HTTP {status}. Check --api_base"):
                request(server)
        assert len(server.requests) == 1 and other.requests == []


def test_retry_after_is_honoured_in_seconds_and_printed_once(pauses, capsys):
    with Server(lambda body, number: (429, {"Retry-After": "30"}, "slow down")
                if number < 2 else reply("a")) as server:
        request(server)
    assert len(pauses) == 2 and all(30 <= pause <= 31 for pause in pauses)
    assert capsys.readouterr().err.count("HTTP 429: slow down (Retry-After: 30)") == 1


@pytest.mark.parametrize("wait", ["601", "86400"])
def test_a_retry_after_of_hours_ends_the_run_with_what_the_server_said(wait):
    with Server(lambda body, number: (429, {"Retry-After": wait}, "daily budget spent")) as server:
        with pytest.raises(InputError, match=f"HTTP 429: daily budget spent.*Retry-After: {wait}"):
            request(server)
        assert len(server.requests) == 1


@pytest.mark.parametrize("text", ["", "soon", "-3", "nan", "9e9", "1.5", "9" * 5000,
                                  "Wed, 21 Oct 2099 07:28:00 GMT"])
def test_a_request_is_repeated_after_pauses_that_double_whatever_no_retry_after_says(pauses, text):
    with Server(lambda body, number: (429, {"Retry-After": text}, "")
                if number < 3 else reply("a")) as server:
        request(server, 1, "--api_retries", "3")
    assert len(pauses) == 3  # each is up to a second longer
    assert all(usual <= pause <= usual + 1 for usual, pause in zip((1, 2, 4), pauses))


@pytest.mark.parametrize("before", ["your key ", "x" * (annotate.ERROR_SHOWN - 20)])  # cut in it
def test_the_last_error_is_shown_without_the_key(before):
    with Server(lambda body, number: (500, {}, f"{before}{KEY} broke me")) as server:
        with pytest.raises(ApiError) as error:
            request(server)
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
        request(server)
        assert server.requests[0].headers.get("Authorization") == sent


@pytest.mark.parametrize("key", [f"{KEY[:9]}\n{KEY[9:]}", f"{KEY}…"])
def test_a_key_with_characters_that_no_key_has_is_refused_and_never_shown(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with Server(lambda body, number: reply("a")) as server:
        with pytest.raises(InputError, match="OPENAI_API_KEY holds characters") as error:
            request(server)
        assert server.requests == []
    assert KEY[:9] not in str(error.value)


def test_api_body_goes_over_a_requests_own_keys_and_null_removes_one():
    """A server that returns one response, whatever n is, gets another request and seed."""
    keys = {"max_tokens": None, "max_completion_tokens": 9, "n": None, "temperature": 0.5}
    with Server(lambda body, number: reply(f"seed {body['seed']}")) as server:
        assert [text for text, *_ in request(server, 2, "--api_body", json.dumps(keys))] == [
            "seed 5", "seed 6"]
        assert server.requests[0].body == {"model": "m", "messages": HI, "seed": 5, "top_p": 0.95,
                                           "temperature": 0.5, "max_completion_tokens": 9}


def test_a_server_that_is_not_there_is_a_clear_error():
    with Server(lambda body, number: None) as server:
        pass
    with pytest.raises(ApiError, match="3 attempts failed, the last: no whole reply: Connection"):
        request(server)


def test_at_most_four_requests_run_at_a_time_and_each_has_its_own_seed():
    running, most = [], []

    def answer(body, number):
        running.append(number)
        most.append(len(running))
        sleep(0.02)
        running.remove(number)
        return reply("a")
    samples = [{"record": {"problem_id": i, "path": ""}, "messages": HI} for i in range(20)]
    rows = []
    with Server(answer) as server:
        annotate.generate_on_server(flags(server, "--concurrency", "4"), samples, annotate.row_of,
                                    rows.extend)
        assert len(server.requests) == 20 and max(most) == 4
        assert len({sent.body["seed"] for sent in server.requests}) == 20
    assert sorted(row["problem_id"] for row in rows) == list(range(20))


# ------------------------------------------------------------------------- what it is sent

def pixels(part):
    kind, _, data = part["image_url"]["url"].partition(";base64,")
    return kind, np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_server_gets_the_prompt_of_every_stage_and_the_decoded_pixels(toy, kind):
    """An image to the last bit; frames of a video, in order, as near as JPEG is."""
    record = next(r for r in load_records(toy / "train.json") if r["data_type"] == kind)
    vision = load_vision(record, **LIMITS)
    (message,), (ours,) = api_messages(record, vision), build_messages(record)
    assert message["role"] == "user" and message["content"][-1] == ours["content"][-1]
    kinds, sent = zip(*(pixels(part) for part in message["content"][:-1]))
    if kind == "image":
        assert kinds == ("data:image/png",) and (sent[0] == np.asarray(vision.image)).all()
    else:
        frames = vision.frames.permute(0, 2, 3, 1).numpy().astype(int)
        assert kinds == ("data:image/jpeg",) * len(frames)
        assert all(abs(a - b.astype(int)).mean() < 8 for a, b in zip(frames, sent, strict=True))


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
    (None, GOOD.format("B"), CHOICE), (None, GOOD.format("(b) right"), CHOICE),
    (None, GOOD.format("3.0"), NUMBER), (None, GOOD.format("A red block moves right"), TEXT),
    ("format", THOUGHT + "<answer>B</answer>", CHOICE),
    ("format", GOOD.format("B") * 2, CHOICE), ("format", "Sure! " + GOOD.format("B"), CHOICE),
    ("format", f"<think>{THOUGHT}</think><think>x</think><answer>B</answer>", CHOICE),
    ("answer", GOOD.format("left or right"), CHOICE), ("answer", GOOD.format("3 or 4"), NUMBER),
    ("answer", GOOD.format(" "), TEXT), ("accuracy", GOOD.format("A"), CHOICE),
    ("accuracy", GOOD.format("4"), NUMBER), ("accuracy", GOOD.format("a blue cat sits"), TEXT),
    ("length", thought("Right."), CHOICE),
    ("length", thought(" ".join(f"step {i}" for i in range(2000))), CHOICE),
    ("refusal", thought("I'm sorry, there is nothing to go by, so I just guess: right."), CHOICE),
    ("leak", thought("I must provide my reasoning and then give your final answer between the "
                     "answer tags, so: right."), CHOICE),
    ("repetition", thought("it moves to the right, wait, let me look again. " * 9), CHOICE)])
def test_a_response_is_kept_or_rejected_for_the_reason_given(reason, response, record):
    assert judge(response, record) == reason


ANSWERS = json.loads((ROOT / "tests/answers.json").read_text(encoding="utf-8"))
LOOK = " The picture shows a street, two cars and a shop; first he is at the left edge."


@pytest.mark.parametrize("said", ANSWERS["a refusal"])
def test_a_thought_that_says_it_cannot_see_or_help_is_a_refusal(said):
    assert judge(thought(said + LOOK)) == "refusal"


@pytest.mark.parametrize("said", ANSWERS["no refusal"])
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
    """Or a quarter of them within a quarter of a second."""
    started = time.process_time()
    judge(thought(unit * (25_000 // len(unit))), CHOICE | {"problem": unit * 1000}, False,
          "--max_think", "100000", "--min_language", "0")
    assert time.process_time() - started < 0.25


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
                       "solution": "<answer>10</answer>"}
    texts = [thought(f"{THOUGHT} That is {n}.", n) for n in ("7", "9", "10")] + [GOOD.format("10")]
    kept, judged = annotate.choose(record, {"output": texts, "truncated": [0, 0, 1, 0]}, args)
    assert [reason for reason, _ in judged] == [None, None, "truncated", None]
    assert kept["process"] == f"<think>{THOUGHT}</think>"
    assert "media_path" not in kept and kept["solution"] == "<answer>10</answer>"
    assert annotate.choose(record, {"output": texts[2:3], "truncated": [1]}, args)[0] is None


# -------------------------------------------------------------------------------- whole runs

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
    """Annotates the toy through a server. Returns records, rejected rows and the report."""
    run_here(annotate, "--model", "m", "--data", toy / "train.json", "--out", out, *SMALL,
             "--api_base", server.base, "--num_workers", 0, "--concurrency", 4, "--api_retries", 1,
             *more)
    rejected = out.with_suffix(".rejected.jsonl").read_text().splitlines()
    return (json.loads(out.read_text()), [json.loads(line) for line in rejected],
            cells(out.with_suffix(".report.md")))


def test_a_run_resumes_and_filters_again_and_sft_trains_on_the_result(toy, right, tmp_path, capsys):
    """First a server that fails on every third request, then a whole one, then other thresholds."""
    records, out = json.loads((toy / "train.json").read_text()), tmp_path / "cot.json"
    with Server(lambda body, number: (400, {}, "no") if number % 3 == 0 else right(body, number)) \
            as server:
        kept, rejected, report = annotate_toy(toy, out, server)
        count = len(server.requests)
        lost = len(records) - len(kept) - len({row["problem_id"] for row in rejected})
    assert count == len(records) and lost == -(-count // 3) and f"{lost} without response" in report
    with Server(right) as server:
        kept, rejected, report = annotate_toy(toy, out, server)
        assert len(server.requests) == lost  # only what failed is requested again
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
        run_here(annotate, "--model", "m", "--data", tmp_path / "twice.json", "--media_root", toy,
                 "--out", tmp_path / "o.json", "--api_base", "http://x")


def test_a_file_that_cannot_be_read_skips_its_record_and_is_named(toy, tmp_path):
    records = json.loads((toy / "train.json").read_text())[:3]
    records[1]["path"] = "./media/absent.mp4"
    (tmp_path / "train.json").write_text(json.dumps(records))
    with Server(lambda body, number: reply("x")) as server:
        report = annotate_toy(toy, tmp_path / "o.json", server, "--media_root", toy, "--data",
                              tmp_path / "train.json")[2]
        assert len(server.requests) == 2 and "absent.mp4: [Errno 2] No such file" in report


def test_questions_that_a_server_refuses_do_not_end_a_run_that_it_answers(
        toy, tmp_path, monkeypatch):
    """It refuses 6 of 32 in a row, twice what would end the run; then again, with no other
    requests. If a server refuses all of them, the run ends."""
    monkeypatch.setattr(annotate, "MOST_FAILURES", 3)
    with Server(lambda body, number: reply("x") if number == 0 or 6 < number < 32 else
                (400, {}, "too long")) as server:
        report = annotate_toy(toy, tmp_path / "o.json", server, "--concurrency", "1")[2]
        assert "6 without response" in report and len(server.requests) == 32
        assert annotate_toy(toy, tmp_path / "o.json", server, "--min_think", "5")[2] == report
        assert len(server.requests) == 32 + 6
    for status in (400, 500):
        with Server(lambda body, number: (status, {}, "no pictures")) as server:
            with pytest.raises(InputError, match="3 requests in a row failed, .*no pictures"):
                annotate_toy(toy, tmp_path / f"{status}.json", server)
        assert not (tmp_path / f"{status}.json").exists()


def test_what_a_server_broke_off_is_named_never_stored_and_requested_again(
        toy, right, tmp_path, monkeypatch):
    """6 of 32 questions, twice what would end the run."""
    monkeypatch.setattr(annotate, "MOST_FAILURES", 3)
    with Server(lambda body, number: choice("content_filter", "<think>")
                if 6 <= number < 6 + 2 * 6 else right(body, number)) as server:
        report = annotate_toy(toy, tmp_path / "cot.json", server, "--concurrency", "1")[2]
        assert "6 without response" in report and "finish_reason 'content_filter'" in report
        assert len(server.requests) == 32 + 6  # each is repeated once
        assert "0 without response" in annotate_toy(toy, tmp_path / "cot.json", server)[2]
        assert len(server.requests) == 32 + 6 + 6


def test_a_limit_takes_the_first_records_and_the_rest_can_follow(toy, right, tmp_path):
    ids = [record["problem_id"] for record in json.loads((toy / "train.json").read_text())]

    def requested(*more):
        with Server(right) as server:
            kept, rejected, report = annotate_toy(toy, tmp_path / "cot.json", server, *more)
            return len(server.requests), {row["problem_id"] for row in kept + rejected}, report
    count, first, report = requested("--limit", "5")
    assert count == 5 and first == {*ids[:5]} and "of 5 records annotated" in report
    assert requested()[0] == len(ids) - 5 and requested("--limit", "99")[0] == 0
    assert requested("--limit", "3")[1] == {*ids[:3]}


def test_names_of_files_are_no_patterns(tmp_path):
    with build_data.row_writer(tmp_path / "a[1].rank0.jsonl", 1, {"seed": 0}) as write:
        write([{"problem_id": 7, "output": ["x"]}])
    assert list(annotate.read_rows(tmp_path, "a[1]", {"seed": 0})) == ["7"]


def test_a_full_disk_ends_the_run_and_keeps_the_answers_that_had_come(
        toy, right, tmp_path, monkeypatch):
    """What a disk without room does to a row is in test_build_data.py."""
    append, rows = build_data.append_rows, []

    def full(file, new):
        rows.append(new)
        if len(rows) > 7:  # the configuration and 6 rows
            raise InputError("no room")
        append(file, new)
    with Server(right) as server:
        with monkeypatch.context() as patched:
            patched.setattr(build_data, "append_rows", full)
            with pytest.raises(InputError, match="no room"):
                annotate_toy(toy, tmp_path / "cot.json", server)
        count = len(server.requests)
        assert not (tmp_path / "cot.json").exists()
        annotate_toy(toy, tmp_path / "cot.json", server)
        assert len(server.requests) - count == 32 - 6


def test_killed_in_the_middle_it_loses_no_answer_that_had_come(toy, tmp_path):
    """A server that answers 6 requests and then is silent; the process is killed and repeated. Its
    workers, whose pictures fill a pipe by then, and their decoders end with it."""
    out, rows = tmp_path / "cot.json", tmp_path / "cot.rank0.jsonl"
    large = "--min_pixels", "50176", "--max_pixels", "50176"  # a video fills a pipe

    def answer(body, number):
        return reply("x") if number < 6 else sleep(30)
    with Server(answer) as server:
        process = subprocess.Popen([
            sys.executable, "annotate.py", "--model", "m", "--data", str(toy / "train.json"),
            "--out", str(out), *SMALL, *large, "--concurrency", "3", "--api_base", server.base],
            cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and len(server.requests) < 9:
            sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        assert len(children) == 4 and psutil.wait_procs(children, timeout=20)[1] == []
        assert len(server.requests) == 9 and not out.exists()
    assert len(rows.read_text().splitlines()) == 1 + 6  # and the configuration
    with open(rows, "a") as file:
        file.write('{"problem_id": 3, "outp')  # a torn line
    with Server(lambda body, number: reply("x")) as server:
        annotate_toy(toy, out, server, *large)
        assert len(server.requests) == 32 - 6


def test_a_model_on_this_machine_gives_each_record_its_samples(toy, tmp_path, monkeypatch):
    """Not loaded again where no answer is missing."""
    command = (f"@{toy}/annotate.args", "--model", toy / "model", "--samples", 2, "--limit", 8,
               "--max_new_tokens", 8, "--num_workers", 0, "--out", tmp_path / "cot.json")
    run_here(annotate, *command)
    monkeypatch.setattr(annotate, "load_answering_model", None)
    run_here(annotate, *command)
    rows = list(map(json.loads, (tmp_path / "cot.rank0.jsonl").read_text().splitlines()))[1:]
    assert sorted(row["problem_id"] for row in rows) == list(range(8))
    assert all(len(row["output"]) == len(row["tokens"]) == 2 for row in rows)
    assert all(0 < tokens <= 8 for row in rows for tokens in row["tokens"])
    assert len({text for row in rows for text in row["output"]}) > 8  # the samples differ
    report = (tmp_path / "cot.report.md").read_text()
    assert "0 of 8 records annotated" in report  # an untrained model's
    assert len((tmp_path / "cot.rejected.jsonl").read_text().splitlines()) == 16


def test_a_server_and_this_machine_give_an_image_the_same_greedy_answer(toy, processor, tmp_path):
    """The server builds its inputs with the processor alone, from what came over the wire. (Of a
    video it is sent single pictures, so there the two differ by design.)"""
    flags = ["--data", tmp_path / "images.json", "--media_root", toy, "--temperature", 0,
             "--max_new_tokens", 6, "--num_workers", 0, *SMALL]
    records = [record for split in ("cot", "train", "test")
               for record in json.loads((toy / f"{split}.json").read_text())
               if record["data_type"] == "image"]
    records = [record | {"problem_id": i} for i, record in enumerate(records)]
    (tmp_path / "images.json").write_text(json.dumps(records))
    here = ["--model", toy / "model", "--out", tmp_path / "here.json", *flags]
    run_here(annotate, *here)
    model, lock = annotate.load_answering_model(
        parse_args(list(map(str, here))), processor.tokenizer, "cpu"), threading.Lock()

    def answer(body, number):
        assert body["temperature"] == 0 and body["max_tokens"] == 6
        picture, text = body["messages"][0]["content"]
        chat = [{"role": "user", "content": [{"type": "image"}, text]}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(text=[prompt], images=[Image.fromarray(pixels(picture)[1])],
                           return_tensors="pt")
        with lock:
            ids = model.generate(**inputs)[0, inputs["input_ids"].shape[1]:].tolist()
        ids, cut = annotate.cut_at_end(ids, model.generation_config.eos_token_id)
        said = processor.tokenizer.decode(ids, skip_special_tokens=True)
        return reply(said, finish="length" if cut else "stop")
    with Server(answer) as server:
        run_here(annotate, "--model", "toy", "--api_base", server.base, "--out",
                 tmp_path / "there.json", "--api_timeout", 60, *flags)

    def outputs(stem):
        lines = (tmp_path / f"{stem}.rank0.jsonl").read_text().splitlines()[1:]
        return {row["problem_id"]: (row["output"], row["truncated"])
                for row in map(json.loads, lines)}
    assert len(records) > 5 and outputs("there") == outputs("here")
