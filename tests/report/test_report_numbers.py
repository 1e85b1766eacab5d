"""How the report writes numbers and picks ticks."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.report import svg, words

FINITE = st.floats(-1e6, 1e6, allow_nan=False)
POSITIVE = st.floats(1e-9, 1e9)


def as_float(shown: str) -> float:
    return float(shown.replace(words.MINUS, "-").replace("\u2009", ""))


@given(FINITE, st.integers(0, 6), st.booleans())
def test_shown_number_is_the_number_to_its_decimals(value, decimals, signed):
    shown = words.number(value, decimals, signed)
    assert abs(as_float(shown) - value) <= 0.5 * 10**-decimals * (1 + 1e-9) + 1e-9
    if as_float(shown) == 0:
        assert shown[0] == "0"
    elif signed:
        assert shown[0] == ("+" if value > 0 else words.MINUS)


@given(POSITIVE)
def test_decimals_show_two_digits_of_a_step(step):
    shown = as_float(words.number(step, words.decimals_for(step, most=12)))
    assert shown == pytest.approx(step, rel=0.05)


@given(st.floats(-1, 1), st.floats(1e-4, 0.3), st.floats(1e-4, 0.3))
def test_delta_keeps_the_order_of_value_and_interval(value, below, above):
    middle, low, high = words.delta(value, value - below, value + above)
    assert as_float(low) <= as_float(middle) <= as_float(high)
    assert as_float(low) < as_float(high)


@given(st.floats(1, 1e14))
def test_size_has_three_digits_and_the_right_magnitude(count):
    shown, unit = words.size(count).split()
    factor = 1000.0 ** ["B", "kB", "MB", "GB", "TB"].index(unit)
    assert float(shown) * factor == pytest.approx(count, rel=0.006, abs=0.5)
    assert len(shown.replace(".", "")) <= 3


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "say", [words.number, words.loss, words.bits, words.size, words.percent, words.seconds]
)
def test_what_is_no_number_is_said_and_never_an_error(say, value):
    assert say(value)


@given(FINITE, POSITIVE, st.integers(2, 9))
def test_ticks_are_round_even_and_inside(low, width, count):
    high = low + width
    if not width > 1e-6 * abs(low):
        return
    found = svg.ticks(low, high, count)
    assert 1 <= len(found) <= 2 * count + 1
    assert all(low - 1e-6 * width <= tick <= high + 1e-6 * width for tick in found)
    steps = [b - a for a, b in itertools.pairwise(found)]
    assert all(step == pytest.approx(steps[0], rel=1e-3) for step in steps)
    if steps:
        digit = float(f"{steps[0]:e}".split("e")[0])
        assert digit == pytest.approx(round(digit), rel=1e-3)
        assert round(digit) in (1, 2, 5, 10)


@given(st.floats(-1, 1), st.floats(1e-5, 10))
def test_tick_labels_differ(low, width):
    labels = svg.tick_labels(svg.ticks(low, low + width), signed=True)
    assert len(set(labels)) == len(labels)


@given(st.floats(0.5, 64), st.floats(1.01, 1000), st.integers(100, 900))
def test_log_ticks_are_inside_and_rise(low, ratio, room):
    found = svg.log_ticks(low, low * ratio, room)
    assert found == sorted(set(found))
    assert all(low * 0.999 <= tick <= low * ratio * 1.001 for tick in found)


@given(FINITE, st.floats(1e-3, 1e6), st.floats(0, 1), st.booleans())
def test_scale_is_monotonic_and_meets_its_ends(low, width, share, log):
    if log:
        low = abs(low) + 1
    scale = svg.Scale(low, low + width, 10, 300, log)
    if not low + width > low * (1 + 1e-9):
        return
    assert scale(low) == pytest.approx(10)
    assert scale(low + width) == pytest.approx(300)
    assert 10 - 1e-6 <= scale(low + share * width) <= 300 + 1e-6


@given(st.text(min_size=1, max_size=80), st.floats(30, 300))
def test_shortened_text_fits_or_is_whole(text, room):
    short = svg.shorten(text, room)
    assert short == text or svg.text_width(short) <= room or len(short) <= 4
    assert short[0] == text[0]
