"""Our encoders as an observation core of robomimic. Importing this module registers it:
robomimic finds cores by class name.

Two habits of robomimic shape it. It drops `core_kwargs` that a core does not name,
without a word, so an encoder's own options travel in one argument, where
`build_encoder` sees all of them. And its networks, transformers apart, put a ReLU
behind every core, which would cut off the negative half of keypoints, so a linear layer
comes before it, as in its own `VisualCore`.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fibopolicy.encoders.base import build_encoder
from fibopolicy.errors import UserError
from fibopolicy.utils.imports import make_torchvision_importable

make_torchvision_importable()
try:
    with contextlib.redirect_stdout(io.StringIO()):  # it asks for a file of private macros
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
        input_shape: (3, H, W), after the randomizer's crop; robomimic gives it.
        encoder: as for `build_encoder`, e.g. "fibottention_vit_tiny", "vit_tiny",
            "resnet18", "timm:vit_small_patch16_224".
        encoder_options: its options, e.g. `{"depth": 4, "pool": "mean"}`.
        feature_dimension: D, of a linear layer behind the encoder. None leaves it out,
            and D is the encoder's own; so does the width of an encoder that ends in
            such a layer, as resnet18 does.

    Raises:
        UserError: an unknown encoder or option, or images that the encoder refuses.
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
                    f"encoder_options: {name} follows from the observations and is not an option"
                )
        size = (int(input_shape[1]), int(input_shape[2]))
        self.encoder = build_encoder(encoder, image_size=size, **options)
        width = self.encoder.output_dim
        if feature_dimension is not None and not feature_dimension >= 1:
            raise UserError(
                f"feature_dimension must be at least 1 or null, got {feature_dimension}"
            )
        bare = feature_dimension is None or (
            self.encoder.ends_linear and feature_dimension == width
        )
        self.output_dim = width if feature_dimension is None else feature_dimension
        self.project = nn.Identity() if bare else nn.Linear(width, self.output_dim)

    def output_shape(self, input_shape: Sequence[int] | None = None) -> list[int]:
        return [self.output_dim]

    def forward(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.project(self.encoder(inputs)[1])
        return features
