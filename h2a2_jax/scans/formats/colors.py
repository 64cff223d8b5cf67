"""The scale of colours: the number of full brightness, by the type of an array and its values.

| colours | scale | remark |
|---|---|---|
| bytes; whole numbers up to 255 of an open type; floats of 0-1 or 0-255 | 255 or 1 | none |
| whole numbers up to 255 in an unsigned type of 16 bits or more | 255 | yes |
| up to 1023, 4095, 65535; multiples of 256 or 257 | that; 65535 | yes, but for 16 bits in uint16 |
| more in uint32, uint64 | the type's largest | none |
| fractions, at most a tenth beyond 1.1; whole numbers, at most 1 % beyond 255 | 1; 255 | others are clipped |
| 0 and 1 alone, of any type | 1 | yes |

Open, and so refused unless the caller gives the range: fractions up to 8 or beyond 280, whole numbers from 281 to 510,
negative ones.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float, Float32

from h2a2_jax.errors import InputError

ColorRange = Literal["auto", "0-1", "0-255", "none", "0-1023", "0-4095", "0-65535"]
COLOR_RANGES: tuple[ColorRange, ...] = get_args(ColorRange)

GREY = 0.5
"""Brightness of points without a colour: between black and white."""
GREY_POINTS = "points without a colour, made grey"
_ROUNDING = 1e-3  # by which colours may exceed their range, relative to it
_OVERSHOOT = 1.1  # by which interpolated colours do
_BRIGHTEST_OPEN = 8.0  # fractions up to it are 0-1 in high dynamic range, or 0-255 in the dark
_FEW = 0.01  # share of entries that may be wrong
_DARK = 0.1  # largest number of a dark scan, relative to the scale
_SAMPLE = 30_000  # rows


class Colors(NamedTuple):
    """Colours of a point cloud.

    Attributes:
        values: red, green, blue in the scale of the file, finite; None if there are none, or all are 0.
        full: number of full brightness; None if `color_scale` finds it without a remark, or not at all.
        remarks: parts of sentences on decisions.
        notes: counts by kind of points without a colour.
    """

    values: Float[np.ndarray, "n 3"] | None
    full: float | None
    remarks: tuple[str, ...]
    notes: Mapping[str, int]


class ColorScale(NamedTuple):
    """Number of full brightness, None if the values leave it open, and parts of sentences where it is not obvious."""

    full: float | None
    remarks: tuple[str, ...] = ()


def real(values: np.ndarray) -> np.ndarray:
    """Convert to float32 if that is exact for the type, else to float64; native byte order."""
    exact = values.dtype.itemsize <= (4 if values.dtype.kind == "f" else 2)
    return np.ascontiguousarray(values, np.float32 if exact else np.float64)


def settle_colors(colors: np.ndarray, color_range: ColorRange = "auto") -> Colors:
    """Decide on the scale of [n, 3] colours of any real type; `color_range` settles it, and "none" leaves them out.

    Points whose colour is NaN, infinite or, among colours of 0 and more, -1, -1, -1 become grey and are counted.
    Colours that are all 0 or all missing count as none, with a remark.
    """
    remarks: tuple[str, ...] = ()
    if colors.dtype == np.int8 and (colors < 0).any():
        colors, remarks = colors.view(np.uint8), ("has colours in signed bytes, taken as 0 to 255",)
    if color_range == "none":
        return Colors(None, None, (), {})
    dtype, values = colors.dtype, real(colors)
    missing = ~np.isfinite(values).all(axis=1)
    if np.fmin.reduce(values, axis=None, initial=0) == -1:
        nowhere = (values == -1).all(axis=1)
        missing |= nowhere & (not (values[~nowhere] < 0).any())
    is_complete = not missing.any()
    known = values if is_complete else values[~missing]
    if len(values) and not len(known):
        return Colors(None, None, ("has colours that are all NaN and count as none",), {})
    if color_range != "auto":
        full = full_color(color_range)
    elif len(known) and not known.any():
        return Colors(None, None, ("has colours that are all 0 and count as none",), {})
    else:
        full, more = color_scale(known, dtype)
        remarks = (*remarks, *more)
        if dtype.kind != "u" and not more and is_complete:
            return Colors(values, None, remarks, {})
    if is_complete:
        return Colors(values, full, remarks, {})
    filled = values.copy()
    filled[missing] = GREY * (full or 1.0)
    return Colors(filled, full, remarks, {GREY_POINTS: int(missing.sum())})


def full_color(color_range: ColorRange) -> float | None:
    """Return the number of full brightness of a range; None for "auto" and "none"."""
    return None if color_range in ("auto", "none") else float(color_range.removeprefix("0-"))


def color_scale(values: Float[np.ndarray, "n 3"], dtype: np.dtype | None = None) -> ColorScale:
    """Decide on the scale of finite colours, which the file holds in the type `dtype` (None: in that of `values`)."""
    dtype = values.dtype if dtype is None else dtype
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    rows = values[:: max(1, len(values) // _SAMPLE)]
    some = rows[rows != 0]
    if not len(some):
        return ColorScale(255.0 if dtype.kind == "u" else 1.0)
    if low < -_ROUNDING * max(high, 1.0) and (some < 0).mean() > _FEW:
        return ColorScale(None)
    is_whole = bool((np.abs(some - np.rint(some)) <= _ROUNDING).all())
    full = _scale_of_whole(some, high, dtype) if is_whole else _scale_of_fractions(some, high)
    if full is None:
        return ColorScale(None)
    remarks = []
    is_uniform = len(values) > 1 and bool((rows == rows[0]).all() and (values == rows[0]).all())
    if is_whole and full == 1 and not is_uniform:
        remarks.append("has no colours but 0 and 1, taken as 0 to 1; bytes need --colors=0-255")
    elif full not in (1, 255) and not (dtype.kind == "u" and full == np.iinfo(dtype).max and high > 4095):
        remarks.append(f"has colours up to {high:g}, taken as 0 to {full:g} (if they are not, say --colors)")
    elif full == 255 and dtype.kind == "u" and dtype.itemsize > 1:
        remarks.append(f"has colours of type {dtype} up to {high:g}, taken as 0 to 255 (if they are not, say --colors)")
    if low < -_ROUNDING * full or high > full * (1 + _ROUNDING):
        beyond = ((values < -_ROUNDING * full) | (values > full * (1 + _ROUNDING))).sum()
        remarks.append(f"has {beyond:,} colour values outside 0 to {full:g} (from {low:g} to {high:g}), clipped")
    if is_uniform:
        remarks.append(f"has the one colour {', '.join(f'{value:g}' for value in values[0])} at all points")
    elif high <= _DARK * full:
        remarks.append(f"is nearly black: its colours reach to {high:.3g} of {full:g}")
    return ColorScale(full, tuple(remarks))


def scale_in_dataset(values: Float[np.ndarray, "n 3"], usual: float) -> float | None:
    """Decide on the scale of finite colours of one scan, where others of its dataset have 0 to `usual`.

    It is another one only if the colours are fractions up to 1 in place of 0-255, or beyond the usual; None if they
    leave it open. Whole numbers up to 1 in place of 0-255 are a dark scan.
    """
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    if low < 0 or high > usual:
        return color_scale(values).full
    is_unit = high <= 1 < usual and bool((np.abs(values - np.rint(values)) > _ROUNDING).any())
    return 1.0 if is_unit else usual


def _scale_of_fractions(some: np.ndarray, high: float) -> float | None:
    bulk = float(np.percentile(some, 90, method="higher"))
    if high <= 1 + _ROUNDING or bulk <= _OVERSHOOT:
        return 1.0
    return 255.0 if _BRIGHTEST_OPEN < high <= 255 * _OVERSHOOT else None


def _scale_of_whole(some: np.ndarray, high: float, dtype: np.dtype) -> float | None:
    if high <= 1 + _ROUNDING:
        return 1.0
    if 255 < high <= 65535 and any((some % step == 0).all() for step in (256, 257)):
        return 65535.0
    if np.percentile(some, 100 * (1 - _FEW), method="higher") <= 255:
        return 255.0
    if high <= 510:
        return 255.0 if high <= 255 * _OVERSHOOT else None
    top = next((full for full in (1023.0, 4095.0, 65535.0) if high <= full * (1 + _ROUNDING)), None)
    return float(np.iinfo(dtype).max) if top is None and dtype.kind == "u" else top


def scaled_colors(
    values: Float[np.ndarray, "n 3"], full: float | None, color_range: ColorRange = "auto"
) -> Float32[np.ndarray, "n 3"]:
    """Scale finite colours to 0-1.

    `full` is the number of full brightness if it is known, and `color_range`, if it is not "auto", goes before it. What
    is slightly beyond, or a few values, are clipped.

    Raises:
        InputError: colours lie outside the range, or nothing tells it.
    """
    full = full_color(color_range) or full or color_scale(values).full
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    reach = f"its colours reach from {low:g} to {high:g}"
    if full is None:
        raise InputError(f"{reach}, but 0 to 1 or 0 to 255 is expected: rescale them")
    if not len(values):
        return values.astype(np.float32)
    is_low = low < -_ROUNDING * full and (values < -_ROUNDING * full).mean() > _FEW
    if is_low or (high > full * (1 + _ROUNDING) and (values > full * _OVERSHOOT).mean() > 10 * _FEW):
        raise InputError(f"{reach}, but 0 to {full:g} is expected: rescale them")
    return np.clip(values / full, 0, 1).astype(np.float32)
