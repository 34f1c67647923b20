"""One step of each training at the widths of the published models, with few layers.

The models have two layers of Qwen2.5-VL's language model, four blocks of its tower, its vocabulary
and random weights. A pair of the clip's 16 frames is 128 visual tokens. No GPU is needed. A run
takes one to ten minutes and 6 to 24 GB of memory. pytest's -sv shows both.
"""
import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

import bench
from build_data import ASSETS, PATCH, build_messages, toy_tokenizer, write_video
from conftest import ROOT, moved_weights

LAYERS, BLOCKS, FRAMES = 2, 4, 16
HEIGHT, WIDTH = 8, 16  # of a frame, in units of 28 pixels
RECORD = {"problem_id": 1, "problem": "Which way does the light move?", "data_type": "video",
          "problem_type": "multiple choice", "options": ["A. left", "B. right"],
          "solution": "<answer>B</answer>", "path": "./clip.mp4",
          "process": "<think>it starts left and ends right</think>"}
FLAGS = {"sft": ["--num_train_epochs=1", "--gradient_accumulation_steps=1"],
         "tgrpo": ["--max_steps=1", "--G=2", "--G_tilde=2", "--max_new_tokens=24",
                   "--correct_threshold=0", "--l_min=8", "--l_max=24",
                   "--temporal_to=advantage"]}  # so that equal rewards have a gradient, too
# Rank of the adapters (0: all weights are trained), ZeRO stage; float32, since many CPUs compute in
# bfloat16 much more slowly
RUNS = [("Qwen2.5-VL-3B", 16, 0), ("Qwen2.5-VL-3B", 16, 3), ("Qwen2.5-VL-3B", 0, 0),
        ("Qwen2.5-VL-3B", 0, 3), ("Qwen2.5-VL-7B", 16, 0), ("Qwen2.5-VL-7B", 16, 3)]


@pytest.fixture(scope="module")
def start(request, tmp_path_factory):
    """Makes a random model of a shape, with a processor of default sizes. Every tenth token of the
    small tokenizer is an end token, so that responses differ in length."""
    folder = tmp_path_factory.mktemp("start")
    prompt = build_messages(RECORD | {"media_path": ""})[0]["content"][1]["text"]
    tokenizer = toy_tokenizer([f"{prompt}\n{RECORD['process']}\n{RECORD['solution']}"])
    model = bench.random_model(bench.load_shape(request.param, LAYERS, BLOCKS), tokenizer)
    model.generation_config.eos_token_id = list(range(0, len(tokenizer), 10))
    model.save_pretrained(folder)
    del model  # the runs need its memory
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(), video_processor=Qwen2VLVideoProcessor(),
        tokenizer=tokenizer, chat_template=(ASSETS / "chat_template.jinja").read_text()
    ).save_pretrained(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The file of one record, beside a clip of twice the width and height that a model sees."""
    folder = tmp_path_factory.mktemp("data")
    size = (2 * HEIGHT * PATCH, 2 * WIDTH * PATCH)
    frames = np.zeros((FRAMES, *size, 3), np.uint8)
    for t in range(FRAMES):  # a light that crosses the picture, on noise
        frames[t] = np.random.default_rng(t).integers(0, 60, (*size, 3))
        frames[t, 200:260, 50 * t:50 * t + 60] = 230
    write_video(folder / "clip.mp4", frames, fps=2)
    (folder / "data.json").write_text(json.dumps([RECORD]))
    return folder / "data.json"


def measured(log, *command):
    """Runs a script as a user would. Returns its output, seconds and peak resident memory in GB."""
    start, peak = time.perf_counter(), 0
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=file,
                                   stderr=subprocess.STDOUT)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max([peak, *map(int, re.findall(r"VmHWM:\s+(\d+) kB", status))])
        time.sleep(0.2)
    assert process.returncode == 0, log.read_text()[-4000:]
    return log.read_text(), time.perf_counter() - start, peak * 1024 / 1e9


@pytest.mark.slow
@pytest.mark.parametrize("script", FLAGS)
@pytest.mark.parametrize("start, lora_rank, stage", RUNS, indirect=["start"])
def test_a_step_at_true_widths(start, data, tmp_path, lora_rank, stage, script):
    config, output = tmp_path / "ds.json", tmp_path / "run"
    config.write_text(json.dumps({"zero_optimization": {"stage": stage},
                                  "zero_allow_untested_optimizer": True}))
    printed, seconds, peak = measured(
        tmp_path / "log", f"{script}.py", "--model", start, "--data", data, "--output", output,
        "--deepspeed_config", config, f"--lora_rank={lora_rank}", "--learning_rate=1e-3",
        "--save_steps=0", "--num_workers=1", *FLAGS[script])
    print(f"\nZeRO-{stage}: {seconds:.0f} s, {peak:.1f} GB")
    assert f"{FRAMES // 2} x {2 * HEIGHT} x {2 * WIDTH} patches" in printed
    row = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 1 and math.isfinite(row["optim/loss"])
    moved = moved_weights(start, output)
    assert moved and (not lora_rank or all("_proj." in name for name in moved))
    if script == "sft":  # the target is as likely as any token of the whole vocabulary
        assert row["optim/loss"] == pytest.approx(math.log(152_000), rel=0.1)
    else:
        tokens = json.loads((start / "tokenizer.json").read_text())
        known = len(tokens["model"]["vocab"]) + len(tokens["added_tokens"])
        assert 0 < row["policy/entropy"] < math.log(known)  # no id beyond the tokenizer
        assert row["policy/kl"] == pytest.approx(0, abs=1e-5)  # the reference is the start
        assert 1 <= row["response/tokens"] <= 24
    shutil.rmtree(output)
