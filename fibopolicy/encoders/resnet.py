"""ResNet-18 with spatial softmax, as in robomimic."""

from __future__ import annotations

from torch import Tensor, nn

from fibopolicy.encoders.base import Encoder, check_image_size, register_encoder
from fibopolicy.encoders.pooling import SpatialSoftmax
from fibopolicy.utils.imports import make_torchvision_importable


@register_encoder("resnet18")
class ResNet18(Encoder):
    """robomimic's image encoder: ResNet-18 without its last two layers, 32 keypoints, a
    linear layer to 64 features.

    Args:
        image_size: (H, W), pixels; at least 32.
        keypoints: K.
        feature_dim: F.
    """

    ends_linear = True

    def __init__(
        self, *, image_size: tuple[int, int], keypoints: int = 32, feature_dim: int = 64
    ) -> None:
        super().__init__()
        check_image_size(image_size)
        self.image_size = image_size
        make_torchvision_importable()
        from torchvision.models import resnet18

        self.backbone = nn.Sequential(*list(resnet18(weights=None).children())[:-2])
        grid = (-(-image_size[0] // 32), -(-image_size[1] // 32))
        self.keypoints = SpatialSoftmax(512, grid, keypoints)
        self.project = nn.Linear(2 * keypoints, feature_dim)
        self.output_dim = feature_dim

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(images.to(self.project.weight.dtype))  # (B, 512, H / 32, W / 32)
        return features.flatten(2).transpose(1, 2), self.project(self.keypoints(features))
