"""Tests import the scripts from the repository's top level and share one small toy. Two processes
share the test modules."""
import base64
import io
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest

# small matrices gain nothing from threads, and those of several processes wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
LIMITS = {"max_frames": 8, "min_frames": 4, "fps": 2, "min_pixels": 784, "max_pixels": 784}
SMALL = ["--min_pixels=784", "--max_pixels=784", "--image_min_pixels=784", "--max_frames=8",
         "--num_workers=1"]


@cache
def fork_server():
    """Starts tests/forked.py's server, which ends with this process. Returns our end of its
    socket."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        subprocess.Popen([sys.executable, ROOT / "tests/forked.py", str(its.fileno())], cwd=ROOT,
                         stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                         pass_fds=[its.fileno()], start_new_session=True)
    return ours


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run(*command, ranks=0, env=None, check=True, timeout=400, fresh=None, **options):
    """Runs one of the scripts as a user would, alone or on several ranks; options are
    subprocess.run's.

    The script is a fork of a process that has imported everything (tests/forked.py). It is a new
    process, on several ranks under DeepSpeed's launcher, if `fresh`, which is by default after "-c"
    and if `env` may change what an import does; or on a machine with GPUs, which a fork could not
    use.
    """
    port = free_port()
    if fresh is None:
        fresh = command[0] == "-c" or bool({*(env or {})} - {"PYTHONPATH"})
    if not (fresh or torch.cuda.is_available()):
        server = fork_server().fileno()
        launcher = [sys.executable, "-IS", ROOT / "tests/forked.py", str(server), str(ranks), port]
        options["pass_fds"] = [server]
    elif ranks:
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks),
                    "--master_port", port]
    else:
        launcher = [sys.executable]
    result = subprocess.run([*launcher, *map(str, command)], cwd=ROOT, text=True, timeout=timeout,
                            capture_output=True, env={**os.environ, **(env or {})}, **options)
    if ranks > 1:  # DeepSpeed leaves 69 MB of shared memory a rank, under the port's name
        for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            left.unlink()
    if check:
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result


def together(*calls):
    """Calls all at the same time, since a run uses one thread. Returns their results."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def logged(output, name):
    """Returns the lines of a log in a run's folder."""
    return [json.loads(line) for line in (output / f"{name}.jsonl").read_text().splitlines()]


def put(path, content):
    """Writes a file, and its folder: text as it is, rows as JSON lines if its name says so, other
    data as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, str):
        rows = content if path.suffix == ".jsonl" else [content]
        content = "\n".join(map(json.dumps, rows))
    path.write_text(content, encoding="utf-8")


def ramp(count=8):
    """Returns frames (T, H, W, 3) whose brightness is 10 times their number."""
    return np.full((count, 28, 28, 3), 10 * np.arange(count)[:, None, None, None], np.uint8)


def picture_of(url):
    """Returns the picture in a data URL."""
    return Image.open(io.BytesIO(base64.b64decode(url.partition(";base64,")[2])))


def cells(path):
    """Returns a Markdown file without the blanks that align its columns."""
    return re.sub(" +", " ", path.read_text(encoding="utf-8"))


def table_rows(lines):
    """Returns the cells of each row of a printed Markdown table, the heading first."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines
            if line.startswith("|") and set(line) - set("|- ")]


def break_media(toy, split, out, name, every=1):
    """Writes the toy's records of a split to a file. The first of each `every` names a file of the
    media folder that cannot be decoded."""
    (toy / "media" / name).write_bytes(b"rotten")
    records = json.loads((toy / f"{split}.json").read_text())
    for record in records[::every]:
        record |= {"path": f"./media/{name}",
                   "data_type": "video" if name.endswith(".mp4") else "image"}
    out.write_text(json.dumps(records))


def moved_weights(a, b):
    """Returns the names of the weights that differ between the models in two folders."""
    first, second = (load_file(folder / "model.safetensors") for folder in (a, b))
    assert first.keys() == second.keys()
    return {name for name in first if not torch.equal(first[name], second[name])}


def equal_weights(a, b):
    """Returns whether the models in two folders have the same weights, bit for bit."""
    return not moved_weights(a, b)


def run_here(script, *argv):
    """Runs a script's main in this process. RANK and a port, which it sets, are not left to later
    tests' runs."""
    with patch.dict(os.environ):
        script.main(script.parse_args(list(map(str, argv))))


def reply(*texts, finish="stop"):
    """A server's reply in OpenAI's form, 7 tokens a text."""
    choices = [{"message": {"content": text}, "finish_reason": finish} for text in texts]
    return {"choices": choices, "usage": {"completion_tokens": 7 * len(texts)}}


class Server(ThreadingHTTPServer):
    """A real HTTP server on this machine. `answer(body, number)` returns what to send: a dict, or
    (status, headers, text), or a text; or pieces of a text, with pauses; or None, to hang up.
    `requests` has the path, headers and body of each request."""

    def __init__(self, answer=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.requests, self.lock = answer, [], threading.Lock()
        self.base = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def server_close(self):
        self.shutdown()
        super().server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # a connection serves many requests

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append(SimpleNamespace(
                path=self.path, headers=dict(self.headers), body=body))
        sent = self.server.answer(body, number)
        self.close_connection = True
        if sent is None:
            return
        status, headers, text = sent if isinstance(sent, tuple) else (200, {}, sent)
        if isinstance(text, (str, dict)):
            text = [json.dumps(text) if isinstance(text, dict) else text]
            self.close_connection = "Content-Length" in headers
            headers = {"Content-Length": str(len(text[0].encode()))} | headers
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(OSError):  # the client may have hung up
            for piece in text:
                self.wfile.write(piece.encode())

    def log_message(self, *_):
        pass


class PlainEngine:
    """Has what backward_group needs of DeepSpeed's engine, for one process."""

    def __init__(self, module):
        self.module = module

    def __call__(self, **inputs):
        return self.module(**inputs)

    def backward(self, loss):
        loss.backward()

    def set_gradient_accumulation_boundary(self, last):
        pass


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Makes a small toy: 48 cold-start, 32 training, 24 test questions; an untrained tiny model."""
    out = tmp_path_factory.mktemp("toy") / "toy"
    run("build_data.py", "toy", "--out", out, "--cot", 48, "--train", 32, "--test", 24)
    return out


@pytest.fixture(scope="session")
def processor(toy):
    from transformers import AutoProcessor
    return AutoProcessor.from_pretrained(toy / "model")


@pytest.fixture
def model(toy):
    """Loads the tiny model: eval mode, float32."""
    from transformers import AutoModelForImageTextToText
    return AutoModelForImageTextToText.from_pretrained(toy / "model").eval()


@pytest.fixture(scope="session")
def samples(toy, processor):
    """Returns {"video", "image"}: (record, encoded inputs) of the first in the training file."""
    from build_data import encode, load_records, load_vision
    found = {}
    for record in load_records(toy / "train.json"):
        if record["data_type"] not in found:
            found[record["data_type"]] = (
                record, encode(processor, record, load_vision(record, **LIMITS)))
    return found


# ------------------------------------------------------------------- modules, two at a time

def pytest_collection(session):
    """Starts the server of forks, which imports while a folder's tests are collected."""
    if any(map(os.path.isdir, session.config.args)) and not torch.cuda.is_available():
        fork_server()


def pytest_runtestloop(session):
    """Runs the tests in this process and in a fork of it. Each takes its next module from one
    queue. The fork writes its reports to a file, and this process passes them on.

    pytest's own loop runs a single module, and everything after an error of collection, with --pdb
    or with a GPU, which a fork could not use.
    """
    modules = {}  # those that start scripts take long: they come first
    for item in sorted(session.items, key=lambda item: not hasattr(item.module, "run")):
        modules.setdefault(item.module, []).append(item)
    options = session.config.option
    if (len(modules) < 2 or options.collectonly or options.usepdb or session.testsfailed
            or torch.cuda.is_available()):
        return None
    fork_server()  # of both
    queue, end = os.pipe()
    os.write(end, bytes(range(len(modules))))  # a byte a module
    os.close(end)
    items = (item for number in iter(partial(os.read, queue, 1), b"")
             for item in list(modules.values())[number[0]])
    with tempfile.NamedTemporaryFile() as file:
        if not (fork := os.fork()):
            run_fork(session, items, file.name)
        try:
            for _ in run_items(session, items):
                pass_on(session, file)
        except BaseException:  # with -x, Ctrl-C
            os.kill(fork, signal.SIGINT)
            raise
        finally:
            _, status = os.waitpid(fork, 0)
        pass_on(session, file)
    assert status == 0, f"the other half of the tests ended with {status}"
    return True


def run_items(session, items):
    """Runs tests and yields after each, as pytest's own loop does."""
    item = next(items, None)
    while item:
        following = next(items, None)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        yield
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        item = following


def run_fork(session, items, path):
    """Runs tests in the forked process, which prints nothing, and ends it."""
    status = 1
    try:
        plugins = session.config.pluginmanager
        plugins.unregister(name="terminalreporter")
        capture = plugins.getplugin("capturemanager")  # both would write to one file
        capture.stop_global_capturing()
        capture.start_global_capturing()
        with open(path, "ab") as file:
            def write(report):
                pickle.dump(report, file)
                file.flush()
            plugins.register(SimpleNamespace(pytest_runtest_logreport=write))
            for _ in run_items(session, items):
                pass
        status = 0
    except session.Failed:
        status = 0  # the report is written: the other process stops as well
    finally:
        os._exit(status)


def pass_on(session, file):
    """Passes the reports that the fork has written since the last call to pytest's plugins."""
    hook = session.config.hook
    while True:
        start = file.tell()
        try:
            report = pickle.load(file)
        except (EOFError, pickle.UnpicklingError):  # not there yet, or not whole
            file.seek(start)
            return
        place = {"nodeid": report.nodeid, "location": report.location}
        if report.when == "setup":
            hook.pytest_runtest_logstart(**place)
        hook.pytest_runtest_logreport(report=report)
        if report.when == "teardown":
            hook.pytest_runtest_logfinish(**place)
