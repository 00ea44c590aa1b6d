"""Decoding: an image and its mask from files of any kind, upright, checked and resized."""

from __future__ import annotations

import io
import threading
import warnings
from pathlib import Path
from typing import Any, Callable

import numpy as np
import PIL
from PIL import Image, ImageOps

from isic.layout import Pair
from runtime.errors import UserError, one_line

# Of the suffixes that pairs are looked for with; Pillow knows other formats, some of which start programs.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "TIFF", "WEBP", "GIF")
MAX_PIXELS = 2**26  # twice the largest dermoscopic photograph; a file of a few bytes may declare any number
MAX_BYTES = 2**31  # more than that many pixels take in any format, uncompressed
MIN_SIDE, MAX_ASPECT = 4, 100  # what is smaller or longer shows no lesion


_opening = threading.Lock()


def _open(path: Path) -> Image.Image:
    """Open an image file without decoding it; refuse what no picture is."""
    if not path.is_file():
        raise UserError(f"{path} is not a readable file; restore it or remove its pair", path)
    length = path.stat().st_size
    if length == 0:
        raise UserError(f"{path} is empty (0 bytes); restore it or remove its pair", path)
    if length > MAX_BYTES:
        raise UserError(f"{path} is too large to be a photograph ({length} bytes; at most {MAX_BYTES}); remove its pair", path)
    # from memory: of a file, Pillow asks for as many bytes as a chunk claims to have, and gets that much memory
    content = io.BytesIO(path.read_bytes())
    with _opening, warnings.catch_warnings():  # filters of warnings belong to the process, not to the thread
        warnings.simplefilter("ignore")  # too many pixels are an error here, whatever Pillow calls them
        image = Image.open(content, formats=IMAGE_FORMATS)
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise Image.DecompressionBombError(f"{image.width} x {image.height}")
    return image


def _guarded(path: Path, read: Callable[[], Any]) -> Any:
    """Call ``read``; every failure of Pillow becomes one line naming the file."""
    try:
        return read()
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{path} has too many pixels to be a photograph ({one_line(error)}; at most {MAX_PIXELS}); remove its pair", path
        ) from error
    except PIL.UnidentifiedImageError as error:
        raise UserError(f"{path} is not an image, whatever its name says; restore it or remove its pair", path) from error
    except Exception as error:  # Pillow's decoders raise almost anything on broken bytes
        raise UserError(
            f"cannot decode {path} ({type(error).__name__}: {one_line(error)}); restore it or remove its pair", path
        ) from error


def read_image(path: Path, size: int | None = None) -> np.ndarray:
    """Decode any image file to 8-bit RGB, upright, optionally resized.

    Grey, palette, RGBA (the alpha is dropped), CMYK, 16-bit and float images
    are converted; the EXIF orientation is applied. Upright JPEGs are decoded at
    a reduced scale when that leaves at least twice ``size`` on both sides, which
    differs from decoding them whole by a few grey levels at most.

    Args:
        path: the file.
        size: side of the square result, resized bilinearly with antialiasing
            when shrinking; None keeps the file's own size.

    Returns:
        uint8 (H, W, 3).

    Raises:
        UserError: the file is missing, truncated or not an image, has more than
            ``MAX_PIXELS``, a side below ``MIN_SIDE``, or sides that differ more
            than ``MAX_ASPECT`` times.
    """
    return _guarded(Path(path), lambda: _read_image(Path(path), size)[0])


def _read_image(path: Path, size: int | None) -> tuple[np.ndarray, tuple[int, int]]:
    with _open(path) as image:
        original = image.size
        if min(original) < MIN_SIDE or max(original) > MAX_ASPECT * min(original):
            raise UserError(
                f"{path} is {original[0]} x {original[1]} pixels, too small or too long to show a lesion; remove its pair", path
            )
        orientation, drafted = image.getexif().get(0x0112, 1), None
        if size is not None and image.format == "JPEG" and orientation == 1:
            drafted = image.draft("RGB", (2 * size, 2 * size))
        ImageOps.exif_transpose(image, in_place=True)
        rgb = _to_rgb(image)
        if orientation in (5, 6, 7, 8):
            original = original[::-1]
        if size is not None:
            # the last of the reduced pixels may lie partly outside the picture: its extent is not a whole number of them
            rgb = rgb.resize((size, size), Image.Resampling.BILINEAR, box=drafted and drafted[1])
        return np.array(rgb), original


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError("it holds NaN or infinite values")
        # 16-bit files use 0 to 65535, float files 0 to 1 or 0 to 255
        top = 1.0 if image.mode == "F" and values.max(initial=0) <= 1 else 255.0
        if image.mode != "F":
            top = 65535.0
        values *= 255.0 / top
        image = Image.fromarray(np.clip(np.rint(values, out=values), 0, 255, out=values).astype(np.uint8))
    return image.convert("RGB")


def read_mask(path: Path, size: int | None = None) -> np.ndarray:
    """Decode a mask file to 0 and 1, upright, optionally resized (nearest).

    A pixel is lesion where its grey value exceeds half of the file's largest
    one, so masks of 0 and 255, of 0 and 1, and soft ones all work. A few
    distinct levels that fill areas, as in a map of several classes, do not:
    which of them is the lesion cannot be known.

    Returns:
        uint8 (H, W) of 0 and 1.

    Raises:
        UserError: the file is missing, truncated, not an image, empty of
            lesion, or a map of several classes.
    """
    return _guarded(Path(path), lambda: _read_mask(Path(path), size)[0])


def _read_mask(path: Path, size: int | None) -> tuple[np.ndarray, tuple[int, int]]:
    with _open(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        original, nearest = image.size, Image.Resampling.NEAREST
        if image.mode not in ("L", "1", "I", "I;16", "I;16B", "I;16L", "F"):
            image = image.convert("RGB").convert("L")
        if image.mode == "L" and size is not None:
            # Nearly every mask: nothing but the histogram needs all of its millions of pixels, as resizing to the
            # nearest pixel and the comparison may change places.
            levels = np.flatnonzero(image.histogram())
            if levels[-1] > 0 and not 3 <= len(levels) <= 8:
                return (np.asarray(image.resize((size, size), nearest)) > levels[-1] / 2).astype(np.uint8), original
        values = np.asarray(image)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise UserError(f"mask {path} holds NaN or infinite values; correct it or remove its pair", path)
    peak = float(values.max(initial=0))  # arithmetic with the 8-bit number itself would overflow
    if not peak > 0:
        raise UserError(f"mask {path} is empty: it marks no lesion anywhere; correct it or remove its pair", path)
    classes = _class_levels(values, peak)
    if classes:
        raise UserError(
            f"mask {path} has {len(classes)} grey levels ({', '.join(f'{level:g}' for level in classes)}), like a map of "
            "several classes; save it with two, background and lesion, or remove its pair", path
        )
    binary = (values > peak / 2).astype(np.uint8)
    if size is not None:
        binary = np.asarray(Image.fromarray(binary).resize((size, size), nearest))
    return binary, original


def _class_levels(values: np.ndarray, peak: float) -> list[float]:
    """The grey levels of a mask, where they look like classes; none where they look like one soft or binary lesion.

    Classes are three to eight levels of which one between an eighth and seven
    eighths of ``peak`` fills areas: somewhere a block of 3 x 3 pixels, or, being
    the only one between, a twentieth of all that is not background. Soft edges
    are thin, and JPEG's ringing stays close to the two ends.
    """
    levels = np.unique(values)
    if not 3 <= len(levels) <= 8:
        return []
    between = [level for level in levels if peak / 8 < level < peak * 7 / 8]
    for level in between:
        here = values == level
        rows = here[:-2] & here[1:-1] & here[2:]
        block = rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]
        if block.any() or (len(between) == 1 and 20 * here.sum() >= (values > peak / 8).sum()):
            return [float(level) for level in levels]
    return []


def decode_pair(pair: Pair, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Image uint8 (size, size, 3) and mask uint8 (size, size) of 0 and 1.

    Raises:
        UserError: a file is broken, the two differ in size, or no lesion is
            left in the resized mask.
    """
    image, image_size = _guarded(pair.image, lambda: _read_image(pair.image, size))
    mask, mask_size = _guarded(pair.mask, lambda: _read_mask(pair.mask, size))
    if image_size != mask_size:
        raise UserError(
            f"{pair.image} is {image_size[0]} x {image_size[1]} but its mask {pair.mask.name} is "
            f"{mask_size[0]} x {mask_size[1]}; correct the mask or remove the pair", pair.mask
        )
    if not mask.any():
        raise UserError(
            f"mask {pair.mask} vanishes at {size} x {size} pixels; remove its pair or use a larger --image-size", pair.mask
        )
    return image, mask
