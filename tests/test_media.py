"""Media of every kind: decoded as they look, or one MediaError that names file and reason."""
import faulthandler
import os
import signal
import struct
import sys
import time
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image
from qwen_vl_utils import vision_process
from torch.utils.data import DataLoader

import build_data
from build_data import MediaError, load_vision, load_vision_isolated, write_video
from conftest import LIMITS

LIMITS = LIMITS | {"max_pixels": 128 * 784}


def encode_clip(path, codec="libx264", pixels="yuv420p", side=(56, 56), count=8, milliseconds=None,
                step=20, rate=2, gop=250, options=None, ticks=1000, sound=0, noise=0, aspect=None,
                **container):
    """A clip whose frame t is a grey of step * t, with `noise` that moves; `milliseconds`: when
    each frame is shown, in `ticks` a second; `sound`: seconds of silence, from 0 on."""
    texture = np.random.default_rng(0).integers(0, noise + 1, (*side, 1))
    with av.open(str(path), "w", options=container) as output:
        stream, packets = output.add_stream(codec, rate=rate, options=options or {}), []
        stream.height, stream.width, stream.pix_fmt = *side, pixels
        stream.codec_context.gop_size = gop
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if sound:
            track = output.add_stream("mp2", rate=16000)
            for start in range(0, round(sound * 16000), 1152):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.int16), "s16", "mono")
                silence.rate, silence.pts = 16000, start
                packets += track.encode(silence)
            packets += track.encode()
        if milliseconds:
            stream.codec_context.time_base = Fraction(1, ticks)
        for t in range(count):
            grey = (step * t + np.roll(texture, 3 * t, 1)) % 256 * np.ones(3)
            frame = av.VideoFrame.from_ndarray(grey.astype(np.uint8), format="rgb24")
            if milliseconds:
                frame.pts, frame.time_base = milliseconds[t] * ticks // 1000, Fraction(1, ticks)
            packets += stream.encode(frame)
        for packet in sorted(packets + stream.encode(), key=lambda p: p.dts * p.time_base):
            output.mux(packet)
    return path


def record_of(path, data_type="video"):
    return {"problem_id": path.name, "data_type": data_type, "media_path": str(path)}


def greys(vision):
    return vision.frames.float().mean((1, 2, 3))


def shown(path, part=None, **limits):
    """The numbers of the frames that are given of a clip, or a part of it, of step 5."""
    vision = load_vision(record_of(path) | (part or {}), **LIMITS | {"fps": 1000} | limits)
    return [round(grey / 5) for grey in greys(vision).tolist()]


def spread(first, last, count=8):
    return torch.linspace(first, last, count).round().int().tolist()


def copy_packets(source, target, skipped=0, start=0.0):
    """Another file of the same packets but for the first ones; a player shows it from second
    `start` of the source on, as in a file cut by `ffmpeg -ss start -c copy`."""
    with av.open(str(source)) as read, av.open(
            str(target), "w", options={"avoid_negative_ts": "disabled"}) as write:
        stream = read.streams.video[0]
        copy = write.add_stream_from_template(stream)
        shift = round(start / stream.time_base)
        for packet in list(read.demux(stream))[skipped:-1]:  # the last one only ends the stream
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            packet.stream = copy
            write.mux(packet)
    return target


# ------------------------------------------------------ videos: the frames that a player shows

FINE = {"qmax": "2"}
B_FRAMES = {"bf": "2"} | FINE
OPEN = {"x264-params": "open-gop=1:bframes=3:b-adapt=0:keyint=12"}
HIDDEN = {"auto-alt-ref": "1", "lag-in-frames": "16"}


@pytest.mark.parametrize("name, codec, rate, options", [
    ("a.avi", "libx264", 10, {}), ("open.avi", "libx264", 10, OPEN),
    ("a.avi", "mpeg4", 10, B_FRAMES), ("a.mkv", "mpeg4", 10, B_FRAMES),
    ("a.ts", "libx264", 10, {}), ("a.ts", "mpeg2video", 25, B_FRAMES),
    ("a.mpg", "mpeg2video", 25, B_FRAMES), ("a.mpg", "mpeg2video", 25, FINE),
    ("open.mp4", "libx264", 10, OPEN), ("open.ts", "libx264", 10, OPEN),
    ("open.mp4", "libx265", 10, {"x265-params": "open-gop=1:keyint=12:log-level=none"}),
    ("refresh.mkv", "libx264", 10, {"x264-params": "intra-refresh=1:keyint=12"}),
    ("a.mp4", "libsvtav1", 10, {"preset": "8"}), ("a.webm", "libvpx", 10, HIDDEN),
    ("a.webm", "libvpx-vp9", 10, HIDDEN), ("raw.h264", "libx264", 10, {})])
@pytest.mark.parametrize("gop", [10, 250])
def test_frames_come_as_a_player_shows_them(tmp_path, name, codec, rate, options, gop):
    clip = encode_clip(tmp_path / name, codec, side=(64, 64), count=40, step=5, rate=rate, gop=gop,
                       options=options)
    assert shown(clip) == spread(0, 39)
    assert shown(clip, max_frames=40) == list(range(40))


@pytest.mark.parametrize("gop", [5, 25, 250])
@pytest.mark.parametrize("name, codec, options", [
    ("a.mp4", "libx264", {}), ("a.mov", "libx264", {}), ("a.mp4", "libx264", OPEN),
    ("a.mp4", "mpeg4", B_FRAMES)])
def test_a_clip_cut_without_encoding_begins_where_a_player_begins(
        tmp_path, name, codec, options, gop):
    """It holds the frames since a key frame; an edit list says from where on they are shown."""
    whole = encode_clip(tmp_path / f"whole{name}", codec, count=40, step=5, rate=10, gop=gop,
                        options=options)
    for start, count in ((3, 4), (13, 8), (27, 12)):
        clip = copy_packets(whole, tmp_path / name, start=start / 10)
        assert shown(clip, max_frames=count) == spread(start, 39, count)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.avi"])
def test_a_clip_that_begins_between_key_frames_is_shown_from_the_next_one_on(tmp_path, name):
    whole = encode_clip(tmp_path / f"whole{name}", count=40, step=5, rate=10, gop=12)
    clip = copy_packets(whole, tmp_path / name, skipped=5)
    assert shown(clip) == spread(12, 39)


STEADY_THEN_SLOW = [*range(0, 2100, 100), *range(4100, 6000, 100)]  # milliseconds


@pytest.mark.parametrize("name, codec", [("a.mkv", "libx264"), ("a.mp4", "libx264"),
                                         ("a.webm", "libvpx-vp9"), ("a.ts", "libx264")])
def test_a_part_of_a_clip_of_variable_rate_is_found_by_time_and_sampled_by_number(
        tmp_path, name, codec):
    clip = encode_clip(tmp_path / name, codec, count=40, step=5, milliseconds=STEADY_THEN_SLOW)
    for part, first, last in (
            ({"video_start": 0.0, "video_end": 2.0}, 0, 20), ({"video_start": 5}, 30, 39),
            ({"video_start": 4.1, "video_end": 5.9}, 21, 39), ({"video_end": 1}, 0, 10),
            ({"video_start": 1.5, "video_end": 4.5}, 15, 25),
            ({"video_start": 3, "video_end": 90}, 21, 39)):
        assert shown(clip, part) == spread(first, last)
        seconds = (STEADY_THEN_SLOW[last] - STEADY_THEN_SLOW[first]) / 1000
        vision = load_vision(record_of(clip) | part, **LIMITS)
        assert vision.metadata["fps"] == pytest.approx((last - first) / seconds)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov", "a.ts"])
def test_seconds_count_from_the_sound_if_it_begins_before_the_pictures(tmp_path, name):
    times = range(2050, 6050, 100)
    clip = encode_clip(tmp_path / name, count=40, step=5, milliseconds=times, sound=6)
    for start, end, numbers in ((2, 4, (0, 19)), (4, 6, (20, 39)), (0, 3, (0, 9))):
        seen = shown(clip, {"video_start": start, "video_end": end})
        assert (seen[0], seen[-1]) == numbers
    with pytest.raises(MediaError, match="fewer than 2 frames from 0 to 2 s"):
        shown(clip, {"video_start": 0, "video_end": 2})


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_seconds_count_from_the_first_picture_if_nothing_is_before_it(tmp_path, name):
    clip = encode_clip(tmp_path / name, count=40, step=5, milliseconds=range(2000, 6000, 100))
    assert shown(clip, {"video_start": 0, "video_end": 2})[::7] == [0, 20]
    with pytest.raises(MediaError, match="fewer than 2 frames from 8.5 to 9.0 s"):
        shown(clip, {"video_start": 8.5, "video_end": 9.0})


@pytest.mark.parametrize("codec, options", [("libx264", {}), ("libx264", {"bf": "1"}),
                                            ("mpeg4", {"qmax": "2"}), ("mpeg4", B_FRAMES)])
@pytest.mark.parametrize("pauses", [(20,), (10, 20), (5, 30)])
def test_a_pause_of_an_avi_moves_what_comes_after_it(tmp_path, codec, options, pauses):
    """Empty chunks hold the last picture, here for two seconds, and AVI has no other times."""
    times = [100 * t + 2000 * sum(t >= pause for pause in pauses) for t in range(40)]
    clip = encode_clip(tmp_path / "a.avi", codec, count=40, step=5, milliseconds=times, rate=10,
                       ticks=10, options=options)
    for first, last in ((0, pauses[0] - 1), (pauses[-1], 39)):
        seen = shown(clip, {"video_start": times[first] / 1000,
                            "video_end": times[last] / 1000 + 0.15})
        assert (seen[0], seen[-1]) == (first, last)


@pytest.mark.parametrize("count, rate, side, max_pixels", [
    (8, 2, (56, 56), 784), (75, 25, (90, 160), 128 * 784), (200, 30, (240, 50), 60 * 784),
    (6, Fraction(30000, 1001), (300, 300), 20 * 784), (5, 2, (30, 400), 16 * 784),
    (6, 2, (20, 20), 16 * 784), (80, 2, (64, 96), 16 * 784)])
def test_frames_are_sampled_and_resized_as_by_qwen_vl_utils(
        tmp_path, monkeypatch, count, rate, side, max_pixels):
    """fetch_video with a reader that decodes everything and takes what its rules say."""
    clip = encode_clip(tmp_path / "a.mp4", side=side, count=count, rate=rate, step=3)

    def read(element):
        with av.open(element["video"]) as container:
            fps = float(container.streams.video[0].average_rate)
            pixels = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
        drawn = vision_process.smart_nframes(element, len(pixels), fps)
        indices = torch.linspace(0, len(pixels) - 1, drawn).round().long()
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)[indices], {"fps": fps}, None
    monkeypatch.setattr(vision_process, "get_video_reader_backend", lambda: "this")
    monkeypatch.setitem(vision_process.VIDEO_READER_BACKENDS, "this", read)
    limits = LIMITS | {"max_pixels": max_pixels}
    frames, metadata = vision_process.fetch_video(
        {"video": str(clip), **limits}, return_video_metadata=True)
    vision = load_vision(record_of(clip), **limits)
    assert torch.equal(vision.frames.float(), frames)
    assert vision.metadata["fps"] == metadata["fps"] == pytest.approx(float(rate))


def test_the_environment_changes_nothing_and_large_frames_are_kept_or_brought_within_the_limits(
        tmp_path, monkeypatch):
    """qwen-vl-utils caps a frame at 768 tokens, or by these two names, without a word."""
    clip = encode_clip(tmp_path / "a.mp4", side=(1400, 1400), count=4)
    monkeypatch.setattr(vision_process, "MODEL_SEQ_LEN", 100)
    monkeypatch.setattr(vision_process, "FORCE_QWENVL_VIDEO_READER", "torchcodec")
    for tokens, side in ((2000, 1232), (128, 308)):
        vision = load_vision(record_of(clip), **LIMITS | {"max_pixels": tokens * 784})
        assert vision.frames.shape == (4, 3, side, side)
        assert torch.allclose(greys(vision), 20.0 * torch.arange(4), atol=4)


# -------------------------------------------------------------------- videos of other kinds

@pytest.mark.parametrize("name, options, shape", [
    ("odd.mp4", {"pixels": "yuv444p", "side": (57, 45)}, (56, 56)),
    ("odd.mkv", {"codec": "ffv1", "pixels": "yuv444p", "side": (57, 45)}, (56, 56)),
    ("ein schöner 视频.mp4", {}, (56, 56)), ("a.mp4", {"aspect": Fraction(3, 2)}, (56, 84)),
    ("a.mkv", {"aspect": Fraction(2)}, (56, 112)), ("a.ts", {"aspect": Fraction(3, 2)}, (56, 84)),
    ("a.mov", {"aspect": Fraction(1, 2)}, (112, 56))])
def test_every_frame_comes_at_odd_sizes_and_stretched_if_pixels_are_not_square(
        tmp_path, name, options, shape):
    vision = load_vision(record_of(encode_clip(tmp_path / name, **options)), **LIMITS)
    assert vision.frames.shape == (8, 3, *shape)
    assert torch.allclose(greys(vision), 20.0 * torch.arange(8), atol=4)


# red and green above blue and white: every turn and mirroring changes it
CORNERS = Image.fromarray(np.array([[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 255)]],
                                   np.uint8)).resize((112, 56), Image.Resampling.NEAREST)


def alike(image, other):
    """Returns whether two pictures have the same size and, but for their coding, pixels."""
    return image.size == other.size and np.abs(np.subtract(image, other, dtype=int)).mean() < 9


@pytest.mark.parametrize("matrix, transposition", [
    ((1, 0, 0, 1), None), ((-1, 0, 0, -1), "ROTATE_180"), ((0, 1, -1, 0), "ROTATE_270"),
    ((0, -1, 1, 0), "ROTATE_90"), ((-1, 0, 0, 1), "FLIP_LEFT_RIGHT"),
    ((1, 0, 0, -1), "FLIP_TOP_BOTTOM"), ((0, 1, 1, 0), "TRANSPOSE"),
    ((0, -1, -1, 0), "TRANSVERSE")])
def test_a_turned_or_mirrored_clip_stands_upright(tmp_path, matrix, transposition):
    """The position of a phone is a matrix in its clip's header: x' = a x + c y, y' = b x + d y.
    Pillow names the eight; its turns are counter-clockwise."""
    picture, clip = CORNERS, tmp_path / "a.mp4"
    write_video(clip, np.stack([picture] * 8), fps=2)
    data = bytearray(clip.read_bytes())
    at = data.find(b"tkhd") + 44  # after version, times, track id, duration, layer, volume
    a, b, c, d = (entry << 16 for entry in matrix)
    data[at:at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    clip.write_bytes(data)
    if transposition:
        picture = picture.transpose(Image.Transpose[transposition])
    frames = load_vision(record_of(clip), **LIMITS).frames  # (T, C, H, W)
    assert alike(Image.fromarray(frames[3].permute(1, 2, 0).numpy()), picture)


@pytest.mark.parametrize("name, options, fps", [
    # as in browsers: without a delay, or with one of 10 ms or less, 10 frames a second
    ("a.gif", {}, 10), ("a.gif", {"duration": 10}, 10), ("a.gif", {"duration": 20}, 50),
    ("a.webp", {"lossless": True, "duration": 10}, 10), ("a.png", {"duration": 250}, 4),
    ("a.apng", {"format": "PNG", "duration": 10}, 10),
    ("poster.png", {"default_image": True, "duration": 250}, 4)])
def test_a_moving_picture_is_a_video_with_its_rate_and_parts(tmp_path, name, options, fps):
    """A PNG may begin with a picture for viewers that cannot show it moving."""
    frames = [Image.new("RGB", (56, 56), (20 * t,) * 3) for t in range(8)]
    if "default_image" in options:
        frames.insert(0, Image.new("RGB", (56, 56), "red"))
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    vision = load_vision(record_of(tmp_path / name), **LIMITS | {"fps": fps})
    assert vision.metadata == {"fps": pytest.approx(fps), "frames_indices": list(range(8)),
                               "total_num_frames": 8}
    assert torch.allclose(greys(vision), 20.0 * torch.arange(8), atol=4)
    part = record_of(tmp_path / name) | {"video_start": 2 / fps, "video_end": 6 / fps}
    assert abs(greys(load_vision(part, **LIMITS | {"fps": fps}))[0] - 40) < 4


def test_a_moving_picture_s_transparent_ground_is_white(tmp_path):
    frames = [Image.new("RGBA", (56, 56), (0, 0, 0, 0)) for _ in range(4)]
    for t, frame in enumerate(frames):
        frame.paste("black", (0, 14 * t, 56, 14 * t + 14))
    for name in ("a.gif", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], disposal=2)
        pixels = load_vision(record_of(tmp_path / name), **LIMITS).frames  # (T, C, H, W)
        for t in range(4):
            rows = pixels[t, :, 7::14].float().mean((0, 2))
            assert rows.tolist() == [0 if row == t else 255 for row in range(4)], name


@pytest.mark.parametrize("names", [
    [f"{t + 1}.jpg" for t in range(12)], [f"frame_{t + 9995}.png" for t in range(12)],
    [f"img ({t}).PNG" for t in range(12)], [f"{t / 2:.2f}.png" for t in range(12)],
    [f"v2_scene{t // 4 + 9}_{t % 4 + 8}.jpeg" for t in range(12)]])
def test_a_folder_s_frames_come_in_the_order_of_their_numbers_whatever_their_sizes(
        tmp_path, names):
    for t, name in enumerate(names):
        Image.new("RGB", (56, 56) if t % 3 else (80, 40), (5 * t,) * 3).save(tmp_path / name)
        (tmp_path / f"._{name}").write_bytes(b"resource fork")  # a Mac writes these
    assert shown(tmp_path, {"video_fps": 2}, max_frames=12) == list(range(12))


@pytest.mark.parametrize("name, codec", [
    ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("a.webm", "libvpx"), ("a.ts", "libx264"),
    ("a.ts", "mpeg2video"), ("a.avi", "libx264"), ("a.avi", "mpeg4"), ("a.mp4", "libx264"),
    ("a.mov", "libx264"), ("front.mp4", "libx264"), ("a.flv", "libx264"), ("a.mpg", "mpeg2video"),
    ("live.webm", "libvpx")])
def test_a_cut_file_is_refused_and_junk_after_a_whole_one_is_not(tmp_path, name, codec):
    front = {"movflags": "faststart"} if name == "front.mp4" else {}
    clip = encode_clip(tmp_path / name, codec, side=(96, 128), count=40, step=4, noise=60, rate=25,
                       sound=1.6 if name == "a.mkv" else 0,
                       **front | ({"live": "1"} if name == "live.webm" else {}))
    data, whole = clip.read_bytes(), load_vision(record_of(clip), **LIMITS).frames
    for junk in (b"<html>" * 500, bytes(1000)):
        clip.write_bytes(data + junk)
        assert torch.equal(load_vision(record_of(clip), **LIMITS).frames, whole)
    for share in (0.3, 0.5, 0.6) if name not in ("live.webm", "a.mpg") else ():  # they know no end
        clip.write_bytes(data[:int(share * len(data)) // 188 * 188 + 94])
        with pytest.raises(MediaError, match="cut off|not a readable video|fewer than 2"):
            load_vision(record_of(clip), **LIMITS)


@pytest.mark.parametrize("name, codec", [
    ("a.mp4", "mpeg4"), ("a.avi", "mpeg4"), ("a.ts", "libx264"), ("a.mp4", "libx264"),
    ("a.mkv", "libx264"), ("a.mpg", "mpeg2video"), ("a.flv", "libx264"), ("a.mp4", "libx265")])
def test_a_damaged_frame_is_an_error_and_not_a_smear(tmp_path, name, codec):
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    clip = encode_clip(tmp_path / name, codec, side=(96, 128), count=40, step=4, noise=60, rate=25,
                       options=options)
    data = bytearray(clip.read_bytes())
    for share in (0.4, 0.5):
        start = int(share * len(data))
        clip.write_bytes(data[:start] + bytes(2000) + data[start + 2000:])
        with pytest.raises(MediaError, match="damaged|cut off|not a readable video"):
            load_vision(record_of(clip), **LIMITS)


def test_a_file_or_a_folder_s_frame_may_be_a_link_to_another_folder(tmp_path):
    """As in a Hugging Face cache, whose files are links to its folder of blobs."""
    blob, root = tmp_path / "blob", tmp_path / "root"
    (root / "clip").mkdir(parents=True)
    Image.new("RGB", (56, 56)).save(blob, "PNG")
    for t in range(8):
        (root / "clip" / f"{t}.png").symlink_to(blob)
    record = record_of(root / "clip") | {"video_fps": 2}
    assert len(load_vision(record, **LIMITS).frames) == 8
    assert load_vision(record_of(root / "clip/0.png", "image"), **LIMITS).image.size == (56, 56)


@pytest.mark.parametrize("name, text", [
    ("a.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:4,\nsegment.ts\n#EXT-X-ENDLIST\n"),
    ("a.mp4", "ffconcat version 1.0\nfile segment.ts\n")])
@pytest.mark.parametrize("reader", ["av", "decord"])
def test_a_file_that_names_others_is_refused(tmp_path, name, text, reader):
    encode_clip(tmp_path / "segment.ts")
    (tmp_path / name).write_text(text)
    with pytest.raises(MediaError, match="not a readable video|decord"):
        load_vision(record_of(tmp_path / name), **LIMITS, video_reader=reader)


# ------------------------------------------------------------------- --video_reader decord

@pytest.mark.parametrize("rate", [25, Fraction(30000, 1001)])
@pytest.mark.parametrize("options", [{}, {"bf": "0"}])
@pytest.mark.parametrize("part", [{}, {"video_start": 0.4, "video_end": 1.2}])
def test_decord_reads_an_ordinary_mp4_as_av_does(tmp_path, rate, options, part):
    pytest.importorskip("decord")
    clip = record_of(encode_clip(tmp_path / "a.mp4", side=(90, 160), count=48, step=5, noise=10,
                                 rate=rate, gop=12, options=options)) | part
    ours, theirs = (load_vision(clip, **LIMITS | {"fps": 8}, video_reader=name)
                    for name in ("av", "decord"))
    assert ours.metadata == theirs.metadata
    assert ours.frames.shape == theirs.frames.shape and theirs.frames.dtype == torch.uint8
    assert (ours.frames.float() - theirs.frames.float()).abs().mean() < 2


def test_decord_works_in_a_decoder_that_is_forked_after_decord_was_used(tmp_path):
    pytest.importorskip("decord")
    clip, limits = record_of(encode_clip(tmp_path / "a.mp4")), LIMITS | {"video_reader": "decord"}
    expected = load_vision(clip, **limits).frames
    assert torch.equal(load_vision_isolated(clip, 30, **limits).frames, expected)


def test_what_decord_cannot_read_is_a_media_error(tmp_path):
    pytest.importorskip("decord")
    clip = encode_clip(tmp_path / "a.mp4", "libsvtav1", side=(64, 64), options={"preset": "10"})
    with pytest.raises(MediaError, match="not readable by decord"):
        load_vision(record_of(clip), **LIMITS, video_reader="decord")


def test_a_missing_decord_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(build_data, "find_spec", lambda name: None)
    assert build_data.parse_args(["check", "--data", "a.json"]).video_reader == "av"
    with pytest.raises(SystemExit):
        build_data.parse_args(["check", "--data", "a.json", "--video_reader", "decord"])
    assert "--video_reader: decord is not installed: pip install" in capsys.readouterr().err


# -------------------------------------------------------- files that are no readable video

def test_a_file_that_cannot_be_read_is_a_media_error_that_names_it_and_the_reason(tmp_path):
    data = encode_clip(tmp_path / "thin.mp4", side=(4, 2000), movflags="faststart").read_bytes()
    encode_clip(tmp_path / "one.mp4", count=1)
    Image.new("RGB", (900, 3)).save(tmp_path / "thin.png")
    for name in ("still.gif", "still.webp", "still.jpg"):
        Image.new("RGB", (56, 56)).save(tmp_path / name)
    for name, content in (("header.mp4", data[:data.find(b"mdat") + 8]), ("text.png", b"no image"),
                          ("cut.mp4", data[:len(data) // 2]), ("text.mp4", b"no video"),
                          ("empty.mp4", b""), ("empty.png", b"")):
        (tmp_path / name).write_bytes(content)
    with av.open(str(tmp_path / "sound.mp4"), "w") as output:
        stream = output.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        frame.rate = 16000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    for path in (*tmp_path.iterdir(), tmp_path / "absent.mp4", tmp_path / "absent.png"):
        with pytest.raises(MediaError) as error:
            load_vision(record_of(path, "image" if path.suffix == ".png" else "video"), **LIMITS)
        message = str(error.value)
        assert message.startswith(f"{path}: ") and "\n" not in message, path
        assert len(message) > len(str(path)) + 5, path


# -------------------------------------------------------------------------------- images

def image_of(path, **limits):
    return load_vision(record_of(path, "image"), **LIMITS | limits).image


def transparent(mode):
    """Returns a black square on a transparent ground with the hidden colour (9, 8, 7)."""
    image = Image.new("RGBA", (60, 60), (9, 8, 7, 0))
    image.paste("black", (20, 20, 40, 40))
    if mode != "P":
        return image.convert(mode)
    image = image.getchannel("A").point(lambda opacity: opacity == 0)
    image.putpalette([0, 0, 0, 9, 8, 7])
    return image


@pytest.mark.parametrize("name, mode, options", [
    ("a.png", "RGBA", {}), ("a.png", "LA", {}), ("a.tiff", "LA", {}), ("a.webp", "RGBA", {}),
    # the hidden colour, its number in the palette, or an opacity for each colour of the palette
    ("a.png", "RGB", {"transparency": (9, 8, 7)}), ("a.png", "L", {"transparency": 8}),
    ("a.png", "P", {"transparency": 1}), ("a.gif", "P", {"transparency": 1}),
    ("a.png", "P", {"transparency": bytes([255, 0])})])
def test_transparency_of_every_mode_is_white(tmp_path, name, mode, options):
    transparent(mode).save(tmp_path / name, **options)
    read = image_of(tmp_path / name)
    assert read.getpixel((3, 3)) == (255, 255, 255)
    assert read.getpixel((read.width // 2, read.height // 2)) == (0, 0, 0)


@pytest.mark.parametrize("orientation, stored", [
    (1, None), (2, "FLIP_LEFT_RIGHT"), (3, "ROTATE_180"), (4, "FLIP_TOP_BOTTOM"),
    (5, "TRANSPOSE"), (6, "ROTATE_90"), (7, "TRANSVERSE"), (8, "ROTATE_270")])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_an_image_stands_upright_by_its_exif_orientation(tmp_path, name, orientation, stored):
    image = CORNERS.transpose(Image.Transpose[stored]) if stored else CORNERS
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / name, exif=exif)
    assert alike(image_of(tmp_path / name), CORNERS)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_an_image_with_damaged_exif_is_read_as_it_is(tmp_path):
    for exif in (b"Exif\0\0junk", b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12", b"Exif\0\0MM\0*\xff"):
        CORNERS.save(tmp_path / "a.jpg", exif=exif)
        assert alike(image_of(tmp_path / "a.jpg"), CORNERS)


@pytest.mark.parametrize("height, width, tokens", [
    (40, 60, 1), (60, 40, 1), (31, 639, 20), (10, 1000, 4), (1000, 10, 4), (1, 150, 4),
    (45, 30, 4), (3000, 16, 30)])
@pytest.mark.parametrize("factor", [28, 32])
def test_a_narrow_picture_has_no_side_of_zero_and_stays_within_the_limit(
        tmp_path, height, width, tokens, factor):
    Image.new("RGB", (width, height), (77, 77, 77)).save(tmp_path / "a.png")
    read = image_of(tmp_path / "a.png", min_pixels=min(tokens, 4) * factor**2,
                    max_pixels=tokens * factor**2, factor=factor)
    assert read.width % factor == 0 == read.height % factor
    assert 0 < read.width * read.height <= tokens * factor**2
    assert (read.width >= read.height) == (width > height) or read.width == read.height


@pytest.mark.parametrize("name, image, colour", [
    ("cmyk.jpg", Image.new("CMYK", (60, 60), (0, 255, 255, 0)), (255, 0, 0)),
    ("grey.png", Image.new("L", (60, 60), 77), (77, 77, 77)),
    ("16bit.png", Image.fromarray(np.full((60, 60), 77 * 257, np.uint16)), (77, 77, 77)),
    ("8of32.tiff", Image.fromarray(np.full((60, 60), 200, np.int32)), (200, 200, 200)),
    ("16of32.tiff", Image.fromarray(np.full((60, 60), 200 * 257, np.int32)), (200, 200, 200)),
    ("pixel.png", Image.new("RGB", (1, 1), (9, 8, 7)), (9, 8, 7))])
def test_images_of_every_mode_are_read_as_they_look(tmp_path, name, image, colour):
    image.save(tmp_path / name)
    read = image_of(tmp_path / name)
    assert read.mode == "RGB" and read.width % 28 == 0 == read.height % 28
    assert np.abs(np.subtract(read.getpixel((0, 0)), colour)).max() <= 2


@pytest.mark.parametrize("most, pixels, reason", [
    (10**6, 0.5, "floating-point"), (1000, 1, "exceeds limit")])
def test_images_that_cannot_be_shown_are_media_errors(tmp_path, monkeypatch, most, pixels, reason):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
    Image.fromarray(np.full((60, 60), pixels, np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(MediaError, match=reason):
        image_of(tmp_path / "a.tiff")


# ----------------------------------------------------------- decoders that fall or stand still

@pytest.fixture(autouse=True)
def fresh_decoders(monkeypatch):
    """A decoding process is a fork: it has what a test put in load_vision's place."""
    monkeypatch.setattr(build_data, "DECODERS", {})


def frames_or_reason(record):
    try:
        return load_vision_isolated(record, 3, **LIMITS).frames
    except MediaError as error:
        return str(error)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_decoder_that_crashes_or_hangs_loses_exactly_its_sample(tmp_path, monkeypatch, workers):
    def misbehave(record, **limits):
        if "crash" in record["problem_id"]:
            faulthandler.disable()  # pytest's, which would print a trace among the tests' dots
            os.kill(os.getpid(), signal.SIGSEGV)
        if "hang" in record["problem_id"]:
            time.sleep(1000)
        if "greedy" in record["problem_id"]:
            bytearray(2 * build_data.DECODE_MEMORY)
        return load_vision(record, **limits)
    monkeypatch.setattr(build_data, "load_vision", misbehave)
    clips = [record_of(encode_clip(tmp_path / f"{name}.mp4"))
             for name in ("good", "crash", "fine", "hang", "well", "greedy", "right")]
    found = DataLoader(clips, batch_size=None, num_workers=workers, collate_fn=frames_or_reason)
    for record, result in zip(clips, found, strict=True):
        reason = {"crash.mp4": "its decoder died", "hang.mp4": "more than 3 seconds",
                  "greedy.mp4": "bytes"}.get(record["problem_id"])
        if reason:
            assert result.startswith(record["media_path"] + ": ") and reason in result
        else:
            assert torch.equal(result, load_vision(record, **LIMITS).frames)


def test_a_decoder_killed_between_records_loses_none(tmp_path):
    clip = record_of(encode_clip(tmp_path / "a.mp4"))
    for wait in (0, 0.2, 0):
        assert len(load_vision_isolated(clip, 60, **LIMITS).frames) == 8
        (decoder, _), = build_data.DECODERS.values()
        os.kill(decoder, signal.SIGKILL)
        time.sleep(wait)
    assert len(load_vision_isolated(clip, 60, **LIMITS).frames) == 8


def die_at_record(record, **limits):
    print("tried", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def meet_a_fault(record, **limits):
    print("tried", file=sys.stderr, flush=True)
    raise KeyError("unexpected")


@pytest.mark.parametrize("fault, status, printed", [
    (die_at_record, -9, ""), (meet_a_fault, 1, "KeyError: 'unexpected'")])
def test_a_record_at_which_two_decoders_die_is_given_up(
        tmp_path, monkeypatch, capfd, fault, status, printed):
    monkeypatch.setattr(build_data, "load_vision", fault)
    with pytest.raises(MediaError, match=rf"a.mp4: its decoder died \(exit status {status}\)"):
        load_vision_isolated(record_of(tmp_path / "a.mp4"), 60, **LIMITS)
    shown = capfd.readouterr().err
    assert shown.count("tried\n") == 2 and printed in shown


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
