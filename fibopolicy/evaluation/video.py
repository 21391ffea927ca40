"""Videos of episodes, and an overlay that shows where an encoder looks."""

from __future__ import annotations

import colorsys
import functools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fibopolicy.datasets.draw import draw_states, view_size
from fibopolicy.datasets.restore import Trajectory
from fibopolicy.encoders.pooling import SpatialSoftmax
from fibopolicy.envs.base import image_key
from fibopolicy.errors import UserError
from fibopolicy.evaluation.config import EvaluateConfig, Quality
from fibopolicy.evaluation.episodes import Episode, EpisodeResult
from fibopolicy.evaluation.evaluate import Evaluator
from fibopolicy.evaluation.init_states import InitStates
from fibopolicy.evaluation.policy_runner import preserved_randomness, trained_shapes
from fibopolicy.policies.observations import ObservationEncoder
from fibopolicy.policies.run_directory import RunDirectory
from fibopolicy.report.video import Clip, write_video
from fibopolicy.utils.system import usable_cores

Frame = NDArray[np.uint8]

#: Patches along the shorter side of a heat map.
PATCHES = 14
#: Random directions along which the change of a feature is measured; more give a
#: smoother heat map.
DIRECTIONS = 8


def write_episodes(
    config: EvaluateConfig,
    evaluator: Evaluator,
    init_states: InitStates,
    results: Mapping[str, Sequence[EpisodeResult]],
) -> Path | None:
    """Run episodes once more and write the run's video of them; if that fails, warn,
    since all numbers are stored. It closes the evaluator's simulators.

    Args:
        results: results of the episodes in each column, by its heading; those of a
            single one are laid out in a grid.
    """
    path = RunDirectory(config.run).video(
        evaluator.info.task_id, init_states.seed, config.checkpoint
    )
    layout: dict[str, Any] = {}
    if len(results) > 1:
        path = path.with_stem(f"{path.stem}_perturbed")
        layout = {"columns": len(results), "headings": list(results)}
    try:
        columns = [evaluator.repeat(init_states, rows) for rows in results.values()]
        clips, fps = draw_clips(
            evaluator,
            init_states,
            [episode for row in zip(*columns, strict=True) for episode in row],
            camera=config.video_camera,
            size=config.video_size,
            overlay=config.overlay,
        )
        write_video(path, clips, fps, **layout)
    except (UserError, ValueError) as error:  # ValueError: an episode failed this time
        warnings.warn(f"no video: {error}", stacklevel=2)
        return None
    return path


def episode_clips(
    evaluator: Evaluator,
    init_states: InitStates,
    results: Sequence[EpisodeResult],
    *,
    camera: str | None,
    size: int,
) -> tuple[dict[int, Clip], float]:
    """Run episodes once more and draw their states, see `draw_clips`.

    Args:
        results: results of the episodes.

    Returns:
        clips by index in the order of `results`, without episodes in which a simulator
        failed; frames per second.

    Raises:
        UserError: an episode does not repeat, or cannot be drawn.
    """
    episodes = evaluator.repeat(init_states, results)
    clips, fps = draw_clips(evaluator, init_states, episodes, camera=camera, size=size)
    return {one.index: clip for one, clip in zip(episodes, clips, strict=True)}, fps


def draw_clips(
    evaluator: Evaluator,
    init_states: InitStates,
    episodes: Sequence[Episode],
    *,
    camera: str | None,
    size: int,
    overlay: bool = False,
) -> tuple[list[Clip], float]:
    """Draw the states of episodes, each with its perturbation. It closes the
    evaluator's simulators.

    Args:
        camera: its name; `None` means the policy's first, or the task's own if the
            policy has none.
        size: height of the view, pixels.
        overlay: draw where the encoder looks, see `draw_overlay`.

    Returns:
        clips in the order of `episodes`; frames per second.
    """
    if not episodes:
        raise UserError("nothing to film: every episode ended in a simulator error")
    evaluator.close()  # the processes that draw need the memory
    policy, info = evaluator.runner.policy, evaluator.info
    shapes = trained_shapes(policy)
    seen_sizes = dict(shapes.images) if shapes else {}
    key = image_key(camera) if camera else next(iter(seen_sizes), None)
    cameras = None if key is None else (key.removesuffix("_image"),)
    draw = functools.partial(
        draw_states,
        info.env_args,
        [_trajectory(episode, init_states) for episode in episodes],
        cameras=cameras,
        workers=min(evaluator.workers, usable_cores()),
    )
    shown = draw(view_size(seen_sizes.get(key or "", (1, 1)), size))
    videos = [one.frames for one in shown]
    if overlay and key:
        seen = draw(seen_sizes[key], quality=cast(Quality, info.quality))
        videos = [
            draw_overlay(policy, key, small.frames, large)
            for small, large in zip(seen, videos, strict=True)
        ]
    clips = [
        Clip(frames, episode.success, f"initial state {episode.index}")
        for episode, frames in zip(episodes, videos, strict=True)
    ]
    return clips, shown[0].fps


def _trajectory(episode: Episode, init_states: InitStates) -> Trajectory:
    model = init_states.states[episode.index].model
    return Trajectory(
        f"episode {episode.index}",
        model,
        np.stack(episode.states),
        actions=np.empty((0, 0)),
        perturbation=episode.perturbation,
        index=episode.index,
    )


def draw_overlay(
    policy: Any, camera: str, seen: NDArray[np.uint8], shown: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Draw on the frames of one camera where the policy's encoder looks.

    If the encoder pools with a spatial softmax (the ViTs by default, resnet18), a dot
    of another colour for each keypoint; the policy receives only the keypoints.
    Otherwise (mean or CLS pooling, timm) patches are red in proportion to how much they
    change the feature: the root mean square of its gradient along random directions.

    Args:
        policy: a policy of this library.
        camera: observation key.
        seen: frames that the policy sees, uint8 `(T, h, w, 3)`.
        shown: the same instants, uint8 `(T, H, W, 3)`.

    Returns:
        copies of `shown` with the overlay.

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
    images = torch.from_numpy(np.array(seen)).to(next(policy.parameters()).device)
    parts = [observations.encoder_input(camera, part) for part in torch.split(images, 64)]
    inputs = torch.cat(parts)  # (T, 3, h', w'), which may be a crop
    full, cropped = images.shape[1:3], inputs.shape[2:]
    top, left = (full[0] - cropped[0]) // 2, (full[1] - cropped[1]) // 2
    pools = [module for module in encoder.modules() if isinstance(module, SpatialSoftmax)]
    if pools:
        points = keypoints(encoder, pools[0], inputs) + np.array([left, top])
        points /= np.array([full[1], full[0]])
        return np.stack([_with_dots(*one) for one in zip(shown, points, strict=True)])
    patch = _patch_size(*cropped)
    maps = sensitivity(encoder, inputs).repeat(patch, axis=1).repeat(patch, axis=2)
    heat = np.zeros(images.shape[:3])
    heat[:, top : top + cropped[0], left : left + cropped[1]] = maps[:, : cropped[0], : cropped[1]]
    return np.stack([_with_heat(*one) for one in zip(shown, heat, strict=True)])


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
    """Dots at `(K, 2)`, x and y as shares of width and height."""
    drawn = frame.copy()
    height, width = frame.shape[:2]
    reach = max(1, min(height, width) // 60)
    for k, (x, y) in enumerate(points * np.array([width, height])):
        colour = [round(255 * part) for part in colorsys.hsv_to_rgb(k / len(points), 1, 1)]
        column, row = int(np.clip(x, 0, width - 1)), int(np.clip(y, 0, height - 1))
        rows = slice(max(0, row - reach + 1), row + reach + 1)
        columns = slice(max(0, column - reach + 1), column + reach + 1)
        drawn[rows, columns] = colour
    return drawn


def _with_heat(frame: Frame, heat: NDArray[np.float64]) -> Frame:
    """Red in proportion to a map `(h, w)` of the whole frame, 0 to 1."""
    rows, columns = (
        np.arange(size) * cells // size
        for size, cells in zip(frame.shape[:2], heat.shape, strict=True)
    )
    strength = 0.7 * heat[rows][:, columns, None]
    drawn = frame + strength * (np.array([255, 0, 0]) - frame)
    blended: Frame = drawn.round().astype(np.uint8)
    return blended
