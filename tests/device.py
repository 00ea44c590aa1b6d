"""Where the tests of network, maps, training and counting compute: ``TEST_DEVICE=cuda`` for a GPU, else the CPU."""

from __future__ import annotations

import os

import torch

DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cpu"))
