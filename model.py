"""The U-Net, from four small parts, and its dropout sites.

Shapes: B batch, C channels, H W height and width.

Reference: Ronneberger, Fischer, Brox, "U-Net: Convolutional Networks for
Biomedical Image Segmentation", MICCAI 2015; dropout as a Bayesian
approximation: Gal and Ghahramani, ICML 2016.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

UPSAMPLINGS = ("bilinear", "transposed")


class DoubleConv(nn.Sequential):
    """(3 x 3 convolution, batch norm, ReLU) twice; height and width are kept."""

    def __init__(self, channels_in: int, channels_out: int, channels_between: int | None = None) -> None:
        between = channels_between or channels_out
        super().__init__(
            # no bias: the batch norm that follows would subtract it again
            nn.Conv2d(channels_in, between, 3, padding=1, bias=False),
            nn.BatchNorm2d(between),
            nn.ReLU(),
            nn.Conv2d(between, channels_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
        )


class Encoder(nn.Sequential):
    """2 x 2 max pooling, then a double convolution: (B, C, H, W) to (B, C', H/2, W/2)."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(nn.MaxPool2d(2), DoubleConv(channels_in, channels_out))


class Decoder(nn.Module):
    """Upsample, concatenate the skip connection in front, double convolution, dropout.

    The dropout site is ``nn.Identity`` where ``dropout`` is 0.
    """

    def __init__(
        self, channels_in: int, channels_skip: int, channels_out: int, upsampling: str, dropout: float
    ) -> None:
        super().__init__()
        if upsampling == "bilinear":
            self.up: nn.Module = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
            channels_up = channels_in
        else:
            channels_up = channels_in // 2
            self.up = nn.ConvTranspose2d(channels_in, channels_up, kernel_size=2, stride=2)
        self.convolutions = DoubleConv(
            channels_skip + channels_up, channels_out, (channels_skip + channels_up) // 2
        )
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """x (B, C, H/2, W/2), skip (B, C_skip, H, W) -> (B, C_out, H, W)."""
        y: Tensor = self.dropout(self.convolutions(torch.cat([skip, self.up(x)], dim=1)))
        return y


class UNet(nn.Module):
    """Four encoder blocks, a bottleneck, four decoder blocks, one logit per pixel.

    Dropout acts after the bottleneck and after every decoder block but the
    last. Nothing in front of the bottleneck's dropout is stochastic.

    Args:
        width: channels of the first block; the encoder has ``width * (1, 2, 4, 8)``.
        dropout: probability in [0, 1) that an element is dropped.
        upsampling: "bilinear" (the bottleneck has ``8 * width`` channels) or
            "transposed" (a learnt 2 x 2 transposed convolution, ``16 * width``).
        channels_in: image channels.

    ``forward`` takes float (B, channels_in, H, W) with H and W multiples of 16
    and returns float logits (B, 1, H, W).

    Raises:
        ValueError: an argument is out of range, or H or W no multiple of 16.

    Example:
        >>> UNet(width=2)(torch.zeros(1, 3, 32, 48)).shape
        torch.Size([1, 1, 32, 48])
    """

    def __init__(
        self, width: int = 64, dropout: float = 0.2, upsampling: str = "bilinear", channels_in: int = 3
    ) -> None:
        super().__init__()
        if width < 2 or width % 2:
            raise ValueError(f"width must be an even number of at least 2, not {width}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {dropout}")
        if upsampling not in UPSAMPLINGS:
            raise ValueError(f"upsampling must be one of {UPSAMPLINGS}, not {upsampling!r}")
        self.options = {
            "width": width, "dropout": dropout, "upsampling": upsampling, "channels_in": channels_in
        }
        w1, w2, w3, w4 = (width * factor for factor in (1, 2, 4, 8))
        bilinear = upsampling == "bilinear"
        # bilinear upsampling keeps its channels, so each block below a skip ends on that skip's width
        deep = w4 if bilinear else 2 * w4
        o4, o3, o2 = (w3, w2, w1) if bilinear else (w4, w3, w2)
        self.encoder1 = DoubleConv(channels_in, w1)
        self.encoder2 = Encoder(w1, w2)
        self.encoder3 = Encoder(w2, w3)
        self.encoder4 = Encoder(w3, w4)
        self.bottleneck = Encoder(w4, deep)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.decoder4 = Decoder(deep, w4, o4, upsampling, dropout)
        self.decoder3 = Decoder(o4, w3, o3, upsampling, dropout)
        self.decoder2 = Decoder(o3, w2, o2, upsampling, dropout)
        self.decoder1 = Decoder(o2, w1, w1, upsampling, 0.0)
        self.head = nn.Conv2d(w1, 1, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, channels_in, H, W) to logits (B, 1, H, W)."""
        height, width = x.shape[-2:]
        if height % 16 or width % 16:
            raise ValueError(f"height and width must be multiples of 16, not {height} x {width}")
        skip1 = self.encoder1(x)  # (B, w, H, W)
        skip2 = self.encoder2(skip1)  # (B, 2w, H/2, W/2)
        skip3 = self.encoder3(skip2)  # (B, 4w, H/4, W/4)
        skip4 = self.encoder4(skip3)  # (B, 8w, H/8, W/8)
        x = self.dropout(self.bottleneck(skip4))  # (B, 8w or 16w, H/16, W/16)
        x = self.decoder4(x, skip4)
        x = self.decoder3(x, skip3)
        x = self.decoder2(x, skip2)
        x = self.decoder1(x, skip1)
        logits: Tensor = self.head(x)  # (B, 1, H, W)
        return logits
