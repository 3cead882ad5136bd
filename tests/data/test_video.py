"""Laws of read_video and split, on films made here and on real ones."""

import os
import sys
import wave
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from chronotope.data.video import read_video, split
from chronotope.errors import ChronotopeError

REAL = Path(os.environ.get("CHRONOTOPE_DATA", Path(__file__).parents[3] / "shared" / "data")) / "video_clips"
LENGTHS = {
    "bigbuckbunny.mp4": 132,
    "bikes.mp4": 250,
    "carphone_pristine.mp4": 120,
    "cockatoo.mp4": 280,
    "nasa_13013.mp4": 325,
    "newtonscradle.gif": 36,
}
CODECS = {".mp4": ("mpeg4", "yuv420p"), ".avi": ("mjpeg", "yuvj420p"), ".gif": ("gif", "rgb8")}


def film(path, pictures, rotation=0):
    """Writes uint8 pictures [frames, height, width, 3] as a film and returns its path."""
    codec, pixels = CODECS[path.suffix]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], pixels
        if codec != "gif":
            stream.bit_rate = 4_000_000
        if rotation:
            stream.set_display_rotation(rotation)
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def ramp(frames, height=32, width=48):
    """Pictures of one gray each: frame i has value i / (frames - 1), so a decoded frame names itself."""
    values = np.linspace(0, 255, frames).round().astype(np.uint8)
    return np.broadcast_to(values[:, None, None, None], (frames, height, width, 3)).copy()


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".gif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_decodes_to_the_end_in_order(tmp_path, suffix, channels):
    clips = read_video(film(tmp_path / f"ramp{suffix}", ramp(12)), frames=4, height=8, width=8, channels=channels)
    assert clips.shape == (9, 4, channels, 8, 8)
    assert clips.dtype == torch.float32
    assert clips.min() >= 0 and clips.max() <= 1
    expected = torch.linspace(0, 1, 12).unfold(0, 4, 1)[..., None, None, None].expand_as(clips)
    # A GIF of this encoder has 4 levels of blue and 8 of red and green.
    torch.testing.assert_close(clips, expected, rtol=0, atol=0.15 if suffix == ".gif" else 0.03)


def test_every_element_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *shape: torch.full(shape, float("nan")))
    clips = read_video(film(tmp_path / "ramp.mp4", ramp(30)), frames=4, height=4, width=4, clips=3)
    assert clips.isfinite().all()


@pytest.mark.parametrize(("limit", "starts"), [(1, [0]), (2, [0, 26]), (4, [0, 8, 17, 26]), (None, list(range(27)))])
def test_clips_are_evenly_spaced(tmp_path, limit, starts):
    path = film(tmp_path / "ramp.mp4", ramp(30))
    every = read_video(path, frames=4, height=4, width=4)
    assert torch.equal(read_video(path, frames=4, height=4, width=4, clips=limit), every[starts])


def test_colours_keep_their_places(tmp_path):
    pictures = np.zeros((5, 32, 32, 3), np.uint8)
    pictures[:, :16, :, 0], pictures[:, 16:, :, 2] = 255, 255
    clip = read_video(film(tmp_path / "two.mp4", pictures), frames=5, height=8, width=8, channels=3)[0]
    top, bottom = clip[:, :, :3].mean((0, 2, 3)), clip[:, :, 5:].mean((0, 2, 3))
    torch.testing.assert_close(top, torch.tensor([1.0, 0, 0]), rtol=0, atol=0.06)
    torch.testing.assert_close(bottom, torch.tensor([0, 0, 1.0]), rtol=0, atol=0.06)


def test_crop_is_central_and_resize_averages(tmp_path):
    pictures = np.zeros((2, 32, 96, 3), np.uint8)
    pictures[:, :, 32:64] = 255
    wide = film(tmp_path / "wide.avi", pictures)
    assert read_video(wide, frames=2, height=8, width=8).min() > 0.9, "a square about the centre is all white"
    assert abs(read_video(wide, frames=2, height=1, width=3).mean() - 1 / 3) < 0.05
    stripes = np.zeros((2, 64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    gray = read_video(film(tmp_path / "stripes.avi", stripes), frames=2, height=4, width=4)
    torch.testing.assert_close(gray, torch.full_like(gray, 0.5), rtol=0, atol=0.05)


@pytest.mark.parametrize(("rotation", "bright"), [(90, "left"), (180, "bottom"), (-90, "right")])
def test_rotation_in_the_file_is_applied(tmp_path, rotation, bright):
    pictures = np.zeros((3, 32, 32, 3), np.uint8)
    pictures[:, :16] = 255
    clip = read_video(film(tmp_path / "turned.mp4", pictures, rotation), frames=3, height=8, width=8)[0, :, 0].mean(0)
    halves = {"left": clip[:, :4], "right": clip[:, 4:], "top": clip[:4], "bottom": clip[4:]}
    assert max(halves, key=lambda side: halves[side].mean()) == bright


@pytest.mark.parametrize("name", LENGTHS)
def test_real_films(name):
    if not (REAL / name).exists():
        pytest.skip(f"{REAL / name} is absent: set CHRONOTOPE_DATA")
    clips = read_video(REAL / name, frames=LENGTHS[name], height=24, width=32)
    assert clips.shape == (1, LENGTHS[name], 1, 24, 32)
    assert clips.std() > 0.05
    with pytest.raises(ChronotopeError, match=f"has {LENGTHS[name]} frames"):
        read_video(REAL / name, frames=LENGTHS[name] + 1, height=4, width=4)


@pytest.mark.parametrize(("count", "frames", "valid"), [(40, 8, 0.2), (27, 4, 0.5), (3, 1, 0.3), (10, 2, 0.01)])
def test_split_shares_no_frame(count, frames, valid):
    clips = torch.arange(count + frames - 1.0).unfold(0, frames, 1)[..., None, None, None]
    train, later = split(clips, valid=valid)
    assert len(later) == max(1, round(count * valid))
    assert train.max() < later.min()
    assert len(train) + len(later) == count - (frames - 1)


@pytest.mark.parametrize(
    ("count", "valid", "message"),
    [
        (5, 0.2, "5 clips of 8 frames leave none to train on, after 1 to validate and 7 dropped because"),
        (50, 1.0, "valid=1.0, expected a share between 0 and 1"),
    ],
)
def test_split_errors(count, valid, message):
    with pytest.raises(ChronotopeError, match=message):
        split(torch.zeros(count, 8, 1, 2, 2), valid=valid)


def read(path, **changes):
    return read_video(path, **{"frames": 4, "height": 8, "width": 8, **changes})


def test_error_missing_file(tmp_path):
    with pytest.raises(
        ChronotopeError, match=r"no\.mp4 is not a file, expected a video such as an mp4.*check the path"
    ):
        read(tmp_path / "no.mp4")
    with pytest.raises(ChronotopeError, match="is not a file"):
        read(tmp_path)


def test_error_empty_file(tmp_path):
    (tmp_path / "void.mp4").touch()
    with pytest.raises(ChronotopeError, match=r"void\.mp4 is empty \(0 bytes\), expected a video: copy or download"):
        read(tmp_path / "void.mp4")


@pytest.mark.parametrize("name", ["notes.txt", "notes.mp4"])
def test_error_not_a_video(tmp_path, name):
    (tmp_path / name).write_text("hello world\n" * 200)
    with pytest.raises(ChronotopeError, match=rf"{name} is not a video, expected an mp4, gif, avi or another file"):
        read(tmp_path / name)


def test_error_no_video_stream(tmp_path):
    with wave.open(str(tmp_path / "tone.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(8000))
    with pytest.raises(ChronotopeError, match=r"tone\.wav has no video stream \(its streams: audio\), expected at"):
        read(tmp_path / "tone.wav")


def test_error_too_short(tmp_path):
    path = film(tmp_path / "short.gif", ramp(3))
    message = r"short\.gif has 3 frames, expected at least 4 for one clip: ask for frames=3 or fewer, or give a longer"
    with pytest.raises(ChronotopeError, match=message):
        read(path)


def test_error_cut_off(tmp_path):
    path = film(tmp_path / "ramp.mp4", ramp(30))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ChronotopeError, match=r"ramp\.mp4 is not a video"):
        read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 2}, r"channels=2, expected 1 \(gray\) or 3 \(red, green, blue\)"),
        ({"frames": 0}, "frames=0, expected at least 1"),
        ({"height": 0}, "height=0, expected at least 1"),
        ({"clips": 0}, "clips=0, expected at least 1"),
    ],
)
def test_error_numbers(tmp_path, change, message):
    with pytest.raises(ChronotopeError, match=f"read_video: {message}"):
        read(tmp_path / "any.mp4", **change)


def test_error_without_pyav(tmp_path, monkeypatch):
    path = film(tmp_path / "ramp.gif", ramp(4))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ChronotopeError, match=r"PyAV, which is not installed: pip install chronotope\[video\]"):
        read(path)
