"""Several machines: what ends their ranks together, and what must not end one."""
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest

import sft
from build_data import InputError
from conftest import ROOT, SMALL, equal_weights, free_port, logged, put, run, together


def command(toy, output, *more, script="sft.py"):
    return [str(word) for word in (
        script, "--model", toy / "model", "--data", toy / "cot.json", "--media_root", toy,
        "--output", output, *SMALL, "--max_steps=4", "--lr_schedule=constant", *more)]


def on_two_machines(*commands):
    """Runs a rank of each of two commands as if on a machine of its own, without a launcher that
    ends the other. Returns both results. A copy of sft.py is a new process: a fork has imported
    from this folder."""
    port = free_port()
    return together(*(partial(
        run, *command, check=False, fresh=command[0] != "sft.py", env={
            "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        for rank, command in enumerate(commands)))


def test_a_file_that_one_machine_lacks_ends_the_ranks_of_all_with_that_error(toy, tmp_path):
    """Either way round, long before --timeout_minutes: in the seconds that `run` waits."""
    here, absent = command(toy, tmp_path / "run"), command(toy, tmp_path / "run", "--data=absent")
    for commands in ((here, absent), (absent, here)):
        ranks = on_two_machines(*commands)
        lacking = commands.index(absent)
        assert [rank.returncode for rank in ranks] == [1, 1]
        assert all("Traceback" not in rank.stderr for rank in ranks)
        error = ranks[lacking].stderr.splitlines()[-1].removeprefix("sft.py: ")
        assert "absent" in error
        assert ranks[1 - lacking].stderr.endswith(f"sft.py: rank {lacking}: {error}\n")
    assert not (tmp_path / "run").exists()


def test_machines_with_another_data_file_or_commit_are_refused_by_what_differs(toy, tmp_path):
    records = json.loads((toy / "cot.json").read_text())
    (tmp_path / "cot.json").write_text(json.dumps(records[1:]))
    there = tmp_path / "repository"  # without a commit of its own
    there.mkdir()
    for script in ("sft", "build_data", "rewards"):
        shutil.copy(ROOT / f"{script}.py", there)
    config = f"--deepspeed_config={ROOT}/ds_zero3.json"
    ranks = on_two_machines(
        command(toy, tmp_path / "run", config),
        command(toy, tmp_path / "run", config, f"--data={tmp_path}/cot.json", "--media_root", toy,
                script=there / "sft.py"))
    for rank in ranks:
        assert rank.returncode == 1 and "Traceback" not in rank.stderr
        last = rank.stderr.splitlines()[-1]
        assert "sft.py: ranks 0 and 1 differ: records of --data " in last
        assert "; git commit " in last
        assert f"; --data {toy}/cot.json and {tmp_path}/cot.json" in last
    assert not (tmp_path / "run").exists()


def test_another_version_of_a_package_is_refused_by_name(monkeypatch):
    identity = {"arguments": {"seed": 0, "local_rank": 1}, "records": "a", "model_sha256": "b",
                "world_size": 3, "zero_stage": 3, "git_commit": None,
                "versions": {"torch": "2", "av": "5.0"}}
    state = SimpleNamespace(held_out=[], config={}, identity=identity)

    def refuse(**changed):
        monkeypatch.setattr(sft, "gather_objects", lambda mine: [mine, mine, mine | changed])
        sft.require_equal_ranks(state)
    refuse()
    with pytest.raises(InputError, match="^ranks 0 and 2 differ: av 5.0 and 5.1; --seed 0 and 1. "):
        refuse(**{"av": "5.1", "--seed": 1})


def test_a_run_whose_reader_is_gone_goes_on(toy, tmp_path):
    """Both streams are closed after the first line; a signal still ends it in a checkpoint."""
    words = command(toy, tmp_path / "run", "--max_steps=100", "--deepspeed_config",
                    toy / "ds_zero0.json")
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    log = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: log.read_text().count("\n") > 2, process)
    process.terminate()
    assert process.wait(timeout=100) == 0
    last = logged(tmp_path / "run", "metrics")[-1]["step"]
    assert (tmp_path / "run" / "latest").read_text() == f"checkpoint-{last}"


@pytest.fixture
def run_code(tmp_path):
    """Runs code as a script that imports those of the repository."""
    def call(code, *flags, **options):
        (tmp_path / "code.py").write_text(code, encoding="utf-8")
        return run(tmp_path / "code.py", *flags, env={"PYTHONPATH": str(ROOT)}, **options)
    return call


def test_timeout_minutes_reaches_the_group_in_which_zero_communicates(run_code):
    result = run_code(
        "import torch, build_data\nfrom types import SimpleNamespace\n"
        "build_data.setup_distributed(SimpleNamespace(timeout_minutes=7))\n"
        "from deepspeed.utils import groups\n"
        "for group in (groups._get_data_parallel_group(), torch.distributed.group.WORLD):\n"
        "    print(group._get_backend(torch.device('cpu')).options._timeout)")
    assert result.stdout.splitlines()[-2:] == ["0:07:00", "0:07:00"]


@pytest.mark.parametrize("script", ["sft", "tgrpo"])
def test_data_workers_are_forked_before_a_model_is_loaded(toy, tmp_path, run_code, script):
    """Each write to memory that was shared with them would copy it: twice 4 bytes a parameter of
    AdamW's moments, where the optimizer is on the host and a run resumes."""
    code = (f"import multiprocessing, {script}, build_data\n"
            "def look(*_):\n"
            "    workers = len(multiprocessing.active_children())\n"
            "    raise build_data.InputError(f'{workers} workers')\n"
            f"{script}.load_model = look\n"
            f"build_data.run_script({script}.main, {script}.parse_args)")
    _, *flags = command(toy, tmp_path / "run", "--num_workers=2")
    result = run_code(code, *flags, check=False)
    assert result.stderr.splitlines()[-1] == "code.py: 2 workers"


# ------------------------------------------------- two nodes, by DeepSpeed's own launcher

PDSH = """#!/bin/bash
IFS=, read -ra hosts <<< "$5"  # pdsh -S -f 1024 -w HOST,HOST WORD...
shift 5
for n in "${!hosts[@]}"; do bash -c "${*//%n/$n}" & done
wait
"""


@pytest.fixture
def nodes(tmp_path):
    """Returns what starts DeepSpeed's launcher on two nodes, and an environment with a pdsh that
    runs the command of each node on this machine."""
    put(tmp_path / "hosts", "first slots=1\nsecond slots=1\n")
    put(tmp_path / "bin/pdsh", PDSH)
    (tmp_path / "bin/pdsh").chmod(0o755)
    return ([sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", tmp_path / "hosts",
             "--no_ssh_check", "--master_addr", "127.0.0.1", "--master_port", free_port()],
            {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"})


@pytest.mark.slow
def test_two_nodes_stopped_at_the_launcher_and_resumed_equal_two_ranks_of_one(
        toy, tmp_path, nodes):
    """SIGTERM to the launcher ends both with a checkpoint."""
    launcher, env = nodes
    words = command(toy, tmp_path / "run", "--max_steps=12")
    log, latest = tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "latest"
    with (tmp_path / "output").open("w") as output:
        options = {"cwd": ROOT, "env": env, "stdout": output, "stderr": output}
        process = subprocess.Popen([*launcher, *words], **options)
        wait_until(lambda: log.exists() and log.read_text().count("\n") > 2, process)
        process.terminate()
        assert process.wait(timeout=60) == 1
        wait_until(latest.exists)
        stopped = int(latest.read_text().removeprefix("checkpoint-"))
        assert 2 <= stopped < 12 and logged(tmp_path / "run", "metrics")[-1]["step"] == stopped
        subprocess.run([*launcher, *words, "--resume"], timeout=300, check=True, **options)
    run(*command(toy, tmp_path / "one", "--max_steps=12"), ranks=2)
    assert equal_weights(tmp_path / "run", tmp_path / "one")


def wait_until(true, process=None, limit=400):
    """Waits until a condition holds; a process, if given, must live on meanwhile."""
    end = time.monotonic() + limit
    while not true():
        assert time.monotonic() < end and (process is None or process.poll() is None)
        time.sleep(0.2)
