"""Media of every kind: decoded as they look, or one MediaError that names file and reason."""
import faulthandler
import os
import resource
import signal
import struct
import sys
import time
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
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
    ("a.avi", "mpeg4", 10, B_FRAMES), ("a.mp4", "mpeg4", 10, B_FRAMES),
    ("a.mkv", "mpeg4", 10, B_FRAMES), ("a.mp4", "mpeg2video", 25, B_FRAMES),
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


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_a_live_recording_without_a_duration_is_read(tmp_path, codec):
    clip = encode_clip(tmp_path / "a.webm", codec, count=40, step=5, live="1")
    with av.open(str(clip)) as container:
        assert container.duration is None
    assert shown(clip) == spread(0, 39)


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
def test_a_part_of_a_clip_of_variable_rate_is_found_by_its_times(tmp_path, name, codec):
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

@pytest.mark.parametrize("name, codec, pixels, side", [
    ("a.webm", "libvpx-vp9", "yuv420p", (56, 56)), ("a.avi", "mpeg4", "yuv420p", (56, 56)),
    ("a.mkv", "libx264", "yuv420p", (56, 56)), ("a.mov", "libx264", "yuv420p", (56, 56)),
    ("odd.mp4", "libx264", "yuv444p", (57, 45)), ("odd.mkv", "ffv1", "yuv444p", (57, 45)),
    ("ein schöner 视频.mp4", "libx264", "yuv420p", (56, 56))])
def test_containers_codecs_and_odd_sizes_give_every_frame(tmp_path, name, codec, pixels, side):
    vision = load_vision(record_of(encode_clip(tmp_path / name, codec, pixels, side)), **LIMITS)
    assert vision.frames.shape == (8, 3, 56, 56)
    assert torch.allclose(greys(vision), 20.0 * torch.arange(8), atol=4)


@pytest.mark.parametrize("milliseconds", [
    [0, 100, 200, 300, 1000, 2000, 3000, 3500],
    [*range(0, 7000, 1000), 36_000_000]])  # ten hours
def test_frames_of_a_clip_of_variable_frame_rate_are_taken_evenly_by_number(
        tmp_path, milliseconds):
    """As in the released code, not by time."""
    clip = encode_clip(tmp_path / "a.mp4", milliseconds=milliseconds, step=5)
    for count in (4, 8):
        assert shown(clip, max_frames=count) == spread(0, 7, count)


CORNERS = ("red", "lime", "blue", "white")  # top left, top right, bottom left, bottom right


def cornered(width, height):
    """A picture of four colours."""
    image = Image.new("RGB", (width, height))
    for i, colour in enumerate(CORNERS):
        image.paste(colour, (i % 2 * width // 2, i // 2 * height // 2,
                             (i % 2 + 1) * width // 2, (i // 2 + 1) * height // 2))
    return image


def corners(image):
    """The names of an image's colours in its corners, as in CORNERS."""
    pixels = [image.getpixel((int(x * image.width), int(y * image.height)))
              for y in (0.25, 0.75) for x in (0.25, 0.75)]
    return tuple(min(CORNERS, key=lambda name: np.abs(np.subtract(
        ImageColor.getrgb(name), pixel)).sum()) for pixel in pixels)


@pytest.mark.parametrize("matrix, transposition", [
    ((1, 0, 0, 1), None), ((-1, 0, 0, -1), "ROTATE_180"), ((0, 1, -1, 0), "ROTATE_270"),
    ((0, -1, 1, 0), "ROTATE_90"), ((-1, 0, 0, 1), "FLIP_LEFT_RIGHT"),
    ((1, 0, 0, -1), "FLIP_TOP_BOTTOM"), ((0, 1, 1, 0), "TRANSPOSE"),
    ((0, -1, -1, 0), "TRANSVERSE")])
def test_a_turned_or_mirrored_clip_stands_upright(tmp_path, matrix, transposition):
    """The position of a phone is a matrix in its clip's header: x' = a x + c y, y' = b x + d y.
    Pillow names the eight; its turns are counter-clockwise."""
    picture, clip = cornered(112, 56), tmp_path / "a.mp4"
    write_video(clip, np.stack([picture] * 8), fps=2)
    data = bytearray(clip.read_bytes())
    at = data.find(b"tkhd") + 44  # after version, times, track id, duration, layer, volume
    a, b, c, d = (entry << 16 for entry in matrix)
    data[at:at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    clip.write_bytes(data)
    if transposition:
        picture = picture.transpose(Image.Transpose[transposition])
    frames = load_vision(record_of(clip), **LIMITS).frames  # (T, C, H, W)
    assert frames.shape[2:] == (picture.height, picture.width)
    assert corners(Image.fromarray(frames[3].permute(1, 2, 0).numpy())) == corners(picture)


@pytest.mark.parametrize("name, aspect, shape", [
    ("a.mp4", Fraction(3, 2), (56, 84)), ("a.mkv", Fraction(2), (56, 112)),
    ("a.ts", Fraction(3, 2), (56, 84)), ("a.mov", Fraction(1, 2), (112, 56)),
    ("a.mp4", Fraction(2, 3), (84, 56)), ("a.mp4", Fraction(1), (56, 56))])
def test_pixels_that_are_not_square_are_stretched(tmp_path, name, aspect, shape):
    clip = encode_clip(tmp_path / name, aspect=aspect)
    frames = load_vision(record_of(clip), **LIMITS).frames
    assert frames.shape == (8, 3, *shape)
    assert torch.allclose(frames.float().mean((1, 2, 3)), 20.0 * torch.arange(8), atol=4)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.apng"])
@pytest.mark.parametrize("milliseconds, fps", [(10, 10), (20, 50), (100, 10), (1000, 1)])
def test_an_animation_s_delay_of_10_ms_or_less_is_100_ms(tmp_path, name, milliseconds, fps):
    first, *others = [Image.new("RGB", (56, 56), (20 * t,) * 3) for t in range(8)]
    first.save(tmp_path / name, save_all=True, append_images=others, duration=milliseconds,
               **({"format": "PNG"} if name == "a.apng" else {"lossless": True}))
    assert load_vision(record_of(tmp_path / name), **LIMITS).metadata["fps"] == pytest.approx(fps)


@pytest.mark.parametrize("name, options, fps", [
    ("a.gif", {}, 10), ("a.gif", {"duration": 500}, 2),  # 10 is what browsers take without one
    ("a.webp", {"lossless": True, "duration": 250}, 4), ("a.png", {"duration": 250}, 4),
    ("a.apng", {"format": "PNG", "duration": 250}, 4),
    ("poster.png", {"default_image": True, "duration": 250}, 4)])
def test_a_moving_picture_is_a_video_with_its_rate_and_parts(tmp_path, name, options, fps):
    """A PNG may begin with a picture for viewers that cannot show it moving."""
    frames = [Image.new("RGB", (56, 56), (20 * t,) * 3) for t in range(8)]
    if "default_image" in options:
        frames.insert(0, Image.new("RGB", (56, 56), "red"))
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    vision = load_vision_isolated(record_of(tmp_path / name), 60, **LIMITS | {"fps": fps})
    assert vision.metadata == {"fps": fps, "frames_indices": list(range(8)), "total_num_frames": 8}
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
    [f"clip-{t + 1}-of-12.jpg" for t in range(12)], [f"img ({t}).PNG" for t in range(12)],
    [f"v2_scene{t // 4 + 9}_{t % 4 + 8}.jpeg" for t in range(12)],
    [f"{t / 2:.2f}.png" for t in range(12)], [f"{t:05d}.jpg" for t in range(12)]])
def test_a_folder_s_frames_come_in_the_order_of_their_numbers(tmp_path, names):
    for t, name in enumerate(names):
        Image.new("RGB", (56, 56), (5 * t,) * 3).save(tmp_path / name)
    assert shown_of_folder(tmp_path) == list(range(12))


def shown_of_folder(folder):
    return shown(folder, {"video_fps": 2}, max_frames=12)


def test_a_folder_may_hold_a_mac_s_files_and_frames_of_other_sizes(tmp_path):
    for t in range(8):
        Image.new("RGB", (56, 56) if t % 3 else (80, 40), (5 * t,) * 3).save(
            tmp_path / f"{t}.png")
        (tmp_path / f"._{t}.png").write_bytes(b"resource fork")
    assert shown_of_folder(tmp_path) == list(range(8))


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


def test_a_transport_stream_cut_between_its_packets_is_refused_if_a_frame_is_not_whole(tmp_path):
    clip = encode_clip(tmp_path / "a.ts", side=(240, 320), count=20, step=4, noise=60, gop=5)
    data = clip.read_bytes()
    with av.open(str(clip)) as container:
        starts = [packet.pos for packet in container.demux(video=0) if packet.is_keyframe]
    for start in starts[1:4]:
        clip.write_bytes(data[:start // 188 * 188 + 10 * 188])
        with pytest.raises(MediaError, match="damaged or missing"):
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
    ("a.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:4,\n{0}\n#EXT-X-ENDLIST\n"),
    ("a.mp4", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:4,\n{0}\n#EXT-X-ENDLIST\n"),
    ("b.mp4", "ffconcat version 1.0\nfile {0}\n"),
    ("a.mpd", "<MPD><Period><AdaptationSet><BaseURL>{0}</BaseURL></AdaptationSet></Period></MPD>"),
    ("a.sdp", "v=0\nm=video 5000 RTP/AVP 96\na=rtpmap:96 H264/90000\n")])
@pytest.mark.parametrize("reader", ["av", "decord"])
def test_a_file_that_names_others_is_refused(tmp_path, name, text, reader):
    encode_clip(tmp_path / "segment.ts")
    (tmp_path / name).write_text(text.format("segment.ts"))
    with pytest.raises(MediaError, match="not a readable video|decord"):
        load_vision(record_of(tmp_path / name), **LIMITS, video_reader=reader)


# ------------------------------------------------------------------- --video_reader decord

def read_by_both(path):
    pytest.importorskip("decord")
    return [load_vision(record_of(path), **LIMITS, video_reader=name) for name in ("av", "decord")]


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


def test_decord_shows_h264_in_avi_out_of_order_and_av_does_not(tmp_path):
    ours, theirs = read_by_both(encode_clip(tmp_path / "a.avi", count=48, step=5, gop=12))
    assert (greys(ours).diff() > 0).all() and not (greys(theirs).diff() > 0).all()


def test_decord_works_in_a_decoder_that_is_forked_after_decord_was_used(tmp_path):
    clip = encode_clip(tmp_path / "a.mp4")
    expected = read_by_both(clip)[1].frames
    vision = load_vision_isolated(record_of(clip), 30, **LIMITS, video_reader="decord")
    assert torch.equal(vision.frames, expected)


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

def broken_files(folder):
    """Makes files that cannot be read, but for whole.mp4. Returns {path: kind}, and two without a
    file."""
    data = encode_clip(folder / "whole.mp4", movflags="faststart").read_bytes()
    encode_clip(folder / "thin.mp4", side=(4, 2000))
    encode_clip(folder / "one.mp4", count=1)
    Image.new("RGB", (900, 3)).save(folder / "thin.png")
    for name in ("still.gif", "still.webp", "still.jpg"):
        Image.new("RGB", (56, 56)).save(folder / name)
    for name, content in (("header.mp4", data[:data.find(b"mdat") + 8]), ("text.png", b"no image"),
                          ("cut.mp4", data[:len(data) // 2]), ("text.mp4", b"no video"),
                          ("empty.mp4", b""), ("empty.png", b"")):
        (folder / name).write_bytes(content)
    with av.open(str(folder / "sound.mp4"), "w") as output:
        stream = output.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        frame.rate = 16000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    paths = [*folder.iterdir(), folder / "absent.mp4", folder / "absent.png"]
    return {path: "image" if path.suffix == ".png" else "video" for path in paths
            if path.name != "whole.mp4"}


def test_a_file_that_cannot_be_read_is_a_media_error_that_names_it_and_the_reason(tmp_path):
    for path, kind in broken_files(tmp_path).items():
        with pytest.raises(MediaError) as error:
            load_vision_isolated(record_of(path, kind), 60, **LIMITS)
        message = str(error.value)
        assert message.startswith(f"{path}: ") and "\n" not in message, path
        assert "read_video" not in message and len(message) > len(str(path)) + 5, path


# -------------------------------------------------------------------------------- images

INK = Image.new("L", (60, 60))
INK.paste(255, (20, 20, 40, 40))  # what is not transparent: a square in the middle


def transparent(mode):
    """A black square on a transparent ground whose hidden colour is not white; and how to save
    its transparency."""
    if mode.endswith("A"):
        image = Image.new(mode[:-1], (60, 60))
        image.putalpha(INK)
        return image, {}
    hidden, palette = {"P": (1, [0, 0, 0, 9, 9, 9]), "RGB": ((9, 8, 7), None)}.get(mode, (9, None))
    image = Image.new(mode, (60, 60), hidden)
    image.paste(0, (20, 20, 40, 40))
    if palette:
        image.putpalette(palette)
    return image, {"transparency": hidden}


@pytest.mark.parametrize("name, mode", [
    ("a.png", "RGBA"), ("a.png", "LA"), ("a.tiff", "LA"), ("a.png", "L"), ("a.png", "RGB"),
    ("a.png", "P"), ("a.gif", "P"), ("a.webp", "RGBA"), ("bytes.png", "P")])
def test_transparency_of_every_mode_is_white(tmp_path, name, mode):
    image, options = transparent(mode)
    if name == "bytes.png":  # an opacity for each colour of the palette
        options = {"transparency": bytes([255, 0])}
    image.save(tmp_path / name, **options)
    read = load_vision(record_of(tmp_path / name, "image"), **LIMITS).image
    assert read.getpixel((3, 3)) == (255, 255, 255)
    assert read.getpixel((read.width // 2, read.height // 2)) == (0, 0, 0)


@pytest.mark.parametrize("orientation, stored", [
    (1, None), (2, "FLIP_LEFT_RIGHT"), (3, "ROTATE_180"), (4, "FLIP_TOP_BOTTOM"),
    (5, "TRANSPOSE"), (6, "ROTATE_90"), (7, "TRANSVERSE"), (8, "ROTATE_270")])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_an_image_stands_upright_by_its_exif_orientation(tmp_path, name, orientation, stored):
    image, exif = cornered(112, 56), Image.Exif()
    exif[0x0112] = orientation
    (image.transpose(Image.Transpose[stored]) if stored else image).save(
        tmp_path / name, exif=exif)
    read = load_vision(record_of(tmp_path / name, "image"), **LIMITS).image
    assert read.size == (112, 56) and corners(read) == CORNERS


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_an_image_with_damaged_exif_is_read_as_it_is(tmp_path):
    for exif in (b"Exif\0\0junk", b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12", b"Exif\0\0MM\0*\xff"):
        cornered(112, 56).save(tmp_path / "a.jpg", exif=exif)
        assert corners(load_vision(record_of(tmp_path / "a.jpg", "image"), **LIMITS).image) \
            == CORNERS


@pytest.mark.parametrize("height, width, tokens", [
    (40, 60, 1), (60, 40, 1), (31, 639, 20), (10, 1000, 4), (1000, 10, 4), (1, 150, 4),
    (45, 30, 4), (3000, 16, 30)])
@pytest.mark.parametrize("factor", [28, 32])
def test_a_narrow_picture_has_no_side_of_zero_and_stays_within_the_limit(
        tmp_path, height, width, tokens, factor):
    Image.new("RGB", (width, height), (77, 77, 77)).save(tmp_path / "a.png")
    limits = LIMITS | {"min_pixels": min(tokens, 4) * factor**2, "max_pixels": tokens * factor**2}
    read = load_vision(record_of(tmp_path / "a.png", "image"), **limits, factor=factor).image
    assert read.width % factor == 0 == read.height % factor
    assert 0 < read.width * read.height <= tokens * factor**2
    assert (read.width >= read.height) == (width > height) or read.width == read.height


def test_sides_are_multiples_of_the_factor_that_is_given(tmp_path):
    clip = encode_clip(tmp_path / "a.mp4", side=(90, 160))
    for factor in (28, 32):
        assert load_vision(record_of(clip), **LIMITS, factor=factor).frames.shape[2:] == (
            round(90 / factor) * factor, round(160 / factor) * factor)


@pytest.mark.parametrize("name, image, colour", [
    ("cmyk.jpg", Image.new("CMYK", (60, 60), (0, 255, 255, 0)), (255, 0, 0)),
    ("grey.png", Image.new("L", (60, 60), 77), (77, 77, 77)),
    ("16bit.png", Image.fromarray(np.full((60, 60), 77 * 257, np.uint16)), (77, 77, 77)),
    ("8of32.tiff", Image.fromarray(np.full((60, 60), 200, np.int32)), (200, 200, 200)),
    ("16of32.tiff", Image.fromarray(np.full((60, 60), 200 * 257, np.int32)), (200, 200, 200)),
    ("pixel.png", Image.new("RGB", (1, 1), (9, 8, 7)), (9, 8, 7))])
def test_images_of_every_mode_are_read_as_they_look(tmp_path, name, image, colour):
    image.save(tmp_path / name)
    read = load_vision(record_of(tmp_path / name, "image"), **LIMITS).image
    assert read.mode == "RGB" and read.width % 28 == 0 == read.height % 28
    assert np.abs(np.subtract(read.getpixel((0, 0)), colour)).max() <= 2


@pytest.mark.parametrize("most, pixels, reason", [
    (10**6, 0.5, "floating-point"), (1000, 1, "exceeds limit")])
def test_images_that_cannot_be_shown_are_media_errors(tmp_path, monkeypatch, most, pixels, reason):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
    Image.fromarray(np.full((60, 60), pixels, np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(MediaError, match=reason):
        load_vision(record_of(tmp_path / "a.tiff", "image"), **LIMITS)


# ----------------------------------------------------------- decoders that fall or stand still

@pytest.fixture(autouse=True)
def fresh_decoders(monkeypatch):
    """A decoding process is a fork: it has what a test put in load_vision's place."""
    monkeypatch.setattr(build_data, "DECODERS", {})


@pytest.fixture
def decoder(tmp_path, monkeypatch):
    """Clips with the name of what their decoder does."""
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
    return [record_of(encode_clip(tmp_path / f"{name}.mp4"))
            for name in ("good", "crash", "fine", "hang", "well", "greedy", "right")]


class Clips(torch.utils.data.Dataset):
    def __init__(self, records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        try:
            return load_vision_isolated(self.records[i], 3, **LIMITS).frames
        except MediaError as error:
            return str(error)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_decoder_that_crashes_or_hangs_loses_exactly_its_sample(decoder, workers):
    start = time.perf_counter()
    found = list(DataLoader(Clips(decoder), batch_size=None, num_workers=workers))
    assert time.perf_counter() - start < 60
    for record, result in zip(decoder, found):
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


def die_while_answering(pipe):
    """It announces 100 bytes, sends one and ends."""
    print("tried", file=sys.stderr, flush=True)
    pipe.recv()
    os.write(pipe.fileno(), struct.pack("!i", 100) + b"x")
    os._exit(9)


@pytest.mark.parametrize("name, fault, status, printed", [
    ("load_vision", die_at_record, -9, ""), ("decode_records", die_while_answering, 9, ""),
    ("load_vision", meet_a_fault, 1, "KeyError: 'unexpected'")])
def test_a_record_at_which_two_decoders_die_is_given_up(
        tmp_path, monkeypatch, capfd, name, fault, status, printed):
    monkeypatch.setattr(build_data, name, fault)
    with pytest.raises(MediaError, match=rf"a.mp4: its decoder died \(exit status {status}\)"):
        load_vision_isolated(record_of(tmp_path / "a.mp4"), 60, **LIMITS)
    shown = capfd.readouterr().err
    assert shown.count("tried\n") == 2 and printed in shown


@pytest.mark.parametrize("both", [False, True])
def test_a_memory_limit_that_cannot_be_raised_is_kept(tmp_path, monkeypatch, both):
    """As under `ulimit -v` (both: -S and -H) of a user without rights: half of DECODE_MEMORY."""
    pages = int(open("/proc/self/statm").read().split()[0])
    most = pages * resource.getpagesize() + build_data.DECODE_MEMORY // 2
    limits = most, most if both else resource.RLIM_INFINITY
    pid = os.fork()
    if pid == 0:
        try:
            resource.setrlimit(resource.RLIMIT_AS, limits)
            allowed = []
            monkeypatch.setattr(resource, "setrlimit", lambda _, limits: allowed.append(limits))
            monkeypatch.setattr(build_data, "load_vision", lambda record, **_: build_data.Vision(
                None, {"limits": allowed}, None))
            vision = load_vision_isolated(record_of(tmp_path / "a.mp4"), 60)
            os._exit(0 if vision.metadata["limits"] == [limits] else 2)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


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
