"""Seeded dropout masks from a counter-based generator: the same bits on every device and in any order.

Shapes: K masks, T passes, B images, C channels, h w pixels of a feature map.

Reference: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC
2011 (generators that map a counter and a key to a random number, without state).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
from collections.abc import Sequence
from typing import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from runtime.devices import sent

# ---------------------------------------------------------------- the generator


def mask_key(seed: int, image_id: str, pass_index: int, site: int) -> int:
    """The key of one dropout mask, as a signed 32-bit integer.

    It is a SHA-256 of the four arguments: masks of different seeds, images,
    passes and sites are unrelated, and none depends on what else is computed.

    Args:
        seed: of the whole computation.
        image_id: names the image.
        pass_index: t, from 0 to T - 1.
        site: number of the dropout site, from 0, in the order of the forward pass.

    Example:
        >>> mask_key(42, "ISIC_0000000", 0, 0)
        671115121
    """
    digest = hashlib.sha256(f"{seed}|{image_id}|{pass_index}|{site}".encode()).digest()
    return int.from_bytes(digest[:4], "little", signed=True)


def _mix(x: Tensor) -> Tensor:
    """A bijection of the 32-bit integers that scatters neighbours; works in place.

    Multiplication by an odd constant and xor with its own upper half, twice:
    the construction of MurmurHash3's finaliser. Products wrap around. The
    mask after ``>>`` makes the shift of a signed integer a logical one,
    without which the step would lose the sign bit.
    """
    x.mul_(0x2C1B3C6D)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(0x297A2D39)
    return x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF))


def mask_noise(shape: Sequence[int], device: torch.device) -> Tensor:
    """The part of the masks' random numbers that depends on the position alone.

    Args:
        shape: of one mask.
        device: where the masks are needed.

    Returns:
        int32 ``shape``: the mixed numbers 1, 2, 3, ... in row-major order.
    """
    count = 1
    for length in shape:
        count *= length
    return _mix(torch.arange(1, count + 1, dtype=torch.int32, device=device)).view(*shape)


def dropout_masks(keys: Tensor, noise: Tensor, p: float) -> Tensor:
    """Masks of the elements to keep, one for each key.

    Element i of the mask with key k is kept when ``mix(noise_i xor k)``, an
    integer uniform over 32 bits, is at least ``p * 2^32``.

    Args:
        keys: int32 (K,), from :func:`mask_key`.
        noise: int32, from :func:`mask_noise`.
        p: probability of dropping an element, in [0, 1).

    Returns:
        bool (K, *noise.shape), True with probability 1 - p.

    Example:
        >>> keys = torch.tensor([mask_key(42, "ISIC_0000000", t, 0) for t in range(2)], dtype=torch.int32)
        >>> dropout_masks(keys, mask_noise((4,), keys.device), 0.5)
        tensor([[False, False, False,  True],
                [ True, False, False, False]])
    """
    return _mix(keys.view(-1, *[1] * noise.dim()) ^ noise) >= _bound(p)


def _bound(p: float) -> int:
    """``p * 2^32``, counted from the smallest signed integer."""
    return min(round(p * 2**32), 2**32 - 1) - 2**31


def zero_dropped(x: Tensor, keys: Tensor, noise: Tensor, p: float) -> Tensor:
    """``x * dropout_masks(keys, noise, p)``, in place.

    Args:
        x: float (K, C, h, w), of any memory format.
        keys: int32 (K,).
        noise: int32 (1, C, h, w), best in the memory format of x.
        p: as in :func:`dropout_masks`.

    Returns:
        x itself.
    """
    if x.is_cuda:
        fused, layout = _fused(), torch.channels_last
        if fused is not None and x.is_contiguous(memory_format=layout) and noise.is_contiguous(memory_format=layout):
            fused(x, keys, noise, _bound(p))
            return x
    if not x.is_cpu:
        return x.masked_fill_(_mix(keys.view(-1, 1, 1, 1) ^ noise) < _bound(p), 0)
    if x.dtype != torch.float32:
        return x.copy_(zero_dropped(x.float(), keys, noise, p))
    # The threshold operator, zero where the random number is at most bound - 1, on the bits of x taken as
    # integers: one vectorised sweep, where a comparison and a product with booleans cost many times as much.
    mixed, bits = _mix(keys.view(-1, 1, 1, 1) ^ noise), x.view(torch.int32)
    torch.ops.aten.threshold_backward.grad_input(bits, mixed, max(_bound(p) - 1, -(2**31)), grad_input=bits)
    return x


@functools.cache
def _fused() -> Callable[[Tensor, Tensor, Tensor, int], None] | None:
    """:func:`zero_dropped` on CUDA in one sweep; None where Triton, or the C compiler that it needs, is missing or fails."""
    compiler = any(shutil.which(name) for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name)
    if not compiler or importlib.util.find_spec("triton") is None:
        return None
    from inference.fused_masks import zero_dropped_fused  # Triton is not everywhere

    return zero_dropped_fused if not torch.cuda.is_available() or _agrees(zero_dropped_fused) else None


def _agrees(fused: Callable[[Tensor, Tensor, Tensor, int], None]) -> bool:
    """Whether the kernel, compiled for the card that is here, drops what the plain operators drop."""
    keys = torch.arange(-3, 3, dtype=torch.int32, device="cuda")
    noise = mask_noise((1, 8, 5, 5), keys.device).contiguous(memory_format=torch.channels_last)
    tried = torch.ones(len(keys), 8, 5, 5, device="cuda").contiguous(memory_format=torch.channels_last)
    try:
        fused(tried, keys, noise, _bound(0.5))
    except Exception:  # whatever a compiler or a driver raises: the plain operators need neither
        return False
    return torch.equal(tried != 0, dropout_masks(keys, noise[0], 0.5))


# ---------------------------------------------------------------- masks at the dropout sites


class MaskSource:
    """Seeded masks for the dropout modules of any model, one image at a time.

    A site is numbered by when the forward pass reaches it, so :meth:`start`
    must be called before each forward.

    Args:
        seed: of the masks.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.image_id, self.passes, self.site = "", range(0), 0
        self._drawn, self._sites = range(0), 0  # whose keys are there; sites of the forward passes so far
        self._keys: dict[tuple[int, torch.device], Tensor] = {}
        self._noise: dict[tuple[torch.Size, torch.device], Tensor] = {}

    def start(self, image_id: str, passes: range, total: int | None = None) -> None:
        """Begin a forward whose batch axis is ``passes`` of one image.

        Args:
            image_id: names the image.
            passes: of this forward.
            total: passes of all forwards of the image, whose keys are drawn, and sent to the device, together.
        """
        drawn = passes if total is None else range(total)
        if (image_id, drawn) != (self.image_id, self._drawn):
            self._keys.clear()
        self.image_id, self.passes, self.site, self._drawn = image_id, passes, 0, drawn

    def _next_keys(self, device: torch.device) -> Tensor:
        """The keys int32 (K,) of this forward's passes at the next site."""
        site, self.site = self.site, self.site + 1
        self._sites = max(self._sites, self.site)
        if (site, device) not in self._keys:
            ahead = range(site, self._sites)  # as many as other images had
            keys = [[mask_key(self.seed, self.image_id, t, s) for t in self._drawn] for s in ahead]
            rows = sent(torch.tensor(keys, dtype=torch.int32), device)
            self._keys.update({(s, device): row for s, row in zip(ahead, rows)})
        first = self._drawn.start
        return self._keys[site, device][self.passes.start - first : self.passes.stop - first]

    def _position_noise(self, shape: torch.Size, device: torch.device) -> Tensor:
        if (shape, device) not in self._noise:
            self._noise[shape, device] = mask_noise(shape, device)
        return self._noise[shape, device]

    def apply(self, module: _DropoutNd, x: Tensor) -> Tensor:
        """What the module would return for x (K, ...), under the masks of the next site.

        The first axis may hold several rows per pass, as of the windows of an attention.

        Raises:
            ValueError: it holds no whole number of rows per pass.
        """
        if len(x) != len(self.passes):
            if len(x) % len(self.passes):
                raise ValueError(
                    f"dropout on {tuple(x.shape)} in a batch of {len(self.passes)}: its first axis is not that of the images"
                )
            return self.apply(module, x.unflatten(0, (len(self.passes), -1))).flatten(0, 1)
        if isinstance(module, nn.Dropout):
            shape = x.shape[1:]
        else:  # the channel-wise ones drop whole feature maps
            shape = torch.Size([x.shape[1]] + [1] * (x.dim() - 2))
        masks = dropout_masks(self._next_keys(x.device), self._position_noise(shape, x.device), module.p)
        return x * masks.to(x.dtype) * (1.0 / (1.0 - module.p))


class InPlaceDropout:
    """Seeded dropout masks for passes of B images, applied in place; threads may share it.

    With its first argument bound it is the ``drop`` of :class:`inference.unet_passes.UNetPasses`.

    Args:
        seed: of the masks.
        image_ids: of the B images.
        passes: T.
        rates: probability of dropping an element at each site.
        device: of the tensors to come.
    """

    def __init__(
        self, seed: int, image_ids: Sequence[str], passes: int, rates: Sequence[float], device: torch.device
    ) -> None:
        sites = range(len(rates))
        keys = [[[mask_key(seed, i, t, site) for site in sites] for i in image_ids] for t in range(passes)]
        self.keys = sent(torch.tensor(keys, dtype=torch.int32), device)  # T, B, sites; copied once
        self.rates = rates
        self.noise: dict[torch.Size, Tensor] = {}

    def __call__(self, passes: range, x: Tensor, site: int, first: int) -> None:
        """Zero what the site's masks drop of x (n, C, h, w), in place.

        Args:
            passes: the passes in the whole batch, which is pass-major.
            x: rows ``first`` to ``first + n`` of that batch.
            site: index of the dropout layer.
            first: index of the first row of x.
        """
        shape = x.shape[1:]
        if shape not in self.noise:
            noise = mask_noise(shape, x.device)[None]
            self.noise[shape] = noise.contiguous(memory_format=torch.channels_last)
        keys = self.keys[passes.start : passes.stop, :, site].reshape(-1)[first : first + len(x)]
        zero_dropped(x, keys, self.noise[shape], self.rates[site])
