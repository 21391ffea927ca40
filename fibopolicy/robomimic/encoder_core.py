"""Our encoders inside robomimic's networks. Importing this module registers them:
robomimic finds observation cores by class name.

robomimic drops the `core_kwargs` that a core does not name, so an encoder's options
travel in one argument and `build_encoder` checks all of them. Most of its networks
apply a ReLU to a core's output, which would cut off the negative half of keypoints.
Therefore a linear layer follows the encoder, as in robomimic's own `VisualCore`.
"""

from __future__ import annotations

import contextlib
import io
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fibopolicy.encoders.base import build_encoder
from fibopolicy.errors import UserError
from fibopolicy.policies.base import PolicyConfig, Shapes
from fibopolicy.policies.observations import module_name
from fibopolicy.utils.imports import make_torchvision_importable

make_torchvision_importable()
try:
    # robomimic prints a warning about missing private macros.
    with contextlib.redirect_stdout(io.StringIO()):
        import robomimic.utils.obs_utils as obs_utils
        from robomimic.models.obs_core import EncoderCore
except ImportError as error:
    raise UserError(
        f"robomimic is needed and cannot be imported ({error}): pip install 'fibopolicy[robomimic]'"
    ) from error

CORE = "FibopolicyEncoder"


class FibopolicyEncoder(EncoderCore):  # type: ignore[misc]
    """Any registered encoder as `core_class` of an rgb observation: `(B, 3, H, W)` in
    [0, 1] -> `(B, D)`.

    Args:
        input_shape: (3, H, W) after the randomizer's crop, set by robomimic.
        encoder: name for `build_encoder`, e.g. "vit_tiny" or "timm:<name>".
        encoder_options: options of the encoder, e.g. `{"depth": 4, "pool": "mean"}`.
        feature_dimension: D, the size of a linear layer after the encoder. There is no
            such layer if it is None (D is then the encoder's `output_dim`), or if the
            encoder ends in a linear layer of this size, as resnet18 does.

    Raises:
        UserError: an unknown encoder or option, or images that the encoder rejects.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        encoder: str = "fibottention_vit_tiny",
        encoder_options: Mapping[str, Any] | None = None,
        feature_dimension: int | None = 64,
    ) -> None:
        super().__init__(input_shape=input_shape)
        if len(input_shape) != 3 or input_shape[0] != 3:
            raise UserError(
                f"{CORE} encodes images of 3 channels, got observations of shape"
                f" {tuple(input_shape)}"
            )
        options = dict(encoder_options or {})
        for name in ("image_size", "num_views"):
            if name in options:
                raise UserError(
                    f"encoder_options: {name} is set by the observations and is not an option"
                )
        size = (int(input_shape[1]), int(input_shape[2]))
        self.encoder = build_encoder(encoder, image_size=size, **options)
        if feature_dimension is not None and not feature_dimension >= 1:
            raise UserError(
                f"feature_dimension must be at least 1 or null, got {feature_dimension}"
            )
        width = self.encoder.output_dim
        self.output_dim = width if feature_dimension is None else feature_dimension
        projects = feature_dimension is not None
        if self.encoder.ends_linear and feature_dimension == width:
            projects = False
        self.project = nn.Linear(width, self.output_dim) if projects else nn.Identity()

    def output_shape(self, input_shape: Sequence[int] | None = None) -> list[int]:
        return [self.output_dim]

    def forward(self, inputs: Tensor) -> Tensor:
        _, feature = self.encoder(inputs)
        features: Tensor = self.project(feature)
        return features


def encoder_kwargs(config: PolicyConfig, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The section `observation.encoder` of robomimic's configuration, for one of our
    policies with these `options`.
    """
    core = {
        "encoder": config.encoder,
        "encoder_options": dict(config.encoder_options),
        "feature_dimension": options["feature_dimension"],
    }
    none: dict[str, Any] = {"obs_randomizer_class": None, "obs_randomizer_kwargs": {}}
    return {
        "rgb": {"core_class": CORE, "core_kwargs": core, **none},
        "low_dim": {"core_class": None, "core_kwargs": {}, **none},
    }


def network_shapes(
    shapes: Shapes, sizes: Mapping[str, tuple[int, int]]
) -> OrderedDict[str, list[int]]:
    """Shape per observation in robomimic's order, which is alphabetical.

    Args:
        sizes: (H, W) per camera.
    """
    every: dict[str, list[int]] = {module_name(key): [3, *size] for key, size in sizes.items()}
    every |= {module_name(key): [dim] for key, dim in shapes.vectors.items()}
    return OrderedDict(sorted(every.items()))


@contextmanager
def observation_modalities(shapes: Shapes) -> Iterator[None]:
    """Put the keys of `shapes` into robomimic's global table of modalities, and silence
    robomimic's output.
    """
    before = obs_utils.OBS_KEYS_TO_MODALITIES
    table = obs_utils.ObservationKeyToModalityDict()
    table.update({module_name(key): "rgb" for key in shapes.images})
    table.update({module_name(key): "low_dim" for key in shapes.vectors})
    obs_utils.OBS_KEYS_TO_MODALITIES = table
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        # robomimic's networks read the table again when they are printed.
        obs_utils.OBS_KEYS_TO_MODALITIES = before or table
