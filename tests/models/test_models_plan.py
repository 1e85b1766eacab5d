"""Plan: the dictionary form, matching, and every way it can be wrong."""

import pytest

from posttrain.errors import UserError
from posttrain.models.plan import LayerPlan, Plan
from posttrain.models.walk import Target
from posttrain.numbers import spec

W6, W4, A8 = spec("int6 | fp16/g64"), spec("int4 | fp16/g64"), spec("int8h | fp32/row")
NAMES = [
    f"model.layers.{i}.{leaf}"
    for i in range(11)
    for leaf in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
]


def plan(*layers: dict, ignore: tuple[str, ...] = ()) -> Plan:
    return Plan.from_dict({"layers": list(layers), "ignore": list(ignore)})


ALL_W6 = {"match": "*", "weight": "int6 | fp16/g64"}


def test_every_layer_gets_the_last_rule_that_matches_it():
    down = {"match": "*.down_proj", "weight": "w4g64", "input": "a8"}
    found = plan(ALL_W6, down).resolve(NAMES)
    assert list(found) == NAMES
    for name, layer in found.items():
        wanted = LayerPlan(W4, A8) if name.endswith("down_proj") else LayerPlan(W6)
        assert layer == wanted
    reversed_rules = plan(down, ALL_W6).resolve(NAMES)
    assert set(reversed_rules.values()) == {LayerPlan(W6)}


def test_ignore_beats_rules_and_does_not_take_layer_10_for_layer_1():
    found = plan(ALL_W6, ignore=("model.layers.1.*",)).resolve(NAMES)
    assert set(NAMES) - set(found) == {n for n in NAMES if n.startswith("model.layers.1.")}


def test_a_layer_without_a_rule_is_an_error_that_lists_it():
    only_mlp = plan({"match": "*.mlp.*", "weight": "w6g64"}, ignore=("model.layers.0.*",))
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn\.q_proj, .* and 32 more"):
        only_mlp.resolve(NAMES)
    assert len(only_mlp.resolve([n for n in NAMES if "attn" not in n])) == 30


@pytest.mark.parametrize(
    "rule", [{"match": "*.k_proj", "weight": "w4g64"}, {"match": "*.up_proj", "weight": "mxfp4"}]
)
def test_fused_layers_must_agree(rule):
    with pytest.raises(UserError, match="fuse.*q_proj|fuse.*gate_proj"):
        plan(ALL_W6, rule).resolve(NAMES)


def test_ignoring_one_of_a_fused_group_is_an_error():
    with pytest.raises(UserError, match=r"v_proj: ignored"):
        plan(ALL_W6, ignore=("*.v_proj",)).resolve(NAMES)


def test_inputs_of_experts_are_refused_and_the_message_says_what_to_add():
    targets = {
        "model.layers.0.self_attn.o_proj": Target("linear", (8, 8), {}),
        "model.layers.0.mlp.experts.down_proj": Target("experts", (2, 8, 8), {}),
    }
    everything = {"match": "*", "weight": "w6g64", "input": "a8"}
    with pytest.raises(UserError, match="rule without input"):
        plan(everything).resolve(targets)
    found = plan(everything, {"match": "*.experts.*", "weight": "w6g64"}).resolve(targets)
    assert [layer.input for layer in found.values()] == [A8, None]


def test_idle_patterns_are_those_that_match_nothing():
    odd = plan(ALL_W6, {"match": "*.downproj", "weight": "w4"}, ignore=("lm_head", "*.3.*"))
    assert odd.idle_patterns(NAMES) == ["*.downproj", "lm_head"]


@pytest.mark.parametrize(
    "weight",
    ["w6g64", "nf4-dq", "nvfp4", "int4z | fp16/g32", "int8 | fp32/row^0.15 * fp32/col^0.85"],
)
@pytest.mark.parametrize("inputs", [None, "a8", "mxfp8"])
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("outliers", [None, 6.0])
def test_the_dictionary_form_round_trips(weight, inputs, rotate, outliers):
    outliers = inputs and outliers
    rule = {"match": "*", "weight": weight, "input": inputs, "rotate": rotate, "outliers": outliers}
    made = plan(rule, ignore=("lm_head",))
    layer = made.resolve(["a"])["a"]
    assert layer.rotate == rotate and layer.outliers == outliers
    assert Plan.from_dict(made.to_dict()) == made
    assert Plan.from_dict(made.to_dict()).to_dict() == made.to_dict()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"layer": [ALL_W6]}, r"unknown key 'layer'; did you mean 'layers'\?"),
        ({"layers": [{"match": "*", "wieght": "w4"}]}, r"layers\[0\]: unknown key 'wieght'"),
        ({"layers": []}, "'layers' must be a list of rules"),
        ({"layers": ALL_W6}, "'layers' must be a list of rules"),
        ({"layers": ["w4"]}, r"layers\[0\]: expected keys match, weight, input"),
        ({"layers": [{"weight": "w4"}]}, "'match' must be a name pattern"),
        ({"layers": [ALL_W6, {"match": "*"}]}, r"layers\[1\]: 'weight' is missing.*ignore"),
        (
            {"layers": [{"match": "*", "weight": 4}]},
            r"layers\[0\]\.weight: expected a number format",
        ),
        ({"layers": [{"match": "*", "weight": "w6g46"}]}, r"(?s)layers\[0\]\.weight: .*'w6g64'"),
        ({"layers": [{**ALL_W6, "input": "int8 | fp32/rwo"}]}, r"(?s)\.input: .*rwo.*'row'"),
        ({"layers": [{**ALL_W6, "input": "int8@sr | fp32/row"}]}, "rounds by chance"),
        ({"layers": [{**ALL_W6, "rotate": 64}]}, "rotate must be true or false; found 64"),
        ({"layers": [{**ALL_W6, "outliers": 6}]}, "outliers needs an 'input' format"),
        ({"layers": [{**ALL_W6, "input": "a8", "outliers": "6"}]}, "outliers must be .* found '6'"),
        ({"layers": [{**ALL_W6, "input": "a8", "outliers": 0}]}, "outliers must be .* found 0"),
        ({"layers": [ALL_W6], "ignore": "lm_head"}, "ignore must be a list"),
        ({"layers": [ALL_W6], "ignore": [3]}, "ignore must hold name patterns; found 3"),
    ],
)
def test_mistakes_are_named_with_their_field(data, message):
    with pytest.raises(UserError, match=message):
        Plan.from_dict(data)
