"""Images to tokens and features."""

from fibopolicy.encoders import efficientnet, resnet, vit  # noqa: F401
from fibopolicy.encoders.base import Encoder, build_encoder, encoder_names, register_encoder
from fibopolicy.encoders.pooling import SpatialSoftmax

__all__ = [
    "Encoder",
    "SpatialSoftmax",
    "build_encoder",
    "encoder_names",
    "register_encoder",
]
