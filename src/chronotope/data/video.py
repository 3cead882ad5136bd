"""Clips out of a video file, and an honest split of them in time.

A film of n frames has n - frames + 1 clips of `frames` consecutive frames. Clip i of c starts at frame
floor(i * (n - frames) / (c - 1)), so neighbouring clips overlap unless the film is long.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from chronotope.errors import ChronotopeError

CLIPS = 512
FORMATS = {1: "gray", 3: "rgb24"}


def read_video(
    path: str | os.PathLike[str],
    *,
    frames: int,
    height: int,
    width: int,
    channels: int = 1,
    clips: int | None = None,
) -> Float[Tensor, "clips {frames} {channels} {height} {width}"]:
    """Clips of a film (mp4, gif, avi, and whatever else PyAV decodes), float32 in [0, 1], in the order of time.

    frames: length of a clip. height, width: pixels; each picture is cropped about its centre to this aspect and then
    resized with antialiasing. channels: 1 (gray) or 3 (red, green, blue). clips: at most so many, 512 by default,
    evenly spaced over the film; the memory is theirs alone, however long the film is.

        read_video("film.mp4", frames=8, height=64, width=64).shape  # [512, 8, 1, 64, 64]

    The film is decoded twice, first to count: the number of frames in a file's header is often wrong. Read is the
    first video stream; a rotation in the file is applied, pixels are taken to be square.

    Raises ChronotopeError: a number is out of range; the file is missing, empty, no video, without a video stream,
    damaged, or shorter than one clip; PyAV is missing.
    """
    if channels not in FORMATS:
        raise ChronotopeError(f"read_video: channels={channels}, expected 1 (gray) or 3 (red, green, blue)")
    limit = CLIPS if clips is None else clips
    for name, value in {"frames": frames, "height": height, "width": width, "clips": limit}.items():
        if value < 1:
            raise ChronotopeError(f"read_video: {name}={value}, expected at least 1")
    file = _existing(path)
    total = sum(1 for _ in _decode(file))
    if total < frames:
        raise ChronotopeError(
            f"{file} has {total} frames, expected at least {frames} for one clip: ask for frames={total} or fewer, "
            f"or give a longer film"
        )
    starts = _starts(total, frames, limit)
    out = torch.empty(len(starts), frames, channels, height, width)
    for number, frame in enumerate(_decode(file)):
        users = torch.nonzero((starts <= number) & (number < starts + frames))[:, 0]
        if len(users):
            out[users, number - starts[users]] = _picture(frame, channels, height, width)
    return out


def split(
    clips: Float[Tensor, "clips frames channels height width"], *, valid: float = 0.2
) -> tuple[Float[Tensor, "train frames channels height width"], Float[Tensor, "valid frames channels height width"]]:
    """(train, valid): the last share `valid` of the clips, and the first ones, with no frame in both.

    Clips in the order of time as `read_video` gives them. Two clips whose numbers differ by at least `frames` share no
    frame, whatever the distance of their starts; so the frames - 1 clips between the parts are dropped.

    No shared frame is not no likeness: frames close to the cut resemble each other. For a claim about other films,
    take another film.

    Raises ChronotopeError: `valid` is not between 0 and 1, or there are too few clips for both parts.
    """
    count, frames = clips.shape[:2]
    if not 0 < valid < 1:
        raise ChronotopeError(f"split: valid={valid}, expected a share between 0 and 1, such as 0.2")
    later = max(1, round(count * valid))
    earlier = count - later - (frames - 1)
    if earlier < 1:
        raise ChronotopeError(
            f"split: {count} clips of {frames} frames leave none to train on, after {later} to validate and "
            f"{frames - 1} dropped because they overlap both parts: take a longer film, more clips or fewer frames"
        )
    return clips[:earlier], clips[count - later :]


def _starts(total: int, frames: int, limit: int) -> Int[Tensor, " clips"]:
    """First frames of at most `limit` clips: distinct, evenly spaced from the first to the last possible one."""
    last = total - frames
    count = min(limit, last + 1)
    return torch.arange(count) * last // max(count - 1, 1)


def _picture(frame: Any, channels: int, height: int, width: int) -> Float[Tensor, "{channels} {height} {width}"]:
    """One decoded frame, upright, cropped about its centre, resized; float32 in [0, 1]."""
    pixels = frame.to_ndarray(format=FORMATS[channels])
    # PyAV reports by how many degrees the stored picture is turned counterclockwise to be upright.
    pixels = np.rot90(pixels, round(frame.rotation / 90))
    image = _crop(torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels).copy()), height, width)
    image = image.permute(2, 0, 1)[None].float() / 255
    return F.interpolate(image, size=(height, width), mode="bilinear", antialias=True)[0].clamp(0, 1)


def _crop(image: UInt8[Tensor, "rows columns c"], height: int, width: int) -> UInt8[Tensor, "_ _ c"]:
    """The largest part with the aspect height : width about the centre, to the nearest pixel."""
    rows, columns = image.shape[:2]
    keep_rows = min(rows, max(1, round(columns * height / width)))
    keep_columns = min(columns, max(1, round(rows * width / height)))
    top, left = (rows - keep_rows) // 2, (columns - keep_columns) // 2
    return image[top : top + keep_rows, left : left + keep_columns]


def _existing(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    if not file.is_file():
        raise ChronotopeError(f"{file} is not a file, expected a video such as an mp4, gif or avi: check the path")
    if file.stat().st_size == 0:
        raise ChronotopeError(f"{file} is empty (0 bytes), expected a video: copy or download it again")
    return file


def _decode(file: Path) -> Iterator[Any]:
    """Frames of the first video stream, in the order in which they are shown."""
    av = _pyav()
    with _opened(av, file) as container:
        if not container.streams.video:
            kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
            raise ChronotopeError(f"{file} has no video stream (its streams: {kinds}), expected at least one")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        number = 0
        try:
            for frame in container.decode(stream):
                yield frame
                number += 1
        except av.FFmpegError as error:
            raise ChronotopeError(
                f"{file} cannot be decoded beyond frame {number} ({error.strerror}), expected a whole video: copy or "
                f"download it again"
            ) from error


@contextmanager
def _opened(av: Any, file: Path) -> Iterator[Any]:
    refusal = f"{file} is not a video, expected an mp4, gif, avi or another file that ffmpeg reads"
    try:
        container = av.open(str(file))
    except av.FFmpegError as error:
        raise ChronotopeError(f"{refusal} ({error.strerror})") from error
    with container:
        # ffmpeg renders any .txt as a film of a text terminal.
        if container.format.name == "tty":
            raise ChronotopeError(f"{refusal} (it is text)")
        yield container


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise ChronotopeError(
            "read_video decodes with PyAV, which is not installed: pip install chronotope[video]"
        ) from error
    return av
