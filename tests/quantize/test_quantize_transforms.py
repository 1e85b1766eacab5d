"""Transforms: the function stays, the rounding error falls, and nothing else is touched."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from posttrain.errors import UserError
from posttrain.models.load import load
from posttrain.models.plan import LayerPlan
from posttrain.numbers import Spec
from posttrain.numbers import quantize as quantize_tensor
from posttrain.quantize import quantize
from posttrain.quantize.transforms import (
    AWQ,
    Channels,
    CrossQuant,
    Outliers,
    Smooth,
    Smoothing,
    apply,
)

CALIBRATION = {"samples": 6, "window": 32, "calibration": None}
# One weight a group: each is stored exactly, up to the rounding of one float32 product.
LOSSLESS = 'layers: [{match: "*", weight: int8 | fp32/g1}]\nignore: [lm_head, "*.gate"]\n'
A8 = 'layers: [{match: "*", weight: int8 | fp32/g1, input: int8h | fp32/row}]\n'
# Of the linears of a block: q, k, v, gate and up by their norms, down by the rows of up.
FAMILIES = {
    "Llama": ({}, 6),
    "Qwen2": ({}, 6),  # biases
    "Qwen3": ({"head_dim": 8}, 6),  # norms of queries and keys
    "Gemma2": ({"head_dim": 8, "sliding_window": 8}, 6),  # norms that multiply by 1 + weight
    "Phi3": ({"pad_token_id": 0}, 2),  # fused projections: no rows of their own for `up`
    "Mixtral": ({"num_local_experts": 4}, 3),  # experts read the norm too, so it stays
    "Olmo2": ({}, 2),  # norms after the blocks: gated MLP alone
    "GPTNeoX": ({}, 2),  # LayerNorm with a bias
    "StableLm": ({"use_qkv_bias": True}, 6),
}
TOKENS = torch.randint(3, 49152, (2, 25), generator=torch.Generator().manual_seed(0))
MANY = torch.randint(3, 49152, (16, 50), generator=torch.Generator().manual_seed(0))


def loud(folder, dtype=torch.float32):
    """Give the norms of a checkpoint weights of their own, a few of them loud."""
    generator = torch.Generator().manual_seed(1)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if tensor.ndim == 1 and "norm" in name:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
                tensor[::11] *= 20
            tensors[name] = tensor.to(dtype)
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def logits(folder, tokens=TOKENS):
    with torch.no_grad():
        return load(folder, dtype=torch.float32)(tokens).logits


def distance(folder, reference, tokens=TOKENS):
    expected = logits(reference, tokens)
    return (logits(folder, tokens) - expected).norm() / expected.norm()


def run(model, recipe, tmp_path, name="out"):
    path = tmp_path / f"{name}.yaml"
    path.write_text(recipe)
    return quantize(model, recipe=path, out=tmp_path / name, progress=False, **CALIBRATION)


CASES = [(family, "rtn") for family in FAMILIES] + [("Llama", "gptq"), ("Mixtral", "gptq")]


@pytest.mark.parametrize(("family", "solver"), CASES)
def test_the_function_is_preserved(family, solver, tiny, tmp_path):
    changes, smoothed = FAMILIES[family]
    model = loud(tiny(family, **changes))
    result = run(model, LOSSLESS + f"transform: smooth\nsolver: {solver}\n", tmp_path)
    assert sum(layer["smoothed"] for layer in result["layers"]) == 3 * smoothed
    assert distance(tmp_path / "out", model) < 1e-5


@pytest.mark.parametrize("family", ["Llama", "Phi3", "GPTNeoX"])
@pytest.mark.parametrize("options", ["", "transform: smooth", "solver: gptq"])
def test_rotated_layers_compute_the_same(family, options, tiny, tmp_path):
    model = loud(tiny(family, **FAMILIES[family][0]))
    recipe = LOSSLESS.replace("/g1}", "/g1, rotate: true}") + options
    result = run(model, recipe, tmp_path)
    assert all(layer["rotated"] for layer in result["layers"])
    assert distance(tmp_path / "out", model) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_awq_preserves_the_function_where_it_changes_anything(family, tiny, tmp_path, monkeypatch):
    """With weights stored exactly nothing is gained; so the search is made to gain."""
    losses = iter(range(10**6, 0, -1))
    monkeypatch.setattr("posttrain.quantize.awq._loss", lambda channels, d: next(losses))
    changes, smoothed = FAMILIES[family]
    model = loud(tiny(family, **changes))
    result = run(model, LOSSLESS + "transform: {name: awq, balance: true}\n", tmp_path)
    assert sum(layer["smoothed"] for layer in result["layers"]) == 3 * smoothed
    assert distance(tmp_path / "out", model) < 1e-5


def test_rotation_spreads_loud_channels(tiny, tmp_path):
    model = loud(tiny("Llama"))
    run(model, A8 + "ignore: [lm_head]\n", tmp_path, "plain")
    rotated = A8.replace("/row}", "/row, rotate: true}") + "ignore: [lm_head]\n"
    run(model, rotated, tmp_path, "rotated")
    assert distance(tmp_path / "rotated", model) < 0.8 * distance(tmp_path / "plain", model)


def test_norms_stored_in_bfloat16_are_divided_exactly(tiny, tmp_path):
    model = loud(tiny("Llama", dtype="bfloat16"), torch.bfloat16)
    run(model, LOSSLESS + "transform: smooth\n", tmp_path)
    assert distance(tmp_path / "out", model) < 1e-5


def test_loud_channels_cost_less_when_smoothed(tiny, tmp_path):
    model = loud(tiny("Llama"))
    recipe = A8 + "ignore: [lm_head]\n"
    run(model, recipe, tmp_path, "plain")
    run(model, recipe + "transform: {name: smooth, alpha: 0.9}\n", tmp_path, "smooth")
    smooth, plain = (distance(tmp_path / name, model, MANY) for name in ("smooth", "plain"))
    assert smooth < 0.6 * plain  # over few tokens it is between 0.5 and 0.9, by chance


class Shared(nn.Module):
    """A block whose first norm is read by a linear and, when `leak`, by the residual too."""

    def __init__(self, leak: bool) -> None:
        super().__init__()
        self.leak = leak
        self.one, self.two = nn.RMSNorm(16), nn.RMSNorm(16)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.one(x)
        x = x + self.a(y) + (y if self.leak else 0)
        return x + self.b(self.two(x))


@pytest.mark.parametrize("input", ["", ", input: int8h | fp32/row"])
@pytest.mark.parametrize("balance", ["false", "true"])
def test_awq_loses_less(input, balance, tiny, tmp_path):
    model = loud(tiny("Llama"))
    recipe = f'layers: [{{match: "*", weight: int4 | fp16/g32{input}}}]\nignore: [lm_head]\n'
    run(model, recipe, tmp_path, "plain")
    result = run(model, recipe + f"transform: {{name: awq, balance: {balance}}}\n", tmp_path, "awq")
    assert any(layer["smoothed"] for layer in result["layers"])
    assert distance(tmp_path / "awq", model) < 0.9 * distance(tmp_path / "plain", model)


def layer_loss(seen: Channels, d: torch.Tensor) -> float:
    """What `awq` minimises, written out."""
    total = 0.0
    for weight, layer in seen.consumers:
        stored = quantize_tensor(weight * d, layer.weight).dequantize()
        x = seen.inputs / d
        x = x if layer.input is None else quantize_tensor(x, layer.input).dequantize()
        total += float((x @ stored.T - seen.inputs @ weight.T).square().sum())
    return total


def channels(x: torch.Tensor, weights: list[torch.Tensor], layer: LayerPlan) -> Channels:
    return Channels(
        x.square().mean(0).sqrt(), x.abs().amax(0), torch.cat(weights).abs().amax(0),
        mean=x.abs().mean(0), inputs=x, consumers=tuple((weight, layer) for weight in weights),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("text", ["int4 | fp16/g32", "int3z | fp16/row", "mxfp4", "nf4"])
@pytest.mark.parametrize("quantized", [None, "int8h | fp32/row"])
def test_awq_takes_the_best_alpha_of_its_grid(text, quantized, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, 64, generator=generator) * (torch.arange(64) % 9 + 0.1)
    weights = [torch.randn(8, 64, generator=generator) for _ in range(2)]
    layer = LayerPlan(Spec.parse(text), quantized and Spec.parse(quantized))
    seen = channels(x, weights, layer)
    losses = {}
    for i in range(5):
        d = seen.mean ** (i / 4)
        d = d / (d.max() * d.min()).sqrt()
        losses[layer_loss(seen, d)] = d
    found = AWQ(steps=5).factors(seen)
    torch.testing.assert_close(found, losses[min(losses)])
    assert layer_loss(seen, AWQ(steps=5, balance=True).factors(seen)) <= min(losses) * (1 + 1e-4)
    uneven = layer_loss(seen, torch.ones(64))
    assert min(losses) < uneven or torch.equal(found, torch.ones(64))


def test_awq_leaves_alone_what_it_cannot_better(tiny, tmp_path):
    """Powers of two whose scales take factors of two exactly: alpha = 0 loses nothing."""
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 33)
    exact = torch.randint(-7, 8, (8, 32), generator=torch.Generator().manual_seed(0)).float()
    exact[:, 0] = 7
    seen = channels(x, [exact], LayerPlan(Spec.parse("int4 | fp32/row")))
    assert torch.equal(AWQ().factors(seen), torch.ones(32))
    model = loud(tiny("Llama"))
    plain = 'layers: [{match: "*", weight: fp32}]\nignore: [lm_head]\n'
    result = run(model, plain + "transform: awq\n", tmp_path)
    assert not any(layer["smoothed"] for layer in result["layers"])
    for name, tensor in load(model).state_dict().items():
        if "norm" in name:
            assert torch.equal(tensor, load(tmp_path / "out").state_dict()[name])


def test_awq_needs_to_know_the_formats(tiny):
    model = load(loud(tiny("Llama")), dtype=torch.float32)
    with pytest.raises(UserError, match="what each linear will become"):
        apply(model, AWQ(), TOKENS)
    planned = {name: LayerPlan(Spec.parse("int3 | fp16/g32")) for name, _ in model.named_modules()}
    with torch.no_grad():
        expected = model(TOKENS).logits
        changed = apply(model, AWQ(tokens=20), TOKENS, planned)
        assert changed and (model(TOKENS).logits - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("leak", [False, True])
def test_a_norm_that_something_else_reads_is_left_alone_and_said(leak):
    torch.manual_seed(0)
    block, said = Shared(leak), []
    sample = torch.randn(4, 16) * torch.linspace(0.1, 9, 16)
    before = {name: p.detach().clone() for name, p in block.named_parameters()}
    smoothing = Smoothing(Smooth(), block, dict(block.named_modules()))
    with torch.no_grad(), smoothing.watching():
        expected = block(sample)
    with torch.no_grad():
        changed = smoothing.fold(
            ["a", "b"], lambda name: torch.float32, lambda: block(sample), said.append
        )
        torch.testing.assert_close(block(sample), expected)
    assert set(changed) == ({"two.weight", "b.weight"} if leak else
                            {"one.weight", "a.weight", "two.weight", "b.weight"})  # fmt: skip
    assert [line.partition(":")[0] for line in said] == (["one"] if leak else [])
    for name, parameter in block.named_parameters():
        same = torch.allclose(parameter, before[name], rtol=1e-5)
        assert same == (name not in changed)


def test_a_linear_that_stays_in_full_precision_is_not_rescaled(tiny, tmp_path):
    model = loud(tiny("Llama"))
    ignored = 'ignore: [lm_head, "*.q_proj", "*.k_proj", "*.v_proj", "*.gate_proj", "*.up_proj"]\n'
    recipe = A8 + ignored + "transform: smooth\n"
    result = run(model, recipe, tmp_path)
    assert not any(layer["smoothed"] for layer in result["layers"])


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_it_looks_at_as_many_windows_as_asked(solver, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("posttrain.quantize.job.BATCH_TOKENS", 2 * 32)
    model, written = loud(tiny("Llama")), {}
    few = {"samples": 12, "window": 32, "calibration": None}
    for samples in (1, 12, 99):
        path = tmp_path / f"{samples}.yaml"
        transform = f"transform: {{name: smooth, samples: {samples}}}\n"
        path.write_text(LOSSLESS + transform + f"solver: {solver}\n")
        quantize(model, recipe=path, out=tmp_path / f"{samples}", progress=False, **few)
        written[samples] = load(tmp_path / f"{samples}").model.layers[0].input_layernorm.weight
    assert torch.equal(written[12], written[99]) and not torch.equal(written[1], written[12])


def test_a_model_without_tokenizer_is_told_what_to_do(tiny, tmp_path):
    model = tiny("Llama")
    (model / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="--transform none"):
        quantize(model, recipe="w8a8", out=tmp_path / "out", progress=False)
    quantize(model, recipe="w8a8", transform="none", out=tmp_path / "out", progress=False)


def test_the_factors_balance_what_alpha_says():
    rms, absmax = torch.tensor([1.0, 4.0, 16.0]), torch.tensor([2.0, 1.0, 4.0])
    even = Smooth(alpha=1.0).factors(Channels(rms, rms, absmax))
    torch.testing.assert_close(rms / even, torch.full((3,), 4.0))
    flat = Smooth(alpha=0.0).factors(Channels(rms, rms, absmax))
    torch.testing.assert_close(absmax * flat, torch.full((3,), 2.0))
    half = Smooth(alpha=0.5).factors(Channels(rms, rms, absmax))
    torch.testing.assert_close((absmax * half) / (rms / half), torch.full((3,), 0.5))
    silent, other = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    assert Smooth().factors(Channels(silent, silent, other)).isfinite().all()


def test_crossquant_looks_at_the_loudest_token_whatever_the_weights_are():
    rms, absmax = torch.ones(3), torch.tensor([1.0, 4.0, 16.0])
    for weight in (torch.ones(3), torch.tensor([9.0, 1.0, 2.0])):
        seen = Channels(rms, absmax, weight)
        torch.testing.assert_close(
            absmax / CrossQuant(alpha=0.0).factors(seen), torch.full((3,), 4.0)
        )
        torch.testing.assert_close(CrossQuant(alpha=1.0).factors(seen), torch.ones(3))
        half = CrossQuant(alpha=0.5).factors(seen)
        torch.testing.assert_close(half, torch.tensor([0.5, 1.0, 2.0]))


IN_MEMORY = {"Llama": {}, "untied": {"tie_word_embeddings": False}, "Qwen2": {}, "Gemma2": {"head_dim": 8},
             "one key for all": {"num_key_value_heads": 1}, "no sharing": {"num_key_value_heads": 4}}  # fmt: skip


@pytest.mark.parametrize(
    "transform", [Smooth(), CrossQuant(), Outliers(factor=60.0)], ids=lambda t: t.name
)
@pytest.mark.parametrize("layout", IN_MEMORY)
def test_a_model_in_memory_computes_the_same(layout, transform, tiny):
    family = layout if layout in FAMILIES else "Llama"
    model = load(loud(tiny(family, **IN_MEMORY[layout])), dtype=torch.float32)
    with torch.no_grad():
        expected = model(TOKENS).logits
        before = {name: p.clone() for name, p in model.named_parameters()}
        changed = apply(model, transform, TOKENS)
        assert (model(TOKENS).logits - expected).norm() < 1e-5 * expected.norm()
    differ = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert differ == set(changed) and any("norm" in name for name in differ)


@pytest.mark.parametrize(
    "transform", [Smooth(), CrossQuant(), Outliers(factor=60.0)], ids=lambda t: t.name
)
@pytest.mark.parametrize("name", ["pico", "demo"])
def test_a_real_model_computes_the_same(name, transform):
    model = load(name, dtype=torch.float32)
    tokens = TOKENS % model.config.vocab_size
    with torch.no_grad():
        expected = model(tokens).logits
        assert apply(model, transform, tokens)
        assert (model(tokens).logits - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("how", ["rotated", "awq"])
def test_a_real_model_computes_the_same_when_quantized_without_loss(how, tmp_path, monkeypatch):
    recipe = LOSSLESS.replace("/g1}", "/g1, rotate: true}") if how == "rotated" else LOSSLESS
    if how == "awq":  # made to gain, as above
        losses = iter(range(10**6, 0, -1))
        monkeypatch.setattr("posttrain.quantize.awq._loss", lambda channels, d: next(losses))
        recipe += "transform: awq\n"
    result = run("pico", recipe, tmp_path)
    assert any(layer["rotated"] or layer["smoothed"] for layer in result["layers"])
    tokens = TOKENS % 4096
    with torch.no_grad():
        expected, found = (
            load(model, dtype=torch.float32)(tokens).logits for model in ("pico", tmp_path / "out")
        )
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_injected_outliers_are_as_loud_as_asked(tiny):
    model, seen = load(tiny("Llama"), dtype=torch.float32), []
    layer = model.model.layers[0].self_attn.q_proj
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    with torch.no_grad():
        model(TOKENS)
        apply(model, Outliers(factor=60.0, count=3), TOKENS)
        model(TOKENS)
    handle.remove()
    louder = (seen[-1] / seen[0]).reshape(-1, layer.in_features).median(0).values
    channels = Outliers(count=3).channels(layer.in_features)
    assert len(set(channels.tolist())) == 3
    torch.testing.assert_close(louder[channels], torch.full((3,), 60.0))
    quiet = torch.ones_like(louder).index_fill(0, channels, 0) > 0
    torch.testing.assert_close(louder[quiet], torch.ones(int(quiet.sum())))


def test_crossquant_in_a_recipe(tiny, tmp_path):
    model = loud(tiny("Llama"))
    result = run(model, LOSSLESS + "transform: {name: crossquant, alpha: 0.3}\n", tmp_path)
    assert sum(layer["smoothed"] for layer in result["layers"]) == 3 * 6
    assert distance(tmp_path / "out", model) < 1e-5
