"""What runs on a GPU, counted without one: operators, bytes, products, and whatever makes the GPU or the CPU wait.

Maps, a training step, validation and counting are traced on tensors that have a device ("cuda") and a shape, and no
content: an operator on tensors of two devices fails, and everything else is counted as it is dispatched.

    python -m benchmarks.cuda_trace                          # the paper's size: width 64, 256 px, T = 30
    python -m benchmarks.cuda_trace --width 16 --size 128

The last column is an **estimate**, no measurement: the sum over operators of the longer of two times, that of its bytes
and that of its products, at stated shares of the published peaks of a card, and at least the time of a launch.
"""

from __future__ import annotations

import argparse
import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Callable
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import dataset
import train
from evaluation.counting import count_scores
from evaluation.fusion import Fusion
from evaluation.normalisation import Linear
from inference.unet_passes import UNetPasses
from model import UNet
from runtime.config import Config
from runtime.processes import ProcessGroup
from uncertainty import uncertainty_maps

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten

EMPTY = (aten.empty, aten.new_empty, aten.empty_like, aten.empty_strided, aten.detach)  # these do nothing on the GPU

#: Of an NVIDIA H100 SXM: bytes and products (two operations) a second at peak, the share of both that is counted on,
#: and the shortest time between two operators.
BANDWIDTH, SHARE, LAUNCH = 3.35e12, 0.6, 4e-6
PRODUCTS = {torch.float16: 495e12, torch.bfloat16: 495e12, torch.float32: 33e12, torch.float64: 33e12, "tf32": 247e12}


# ---------------------------------------------------------------- recording


@dataclass
class Trace:
    """What was dispatched.

    Attributes:
        operators: by name; those that only look at memory in another way (views) are left out.
        bytes_of: read and written by them, by name.
        products: multiply-adds of convolutions and matrix products.
        waits: what makes the CPU wait for the GPU, by name: copies to the CPU, numbers that Python asks for.
        sent: copies from the CPU to the GPU: "blocking" or not.
        doubles: float64 elements on the GPU that operators returned.
        seconds: the estimate of the module's docstring.
    """

    operators: Counter[str] = field(default_factory=Counter)
    bytes_of: Counter[str] = field(default_factory=Counter)
    products: int = 0
    waits: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    doubles: int = 0
    seconds: float = 0.0

    @property
    def launches(self) -> int:
        """Operators that do something on the GPU."""
        return sum(self.operators.values())

    @property
    def bytes(self) -> int:
        """Read and written by all operators."""
        return sum(self.bytes_of.values())


def _on_cuda(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cuda"


def _tensors(*values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _size(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors; of an expanded one those that are there."""
    return sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors if _on_cuda(x))


class Recorder(TorchDispatchMode):
    """Counts what is dispatched into a :class:`Trace`, and answers for tensors without content.

    A number that Python asks for is 1, True or 0.5; of a map, half of the pixels are not zero.
    """

    def __init__(self, tf32: bool = False) -> None:
        super().__init__()
        self.trace, self.tf32 = Trace(), tf32

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = function.overloadpacket
        if packet is aten._pin_memory:
            return args[0]
        if packet in (aten._local_scalar_dense, aten.nonzero, aten.bincount):
            if _on_cuda(args[0]):
                self.trace.waits[packet.__name__] += 1
            return self._stand_in(packet, args, kwargs)
        output = function(*args, **kwargs)
        self._count(packet, function, args, kwargs, output)
        return output

    def _stand_in(self, packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0]
        if packet is aten._local_scalar_dense:
            return True if x.dtype == torch.bool else 0.5 if x.is_floating_point() else 1
        shape = (x.numel() // 2, x.dim()) if packet is aten.nonzero else (kwargs.get("minlength") or args[2],)
        return torch.empty(shape, dtype=torch.int64, device=x.device)

    def _count(self, packet: Any, function: Any, args: Any, kwargs: Any, output: Any) -> None:
        inputs, outputs = _tensors(args, kwargs), _tensors(output)
        if packet in (aten._to_copy, aten.copy_):
            source, target = (args[1], args[0]) if packet is aten.copy_ else (args[0], output)
            pair = source.device.type, target.device.type
            if pair == ("cuda", "cpu"):
                self.trace.waits["copy to the CPU"] += 1
            if pair == ("cpu", "cuda"):
                at_once = kwargs.get("non_blocking") or (packet is aten.copy_ and len(args) > 2 and args[2])
                self.trace.sent["not blocking" if at_once else "blocking"] += 1
        if not any(map(_on_cuda, inputs + outputs)):
            return
        kept = {x.untyped_storage()._cdata for x in inputs}
        view = outputs and not function._schema.is_mutable and all(x.untyped_storage()._cdata in kept for x in outputs)
        if view or not packet._qualified_op_name.startswith(("aten::", "inference::")) or packet in EMPTY:
            return
        self.trace.operators[str(packet)] += 1
        self.trace.doubles += sum(x.numel() for x in outputs if _on_cuda(x) and x.dtype == torch.float64)
        size, products = _size(inputs) + _size(outputs), 0
        if packet in flop_registry:
            products = flop_registry[packet](*args, **kwargs, out_val=output) // 2
        kind: Any = outputs[0].dtype if outputs else torch.float32
        rate = PRODUCTS["tf32" if self.tf32 and kind == torch.float32 else kind] if products else 1.0
        self.trace.bytes_of[str(packet)] += size
        self.trace.products += products
        self.trace.seconds += max(LAUNCH, size / BANDWIDTH / SHARE, products / rate / SHARE)


# ---------------------------------------------------------------- a world without content


def _backward(roots: Sequence[Tensor], gradients: Sequence[Tensor]) -> dict[tuple[Any, int], Tensor]:
    """What autograd's engine does, in Python: the engine itself asks the driver for streams, and there is none.

    Returns the gradients at the outputs of the nodes that have no function behind them.
    """
    order: list[Any] = []
    seen: set[Any] = set()
    stack = [(root.grad_fn, False) for root in roots]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node is not None and node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(behind, False) for behind, _ in node.next_functions]
    sums: dict[Any, dict[int, Tensor]] = {}
    leaves: dict[tuple[Any, int], Tensor] = {}

    def add(node: Any, place: int, gradient: Tensor | None) -> None:
        if node is not None and gradient is not None:
            here = sums.setdefault(node, {})
            here[place] = here[place] + gradient if place in here else gradient

    for root, gradient in zip(roots, gradients):
        add(root.grad_fn, root.output_nr, gradient)
    with torch.no_grad():
        for node in reversed(order):
            if node not in sums:
                continue
            given = sums.pop(node)
            if hasattr(node, "variable"):  # a leaf
                leaves[node, 0] = given[0]
                continue
            call = node.apply if hasattr(node, "saved_tensors") and hasattr(node, "apply") else node
            found = call(*(given.get(place) for place in range(max(given) + 1)))
            for (behind, place), gradient in zip(node.next_functions, found if isinstance(found, tuple) else (found,)):
                add(behind, place, gradient)
    return leaves


def _grad(output: Tensor, inputs: Sequence[Tensor], allow_unused: bool = False) -> list[Tensor | None]:
    leaves = {node.variable: gradient for (node, _), gradient in _backward([output], [torch.ones_like(output)]).items()}
    return [next((gradient for leaf, gradient in leaves.items() if leaf is x), None) for x in inputs]


def _backward_of(output: Tensor, *rest: object, **options: object) -> None:
    for (node, _), gradient in _backward([output], [torch.ones_like(output)]).items():
        node.variable.grad = gradient


def _moved(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """``module.to``, which cannot exchange parameters without content."""
    for each in module.modules():
        for held in (each._parameters, each._buffers):
            for name, value in held.items():
                if value is not None:
                    fitting = {key: how for key, how in kwargs.items() if key != "memory_format" or value.dim() == 4}
                    moved = value.detach().to(*args, **fitting)
                    held[name] = nn.Parameter(moved) if held is each._parameters else moved
    return module


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """A world in which tensors have a device and a shape, and no content."""

    def as_array(self: Tensor, **options: object) -> np.ndarray:
        kind = str(self.dtype).removeprefix("torch.")
        return np.full(tuple(self.shape), 0.5 if self.is_floating_point() else 1, dtype=kind)

    def as_list(self: Tensor) -> Any:
        if self.device.type == "cuda":
            self.cpu()  # is what waits
        return as_array(self).tolist()

    patches = [
        mock.patch.object(Tensor, "numpy", as_array), mock.patch.object(FakeTensor, "tolist", as_list),
        mock.patch.object(nn.Module, "to", _moved), mock.patch.object(Tensor, "backward", _backward_of),
        mock.patch.object(torch.autograd, "grad", _grad),
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        mock.patch.object(torch.cuda, "is_bf16_supported", lambda *_: True),
    ]
    dataset._mean_and_deviation.cache_clear()
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        try:
            yield
        finally:
            dataset._mean_and_deviation.cache_clear()


# ---------------------------------------------------------------- what is traced


def traced(prepare: Callable[[], Callable[[], object]], tf32: bool = False) -> Trace:
    """What a piece of work dispatches, without what prepares it."""
    with pretended():
        work = prepare()
        with Recorder(tf32) as recorder:
            work()
        return recorder.trace


def _model(width: int) -> UNet:
    with CUDA:
        return UNet(width)


def maps(width: int, size: int, passes: int, images: int, **options: Any) -> Callable[[], Callable[[], object]]:
    """The maps of some images."""

    def prepare() -> Callable[[], object]:
        model, pictures = _model(width).eval(), torch.empty(images, 3, size, size, device=CUDA)
        return lambda: uncertainty_maps(model, pictures, target_layer=model.encoder4, passes=passes, **options)

    return prepare


def weights(width: int) -> Callable[[], Callable[[], object]]:
    """Folding the weights for the algebra of the passes."""

    def prepare() -> Callable[[], object]:
        model = _model(width).eval()
        return lambda: UNetPasses(model, model.encoder4, torch.float16)

    return prepare


class Pairs:
    """Pairs of one image and one mask, however often they are asked for."""

    def __init__(self, size: int) -> None:
        self.image, self.mask = np.zeros((size, size, 3), np.uint8), np.zeros((size, size), np.uint8)

    def pair(self, id: str) -> tuple[np.ndarray, np.ndarray]:
        """The same one."""
        return self.image, self.mask


def _config(width: int, size: int, batch: int, amp: str) -> Config:
    return Config(width=width, image_size=size, batch_size=batch, amp=amp, workers=0)


def training_step(width: int, size: int, batch: int, amp: str = "bf16", steps: int = 1) -> Callable[[], Callable[[], object]]:
    """Steps of the optimiser, after a first one, which makes what all of them share."""

    def prepare() -> Callable[[], object]:
        with mock.patch.object(train, "build", lambda config: _model(config.width)):
            ids = [str(number) for number in range(2 * batch)]
            training: Any = train.Training(_config(width, size, batch, amp), Pairs(size), ids, ProcessGroup(0, 1, CUDA))  # type: ignore[arg-type]
        training.model.train()
        images = torch.empty(batch, size, size, 3, dtype=torch.uint8, device=CUDA)
        masks = torch.empty(batch, size, size, dtype=torch.uint8, device=CUDA)
        training._step(0, 0, images, masks)
        return lambda: [training._step(0, 1, images, masks) for _ in range(steps)]

    return prepare


def validation(width: int, size: int, batch: int, batches: int) -> Callable[[], Callable[[], object]]:
    """Validation over some batches."""

    def prepare() -> Callable[[], object]:
        model, ids = _model(width), [str(number) for number in range(batch * batches)]
        dataset._mean_and_deviation(CUDA)
        group: Any = ProcessGroup(0, 1, CUDA)
        return lambda: train.validate(model, Pairs(size), ids, batch, 0.5, group, torch.bfloat16)  # type: ignore[arg-type]

    return prepare


def counting(size: int, images: int) -> Callable[[], Callable[[], object]]:
    """Counting the pixels of some maps."""

    def prepare() -> Callable[[], object]:
        names = ("mean_prediction", "pred_variance", "saliency_variance", "expected_entropy")
        made: dict[str, Any] = {name: torch.empty(size, size, device=CUDA) for name in names}
        made["true_mask"] = torch.empty(size, size, dtype=torch.uint8, device=CUDA)
        fusion = Fusion(Linear(0.0, 0.25), Linear(0.0, 0.25))
        return lambda: count_scores([(str(number), dict(made)) for number in range(images)], fusion)

    return prepare


def difference(more: Trace, less: Trace) -> SimpleNamespace:
    """What the rest of a longer piece of work adds."""
    return SimpleNamespace(
        launches=more.launches - less.launches, bytes=more.bytes - less.bytes, products=more.products - less.products,
        waits=more.waits - less.waits, sent=more.sent - less.sent, doubles=more.doubles - less.doubles,
        seconds=more.seconds - less.seconds, operators=more.operators - less.operators,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--passes", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--operators", type=int, default=0, help="also print so many operators with the most bytes")
    options = parser.parse_args()
    shape = (options.width, options.size, options.passes)
    step = (options.width, options.size, options.batch_size)

    # whole groups, as the last one is filled up
    like: Any = SimpleNamespace(width=options.width)
    group, _ = UNetPasses.group_and_chunk(like, (options.size, options.size), CUDA)

    def of_maps(**how: Any) -> tuple[Any, int]:
        tf32 = how.get("precision") == "tf32"
        less, more = (traced(maps(*shape, images, **how), tf32) for images in (group, 2 * group))
        if options.operators:
            for name, size in (more.bytes_of - less.bytes_of).most_common(options.operators):
                times = (more.operators - less.operators)[name] / group
                print(f"  {how}: {name} {times:.0f} times, {size / group / 1e9:.2f} GB", flush=True)
        return difference(more, less), group

    rows: dict[str, tuple[Any, int]] = {
        "maps of one image, fp16": of_maps(precision="fp16"),
        "maps of one image, tf32": of_maps(precision="tf32"),
        "maps of one image, fp32": of_maps(precision="fp32"),
        "maps of one image, any model, fp32": of_maps(method="general"),
        "preparing the weights, once a call": (traced(weights(options.width)), 1),
        f"training step, {options.batch_size} images, bf16": (traced(training_step(*step)), 1),
        f"validation, {options.batch_size} images, bf16": (
            difference(traced(validation(*step, 3)), traced(validation(*step, 1))), 2
        ),
        "counting one image": (difference(traced(counting(options.size, 3)), traced(counting(options.size, 1))), 2),
    }
    print(f"width {options.width}, {options.size} px, T {options.passes}, torch {torch.__version__}; no GPU took part\n")
    print("| work | operators | GB | products, 10^9 | waits | copies to the GPU that block | estimate, ms |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, (trace, pieces) in rows.items():
        print(
            f"| {name} | {trace.launches / pieces:.0f} | {trace.bytes / pieces / 1e9:.2f} "
            f"| {trace.products / pieces / 1e9:.1f} | {sum(trace.waits.values()) / pieces:.3g} "
            f"| {trace.sent['blocking'] / pieces:.3g} | {trace.seconds / pieces * 1e3:.2f} |"
        )


if __name__ == "__main__":
    main()
