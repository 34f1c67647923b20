"""Starts the scripts as forks of one process that has already imported everything.

Of the 12 CPU seconds that a two-step tgrpo.py takes, 10 are imports. Three kinds of process:

    server     imports torch and the rest, then waits; started once by conftest.run
    client     what subprocess.run starts; hands its command, stdin, stdout and stderr to the server
               and ends with the script's exit status or signal
    watcher    a fork of the server; forks the script, one process per rank, and waits for them

A script runs as `python SCRIPT` runs it, with the client's environment, but in a session of its
own. All forks have the same order of sets of strings, and what an import reads from the environment
is the server's.
"""
import atexit
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
# What the scripts import when they start, and what they need later
MODULES = ("annotate", "build_data", "evaluate", "sft", "tgrpo", "av", "qwen_vl_utils",
           "setuptools", "torch._dynamo", "torch._inductor.compile_fx", "torch.onnx",
           "deepspeed.ops.op_builder.all_ops", "deepspeed.module_inject.auto_ep_layer",
           "deepspeed.runtime.superoffload.superoffload_stage3",
           "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
           "transformers.models.qwen2_5_vl.processing_qwen2_5_vl",
           "transformers.models.qwen2_vl.video_processing_qwen2_vl",
           "transformers.models.qwen2.tokenization_qwen2",
           "transformers.models.qwen3_vl.modeling_qwen3_vl",
           "transformers.models.qwen3_vl.processing_qwen3_vl")
MOST_BYTES = 2**17  # of a request


def serve(requests):
    """Forks a watcher for each request, until every client's end of the socket is closed."""
    sys.path.insert(0, str(ROOT))
    for module in MODULES:
        importlib.import_module(module)
    sys.path.remove(str(ROOT))
    gc.freeze()  # or every fork's collector would copy what it looks at
    assert len(os.listdir("/proc/self/task")) == 1, "a fork has none of its parent's threads"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a watcher
    while True:
        message, fds, *_ = socket.recv_fds(requests, MOST_BYTES, 4)
        if not message:
            return
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return watch(*fds, **json.loads(message))
        for fd in fds:
            os.close(fd)


def watch(stdin, stdout, stderr, client, command, ranks, port, environment):
    """Forks the script and reports its exit status, negative for a signal, to the client. When one
    rank fails, or the client is killed, all processes of the script are killed."""
    processes = {}
    for rank in range(max(ranks, 1)):
        if not (pid := os.fork()):
            os.setsid()
            for number, fd in enumerate((stdin, stdout, stderr)):
                os.dup2(fd, number)
            for fd in (stdin, stdout, stderr, client):
                os.close(fd)
            os.environ.clear()
            os.environ.update(environment)
            if ranks:
                join_launch(command, rank, ranks, port)
            return end(start(*command))
        processes[os.pidfd_open(pid)] = pid
    for fd in (stdin, stdout, stderr):
        os.close(fd)
    status = 0
    while processes and not status:
        ready, *_ = select.select([client, *processes], [], [])
        if client in ready:
            break
        for process in ready:
            _, ended = os.waitpid(processes.pop(process), 0)
            status = status or os.waitstatus_to_exitcode(ended)
    for pid in processes.values():
        os.killpg(pid, signal.SIGKILL)
    with suppress(BrokenPipeError):  # the client is gone
        os.write(client, str(status).encode())
    os._exit(0)


def join_launch(command, rank, ranks, port):
    """Adds to the command and the environment what DeepSpeed's launcher gives to a rank."""
    command.insert(1, f"--local_rank={rank}")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                      LOCAL_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                      CROSS_RANK="0", CROSS_SIZE="1")
    sys.stdout.reconfigure(write_through=True)  # python -u


def start(script, *argv):
    """Runs a script as the program of this process. Returns its exit status; what it raises ends
    the interpreter as after any script."""
    added = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.argv = [script, *argv]
    sys.path[:1] = [os.path.dirname(os.path.abspath(script)), *filter(None, added)]
    module = sys.modules["__main__"] = ModuleType("__main__")
    module.__file__ = script
    try:
        exec(compile(Path(script).read_bytes(), script, "exec"), vars(module))
    except SystemExit as exit:
        if not isinstance(exit.code, (int, type(None))):
            raise  # the interpreter prints it
        return exit.code or 0
    return 0


def end(status):
    """Ends this process as the interpreter does, but does not free each object: 0.6 CPU seconds."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def request(server, command, ranks, port):
    """The client: has the server run the command and ends as the script ends."""
    ours, theirs = socket.socketpair()
    message = {"command": command, "ranks": int(ranks), "port": port,
               "environment": dict(os.environ)}
    socket.send_fds(server, [json.dumps(message).encode()], [0, 1, 2, theirs.fileno()])
    theirs.close()
    status = int(ours.recv(MOST_BYTES) or 1)
    if status < 0:
        if status != -signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as server:
        if len(sys.argv) == 2:
            serve(server)
        else:
            _, _, ranks, port, *command = sys.argv
            request(server, command, ranks, port)
