"""What the report reads from a comparison: layers, names, divergence, and its errors."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_samples import KINDS, comparison

from posttrain.errors import UserError
from posttrain.report import content

TEXT = st.text(alphabet="ab é日\u0301\u200d .'", max_size=40)


@given(st.lists(st.text(alphabet="ab/\\w", min_size=1, max_size=60), min_size=1, max_size=8))
def test_short_names_tell_models_apart(names):
    short = content.short_names(names)
    assert len(set(short)) == len(names)
    assert max(map(len, short)) <= content.LONGEST_NAME + 4


@given(TEXT, TEXT)
def test_divergence_is_after_a_shared_start_and_before_the_first_difference(reference, other):
    at = content.divergence(reference, other)
    assert reference[:at] == other[:at]
    if reference == other:
        assert at == len(other)
    else:
        shared = next(
            (i for i, (a, b) in enumerate(zip(reference, other, strict=False)) if a != b),
            min(len(reference), len(other)),
        )
        assert shared - 24 <= at <= shared


@pytest.mark.parametrize(
    ("reference", "other", "marked"),
    [
        ("the cat sat", "the car sat", "car sat"),
        ("one two", "one two three", " three"),
        ("one two three", "one two", ""),
        ("cat", "cats", "cats"),
        ("it's 42.", "it's 43.", "43."),
        ("今日は天気がいい", "今日は雨", "今日は雨"),
        ("x" * 50 + "a", "x" * 50 + "b", "b"),
        (
            "a \U0001f469\u200d\U0001f467",
            "a \U0001f469\u200d\U0001f466",
            "\U0001f469\u200d\U0001f466",
        ),
    ],
)
def test_divergence_starts_at_a_word(reference, other, marked):
    assert other[content.divergence(reference, other) :] == marked


def test_layer_map_has_every_layer_in_its_block_and_row():
    layers = comparison(blocks=12)["models"][1]["layers"]
    found = content.layer_map(layers)
    assert found.blocks == tuple(range(12))
    assert found.kinds == KINDS
    assert {f"model.layers.{b}.{k}": q for (b, k), q in found.cells.items()} == {
        layer["name"]: layer["qsnr"] for layer in layers
    }
    assert not found.merged and not found.outside


def test_experts_share_a_cell_that_shows_the_worst():
    layers = [
        {"name": f"model.layers.0.mlp.experts.{i}.up_proj", "qsnr": 30.0 + i % 5} for i in range(8)
    ] + [{"name": "lm_head", "qsnr": 40.0}]
    found = content.layer_map(layers)
    assert found.cells == {(0, "mlp.experts.*.up_proj"): 30.0}
    assert found.outside == (("lm_head", 40.0),)
    assert found.merged


def test_layers_without_a_measured_qsnr_are_no_map():
    assert content.layer_map(None) is None
    assert content.layer_map([{"name": "a.0.b", "qsnr": None}, {"name": "c"}]) is None


def broken(path, value):
    data = copy.deepcopy(comparison())
    at = data
    for key in path[:-1]:
        at = at[key]
    if value is KeyError:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("models",), KeyError, "models is empty"),
        (("models",), {}, "models is dict"),
        (("models", 1), "demo", r"models\[1\] is str"),
        (("models", 1, "nll"), KeyError, r"models\[1\]\.nll must be a number, found nothing"),
        (
            ("models", 0, "perplexity"),
            "12",
            r"models\[0\]\.perplexity must be a number, found '12'",
        ),
        (("models", 0, "tokens"), True, r"models\[0\]\.tokens must be a number"),
        (("models", 0, "model"), None, r"models\[0\]\.model"),
        (("pairs", 0, "delta_nll"), None, r"pairs\[0\]\.delta_nll must be a number, found None"),
        (("pairs", 0, "b"), "other", r"pairs\[0\]\.b is 'other'.*demo, build/demo-w6a8"),
        (("pairs",), "all", "pairs is str, expected a list"),
    ],
)
def test_errors_name_the_field(path, value, message):
    data = broken(path, value)
    with pytest.raises(UserError, match=message):
        content.read_pairs(data, content.read_models(data))


def test_not_a_comparison_at_all():
    with pytest.raises(UserError, match="expected what `compare` returns, found list"):
        content.read_models([])
