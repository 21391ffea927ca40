"""Where an encoder looks, drawn on the frames that it saw."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fibopolicy.encoders.pooling import SpatialSoftmax
from fibopolicy.errors import UserError
from fibopolicy.evaluation.policy_runner import own_randomness
from fibopolicy.policies.observations import ObservationEncoder

Frame = NDArray[np.uint8]
#: Patches along the shorter side of a heat map, for encoders without keypoints.
PATCHES = 14
#: Random directions in which the feature's change is measured; more give a smoother
#: map.
DIRECTIONS = 8


def draw_look(policy: Any, camera: str, frames: Sequence[Frame]) -> list[Frame]:
    """Frames uint8 `(H, W, 3)` of one camera with what the policy's encoder makes of
    each.

    Where the encoder pools with a spatial softmax (the ViTs by default, resnet18): a
    dot of its own colour per keypoint, at the expected position under its softmax,
    which is what the policy is told. Otherwise (mean or CLS pooling, timm): patches are
    reddened by how much they move the feature, as the root mean square of its gradient
    along random directions.

    Args:
        policy: of this library.
        camera: observation key.

    Raises:
        UserError: the policy has no encoder of this camera's own, since it is not one
            of ours or joins its views.
    """
    observations = getattr(policy, "observations", None)
    if not isinstance(observations, ObservationEncoder) or observations.views == "joint":
        raise UserError(
            "the overlay needs a policy of this library whose views are separate or shared; film"
            " without --overlay"
        )
    encoder = observations.encoder_of(camera)
    images = torch.from_numpy(np.stack(frames)).to(next(policy.parameters()).device)
    # (T, 3, H', W')
    seen = torch.cat([observations.encoder_input(camera, part) for part in torch.split(images, 64)])
    top, left = (
        (full - part) // 2 for full, part in zip(images.shape[1:3], seen.shape[2:], strict=True)
    )
    pools = [module for module in encoder.modules() if isinstance(module, SpatialSoftmax)]
    if pools:
        points = keypoints(encoder, pools[0], seen) + np.array([left, top])
        return [_with_dots(frame, at) for frame, at in zip(frames, points, strict=True)]
    maps = sensitivity(encoder, seen)
    return [_with_heat(frame, heat, top, left) for frame, heat in zip(frames, maps, strict=True)]


def keypoints(encoder: nn.Module, pool: SpatialSoftmax, images: Tensor) -> NDArray[np.float64]:
    """Pixel positions (x, y) of the keypoints, `(T, K, 2)`, of images float `(T, 3, H,
    W)` in [0, 1].
    """
    found: list[Tensor] = []
    grids: list[tuple[int, int]] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        grids.append((inputs[0].shape[2], inputs[0].shape[3]))
        found.append(output)

    handle = pool.register_forward_hook(keep)
    try:
        with torch.no_grad():
            for part in torch.split(images, 64):
                encoder(part)
    finally:
        handle.remove()
    rows, columns = grids[0]
    # -1 and 1 are the centres of the first and the last cell. A convolution's cells may
    # reach beyond the image.
    cropped = getattr(encoder, "cropped", (images.shape[2], images.shape[3]))
    cells = np.array([columns, rows])
    # (T, K, 2)
    relative = (torch.cat(found).view(len(images), -1, 2).cpu().double().numpy() + 1) / 2
    centres: NDArray[np.float64] = (
        (relative * (cells - 1) + 0.5) * np.array([cropped[1], cropped[0]]) / cells
    )
    return centres


def sensitivity(encoder: nn.Module, images: Tensor) -> NDArray[np.float64]:
    """How much each patch moves the feature, `(T, h, w)`, from 0 to 1 in each image;
    images float `(T, 3, H, W)` in [0, 1].
    """
    height, width = images.shape[2:]
    side = max(1, min(height, width) // PATCHES)
    maps = []
    with own_randomness(), torch.enable_grad():
        torch.manual_seed(0)
        for part in torch.split(images, 16):
            part = part.detach().requires_grad_()
            _, feature = encoder(part)
            squares = torch.zeros_like(part)
            for direction in range(DIRECTIONS):
                along = torch.randn(feature.shape[1], device=feature.device)
                (gradient,) = torch.autograd.grad(
                    (feature @ along).sum(), part, retain_graph=direction + 1 < DIRECTIONS
                )
                squares += gradient.square()
            pooled = torch.nn.functional.avg_pool2d(
                squares.sum(dim=1, keepdim=True), side, ceil_mode=True
            )[:, 0].sqrt()
            least, most = (
                pooled.amin(dim=(1, 2), keepdim=True),
                pooled.amax(dim=(1, 2), keepdim=True),
            )
            maps.append((pooled - least) / (most - least).clamp_min(1e-12))
    return torch.cat(maps).cpu().double().numpy()


def _with_dots(frame: Frame, points: NDArray[np.float64]) -> Frame:
    drawn = frame.copy()
    height, width = frame.shape[:2]
    radius = max(1, min(height, width) // 60)
    for k, (x, y) in enumerate(points):
        colour = [round(255 * part) for part in colorsys.hsv_to_rgb(k / len(points), 1, 1)]
        column, row = (int(np.clip(at, 0, size - 1)) for at, size in ((x, width), (y, height)))
        drawn[
            max(0, row - radius + 1) : row + radius + 1,
            max(0, column - radius + 1) : column + radius + 1,
        ] = colour
    return drawn


def _with_heat(frame: Frame, heat: NDArray[np.float64], top: int, left: int) -> Frame:
    height, width = frame.shape[0] - 2 * top, frame.shape[1] - 2 * left
    side = max(1, min(height, width) // PATCHES)
    strength = 0.7 * heat.repeat(side, axis=0).repeat(side, axis=1)[:height, :width, None]
    drawn = frame.astype(np.float64)
    window = drawn[top : top + strength.shape[0], left : left + strength.shape[1]]
    window += strength * (np.array([255, 0, 0]) - window)
    return drawn.round().astype(np.uint8)
