"""The workplace of experiments: what it changes comes back, what it measures is paired."""

import pytest
import torch
import torch.nn.functional as F

from posttrain.evaluate.windows import Windows
from posttrain.models.branches import Columns, LowRank
from posttrain.models.linear import FrozenProduct, QuantLinear
from posttrain.models.plan import LayerPlan
from posttrain.numbers import fake_quantize, quantize, spec
from posttrain.papers.int2_1 import LREC, copies_in_backward, recipe
from posttrain.papers.lab import Lab, signed
from posttrain.papers.picture import Series, panels
from posttrain.papers.zeroquant_fp import low_rank

TOKENS = torch.randint(0, 97, (6, 24), generator=torch.Generator().manual_seed(0))
W8 = LayerPlan(spec("w8"))


@pytest.fixture(scope="module")
def model(random_llama):
    random_llama.tokenizer = None
    return random_llama


@pytest.fixture
def windows():
    return Windows(TOKENS, 24, None, 24, False)


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def test_a_variant_lasts_as_long_as_its_context(model):
    lab, before = Lab(), logits(model)
    names = list(lab.linears(model))
    assert len(names) == 14 and not any("head" in name for name in names)
    with lab.quantized(model, dict.fromkeys(names, LayerPlan(spec("int3 | fp32/row")))):
        assert all(isinstance(model.get_submodule(name), QuantLinear) for name in names)
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)
    with pytest.raises(RuntimeError), lab.quantized(model, dict.fromkeys(names, W8)):
        raise RuntimeError
    with lab.altered(model, {names[0]: torch.zeros_like}):
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)


def test_inputs_are_what_layers_see(model):
    lab = Lab()
    q = "model.layers.0.self_attn.q_proj"
    seen = lab.inputs(model, [q], TOKENS)[q]
    block = model.model.layers[0]
    with torch.no_grad():
        expected = block.input_layernorm(model.model.embed_tokens(TOKENS))
    torch.testing.assert_close(seen, expected.reshape(-1, 32))


def test_differences_are_to_the_unchanged_model_on_the_same_tokens(model, windows):
    lab = Lab()
    reference = lab.reference(model, windows)
    expected = F.cross_entropy(
        logits(model)[:, :-1].transpose(1, 2), TOKENS[:, 1:], reduction="none"
    )
    torch.testing.assert_close(reference.scores.nll, expected)
    same = lab.against(reference, model, windows)
    assert abs(same["delta_nll"]) < 1e-6 and same["kl"] < 1e-6
    with lab.quantized(
        model, dict.fromkeys(lab.linears(model), LayerPlan(spec("int3 | fp32/row")))
    ):
        found = lab.against(reference, model, windows)
        theirs = F.cross_entropy(logits(model)[:, :-1].transpose(1, 2), TOKENS[:, 1:])
    assert found["delta_nll"] == pytest.approx(float(theirs - expected.mean()), abs=1e-4)
    assert found["ci_low"] < found["delta_nll"] < found["ci_high"] and found["kl"] > 0.01
    assert signed(found).startswith(f"{found['delta_nll']:+.4f} [")


def test_gptq_of_the_lab_serves_the_layers_own_input(model):
    lab = Lab()
    name = "model.layers.1.mlp.down_proj"
    x = lab.inputs(model, [name], TOKENS)[name]
    weight, form = model.get_submodule(name).weight.detach(), spec("int3 | fp32/row")
    solved = lab.gptq(model, TOKENS)(name, weight, form).dequantize()
    rounded = quantize(weight, form).dequantize()
    error = [(F.linear(x, w) - F.linear(x, weight)).square().mean() for w in (solved, rounded)]
    assert error[0] < 0.8 * error[1]


def test_greedy_continues_with_the_likeliest(model):
    prompts = [[1, 2, 3], [4], [5, 6]]
    for prompt, written in zip(prompts, Lab().greedy(model, prompts, 5), strict=True):
        text = list(prompt)
        for token in written:
            with torch.no_grad():
                assert token == int(model(torch.tensor([text])).logits[0, -1].argmax())
            text.append(token)
        assert len(written) == 5


def test_columns_beside_a_layer_are_multiplied_in_full_precision():
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(20, 32, generator=generator), torch.randn(3, 5, 32, generator=generator)
    index = torch.tensor([4, 30])
    columns = Columns(index, w[:, index])
    codes = quantize(w.index_fill(1, index, 0), "w8")
    layer = QuantLinear.from_qtensor(codes, LayerPlan(spec("w8")), branches=[columns])
    exact = torch.zeros(20, 32).index_copy(1, index, w[:, index])
    rest = fake_quantize(w.index_fill(1, index, 0), spec("w8"))
    torch.testing.assert_close(layer(x), F.linear(x, exact + rest))


def test_a_recipe_is_made_as_the_command_makes_it():
    lab = Lab(quick=True, progress=False)
    made = recipe(2, LREC, 4, steps=2, samples=2)
    before = {name: p.clone() for name, p in lab.pico.named_parameters()}
    with lab.recipe(lab.pico, made) as model:
        assert model.made["recipe"]["distill"]["steps"] == 2
        branches = [m for m in model.modules() if isinstance(m, LowRank)]
        assert len(branches) == len(lab.linears(lab.pico)) == len(model.made["layers"])
    assert all(torch.equal(p, before[name]) for name, p in lab.pico.named_parameters())


def test_full_precision_copies_of_weights_in_the_backward_pass_are_seen():
    """And there are none where branches are trained beside frozen layers."""
    lab = Lab(quick=True, progress=False)
    tokens = lab.windows(lab.pico).tokens[:1]
    names = list(lab.linears(lab.pico))
    beside = low_rank(4)
    with lab.quantized(lab.pico, dict.fromkeys(names, W8), beside=beside) as model:
        assert copies_in_backward(model, tokens) == []
        weight = model.get_submodule(names[-1]).weight
        frozen = FrozenProduct.backward
        try:  # a backward pass that expands the whole weight
            FrozenProduct.backward = staticmethod(
                lambda ctx, g: (g @ (ctx.layer.weight * 1.0), None)
            )
            assert list(weight.shape) in copies_in_backward(model, tokens)
        finally:
            FrozenProduct.backward = frozen


def test_a_picture_shows_every_series_in_every_panel():
    series = Series([0.1, 0.9], [0.2, 0.3], [0.1, 0.2], [0.3, 0.4])
    drawn = panels("What", "x", "y", {title: {"a": series, "b": series} for title in "pqr"})
    assert drawn.startswith("<svg xmlns=") and drawn.count('class="b0"') == 3
    assert drawn.count('class="s1"') == 3 + 1  # and in the legend
    with pytest.raises(ValueError, match="colours"):
        panels("What", "x", "y", {"p": {str(i): series for i in range(9)}})
