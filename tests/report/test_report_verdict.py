"""The verdict in words agrees with the numbers."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_samples import SMALL, comparison

from posttrain.report import content, verdict
from posttrain.report.page import build_page


def read(data):
    models = content.read_models(data)
    return models, content.read_pairs(data, models)


def pair_with(delta, low, high, **others):
    data = comparison()
    data["pairs"][0].update(delta_nll=delta, ci_low=low, ci_high=high)
    data["models"][1].update(others)
    return read(data)[1][0]


@given(st.floats(-2, 2), st.floats(1e-6, 1), st.floats(1e-6, 1))
def test_words_follow_the_interval(delta, below, above):
    pair = pair_with(delta, delta - below, delta + above)
    said = verdict.effect(pair)
    assert ("includes zero" in said) == (pair.low <= 0 <= pair.high)
    assert said.startswith("costs +") == (pair.low > 0)
    assert said.startswith("scores better") == (pair.high < 0)
    assert ("excludes zero" in verdict.meaning(pair)) == (not pair.includes_zero)


def test_one_pair_as_a_sentence():
    models, pairs = read(comparison())
    assert verdict.headline(models, pairs) == (
        "demo-w6a8 needs 6.27 bits per weight instead of 32 and costs +0.0043 nats per token "
        "(95% CI +0.0024 to +0.0062)."
    )
    assert "rises by 0.43%" in verdict.meaning(pairs[0])


def test_no_interval_makes_no_claim_about_significance():
    pair = pair_with(0.01, None, None)
    assert "too little text for an interval" in verdict.sentence(pair)
    assert "zero" not in verdict.sentence(pair) + verdict.meaning(pair)


def test_a_loss_that_is_not_a_number_is_no_comparison():
    pair = pair_with(math.nan, math.nan, math.nan)
    assert "could not be compared" in verdict.sentence(pair)
    assert verdict.headline(*read(comparison(3)))


def test_many_pairs_name_the_closest_and_the_smallest():
    models, pairs = read(comparison(5))
    assert verdict.headline(models, pairs) == (
        "5 models against demo: demo-w8a8 loses least, demo-mxfp4 is smallest."
    )
    models, pairs = read(comparison(chosen=(SMALL[3], SMALL[4])))
    assert verdict.headline(models, pairs) == (
        "2 models against demo: demo-nvfp4 loses least, demo-mxfp4 is smallest."
    )
    better = ("x", 4.0, 0.001, *SMALL[3][3:])
    models, pairs = read(comparison(chosen=(SMALL[3], better)))
    assert verdict.headline(models, pairs) == (
        "2 models against demo: x is the smallest and loses least."
    )


@pytest.mark.parametrize("bits", [None, math.nan])
def test_unknown_bits_are_left_out(bits):
    said = verdict.sentence(pair_with(0.1, 0.05, 0.15, bits_per_weight=bits))
    assert said == "demo-w6a8 costs +0.100 nats per token (95% CI +0.050 to +0.150)."


def test_a_single_model_has_its_perplexity_as_verdict():
    assert verdict.headline(*read(comparison(0))) == (
        "demo has perplexity 18.41 at 32 bits per weight."
    )
    assert verdict.headline(*read(against_a_file(0))) == (
        "demo has perplexity 18.41 at 5.74 bits per weight in its GGUF Q4_1 file."
    )


FILE = {"bits_per_weight": 5.74, "bytes": 96_600_000, "expanded_from": "GGUF Q4_1"}


def against_a_file(small=1, **others):
    """A comparison whose reference is a packed file that runs expanded."""
    data = comparison(small)
    data["models"][0] |= FILE | others
    return data


def test_a_reference_from_a_packed_file_is_no_measure_of_size():
    said = verdict.headline(*read(against_a_file()))
    assert said.startswith(
        "demo-w6a8 needs 6.27 bits per weight (demo: 5.74 in its GGUF Q4_1 file, 32 as it runs) "
        "and costs"
    )
    said = verdict.headline(*read(against_a_file(dtype="bfloat16")))
    assert "(demo: 5.74 in its GGUF Q4_1 file, 16 as it runs)" in said
    said = verdict.headline(*read(against_a_file(dtype=None)))
    assert "(demo: 5.74 in its GGUF Q4_1 file) and costs" in said


def test_the_copy_of_a_packed_file_is_still_the_smaller_model():
    data = against_a_file()
    data["pairs"][0].update(delta_nll=-0.01, ci_low=-0.02, ci_high=-0.005)
    assert "favour of the smaller model" in verdict.meaning(read(data)[1][0])


@pytest.mark.parametrize("form", [None, "", 4, ["GGUF"]])
def test_other_references_are_worded_as_ever(form):
    plain = verdict.headline(*read(against_a_file(expanded_from=form, bits_per_weight=32.0)))
    assert plain == verdict.headline(*read(comparison()))


def test_two_packed_files_are_compared_as_files():
    data = against_a_file()
    data["models"][1] |= {"expanded_from": "GGUF Q8_0", "bits_per_weight": 8.5}
    said = verdict.headline(*read(data))
    assert "needs 8.50 bits per weight, more than the 5.74 of demo, and costs" in said


def test_the_page_says_whose_bits_they_are():
    page = build_page(against_a_file())
    for words in (
        "demo: 5.74 in its file",
        "demo: 96.6 MB in its file",
        "reference, GGUF Q4_1 file",
        "Bits of demo are those of the file",
    ):
        assert page.count(words) == 1, words
    assert "in its file" not in build_page(comparison())
    several = build_page(against_a_file(3))
    assert "as it runs" not in several and "instead of" not in several
    assert "reference, GGUF Q4_1 file" in several


def test_a_model_that_is_larger_than_its_reference_is_said_to_be():
    said = verdict.sentence(pair_with(0.1, 0.05, 0.15, bits_per_weight=40.0))
    assert said.startswith(
        "demo-w6a8 needs 40 bits per weight, more than the 32 of demo, and costs"
    )
