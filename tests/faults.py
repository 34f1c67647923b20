"""Runs a training script's main with one fault built in, for test_faults.py.

    python tests/faults.py tgrpo kill:rollout:4 --model ...

FAULT is what:where:when[:rank]; `when` counts the calls of that place from 1. Places: rollout,
update, save (a checkpoint is on disk but `latest` does not name it yet), remove (`latest` names it,
an older one is about to go) and decode (for records with that problem_id, always). What: kill
(SIGKILL), hang, slow (20 seconds), nan (the loss), full (no file may grow beyond 1 MB from then),
term (SIGTERM), int (SIGINT, to the whole process group, as Ctrl-C sends it), twice (two SIGINTs,
then a hang), raise (an exception that nobody expects).
"""
import os
import resource
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import deepspeed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import build_data  # noqa: E402
import sft  # noqa: E402
import tgrpo  # noqa: E402

# DeepSpeed's launcher puts its own flag first
SCRIPT, FAULT, *ARGV = (word for word in sys.argv[1:] if not word.startswith("--local_rank"))
FAULT = FAULT.split(":")
script = {"sft": sft, "tgrpo": tgrpo}[SCRIPT]


def strike(what):
    """Makes the fault happen."""
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    elif what == "int":
        os.killpg(os.getpgrp(), signal.SIGINT)
    elif what == "twice":
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        time.sleep(1000)
    elif what == "raise":
        raise KeyError("a fault that nobody expects")
    elif what in ("hang", "slow"):
        time.sleep(1000 if what == "hang" else 20)
    elif what == "full":  # Python ignores SIGXFSZ: writing raises OSError
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))


def faulty(function, after=False):
    """The function, with the fault at its call number `when`, before or after the call."""
    what, _, when, *rank = FAULT
    calls = 0

    def call(*args, **kwargs):
        nonlocal calls
        calls += 1
        now = calls == int(when) and os.environ["RANK"] == (rank or [os.environ["RANK"]])[0]
        if now and not after:
            strike(what)
        result = function(*args, **kwargs)
        if now and after:
            strike(what)
        return result * float("nan") if now and what == "nan" else result
    return call


def faulty_decode(function):
    what, _, problem_id, *_ = FAULT

    def call(record, **limits):
        if record["problem_id"] == int(problem_id):
            strike(what)
        return function(record, **limits)
    return call


if __name__ == "__main__":
    place = FAULT[1]
    if place == "rollout":
        tgrpo.sample_responses = faulty(tgrpo.sample_responses)
    elif place == "update":
        name = {"sft": "target_loss", "tgrpo": "tgrpo_loss"}[SCRIPT]
        setattr(script, name, faulty(getattr(script, name)))
    elif place == "save":
        engine = deepspeed.DeepSpeedEngine
        engine.save_checkpoint = faulty(engine.save_checkpoint, after=FAULT[0] == "kill")
    elif place == "remove":
        sft.shutil = SimpleNamespace(rmtree=faulty(sft.shutil.rmtree))  # others' stays as it is
    elif place == "decode":
        build_data.load_vision = faulty_decode(build_data.load_vision)
    build_data.run_script(script.main, lambda: script.parse_args(ARGV))
