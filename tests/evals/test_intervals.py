"""Intervals and tests against published or hand-made values."""

import math

import pytest

from ernie_engine.evals.intervals import paired_p_value, wilson


def test_wilson_against_hand_computed_values():
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(29, 29)[0] == pytest.approx(0.8830, abs=1e-4)


def test_wilson_contains_the_share_and_narrows():
    widths = []
    for count in (10, 100, 1000):
        low, high = wilson(count // 2, count)
        assert low < 0.5 < high
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize(("right", "count"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_nonsense(right: int, count: int):
    with pytest.raises(ValueError, match="right="):
        wilson(right, count)


def test_paired_p_value():
    assert paired_p_value(0, 0) == 1.0
    assert paired_p_value(3, 3) == 1.0
    assert paired_p_value(0, 6) == pytest.approx(2 / 64)
    assert paired_p_value(6, 0) == paired_p_value(0, 6)
    tail = sum(math.comb(20, k) for k in range(6)) / 2**20
    assert paired_p_value(15, 5) == pytest.approx(2 * tail)
