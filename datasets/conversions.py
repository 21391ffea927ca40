"""Converts stored observations and actions to what training reads: frames uint8
`(N, H, W, 3)`, upright, and float vectors `(N, D)`.

Real robots and other simulators store frames as floats, channels first, with an alpha
channel, or as JPEG or PNG; vectors as integers or scalars. `find_conversion` recognises
these by shape, dtype and a few values, and never guesses between two readings.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fibopolicy.utils.system import usable_cores

Array = NDArray[Any]
Shape = tuple[int, ...]

#: Value ranges of frames that are not uint8, the narrowest first.
_RANGES = ((0, 1), (-1, 1), (0, 255))
_TOLERANCE = 1e-3  # of a range: resizing overshoots
_LEAST_PIXELS = 6  # smaller arrays are matrices or keypoints, unless uint8 (N, H, W, 3)
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")  # of JPEG and PNG
_COLOUR_MODES = ("RGB", "RGBA", "CMYK", "YCbCr")  # of PIL; a palette (P) may be a mask


class ConversionError(Exception):
    """A value that a conversion does not take.

    Attributes:
        row: its place among the rows that were converted.
    """

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(reason)
        self.row = row


@dataclass(frozen=True)
class Conversion:
    """How an array is read.

    Args:
        kind: "camera" gives uint8 `(n, H, W, 3)`, "vector" float `(n, D)`.
        steps: what is done to stored rows `(n, ...)`, with a description each; empty
            where they are read as they are.
        automatic: read without being named. Frames of one channel are not, since they
            may be depth or a mask.
    """

    kind: Literal["camera", "vector"]
    steps: tuple[tuple[str, Callable[[Array], Array]], ...] = ()
    automatic: bool = True

    @property
    def description(self) -> str:
        return ", ".join(description for description, _ in self.steps)

    def __call__(self, rows: Array) -> Array:
        """Convert rows `(n, ...)`.

        Raises:
            ConversionError: a frame cannot be decoded, or a value is out of range.
        """
        for _, step in self.steps:
            rows = step(rows)
        return rows

    def layout(self, shape: Shape, dtype: np.dtype[Any]) -> tuple[Shape, np.dtype[Any]]:
        """Shape and dtype that stored rows `(n, ...)` have after the conversion."""
        converted = self(np.empty((0, *shape[1:]), dtype))
        return (*shape[:1], *converted.shape[1:]), converted.dtype


def find_conversion(
    shape: Shape, dtype: np.dtype[Any], sample: Callable[[], Array], *, flipped: bool = False
) -> Conversion | str:
    """The conversion of an observation, or why there is none.

    Args:
        shape: shape of a step, without the time axis.
        sample: gives a few of its rows `(n, *shape)`; called only where shape and dtype
            do not decide.
        flipped: frames are stored upside down.
    """
    steps: list[tuple[str, Callable[[Array], Array]]] = []
    if 0 in shape:
        return "holds no values"
    if (dtype.kind in "OSV" and not shape) or (dtype == np.uint8 and len(shape) == 1):
        rows = sample()
        if _is_encoded(rows):
            return _encoded_frames(rows, flipped)
        if dtype != np.uint8:
            return "neither numbers nor JPEG or PNG"
    if dtype.kind not in "biuf":
        return "not numbers"
    if len(shape) in (2, 4) and shape[0] == 1:
        shape = shape[1:]
        steps.append(("an axis of length 1 dropped", lambda rows: rows[:, 0]))
    if not shape:
        shape = (1,)
        steps.append(("one number per step", lambda rows: rows[:, None]))
    if len(shape) == 1:
        if dtype.kind != "f":
            steps.append((f"{dtype} to float", lambda rows: rows.astype(np.float64)))
        return Conversion("vector", tuple(steps))
    return _frames(shape, dtype, sample, flipped, steps)


def is_frame(shape: Shape) -> bool:
    """Whether a step of this shape may be an image: two axes of pixels, one of channels."""
    return len(shape) == 3 and min(shape) in (1, 3, 4) and sorted(shape)[1] >= _LEAST_PIXELS


def _frames(
    shape: Shape,
    dtype: np.dtype[Any],
    sample: Callable[[], Array],
    flipped: bool,
    steps: list[tuple[str, Callable[[Array], Array]]],
) -> Conversion | str:
    if len(shape) == 2 and dtype.kind != "f":
        shape = (*shape, 1)
        steps.append(("one channel", lambda rows: rows[..., None]))
    if not is_frame(shape) and (dtype != np.uint8 or shape[2:] != (3,)):
        return "neither frames (N, H, W, 3) nor vectors (N, D)"
    channels_first = shape[-1] not in (3, 4) and shape[0] in (1, 3, 4) and shape[-1] != 1
    if channels_first:
        steps.append(("channels first", lambda rows: np.moveaxis(rows, 1, -1)))
    channels = shape[0] if channels_first else shape[-1]
    if channels == 4:
        steps.append(("alpha dropped", lambda rows: rows[..., :3]))
    elif channels == 1:
        steps.append(("grey", lambda rows: np.repeat(rows, 3, axis=-1)))
    elif channels != 3:
        return "neither frames (N, H, W, 3) nor vectors (N, D)"
    if dtype != np.uint8:
        rows = Conversion("camera", tuple(steps))(sample())
        scale = _range_of(rows)
        if scale is None:
            least, most = np.min(rows), np.max(rows)
            return f"values from {least:.4g} to {most:.4g}; frames hold 0 to 255, 0 to 1 or -1 to 1"
        low, high = scale
        steps.append((f"{dtype} {low} to {high}", lambda rows: _to_uint8(rows, low, high)))
    if flipped:
        steps.append(("turned upright", lambda rows: rows[:, ::-1]))
    return Conversion("camera", tuple(steps), automatic=channels != 1)


def _range_of(rows: Array) -> tuple[int, int] | None:
    """The narrowest known range of these values; `None` if there is none."""
    ranges = _RANGES if rows.dtype.kind == "f" else _RANGES[-1:]
    fitting = (r for r in ranges if np.all(_within(rows, *r)))
    return next(fitting, None) if rows.dtype.kind in "iuf" else None


def _within(rows: Array, low: int, high: int) -> NDArray[np.bool_]:
    margin = _TOLERANCE * (high - low)
    return np.asarray((rows >= low - margin) & (rows <= high + margin))  # NaN is false


def _to_uint8(rows: Array, low: int, high: int) -> Array:
    if not (within := _within(rows, low, high)).all():
        place = tuple(np.argwhere(~within)[0])
        raise ConversionError(
            int(place[0]), f"holds {rows[place]:.4g}, where the first frames hold {low} to {high}"
        )
    if rows.dtype.kind == "f":
        rows = np.rint((rows - low) * (255 / (high - low)))
    return np.clip(rows, 0, 255).astype(np.uint8)


# JPEG and PNG


def _is_encoded(rows: Array) -> bool:
    return bool(len(rows)) and all(_bytes(row).startswith(_SIGNATURES) for row in rows)


def _bytes(row: Any) -> bytes:
    """An encoded frame, maybe followed by zeros: uint8 array, bytes or opaque value."""
    return row if isinstance(row, bytes) else np.asarray(row).tobytes()


def _encoded_frames(rows: Array, flipped: bool) -> Conversion | str:
    try:
        with Image.open(io.BytesIO(_bytes(rows[0]))) as image:
            kind, mode, width, height = str(image.format), image.mode, *image.size
    except (UnidentifiedImageError, OSError) as error:
        return f"its first frame cannot be decoded ({error})"
    if mode not in ("L", "P", *_COLOUR_MODES):
        return f"{kind} of mode {mode}, not 8-bit colour"

    def decode(rows: Array) -> Array:
        frames = np.empty((len(rows), height, width, 3), np.uint8)

        def decode_one(i: int) -> None:
            try:
                with Image.open(io.BytesIO(_bytes(rows[i]))) as image:
                    frame = np.asarray(image.convert("RGB"))
            except (UnidentifiedImageError, OSError, SyntaxError) as error:
                raise ConversionError(i, f"cannot be decoded ({error})") from error
            if frame.shape != frames.shape[1:]:
                raise ConversionError(
                    i, f"is {frame.shape[0]} x {frame.shape[1]}, the first {height} x {width}"
                )
            frames[i] = frame

        if len(rows) > 1:  # PIL decodes without the interpreter's lock
            with ThreadPoolExecutor(usable_cores()) as threads:
                list(threads.map(decode_one, range(len(rows))))
        elif len(rows):
            decode_one(0)
        return frames

    steps = [(f"{kind} decoded", decode)]
    if flipped:
        steps.append(("turned upright", lambda rows: rows[:, ::-1]))
    return Conversion("camera", tuple(steps), automatic=mode in _COLOUR_MODES)


# Actions


def action_conversion(shape: Shape, dtype: np.dtype[Any]) -> Conversion | str:
    """The conversion of actions, or why there is none.

    Args:
        shape: shape of a step: (A,), (1, A), or () for one number.
    """
    if len(shape) > 2 or (len(shape) == 2 and shape[0] != 1):
        return "expected (N, A)"
    if dtype.kind not in "biuf":
        return "expected numbers"
    found = find_conversion(shape, dtype, lambda: np.empty((0, *shape), dtype))
    return found if isinstance(found, str) or found.kind == "vector" else "expected (N, A)"


# Size


def resized(shape: tuple[int, int], size: tuple[int, int] | None) -> tuple[int, int]:
    """The size (H, W) of frames after `resize_larger`."""
    return shape if size is None or (shape[0] <= size[0] and shape[1] <= size[1]) else size


def resize_larger(frames: NDArray[np.uint8], size: tuple[int, int] | None) -> NDArray[np.uint8]:
    """Frames `(n, H, W, 3)` that are higher or wider than `size`, resized to it.

    Bilinear with antialiasing, as `torch.nn.functional.interpolate` does it for uint8;
    a robot that feeds such a policy must resize its frames in the same way.
    """
    height, width = frames.shape[1:3]
    if resized((height, width), size) == (height, width):
        return frames
    import torch  # here, since most files need no resizing

    channels_first = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(channels_first, size, mode="bilinear", antialias=True)
    return np.ascontiguousarray(small.permute(0, 2, 3, 1).numpy())
