"""What people write for frames per second, as the exact number it means. Knows the rates of NTSC's kind."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from numbers import Rational, Real
from typing import Any

Rate = float | Fraction
"""Frames per second; whole, a fraction, or rounded to a float."""
_NTSC = (15, 24, 30, 48, 60, 120, 240)
"""Rates that have a neighbour a thousandth slower: 24000/1001 is what is written 23.976 or 23.98."""
_TEXT = re.compile(r"[0-9]{1,9}(\.[0-9]{1,12}|/0*[1-9][0-9]{0,8})?")
_ROUNDED = 0.005
_LARGEST_DENOMINATOR = 1001


def frame_rate(value: Any) -> Any:
    """24 -> 24; 23.976 -> Fraction(24000, 1001), 12.5 -> Fraction(25, 2), likewise from text ("24000/1001")
    and numpy's numbers. What is no number comes back as it is, and is the caller's to refuse.
    """
    if isinstance(value, str):
        if not _TEXT.fullmatch(value.strip()):
            return value
        exact = Fraction(value.strip())
    elif isinstance(value, bool) or not isinstance(value, Real):
        return value
    elif isinstance(value, Rational):
        exact = Fraction(value)
    elif not math.isfinite(value):
        return value
    else:
        exact = Fraction(float(value))
    if exact.denominator == 1:
        return int(exact.numerator)
    for whole in _NTSC:
        slower = Fraction(whole * 1000, 1001)
        if abs(exact - slower) < _ROUNDED:
            return slower
    return exact.limit_denominator(_LARGEST_DENOMINATOR)
