"""Factories of networks that others wrote, as a user would write them for --model; small, and without downloads."""

from __future__ import annotations

from typing import NamedTuple

import monai.networks.nets
import segmentation_models_pytorch as smp
import torchvision.models.segmentation
from torch import nn


def smp_unet() -> nn.Module:
    return smp.Unet("resnet18", encoder_weights=None, decoder_channels=(64, 32, 16, 16, 8))


def smp_unet_plus_plus() -> nn.Module:
    return smp.UnetPlusPlus("resnet18", encoder_weights=None, decoder_channels=(64, 32, 16, 16, 8))


def smp_manet() -> nn.Module:
    return smp.MAnet("mobilenet_v2", encoder_weights=None, decoder_channels=(64, 32, 16, 16, 8))


def monai_unet() -> nn.Module:
    return monai.networks.nets.UNet(2, 3, 1, (8, 16, 32, 64), (2, 2, 2), num_res_units=2)


def monai_unet_with_dropout() -> nn.Module:
    return monai.networks.nets.UNet(2, 3, 1, (8, 16, 32, 64), (2, 2, 2), dropout=0.2)


def monai_basic_unet() -> nn.Module:
    return monai.networks.nets.BasicUNet(2, 3, 1, (8, 8, 16, 32, 64, 8))


def torchvision_deeplabv3() -> nn.Module:
    """Has dropout of its own; its logits lie under "out"."""
    return torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=1)


def torchvision_lraspp() -> nn.Module:
    return torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=1)


class Case(NamedTuple):
    """A network, the layer that Grad-CAM weighs, and where dropout is inserted; nowhere if empty."""

    factory: str
    target: str
    sites: tuple[str, ...] = ()


DEEP = "model.1.submodule.1.submodule.1.submodule"
CASES = (
    Case("smp_unet", "encoder.layer4", ("decoder.center", *(f"decoder.blocks.{i}" for i in range(4)))),
    Case("smp_unet_plus_plus", "encoder.layer4", ("encoder.layer4", *(f"decoder.blocks.x_0_{i}" for i in range(4)))),
    Case("smp_manet", "encoder.features.18", ("decoder.center", *(f"decoder.blocks.{i}" for i in range(4)))),
    Case("monai_unet", DEEP, (DEEP, "model.1.submodule.1.submodule", "model.1.submodule")),
    Case("monai_unet_with_dropout", DEEP),
    Case("monai_basic_unet", "down_4", ("down_4", "upcat_4", "upcat_3", "upcat_2")),
    Case("torchvision_deeplabv3", "backbone.16"),
    Case("torchvision_deeplabv3", "backbone.3", ("classifier.3",)),
    Case("torchvision_lraspp", "backbone.12", ("classifier.cbr",)),
)
