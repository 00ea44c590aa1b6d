"""What a lower precision changes: maps and foreground ECE of real images, beside fp32.

The same trained network, images, masks and dropout seeds in each precision.
``--precision auto`` may take a precision only if every ECE changes by less
than 1e-3 and the variance maps correlate above 0.999 with fp32's.

    python -m benchmarks.precision results/isic2018/weights/best_model.pth --images FOLDER --masks FOLDER

The first third of the images gives the normalisation and lambda, the rest the
ECEs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from model import UNet
from uncertainty import uncertainty_maps

VARIANCES = ("pred_variance", "saliency_variance")


def read(image: Path, mask: Path, size: int) -> tuple[torch.Tensor, np.ndarray]:
    """Normalised (3, size, size), and bool (size, size)."""
    with Image.open(image) as picture:
        pixels = np.asarray(picture.convert("RGB").resize((size, size), Image.Resampling.BILINEAR), dtype=np.float32)
    with Image.open(mask) as picture:
        truth = np.asarray(picture.convert("L").resize((size, size), Image.Resampling.NEAREST)) > 127
    pixels = (pixels / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1), truth


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """15 bins (lo, hi], 0 in the first."""
    bins = np.clip(np.ceil(confidence * 15) - 1, 0, 14).astype(int)
    gaps = np.bincount(bins, correct - confidence, 15)  # n_b (accuracy_b - confidence_b)
    return float(np.abs(gaps).sum() / len(confidence))


def evaluate(maps: dict[str, np.ndarray], truth: np.ndarray, tuning: int) -> dict[str, float]:
    """ECEs of lambda 1, 0 and the best one, pooled over the lesions' pixels of images ``tuning`` and later."""
    score = {}
    for name in VARIANCES:
        low, high = maps[name][:tuning].min(), maps[name][:tuning].max()
        score[name] = np.clip((maps[name] - low) / (high - low), 0, 1).astype(np.float64)
    correct = maps["mean_prediction"] > 0.5  # inside the lesion

    def ece(images: slice, weight: float) -> float:
        inside = truth[images]
        u = weight * score["pred_variance"][images] + (1 - weight) * score["saliency_variance"][images]
        return expected_calibration_error(1 - u[inside], correct[images][inside].astype(np.float64))

    weights = [k / 10 for k in range(10, -1, -1)]
    best = min(weights, key=lambda w: ece(slice(0, tuning), w))  # min keeps the first: the larger lambda
    test = slice(tuning, None)
    overlap = (correct & truth)[test].sum((1, 2))
    dice = np.mean(2 * overlap / np.maximum(1, correct[test].sum((1, 2)) + truth[test].sum((1, 2))))
    return {
        "lambda": best, "ece_predictive": ece(test, 1.0), "ece_saliency": ece(test, 0.0),
        "ece_fused": ece(test, best), "dice": float(dice),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--masks", type=Path, required=True)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--passes", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precisions", default="", help="comma-separated; those the device has, if empty")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    saved = torch.load(options.weights, map_location=device, weights_only=True)
    model = UNet(**saved["options"]).to(device).eval()
    model.load_state_dict(saved["model"])
    paths = sorted(options.images.glob("*.jpg"))
    paths = paths[:: max(1, len(paths) // options.count)][: options.count]
    pairs = [read(path, options.masks / f"{path.stem}_segmentation.png", options.size) for path in paths]
    truth = np.stack([mask for _, mask in pairs])
    every = ["bf16"] if device.type == "cpu" else ["tf32", "fp16", "bf16"]
    names = options.precisions.split(",") if options.precisions else every

    results, exact = {}, {}
    print("| precision | lambda | ECE predictive | ECE saliency | ECE fused | largest change | Dice "
          "| correlation, predictive (worst image) | correlation, saliency (worst image) | fallbacks |")
    print("|" + " --- |" * 10)
    for precision in ["fp32", *names]:
        maps: dict[str, list[np.ndarray]] = {name: [] for name in ("mean_prediction", *VARIANCES)}
        fallbacks = 0
        for (image, _), path in zip(pairs, paths):
            found = uncertainty_maps(
                model, image[None].to(device), target_layer=model.encoder4, passes=options.passes,
                image_ids=[path.stem], precision=precision,
            )
            fallbacks += int(found.fallbacks.sum())
            for name, column in maps.items():
                column.append(getattr(found, name)[0].cpu().numpy())
        stacked = {name: np.stack(column) for name, column in maps.items()}
        exact = exact or stacked
        row: dict[str, object] = dict(evaluate(stacked, truth, len(paths) // 3), fallbacks=fallbacks)
        for name in VARIANCES:
            a, b = stacked[name], exact[name]
            row[f"correlation_{name}"] = float(np.corrcoef(a.ravel(), b.ravel())[0, 1])
            row[f"worst_correlation_{name}"] = float(min(
                np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in zip(a, b) if y.std() > 0
            ))
        results[precision] = row
        change = max(abs(float(row[k]) - float(results["fp32"][k])) for k in ("ece_predictive", "ece_saliency", "ece_fused"))  # type: ignore[arg-type]
        row["largest_change"] = change
        print(
            f"| {precision} | {row['lambda']} | {row['ece_predictive']:.5f} | {row['ece_saliency']:.5f} "
            f"| {row['ece_fused']:.5f} | {change:.1e} | {row['dice']:.4f} "
            + "".join(f"| {row[f'correlation_{n}']:.5f} ({row[f'worst_correlation_{n}']:.4f}) " for n in VARIANCES)
            + f"| {fallbacks} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
