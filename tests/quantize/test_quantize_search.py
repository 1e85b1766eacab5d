"""Searching for a plan: the knapsack is solved, the estimate ranks like the measurement, and the plan
that comes out is used, kept and written down."""

import copy
import itertools
import json
import random
import sys
from pathlib import Path

import pytest
import torch
import yaml

from posttrain.cli import main
from posttrain.errors import UserError
from posttrain.models.load import load
from posttrain.models.plan import LayerPlan, Plan
from posttrain.models.rotation import rotate as rotated
from posttrain.models.walk import decoder_blocks, fusion_groups, quantizable
from posttrain.numbers import fake_quantize, spec
from posttrain.papers.lab import rank_correlation
from posttrain.quantize import budget, pipeline, quantize, scan, search
from posttrain.quantize.recipe import parse_recipe
from posttrain.quantize.search import Option, Search, cheapest, found_plan
from posttrain.quantize.sensitivity import Scan, family, groups_of
from posttrain.quantize.solvers import GPTQ, RTN

sys.path.append(str(Path(__file__).parents[1] / "models"))
from models_tiny import tiny_model, tokens

RECIPE = """
layers:
  - {match: "*", weight: int6 | fp16/g32, input: int8h | fp32/row, rotate: true}
  - {match: lm_head, weight: int8 | fp16/g32}
transform: smooth
calibration: {samples: 4, window: 32}
"""
SHARDS = "model-*.safetensors"


# ------------------------------------------------------------------------------- the knapsack


def case(seed: int, even: bool = True) -> list[list[Option]]:
    """Up to five groups of up to four options, with losses that need not fall with the size."""
    draw = random.Random(seed)
    return [
        [
            Option(draw.randint(1, 9) * (8 if even else draw.randint(1, 7)), draw.random())
            for _ in range(draw.randint(1, 4))
        ]
        for _ in range(draw.randint(1, 5))
    ]


def brute_force(groups: list[list[Option]], budget: int) -> float:
    """The least loss over all combinations that fit."""
    return min(
        sum(option.loss for option in taken)
        for taken in itertools.product(*groups)
        if sum(option.nbytes for option in taken) <= budget
    )


def total(groups: list[list[Option]], chosen: list[int]) -> tuple[int, float]:
    taken = [options[i] for options, i in zip(groups, chosen, strict=True)]
    return sum(option.nbytes for option in taken), sum(option.loss for option in taken)


def ends(groups: list[list[Option]]) -> tuple[int, int]:
    sizes = [[option.nbytes for option in options] for options in groups]
    return sum(map(min, sizes)), sum(map(max, sizes))


@pytest.mark.parametrize("seed", range(40))
def test_it_finds_what_trying_everything_finds(seed):
    groups = case(seed, even=seed % 2 == 0)
    low, high = ends(groups)
    before = float("inf")
    for budget_ in range(low, high + 3):
        nbytes, loss = total(groups, cheapest(groups, budget_))
        assert nbytes <= budget_
        assert loss == pytest.approx(brute_force(groups, budget_), abs=1e-12)
        assert loss <= before + 1e-12  # a larger budget never loses more
        before = loss
    with pytest.raises(ValueError, match="smallest"):
        cheapest(groups, low - 1)


@pytest.mark.parametrize("seed", range(20))
def test_in_coarse_steps_it_fits_and_is_at_most_a_step_a_group_short(seed, monkeypatch):
    monkeypatch.setattr(search, "STATES", 12)
    groups = case(seed, even=False)
    low, high = ends(groups)
    widest = high - low
    unit = max(1, -(-widest // 12))
    for budget_ in range(low, high + 1):
        nbytes, loss = total(groups, cheapest(groups, budget_))
        assert nbytes <= budget_
        assert loss <= brute_force(groups, max(low, budget_ - unit * len(groups))) + 1e-12
    assert total(groups, cheapest(groups, high + unit * len(groups)))[1] == pytest.approx(
        sum(min(option.loss for option in options) for options in groups)
    )


def test_of_equal_losses_the_smaller_is_taken():
    assert cheapest([[Option(30, 1.0), Option(10, 1.0), Option(20, 1.0)]], 30) == [1]


# ------------------------------------------------------------------------------- the estimates


def scanner(name: str, inputs: bool = True, rotate: bool = False, solver=None) -> Scan:
    model = tiny_model(name, dtype=torch.float32)
    targets = {n: t for block in decoder_blocks(model) for n, t in quantizable(*block).items()}
    targets |= quantizable("lm_head", model.lm_head)
    layers = {
        name: LayerPlan(spec("int6 | fp16/g16"))
        if target.kind == "experts"
        else LayerPlan(spec("int6 | fp16/g16"), spec("int8h | fp32/row"), rotate=rotate)
        for name, target in targets.items()
    }
    of_inputs = (lambda g: family(g.layer.input, (4, 6)) if g.layer.input else ()) if inputs else (lambda g: ())  # fmt: skip
    formats = lambda g: family(g.weight, (3, 4, 6, 8))
    return Scan(model, groups_of(targets, layers), formats, of_inputs, solver or RTN(), False)


@pytest.mark.parametrize("rotate", [False, True])
def test_the_estimate_ranks_and_sizes_like_the_measurement(rotate):
    scan_ = scanner("llama", rotate=rotate)
    text = tokens(16, 48)
    cheap, exact = scan_.cheap(text), scan_.exact(text)
    same = ("group", "operand", "format", "bits")
    assert [[r[k] for k in same] for r in cheap] == [[r[k] for k in same] for r in exact]
    for operand in ("weight", "input"):
        pairs = [
            (a["predicted_loss"], b["predicted_loss"])
            for a, b in zip(cheap, exact, strict=True)
            if a["operand"] == operand
        ]
        assert rank_correlation(*zip(*pairs, strict=True)) > 0.95
        assert 0.6 < sum(a for a, _ in pairs) / sum(b for _, b in pairs) < 1.6
    fine = [(a["predicted_loss"], b["predicted_loss"]) for a, b in zip(cheap, exact, strict=True)
            if a["format"].startswith("int6 |") and a["operand"] == "weight"]  # fmt: skip
    assert rank_correlation(*zip(*fine, strict=True)) > 0.6  # also among layers of one format
    assert all(row["class"] is None for row in cheap)
    assert all(row["class"] in ("I", "II", "III") for row in exact)


@pytest.mark.parametrize("method", ["cheap", "exact"])
def test_a_rotated_layer_is_a_plain_one_between_rotated_inputs_and_weights(method):
    """A model that rotates by itself, scanned as it is, gives the same rows."""
    rotating, plain = scanner("llama", rotate=True), scanner("llama")
    for group in plain.groups:
        for name in group.names:
            module = plain.model.get_submodule(name)
            module.weight.data = rotated(module.weight.data)
            module.register_forward_pre_hook(lambda module, args: (rotated(args[0]), *args[1:]))
    found, expected = (getattr(s, method)(tokens(2, 24)) for s in (rotating, plain))
    slack = 0.02 if method == "cheap" else 0.1  # a code may flip
    for a, b in zip(found, expected, strict=True):
        assert a["predicted_loss"] == pytest.approx(b["predicted_loss"], slack, abs=1e-6), a


def test_the_measurement_is_the_divergence_with_one_operand_changed():
    """Of a weight, of an input, and of a head that tokens also enter by."""
    for name, group, operand in (
        ("llama", "model.layers.1.mlp.gate_proj+up_proj", "weight"),
        ("llama", "model.layers.0.self_attn.q_proj+k_proj+v_proj", "input"),
        ("llama-tied", "lm_head", "weight"),
    ):
        scan_ = scanner(name)
        model, text = scan_.model, tokens(2, 20)
        changed = copy.deepcopy(model)
        own = next(g for g in scan_.groups if g.label == group)
        form = "int4 | fp16/g16" if operand == "weight" else "int4h | fp32/row"
        for layer in own.names:
            module = changed.get_submodule(layer)
            if operand == "weight":
                module.weight.data.copy_(fake_quantize(module.weight.data, spec(form)))
            else:
                module.register_forward_pre_hook(
                    lambda m, args, form=form: (fake_quantize(args[0], spec(form)),)
                )
        with torch.no_grad():
            log_p, log_q = (
                m(text).logits[:, :-1].double().log_softmax(-1) for m in (model, changed)
            )
        rows = scan_.exact(text)
        found = [
            r for r in rows if (r["group"], r["operand"], r["format"]) == (group, operand, form)
        ]
        expected = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        assert found[0]["predicted_loss"] == pytest.approx(expected, rel=1e-3)
        assert expected > 1e-4
        wanted = text[:, 1:, None]
        rise = float(
            (-log_q.gather(-1, wanted).mean()).exp() - (-log_p.gather(-1, wanted).mean()).exp()
        )
        assert found[0]["perplexity_rise"] == pytest.approx(rise, rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("method", ["cheap", "exact"])
@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "gpt-oss", "gemma2"])
def test_the_model_is_as_it_was_and_nothing_is_left_out(name, method):
    scan_ = scanner(name, rotate=True, solver=GPTQ())
    if name in ("mixtral", "gpt-oss"):
        assert any("experts" in group.label for group in scan_.groups)
    before = {n: t.clone() for n, t in scan_.model.state_dict().items()}
    rows = getattr(scan_, method)(tokens(2, 24))
    assert all(torch.equal(t, before[n]) for n, t in scan_.model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in scan_.model.parameters())
    assert {row["group"] for row in rows} == {group.label for group in scan_.groups}
    coarse = [
        row for row in rows if row["format"].startswith("int3 ") and "experts" not in row["group"]
    ]
    assert coarse and all(row["predicted_loss"] > 0 for row in coarse)
    for group in scan_.groups:
        losses = [
            r["predicted_loss"]
            for r in rows
            if r["group"] == group.label and r["operand"] == "weight"
        ]
        assert losses[0] >= losses[-1]  # 3 bits, 8 bits


def test_families_are_widths_of_one_grid():
    assert [str(s) for s in family(spec("int6 | fp16/g64"), (3, 8))] == [
        "int3 | fp16/g64",
        "int8 | fp16/g64",
    ]
    assert [str(s) for s in family(spec("int8h | fp32/row"), (4,))] == ["int4h | fp32/row"]
    for fixed in ("mxfp4", "nf4", "e4m3 | fp32/row"):
        assert family(spec(fixed), range(3, 9)) == ()


# ------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("Llama", hidden_size=64, intermediate_size=128, tie_word_embeddings=True)


@pytest.fixture()
def recipe(tmp_path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def found(model, tmp_path_factory):
    """A run at 5 bits, and where it lies."""
    folder = tmp_path_factory.mktemp("found")
    (folder / "base.yaml").write_text(RECIPE)
    result = quantize(
        model, recipe=folder / "base.yaml", out=folder / "out", bits=5.0, progress=False
    )
    return result, folder / "out"


def shards(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob(SHARDS))]


def test_the_budget_is_kept_and_the_prediction_of_the_size_is_exact(found):
    result, out = found
    assert (
        4.5 < result["bits_per_weight"] <= 5.0
    )  # the head, nearly all of it, moves by a whole bit
    assert result["search"]["predicted_bytes"] == result["bytes"]
    assert result["search"]["predicted_bits_per_weight"] == result["bits_per_weight"]
    stored = json.loads((out / "posttrain.json").read_text())
    assert stored["search"] == result["search"] and stored["recipe"] == result["recipe"]


def test_what_runtimes_fuse_is_alike_and_the_rest_is_the_recipes(found):
    result, _ = found
    layers = {layer["name"]: layer for layer in result["layers"]}
    entries = {n: e for e in result["search"]["groups"] for n in e["layers"]}
    assert entries.keys() == layers.keys()
    for group in fusion_groups(layers):
        assert len({layers[name]["weight"] for name in group}) == 1
    for name, layer in layers.items():
        assert layer["weight"] == entries[name]["weight"]
        assert layer["bits_per_weight"] == pytest.approx(entries[name]["bits"])
        assert layer["rotated"] == (name != "lm_head")
        assert layer["input"] == (None if name == "lm_head" else "int8h | fp32/row")
    assert len({layer["weight"] for layer in layers.values()}) > 1


def test_the_plan_is_measured_beside_one_width_for_all(found, model, recipe, tmp_path, monkeypatch):
    """The widest that fits; it is taken where it measures better."""
    result, _ = found
    plan, beside = result["search"], result["search"]["uniform"]
    assert not plan["is_uniform"] and 0 < plan["measured_loss"] < beside["measured_loss"]
    assert beside["predicted_bits_per_weight"] <= plan["predicted_bits_per_weight"] <= 5.0
    asked = []

    def together(self, tokens, plans):
        asked.append(plans)
        return [2.0, 1.0][: len(plans)]

    monkeypatch.setattr(Scan, "together", together)
    taken = quantize(model, recipe=recipe, out=tmp_path / "o", bits=5.0, progress=False)
    assert taken["search"]["is_uniform"]
    assert len({layer["weight"].partition(" ")[0] for layer in taken["layers"]}) == 1
    assert taken["bits_per_weight"] == beside["predicted_bits_per_weight"]
    one = {"candidates": "int4 | fp16/g16", "max_bytes": 10**9}
    only = quantize(model, recipe=recipe, out=tmp_path / "s", **one, progress=False)["search"]
    assert [len(plans) for plans in asked] == [2, 1]  # a plan that is uniform is measured once
    assert only["uniform"]["measured_loss"] == only["measured_loss"] == 2.0
    assert not only["is_uniform"]


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_plan_measured_whole_is_the_divergence_of_the_quantized_model(name):
    scan_ = scanner(name)
    text = tokens(2, 20)
    plan = [spec(f"int{3 + i % 4} | fp16/g16") for i, _ in enumerate(scan_.groups)]
    changed = copy.deepcopy(scan_.model)
    for group, form in zip(scan_.groups, plan, strict=True):
        for layer in group.names:
            weight = changed.get_submodule(layer).weight
            weight.data.copy_(fake_quantize(weight.data, form))
    with torch.no_grad():
        log_p, log_q = (
            m(text).logits[:, :-1].double().log_softmax(-1) for m in (scan_.model, changed)
        )
    expected = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert scan_.together(text, [plan, plan]) == pytest.approx([expected] * 2, rel=1e-3)


def test_the_written_recipe_gives_the_same_weights(found, model, tmp_path):
    result, out = found
    again = quantize(model, recipe=out / "recipe.yaml", out=tmp_path / "again", progress=False)
    assert shards(tmp_path / "again") == shards(out)
    assert "search" not in again
    text = (out / "recipe.yaml").read_text()
    assert parse_recipe(text, "x").to_dict() == yaml.safe_load(text) == result["recipe"]
    assert len(result["recipe"]["layers"]) < len(result["layers"])  # by kind, then exceptions
    rows = json.loads((out / "sensitivity.json").read_text())["rows"]
    assert {row["operand"] for row in rows} == {"weight"}


def test_bytes_are_a_budget_too_and_candidates_are_what_it_chooses_from(model, recipe, tmp_path):
    low = quantize(model, recipe=recipe, out=tmp_path / "a", max_bytes=2_200_000, progress=False,
                   candidates="mxfp4, int5 | fp16/g64, w8g64, e2m1@rne | e8m0.ceil/g32")  # fmt: skip
    assert low["bytes"] <= 2_200_000
    known = {"e2m1 | e8m0.ceil/g32", "int5 | fp16/g64", "int8 | fp16/g64"}
    assert {layer["weight"] for layer in low["layers"]} <= known
    assert low["search"]["candidates"] == sorted(known, key=list(known).index) or set(
        low["search"]["candidates"]
    ) == known  # fmt: skip
    roomy = quantize(model, recipe=recipe, out=tmp_path / "b", max_bytes=10**9, progress=False)
    assert {layer["weight"][:4] for layer in roomy["layers"]} == {"int8"}


def test_a_checkpoint_of_compressed_tensors_keeps_its_budget(model, tmp_path):
    (tmp_path / "ct.yaml").write_text(
        'layers: [{match: "*", weight: int4 | fp16/g32}]\nignore: [lm_head]\n'
        "calibration: {samples: 2, window: 32}\n"
    )
    result = quantize(model, recipe=tmp_path / "ct.yaml", out=tmp_path / "o", max_bytes=12_650_000, progress=False)  # fmt: skip
    assert result["format"] == "compressed-tensors"
    found = result["search"]["predicted_bytes"]
    # Exact but for the shape that layers of packed codes store and layers of whole bytes do not.
    layers = sum(len(group["layers"]) for group in result["search"]["groups"])
    assert result["bytes"] <= found <= min(result["bytes"] + 16 * layers, 12_650_000)
    assert len({layer["weight"] for layer in result["layers"]}) > 1


def test_a_resumed_run_does_not_search_again_and_ends_with_the_same_bytes(
    found, model, tmp_path, monkeypatch
):
    result, whole = found
    (tmp_path / "base.yaml").write_text(RECIPE)
    ask = {"recipe": tmp_path / "base.yaml", "out": tmp_path / "o", "bits": 5.0, "progress": False}

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_quantize_outside", killed)
        with pytest.raises(KeyboardInterrupt):
            quantize(model, **ask)
    monkeypatch.setattr(budget, "_rows", killed)
    with pytest.raises(UserError, match="unfinished run"):
        quantize(model, **(ask | {"bits": 5.5}))
    again = quantize(model, **ask)
    assert again["search"] == result["search"]
    assert shards(tmp_path / "o") == shards(whole)
    assert quantize(model, **ask)["search"] == result["search"]  # finished: no work at all


def test_a_resumed_exact_scan_measures_no_group_again(model, recipe, tmp_path, monkeypatch):
    ask = {"recipe": recipe, "bits": 5.0, "scan": "exact", "candidates": "w4g32,w6g32", "progress": False}  # fmt: skip
    quantized, measured = Scan._quantized, []

    def counted(self, group, operand, form):
        measured.append((group.label, str(form)))
        if len(measured) == 12:  # half a group is finished
            raise KeyboardInterrupt
        return quantized(self, group, operand, form)

    monkeypatch.setattr(Scan, "_quantized", counted)
    monkeypatch.setattr(Scan, "together", lambda self, tokens, plans: [1.0] * len(plans))
    with pytest.raises(KeyboardInterrupt):
        quantize(model, out=tmp_path / "o", **ask)
    resumed = quantize(model, out=tmp_path / "o", **ask)
    measured.remove(measured[11])  # it was begun twice, like what else its group had finished
    groups = [label for label, _ in measured]
    assert len(set(measured)) == 2 * len(set(groups)) >= len(measured) - 1
    whole = quantize(model, out=tmp_path / "whole", **ask)
    assert resumed["search"] == whole["search"]
    rows = [json.loads((tmp_path / f / "sensitivity.json").read_text()) for f in ("o", "whole")]
    assert rows[0] == rows[1] and shards(tmp_path / "o") == shards(tmp_path / "whole")


def test_the_scan_alone_speaks_of_weights_and_inputs(model, recipe):
    found = scan(model, recipe=recipe, inputs=["int6h | fp32/row"], progress=False)
    rows = found["rows"]
    assert found["method"] == "cheap" and found["calibration"]["sha256"]
    inputs = [row for row in rows if row["operand"] == "input"]
    assert {row["format"] for row in inputs} == {"int6h | fp32/row"}
    assert len(inputs) == 3 * 4  # the head's input stays as it is
    weights = [row["format"] for row in rows if row["group"] == "lm_head"]
    assert weights == [f"int{bits} | fp16/g32" for bits in range(3, 9)]
    with pytest.raises(UserError, match="inputs: unknown"):
        scan(model, recipe=recipe, inputs=["int6q"], progress=False)
    with pytest.raises(UserError, match="did you mean 'exact'"):
        scan(model, recipe=recipe, method="exat", progress=False)


def test_the_scan_can_measure_too(model, recipe):
    found = scan(model, recipe=recipe, method="exact", weights=["w4g32"], inputs=[], progress=False)
    assert len(found["rows"]) == 3 * 4 + 1
    assert {row["format"] for row in found["rows"]} == {"int4 | fp16/g32"}
    assert all(row["class"] in ("I", "II", "III") for row in found["rows"])


def test_a_plan_says_what_was_found_also_where_a_pattern_would_catch_too_much():
    base = Plan.from_dict({"layers": [{"match": "*", "weight": "w6g64", "rotate": True}]})
    names = [f"a.{i}.up_proj" for i in range(5)] + [f"a.{i}.b.{i}.up_proj" for i in range(5)]
    for kept in (
        names[:5],
        names[::-1],
    ):  # the last pattern of the second, a.*.up_proj, catches all
        weights = {name: f"w{3 + i % 5 if i else 8}g64" for i, name in enumerate(kept)}
        groups = [{"layers": [name], "weight": weight} for name, weight in weights.items()]
        plan = found_plan(base, base.resolve(kept), {"groups": groups})
        resolved = plan.resolve(kept)
        assert resolved == {
            name: LayerPlan(spec(weight), rotate=True) for name, weight in weights.items()
        }


# ------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scan": "exact"}, "needs a budget"),
        ({"candidates": "mxfp4"}, "needs a budget"),
        ({"bits": 5.0, "max_bytes": 10**6}, "not in both"),
        ({"bits": -1.0}, "above 0"),
        ({"bits": float("nan")}, "above 0"),
        ({"bits": 5.0, "scan": "exat"}, "did you mean 'exact'"),
        ({"bits": 5.0, "candidates": "int6 | fp16/q64"}, "candidates: unknown partition"),
        ({"bits": 5.0, "candidates": " , "}, "names no format"),
        ({"bits": 2.0}, "from 3.51 to 8.50 bits per weight"),
        ({"bits": 9.0}, "from 3.51 to 8.50 bits per weight"),
        ({"max_bytes": 1000}, "bytes cannot be met"),
        ({"bits": 5.0, "recipe": "mxfp4"}, "no other widths"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(options, said, model, recipe, tmp_path):
    with pytest.raises(UserError, match=said):
        quantize(model, **({"recipe": recipe, "out": tmp_path / "o", "progress": False} | options))
    assert not (tmp_path / "o").exists()


def test_what_a_refusal_names_can_be_asked_for(model, recipe):
    job = budget.prepare(
        str(model), parse_recipe(RECIPE, "x"), Path("o"), 0, None, Search(bits=1.0)
    )
    with pytest.raises(UserError) as caught:
        budget.check_budget(job)
    low, high = (float(word) for word in str(caught.value).split(" from ")[1].split()[:3:2])
    for bits in (low, high):
        budget.check_budget(budget.replace(job, search=Search(bits=bits)))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--bits", "0"], "above 0"),
        (["--max-bytes", "much"], "a size such as 95MB"),
        (["--bits", "5", "--scan", "exat"], "did you mean 'exact'"),
        (["--bits", "5", "--max-bytes", "1GB"], "not in both"),
    ],
)
def test_the_command_line_says_so_too(words, said, model, tmp_path, capsys):
    assert main(["quantize", str(model), "-o", str(tmp_path / "o"), *words]) == 2
    assert said in capsys.readouterr().err


def test_the_command_line_shows_the_plan(found, model, tmp_path, capsys):
    from posttrain.cli.quantize import show

    result, out = found
    shown = show(result | {"notes": []})
    assert (
        "loss of the plan" in shown
        and "one width for all" in shown
        and str(out / "recipe.yaml") in shown
    )
    assert "q+k+v" in shown and " x " in shown


def test_the_loaded_model_answers_near_the_full_one(found, model):
    text = torch.arange(50).reshape(2, 25)
    with torch.no_grad():
        full = load(model, dtype=torch.float32)(text).logits
        small = load(found[1], dtype=torch.float32)(text).logits
    assert torch.nn.functional.cosine_similarity(full, small, dim=-1).min() > 0.9


AWQ_RECIPE = RECIPE.replace("transform: smooth", "transform: awq")


@pytest.mark.parametrize("method", ["cheap", "exact"])
def test_a_transform_that_searches_by_the_formats_is_told_them(method, model, tmp_path):
    (tmp_path / "awq.yaml").write_text(AWQ_RECIPE)
    ask = {"recipe": tmp_path / "awq.yaml", "progress": False}
    result = quantize(
        model, out=tmp_path / "o", bits=5.0, scan=method, candidates="w4g32,w6g32", **ask
    )
    assert result["recipe"]["transform"]["name"] == "awq" and result["bits_per_weight"] <= 5
    rows = scan(model, method=method, weights=["w4g32"], inputs=[], **ask)["rows"]
    assert len(rows) == len(result["search"]["groups"])


@pytest.mark.parametrize("turned", [False, True])
def test_of_widths_of_one_size_the_first_named_is_taken(turned):
    names = ["int4 | fp16/g16", "e2m1 | fp16/g16", "int4 | bf16/g16"]
    names = names[::-1] if turned else names
    groups = scanner("llama").groups
    asked = Search(bits=8.0, candidates=tuple(str(spec(name)) for name in names))
    sizes = search.Sizes(parameters=10**6, kept=0, padded=False)
    assert {str(form) for form in search.uniform(asked, groups, sizes)} == {str(spec(names[0]))}


@pytest.mark.parametrize("seed", [10**20, -(10**20)])
def test_a_seed_no_generator_takes_is_said_at_once(seed, model, recipe, tmp_path):
    with pytest.raises(UserError, match="seed must be a whole number below"):
        quantize(model, recipe=recipe, out=tmp_path / "o", seed=seed, progress=False)


def test_a_window_past_learned_positions_is_said_at_once(tiny, recipe, tmp_path, capsys):
    learned = tiny("OPT", max_position_embeddings=24, ffn_dim=64, word_embed_proj_dim=32)
    with pytest.raises(UserError, match="window: 32 tokens, and this model has 24 positions"):
        quantize(learned, recipe=recipe, out=tmp_path / "o", progress=False)
    with pytest.raises(UserError, match="window: 25 tokens"):
        scan(learned, recipe=recipe, window=25, progress=False)
    rotary = tiny("Llama", max_position_embeddings=24)
    quantize(rotary, recipe=recipe, out=tmp_path / "r", progress=False)
    assert "window: 32 tokens are more than the 24" in capsys.readouterr().err


def test_a_plan_found_leaves_the_cache_as_the_recipe_has_it(model):
    settings = parse_recipe("{kv: int4, " + 'layers: [{match: "*", weight: int4 | fp16/g32}]}', "x")
    job = budget.prepare(str(model), settings, Path("o"), 0, None, Search(bits=5.0))
    assert job.writer.kv is not None and job.replanned(settings).writer.kv == job.writer.kv
