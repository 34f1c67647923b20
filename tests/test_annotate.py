"""Annotation: what a server may do, which responses are kept, and a kill in the middle."""
import json
import subprocess
import sys
import time
from time import sleep

import numpy as np
import psutil
import pytest
import torch

import annotate
from annotate import ApiError, api_messages, parse_args, reject_reason
from build_data import InputError, build_messages, load_records, load_vision
from conftest import (LIMITS, ROOT, Server, cells, logged, picture_of, reply, run, run_here)

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


HI = [{"role": "user", "content": "Hi"}]


def parsed(*more):
    return parse_args(["--model", "m", "--data", "d", "--out", "o.json", *more])


def server_flags(server, *more):
    return parsed("--api_base", server.base, "--api_timeout", "1", "--api_retries", "2", *more)


def request(answer, *more):
    """Returns the responses of a server, or the error, and the requests that it got."""
    with Server(answer) as server:
        try:
            result = annotate.request_responses(server_flags(server, *more), HI, seed=5)
        except (ApiError, InputError) as error:
            result = error
    return result, server.requests


# ----------------------------------------------------------------------------- the server

def test_a_request_carries_the_sampling_and_the_key_and_answers_come_with_their_tokens():
    responses, (sent,) = request(lambda body, number: reply("a", "b"), "--samples", "2")
    assert responses == [("a", 7, False), ("b", 7, False)]
    assert sent.path == "/v1/chat/completions" and sent.headers["Authorization"] == f"Bearer {KEY}"
    assert sent.body == {"model": "m", "messages": HI, "n": 2, "seed": 5, "temperature": 1.0,
                         "top_p": 0.95, "max_tokens": 768}


@pytest.mark.parametrize("fault", [
    (500, {}, "out of memory"), (429, {}, "slow down"), (503, {}, ""), (204, {}, ""), None, "[",
    "[]", "{}", {"choices": []}, {"choices": [{}], "usage": {"completion_tokens": 1}},
    reply([{"type": "text", "text": "a"}]), reply("half \ud83d"), reply("", finish="abort"),
    (200, {"Content-Length": "5000"}, '{"choices": [{"mess')])
def test_a_fault_that_passes_is_retried(fault):
    responses, requests = request(lambda body, number: reply("a") if number else fault)
    assert responses == [("a", 7, False)] and len(requests) == 2


def choice(finish, content, usage={"completion_tokens": 30}, **message):
    """A reply of one choice, as it stands."""
    return {"choices": [{"message": {"content": content, **message}, "finish_reason": finish}],
            "usage": usage}


@pytest.mark.parametrize("sent, answer", [
    ({"choices": [{"message": {"content": "a"}}]}, ("a", None, False)),
    *((choice("stop", "a", usage), ("a", None, False)) for usage in (None, {})),
    *((choice(finish, "a"), ("a", 30, False))
      for finish in (None, "STOP", "eos", "eos_token", "stop_sequence", "end_turn")),
    (choice("stop", ""), ("", 30, False)), (choice("length", None), ("", 30, True)),
    *((choice(finish, "a"), ("a", 30, True)) for finish in ("max_tokens", "model_length")),
    *((choice("stop", "b", **thought), ("<think>a</think>\nb", 30, False)) for thought in (
        {"reasoning_content": "a"}, {"reasoning_content": None, "reasoning": "a"})),
    (choice("stop", "b", reasoning_content=""), ("b", 30, False)),
    (choice("stop", "<think>a</think>b", reasoning_content="c"), ("<think>a</think>b", 30, False)),
    (choice("length", None, reasoning_content="a"), ("<think>a", 30, True)),
    (choice("length", "b", reasoning_content="a"), ("<think>a</think>\nb", 30, True))])
def test_an_answer_is_taken_with_its_thought_whatever_the_server_leaves_out(sent, answer):
    responses, requests = request(lambda body, number: sent)
    assert responses == [answer] and len(requests) == 1


@pytest.mark.parametrize("finish, content", [
    ("content_filter", "half an answer"), ("tool_calls", None), ("stop", None), (None, ""),
    (None, None)])
def test_what_ended_neither_by_itself_nor_by_its_length_is_no_answer(finish, content):
    """It is retried. The last error is of the request, not of the server."""
    error, requests = request(lambda body, number: choice(finish, content))
    assert isinstance(error, annotate.Refused) and len(requests) == 3
    assert f"3 attempts failed, the last: finish_reason '{finish or ''}' is no" in str(error)


@pytest.mark.parametrize("status, sent, message", [
    (200, {"error": {"message": "overloaded", "type": "server_error"}}, "overloaded"),
    (200, {"error": "overloaded"}, '{"error": "overloaded"}'),
    (200, {"choices": [{"message": {"content": ""}, "finish_reason": "error",
                        "error": {"message": "overloaded"}}]}, "'error' is no answer: overloaded"),
    (500, {"trace": "x" * 1000, "error": {"message": "overloaded"}}, "HTTP 500: overloaded"),
    (502, "<html>Bad Gateway</html>", "HTTP 502: <html>Bad Gateway</html>"),
    (400, {"error": {"code": None, "message": "prompt too long"}}, "HTTP 400: prompt too long"),
    (503, "", "HTTP 503"), (500, "x" * 1000, "HTTP 500: " + "x" * (annotate.ERROR_SHOWN - 10))])
def test_an_error_ends_with_the_servers_message_and_a_bad_request_is_not_retried(
        status, sent, message):
    error, requests = request(lambda body, number: (status, {}, sent))
    assert isinstance(error, ApiError) and str(error).endswith(message)
    assert len(requests) == (1 if status == 400 else 3)


def pieces(text, pause, count):
    """A text again and again, with pauses."""
    for _ in range(count):
        yield text
        sleep(pause)


def test_a_request_has_a_total_time_however_slowly_its_reply_comes():
    sent = [lambda: pieces(" ", 0.1, 50), lambda: pieces("", 5, 1), lambda: reply("a")]
    started = time.monotonic()
    responses, _ = request(lambda body, number: (200, {}, sent[number]()), "--api_timeout", "0.3")
    assert responses == [("a", 7, False)] and time.monotonic() - started < 4


def test_a_reply_without_end_is_given_up_by_its_size(monkeypatch):
    monkeypatch.setattr(annotate, "LARGEST_REPLY", 2**17)
    error, _ = request(lambda body, number: (200, {}, pieces("x" * 2**16, 0, 10**9)))
    assert "no whole reply: " in str(error) and "more than 131072 bytes" in str(error)


@pytest.mark.parametrize("status", [301, 302, 307, 308, 401, 402, 403, 404])
def test_a_redirect_or_a_wrong_key_ends_the_run_and_a_redirect_is_not_followed(status):
    with Server(lambda body, number: reply("a")) as other:
        headers = {"Location": other.base} if status < 400 else {}
        error, requests = request(lambda body, number: (status, headers, ""))
    assert isinstance(error, InputError) and len(requests) == 1 and other.requests == []
    place = f": {other.base}" if headers else ""
    assert f"refuses model m: HTTP {status}{place}. Check --model, --api_base" in str(error)


def test_retry_after_is_honoured_in_seconds_and_printed_once(pauses, capsys):
    request(lambda body, number: reply("a") if number > 1 else
            (429, {"Retry-After": "30"}, "slow down"))
    assert len(pauses) == 2 and all(30 <= pause <= 31 for pause in pauses)
    assert capsys.readouterr().err.count("HTTP 429: slow down (Retry-After: 30)") == 1


def test_a_retry_after_of_hours_ends_the_run_with_what_the_server_said():
    error, requests = request(lambda body, number: (429, {"Retry-After": "601"}, "budget spent"))
    assert isinstance(error, InputError) and len(requests) == 1
    assert "HTTP 429: budget spent (Retry-After: 601)" in str(error)


@pytest.mark.parametrize("text", ["", "soon", "-3", "nan", "9e9", "1.5", "9" * 5000,
                                  "Wed, 21 Oct 2099 07:28:00 GMT"])
def test_a_request_is_repeated_after_pauses_that_double_whatever_no_retry_after_says(pauses, text):
    request(lambda body, number: reply("a") if number > 2 else (429, {"Retry-After": text}, ""),
            "--api_retries", "3")
    assert len(pauses) == 3  # each is up to a second longer
    assert all(usual <= pause <= usual + 1 for usual, pause in zip((1, 2, 4), pauses))


@pytest.mark.parametrize("before", ["your key ", "x" * (annotate.ERROR_SHOWN - 20)])  # cut in it
def test_the_last_error_is_shown_without_the_key(before):
    error, _ = request(lambda body, number: (500, {}, f"{before}{KEY} broke me"))
    assert f"3 attempts failed, the last: HTTP 500: {before}<OPENAI" in str(error)
    assert KEY[:4] not in str(error)


@pytest.mark.parametrize("key, sent", [
    (KEY, f"Bearer {KEY}"), (f" {KEY}\n", f"Bearer {KEY}"), ("", None)])
def test_the_key_is_the_environments_without_spaces_and_never_that_of_netrc(
        monkeypatch, tmp_path, key, sent):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("OPENAI_API_KEY", key)
    _, (only,) = request(lambda body, number: reply("a"))
    assert only.headers.get("Authorization") == sent


def test_api_body_goes_over_a_requests_own_keys_and_null_removes_one():
    """A server that returns one response, whatever n is, gets another request and seed."""
    keys = {"max_tokens": None, "max_completion_tokens": 9, "n": None, "temperature": 0.5}
    responses, (first, _) = request(lambda body, number: reply(f"seed {body['seed']}"),
                                    "--samples", "2", "--api_body", json.dumps(keys))
    assert [text for text, *_ in responses] == ["seed 5", "seed 6"]
    assert first.body == {"model": "m", "messages": HI, "seed": 5, "top_p": 0.95,
                          "temperature": 0.5, "max_completion_tokens": 9}


def test_at_most_four_requests_run_at_a_time_and_each_has_its_own_seed():
    running, most = [], []

    def answer(body, number):
        running.append(number)
        most.append(len(running))
        sleep(0.02)
        running.remove(number)
        return reply("a")
    samples = [{"record": {"problem_id": i, "path": ""}, "messages": HI} for i in range(20)]
    with Server(answer) as server:
        annotate.generate_on_server(server_flags(server, "--concurrency", "4"), samples,
                                    annotate.row_of, lambda rows: None)
    assert len(server.requests) == 20 and max(most) == 4
    assert len({sent.body["seed"] for sent in server.requests}) == 20


# ------------------------------------------------------------------------- what it is sent

def received(record, vision):
    """What a server gets of a record: kinds of pictures, their pixels, the text."""
    (message,) = api_messages(record, vision)
    assert message["role"] == "user"
    *pictures, text = message["content"]
    urls = [picture["image_url"]["url"] for picture in pictures]
    return ([url.partition(";")[0] for url in urls],
            [picture_of(url).convert("RGB") for url in urls], text)


def test_a_server_can_make_of_an_image_the_inputs_of_every_stage_to_the_last_bit(
        samples, processor):
    """With the processor alone, from what came over the wire."""
    record, inputs = samples["image"]
    kinds, images, text = received(record, load_vision(record, **LIMITS))
    chat = [{"role": "user", "content": [{"type": "image"}, text]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    theirs = processor(text=[prompt], images=images, return_tensors="pt")
    assert kinds == ["data:image/png"] and theirs.keys() == inputs.keys()
    assert all(torch.equal(theirs[name], inputs[name]) for name in inputs)


def test_a_server_gets_a_video_as_its_frames_in_order_as_near_as_jpeg_is(samples):
    record, _ = samples["video"]
    vision = load_vision(record, **LIMITS)
    kinds, images, text = received(record, vision)
    frames = vision.frames.permute(0, 2, 3, 1).numpy().astype(int)  # (T, H, W, C)
    assert kinds == ["data:image/jpeg"] * len(frames)
    assert all(abs(a - np.asarray(b)).mean() < 8 for a, b in zip(frames, images, strict=True))
    assert text == build_messages(record)[0]["content"][-1]


# ------------------------------------------------------------------------------ the filter

CHOICE = {"problem_id": 1, "problem_type": "multiple choice", "problem": "Which way does it move?",
          "options": ["A. left", "B. right"], "solution": "<answer>B</answer>"}
NUMBER = CHOICE | {"problem_type": "numerical", "options": [], "solution": "<answer>3</answer>"}
REGRESSION = NUMBER | {"problem_type": "regression", "solution": "<answer>10</answer>"}
TEXT = NUMBER | {"problem_type": "free-form",
                 "solution": "<answer>a red block moves right</answer>"}


def judge(response, record=CHOICE, *more, truncated=False):
    return reject_reason(response, truncated, record, parsed(*more))


def thought(text, answer="B"):
    return f"<think>{text}</think>\n<answer>{answer}</answer>"


@pytest.mark.parametrize("reason, response, record", [
    (None, GOOD.format("B"), CHOICE), (None, GOOD.format("3.0"), NUMBER),
    (None, GOOD.format("A red block moves right"), TEXT),
    (None, thought("Hmm, let me think. Oh, I see! Let's break it down: it starts left."), CHOICE),
    ("format", "Sure! " + GOOD.format("B"), CHOICE),
    ("answer", GOOD.format("left or right"), CHOICE), ("answer", GOOD.format("3 or 4"), NUMBER),
    ("answer", GOOD.format(" "), TEXT), ("accuracy", GOOD.format("A"), CHOICE),
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
def test_what_a_video_shows_or_somebody_in_it_says_or_cannot_do_is_no_refusal(said):
    assert judge(thought(said + LOOK), CHOICE, "--min_language", "0") is None


CHINESE = "根据勾股定理，斜边等于五，所以正弦值等于对边除以斜边，也就是四除以五，最后答案是零点八，两种方法的结果一致。"
IN_FORMULAS = ("由勾股定理，$AB=\\sqrt{AC^2+BC^2}=5$，所以sinA=BC/AB=4/5=0.8，即 \\frac{4}{5}，因此答案是 0.8，"
               "两种方法的结果一致。")
ENGLISH = "By the theorem of Pythagoras the side is five, so the sine of the angle is four fifths."
RUSSIAN = "По теореме Пифагора находим второй катет, затем делим его на гипотенузу, и ответ готов."


@pytest.mark.parametrize("problem, fitting", [
    ("如图，在$\\triangle ABC$中，$\\angle ACB=90^{\\circ}$，$AC=3$，则$\\sin A$的值为", "zh"),
    ("求sin(A)+cos(B)", "zh"), ("已知α+β=θ，求θ", "zh"),
    ("视频中Michael Jordan和Kobe Bryant谁先得分？", "zh"),
    ("Найдите $\\sin\\angle ABC$, если $AB=5$, $BC=\\frac{3}{2}$, $\\angle BCA=90$", "ru"),
    ("Find x, if α = β.", "en"), ("What does the sign “请勿在此处停放车辆” mean?", "en"),
    ("3 + 4 = ?", "zh en ru")])
def test_the_words_of_a_question_and_not_its_formulas_decide_its_language(problem, fitting):
    record = NUMBER | {"problem": problem, "solution": "<answer>0.8</answer>"}
    for language, text in (("zh", CHINESE), ("zh", IN_FORMULAS), ("en", ENGLISH), ("ru", RUSSIAN)):
        expected = None if language in fitting else "language"
        assert judge(thought(text, "0.8"), record) == expected, text


@pytest.mark.parametrize("unit", ["I can't ", "as an ai, ", "'a ", "' '", "“", "no video ", "没有提供"])
def test_a_hundred_thousand_characters_of_anything_are_judged_within_a_second(unit):
    """Or a quarter of them within a quarter of a second."""
    started = time.process_time()
    judge(thought(unit * (25_000 // len(unit))), CHOICE | {"problem": unit * 1000},
          "--max_think", "100000", "--min_language", "0")
    assert time.process_time() - started < 0.25


def test_a_response_that_was_cut_off_is_rejected_and_thresholds_are_flags():
    assert judge(GOOD.format("B"), truncated=True) == "truncated"
    assert judge(GOOD.format("B"), CHOICE, "--max_think", "20") == "length"
    assert judge(thought("Right."), CHOICE, "--min_think", "5") is None
    assert judge(GOOD.format("6"), REGRESSION) == "accuracy"  # 0.6 is not above 0.6
    assert judge(GOOD.format("6.1"), REGRESSION) is None
    assert judge(GOOD.format("6"), REGRESSION, "--min_accuracy", "0.5") is None


def test_the_best_response_that_passes_is_taken():
    args, record = parsed(), REGRESSION | {"media_path": "/x"}
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
    return (json.loads(out.read_text()), logged(out.parent, f"{out.stem}.rejected"),
            cells(out.with_suffix(".report.md")))


def test_a_run_resumes_and_filters_again_and_sft_trains_on_the_result(toy, right, tmp_path, capsys):
    """First a server that fails on every third request, then a whole one, then other thresholds."""
    records, out = json.loads((toy / "train.json").read_text()), tmp_path / "cot.json"
    with Server(lambda body, number: right(body, number) if number % 3 else (400, {}, "no")) as bad:
        assert "11 without response" in annotate_toy(toy, out, bad)[2]
        assert len(bad.requests) == 32
    with Server(right) as server:
        kept, rejected, _ = annotate_toy(toy, out, server)
        report = annotate_toy(toy, out, server, "--min_think", "5000")[2]
        assert "0 of 32 records annotated" in report and "| length |" in report
        assert annotate_toy(toy, out, server)[0] == kept
        with pytest.raises(InputError, match="api_body was None, is {'seed': None}"):
            annotate_toy(toy, out, server, "--api_body", '{"seed": null}')
        assert len(server.requests) == 11  # only what failed is requested again
    words = [record for record in records if "written" in record["problem"]]
    assert kept == [record | {"process": f"<think>{THOUGHT}</think>"} for record in records
                    if record not in words]
    assert [(row["problem_id"], row["reason"]) for row in rejected] == [
        (record["problem_id"], "format") for record in words]
    for path in tmp_path.iterdir():
        assert KEY not in path.read_text()
    output = capsys.readouterr()
    assert KEY not in output.out + output.err
    run("sft.py", "--model", toy / "model", "--data", out, "--media_root", toy, *SMALL, "--output",
        tmp_path / "sft", "--deepspeed_config", toy / "ds_zero0.json", "--num_train_epochs", 0.1,
        "--num_workers", 0)
    assert (tmp_path / "sft" / "model.safetensors").exists()


@pytest.mark.parametrize("fault, attempts, words", [
    ((400, {}, "too long"), 1, "HTTP 400: too long"),
    (choice("content_filter", "<think>"), 2, "finish_reason 'content_filter'")])
def test_questions_that_a_server_refuses_or_breaks_off_do_not_end_a_run_that_it_answers(
        toy, right, tmp_path, monkeypatch, fault, attempts, words):
    """6 of 32 in a row, twice what would end the run; then again, with no other requests. Nothing
    of them is stored: at last they are answered."""
    monkeypatch.setattr(annotate, "MOST_FAILURES", 3)
    failed = 6 * attempts
    first_run = 32 - 6 + failed  # requests

    def answer(body, number):
        at_fault = 0 < number <= failed or first_run <= number < first_run + failed
        return fault if at_fault else right(body, number)
    with Server(answer) as server:
        report = annotate_toy(toy, tmp_path / "o.json", server, "--concurrency", "1")[2]
        assert "6 without response" in report and words in report
        assert len(server.requests) == first_run
        assert annotate_toy(toy, tmp_path / "o.json", server, "--concurrency", "1")[2] == report
        assert ", 0 without response" in annotate_toy(toy, tmp_path / "o.json", server)[2]
        assert len(server.requests) == first_run + failed + 6


@pytest.mark.parametrize("status", [400, 500])
def test_a_server_that_fails_at_every_question_ends_the_run(toy, tmp_path, monkeypatch, status):
    monkeypatch.setattr(annotate, "MOST_FAILURES", 3)
    with Server(lambda body, number: (status, {}, "no pictures")) as server:
        with pytest.raises(InputError, match="3 requests in a row failed, .*no pictures"):
            annotate_toy(toy, tmp_path / "o.json", server)
    assert not (tmp_path / "o.json").exists()


def test_a_limit_takes_the_first_records_and_the_rest_can_follow(toy, right, tmp_path):
    ids = [record["problem_id"] for record in json.loads((toy / "train.json").read_text())]

    def requested(*more):
        with Server(right) as server:
            kept, rejected, _ = annotate_toy(toy, tmp_path / "cot.json", server, *more)
        return len(server.requests), {row["problem_id"] for row in kept + rejected}
    assert requested("--limit", "5") == (5, {*ids[:5]})
    assert requested() == (len(ids) - 5, {*ids}) and requested("--limit", "99")[0] == 0
    assert requested("--limit", "3") == (0, {*ids[:3]})


def test_killed_in_the_middle_it_loses_no_answer_that_had_come(toy, tmp_path):
    """A server that answers 6 requests and then is silent; the process is killed and repeated. Its
    workers, whose pictures fill a pipe by then, and their decoders end with it."""
    out = tmp_path / "cot.json"
    large = "--min_pixels", "50176", "--max_pixels", "50176"  # a video fills a pipe

    def answer(body, number):
        return reply("x") if number < 6 else sleep(30)
    with Server(answer) as server:
        process = subprocess.Popen([
            sys.executable, "annotate.py", "--model", "m", "--data", str(toy / "train.json"),
            "--out", str(out), *SMALL, *large, "--concurrency", "3", "--api_base", server.base],
            cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and len(server.requests) < 9:
            sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        assert len(children) == 4 and psutil.wait_procs(children, timeout=20)[1] == []
        assert len(server.requests) == 9 and not out.exists()
    assert len(logged(tmp_path, "cot.rank0")) == 1 + 6  # the configuration first
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
    _, *rows = logged(tmp_path, "cot.rank0")
    assert sorted(row["problem_id"] for row in rows) == list(range(8))
    assert all(len(row["output"]) == len(row["tokens"]) == 2 for row in rows)
    assert all(0 < tokens <= 8 for row in rows for tokens in row["tokens"])
    assert len({text for row in rows for text in row["output"]}) > 8  # the samples differ
    # the model is untrained
    assert "0 of 8 records annotated" in (tmp_path / "cot.report.md").read_text()
    assert len(logged(tmp_path, "cot.rejected")) == 16
