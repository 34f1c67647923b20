"""Media of every kind: decoded as they look, or one MediaError that names file and reason."""
import importlib
import os
import signal
import struct
import time
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import build_data
from build_data import MediaError, load_vision, load_vision_isolated

LIMITS = {"max_frames": 8, "min_frames": 4, "fps": 2, "min_pixels": 784,
          "max_pixels": 128 * 784}


def encode_clip(path, codec="libx264", pixels="yuv420p", side=(56, 56), count=8, milliseconds=None,
                **container):
    """A clip whose frame t is a flat grey of 20 t; `milliseconds`: when each frame is shown."""
    with av.open(str(path), "w", options=container) as output:
        stream = output.add_stream(codec, rate=2)
        stream.height, stream.width, stream.pix_fmt = *side, pixels
        if milliseconds:
            stream.codec_context.time_base = Fraction(1, 1000)
        for t in range(count):
            grey = np.full((*side, 3), 20 * t % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            if milliseconds:
                frame.pts, frame.time_base = milliseconds[t], Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def record_of(path, data_type="video"):
    return {"problem_id": path.name, "data_type": data_type, "media_path": str(path),
            "media_root": str(path.parent)}


def greys(vision):
    return vision.frames.float().mean((1, 2, 3))


# -------------------------------------------------------------------------------- videos

@pytest.mark.parametrize("name, codec, pixels, side", [
    ("a.webm", "libvpx-vp9", "yuv420p", (56, 56)), ("a.avi", "mpeg4", "yuv420p", (56, 56)),
    ("a.mkv", "libx264", "yuv420p", (56, 56)), ("a.mov", "libx264", "yuv420p", (56, 56)),
    ("odd.mp4", "libx264", "yuv444p", (57, 45)), ("odd.mkv", "ffv1", "yuv444p", (57, 45))])
def test_containers_codecs_and_odd_sizes_give_every_frame(tmp_path, name, codec, pixels, side):
    vision = load_vision(record_of(encode_clip(tmp_path / name, codec, pixels, side)), **LIMITS)
    assert vision.frames.shape == (8, 3, 56, 56)
    assert torch.allclose(greys(vision), 20.0 * torch.arange(8), atol=4)


def test_a_huge_frame_is_brought_within_the_pixel_limits(tmp_path):
    vision = load_vision(record_of(encode_clip(tmp_path / "a.mp4", side=(2160, 3840), count=4)),
                         **LIMITS)
    assert vision.frames.shape[2] * vision.frames.shape[3] <= 128 * 784
    assert torch.allclose(greys(vision), 20.0 * torch.arange(4), atol=4)


def test_a_clip_of_variable_frame_rate_keeps_first_last_and_order(tmp_path):
    """Frames are taken evenly by number, as in the released code, not by time."""
    clip = encode_clip(tmp_path / "a.mp4", milliseconds=[0, 100, 200, 300, 1000, 2000, 3000, 3500])
    seen = greys(load_vision(record_of(clip), **LIMITS))
    assert len(seen) >= 4 and (seen.diff() > 10).all()
    assert abs(seen[0]) < 4 and abs(seen[-1] - 140) < 4


def test_a_clip_that_claims_ten_hours_still_gives_its_frames(tmp_path):
    times = [*range(0, 7000, 1000), 36_000_000]
    vision = load_vision(record_of(encode_clip(tmp_path / "a.mp4", milliseconds=times)), **LIMITS)
    assert torch.allclose(greys(vision), 20.0 * torch.arange(8), atol=4)


def test_a_rotated_clip_stands_upright(tmp_path):
    """The rotation of a phone's clip is a matrix in the header, here a quarter turn."""
    clip = encode_clip(tmp_path / "a.mp4", side=(56, 112))
    data = bytearray(clip.read_bytes())
    matrix = data.find(b"tkhd") + 44  # after version, times, track id, duration, layer, volume
    one = 1 << 16
    data[matrix:matrix + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 56 * one, 0, 1 << 30)
    clip.write_bytes(data)
    assert load_vision(record_of(clip), **LIMITS).frames.shape == (8, 3, 112, 56)


@pytest.mark.parametrize("milliseconds, fps", [(500, 2.0), (None, 10.0)])
def test_a_gif_gives_its_frames_and_its_rate(tmp_path, milliseconds, fps):
    """Without durations ten frames a second, as browsers show it."""
    first, *others = [Image.new("RGB", (56, 56), (20 * t,) * 3) for t in range(8)]
    timing = {"duration": milliseconds} if milliseconds else {}
    first.save(tmp_path / "a.gif", save_all=True, append_images=others, **timing)
    vision = load_vision_isolated(record_of(tmp_path / "a.gif"), 60, **LIMITS | {"fps": fps})
    assert vision.metadata == {"fps": fps, "frames_indices": list(range(8)), "total_num_frames": 8}
    assert torch.allclose(greys(vision), 20.0 * torch.arange(8), atol=4)
    part = record_of(tmp_path / "a.gif") | {"video_start": 2 / fps, "video_end": 6 / fps}
    assert abs(greys(load_vision(part, **LIMITS | {"fps": fps}))[0] - 40) < 4


def broken_videos(folder):
    """Makes clips that cannot be decoded; yields their paths."""
    data = encode_clip(folder / "whole.mp4", side=(112, 112), count=80,
                       movflags="faststart").read_bytes()
    start = data.find(b"mdat") + 8
    for name, kept in (("header.mp4", start), ("half.mp4", (start + len(data)) // 2)):
        (folder / name).write_bytes(data[:kept])
        yield folder / name
    Image.new("RGB", (56, 56)).save(folder / "still.gif")
    yield folder / "still.gif"
    yield encode_clip(folder / "thin.mp4", side=(4, 2000))
    with av.open(str(folder / "sound.mp4"), "w") as output:
        stream = output.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        frame.rate = 16000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    yield folder / "sound.mp4"


def test_a_clip_that_cannot_be_decoded_is_a_media_error(tmp_path):
    for path in broken_videos(tmp_path):
        with pytest.raises(MediaError) as error:
            load_vision_isolated(record_of(path), 60, **LIMITS)
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value), path


# -------------------------------------------------------------------------------- images

@pytest.mark.parametrize("name, image, colour", [
    ("alpha.png", Image.new("RGBA", (60, 60), (255, 0, 0, 0)), (255, 255, 255)),
    ("cmyk.jpg", Image.new("CMYK", (60, 60), (0, 255, 255, 0)), (255, 0, 0)),
    ("grey.png", Image.new("L", (60, 60), 77), (77, 77, 77)),
    ("16bit.png", Image.fromarray(np.full((60, 60), 77 * 257, np.uint16)), (77, 77, 77)),
    ("pixel.png", Image.new("RGB", (1, 1), (9, 8, 7)), (9, 8, 7))])
def test_images_of_every_mode_are_read_as_they_look(tmp_path, name, image, colour):
    image.save(tmp_path / name)
    read = load_vision(record_of(tmp_path / name, "image"), **LIMITS).image
    assert read.mode == "RGB" and read.width % 28 == 0 == read.height % 28
    assert np.abs(np.subtract(read.getpixel((0, 0)), colour)).max() <= 2


def test_images_that_cannot_be_shown_are_media_errors(tmp_path):
    Image.fromarray(np.full((60, 60), 0.5, np.float32)).save(tmp_path / "float.tiff")
    Image.new("L", (20000, 20000)).save(tmp_path / "bomb.png")
    for name, reason in (("float.tiff", "floating-point"), ("bomb.png", "exceeds limit")):
        with pytest.raises(MediaError, match=reason):
            load_vision(record_of(tmp_path / name, "image"), **LIMITS)


# ----------------------------------------------------------- decoders that fall or stand still

@pytest.fixture
def decoder(tmp_path, monkeypatch):
    """Clips whose names say what their decoder does; a fresh decoding process around the test."""
    for name in ("decord", "qwen_vl_utils"):  # each new decoder would import them, slowly
        importlib.import_module(name)
    def misbehave(record, **limits):
        if "crash" in record["problem_id"]:
            os.kill(os.getpid(), signal.SIGSEGV)
        if "hang" in record["problem_id"]:
            time.sleep(1000)
        if "greedy" in record["problem_id"]:
            bytearray(2 * build_data.DECODE_MEMORY)
        return load_vision(record, **limits)
    monkeypatch.setattr(build_data, "load_vision", misbehave)
    monkeypatch.setattr(build_data, "DECODERS", {})
    return [record_of(encode_clip(tmp_path / f"{name}.mp4"))
            for name in ("good", "crash", "fine", "hang", "well", "greedy", "right")]


class Clips(torch.utils.data.Dataset):
    def __init__(self, records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        try:
            return load_vision_isolated(self.records[i], 4, **LIMITS).frames
        except MediaError as error:
            return str(error)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_decoder_that_crashes_or_hangs_costs_exactly_its_sample(decoder, workers):
    start = time.perf_counter()
    found = list(DataLoader(Clips(decoder), batch_size=None, num_workers=workers))
    assert time.perf_counter() - start < 60
    for record, result in zip(decoder, found):
        reason = {"crash.mp4": "its decoder died", "hang.mp4": "more than 4 seconds",
                  "greedy.mp4": "bytes"}.get(record["problem_id"])
        if reason:
            assert result.startswith(record["media_path"] + ": ") and reason in result
        else:
            assert torch.equal(result, load_vision(record, **LIMITS).frames)


def test_a_decoder_that_dies_while_it_answers_costs_its_sample(tmp_path, monkeypatch):
    """It announces 100 bytes, sends one and ends."""
    def decode_records(pipe):
        pipe.recv()
        os.write(pipe.fileno(), struct.pack("!i", 100) + b"x")
        os._exit(9)
    monkeypatch.setattr(build_data, "decode_records", decode_records)
    monkeypatch.setattr(build_data, "DECODERS", {})
    with pytest.raises(MediaError, match=r"a.mp4: its decoder died \(exit status 9\)"):
        load_vision_isolated(record_of(tmp_path / "a.mp4"), 60, **LIMITS)


def test_a_fault_that_nobody_expects_ends_the_decoder_and_is_shown(tmp_path, monkeypatch, capfd):
    def load_vision(record, **limits):
        raise KeyError("unexpected")
    monkeypatch.setattr(build_data, "load_vision", load_vision)
    monkeypatch.setattr(build_data, "DECODERS", {})
    with pytest.raises(MediaError, match=r"a.mp4: its decoder died \(exit status 1\)"):
        load_vision_isolated(record_of(tmp_path / "a.mp4"), 60, **LIMITS)
    assert "KeyError: 'unexpected'" in capfd.readouterr().err


def test_a_decoding_process_ends_with_the_process_that_started_it(tmp_path):
    clip = record_of(encode_clip(tmp_path / "a.mp4"))
    reader, writer = os.pipe()
    if os.fork() == 0:
        load_vision_isolated(clip, 60, **LIMITS)  # a forked process starts its own decoder
        (pid, _), = build_data.DECODERS.values()
        os.write(writer, str(pid).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.wait()
    pid, deadline = int(os.read(reader, 20)), time.time() + 20
    while os.path.exists(f"/proc/{pid}") and "zombie" not in open(f"/proc/{pid}/status").read():
        assert time.time() < deadline
        time.sleep(0.05)
