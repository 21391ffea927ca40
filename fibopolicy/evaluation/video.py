"""A grid of episodes in one video."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fibopolicy.utils.files import atomic_write

Frame = NDArray[np.uint8]
SUCCESS, FAILURE, RUNNING = (46, 160, 67), (215, 58, 73), (110, 118, 129)
BORDER = 3
#: Height of the strip of headings, pixels; even, as video frames must be.
HEADING = 24
#: How long the last frame stays, seconds.
HOLD = 1.0


def write_grid(
    path: Path,
    clips: Sequence[tuple[Sequence[Frame], bool]],
    fps: float,
    *,
    scale: int = 2,
    columns: int = 5,
    headings: Sequence[str] = (),
) -> None:
    """Write an mp4 in which episodes play side by side, framed grey until they end,
    then green for success or red.

    Args:
        clips: per episode its frames uint8 `(H, W, 3)`, all of one size, and whether it
            succeeded.
        fps: frames per second.
        scale: integer enlargement.
        columns: episodes side by side.
        headings: what stands above each column.
    """
    with atomic_write(path) as aside:
        film = aside.with_name(aside.name + path.suffix)  # ffmpeg goes by the ending
        try:
            writer: Any = imageio.get_writer(
                film, fps=fps, codec="libx264", macro_block_size=2, quality=8
            )
            with writer:
                heading = None
                for frame in grid_frames(clips, fps, scale=scale, columns=columns):
                    if headings and heading is None:
                        heading = _heading(headings, frame.shape[1])
                    writer.append_data(
                        frame if heading is None else np.concatenate([heading, frame])
                    )
            film.replace(aside)
        finally:
            film.unlink(missing_ok=True)


def grid_frames(
    clips: Sequence[tuple[Sequence[Frame], bool]], fps: float, *, scale: int, columns: int
) -> Iterable[Frame]:
    """The grid's frames, uint8, one per time step of the longest episode and then its
    last for a moment.
    """
    columns = min(columns, len(clips))
    rows = math.ceil(len(clips) / columns)
    longest = max(len(frames) for frames, _ in clips)
    blank: Frame | None = None
    for t in range(longest + round(HOLD * fps)):
        tiles = []
        for frames, success in clips:
            ended = t >= len(frames) - 1
            colour = (SUCCESS if success else FAILURE) if ended else RUNNING
            tiles.append(_framed(frames[min(t, len(frames) - 1)], colour, scale))
        blank = np.full_like(tiles[0], 255) if blank is None else blank
        tiles += [blank] * (rows * columns - len(tiles))
        yield np.concatenate(
            [np.concatenate(tiles[r * columns : (r + 1) * columns], axis=1) for r in range(rows)]
        )


def _heading(headings: Sequence[str], width: int) -> Frame:
    """A white strip, uint8 `(HEADING, width, 3)`, with each text in the middle of its
    share; the end of a long one counts.
    """
    strip = Image.new("RGB", (width, HEADING), "white")
    draw, share = ImageDraw.Draw(strip), width / len(headings)
    font = ImageFont.load_default(14)
    for i, text in enumerate(headings):
        while len(text) > 1 and draw.textlength(text, font=font) > share - 8:
            text = "…" + text[2:]
        draw.text(((i + 0.5) * share, HEADING / 2), text, fill="black", font=font, anchor="mm")
    return np.asarray(strip, dtype=np.uint8)


def _framed(frame: Frame, colour: tuple[int, int, int], scale: int) -> Frame:
    large = frame.repeat(scale, axis=0).repeat(scale, axis=1)
    height, width = large.shape[:2]
    tile = np.empty((height + 2 * BORDER, width + 2 * BORDER, 3), dtype=np.uint8)
    tile[:] = colour
    tile[BORDER:-BORDER, BORDER:-BORDER] = large
    return tile
