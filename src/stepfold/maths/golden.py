"""Golden-section search."""

import math
from collections.abc import Callable

GOLDEN = (math.sqrt(5) - 1) / 2


def golden_section(low: float, high: float, measure: Callable[[float], float], count: int) -> tuple[float, float]:
    """(place, value) of the least of `count` values of a function between two bounds, at best where it has one dip.

    Args:
        low, high: the bounds.
        measure: the function.
        count: of values, >= 2; each but the first two shrinks the bracket to 0.62.
    """
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    tried = {left: measure(left), right: measure(right)}
    for _ in range(count - 2):
        if tried[left] <= tried[right]:
            high, right = right, left
            left = high - GOLDEN * (high - low)
            tried[left] = measure(left)
        else:
            low, left = left, right
            right = low + GOLDEN * (high - low)
            tried[right] = measure(right)
    place = min(tried, key=tried.__getitem__)
    return place, tried[place]
