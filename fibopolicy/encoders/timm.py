"""Any timm model as an encoder: `build_encoder("timm:<name>", image_size=...)`."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fibopolicy.encoders.base import Encoder, check_image_size
from fibopolicy.encoders.convert import convert
from fibopolicy.errors import UserError, unknown
from fibopolicy.torchvision_shim import make_torchvision_importable


class TimmEncoder(Encoder):
    """A timm backbone without its classifier; its own normalisation of images is inside.

    Tokens are the patch tokens of a transformer, or the positions of a convolutional network's last feature map; the
    feature is what the model's classifier would have read.

    Args:
        name: of the model, as in `timm.list_models()`.
        image_size: (H, W), pixels; a transformer's position embeddings are resampled to it.
        pretrained: load the published weights, which may need the network.
        attention: "dense", or "fibottention" to swap it as `fibopolicy.convert` does (vision transformers only).
        preset: which Fibottention.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        name: str,
        image_size: tuple[int, int],
        pretrained: bool = False,
        attention: Literal["dense", "fibottention"] = "dense",
        preset: str = "paper",
    ) -> None:
        super().__init__()
        check_image_size(image_size)
        if attention not in ("dense", "fibottention"):
            raise unknown("attention", attention, ("dense", "fibottention"))
        make_torchvision_importable()
        try:
            import timm
        except ImportError as error:
            raise UserError(f"encoder timm:{name} needs timm: pip install 'fibopolicy[timm]'") from error
        if name.split(".")[0] not in timm.list_models():
            raise unknown("timm model", name, timm.list_models())
        try:
            self.model: Any = _create(timm, name, image_size, pretrained)
        except OSError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"timm:{name}: its published weights cannot be fetched ({reason})") from error
        config = timm.data.resolve_model_data_config(self.model)
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(config[key]).view(-1, 1, 1), persistent=False)
        if attention == "fibottention":
            convert(self.model, preset)
        self.prefix = int(getattr(self.model, "num_prefix_tokens", 0))
        self.output_dim = int(self.model.head_hidden_size)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model.forward_features((images - self.mean) / self.std)
        pooled = self.model.forward_head(features, pre_logits=True)  # (B, F)
        if features.ndim == 4:  # (B, D, H', W') -> (B, H' W', D)
            return features.flatten(2).transpose(1, 2), pooled
        return features[:, self.prefix :], pooled

    def checkpoint_gradients(self) -> None:
        """As timm does it; not every model of it can."""
        try:
            self.model.set_grad_checkpointing()
        except (AttributeError, AssertionError) as error:
            raise UserError(
                f"timm's {type(self.model).__name__} cannot checkpoint its gradients; leave the option out"
            ) from error


def _create(timm: Any, name: str, image_size: tuple[int, int], pretrained: bool) -> Any:
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, img_size=image_size)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
    except AssertionError as error:
        raise UserError(f"timm:{name} does not take images of {image_size[0]} x {image_size[1]} pixels: {error}") from error
    return timm.create_model(name, pretrained=pretrained, num_classes=0)  # convolutional: any size
