"""A small residual network for small images on few CPU cores."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class SmallBackbone(nn.Module):
    """A residual network of 0.7 million weights for images of 16 to 64 pixels on two CPU cores.

    The stages have the names of torchvision's ResNets, with one basic block each. A forward pass at 32 pixels is 6 M
    multiply-adds. Memory bounds a step, so the first convolution already halves the image.

    Args:
        norm: makes a normalization of so many channels.
        width: number of features, a multiple of 8; the stages have an eighth, a quarter, a half and all of them.
    """

    width = 192

    def __init__(self, norm: Callable[[int], nn.Module], width: int = width) -> None:
        super().__init__()
        self.width = width
        first, second, third = width // 8, width // 4, width // 2
        self.conv1 = nn.Conv2d(3, first, 3, stride=2, padding=1, bias=False)
        self.bn1 = norm(first)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _Block(first, second, norm)
        self.layer2 = _Block(second, third, norm)
        self.layer3 = _Block(third, width, norm)
        self.avgpool = nn.AdaptiveAvgPool2d(1)

    def forward(self, images_bchw: Tensor) -> Tensor:
        """Compute features (b, width) of normalized images."""
        x = self.relu(self.bn1(self.conv1(images_bchw)))
        x = self.layer3(self.layer2(self.layer1(x)))
        pooled: Tensor = self.avgpool(x)
        return pooled.flatten(1)


class _Block(nn.Module):
    """A basic residual block that halves the image."""

    def __init__(self, channels_in: int, channels_out: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, 2, padding=1, bias=False)
        self.bn1 = norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = norm(channels_out)
        self.downsample = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 1, 2, bias=False), norm(channels_out)
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + self.downsample(x))  # type: ignore[no-any-return]
