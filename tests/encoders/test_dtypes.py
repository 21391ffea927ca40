"""Encoders of other dtypes: `.half()`, `.bfloat16()`, `.double()`."""

from __future__ import annotations

import copy

import pytest
import torch

from fibopolicy.encoders import build_encoder

TOLERANCE = {torch.float16: 0.01, torch.bfloat16: 0.05, torch.float64: 1e-4}
ENCODERS = [
    *(
        ("fibottention_vit_tiny", {"pool": pool})
        for pool in ("cls", "mean", "keypoints", "cls+keypoints")
    ),
    *(
        (f"{name}_vit_tiny", {})
        for name in ("local", "random", "dilated", "bigbird", "shared", "unpermuted")
    ),
    ("vit_tiny", {"stem": "conv"}),
    ("vit_tiny", {"num_views": 2}),
    ("released_robot", {"depth": 1, "width": 96}),
    ("resnet18", {}),
    ("timm:test_vit", {}),
    ("timm:test_resnet", {}),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("name", "options"), ENCODERS)
def test_an_encoder_computes_in_its_dtype(
    name: str, options: dict[str, object], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(name, image_size=(48, 48), **options).eval()
    images = torch.rand(2, 2, 3, 48, 48) if "num_views" in options else torch.rand(2, 3, 48, 48)
    expected = encoder(images)
    other = copy.deepcopy(encoder).to(dtype)
    for given in (images, images.to(dtype)):
        got = other(given)
        for result, wanted in zip(got, expected, strict=True):
            assert result.dtype == dtype
            assert (result.float() - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()
    got[1].square().mean().backward()
    grads = [p.grad for p in other.parameters() if p.grad is not None]
    assert grads
    assert all(grad.isfinite().all() for grad in grads)
