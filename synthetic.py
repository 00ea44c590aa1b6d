"""Synthetic dermoscopy: skin lesions with the masks that annotators might have drawn of them.

A lesion is an implicit function (an ellipse with lobes and notches, warped and roughened by
multi-octave noise) whose pigments darken a picture of skin by Beer-Lambert absorption. Smooth
fields are computed at half size and enlarged; fine structure and artefacts are full size.

Shape legend: H W the picture; h w the half-size grid, h = ceil(H / 2), w = ceil(W / 2).
Lengths written `x * scale` are in pixels of a picture whose shorter side is 450.
"""

from __future__ import annotations

import io
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from interruption import deaf_children, end_with_parent
from storage import UserError, remove_partials, whole_file

VERSION = 1  # of the pictures: whoever changes what is drawn raises it, and folders of older pictures are drawn again
MARKER = "SYNTHETIC.txt"
FIRST_NUMBER = 9_000_000  # far above every published ISIC number
IMAGE_FOLDER = "ISIC2018_Task1-2_Training_Input"
MASK_FOLDER = "ISIC2018_Task1_Training_GroundTruth"

SIZES = ((400, 300), (512, 384), (560, 420), (600, 450), (640, 480), (576, 540), (450, 600), (480, 480))  # W, H
SIZE_SHARES = (0.10, 0.17, 0.14, 0.25, 0.18, 0.07, 0.05, 0.04)
SIZE_CLASSES = {  # share of the pictures; visible lesion area, from and to, as a share of the frame
    "small": (0.14, 0.010, 0.028), "medium": (0.50, 0.035, 0.17), "large": (0.27, 0.17, 0.42),
    "huge": (0.09, 0.42, 0.72)}
ANNOTATIONS = {"exact": 0.34, "polygon": 0.30, "generous": 0.16, "tight": 0.10, "superpixel": 0.10}
SHADES = {  # share of the lesions; amount of melanin, from and to
    "light": (0.22, 0.35, 0.60), "brown": (0.36, 0.60, 1.00), "dark": (0.16, 1.0, 1.7), "black": (0.06, 1.8, 2.6),
    "red": (0.08, 0.12, 0.30), "faint": (0.12, 0.22, 0.34)}

SKIN_TONES = np.array((  # Fitzpatrick I to VI, RGB under a dermoscope
    (240, 217, 206), (231, 201, 184), (216, 179, 155), (186, 143, 115), (146, 106, 82), (114, 84, 69)), np.float32)
SKIN_SHARES = (0.26, 0.31, 0.20, 0.11, 0.07, 0.05)
CASTS = {  # share of the pictures; white balance, a gain in R, G, B
    "neutral": (0.45, 1.00, 1.00, 1.00), "pink": (0.24, 1.05, 0.84, 0.90), "yellow": (0.16, 1.04, 1.03, 0.88),
    "grey": (0.09, 0.82, 0.90, 0.94), "blue": (0.06, 0.86, 0.97, 1.14)}

# Absorbance in R, G, B per unit of pigment.
MELANIN = np.array((0.53, 0.86, 1.27), np.float32)
BLOOD = np.array((0.16, 0.92, 0.74), np.float32)
DEEP_MELANIN = np.array((1.15, 0.86, 0.60), np.float32)  # blue-grey, seen through scattering dermis
DARKEST = np.array((27, 22, 22), np.float32)  # what full absorption still reflects


class Lesion(NamedTuple):
    """One picture: `image` uint8 (H, W, 3) RGB; `mask` uint8 (H, W) of 0 and 255, as annotated;
    `outline` bool (H, W), the true extent; `attributes`, what was drawn and how."""

    image: np.ndarray
    mask: np.ndarray
    outline: np.ndarray
    attributes: dict[str, object]


def pick(rng, table: dict[str, tuple[float, ...]]) -> str:
    """A key of `table`, drawn with the share that stands first in its row."""
    return str(rng.choice(list(table), p=[row[0] for row in table.values()]))


def grid_of(shape) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates y (H, 1) and x (1, W), float32."""
    return np.arange(shape[0], dtype=np.float32)[:, None], np.arange(shape[1], dtype=np.float32)[None]


def ramp(field, start: float, stop: float) -> np.ndarray:
    """Smooth step from 0 at `start` to 1 at `stop`, which may be the smaller of the two."""
    t = np.clip((field - start) / (stop - start), 0, 1)
    return t * t * (3 - 2 * t)


def enlarge(field: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A 2-D field resized to `shape` (rows, columns) by cubic interpolation; float32."""
    picture = Image.fromarray(np.ascontiguousarray(field, np.float32))
    return np.asarray(picture.resize((shape[1], shape[0]), Image.BICUBIC))


def lattice_noise(rng, shape, cell: float, octaves: int = 1, gain: float = 0.5) -> np.ndarray:
    """Smooth random field of about zero mean and unit variance; float32 of `shape`.

    The first octave varies over `cell` pixels, each further one over half that with `gain`
    times the amplitude. Octaves finer than two pixels are left out.
    """
    total, power = np.zeros(shape, np.float32), 0.0
    for octave in range(octaves):
        size = max(cell / 2 ** octave, 2.0)
        rows, columns = shape[0] / size, shape[1] / size
        lattice = rng.standard_normal((int(rows) + 4, int(columns) + 4), dtype=np.float32)
        top, left = 1 + rng.random(2)
        box = (left, top, left + columns, top + rows)
        total += gain ** octave * np.asarray(Image.fromarray(lattice).resize(shape[::-1], Image.BICUBIC, box))
        power += gain ** (2 * octave)
        if size == 2.0:
            break
    return total / np.float32(math.sqrt(0.6 * power))  # cubic interpolation keeps 0.6 of the variance


def frequencies(shape) -> tuple[np.ndarray, np.ndarray]:
    """Radial frequency, in cycles a pixel and never 0, and orientation of the rfft2 grid."""
    fy, fx = np.fft.fftfreq(shape[0])[:, None].astype(np.float32), np.fft.rfftfreq(shape[1])[None].astype(np.float32)
    return np.maximum(np.hypot(fy, fx), 1 / max(shape)), np.arctan2(fy, fx)


def spectral_noise(rng, shape, amplitude: np.ndarray) -> np.ndarray:
    """Gaussian field of zero mean and unit variance with the given rfft2 `amplitude`; float32."""
    spectrum = amplitude * rng.standard_normal(amplitude.shape + (2,), dtype=np.float32).view(np.complex64)[..., 0]
    spectrum[0, 0] = 0
    field = np.fft.irfft2(spectrum, s=shape).astype(np.float32)
    return field / field.std()


# --------------------------------------------------------------------------------- outline

def smooth_minimum(a, b, width: float) -> np.ndarray:
    """The minimum of two fields, its crease rounded over `width`."""
    near = np.maximum(width - np.abs(a - b), 0) / width
    return np.minimum(a, b) - near * near * (width / 4)


def lesion_field(rng, shape, centre, radius: float) -> np.ndarray:
    """Implicit lesion: negative inside, in units of `radius`; float32 of `shape` (h, w)."""
    wild = rng.random() ** 1.5  # most lesions are nearly oval, some are ragged
    y, x = grid_of(shape)
    warp = 0.05 + 0.13 * wild
    x = (x - centre[0]) / radius + warp * lattice_noise(rng, shape, radius * 0.9, 3)
    y = (y - centre[1]) / radius + warp * lattice_noise(rng, shape, radius * 0.9, 3)
    turn, stretch = rng.uniform(0, np.pi), rng.uniform(1.0, 1.28)
    u, v = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    d = np.hypot(u / stretch, v * stretch) - 1

    def disc(reach: float, size: float) -> np.ndarray:
        angle = rng.uniform(0, 2 * np.pi)
        return np.hypot(u - reach * math.cos(angle), v - reach * math.sin(angle)) - size

    for _ in range(rng.integers(0, int(2 + 3 * wild))):
        d = smooth_minimum(d, disc(rng.uniform(0.55, 1.05), rng.uniform(0.25, 0.6)), rng.uniform(0.1, 0.35))
    for _ in range(rng.integers(0, int(1 + 2 * wild))):
        d = -smooth_minimum(-d, disc(rng.uniform(1.0, 1.3), rng.uniform(0.2, 0.45)), rng.uniform(0.08, 0.25))
    d += (0.04 + 0.09 * wild * rng.random()) * lattice_noise(rng, shape, radius * 0.45, 6, 0.62)
    if rng.random() < 0.12:  # streaks: the margin is pushed in and out along rays
        rays = rng.standard_normal(rng.integers(80, 170)).astype(np.float32)
        bearing = (np.arctan2(v, u) / (2 * np.pi) + 0.5) * len(rays) + 0.5 * lattice_noise(rng, shape, radius * 0.3)
        push = np.interp(bearing, np.arange(len(rays) + 1), np.append(rays, rays[0]))
        d += rng.uniform(0.02, 0.05) * push * ramp(d, -0.6, 0)
    return d.astype(np.float32)


def flood(seed: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """The part of `allowed` that is 4-connected to `seed`; bool arrays of one shape.

    A sweep fills whole runs of a row, then of a column, so that a few sweeps are enough.
    """
    reached, before = seed & allowed, -1
    while reached.sum() != before:
        before = reached.sum()
        for _ in range(2):
            allowed_, reached_ = (np.pad(a, ((0, 0), (0, 1))) for a in (allowed, reached))
            run = np.cumsum(~allowed_)  # the closed column added above ends the last run of each row
            hit = np.zeros(run[-1] + 1, bool)
            hit[run[reached_.ravel()]] = True
            reached = (hit[run].reshape(allowed_.shape) & allowed_)[:, :-1].T
            allowed = allowed.T
    return reached


def main_part(d: np.ndarray) -> np.ndarray:
    """The component of `d` < 0 that holds its minimum, its holes filled; bool."""
    rim = np.ones(d.shape, bool)
    rim[1:-1, 1:-1] = False
    return ~flood(rim, ~flood(d == d.min(), d < 0))


# ------------------------------------------------------------------------------ annotation

def annotate(rng, outline: np.ndarray, style: str) -> np.ndarray:
    """The bool (H, W) mask that an annotator of the given `style` draws of a bool `outline`."""
    radius = math.sqrt(outline.sum() / math.pi)
    if style == "polygon":
        return polygon_mask(rng, outline, int(rng.integers(15, 61)), radius)
    if style == "superpixel":
        return superpixel_mask(rng, outline, max(6.0, radius * rng.uniform(0.16, 0.28)))
    if style == "exact":
        return outline
    # A blurred indicator cut below (above) one half is a grown (shrunk) and smoothed outline.
    border = int(radius)
    picture = Image.fromarray(np.pad(outline.astype(np.uint8) * 255, border, mode="edge"))
    blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(radius * rng.uniform(0.05, 0.11) + 1)))
    level = rng.uniform(0.12, 0.3) if style == "generous" else rng.uniform(0.62, 0.8)
    return blurred[border:-border, border:-border] > 255 * level


def polygon_mask(rng, outline: np.ndarray, vertices: int, radius: float) -> np.ndarray:
    """Polygon through the farthest lesion pixel in each of `vertices` directions, half the time
    with its corners rounded; ends on the frame are moved beyond it."""
    rows, columns = np.nonzero(outline)
    height, width = outline.shape
    angles = (np.arange(vertices) + rng.uniform(-0.3, 0.3, vertices)) * 2 * np.pi / vertices
    rays = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    centre = np.array((columns.mean(), rows.mean()))
    distance = np.arange(0, math.hypot(height, width))
    x, y = np.rint(centre + distance[:, None, None] * rays).astype(int).transpose(2, 0, 1)  # each (distances, vertices)
    within = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    hit = within & outline[np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)]
    last, end = ((distance[:, None] * where).max(axis=0) for where in (hit, within))
    reach = np.where(last > end - 3, last * 1.4 + 20, last + rng.normal(0, 0.02 * radius + 0.5, vertices))
    points = centre + reach[:, None] * rays
    for _ in range(2 * rng.integers(2)):  # Chaikin: cut every corner
        following = np.roll(points, -1, axis=0)
        points = np.stack([0.75 * points + 0.25 * following, 0.25 * points + 0.75 * following], 1).reshape(-1, 2)
    canvas = Image.new("1", (width, height))
    ImageDraw.Draw(canvas).polygon(points.ravel().tolist(), fill=1)
    return np.array(canvas)


def superpixel_mask(rng, outline: np.ndarray, pitch: float) -> np.ndarray:
    """Union of the warped Voronoi cells, about `pitch` pixels wide, that are mostly lesion."""
    half = outline[::2, ::2]
    y, x = (np.maximum(2 * c / pitch + 0.2 * lattice_noise(rng, half.shape, pitch / 2), 0) for c in grid_of(half.shape))
    row, column = y.astype(int), x.astype(int)
    columns = column.max() + 3
    jitter = rng.random((row.max() + 3, columns, 2), dtype=np.float32)
    best, label = np.full(half.shape, np.inf, np.float32), np.zeros(half.shape, int)
    for dy, dx in np.ndindex(3, 3):
        seed = jitter[row + dy, column + dx]
        distance = (row + dy - 1 + seed[..., 0] - y) ** 2 + (column + dx - 1 + seed[..., 1] - x) ** 2
        label = np.where(distance < best, (row + dy) * columns + column + dx, label)
        best = np.minimum(distance, best)
    lesion, cells = np.bincount(label.ravel(), half.ravel()), np.bincount(label.ravel())
    return enlarge((lesion > 0.5 * cells)[label], outline.shape) > 0.5


# ------------------------------------------------------------------------ skin and pigment

def render_skin(rng, shape, scale: float, attributes) -> tuple[np.ndarray, np.ndarray]:
    """Skin without a lesion, float32 (H, W, 3) in 0..255, and its grain, float32 (H, W), variance 1."""
    half = ((shape[0] + 1) // 2, (shape[1] + 1) // 2)
    skin_type, cast = int(rng.choice(6, p=SKIN_SHARES)), pick(rng, CASTS)
    attributes.update(skin_type=skin_type + 1, cast=cast)
    gain = np.array(CASTS[cast][1:], np.float32)
    tone = SKIN_TONES[skin_type] * rng.uniform(0.92, 1.06) * gain ** rng.uniform(0.4, 1.0)

    f, orientation = frequencies(shape)
    first, second = rng.uniform(0, np.pi), rng.uniform(0.8, 1.5)
    creases = sum(np.exp(-(np.sin(orientation - first - turn) / 0.3) ** 2) for turn in (0, second))
    creases *= np.exp(-(np.log(f * 11 * scale) / 0.7) ** 2)
    grain = spectral_noise(rng, shape, f ** -0.8 * (1 + float(rng.choice([0.3, 1.6])) * rng.random() * creases))

    blood = rng.uniform(0.015, 0.055) * lattice_noise(rng, half, 40 * scale, 5, 0.75)
    melanin = rng.uniform(0.01, 0.035) * lattice_noise(rng, half, 90 * scale, 6, 0.75)
    if rng.random() < 0.25:
        attributes["artefacts"].append("vessels")
        ridge = 1 - np.abs(lattice_noise(rng, half, 26 * scale, 3))
        blood += rng.uniform(0.12, 0.35) * ramp(ridge, 0.8, 1.0) * ramp(lattice_noise(rng, half, 70 * scale), 0, 1.2)
    if rng.random() < 0.2:
        attributes["artefacts"].append("freckles")
        melanin += rng.uniform(0.06, 0.18) * ramp(lattice_noise(rng, half, 30 * scale, 4, 0.7), 0.6, 2.2)
    fine = rng.uniform(0.012, 0.035) * grain
    absorbed = (enlarge(melanin, shape) + fine)[..., None] * MELANIN + (enlarge(blood, shape) + fine)[..., None] * BLOOD
    return tone * np.exp(-absorbed), grain


def honeycomb(rng, shape, cell: float) -> np.ndarray:
    """Pigment network: 1 on the lines of an irregular honeycomb of `cell` pixels, 0 in its holes."""
    y, x = (c + cell * (0.45 * lattice_noise(rng, shape, 1.8 * cell) + 1.2 * lattice_noise(rng, shape, 9 * cell))
            for c in grid_of(shape))
    start, wave = rng.uniform(0, np.pi), 2 * np.pi / (0.866 * cell)
    waves = (np.cos(x * (wave * math.cos(a)) + y * (wave * math.sin(a)))
             for a in (start, start + np.pi / 3, start + 2 * np.pi / 3))
    return ramp(sum(waves), 0.9, -0.9)


def pigments(rng, d: np.ndarray, shade: str, attributes) -> tuple[np.ndarray, ...]:
    """Amounts of melanin, blood, deep melanin and white scar for a half-size field `d`; four (h, w)."""
    radius = math.sqrt((d < 0).sum() / math.pi)
    y, x = (c / radius for c in grid_of(d.shape))

    def zone(threshold: float, cell: float) -> np.ndarray:
        """One side of the lesion, or islands in it, with a margin of random softness; 0 to 1."""
        slope, soft = rng.normal(0, 0.4, 2), rng.uniform(0.3, 1.0)
        side = slope[0] * (x - x.mean()) + slope[1] * (y - y.mean())
        return ramp(lattice_noise(rng, d.shape, radius * cell, 5, 0.55) + side, threshold - soft, threshold + soft)

    mottle = np.maximum(1 + rng.uniform(0.12, 0.3) * lattice_noise(rng, d.shape, radius * 0.5, 5, 0.65), 0.25)
    melanin = rng.uniform(*SHADES[shade][1:]) * mottle * (1 + rng.uniform(-0.25, 0.7) * ramp(d, 0.05, -0.9))
    blood = (rng.uniform(0.0, 0.15) + (rng.uniform(0.5, 0.9) if shade == "red" else 0)) * mottle
    deep, white = np.zeros_like(d), np.zeros_like(d)
    shares = {"dark brown": 0.55, "light brown": 0.35, "red": 0.22, "blue-grey": 0.22, "white": 0.14}
    colours = [name for name, share in shares.items() if shade != "faint" and rng.random() < share]
    if "dark brown" in colours:
        melanin += rng.uniform(0.5, 1.3) * zone(0.6, 0.7)
    if "light brown" in colours:
        melanin *= 1 - rng.uniform(0.35, 0.6) * zone(0.5, 0.8)
    if "red" in colours:
        blood += rng.uniform(0.2, 0.6) * zone(0.5, 0.7)
    if "blue-grey" in colours:
        deep += rng.uniform(0.4, 1.0) * zone(0.7, 0.6) * ramp(d, -0.1, -0.5)
    if "white" in colours:
        white += rng.uniform(0.3, 0.6) * zone(1.0, 0.5) * ramp(d, -0.15, -0.5)
    attributes.update(shade=shade, low_contrast=shade == "faint", colours=colours)
    return melanin, blood, deep, white


def paint_lesion(rng, skin, grain, d_half, scale: float, attributes) -> np.ndarray:
    """`skin` (H, W, 3) with the light absorbed by a lesion of half-size field `d_half`; float32 (H, W, 3)."""
    shape, half = skin.shape[:2], d_half.shape
    size = 2 * math.sqrt((d_half < 0).sum() / math.pi)
    amounts = pigments(rng, d_half, pick(rng, SHADES), attributes)
    structures = [name for name, share in (("network", 0.5), ("globules", 0.4)) if rng.random() < share]
    attributes["structures"] = structures
    detail = rng.uniform(0.06, 0.16) * grain
    patchy = enlarge(ramp(lattice_noise(rng, half, size * 0.35, 2), -0.9, 0.9), shape)
    if "network" in structures:
        detail += rng.uniform(0.3, 0.75) * patchy * (honeycomb(rng, shape, rng.uniform(5, 10) * scale) - 0.45)
    margin = 0.8 * detail
    if "globules" in structures:
        f, _ = frequencies(shape)
        spots = spectral_noise(rng, shape, np.exp(-((f * rng.uniform(5, 14) * scale - 1) / 0.4) ** 2))
        detail += rng.uniform(0.5, 1.2) * ramp(spots, 0.9, 1.8) * (1 - 0.7 * patchy)

    softness = math.exp(rng.uniform(math.log(0.09), math.log(0.42)))
    softness = softness * np.exp(rng.uniform(0.3, 0.7) * lattice_noise(rng, half, size * 0.35))
    # Annotators follow the outer margin, so that a third of the full pigment lies on the outline;
    # the margin dissolves along the network.
    coverage = ramp(enlarge(d_half / np.clip(softness, 2.5 / size, 0.7), shape) - margin, 0.62, -1.0)
    melanin, blood, deep, white = (coverage * enlarge(amount, shape) for amount in amounts)
    if attributes["skin_type"] >= 5:
        melanin, blood = 1.4 * melanin, 1.4 * blood  # dark skin leaves less light to absorb
    hue = MELANIN * rng.uniform(0.9, 1.1, 3).astype(np.float32)
    absorbed = (melanin * np.maximum(1 + detail, 0.1))[..., None] * hue
    absorbed += blood[..., None] * BLOOD + deep[..., None] * DEEP_MELANIN
    image = DARKEST + (skin - DARKEST) * np.exp(-absorbed)
    return image + np.clip(white, 0, 1)[..., None] * (np.minimum(skin * 1.12, 245) - image)


# ------------------------------------------------------------------- artefacts and exposure

def blend(image: np.ndarray, alpha: np.ndarray, colour) -> None:
    """Paint `colour` over `image` (H, W, 3) in place with opacity `alpha` (H, W) in [0, 1]."""
    image += alpha[..., None] * (np.asarray(colour, np.float32) - image)


def stroke_layer(shape, strokes) -> np.ndarray:
    """Opacity (H, W) in [0, 1] of antialiased `strokes`: (points (n, 2) as x, y; widths (n,)) in pixels."""
    canvas = Image.new("L", (shape[1] * 2, shape[0] * 2))
    draw = ImageDraw.Draw(canvas)
    for points, widths in strokes:
        points = (2 * points).tolist()
        for start, end, width in zip(points[:-1], points[1:], widths):
            draw.line((*start, *end), fill=255, width=max(1, round(2 * width)))
    return np.asarray(canvas.reduce(2), np.float32) / 255


def hair_strokes(rng, shape, count: int, thickness: float):
    """Curved hairs that lie roughly one way and taper at both ends."""
    t, comb = np.linspace(0, 1, 26)[:, None], rng.uniform(0, 2 * np.pi)
    for _ in range(count):
        angle, length = comb + rng.normal(0, 0.55), rng.uniform(0.25, 1.1) * shape[0]
        along = np.array((math.cos(angle), math.sin(angle)))
        bend = rng.normal(0, 0.5) * t * (1 - t) + rng.normal(0, 0.5) * t * (1 - t) * (0.5 - t)
        start = rng.uniform(-0.1, 1.1, 2) * shape[::-1]
        points = start + length * (t * along + bend * np.array((-along[1], along[0])))
        yield points, thickness * rng.uniform(0.6, 1.4) * np.sqrt(np.sin(np.pi * (0.04 + 0.9 * t[:, 0])))


def ruler_strokes(rng, shape, scale: float):
    """A millimetre ruler marked "mm" near the lower edge, a little askew."""
    tilt, ticks = rng.choice([0.0, rng.normal(0, 0.15)]), int(rng.choice([10, 15, 20]))
    length = rng.uniform(0.5, 0.75) * shape[1]
    axes = np.array(((math.cos(tilt), math.sin(tilt)), (math.sin(tilt), -math.cos(tilt))))
    low = rng.uniform(0.88, 0.94) * shape[0] - max(0, tilt) * length / 2
    origin = np.array((rng.uniform(0.1, 0.2) * shape[1], low))
    lines = [((0, 0), (length, 0))]
    lines += [((x, 0), (x, (6 if i % 5 else 11) * scale)) for i, x in enumerate(np.linspace(0, length, ticks + 1))]
    letter = np.array(((0, -13), (0, -6), (3.5, -9), (7, -6), (7, -13))) * scale
    lines += [letter + (2 * scale, 0), letter + (12 * scale, 0)]
    for line in lines:
        yield origin + np.asarray(line) @ axes, [1.2 * scale] * len(line)


def add_bubble(rng, image: np.ndarray, radius: float, light: float) -> None:
    """Draw one gel bubble in place: a dark rim, a bright one towards `light`, a highlight."""
    height, width = image.shape[:2]
    cx, cy, reach = rng.uniform(0, width), rng.uniform(0, height), radius * 1.3 + 3
    top, left = max(0, int(cy - reach)), max(0, int(cx - reach))
    window = image[top:int(cy + reach), left:int(cx + reach)]
    y, x = grid_of(window.shape)
    y, x, rim = y + (top - cy), x + (left - cx), max(0.9, 0.07 * radius)
    r, facing = np.hypot(x, y), 0.5 + 0.5 * np.cos(np.arctan2(y, x) - light)
    spot = np.hypot(x - 0.5 * radius * math.cos(light), y - 0.5 * radius * math.sin(light))
    blend(window, 0.22 * np.exp(-((r - radius) / rim) ** 2), (70, 48, 42))
    blend(window, (0.12 + 0.5 * facing ** 3) * np.exp(-((r - radius + 1.6 * rim) / rim) ** 2), (255, 250, 245))
    blend(window, 0.85 * np.exp(-(spot / max(0.9, 0.11 * radius)) ** 2), (255, 255, 255))


def add_artefacts(rng, image, grain, lesion_x: float, scale: float, attributes) -> None:
    """Patch, ink, hairs, ruler, bubbles and reflections, each in a share of the pictures; in place."""
    shape = height, width = image.shape[:2]
    y, x = grid_of(shape)
    shares = {"patch": 0.06, "ink": 0.07, "hairs": 0.5, "light hairs": 0.12, "ruler": 0.12, "bubbles": 0.22,
              "reflections": 0.15}
    if attributes["size_class"] in ("large", "huge"):
        shares["patch"] = 0  # no room beside the lesion
    names = [name for name, share in shares.items() if rng.random() < share]
    attributes["artefacts"] += names
    away = -1 if lesion_x > width / 2 else 1  # the side that the lesion leaves free
    if "patch" in names:
        radius = rng.uniform(0.25, 0.4) * height
        cx = width * (0.5 + 0.5 * away) + away * radius * rng.uniform(0.3, 0.6)
        r = np.hypot(x - cx, y - rng.uniform(0.2, 0.8) * height)
        colour = ((232, 150, 40), (70, 110, 190), (60, 150, 90), (225, 200, 60))[rng.integers(4)]
        blend(image, 0.35 * ramp(r, radius * 1.05, radius), (60, 40, 35))
        blend(image, ramp(r, radius + 1, radius - 1) * (0.94 + 0.02 * np.clip(grain, -3, 3)), colour)
    if "ink" in names:
        cx, cy = width * (0.5 + away * rng.uniform(0.3, 0.45)), rng.uniform(0.15, 0.85) * height
        stroke = np.exp(-((x - cx) / (14 * scale)) ** 2 - ((y - cy) / (60 * scale)) ** 2)
        blend(image, 0.8 * ramp(grain + 3.2 * stroke, 2.2, 3.4), (96, 62, 140))
    if "hairs" in names:
        count = int(rng.choice([3, 8, 20], p=[0.5, 0.33, 0.17]) * rng.uniform(0.6, 1.5)) + 1
        hairs = stroke_layer(shape, hair_strokes(rng, shape, count, rng.uniform(0.8, 2.0) * scale))
        blend(image, rng.uniform(0.65, 0.95) * hairs, np.array((52, 34, 28)) * rng.uniform(0.5, 1.6))
    if "light hairs" in names:
        hairs = stroke_layer(shape, hair_strokes(rng, shape, int(rng.integers(2, 9)), rng.uniform(0.6, 1.2) * scale))
        blend(image, rng.uniform(0.35, 0.7) * hairs, (222, 200, 170))
    if "ruler" in names:
        blend(image, rng.uniform(0.6, 0.9) * stroke_layer(shape, ruler_strokes(rng, shape, scale)), (40, 34, 34))
    if "bubbles" in names:
        light = rng.uniform(0, 2 * np.pi)
        for _ in range(rng.integers(1, 15)):
            add_bubble(rng, image, scale * math.exp(rng.uniform(math.log(3), math.log(26))), light)
    if "reflections" in names:
        glints = lattice_noise(rng, shape, 3 * scale + 1, 2) + 0.9 * lattice_noise(rng, shape, 70 * scale)
        blend(image, 0.5 * ramp(glints, 2.9, 4.2), (255, 252, 250))


def expose(rng, image, dark: np.ndarray, scale: float, attributes) -> np.ndarray:
    """Light `image` unevenly, blacken it by `dark` (H, W) in [0, 1], defocus, add noise; uint8 (H, W, 3)."""
    height, width = image.shape[:2]
    y, x = (2 * c / c.size - 1 for c in grid_of((height, width)))
    falloff = rng.uniform(0.0, 0.14) if rng.random() < 0.65 else rng.uniform(0.15, 0.32)
    slope = rng.normal(0, 0.05, 2)
    image = image * (1 + slope[0] * x + slope[1] * y + falloff * (0.25 - 0.6 * (x * x + y * y)))[..., None]
    blend(image, dark, (9, 7, 8))
    attributes["defocus"] = bool(rng.random() < 0.2)
    blur = ImageFilter.GaussianBlur(rng.uniform(0.9, 1.9) * scale if attributes["defocus"] else 0.45)
    picture = np.asarray(Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).filter(blur))
    noise = rng.uniform(0.8, 3.2) * rng.standard_normal((height, width, 1), dtype=np.float32)
    return np.clip(picture + noise + 0.5, 0, 255).astype(np.uint8)


def render_lesion(index: int, seed: int) -> Lesion:
    """Render picture `index` of the set named by `seed`; it depends on these two alone.

    Args:
        index: number within the set, at least 0.
        seed: any integer of at least 0.

    Returns:
        A `Lesion`; its mask has at least one pixel of 255 and one of 0.

    Raises:
        ValueError: an argument is negative.
    """
    if index < 0 or seed < 0:
        raise ValueError(f"index and seed must be at least 0, not {index} and {seed}")
    rng = np.random.default_rng([seed, index])
    width, height = SIZES[rng.choice(len(SIZES), p=SIZE_SHARES)]
    shape, half, scale = (height, width), ((height + 1) // 2, (width + 1) // 2), min(height, width) / 450
    size_class, style = pick(rng, SIZE_CLASSES), str(rng.choice(list(ANNOTATIONS), p=list(ANNOTATIONS.values())))
    attributes: dict[str, object] = {"size_class": size_class, "annotation": style, "artefacts": []}

    area = math.exp(rng.uniform(*np.log(SIZE_CLASSES[size_class][1:])))
    radius = math.sqrt(area * half[0] * half[1] / math.pi)
    spread = 0.09 if size_class in ("small", "medium") else 0.05
    centre = np.array((half[1], half[0])) * (0.5 + np.clip(rng.normal(0, spread, 2), -0.25, 0.25))
    if rng.random() < 0.08:  # cut by one side of the frame
        axis = int(rng.integers(2))
        centre[axis] = rng.choice([0.05, 0.95]) * (half[1], half[0])[axis]
        radius *= 1.25
    d, dark = lesion_field(rng, half, centre, radius), np.zeros(shape, np.float32)
    if rng.random() < 0.10:  # a round field of view, which cuts the lesion too
        attributes["artefacts"].append("dark field")
        y, x = grid_of(shape)
        off = np.hypot(x - width * rng.uniform(0.48, 0.52), y - height * rng.uniform(0.48, 0.52))
        off /= rng.uniform(0.50, 0.58) * max(height, width)
        dark, d = ramp(off, 0.985, rng.uniform(1.0, 1.06)), np.maximum(d, 4 * (off[::2, ::2] - 1))
    # The level that gives the area drawn above, whatever lobes, notches and frame have done to it.
    d -= np.partition(d.ravel(), int(area * d.size))[int(area * d.size)]
    outline = enlarge(main_part(d), shape) > 0.5
    attributes["touches_frame"] = bool(outline[[0, -1]].any() or outline[:, [0, -1]].any())

    skin, grain = render_skin(rng, shape, scale, attributes)
    image = paint_lesion(rng, skin, grain, d, scale, attributes)
    add_artefacts(rng, image, grain, 2 * centre[0], scale, attributes)
    image = expose(rng, image, dark, scale, attributes)
    mask = annotate(rng, outline, style)
    if mask.all() or not mask.any():
        mask = outline
    return Lesion(image, mask.astype(np.uint8) * 255, outline, attributes)


# ------------------------------------------------------------------------------------ files

def write_picture(path: Path, pixels: np.ndarray, **options) -> None:
    """Encode `pixels` in memory and write the file whole or not at all."""
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, **options)
    with whole_file(path) as stream:
        stream.write(encoded.getvalue())


def pair_paths(index: int, root: str | Path) -> tuple[Path, Path]:
    """Where picture and mask `index` lie below `root`."""
    name = f"ISIC_{FIRST_NUMBER + index:07d}"
    return Path(root, IMAGE_FOLDER, f"{name}.jpg"), Path(root, MASK_FOLDER, f"{name}_segmentation.png")


def write_pair(index: int, root: str, seed: int) -> None:
    """Write picture and mask `index` below `root`; files already there are left alone."""
    image_path, mask_path = pair_paths(index, root)
    if image_path.exists() and mask_path.exists():
        return
    lesion = render_lesion(index, seed)
    if not mask_path.exists():
        write_picture(mask_path, lesion.mask, format="PNG")
    if not image_path.exists():
        write_picture(image_path, lesion.image, format="JPEG", quality=92)


def is_synthetic(root: str | Path) -> bool:
    """Whether a dataset folder was written by :func:`write_synthetic_dataset`."""
    return Path(root, MARKER).is_file()


def mark(root: Path, seed: int) -> None:
    """Mark a folder as synthetic; pictures of another version or seed that lie there are deleted first."""
    text = f"Made-up skin lesions, drawn by a program and not photographed. Version {VERSION}, seed {seed}.\n".encode()
    path = root / MARKER
    if path.is_file() and path.read_bytes() == text:
        return
    for folder in (IMAGE_FOLDER, MASK_FOLDER):
        for old in (root / folder).glob(f"ISIC_{FIRST_NUMBER // 10**6}??????*"):
            old.unlink()
    with whole_file(path) as stream:
        stream.write(text)


def write_synthetic_dataset(root, count: int, seed: int = 42, processes: int = 2,
                            progress: Callable[[], object] | None = None) -> None:
    """Write `count` synthetic pairs in the layout of ISIC 2018 Task 1.

    Pair i depends on `seed` and i alone: a smaller set is a prefix of a larger one, and the
    number of processes changes no byte. Files already under their final name are left alone,
    so that an interrupted call can be repeated; those of another seed or of another version of
    this module are drawn again. The file `SYNTHETIC.txt` tells whoever finds the folder what it is.

    Args:
        root: folder, made if missing.
        count: number of pairs, at least 1.
        seed: names the set, at least 0.
        processes: 1 renders in this process; more start that many workers by spawn, so that
            a script must then call this under `if __name__ == "__main__"`.
        progress: called without arguments once for each pair that is in place.

    Raises:
        ValueError: `count` or `processes` is below 1, or `seed` below 0.
        UserError: a file cannot be written.
    """
    if count < 1 or processes < 1 or seed < 0:
        raise ValueError("count and processes must be at least 1 and seed at least 0, "
                         f"not {count}, {processes} and {seed}")
    for folder in (IMAGE_FOLDER, MASK_FOLDER):
        try:
            Path(root, folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {Path(root, folder)}: {error.strerror or error}; run where you may write") from error
        remove_partials(Path(root, folder))
    mark(Path(root), seed)
    drawn = all(path.exists() for index in range(count) for path in pair_paths(index, root))
    write, notify = partial(write_pair, root=str(root), seed=seed), progress or (lambda: None)
    if processes == 1 or drawn:  # no process is worth starting to look at what is there
        for index in range(count):
            write(index)
            notify()
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, count), mp_context=context, initializer=end_with_parent) as pool:
        try:
            with deaf_children():
                finished = pool.map(write, range(count), chunksize=4)
            for _ in finished:
                notify()
        except BrokenProcessPool as error:
            raise UserError(f"a process that draws into {root} died; run the same command again") from error
        finally:
            pool.shutdown(cancel_futures=True)  # after a stop or a full disk the rest is not worth waiting for
