"""Any timm model as an encoder: `build_encoder("timm:<name>", image_size=...)`."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from fibopolicy.encoders.base import Encoder, check_image_size
from fibopolicy.encoders.convert import convert
from fibopolicy.errors import UserError, message_of, one_line, unknown
from fibopolicy.utils.imports import make_torchvision_importable

#: Seconds to wait for the server of the published weights before using only the cache.
_REACH_SECONDS = 3.0


class TimmEncoder(Encoder):
    """A timm backbone without its classifier; it includes the model's image
    normalisation.

    Tokens are the patch tokens of a transformer, or the positions of a convolutional
    network's last feature map; the feature is what the model's classifier would have
    read.

    Args:
        name: name of the model, as in `timm.list_models()`.
        image_size: (H, W), pixels; a transformer's position embeddings are resampled to
            it.
        pretrained: load the published weights, which may need the network.
        attention: "dense", or "fibottention" to swap it as `fibopolicy.convert` does
            (vision transformers only).
        preset: variant of Fibottention, see `PRESETS`.

    Raises:
        UserError: an unknown model; a model that does not take images of this size,
            ignores some of their pixels, or whose features are not one grid of tokens
            (checked with a trial image); or weights that cannot be downloaded.
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
            raise UserError(
                f"encoder timm:{name} needs timm: pip install 'fibopolicy[timm]'"
            ) from error
        if name.split(".")[0] not in timm.list_models():
            raise unknown("timm model", name, timm.list_models())
        with _offline_if_unreachable() if pretrained else contextlib.nullcontext("") as unreachable:
            try:
                self.model: Any = _create(timm, name, image_size, pretrained)
            except OSError as error:
                reason = unreachable or message_of(error)[:200]
                raise UserError(
                    f"timm:{name}: its published weights cannot be downloaded ({reason})"
                ) from error
        config = timm.data.resolve_model_data_config(self.model)
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(config[key]).view(-1, 1, 1), persistent=False)
        if attention == "fibottention":
            convert(self.model, preset)
        self.prefix = _prefix_tokens(self.model)
        self.channels_last = False
        self._try(name, image_size, config["input_size"])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        images = images.to(self.mean.dtype)
        features = self.model.forward_features((images - self.mean) / self.std)
        pooled = self.model.forward_head(features, pre_logits=True)  # (B, F)
        if features.ndim == 3:
            return features[:, self.prefix :], pooled
        if self.channels_last:  # (B, H', W', D) -> (B, H' W', D)
            return features.flatten(1, 2), pooled
        return features.flatten(2).transpose(1, 2), pooled  # (B, D, H', W') -> (B, H' W', D)

    def checkpoint_gradients(self) -> None:
        """Use timm's gradient checkpointing, which some of its models lack."""
        try:
            self.model.set_grad_checkpointing()
        except (AttributeError, AssertionError) as error:
            raise UserError(
                f"timm's {type(self.model).__name__} does not support gradient checkpointing;"
                " leave the option out"
            ) from error

    def _try(
        self, name: str, image_size: tuple[int, int], native_size: tuple[int, int, int]
    ) -> None:
        """Encode one image to find the layout of the features, and raise `UserError` if
        the model breaks the encoder contract.
        """
        channels = int(self.mean.shape[0])
        height, width = image_size
        count = channels * height * width
        # No random numbers: the trial must not change those that follow.
        images = (
            (torch.arange(count) * 0.618034 % 1)
            .view(1, channels, height, width)
            .to(self.mean.dtype)
        )
        self.eval()  # keeps the statistics of batch normalisation
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                features = self.model.forward_features((images - self.mean) / self.std)
                self.channels_last = _channels_last(self.model, features)
                if isinstance(features, Tensor):
                    tokens, pooled = self(images)
        except (
            Exception
        ) as error:  # another library's code, with images that it may never have seen
            reason = one_line(error)[:160]
            raise UserError(
                f"timm:{name} does not take images of {height} x {width} pixels; it is made for"
                f" {native_size[1]} x {native_size[2]} ({reason})"
            ) from error
        finally:
            self.train()
        refusal = f"timm:{name} cannot be an encoder for images of {height} x {width} pixels: "
        if not isinstance(features, Tensor):
            raise UserError(
                f"{refusal}its features are a {type(features).__name__}, not one grid of tokens;"
                " choose another model"
            )
        if pooled.ndim != 2 or tokens.ndim != 3:
            raise UserError(
                f"{refusal}its feature has shape {tuple(pooled.shape)}, not (B, F); choose another"
                " model"
            )
        stride = _stride(self.model)
        if features.ndim == 3 and not _is_grid(tokens.shape[1], image_size, stride):
            raise UserError(
                f"{refusal}its {features.shape[1]} tokens do not form a grid over the image;"
                f" choose another model, or images of {native_size[1]} x {native_size[2]}"
            )
        patch = _patch_size(self.model, features, tokens.shape[1], image_size, stride)
        if height % patch[0] or width % patch[1]:
            fits = [
                f"{height // patch[0] * patch[0]} x {width // patch[1] * patch[1]}",
                f"{-(-height // patch[0]) * patch[0]} x {-(-width // patch[1]) * patch[1]}",
            ][min(height, width) < max(patch) :]
            raise UserError(
                f"{refusal}its patches of {patch[0]} x {patch[1]} would leave out pixels at the"
                f" bottom or right; give it images of {' or '.join(fits)}, or choose another model"
            )
        self.output_dim = int(pooled.shape[1])


def _create(timm: Any, name: str, image_size: tuple[int, int], pretrained: bool) -> Any:
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, img_size=image_size)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
    except (AssertionError, ArithmeticError, LookupError, RuntimeError, ValueError) as error:
        reason = message_of(error) or type(error).__name__
        own = timm.get_pretrained_cfg(name)
        size = f"; it is made for {own.input_size[1]} x {own.input_size[2]}" if own else ""
        raise UserError(
            f"timm:{name} does not take images of {image_size[0]} x {image_size[1]} pixels{size}"
            f" ({reason[:160]})"
        ) from error
    return timm.create_model(name, pretrained=pretrained, num_classes=0)  # convolutional: any size


@contextlib.contextmanager
def _offline_if_unreachable() -> Iterator[str]:
    """Use only the Hub's cache if the Hub is unreachable: its library would retry for a
    minute.

    Yields:
        Why weights cannot be downloaded; empty if the Hub is reachable.
    """
    try:
        from huggingface_hub import constants
    except ImportError:
        yield ""
        return
    host = urlsplit(constants.ENDPOINT).hostname or ""
    if constants.HF_HUB_OFFLINE or _reachable(host):
        yield ""
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield (
            f"{host} cannot be reached, and the cache in {constants.HF_HUB_CACHE} does not hold"
            " them"
        )
    finally:
        constants.HF_HUB_OFFLINE = False


def _reachable(host: str) -> bool:
    if any(
        os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    ):
        return True  # the proxy decides
    try:
        socket.create_connection((host, 443), timeout=_REACH_SECONDS).close()
    except OSError:
        return False
    return True


def _prefix_tokens(model: Any) -> int:
    """The tokens that a model puts before those of the image: CLS, distillation, registers."""
    known = getattr(model, "num_prefix_tokens", None)
    if known is not None:
        return int(known)
    return int(isinstance(getattr(model, "cls_token", None), Tensor))


def _channels_last(model: Any, features: Any) -> bool:
    """Whether a feature map is (B, H', W', D) rather than (B, D, H', W')."""
    if not isinstance(features, Tensor) or features.ndim != 4:
        return False
    width = getattr(model, "num_features", None)
    if (features.shape[1] == width) != (features.shape[3] == width):
        return bool(features.shape[3] == width)
    return str(getattr(model, "output_fmt", "")).endswith("NHWC")


def _is_grid(count: int, image_size: tuple[int, int], stride: int | None) -> bool:
    """Whether `count` tokens can form a grid of squares over the image, about as fine
    as the model's stride.
    """
    height, width = image_size
    if not any(
        count % w == 0 and abs(count // w * width - w * height) < max(height, width)
        for w in range(1, count + 1)
    ):
        return False
    return stride is None or 4 * count * stride**2 >= height * width


def _stride(model: Any) -> int | None:
    """Pixels between neighbouring tokens, if the model states it."""
    try:
        return int(model.feature_info[-1]["reduction"])
    except (AttributeError, IndexError, KeyError, TypeError):
        return None


def _patch_size(
    model: Any, features: Tensor, count: int, image_size: tuple[int, int], stride: int | None
) -> tuple[int, int]:
    """(H, W) of the patches that an image is cut into; (1, 1) if no pixel can be left over."""
    embed = getattr(model, "patch_embed", None)
    if getattr(embed, "dynamic_img_pad", False):
        return (1, 1)
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None and first.stride == first.kernel_size:
        return int(first.stride[0]), int(first.stride[1])
    if (
        features.ndim == 3
        and stride
        and count == (image_size[0] // stride) * (image_size[1] // stride)
    ):
        return stride, stride
    return (1, 1)
