"""How sure a score is: an interval for one proportion, and a test for two runs over the same
questions.
"""

import math


def wilson(right: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of `right` out of `count`; z = 1.96 covers 95%.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if not 0 <= right <= count or count == 0:
        raise ValueError(f"right={right} of count={count}: give 0 <= right <= count, count > 0")
    share, scale = right / count, 1 + z * z / count
    centre = (share + z * z / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_p_value(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar test: how likely two equally good runs differ at least so
    one-sidedly.

    `only_first` and `only_second` count the questions that one run alone got right.
    """
    differing = only_first + only_second
    tail = sum(math.comb(differing, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**differing)
