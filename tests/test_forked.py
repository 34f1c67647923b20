"""conftest.run: a forked script is, to whoever runs it, what a new process is."""
import subprocess
import time
from pathlib import Path

import pytest
import torch

from conftest import run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU nothing is forked")


@pytest.fixture
def script(tmp_path):
    def write(text):
        (tmp_path / "script.py").write_text(text)
        return tmp_path / "script.py"
    return write


@pytest.mark.parametrize("options, forked", [
    ({}, True), ({"env": {"PYTHONPATH": "."}}, True), ({"fresh": True}, False),
    ({"env": {"OMP_NUM_THREADS": "2"}}, False)])
def test_a_script_is_forked_unless_an_import_could_differ(script, options, forked):
    printed = run(script("import sys; print('torch' in sys.modules)"), **options).stdout
    assert printed == f"{forked}\n"


@pytest.mark.parametrize("fresh", [False, True])
def test_arguments_streams_and_the_environment_are_the_callers(script, monkeypatch, fresh):
    path = script("import os, sys; print(sys.argv, __name__, __file__, sys.path[0], input());"
                  "print(os.environ['WORD'], file=sys.stderr)")
    monkeypatch.setenv("WORD", "set")
    result = run(path, "--flag", "a b", input="typed\n", fresh=fresh)
    assert result.stdout == f"['{path}', '--flag', 'a b'] __main__ {path} {path.parent} typed\n"
    assert result.stderr == "set\n"


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("code, status, last", [
    ("", 0, ""), ("sys.exit('why')", 1, "why"), ("os._exit(4)", 4, ""),
    ("1 / 0", 1, "ZeroDivisionError: division by zero"),
    ("raise KeyboardInterrupt", -2, "KeyboardInterrupt"), ("os.kill(os.getpid(), 9)", -9, ""),
    ("import atexit; atexit.register(print, 'why', file=sys.stderr)", 0, "why"),
    ("import threading; threading.Timer(0.2, os.write, (2, b'why')).start()", 0, "why")])
def test_a_script_ends_with_its_status_signal_and_traceback(script, code, status, last, fresh):
    result = run(script(f"import os, sys; {code}"), check=False, fresh=fresh)
    assert (result.returncode, "".join(result.stderr.splitlines()[-1:])) == (status, last)


def test_a_timeout_ends_the_script_and_its_children(script):
    path = script("import os, time; print(os.getpid(), os.fork(), flush=True); time.sleep(100)")
    with pytest.raises(subprocess.TimeoutExpired) as error:
        run(path, timeout=2)
    time.sleep(0.5)
    pids = {int(word) for word in error.value.stdout.split()} - {0}
    states = [Path(f"/proc/{pid}/stat").read_text().split()[2] for pid in pids
              if Path(f"/proc/{pid}").exists()]
    assert len(pids) == 2 and {*states} <= {"Z"}  # gone, or ended and not yet waited for


def test_ranks_get_what_the_launcher_gives_and_end_when_one_of_them_fails(script):
    path = script("import os, sys, time; names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE');"
                  "sys.stdout.write(str([*sys.argv[1:], *map(os.environ.get, names)]) + '\\n');"
                  "status = int(sys.argv[2]); time.sleep(status * int(os.environ['RANK']));"
                  "sys.exit(status)")
    both = [f"['--local_rank={rank}', '0', '{rank}', '{rank}', '2']" for rank in range(2)]
    for fresh in (False, True):
        printed = run(path, "0", ranks=2, fresh=fresh).stdout.splitlines()
        assert sorted(line for line in printed if line.startswith("['--")) == both
    assert run(path, "90", ranks=2, check=False, timeout=60).returncode == 90
