"""Lengths in training samples, written as text: K, M, G are 2^10, 2^20, 2^30, as in TRACT's code."""

from __future__ import annotations

import math
import re

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def parse_length(length: str | int | float) -> int:
    """Training samples of a length: 96, '96', '1.5K', '96M' (= 96·2^20), '3*2M', '2**10'.

    Raises:
      ValueError: not a product of non-negative numbers with an optional suffix K, M or G.
    """
    text = str(length).strip()
    unit = text[-1:].upper() if text[-1:].upper() in "KMG" else ""
    product = 1.0
    try:
        for factor in re.split(r"(?<!\*)\*(?!\*)", text[: len(text) - len(unit)]):
            base, *exponent = map(float, factor.split("**"))
            product *= base ** (exponent[0] if exponent else 1)
        if len(text) == len(unit) or not (product >= 0 and math.isfinite(product)):
            raise ValueError
        return int(product * UNITS[unit])
    except (ValueError, OverflowError):
        raise ValueError(
            f"Cannot read {length!r} as a number of samples. Write for example 500000, '1.5K' or '96M' (= 96·2^20)."
        ) from None
