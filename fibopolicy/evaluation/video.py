"""Videos of episodes: a grid of clips, and an overlay that shows where an encoder looks."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from fibopolicy.encoders.pooling import SpatialSoftmax
from fibopolicy.errors import UserError
from fibopolicy.evaluation.policy_runner import preserved_randomness
from fibopolicy.policies.observations import ObservationEncoder
from fibopolicy.utils.files import atomic_write

Frame = NDArray[np.uint8]
#: Frames uint8 `(H, W, 3)` of an episode, and whether it succeeded.
Clip = tuple[Sequence[Frame], bool]

SUCCESS, FAILURE, RUNNING = (46, 160, 67), (215, 58, 73), (110, 118, 129)
BORDER = 3
#: Height of the headings, pixels; even, as the size of a video must be.
HEADING = 24
#: Seconds that the last frame stays.
HOLD = 1.0

#: Patches along the shorter side of a heat map.
PATCHES = 14
#: Random directions along which the change of a feature is measured; more give a
#: smoother heat map.
DIRECTIONS = 8


def write_grid(
    path: Path,
    clips: Sequence[Clip],
    fps: float,
    *,
    scale: int = 2,
    columns: int = 5,
    headings: Sequence[str] = (),
) -> None:
    """Write an mp4 in which episodes play side by side. Their frames have a grey border
    until they end, then a green one for success or a red one.

    Args:
        clips: all of one size.
        fps: frames per second.
        scale: integer enlargement.
        columns: episodes side by side.
        headings: text above each column.
    """
    with atomic_write(path) as partial:
        film = partial.with_name(partial.name + path.suffix)  # ffmpeg needs the extension
        try:
            writer: Any = imageio.get_writer(
                film, fps=fps, codec="libx264", macro_block_size=2, quality=8
            )
            with writer:
                heading: Frame | None = None
                for frame in grid_frames(clips, fps, scale=scale, columns=columns):
                    if headings and heading is None:
                        heading = _heading(headings, frame.shape[1])
                    writer.append_data(
                        frame if heading is None else np.concatenate([heading, frame])
                    )
            film.replace(partial)
        finally:
            film.unlink(missing_ok=True)


def grid_frames(clips: Sequence[Clip], fps: float, *, scale: int, columns: int) -> Iterable[Frame]:
    """The frames of the grid, one per step of the longest episode; the last is held."""
    columns = min(columns, len(clips))
    rows = math.ceil(len(clips) / columns)
    longest = max(len(frames) for frames, _ in clips)
    for t in range(longest + round(HOLD * fps)):
        tiles = []
        for frames, success in clips:
            ended = t >= len(frames) - 1
            colour = (SUCCESS if success else FAILURE) if ended else RUNNING
            tiles.append(_with_border(frames[min(t, len(frames) - 1)], colour, scale))
        blank = np.full_like(tiles[0], 255)
        tiles += [blank] * (rows * columns - len(tiles))
        lines = [tiles[r * columns : (r + 1) * columns] for r in range(rows)]
        yield np.concatenate([np.concatenate(line, axis=1) for line in lines])


def _heading(headings: Sequence[str], width: int) -> Frame:
    """A white strip, uint8 `(HEADING, width, 3)`, with each text centred in its column;
    long texts are cut at their beginning.
    """
    strip = Image.new("RGB", (width, HEADING), "white")
    draw, share = ImageDraw.Draw(strip), width / len(headings)
    font = ImageFont.load_default(14)
    for i, text in enumerate(headings):
        while len(text) > 1 and draw.textlength(text, font=font) > share - 8:
            text = "…" + text[2:]
        draw.text(((i + 0.5) * share, HEADING / 2), text, fill="black", font=font, anchor="mm")
    return np.asarray(strip, dtype=np.uint8)


def _with_border(frame: Frame, colour: tuple[int, int, int], scale: int) -> Frame:
    large = frame.repeat(scale, axis=0).repeat(scale, axis=1)
    height, width = large.shape[:2]
    tile = np.empty((height + 2 * BORDER, width + 2 * BORDER, 3), dtype=np.uint8)
    tile[:] = colour
    tile[BORDER:-BORDER, BORDER:-BORDER] = large
    return tile


def draw_overlay(policy: Any, camera: str, frames: Sequence[Frame]) -> list[Frame]:
    """Draw on frames uint8 `(H, W, 3)` of one camera where the policy's encoder looks.

    If the encoder pools with a spatial softmax (the ViTs by default, resnet18), a dot
    of another colour for each keypoint; the policy receives only the keypoints.
    Otherwise (mean or CLS pooling, timm) patches are red in proportion to how much they
    change the feature: the root mean square of its gradient along random directions.

    Args:
        policy: of this library.
        camera: observation key.

    Raises:
        UserError: the policy has no separate encoder for this camera, since it is not
            of this library or its views are joint.
    """
    observations = getattr(policy, "observations", None)
    if not isinstance(observations, ObservationEncoder) or observations.views == "joint":
        raise UserError(
            "the overlay needs a policy of this library whose views are separate or shared; film"
            " without --overlay"
        )
    encoder = observations.encoder_of(camera)
    images = torch.from_numpy(np.stack(frames)).to(next(policy.parameters()).device)
    parts = [observations.encoder_input(camera, part) for part in torch.split(images, 64)]
    seen = torch.cat(parts)  # (T, 3, H', W'), which may be a crop
    full, cropped = images.shape[1:3], seen.shape[2:]
    top, left = (full[0] - cropped[0]) // 2, (full[1] - cropped[1]) // 2
    pools = [module for module in encoder.modules() if isinstance(module, SpatialSoftmax)]
    if pools:
        points = keypoints(encoder, pools[0], seen) + np.array([left, top])
        return [_with_dots(frame, at) for frame, at in zip(frames, points, strict=True)]
    maps = sensitivity(encoder, seen)
    return [_with_heat(frame, heat, top, left) for frame, heat in zip(frames, maps, strict=True)]


def keypoints(encoder: nn.Module, pool: SpatialSoftmax, images: Tensor) -> NDArray[np.float64]:
    """Pixel positions (x, y) of the keypoints, `(T, K, 2)`.

    Args:
        images: float `(T, 3, H, W)` in [0, 1].
    """
    outputs: list[Tensor] = []
    grid = (1, 1)

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal grid
        grid = (inputs[0].shape[2], inputs[0].shape[3])
        outputs.append(output)

    handle = pool.register_forward_hook(keep)
    try:
        with torch.no_grad():
            for part in torch.split(images, 64):
                encoder(part)
    finally:
        handle.remove()
    # -1 and 1 are the centres of the first and the last cell. Cells of a convolution
    # may reach beyond the image.
    cropped = getattr(encoder, "cropped", (images.shape[2], images.shape[3]))
    cells = np.array([grid[1], grid[0]])
    relative = (torch.cat(outputs).view(len(images), -1, 2).cpu().double().numpy() + 1) / 2
    centres: NDArray[np.float64] = (
        (relative * (cells - 1) + 0.5) * np.array([cropped[1], cropped[0]]) / cells
    )
    return centres


def sensitivity(encoder: nn.Module, images: Tensor) -> NDArray[np.float64]:
    """How much each patch changes the feature, `(T, h, w)`, from 0 to 1 in each image.

    Args:
        images: float `(T, 3, H, W)` in [0, 1].
    """
    patch = _patch_size(*images.shape[2:])
    maps = []
    with preserved_randomness(), torch.enable_grad():
        torch.manual_seed(0)
        for part in torch.split(images, 16):
            part = part.detach().requires_grad_()
            _, feature = encoder(part)
            squares = torch.zeros_like(part)
            for i in range(DIRECTIONS):
                direction = torch.randn(feature.shape[1], device=feature.device)
                (gradient,) = torch.autograd.grad(
                    (feature @ direction).sum(), part, retain_graph=i + 1 < DIRECTIONS
                )
                squares += gradient.square()
            summed = squares.sum(dim=1, keepdim=True)
            heat = nn.functional.avg_pool2d(summed, patch, ceil_mode=True)[:, 0].sqrt()
            least, most = heat.amin(dim=(1, 2), keepdim=True), heat.amax(dim=(1, 2), keepdim=True)
            maps.append((heat - least) / (most - least).clamp_min(1e-12))
    return torch.cat(maps).cpu().double().numpy()


def _patch_size(height: int, width: int) -> int:
    return max(1, min(height, width) // PATCHES)


def _with_dots(frame: Frame, points: NDArray[np.float64]) -> Frame:
    drawn = frame.copy()
    height, width = frame.shape[:2]
    reach = max(1, min(height, width) // 60)
    for k, (x, y) in enumerate(points):
        colour = [round(255 * part) for part in colorsys.hsv_to_rgb(k / len(points), 1, 1)]
        column, row = int(np.clip(x, 0, width - 1)), int(np.clip(y, 0, height - 1))
        rows = slice(max(0, row - reach + 1), row + reach + 1)
        columns = slice(max(0, column - reach + 1), column + reach + 1)
        drawn[rows, columns] = colour
    return drawn


def _with_heat(frame: Frame, heat: NDArray[np.float64], top: int, left: int) -> Frame:
    height, width = frame.shape[0] - 2 * top, frame.shape[1] - 2 * left
    patch = _patch_size(height, width)
    strength = 0.7 * heat.repeat(patch, axis=0).repeat(patch, axis=1)[:height, :width, None]
    drawn = frame.astype(np.float64)
    window = drawn[top : top + strength.shape[0], left : left + strength.shape[1]]
    window += strength * (np.array([255, 0, 0]) - window)
    return drawn.round().astype(np.uint8)
