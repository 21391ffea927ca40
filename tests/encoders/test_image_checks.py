"""An encoder takes the images it was built for and rejects others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fibopolicy.encoders import Encoder, build_encoder
from fibopolicy.encoders.vit import ViT
from fibopolicy.errors import UserError

OPTIONS: dict[str, dict[str, Any]] = {
    "vit_tiny": {"width": 24, "depth": 1, "num_heads": 2},
    "fibottention_vit_tiny": {"width": 24, "depth": 1, "num_heads": 2},
    "resnet18": {},
}


class Mean(Encoder):
    """A custom encoder without checks."""

    def __init__(self, *, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.net, self.output_dim = nn.Linear(3, 4), 4

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.net(images.flatten(2).transpose(1, 2))
        return tokens, tokens.mean(dim=1)


@pytest.fixture(scope="module")
def encoders() -> dict[str, Encoder]:
    built = {
        name: build_encoder(name, image_size=(36, 48), **options).eval()
        for name, options in OPTIONS.items()
    }
    return {**built, "mine": build_encoder(f"{__name__}:Mean", image_size=(36, 48))}


@settings(max_examples=80, derandomize=True)
@given(
    shape=st.lists(st.sampled_from([1, 2, 3, 36, 48, 96]), min_size=1, max_size=5).map(tuple),
    right=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.uint8, torch.int64, torch.bool]),
)
def test_images_are_encoded_unchanged_or_rejected(
    encoders: dict[str, Encoder], shape: tuple[int, ...], right: bool, dtype: torch.dtype
) -> None:
    shape = (2, 3, 36, 48) if right else shape
    for encoder in encoders.values():
        images = torch.zeros((), dtype=dtype).expand(shape)  # takes no memory
        if shape[1:] == (3, 36, 48) and dtype == torch.float32:
            assert encoder(images)[1].shape == (shape[0], encoder.output_dim)
        else:
            with pytest.raises(UserError, match=r"was built for images|expects images as floats"):
                encoder(images)


@pytest.mark.parametrize("name", [*OPTIONS, "mine"])
def test_a_larger_image_is_not_cropped(encoders: dict[str, Encoder], name: str) -> None:
    with pytest.raises(
        UserError,
        match=r"built for images \(B, 3, 36, 48\), got \(1, 3, 48, 60\); resize the images",
    ):
        encoders[name](torch.rand(1, 3, 48, 60))


def test_joint_views_have_a_separate_dimension() -> None:
    encoder = ViT(image_size=(24, 24), num_views=2, width=24, depth=1, num_heads=2)
    assert encoder(torch.rand(2, 2, 3, 24, 24))[1].shape == (2, encoder.output_dim)
    for shape in ((2, 3, 24, 24), (2, 3, 3, 24, 24)):
        with pytest.raises(UserError, match=r"built for images \(B, 2, 3, 24, 24\)"):
            encoder(torch.rand(shape))


def test_scripting_is_rejected_with_alternatives(encoders: dict[str, Encoder]) -> None:
    for module in (encoders["fibottention_vit_tiny"], nn.Sequential(encoders["resnet18"])):
        with pytest.raises(
            UserError,
            match=r"torch\.jit\.script cannot compile .*; use torch\.compile, torch\.export",
        ):
            torch.jit.script(module)


def test_a_program_for_onnx_holds_no_operator_of_ours(
    encoders: dict[str, Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, images = encoders["fibottention_vit_tiny"], torch.rand(1, 3, 36, 48)
    assert "fibopolicy::" in str(torch.jit.trace(encoder, images).inlined_graph)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert "fibopolicy::" not in str(torch.jit.trace(encoder, images).inlined_graph)
