"""Small U-Nets and images for the tests of the maps, networks of a user's, and the masks' description in NumPy."""

from __future__ import annotations

import hashlib
import math
from typing import Any, Callable

import numpy as np
import torch
import torch.nn.functional as F
from device import DEVICE
from numpy.typing import NDArray
from torch import nn

from model import UNet

HEIGHT, WIDTH = 48, 80
SEED = 7
MAPS = ("mean_prediction", "pred_variance", "saliency_variance", "expected_entropy")


def unet(upsampling: str = "bilinear", dropout: float = 0.2, seed: int = SEED, width: int = 4) -> UNet:
    """A U-Net that is nobody's special case: moved statistics, affine batch norms, logits that spread."""
    torch.manual_seed(seed)
    model = UNet(width=width, dropout=dropout, upsampling=upsampling)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.8)
            nn.init.normal_(module.bias, 0, 0.3)
        elif isinstance(module, nn.Conv2d):
            module.weight.data.mul_(1.6)
    model.head.weight.data.mul_(3.0)
    return model.eval().to(DEVICE)


def pictures(count: int = 2, height: int = HEIGHT, width: int = WIDTH, seed: int = 1) -> torch.Tensor:
    """Noise, float32 (count, 3, height, width)."""
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def numpy_mask(seed: int, image_id: str, t: int, site: int, shape: tuple[int, ...], p: float) -> torch.Tensor:
    """The keep-mask in unsigned NumPy arithmetic, from the description alone."""

    def mix(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
        x = (x * np.uint32(0x2C1B3C6D)).astype(np.uint32)
        x = ((x ^ (x >> np.uint32(15))) * np.uint32(0x297A2D39)).astype(np.uint32)
        mixed: NDArray[np.uint32] = x ^ (x >> np.uint32(15))
        return mixed

    digest = hashlib.sha256(f"{seed}|{image_id}|{t}|{site}".encode()).digest()
    key = np.uint32(int.from_bytes(digest[:4], "little"))
    mixed = mix(mix(np.arange(1, math.prod(shape) + 1, dtype=np.uint32)) ^ key)
    # the comparison is one of signed integers, whose smallest stands for zero
    return torch.from_numpy(mixed.view(np.int32).astype(np.int64) + 2**31 >= round(p * 2**32)).view(shape).to(DEVICE)


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest deviation over the largest expected value of each image; the worst image.

    A variance can be zero at a pixel where rounding is not, so the scale of
    the deviation is the map's, not the pixel's.
    """
    deviation = (value.double() - expected.double()).abs().flatten(1).amax(1)
    return float((deviation / expected.double().abs().flatten(1).amax(1)).max())


# ---------------------------------------------------------------- networks of a user's, as --model names them


def block(channels_in: int, channels_out: int) -> nn.Sequential:
    """Convolution, batch norm, and a ReLU that works in place, as most have."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True)
    )


class SmallNet(nn.Module):
    """Two resolutions below that of the image, skips by concatenation, and weights that no logit depends on."""

    def __init__(self, dropout: nn.Module | None = None) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = block(3, 4), block(4, 6), block(6, 8)
        self.dropout = dropout or nn.Identity()
        self.up2, self.up1 = block(14, 6), block(10, 4)
        self.head, self.auxiliary = nn.Conv2d(4, 1, 1), nn.Conv2d(8, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        three = self.dropout(self.bottom(F.max_pool2d(two, 2)))
        self.auxiliary(three)
        two = self.up2(torch.cat([two, F.interpolate(three, scale_factor=2)], 1))
        return self.head(self.up1(torch.cat([one, F.interpolate(two, scale_factor=2)], 1)))


def plain() -> nn.Module:
    """Without dropout."""
    return SmallNet()


def with_dropout() -> nn.Module:
    """Dropout of whole feature maps at the bottleneck."""
    return SmallNet(nn.Dropout2d(0.3))


class Returning(nn.Module):
    """A network whose logits come in something else."""

    def __init__(self, wrap: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.wrap = SmallNet(nn.Dropout(0.3)), wrap

    def forward(self, x: torch.Tensor) -> Any:
        return self.wrap(self.inner(x))


def in_a_dictionary() -> nn.Module:
    return Returning(lambda z: {"aux": z * 0, "out": z})


def under_another_key() -> nn.Module:
    return Returning(lambda z: {"features": z.expand(-1, 3, -1, -1), "mask": z[:, 0]})


def in_a_tuple() -> nn.Module:
    return Returning(lambda z: (z.mean((2, 3)), z))


def unet_without_dropout() -> nn.Module:
    """This project's network, whose dropout is to be inserted."""
    return UNet(4, 0.0)
