"""Time, memory and work of uncertainty maps, beside the ways in which others make them.

One run, interleaved: in each round every variant makes the maps of the same
images, so that whatever else the machine does falls on all of them. They are
one image on a CPU, and on a GPU as many as ours computes together, which is
what it does in a run; the alternatives take them one by one, as they would.
Each row names the precision of its convolutions. PyTorch's default on CUDA is
TF32 for all who do not ask; the research loop is timed in TF32 and in IEEE
fp32, and every row has its ratio to both. Prints medians, their spread, and
ratios; then the peak memory growth of each variant, each in a process of its
own; then the counted multiply-adds and the share of this machine's measured
convolution peak in that precision.

    python -m benchmarks.maps                                    # width 16, 128 px
    # minutes a round; left to itself in the background
    nohup python -m benchmarks.maps --width 64 --size 256 --warm-up 0 --variants "research,Captum,ours fp32" \\
        --json maps64.json > maps64.txt &
    python -m benchmarks.maps --device cuda --width 64 --size 256 --images 779

``--images`` adds the whole job: that many pictures decoded, their maps
computed, and written as files, all as a run does it.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dataset import normalise
from experiment.map_files import write_maps
from inference.unet_passes import UNetPasses
from isic.decoding import read_image
from isic.layout import isic_folders
from model import UNet
from runtime.devices import sent
from uncertainty import uncertainty_maps

Variant = Callable[[], object]


# ---------------------------------------------------------------- the alternatives


def dropout_on(model: nn.Module) -> None:
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()


def heatmap(activations: Tensor, gradient: Tensor, size: tuple[int, int]) -> np.ndarray:
    cam = F.relu((gradient.mean((2, 3), keepdim=True) * activations).sum(1, keepdim=True))
    cam = F.interpolate(cam, size, mode="bilinear", align_corners=False)[0, 0].detach().cpu().numpy()
    return cam / (cam.max() + 1e-8)


def stacked(predictions: list[np.ndarray], cams: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    p, c = np.stack(predictions), np.stack(cams)
    return p.mean(0), p.var(0), c.var(0)


def research_loop(model: UNet, image: Tensor, passes: int, shared: bool) -> tuple[np.ndarray, ...]:
    """A forward for the prediction, then a hooked forward and a full backward for the heatmap.

    ``shared``: the hooked forward serves the prediction too.
    """
    dropout_on(model)
    kept: dict[str, Tensor] = {}
    handles = [
        model.encoder4.register_forward_hook(lambda _, __, output: kept.__setitem__("activations", output)),
        model.encoder4.register_full_backward_hook(lambda _, __, output: kept.__setitem__("gradient", output[0])),
    ]
    predictions, cams = [], []
    for _ in range(passes):
        if not shared:
            with torch.no_grad():
                predictions.append(torch.sigmoid(model(image))[0, 0].cpu().numpy())
        model.zero_grad()
        logits = model(image)
        logits.sum().backward()
        if shared:
            predictions.append(torch.sigmoid(logits)[0, 0].detach().cpu().numpy())
        cams.append(heatmap(kept["activations"], kept["gradient"], image.shape[-2:]))
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    return stacked(predictions, cams)


def grad_cam_library(model: UNet, image: Tensor, passes: int) -> tuple[np.ndarray, ...]:
    from pytorch_grad_cam import GradCAM

    predictions, cams = [], []
    with GradCAM(model, [model.encoder4]) as cam:
        dropout_on(model)  # the constructor has just turned it off
        for _ in range(passes):
            cams.append(cam(image, targets=[lambda output: output.sum()])[0])
            predictions.append(torch.sigmoid(cam.outputs)[0, 0].detach().cpu().numpy())
    model.zero_grad(set_to_none=True)
    return stacked(predictions, cams)


def captum_library(model: UNet, image: Tensor, passes: int) -> tuple[np.ndarray, ...]:
    from captum.attr import LayerGradCam

    dropout_on(model)
    kept: list[Tensor] = []

    def score(x: Tensor) -> Tensor:
        kept[:] = [model(x)]
        return kept[0].sum((1, 2, 3))

    method = LayerGradCam(score, model.encoder4)
    predictions, cams = [], []
    for _ in range(passes):
        cam = F.relu(method.attribute(image)).detach()
        predictions.append(torch.sigmoid(kept[0])[0, 0].detach().cpu().numpy())
        cam = F.interpolate(cam, image.shape[-2:], mode="bilinear", align_corners=False)[0, 0].cpu().numpy()
        cams.append(cam / (cam.max() + 1e-8))
    return stacked(predictions, cams)


def torch_uncertainty_library(model: UNet, image: Tensor, passes: int) -> tuple[np.ndarray, ...]:
    """The prediction alone: that library has no heatmaps."""
    from torch_uncertainty.methods import mc_dropout

    ensemble = mc_dropout(model, num_estimators=passes, on_batch=False, task="segmentation")
    ensemble.eval()
    with torch.no_grad():
        p = torch.sigmoid(ensemble(image))
    return p.mean(0).cpu().numpy(), p.var(0, unbiased=False).cpu().numpy()


def one_by_one(function: Callable[..., object], model: UNet, images: Tensor, *arguments: object) -> None:
    for image in images:
        function(model, image[None], *arguments)


def with_switches(run: Variant, **flags: bool) -> Variant:
    """The same with some switches of cuDNN set."""

    def switched() -> object:
        with torch.backends.cudnn.flags(enabled=True, **flags):
            return run()

    return switched


def variants(model: UNet, images: Tensor, passes: int) -> dict[str, Variant]:
    """By a name that ends in the precision of the convolutions."""
    usual = "tf32" if images.is_cuda else "fp32"

    def ours(**options: object) -> Variant:
        return lambda: uncertainty_maps(model, images, target_layer=model.encoder4, passes=passes, **options)

    loop: Variant = partial(one_by_one, research_loop, model, images, passes, False)
    found: dict[str, Variant] = {
        f"research loop, {usual}": loop,
        f"shared forward, {usual}": partial(one_by_one, research_loop, model, images, passes, True),
    }
    if images.is_cuda:
        found["research loop, fp32"] = with_switches(loop, allow_tf32=False)
    for name, module, function in (
        ("pytorch-grad-cam", "pytorch_grad_cam", grad_cam_library),
        ("Captum", "captum", captum_library),
        ("torch-uncertainty, no CAM", "torch_uncertainty.methods", torch_uncertainty_library),
    ):
        try:
            __import__(module)
        except ImportError as error:
            print(f"{name}: left out ({error})", file=sys.stderr)
            continue
        found[f"{name}, {usual}"] = partial(one_by_one, function, model, images, passes)
    found["ours, any model, fp32"] = ours(method="general")
    found["ours, fp32"] = ours(method="fast")
    if images.is_cuda:
        found["ours, any model, tf32"] = ours(method="general", precision="tf32")
        found["ours, tf32"] = ours(method="fast", precision="tf32")
        found["ours, cudnn.benchmark, fp16"] = with_switches(ours(method="fast", precision="fp16"), benchmark=True)
        found["ours, fp16"] = ours(method="fast", precision="fp16")
    found["ours, bf16"] = ours(method="fast", precision="bf16")
    return found


def precision_of(name: str) -> str:
    """Of the convolutions of a variant."""
    return name.rsplit(", ", 1)[1]


# ---------------------------------------------------------------- measuring


def seconds(run: Variant, device: torch.device) -> tuple[float, float]:
    """Wall time and CPU time of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def convolution_peak(precision: str, device: torch.device) -> float:
    """Multiply-adds a second of the best of some 3 x 3 convolutions that suit this machine."""
    best, dtype = 0.0, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    shapes = ((64, 128), (128, 64), (256, 32)) if device.type == "cpu" else ((64, 1024), (512, 256))
    for channels, size in shapes:
        layout = {"dtype": dtype, "device": device}
        x = torch.randn(1, channels, size, size, **layout).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, 3, 3, **layout).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=precision == "tf32"):
            times = [seconds(partial(F.conv2d, x, weight, padding=1), device)[0] for _ in range(4)]
        best = max(best, 9 * channels**2 * size**2 / min(times))
    return best


class OperationCounter(TorchDispatchMode):
    """Counts the floating-point operations of convolutions and matrix products below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        output = function(*args, **(kwargs or {}))
        packet = function.overloadpacket
        if packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=output)
        elif packet is torch.ops.aten.mkldnn_convolution:  # not in PyTorch's list: here a 1 x 1 one
            self.total += 2 * output.numel() * args[1][0].numel()
        return output


def multiply_adds(run: Variant) -> int:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a counter sees the operations of its own thread
    try:
        with OperationCounter() as counter:
            run()
    finally:
        torch.set_num_threads(threads)
    return counter.total // 2


def peak_growth(run: Variant, device: torch.device) -> int:
    """Bytes by which the process (or the GPU's allocator) grew at most during the call."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far; Linux
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        before = int(status["VmRSS"].split()[0])
    except OSError:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    try:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        after = int(status["VmHWM"].split()[0])
    except OSError:
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (after - before) * 1024


def memory_in_own_process(name: str, options: argparse.Namespace) -> int:
    command = [sys.executable, "-m", "benchmarks.maps", "--memory-of", name, "--passes", str(min(options.passes, 8))]
    for key in ("width", "size", "threads", "device"):
        command += [f"--{key}", str(getattr(options, key))]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(output.split()[-1])


def whole_job(model: UNet, options: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Read pictures, compute their maps, write them; the same for a few with the research loop."""
    from PIL import Image

    mask = np.zeros((options.size, options.size), np.uint8)

    def read(path: Path) -> Tensor:
        return torch.from_numpy(read_image(path, options.size))

    def write(folder: Path, stem: str, maps: dict[str, np.ndarray]) -> None:
        arrays = {"expected_entropy": maps["mean_prediction"], **maps, "true_mask": mask}
        write_maps(folder / f"{stem}.npz", arrays, 0, "", 0, None, 1.0)

    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(8) as pool:
        folder = Path(scratch)
        if options.data:
            paths = sorted(isic_folders(options.data)[0].glob("*.jpg"))[: options.images]
            if len(paths) < options.images:
                sys.exit(f"error: {options.data} holds {len(paths)} .jpg pictures, fewer than --images {options.images}")
        else:
            paths = [folder / f"{i:05}.jpg" for i in range(options.images)]
            generator = np.random.default_rng(0)
            for path in paths:
                coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
                Image.fromarray(coarse).resize((1024, 768), Image.Resampling.BICUBIC).save(path, quality=90)
        origin = f"of {options.data}" if options.data else "of smooth noise, in the size of photographs"
        result: dict[str, float] = {}
        for precision in ["fp32", "tf32", "fp16", "bf16"] if device.type == "cuda" else ["fp32", "bf16"]:
            start = time.perf_counter()
            batches = [paths[i : i + 16] for i in range(0, len(paths), 16)]
            ahead = [[pool.submit(read, path) for path in batch] for batch in batches[:2]]
            writes = []
            for i, batch in enumerate(batches):
                images = normalise(sent(torch.stack([future.result() for future in ahead.pop(0)]), device))
                if i + 2 < len(batches):
                    ahead.append([pool.submit(read, path) for path in batches[i + 2]])
                maps = uncertainty_maps(
                    model, images, target_layer=model.encoder4, passes=options.passes,
                    image_ids=[path.stem for path in batch], precision=precision,
                )
                columns = {name: getattr(maps, name).cpu().numpy() for name in maps._fields[:4]}
                for j, path in enumerate(batch):
                    writes.append(pool.submit(write, folder, path.stem, {k: v[j] for k, v in columns.items()}))
            for future in writes:
                future.result()
            result[f"ours, {precision}"] = time.perf_counter() - start
            print(f"{len(paths)} pictures {origin}, {precision}: {result[f'ours, {precision}']:.1f} s")
        few = paths[:2]
        start = time.perf_counter()
        for path in few:
            p, v, s = research_loop(model, normalise(read(path)[None].to(device)), options.passes, shared=False)
            write(folder, path.stem, {"mean_prediction": p, "pred_variance": v, "saliency_variance": s})
        result["research loop, extrapolated"] = (time.perf_counter() - start) / len(few) * len(paths)
        print(f"research loop, extrapolated from {len(few)}: {result['research loop, extrapolated']:.1f} s")
    return result


# ---------------------------------------------------------------- the run


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--size", type=int, default=128, help="height and width of the image")
    parser.add_argument("--passes", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1, help="rounds that are not counted")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--variants", default="", help="comma-separated parts of names, these without commas; all if empty")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--images", type=int, default=0, help="also the whole job, for so many pictures")
    parser.add_argument("--data", type=Path, default=None, help="folder in the ISIC 2018 Task 1 layout to take --images from")
    parser.add_argument("--json", type=Path, default=None, help="write the results there, too")
    parser.add_argument("--memory-of", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    model = UNet(width=options.width).to(device).eval()
    group, _ = UNetPasses(model, model.encoder4).group_and_chunk((options.size, options.size), device)
    images = torch.randn(group, 3, options.size, options.size, device=device)
    chosen = variants(model, images, options.passes)
    if options.memory_of:
        F.conv2d(images, torch.randn(4, 3, 3, 3, device=device))  # the libraries' own start-up is not counted
        print(peak_growth(chosen[options.memory_of], device))
        return
    wanted = [part.strip() for part in options.variants.split(",") if part.strip()]
    chosen = {name: run for name, run in chosen.items() if not wanted or any(part in name.replace(",", "") for part in wanted)}

    wall: dict[str, list[float]] = {name: [] for name in chosen}
    cpu: dict[str, list[float]] = {name: [] for name in chosen}
    peaks: dict[str, list[float]] = {precision_of(name): [] for name in chosen}
    for i in range(-options.warm_up, options.rounds):
        for name, run in chosen.items():
            spent = seconds(run, device)
            if i >= 0:
                wall[name].append(spent[0])
                cpu[name].append(spent[1])
        if i >= 0:
            for precision, rates in peaks.items():
                rates.append(convolution_peak(precision, device))
            first = next(iter(chosen))
            ratios = ", ".join(f"{name} {cpu[first][i] / max(cpu[name][i], 1e-9):.2f}" for name in chosen)
            print(f"round {i + 1} of {options.rounds}, by CPU time: {ratios}", file=sys.stderr, flush=True)

    result = {
        "width": options.width, "size": options.size, "passes": options.passes, "threads": options.threads,
        "rounds": options.rounds, "images": group, "torch": torch.__version__, "python": platform.python_version(),
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "peak_multiply_adds_per_second": {k: max(v) for k, v in peaks.items()}, "variants": {},
    }
    loops = [name for name in chosen if name.startswith("research loop")] or [next(iter(chosen))]
    base = loops[0]
    print(f"width {options.width}, {options.size} px, T {options.passes}, {group} image(s) at a time, "
          f"{options.threads} thread(s), {result['hardware']}; torch {torch.__version__}; "
          f"medians of {options.rounds}, in brackets smallest and largest")
    print("| variant, precision | time, of the first | " + " | ".join(f"times as fast as {loop}" for loop in loops)
          + " | CPU time, times | memory, MiB | multiply-adds an image, 10^9 | of the peak |")
    print("|" + " --- |" * (6 + len(loops)))
    for name, run in chosen.items():
        times, reference = wall[name], median(wall[base])
        work = multiply_adds(run) / group
        memory = 0 if options.no_memory else memory_in_own_process(name, options)
        peak = max(peaks[precision_of(name)])
        row = {
            "seconds": times, "processor_seconds": cpu[name], "ratio": reference / median(times),
            # of the same round, so that a slow spell falls on both
            "ratios_by_round": [a / b for a, b in zip(wall[base], times)],
            "processor_ratio": median(cpu[base]) / median(cpu[name]),
            "memory_bytes": memory, "multiply_adds": work, "share_of_peak": work * group / min(times) / peak,
        }
        by_loop = {loop: [a / b for a, b in zip(wall[loop], times)] for loop in loops}
        row["ratios_to"] = by_loop
        fast = " | ".join(f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" for ratios in by_loop.values())
        result["variants"][name] = row
        print(f"| {name} | {median(times) / reference:.3f} ({min(times) / reference:.3f} to {max(times) / reference:.3f}) "
              f"| {fast} "
              f"| {row['processor_ratio']:.2f} | {memory / 2**20:.0f} | {work / 1e9:.1f} "
              f"| {row['share_of_peak']:.2f} |", flush=True)
    if options.images:
        result["whole_job"] = whole_job(model, options, device)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
