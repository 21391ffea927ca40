"""Films: clips that play side by side in an mp4 file, each marked with its outcome."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fibopolicy.errors import UserError, one_line
from fibopolicy.utils.files import atomic_write

Frame = NDArray[np.uint8]
Colour = tuple[int, int, int]

SUCCESS, FAILURE, RUNNING = (26, 127, 55), (207, 34, 46), (89, 99, 110)
#: Seconds that the last frame stays.
HOLD = 1.0


@dataclass(frozen=True)
class Clip:
    """One episode or demonstration.

    Args:
        frames: uint8 `(T, H, W, 3)`.
        success: whether it reached its goal; `None` if that is unknown.
        label: its name, shown above it.
    """

    frames: NDArray[np.uint8]
    success: bool | None
    label: str = ""


def write_video(
    path: Path,
    clips: Sequence[Clip],
    fps: float,
    *,
    columns: int | None = None,
    headings: Sequence[str] = (),
) -> None:
    """Write an mp4 (H.264) in which clips play side by side. A clip's border is grey
    while it runs; at its end it turns green for success or red, and its bar says so.

    Frames keep their size. A video whose height or width is odd, which H.264 does not
    allow, gets one more row or column.

    Args:
        clips: at least one, of one frame size.
        fps: frames per second.
        columns: clips side by side.
        headings: text above each column.

    Raises:
        UserError: there is no ffmpeg, or it cannot encode the video.
    """
    import imageio.v2 as imageio  # here, since nothing else needs the codecs

    with atomic_write(path) as partial:
        video = partial.with_name(partial.name + ".mp4")  # ffmpeg needs the extension
        quality = ["-crf", "23"]
        try:
            writer: Any = imageio.get_writer(
                video,
                fps=fps,
                codec="libx264",
                macro_block_size=2,
                quality=None,
                output_params=quality,
            )
            with writer:
                for frame in video_frames(clips, fps, columns=columns, headings=headings):
                    writer.append_data(frame)
            video.replace(partial)
        except (OSError, RuntimeError, ImportError, ValueError) as error:
            raise UserError(
                f"{path}: the video cannot be encoded ({one_line(error)[:200]}); check the free"
                " space, install imageio[ffmpeg], or set IMAGEIO_FFMPEG_EXE to an ffmpeg with"
                " libx264"
            ) from error
        finally:
            video.unlink(missing_ok=True)


def video_frames(
    clips: Sequence[Clip],
    fps: float,
    *,
    columns: int | None = None,
    headings: Sequence[str] = (),
) -> Iterable[Frame]:
    """The frames of a video, uint8 `(H, W, 3)` with H and W even, until the longest
    clip has ended; the last is held.
    """
    columns = min(columns or _columns(len(clips)), len(clips))
    rows = math.ceil(len(clips) / columns)
    tiles = [_Tile(clip) for clip in clips]
    blank = np.full_like(tiles[0].at(0), 255)
    heading = _text_strip(headings, columns * blank.shape[1], 24) if headings else None
    for t in range(max(len(clip.frames) for clip in clips) + round(HOLD * fps)):
        shown = [tile.at(t) for tile in tiles] + [blank] * (rows * columns - len(tiles))
        lines = [
            np.concatenate(shown[row * columns : (row + 1) * columns], axis=1)
            for row in range(rows)
        ]
        frame = np.concatenate([*([] if heading is None else [heading]), *lines])
        height, width = frame.shape[:2]
        yield np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _columns(count: int) -> int:
    """Columns of a nearly square grid with few empty places, at most 5."""
    root = min(math.ceil(math.sqrt(count)), 4)
    return min(root, root + 1, key=lambda columns: -count % columns)


class _Tile:
    """A clip in its border, below a bar with its label and its outcome."""

    def __init__(self, clip: Clip) -> None:
        self._frames = clip.frames
        height, width = clip.frames[0].shape[:2]
        self._border = max(2, height // 64)
        self._bar = max(12, height // 11)
        outcome = {True: "SUCCESS", False: "FAILURE", None: "END"}[clip.success]
        colour = {True: SUCCESS, False: FAILURE, None: RUNNING}[clip.success]
        size = (height + self._bar + self._border, width + 2 * self._border)
        self._running = self._empty(size, RUNNING, clip.label, "")
        self._ended = self._empty(size, colour, clip.label, outcome)

    def at(self, t: int) -> Frame:
        """The tile at frame `t`; after the end of the clip, its last."""
        last = len(self._frames) - 1
        tile = (self._ended if t >= last else self._running).copy()
        tile[self._bar : -self._border, self._border : -self._border] = self._frames[min(t, last)]
        return tile

    def _empty(self, size: tuple[int, int], colour: Colour, label: str, outcome: str) -> Frame:
        tile = np.empty((*size, 3), dtype=np.uint8)
        tile[:] = colour
        tile[: self._bar] = _bar(label, outcome, (self._bar, size[1]), colour)
        return tile


def _bar(label: str, outcome: str, size: tuple[int, int], colour: Colour) -> Frame:
    """White text on a colour: the label on the left, the outcome on the right."""
    height, width = size
    bar = Image.new("RGB", (width, height), colour)
    draw, font, margin = ImageDraw.Draw(bar), ImageFont.load_default(0.62 * height), height / 4
    room = width - 2 * margin
    if outcome:
        draw.text((width - margin, height / 2), outcome, fill="white", font=font, anchor="rm")
        room -= draw.textlength(outcome, font=font) + margin
    text = _shortened(label, draw, font, room)
    draw.text((margin, height / 2), text, fill="white", font=font, anchor="lm")
    return np.asarray(bar, dtype=np.uint8)


def _text_strip(texts: Sequence[str], width: int, height: int) -> Frame:
    """A white strip, uint8 `(height, width, 3)`, with each text centred in its column."""
    strip = Image.new("RGB", (width, height), "white")
    draw, share = ImageDraw.Draw(strip), width / len(texts)
    font = ImageFont.load_default(0.62 * height)
    for i, text in enumerate(texts):
        text = _shortened(text, draw, font, share - 8)
        draw.text(((i + 0.5) * share, height / 2), text, fill="black", font=font, anchor="mm")
    return np.asarray(strip, dtype=np.uint8)


def _shortened(text: str, draw: ImageDraw.ImageDraw, font: Any, room: float) -> str:
    """A text that fits into `room` pixels; long ones are cut at their beginning."""
    while len(text) > 1 and draw.textlength(text, font=font) > room:
        text = "…" + text[2:]
    return text
