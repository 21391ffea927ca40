"""A custom encoder, named as "module:function"."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fibopolicy.encoders import build_encoder
from fibopolicy.encoders.base import encoder_settings
from fibopolicy.errors import UserError

SOURCE = """
import torch
from fibopolicy.encoders import Encoder

class Mean(Encoder):
    def __init__(self, *, image_size, width=3):
        super().__init__()
        self.output_dim = 3 * width

    def forward(self, images):
        return images.flatten(2).transpose(1, 2), images.mean(dim=(2, 3)).repeat(1, self.output_dim // 3)

def make(*, image_size, width=2):
    return Mean(image_size=image_size, width=width)

def wide(*, image_size, **options):
    return Mean(image_size=image_size, **options)

def linear(*, image_size):
    return torch.nn.Linear(3, 3)

def other(size):
    return size
"""  # noqa: E501


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "custom_encoder.py").write_text(SOURCE)
    (tmp_path / "broken_encoder.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "custom_encoder", raising=False)


@pytest.mark.usefixtures("here")
def test_a_function_and_a_class_are_found_in_the_current_folder() -> None:
    before = list(sys.path)
    assert build_encoder("custom_encoder:make", image_size=(8, 8))(torch.rand(4, 3, 8, 8))[
        1
    ].shape == (4, 6)
    assert build_encoder("custom_encoder:Mean", image_size=(8, 8), width=1)(torch.rand(4, 3, 8, 8))[
        1
    ].shape == (4, 3)
    assert sys.path == before


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "custom_encoder:mke",
            "custom_encoder:mke: .*custom_encoder.py has no mke, did you mean make\\?",
        ),
        ("custom_encoders:make", "custom_encoders:make: there is no module custom_encoders"),
        ("tmm:resnet18", "did you mean 'timm:resnet18'"),
        ("broken_encoder:make", "importing broken_encoder fails: ZeroDivisionError"),
        ("custom_encoder:", "expected timm:<name> or <module>:<name>"),
        (
            "custom_encoder:linear",
            "must be a fibopolicy.encoders.Encoder with an output_dim, got Linear",
        ),
        ("custom_encoder:other", "takes image_size"),
        ("os:system", "takes image_size"),
        ("custom_encoder:torch", "takes image_size"),
    ],
)
def test_an_invalid_encoder_is_a_one_line_error(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build_encoder(name, image_size=(8, 8))
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("here")
def test_an_option_that_it_does_not_take_gets_a_suggestion() -> None:
    with pytest.raises(UserError, match="did you mean 'width'"):
        build_encoder("custom_encoder:make", image_size=(8, 8), widht=3)


@pytest.mark.usefixtures("here")
def test_options_may_be_passed_on() -> None:
    assert encoder_settings("custom_encoder:wide", width=4) == {"width": 4}
    built = build_encoder("custom_encoder:wide", image_size=(8, 8), width=4)
    assert built.output_dim == 12
    with pytest.raises(UserError, match=r"custom_encoder:wide cannot be built with .*widht"):
        build_encoder("custom_encoder:wide", image_size=(8, 8), widht=4)
