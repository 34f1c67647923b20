"""Runs a training script's main with one fault built in, for test_faults.py.

    python tests/faults.py tgrpo kill:rollout:4 --model ...

FAULT is what:where:when[:rank]; `when` counts the calls of that place from 1. Places: rollout,
update, save (a checkpoint is on disk but `latest` does not name it yet) and remove (`latest` names
it, an older one is about to go).
What: kill (SIGKILL), nan (the loss), full (no file may grow beyond 1 MB from then), term (SIGTERM),
int (SIGINT, to the whole process group, as Ctrl-C sends it), twice (two SIGINTs, then a hang).
"""
import os
import resource
import shutil
import signal
import sys
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import deepspeed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import build_data  # noqa: E402
import sft  # noqa: E402
import tgrpo  # noqa: E402

# DeepSpeed's launcher puts its own flag first
SCRIPT, FAULT, *ARGV = (word for word in sys.argv[1:] if not word.startswith("--local_rank"))
WHAT, PLACE, WHEN, *RANK = FAULT.split(":")
script = {"sft": sft, "tgrpo": tgrpo}[SCRIPT]
sft.shutil = SimpleNamespace(**vars(shutil))  # others' rmtree stays as it is
PLACES = {"rollout": (tgrpo, "sample_responses"),
          "update": (script, {"sft": "target_loss", "tgrpo": "tgrpo_loss"}[SCRIPT]),
          "save": (deepspeed.DeepSpeedEngine, "save_checkpoint"), "remove": (sft.shutil, "rmtree")}


def strike():
    """Makes the fault happen."""
    if WHAT in ("kill", "term"):
        os.kill(os.getpid(), signal.Signals[f"SIG{WHAT.upper()}"])
    elif WHAT == "int":
        os.killpg(os.getpgrp(), signal.SIGINT)
    elif WHAT == "twice":
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        time.sleep(1000)
    elif WHAT == "full":  # Python ignores SIGXFSZ: writing raises OSError
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))


def faulty(function):
    """Returns the function with the fault, which comes before a call, but kills a save after it."""
    calls, after = count(1), (WHAT, PLACE) == ("kill", "save")

    def call(*args, **kwargs):
        due = next(calls) == int(WHEN) and RANK in ([], [os.environ["RANK"]])
        if due and not after:
            strike()
        result = function(*args, **kwargs)
        if due and after:
            strike()
        return result * float("nan") if due and WHAT == "nan" else result
    return call


if __name__ == "__main__":
    setattr(*PLACES[PLACE], faulty(getattr(*PLACES[PLACE])))
    build_data.run_script(script.main, lambda: script.parse_args(ARGV))
