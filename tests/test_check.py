"""Checking media: broken files are found, one hang or crash loses one file, a kill is resumed."""
import importlib
import json
import os
import shutil
import time

import numpy as np
import pytest
from PIL import Image

import build_data
from build_data import InputError, load_records, write_video
from conftest import cells


def record(i, path, **more):
    return {"problem_id": i, "problem": "?", "problem_type": "free-form", "options": [],
            "data_type": "video" if path.endswith("mp4") else "image",
            "solution": "<answer>x</answer>", "path": path, "data_source": "s", **more}


@pytest.fixture
def data(tmp_path):
    """Six records over five media: two good ones (one in two records), and three broken."""
    write_video(tmp_path / "good.mp4", np.zeros((8, 28, 28, 3), np.uint8), fps=2)
    Image.new("RGB", (56, 56)).save(tmp_path / "good.png")
    (tmp_path / "noise.mp4").write_bytes(b"no video" * 100)
    (tmp_path / "empty.png").write_bytes(b"")
    names = ("good.mp4", "good.png", "noise.mp4", "empty.png", "absent.png", "good.mp4")
    (tmp_path / "a.json").write_text(json.dumps([record(i, n) for i, n in enumerate(names)]))
    return tmp_path


def check(folder, *flags):
    """Runs `check` in this process; returns the usable records' ids and the report."""
    build_data.check(build_data.parse_args([
        "check", "--data", str(folder / "a.json"), "--num_workers", "0", *map(str, flags)]))
    records = json.loads((folder / "a_clean.json").read_text())
    return [r["problem_id"] for r in records], cells(folder / "a_clean.report.md")


def logged(folder):
    lines = (folder / "a_clean.media.jsonl").read_text().splitlines()
    return [json.loads(line)["clip"][0] for line in lines]


def test_records_with_usable_media_stay_as_they_are_and_others_are_named(data):
    ids, report = check(data, "--num_workers", 2)
    assert ids == [0, 1, 5]
    before = {r["problem_id"]: r for r in json.loads((data / "a.json").read_text())}
    assert json.loads((data / "a_clean.json").read_text()) == [before[i] for i in ids]
    assert "| the file is empty (0 bytes) | 1 | 1 | empty.png |" in report
    assert "| [Errno 2] No such file or directory: 'it' | 1 | 1 | absent.png |" in report
    assert "noise.mp4" in report
    assert sorted(logged(data)) == sorted(["good.mp4", "good.png", "noise.mp4", "empty.png",
                                           "absent.png"])  # each file once
    assert load_records(data / "a_clean.json")


def test_a_second_run_decodes_only_what_failed_or_changed(data):
    check(data)
    with open(data / "a_clean.media.jsonl", "a") as file:
        file.write('{"clip": ["good.png"')  # a kill tore this line
    shutil.copy(data / "good.png", data / "absent.png")  # repaired
    os.utime(data / "good.mp4", (1, 1))  # changed
    ids, report = check(data)
    assert ids == [0, 1, 4, 5] and "absent" not in report
    assert logged(data)[5:] == ["good.mp4", "noise.mp4", "empty.png", "absent.png"]
    assert check(data, "--min_pixels", 5 * 28 * 28)[0] == [0, 1, 4, 5]  # other limits
    assert logged(data)[9:].count("good.mp4") == 1


def test_a_damaged_log_is_named(data):
    (data / "a_clean.media.jsonl").write_text("no row\n")
    with pytest.raises(InputError, match="a_clean.media.jsonl is damaged: .*; remove it"):
        check(data)


def test_a_folder_that_cannot_be_is_named_before_the_work(data):
    (data / "file").write_text("")
    with pytest.raises(InputError, match="cannot write .*file/out.json"):
        check(data, "--out", data / "file" / "out.json")


def test_a_decoder_that_hangs_or_crashes_loses_one_file(data, monkeypatch):
    importlib.import_module("qwen_vl_utils")  # each new decoder would import it, slowly
    real = build_data.load_vision

    def load_vision(record, **limits):
        if record["path"] == "good.png":
            os.kill(os.getpid(), 9)
        if record["path"] == "noise.mp4":
            time.sleep(60)
        return real(record, **limits)
    monkeypatch.setattr(build_data, "load_vision", load_vision)
    monkeypatch.setattr(build_data, "DECODERS", {})  # its decoders are forked with the above
    ids, report = check(data, "--decode_timeout", 2)
    assert ids == [0, 5]
    assert "decoding took more than 2 seconds" in report and "its decoder died" in report


def test_a_cut_video_is_named_with_its_reason_and_another_reader_is_another_verdict(data):
    write_video(data / "cut.mkv", np.zeros((40, 28, 28, 3), np.uint8), fps=2)
    whole = (data / "cut.mkv").read_bytes()
    (data / "cut.mkv").write_bytes(whole[:len(whole) // 2])
    (data / "a.json").write_text(json.dumps([
        record(0, "good.mp4"), record(1, "cut.mkv", data_type="video")]))
    ids, report = check(data)
    assert ids == [0] and "| cut off: 20 s by its header, but it ends at" in report
    pytest.importorskip("decord")
    assert check(data, "--video_reader", "decord")[0][0] == 0
    assert logged(data)[2:] == ["good.mp4", "cut.mkv"]


def test_parts_of_one_video_are_checked_one_by_one(data):
    parts = [record(0, "good.mp4", video_start=0.0, video_end=4.0),
             record(1, "good.mp4", video_start=90.0, video_end=95.0)]
    (data / "a.json").write_text(json.dumps(parts))
    ids, report = check(data)
    assert ids == [0] and "| 1 | 1 | good.mp4 |" in report


def test_records_that_nothing_can_be_earned_on_are_dropped_with_their_reason(data):
    several = [record(i, "good.mp4", problem_type="numerical", solution=f"<answer>{text}</answer>")
               for i, text in enumerate(("12", "00:12", "many"))]
    (data / "a.json").write_text(json.dumps([*several, record(3, "absent.png")]))
    ids, report = check(data)
    assert ids == [0]
    assert "| no answer can match the solution | 1 | 2 | good.mp4 |" in report
    assert "absent.png" in report and logged(data).count("good.mp4") == 1
