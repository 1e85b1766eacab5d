"""Laws of the intervals: they cover what they say, and do not depend on names or units."""

import numpy as np
import pytest

from posttrain.evaluate.bootstrap import bootstrap_mean

TRIALS = 400


def draw(kind, rng, windows):
    """Paired per-window differences with mean 0.1."""
    noise = {"normal": rng.normal(0, 1, windows), "skewed": rng.exponential(1, windows) - 1}
    return 0.1 + noise[kind]


def interval(values, counts=None, **options):
    counts = np.ones(len(values)) if counts is None else counts
    return bootstrap_mean((values * counts)[:, None], counts[:, None], **options)[0]


@pytest.mark.parametrize("kind", ["normal", "skewed"])
@pytest.mark.parametrize("windows", [12, 64])
def test_the_interval_covers_the_truth_as_often_as_it_says(kind, windows):
    rng = np.random.default_rng(0)
    found = [interval(draw(kind, rng, windows), resamples=800, seed=i) for i in range(TRIALS)]
    covered = np.mean([i.low <= 0.1 <= i.high for i in found])
    # Binomial noise of 400 trials is 0.011; few windows of skewed data stay a little under.
    least = 0.89 if (kind, windows) == ("skewed", 12) else 0.92
    assert least <= covered <= 0.975


def test_half_the_confidence_covers_half():
    rng = np.random.default_rng(0)
    found = [
        interval(draw("normal", rng, 30), resamples=800, seed=i, confidence=0.5)
        for i in range(TRIALS)
    ]
    assert 0.43 <= np.mean([i.low <= 0.1 <= i.high for i in found]) <= 0.57


@pytest.mark.parametrize("kind", ["normal", "skewed"])
def test_swapping_the_models_mirrors_the_interval(kind):
    values = draw(kind, np.random.default_rng(4), 40)
    there, back = interval(values), interval(-values)
    assert back.mean == -there.mean
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low), rel=1e-9)


def test_a_shift_and_a_scale_move_the_interval_with_the_data():
    values = draw("skewed", np.random.default_rng(4), 40)
    plain, moved = interval(values), interval(3 * values + 2)
    expected = [3 * bound + 2 for bound in (plain.mean, plain.low, plain.high)]
    assert [moved.mean, moved.low, moved.high] == pytest.approx(expected, rel=1e-9)


def test_windows_weigh_by_their_tokens():
    rng = np.random.default_rng(4)
    values, counts = rng.normal(size=20), rng.integers(1, 50, 20).astype(float)
    found = interval(values, counts)
    assert found.mean == pytest.approx(np.average(values, weights=counts))
    assert found.low < found.mean < found.high


def test_more_windows_narrow_the_interval():
    rng = np.random.default_rng(4)
    few, many = (interval(rng.normal(size=n)) for n in (25, 400))
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(4, rel=0.5)


def test_equal_windows_leave_nothing_uncertain():
    assert interval(np.full(9, 0.1)).low == interval(np.full(9, 0.1)).high == pytest.approx(0.1)
    zero = interval(np.zeros(9))
    assert (zero.mean, zero.low, zero.high) == (0, 0, 0)


def test_one_window_has_no_interval():
    found = interval(np.array([0.3]))
    assert found.mean == 0.3
    assert (found.low, found.high) == (None, None)


def test_the_seed_decides_and_the_global_generator_does_not():
    values = np.random.default_rng(4).normal(size=30)
    np.random.seed(1)
    first = interval(values, seed=5)
    np.random.seed(2)
    assert interval(values, seed=5) == first
    assert interval(values, seed=6) != first
