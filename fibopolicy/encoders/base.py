"""The encoder contract and the registry of encoders by name."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from fibopolicy.errors import UserError, message_of, unknown
from fibopolicy.utils.imports import import_object, is_import_path
from fibopolicy.utils.registry import Registry


class Encoder(nn.Module, ABC):
    """Images to features.

    `forward` takes `(B, 3, H, W)` of any float dtype in [0, 1] and returns tokens `(B,
    N, D)` and a pooled feature `(B, F)`, where F is `output_dim`, both in the module's
    dtype (`.half()`, `.bfloat16()`, `.double()`). Encoders built with `num_views` = V >
    1 take `(B, V, 3, H, W)`: the views share one token sequence. Images of another
    shape or type raise a `UserError`.

    Attributes:
        image_size: (H, W) in pixels; `build_encoder` sets it if the encoder does not.
    """

    output_dim: int
    image_size: tuple[int, int] | None = None
    num_views: int = 1
    #: Whether the feature is the output of a linear layer, so that a policy needs none
    #: before an activation.
    ends_linear: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        # Checked before every forward pass, so that no encoder, custom ones included,
        # silently crops or stretches images that it was not built for.
        self.register_forward_pre_hook(_check_images)

    @abstractmethod
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]: ...

    def __prepare_scriptable__(self) -> Encoder:
        """Called by torch.jit.script, also for submodules."""
        raise UserError(
            f"torch.jit.script cannot compile {type(self).__name__}; use torch.compile,"
            " torch.export or torch.jit.trace"
        )

    def checkpoint_gradients(self) -> None:
        """Switch on gradient checkpointing: recompute activations in the backward pass
        instead of storing them. Gradients stay the same.

        Raises:
            UserError: the encoder does not support it, which is the default.
        """
        raise UserError(
            f"{type(self).__name__} does not support gradient checkpointing; leave the option out"
        )


def _check_images(encoder: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Raises `UserError` for images that an encoder was not built for."""
    size, views = cast(Encoder, encoder).image_size, cast(Encoder, encoder).num_views
    if size is None or not arguments or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return
    images = arguments[0]
    if not isinstance(images, Tensor) or not images.dtype.is_floating_point:
        found = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise UserError(
            f"{type(encoder).__name__} expects images as floats in [0, 1], got {found};"
            " divide uint8 frames by 255"
        )
    shape = tuple(images.shape)
    if shape[-3:] != (3, *size) or not (
        (len(shape) == 4 and views == 1) or (len(shape) == 5 and shape[1] == views)
    ):
        expected = ("B", *([views] if views > 1 else []), 3, *size)
        raise UserError(
            f"{type(encoder).__name__} was built for images ({', '.join(map(str, expected))}), got"
            f" {shape}; resize the images, or build it for their size"
        )


EncoderFactory = Callable[..., Encoder]
F = TypeVar("F", bound=EncoderFactory)

ENCODERS: Registry[EncoderFactory] = Registry("encoder")
#: timm has too many models to register; it is imported on first use.
TIMM: Registry[EncoderFactory] = Registry(
    "encoder", lazy={"timm": "fibopolicy.encoders.timm:TimmEncoder"}
)


def register_encoder(name: str, **defaults: Any) -> Callable[[F], F]:
    """Decorator: register a factory, with other defaults for some options.

    The factory takes `image_size=(H, W)` and its options, all by keyword, and returns
    an `Encoder`.
    """

    def add(factory: F) -> F:
        ENCODERS.register(name)(functools.partial(factory, **defaults))
        return factory

    return add


def encoder_names() -> tuple[str, ...]:
    return ENCODERS.names()


def build_encoder(name: str, *, image_size: tuple[int, int], **options: Any) -> Encoder:
    """Build a registered encoder.

    Args:
        name: one of `encoder_names()`, "timm:" and the name of a timm model, or
            "module:function": a custom function or class that takes `image_size` and
            its options by keyword (`**options` for any) and returns an `Encoder`. Its
            module is imported from Python's path, or else from the current folder.
        image_size: (H, W), pixels.
        options: options of the encoder, e.g. `depth=4`.

    Raises:
        UserError: an unknown name or option (the nearest match is suggested), a value
            that the encoder rejects, or a custom function that cannot be imported or
            does not return an `Encoder`.
    """
    known = encoder_options(name)
    kinds = [p.kind for p in inspect.signature(_factory(name)).parameters.values()]
    for option, value in options.items():
        if option not in known and inspect.Parameter.VAR_KEYWORD not in kinds:
            raise unknown(f"option of encoder {name}:", option, known)
        # a typing error, such as a depth that would take hours to build
        if type(value) is int and abs(value) > 1 << 16:
            raise UserError(f"encoder {name}: {option} must be at most {1 << 16}, got {value}")
    try:
        encoder = _factory(name)(image_size=image_size, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = message_of(error)
        raise UserError(
            f"encoder {name} cannot be built with {options or 'its defaults'}: {reason}"
        ) from error
    if not isinstance(encoder, Encoder) or not hasattr(encoder, "output_dim"):
        raise UserError(
            f"encoder {name} must be a fibopolicy.encoders.Encoder with an output_dim, got"
            f" {type(encoder).__name__}"
        )
    if encoder.image_size is None:
        encoder.image_size = (image_size[0], image_size[1])
        encoder.num_views = int(options.get("num_views", 1))
    return encoder


def encoder_options(name: str) -> tuple[str, ...]:
    """The options that an encoder takes besides `image_size`."""
    return tuple(_parameters(name))


def encoder_settings(name: str, **options: Any) -> dict[str, Any]:
    """Every option with the value that `build_encoder` would give it."""
    defaults = {option: p.default for option, p in _parameters(name).items()}
    settings = {**defaults, **options}
    return {k: v for k, v in settings.items() if v is not inspect.Parameter.empty}


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    fixed = ("image_size", "name") if name.startswith("timm:") else ("image_size",)
    parameters = inspect.signature(_factory(name)).parameters
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {n: p for n, p in parameters.items() if n not in fixed and p.kind not in several}


def _factory(name: str) -> EncoderFactory:
    if name.startswith("timm:"):
        return functools.partial(TIMM["timm"], name=name.removeprefix("timm:"))
    if is_import_path(name):
        return _custom_factory(name)
    if name not in ENCODERS:
        raise unknown("encoder", name, (*ENCODERS.names(), "timm:<name>", "<module>:<name>"))
    return ENCODERS[name]


def _custom_factory(name: str) -> EncoderFactory:
    found = import_object("encoder", name, ["timm"])
    # A configuration may name any callable. One with this parameter is meant as an
    # encoder.
    try:
        parameters = inspect.signature(found).parameters
    except (TypeError, ValueError):  # not callable, or a built-in without a signature
        parameters = inspect.Signature().parameters
    if "image_size" not in parameters:
        raise UserError(
            f"encoder {name}: expected a function or class that takes image_size=(H, W) by keyword"
            " and returns an Encoder"
        )
    factory: EncoderFactory = found
    return factory


def check_image_size(image_size: tuple[int, int]) -> None:
    if len(image_size) != 2 or min(image_size) < 1:
        raise UserError(f"image_size must be (height, width) in pixels, got {image_size}")
