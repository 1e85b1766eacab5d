"""Colours can be told from their background, in light and in dark."""

import itertools

import pytest

from posttrain.report.theme import HEAT, PALETTES, SERIES


def luminance(colour):
    """Relative luminance of #rrggbb (WCAG 2.1)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.fixture(params=PALETTES)
def palette(request):
    return PALETTES[request.param]


def test_text_contrast(palette):
    for text in ("ink", "soft", "accent"):
        for ground in ("page", "card"):
            assert contrast(palette[text], palette[ground]) >= 4.5, (text, ground)
    assert contrast(palette["ink"], palette["mark"]) >= 4.5


def test_series_contrast(palette):
    for i in range(SERIES + 1):
        assert contrast(palette[f"s{i}"], palette["card"]) >= 3, i


def test_heat_map_numbers_can_be_read_and_steps_are_ordered(palette):
    for i in range(HEAT):
        assert contrast(palette[f"t{i}"], palette[f"h{i}"]) >= 4.5, i
    levels = [contrast(palette[f"h{i}"], palette["card"]) for i in range(HEAT)]
    assert levels == sorted(levels)
    assert all(b / a > 1.15 for a, b in itertools.pairwise(levels))


def test_palettes_name_the_same_colours():
    assert PALETTES["light"].keys() == PALETTES["dark"].keys()
