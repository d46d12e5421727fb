"""Frames of videos: files of several kinds, folders, lists; what phones and damaged copies bring along."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from deris_llm.data import video as video_module
from deris_llm.data.video import VideoError, frame_name, open_video, write_video


def drawn(number, size=(120, 160)):
    """A frame whose noise no codec predicts, with a bright bar that says its number."""
    pixels = np.random.default_rng(number).integers(0, 120, (*size, 3), dtype=np.uint8)
    pixels[:20, : 3 * number + 3] = 255
    return Image.fromarray(pixels)


def encoded(path, times, *, codec="libx264", options=None, size=(120, 160)):
    """A file with a frame at each of some times in ms; B-frames are on, as in videos of phones."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = size[1], size[0], "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.codec_context.gop_size = 10
        for number, milliseconds in enumerate(times):
            frame = av.VideoFrame.from_image(drawn(number, size))
            frame.pts, frame.time_base = milliseconds, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def bar_of(image):
    """The number that a frame says of itself."""
    row = np.asarray(image.convert("L"), dtype=float)[2:18].mean(axis=0)
    return round((row > 187).sum() / 3) - 1


@pytest.fixture(scope="module")
def steady(tmp_path_factory):
    return encoded(tmp_path_factory.mktemp("video") / "a.mp4", range(0, 1200, 40), options={"movflags": "faststart"})


def test_a_file_is_read_frame_by_frame(steady):
    video = open_video(steady)
    frames = list(video.frames())
    assert (video.name, video.num_frames, len(frames)) == ("a", 30, 30)
    assert [bar_of(frame.image) for frame in frames] == list(range(30))
    assert [frame.index for frame in frames] == list(range(30))
    assert (frames[12].name, frames[12].image.mode, frames[12].image.size) == ("00012", "RGB", (160, 120))
    np.testing.assert_allclose([frame.seconds for frame in frames], np.arange(30) * 0.04, atol=1e-4)
    later = list(video.frames(17))
    assert [frame.index for frame in later] == list(range(17, 30))
    assert np.array_equal(np.asarray(later[0].image), np.asarray(frames[17].image))


def test_times_that_are_not_evenly_spaced_are_kept(tmp_path):
    times = np.cumsum(np.random.default_rng(0).integers(10, 300, 20)).tolist()
    for name, codec in (("v.mp4", "libx264"), ("v.mkv", "libx264"), ("v.webm", "libvpx-vp9")):
        frames = list(open_video(encoded(tmp_path / name, times, codec=codec)).frames())
        np.testing.assert_allclose([frame.seconds for frame in frames], np.array(times) / 1000, atol=1e-3)


def test_a_sideways_video_of_a_phone_is_turned(steady, tmp_path):
    content = bytearray(steady.read_bytes())
    place = content.index(b"tkhd") + 4 + 40  # the matrix of the track
    upright = [np.asarray(frame.image) for frame in open_video(steady).frames()]
    for turns, (a, b) in ((1, (0, -1)), (2, (-1, 0)), (3, (0, 1))):  # counter-clockwise
        matrix = (a << 16, b << 16, 0, -b << 16, a << 16, 0, 0, 0, 1 << 30)
        content[place : place + 36] = struct.pack(">9i", *matrix)
        path = tmp_path / f"{turns}.mp4"
        path.write_bytes(content)
        frames = list(open_video(path).frames())
        for frame, expected in zip(frames, upright, strict=True):
            assert np.array_equal(np.asarray(frame.image), np.rot90(expected, turns))


def frames_and_error(path):
    frames = []
    with pytest.raises(VideoError) as caught:
        for frame in open_video(path).frames():
            frames.append(frame)
    return frames, str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "noise", "zeros"])
def test_a_file_that_is_damaged_half_way(steady, tmp_path, damage):
    content = bytearray(steady.read_bytes())
    half = len(content) // 2
    if damage == "cut":
        del content[half:]
    else:
        rng = np.random.default_rng(0)
        content[half : half + 20_000] = rng.bytes(20_000) if damage == "noise" else bytes(20_000)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(content)
    frames, error = frames_and_error(path)
    whole = list(open_video(steady).frames())
    assert 8 <= len(frames) < 20
    for frame, expected in zip(frames, whole, strict=False):  # what was decoded is right
        assert np.array_equal(np.asarray(frame.image), np.asarray(expected.image))
    assert f"cannot be decoded at frame {len(frames)}, after {frames[-1].seconds:.3f} s" in error
    assert f"{len(frames)} frames before it were decoded" in error


def test_a_file_that_ends_early_without_an_error_is_noticed(tmp_path):
    path = encoded(tmp_path / "a.mkv", range(0, 1600, 40))
    assert len(list(open_video(path).frames())) == 40
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    frames, error = frames_and_error(path)
    assert 10 < len(frames) < 30
    assert "the file ends here, but states a length of 1.60 s" in error


def test_files_that_are_no_video(tmp_path, steady):
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "unfinished.mp4").write_bytes(encoded(tmp_path / "b.mp4", range(0, 400, 40)).read_bytes()[:20_000])
    for name in ("text.mp4", "empty.mp4", "unfinished.mp4"):
        with pytest.raises(VideoError, match=rf"{name}: expected a video, got a file that cannot be opened as one"):
            open_video(tmp_path / name)
    with pytest.raises(VideoError, match="got no such file"):
        open_video(tmp_path / "absent.mp4")
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match="got a file without frames"):
        open_video(tmp_path / "sound.wav")


def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path):
    for number in (10, 9, 1, 100):
        drawn(number % 50).save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    video = open_video(tmp_path)
    frames = list(video.frames())
    assert video.num_frames == 4
    assert [frame.name for frame in frames] == ["frame1", "frame9", "frame10", "frame100"]
    assert [bar_of(frame.image) for frame in frames] == [1, 9, 10, 0]
    assert frames[0].seconds is None
    assert [frame.name for frame in video.frames(2)] == ["frame10", "frame100"]


def test_numbers_of_frames_that_jump(tmp_path, caplog):
    for number in (0, 5, 10, 20, 25):
        drawn(number).save(tmp_path / f"{number:05d}.png")
    assert open_video(tmp_path).num_frames == 5
    assert "frame numbers jump from 00010 to 00020, and in 1 places in all, where others step by 5" in caplog.text
    caplog.clear()
    (tmp_path / "00000.png").rename(tmp_path / "00015.png")
    assert [frame.name for frame in open_video(tmp_path).frames()] == ["00005", "00010", "00015", "00020", "00025"]
    assert not caplog.text


def test_lists_of_images(tmp_path):
    images = [drawn(number) for number in range(3)]
    images[1].save(tmp_path / "b.png")
    frames = list(open_video([images[0], tmp_path / "b.png", np.asarray(images[2])]).frames())
    assert [frame.name for frame in frames] == ["00000", "b", "00002"]
    assert [bar_of(frame.image) for frame in frames] == [0, 1, 2]


def test_frames_that_cannot_be_used(tmp_path):
    with pytest.raises(VideoError, match="expected at least one frame, got none"):
        open_video([])
    with pytest.raises(VideoError, match="give a list such as"):
        open_video(np.zeros((4, 60, 80, 3), dtype=np.uint8))
    with pytest.raises(VideoError, match="without images"):
        open_video(tmp_path)
    drawn(0).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes()[:900])
    frames, error = frames_and_error(tmp_path)
    assert len(frames) == 1
    assert "frame 1 (1)" in error
    drawn(1, (60, 80)).save(tmp_path / "1.png")
    frames, error = frames_and_error(tmp_path)
    assert "frame 1 (1): expected 160 x 120 px, as the frames before it, got 80 x 60 px" in error
    drawn(0).save(tmp_path / "0.jpg")
    with pytest.raises(VideoError, match="frames of different names, got '0' 2 times"):
        open_video(tmp_path)


def test_a_written_video_keeps_its_times(tmp_path):
    times = [0.0, 0.04, 0.5, 0.51, 2.0]
    path = write_video(tmp_path / "new" / "a", [(drawn(n), t) for n, t in enumerate(times)], frames_per_second=10)
    assert path == tmp_path / "new" / "a.mp4"
    assert [each.name for each in path.parent.iterdir()] == ["a.mp4"]
    frames = list(open_video(path).frames())
    assert [bar_of(frame.image) for frame in frames] == list(range(5))
    np.testing.assert_allclose([frame.seconds for frame in frames], times, atol=1e-3)
    path = write_video(tmp_path / "b", [(drawn(n), None) for n in range(4)], frames_per_second=4)
    np.testing.assert_allclose([frame.seconds for frame in open_video(path).frames()], np.arange(4) / 4, atol=1e-3)
    assert write_video(tmp_path / "c", [], frames_per_second=4) is None


def test_without_h264_the_video_is_motion_jpeg(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(video_module, "_can_encode", lambda codec: codec == "mjpeg")
    path = write_video(tmp_path / "a", [(drawn(n), n / 5) for n in range(6)], frames_per_second=5)
    assert path == tmp_path / "a.mov"
    assert "cannot encode H.264" in caplog.text
    assert [bar_of(frame.image) for frame in open_video(path).frames()] == list(range(6))


def test_frame_names_sort_in_order():
    assert [frame_name(index) for index in (0, 12, 99_999)] == ["00000", "00012", "99999"]
