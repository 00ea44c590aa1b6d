"""Drawing skin lesions as a dermatoscope shows them, with the masks that annotators might have drawn.

A lesion is an implicit function (an ellipse, warped and roughened by noise) whose pigments darken a
picture of skin by Beer-Lambert absorption. Smooth fields are computed at half size and enlarged;
fine structure and artefacts are full size.

Shape legend: H W the picture, both even; h w the half-size grid, h = H / 2, w = W / 2.
Lengths written ``x * scale`` are in pixels of a picture whose shorter side is 450.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import cv2
import numpy as np
import scipy.fft
from numpy.random import Generator
from scipy import ndimage

Shape = tuple[int, ...]  # rows, columns
Stroke = tuple[np.ndarray, np.ndarray]  # points (n, 2) as x, y; widths (n,); in pixels

SIZES = ((400, 300), (512, 384), (560, 420), (600, 450), (600, 450), (640, 480), (576, 540), (450, 600), (480, 480))  # W, H
ANNOTATIONS = {"exact": 0.32, "polygon": 0.38, "generous": 0.18, "tight": 0.12}  # share of the pictures
SKIN_SHARES = (0.26, 0.31, 0.20, 0.11, 0.07, 0.05)  # Fitzpatrick I to VI; below, their RGB under a dermatoscope
SKIN_TONES = ((240, 217, 206), (231, 201, 184), (216, 179, 155), (186, 143, 115), (146, 106, 82), (114, 84, 69))
DARKEST = np.array((27, 22, 22), np.float32)  # what full absorption still reflects
MELANIN, BLOOD, DEEP_MELANIN = range(3)  # the last is blue-grey, seen through scattering dermis; below, absorbance in R, G, B
ABSORBANCE = np.array(((0.53, 0.86, 1.27), (0.16, 0.92, 0.74), (1.15, 0.86, 0.60)), np.float32)
# Coloured parts: share of the lesions, pigment, amount at most, threshold (a high one makes the part small).
COLOURS = ((0.55, MELANIN, 1.3, 0.6), (0.22, BLOOD, 0.6, 0.5), (0.22, DEEP_MELANIN, 1.1, 0.8))
FAINT = 0.34  # a lesion with less melanin hardly differs from the skin


class Lesion(NamedTuple):
    """One picture: ``image`` uint8 (H, W, 3) RGB; ``mask`` uint8 (H, W) of 0 and 255, as annotated;
    ``outline`` bool (H, W), the true extent; ``attributes``, what was drawn and how."""

    image: np.ndarray
    mask: np.ndarray
    outline: np.ndarray
    attributes: dict[str, Any]


def grid(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates y (rows, 1) and x (1, columns), float32."""
    return np.arange(shape[0], dtype=np.float32)[:, None], np.arange(shape[1], dtype=np.float32)[None]


def ramp(field: np.ndarray, start: float, stop: float) -> np.ndarray:
    """Smooth step from 0 at ``start`` to 1 at ``stop``, which may be the smaller of the two."""
    t = np.clip((field - start) / (stop - start), 0, 1)
    return np.asarray(t * t * (3 - 2 * t))


def enlarge(field: np.ndarray) -> np.ndarray:
    """A half-size field (h, w) or (h, w, 3) at full size (H, W) or (H, W, 3), by cubic interpolation; float32."""
    return np.asarray(cv2.resize(field.astype(np.float32), None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC))


def noise(rng: Generator, shape: Shape, size: float, fall: float = 2.2, stretch: float = 1.0) -> np.ndarray:
    """Random field of zero mean and unit variance, made from its spectrum; float32 of ``shape``.

    It varies over ``size`` pixels; for higher frequencies f its amplitude falls as f ** -``fall`` (6 is smooth, 1 is
    rough). Its forms are ``stretch`` times longer than wide, all along one direction.
    """
    turn = rng.uniform(0, np.pi)
    fy, fx = scipy.fft.fftfreq(shape[0])[:, None], scipy.fft.rfftfreq(shape[1])[None]
    along, across = fx * math.cos(turn) + fy * math.sin(turn), fy * math.cos(turn) - fx * math.sin(turn)
    amplitude = (1 + (2 * size) ** 2 * ((stretch * along) ** 2 + across**2)).astype(np.float32) ** np.float32(-fall / 2)
    amplitude[0, 0] = 0
    spectrum = amplitude * rng.standard_normal((*amplitude.shape, 2), dtype=np.float32).view(np.complex64)[..., 0]
    field = scipy.fft.irfft2(spectrum, s=shape)
    return np.asarray(field / field.std())


# ---------------------------------------------------------------- outline and annotation


def lesion_field(rng: Generator, shape: Shape, centre: np.ndarray, radius: float) -> np.ndarray:
    """Implicit lesion: negative inside, in units of ``radius``; float (h, w)."""
    wild = rng.random() ** 1.5  # most lesions are nearly oval, some are ragged
    y, x = grid(shape)
    x = (x - centre[0]) / radius + (0.05 + 0.22 * wild) * noise(rng, shape, radius * 0.9, 2.6)
    y = (y - centre[1]) / radius + (0.05 + 0.22 * wild) * noise(rng, shape, radius * 0.9, 2.6)
    rough = noise(rng, shape, radius * 0.45, 1.9)
    return np.asarray(np.hypot(x / 1.12, y * 1.12) - 1 + (0.03 + 0.07 * wild * rng.random()) * rough)


def annotate(rng: Generator, outline: np.ndarray, style: str) -> np.ndarray:
    """The bool (H, W) mask that an annotator of the given ``style`` draws of a bool ``outline`` (H, W)."""
    drawn, radius = outline.astype(np.uint8), math.sqrt(outline.sum() / math.pi)
    if style == "exact":
        return outline
    if style == "polygon":
        contours, _ = cv2.findContours(drawn, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        corners = cv2.approxPolyDP(max(contours, key=len), radius * rng.uniform(0.05, 0.2), closed=True)
        return cv2.fillPoly(np.zeros_like(drawn), [corners], 1) > 0
    # A blurred outline cut below (above) one half has grown (shrunk) and is smoother.
    sigma = radius * rng.uniform(0.05, 0.12) + 1
    level = rng.uniform(0.12, 0.3) if style == "generous" else rng.uniform(0.62, 0.8)
    return cv2.GaussianBlur(drawn.astype(np.float32), (0, 0), sigma, borderType=cv2.BORDER_REPLICATE) > level


# ---------------------------------------------------------------- skin and pigment


def render_skin(rng: Generator, shape: Shape, scale: float, tone: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Skin of the given RGB without a lesion, float32 (H, W, 3) in 0..255, and its grain, float32 (H, W), variance 1."""
    half = (shape[0] // 2, shape[1] // 2)
    creases = noise(rng, half, 1.6 * scale, 3, stretch=7) + noise(rng, half, 1.6 * scale, 3, stretch=7)
    grain = noise(rng, shape, 200 * scale, 0.8) + rng.uniform(0, 0.1 if rng.random() < 0.5 else 0.45) * enlarge(creases)
    grain /= grain.std()
    blood = rng.uniform(0.015, 0.055) * noise(rng, half, 40 * scale, 1.6)
    melanin = rng.uniform(0.01, 0.035) * noise(rng, half, 90 * scale, 1.6)
    if rng.random() < 0.25:  # vessels
        ridge = 1 - np.abs(noise(rng, half, 13 * scale, 3.5))
        blood += rng.uniform(0.15, 0.45) * ramp(ridge, 0.8, 1.0) * ramp(noise(rng, half, 40 * scale, 6), 0, 1.2)
    fine = rng.uniform(0.012, 0.035) * grain
    amounts = enlarge(np.stack([melanin, blood], axis=2)) + fine[..., None]
    pinker, warmer = abs(rng.normal(0, 0.06)), rng.normal(0.01, 0.06)  # white balance
    balance = np.exp(np.array((warmer, -pinker, -warmer), np.float32))
    return np.array(tone, np.float32) * balance * rng.uniform(0.92, 1.06) * np.exp(-amounts @ ABSORBANCE[:2]), grain


def absorbed_light(rng: Generator, d: np.ndarray, melanin: float) -> np.ndarray:
    """Absorbance in R, G and B of a lesion with half-size field ``d`` and ``melanin`` on average; (H, W, 3)."""
    radius = math.sqrt((d < 0).sum() / math.pi)
    y, x = (c / radius for c in grid(d.shape))

    def zone(threshold: float) -> np.ndarray:
        """One side of the lesion, or islands in it, with a margin of random softness; 0 to 1."""
        soft = rng.uniform(0.3, 1.0)
        side = rng.normal(0, 0.4) * (x - x.mean()) + rng.normal(0, 0.4) * (y - y.mean())
        return ramp(noise(rng, d.shape, radius * rng.uniform(0.5, 0.9)) + side, threshold - soft, threshold + soft)

    mottle = np.maximum(1 + rng.uniform(0.12, 0.3) * noise(rng, d.shape, radius * 0.5, 1.8), 0.25)
    amounts = np.zeros((*d.shape, 3), np.float32)  # of melanin, blood, deep melanin
    amounts[..., MELANIN] = melanin * mottle * (1 + rng.uniform(-0.25, 0.7) * ramp(d, 0.05, -0.9))
    amounts[..., BLOOD] = rng.uniform(0.0, 0.15) * mottle
    if melanin >= FAINT:
        if rng.random() < 0.09:  # a red lesion
            amounts *= rng.uniform(0.2, 0.4)
            amounts[..., BLOOD] += rng.uniform(0.5, 0.9) * mottle
        for share, pigment, most, threshold in COLOURS:
            if rng.random() < share:
                amounts[..., pigment] += most * rng.uniform(0.4, 1) * zone(threshold)
        if rng.random() < 0.4:  # a part is paler, up to the colour of the skin
            amounts *= 1 - rng.uniform(0.35, 0.9) * zone(0.7)[..., None]
    return enlarge(amounts @ ABSORBANCE)


def honeycomb(rng: Generator, shape: Shape, cell: float) -> np.ndarray:
    """Pigment network: 1 on the lines of an irregular honeycomb of ``cell`` pixels, 0 in its holes; (H, W)."""
    half, wave = (shape[0] // 2, shape[1] // 2), 2 * np.pi / (0.866 * cell)
    y, x = (c + cell * enlarge(0.45 * noise(rng, half, 0.6 * cell, 6) + 1.2 * noise(rng, half, 3 * cell, 6)) for c in grid(shape))
    angles = rng.uniform(0, np.pi) + np.arange(3) * np.pi / 3
    waves = [np.cos(x * (wave * math.cos(angle)) + y * (wave * math.sin(angle))) for angle in angles]
    return ramp(waves[0] + waves[1] + waves[2], 0.9, -0.9)


def coverage_of(rng: Generator, d: np.ndarray, grain: np.ndarray, scale: float) -> np.ndarray:
    """How much of its pigment a lesion of half-size field ``d`` (h, w) shows, at least 0, about 1 inside; float32 (H, W)."""
    size = 2 * math.sqrt((d < 0).sum() / math.pi)
    detail = rng.uniform(0.06, 0.16) * grain
    patchy = enlarge(ramp(noise(rng, d.shape, size * 0.2, 3), -0.9, 0.9))
    if rng.random() < 0.5:
        detail += rng.uniform(0.3, 0.75) * patchy * (honeycomb(rng, grain.shape, rng.uniform(5, 10) * scale) - 0.45)
    margin = 0.8 * detail
    if rng.random() < 0.4:  # globules
        spots = noise(rng, grain.shape, rng.uniform(1.5, 4) * scale, 6)
        detail += rng.uniform(0.5, 1.2) * ramp(spots, 0.9, 1.8) * (1 - 0.7 * patchy)
    typical = math.exp(rng.uniform(math.log(0.09), math.log(0.42)))
    softness = np.clip(typical * np.exp(rng.uniform(0.3, 0.7) * noise(rng, d.shape, size * 0.2, 6)), 2.5 / size, 0.7)
    # Annotators follow the outer margin, so that a third of the full pigment lies on the outline;
    # the margin dissolves along the network.
    return ramp(enlarge(d / softness) - margin, 0.62, -1.0) * np.maximum(1 + detail, 0.1)


# ---------------------------------------------------------------- artefacts, exposure and the whole picture


def curves(rng: Generator, shape: Shape, scale: float, most: int, thickness: float) -> Iterator[Stroke]:
    """Up to ``most`` curved hairs, or lines of a pen, that lie roughly one way and taper at both ends."""
    t, comb = np.linspace(0, 1, 26), rng.uniform(0, 2 * np.pi)
    thickness *= scale * rng.uniform(0.5, 1.2)
    for _ in range(1 + int(most * rng.random() ** 2)):
        angle, length = comb + rng.normal(0, 0.55), rng.uniform(0.25, 1.1) * shape[0]
        bend = t * (1 - t) * (rng.normal(0, 0.5) + rng.normal(0, 0.5) * (0.5 - t))
        turn = np.array(((math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))))
        points = rng.uniform(-0.1, 1.1, 2) * shape[::-1] + length * np.stack([t, bend], 1) @ turn
        yield points, thickness * rng.uniform(0.6, 1.4) * np.sqrt(np.sin(np.pi * (0.04 + 0.9 * t)))


def ruler(rng: Generator, shape: Shape, scale: float) -> Iterator[Stroke]:
    """A millimetre scale near the lower edge."""
    ticks = rng.choice([11, 16, 21])
    x = np.linspace(rng.uniform(0.1, 0.2), rng.uniform(0.7, 0.9), ticks) * shape[1]
    heights = np.resize([0, 11, 0, 0, 6, 0, 0, 6, 0, 0, 6, 0, 0, 6, 0], 3 * ticks) * scale  # from the line, up and back
    yield np.stack([np.repeat(x, 3), rng.uniform(0.88, 0.94) * shape[0] - heights], 1), np.full(3 * ticks, 1.2 * scale)


def bubbles(rng: Generator, shape: Shape, scale: float) -> Iterator[Stroke]:
    """Bubbles in the gel: rings, thickest towards a light that all share."""
    t, light = np.linspace(0, 2 * np.pi, 41), rng.uniform(0, 2 * np.pi)
    for _ in range(rng.integers(1, 15)):
        centre, radius = rng.random(2) * shape[::-1], scale * math.exp(rng.uniform(math.log(3), math.log(26)))
        yield centre + radius * np.stack([np.cos(t), np.sin(t)], 1), 0.9 + 0.08 * radius * np.maximum(np.cos(t - light), 0) ** 3


ARTEFACTS = (  # name, share of the pictures, what draws it, RGB
    ("ink", 0.07, partial(curves, most=4, thickness=6.0), (96, 62, 140)),
    ("hairs", 0.50, partial(curves, most=28, thickness=1.7), (56, 38, 30)),
    ("light hairs", 0.12, partial(curves, most=9, thickness=1.0), (222, 200, 170)),
    ("ruler", 0.12, ruler, (40, 34, 34)),
    ("bubbles", 0.22, bubbles, (255, 250, 245)),
)


def add_artefacts(rng: Generator, image: np.ndarray, scale: float) -> list[str]:
    """Paint artefacts over ``image`` (H, W, 3) in place; the names of those drawn."""
    height, width, _ = image.shape
    drawn = [artefact for artefact in ARTEFACTS if rng.random() < artefact[1]]
    for _, _, strokes, colour in drawn:
        canvas = np.zeros((2 * height, 2 * width), np.uint8)  # twice as large: reduced, the strokes have smooth edges
        for points, widths in strokes(rng, (height, width), scale):
            ends = np.rint(2 * points).astype(int).tolist()
            for start, end, thickness in zip(ends[:-1], ends[1:], widths):
                cv2.line(canvas, start, end, 255, max(1, round(2 * thickness)))
        alpha = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)[..., None] * np.float32(1 / 255)
        image += rng.uniform(0.45, 0.9) * alpha * (np.array(colour, np.float32) - image)
    return [name for name, *_ in drawn]


def expose(rng: Generator, image: np.ndarray, light: np.ndarray, scale: float) -> np.ndarray:
    """Light ``image`` unevenly and by ``light`` (H, W) in [0, 1], defocus, add noise; uint8 (H, W, 3)."""
    y, x = (2 * c / c.size - 1 for c in grid(light.shape))
    falloff = 0.32 * rng.random() ** 2
    light = light * (1 + rng.normal(0, 0.05) * x + rng.normal(0, 0.05) * y + falloff * (0.25 - 0.6 * (x * x + y * y)))
    sigma = rng.uniform(0.9, 1.9) * scale if rng.random() < 0.2 else 0.45
    picture = cv2.GaussianBlur(8 + image * light[..., None], (0, 0), sigma)
    picture += rng.uniform(0.8, 3.2) * rng.standard_normal((*light.shape, 1), dtype=np.float32)
    return np.asarray(np.clip(picture + 0.5, 0, 255), np.uint8)


def render_lesion(index: int, seed: int) -> Lesion:
    """Render picture ``index`` of the set named by ``seed``; it depends on these two alone.

    Args:
        index: number within the set, at least 0.
        seed: any integer of at least 0.

    Returns:
        The picture; its mask has at least one pixel of 255 and one of 0.

    Raises:
        ValueError: an argument is negative.
    """
    if index < 0 or seed < 0:
        raise ValueError(f"index and seed must be at least 0, not {index} and {seed}")
    rng = np.random.default_rng([seed, index])
    width, height = rng.choice(SIZES).tolist()
    half, scale = (height // 2, width // 2), min(height, width) / 450
    style, skin_type = str(rng.choice(list(ANNOTATIONS), p=list(ANNOTATIONS.values()))), int(rng.choice(6, p=SKIN_SHARES))
    melanin = float(np.clip(rng.lognormal(math.log(0.75), 0.6), 0.22, 2.6)) * (1.4 if skin_type >= 4 else 1)
    area = float(np.clip(rng.lognormal(math.log(0.10), 1.05), 0.01, 0.7))  # visible, as a share of the frame

    radius = math.sqrt(area * half[0] * half[1] / math.pi)
    centre = np.array(half[::-1]) * (0.5 + np.clip(0.07 * rng.standard_t(2, 2), -0.48, 0.48))  # a few are cut by the frame
    d, light = lesion_field(rng, half, centre, radius), np.ones((height, width), np.float32)
    artefacts = []
    if rng.random() < 0.10:  # a round field of view, which cuts the lesion too
        artefacts.append("dark field")
        y, x = grid(half)
        off = np.hypot(x - half[1] * rng.uniform(0.48, 0.52), y - half[0] * rng.uniform(0.48, 0.52))
        off /= rng.uniform(0.50, 0.58) * max(half)
        light, d = ramp(enlarge(off), rng.uniform(1.0, 1.06), 0.985), np.maximum(d, 4 * (off - 1))
    d -= np.quantile(d, area)  # the area drawn above, whatever noise and frame have done to it
    components, _ = ndimage.label(d < 0)
    extent = ndimage.binary_fill_holes(components == components.flat[d.argmin()])
    outline = enlarge(extent) > 0.5

    skin, grain = render_skin(rng, (height, width), scale, SKIN_TONES[skin_type])
    absorbed = absorbed_light(rng, d, melanin) * coverage_of(rng, d, grain, scale)[..., None]
    image = DARKEST + (skin - DARKEST) * np.exp(-absorbed)
    artefacts += add_artefacts(rng, image, scale)
    mask = annotate(rng, outline, style)
    if mask.all() or not mask.any():
        mask = outline
    attributes = {
        "annotation": style, "skin_type": skin_type + 1, "low_contrast": melanin < FAINT, "artefacts": artefacts,
        "touches_frame": bool(outline[[0, -1]].any() or outline[:, [0, -1]].any()),
    }
    return Lesion(expose(rng, image, light, scale), mask.astype(np.uint8) * 255, outline, attributes)
