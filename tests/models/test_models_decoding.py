"""Laws of the native decoder: it says what transformers says, and the same to the bit however the
work is cut: step by step or at once, alone or beside others, on any instruction set and threads."""

import sys

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import cross_entropy

import posttrain
from posttrain import kernels
from posttrain.errors import UserError
from posttrain.lm.engine import NativeEngine, TorchEngine, engine, losses_of, why_torch
from posttrain.models.decoding import CACHES, MODEL_TYPES, decoder, no_decoder
from posttrain.models.kv import parse_kv
from posttrain.models.linear import QuantLinear
from posttrain.models.plan import LayerPlan
from posttrain.numbers import quantize, spec

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.find().reason)

SMALL = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12, "initializer_range": 0.2,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ROPES = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [1.5] * 6,
        "factor": 2.0, "original_max_position_embeddings": 20,
    },
}  # fmt: skip
CASES = {
    "llama": ("Llama", {}),
    "llama, biases, one head": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 6, "head_dim": 20},
    ),
    "llama, tied, gelu": ("Llama", {"tie_word_embeddings": True, "hidden_act": "gelu"}),
    "llama, wide heads": ("Llama", {"head_dim": 64, "num_attention_heads": 3, "num_key_value_heads": 1}),
    "llama, odd heads": ("Llama", {"head_dim": 34, "attention_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "mistral, no window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2, windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3", {}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.0,
            "attention_multiplier": 0.2,
        },
    ),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {"sliding_window": 6, "query_pre_attn_scalar": 12}),
    "gemma3": (
        "Gemma3Text",
        {
            "sliding_window": 6, "query_pre_attn_scalar": 12,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "gemma3, windows only": ("Gemma3Text", {"sliding_window": 6}),
} | {
    f"llama, {name}": ("Llama", {"rope_parameters": {"rope_theta": 10000.0} | rope})
    for name, rope in ROPES.items()
}  # fmt: skip


def build(case, seed=0, **more):
    family, options = CASES[case]
    config = getattr(transformers, f"{family}Config")(**(SMALL | options | more))
    model_class = family.replace("Gemma3Text", "Gemma3") + "ForCausalLM"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(config).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # all ones and zeros would hide mistakes
                nn.init.normal_(parameter, 0.5, 0.3)
    return model.requires_grad_(False)


def tokens(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (count,), generator=generator).tolist()


def expected(model, ids):
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def close(found, reference, share=2e-5):
    """Within a share of the largest logit: float32 rounding in another order of sums."""
    assert found.shape == reference.shape
    worst = (found - reference).abs().max() / reference.abs().max()
    assert worst <= share, worst.item()


def test_every_supported_architecture_has_a_case():
    assert {build(case).config.model_type for case in CASES} == set(MODEL_TYPES)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case):
    model = build(case)
    native = decoder(model)
    for count in (1, 5, 40, 61):
        ids = tokens(count)
        got = native.forward([(native.memory(cache="fp32"), ids)], keep=None)
        close(got, expected(model, ids))


@pytest.mark.parametrize("case", CASES)
def test_generation_is_that_of_transformers(case):
    """Through both caches; beyond the length a dynamic scaling was made for."""
    model = build(case)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([tokens(14)])
    options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    theirs = model.generate(ids, **options)
    runner = engine(model)
    session, said = runner.session(cache="fp32"), ids[0].tolist()
    fed = said
    for _ in range(30):
        fed = [int(runner.forward([(session, fed)])[0].argmax())]
        said = said + fed
    assert said == theirs[0].tolist()


def long_prompt(rope):
    """A model that was made for 600 tokens, where a prompt of 1,300 comes in several calls."""
    made_for = {"original_max_position_embeddings": 600} if rope == "longrope" else {}
    scaling = {"rope_theta": 10000.0} | ROPES[rope] | made_for
    return build("llama", max_position_embeddings=600, rope_parameters=scaling)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_angles_follow_the_length_of_a_prompt_and_not_of_its_parts(rope):
    """Nor that of another sequence: transformers would answer each as a fresh model does."""
    lengths = (590, 1300, 700, 5, 601)
    runner = engine(long_prompt(rope))
    sessions = [runner.session(cache="fp32") for _ in lengths]
    for count, session in zip(lengths, sessions, strict=True):
        close(
            runner.forward([(session, tokens(count))], None),
            expected(long_prompt(rope), tokens(count)),
        )
    for count, session in zip(lengths, sessions, strict=True):  # one more token: side by side
        assert session.length == count
    more = [7, 11, 13]
    for token in more:
        got = runner.forward([(session, [token]) for session in sessions])
    for index, count in enumerate(lengths):
        alone, cache = long_prompt(rope), None
        for part in (tokens(count), *([token] for token in more)):
            out = alone(input_ids=torch.tensor([part]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
        close(got[index], out.logits[0, -1])
    window = torch.tensor([tokens(1300)])
    losses = cross_entropy(
        expected(long_prompt(rope), tokens(1300))[:-1], window[0, 1:], reduction="none"
    )
    close(runner.window_losses(window, 1300, 512), losses)
    drawn = runner.step(
        [(runner.session(cache="fp32"), tokens(1300))], [kernels.Sampling()], [tokens(1300)]
    )
    assert drawn == [int(expected(long_prompt(rope), tokens(1300))[-1].argmax())]


# What these architectures do not read, or read in their own way.
STRAY = {
    "llama": {
        "attention_multiplier": 9.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.1,
        "logits_scaling": 7.0, "query_pre_attn_scalar": 3, "attn_logit_softcapping": 0.1,
        "final_logit_softcapping": 0.1, "no_rope_layers": [0, 0, 1, 0], "use_sliding_window": True,
    },
    "gemma": {"attn_logit_softcapping": 0.1, "final_logit_softcapping": 0.1, "query_pre_attn_scalar": 3},
    "gemma3": {"attn_logit_softcapping": 0.1},
    "mistral": {"use_sliding_window": False},
    "qwen3": {"embedding_multiplier": 3.0, "no_rope_layers": [0, 0, 1, 0]},
    "smollm3": {
        "use_sliding_window": False, "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", STRAY)
def test_a_field_counts_where_the_architecture_reads_it(case):
    model = build(case, **STRAY[case])
    native = decoder(model)
    got = native.forward([(native.memory(cache="fp32"), tokens(40))], keep=None)
    close(got, expected(model, tokens(40)))


@pytest.mark.parametrize("case", ["gemma", "gemma2", "gemma3"])
def test_gemma_scales_embeddings_by_what_its_dtype_makes_of_the_root(case):
    model = build(case).to(torch.bfloat16)  # 48 ** 0.5 is none
    native = decoder(model)
    exact = model.float()
    scale = torch.tensor(48**0.5).to(torch.bfloat16).float()
    exact.model.embed_tokens.embed_scale.copy_(scale)
    got = native.forward([(native.memory(cache="fp32"), tokens(40))], keep=None)
    close(got, expected(exact, tokens(40)))


def unlike_inputs(model):
    layer = LayerPlan(weight=spec("int8 | fp16/row"), input=spec("int8h | fp32/row"))
    attention = model.model.layers[2].self_attn
    q = quantize(attention.v_proj.weight, layer.weight)
    attention.v_proj = QuantLinear.from_qtensor(q, layer, attention.v_proj.bias)


def double_weights(model):
    model.model.layers[1].mlp.down_proj.double()


def transposed(model):
    linear = model.model.layers[1].mlp.down_proj
    linear.weight = nn.Parameter(linear.weight.T.contiguous().T, requires_grad=False)


UNLIKE = {
    "it looks ahead": (lambda m: setattr(m.config, "is_causal", False), "looks ahead"),
    "one layer looks ahead": (
        lambda m: setattr(m.model.layers[3].self_attn, "is_causal", False), "looks ahead",
    ),
    "unlike inputs": (unlike_inputs, "share their input and quantize it in different ways"),
    "double precision": (double_weights, "float64 or not contiguous"),
    "not contiguous": (transposed, "float32 or not contiguous"),
}  # fmt: skip


@pytest.mark.parametrize("what", UNLIKE)
def test_what_the_decoder_would_compute_otherwise_runs_in_pytorch(what):
    change, reason = UNLIKE[what]
    model = build("llama")
    change(model)
    assert reason in no_decoder(model)
    assert isinstance(engine(model), TorchEngine)
    with pytest.raises(UserError, match=reason):
        decoder(model)


def test_a_model_without_a_head_has_no_decoder():
    config = transformers.LlamaConfig(**SMALL)
    for name in ("LlamaForSequenceClassification", "LlamaModel"):
        model = getattr(transformers, name)(config).eval()
        assert "does not predict the next token" in no_decoder(model)


@pytest.mark.parametrize(
    "cache, share, size",
    [
        ("fp16", 2e-3, 0.5),
        ("bf16", 2e-2, 0.5),
        ("int8", 6e-2, 0.3),
        ("e4m3", 2e-1, 0.3),
        ("int4", 8e-1, 0.25),
        ("int16", 1e-3, 0.6),
    ],
)
@pytest.mark.parametrize("case", ["llama", "gemma2", "qwen3", "llama, wide heads"])
def test_a_smaller_cache_costs_what_its_format_costs(case, cache, share, size):
    model = build(case)
    native = decoder(model)
    ids = tokens(50)
    memory = native.memory(cache=cache)
    close(native.forward([(memory, ids)], keep=None), expected(model, ids), share)
    full = native.memory(cache="fp32")
    native.forward([(full, ids)])
    assert memory.nbytes <= size * full.nbytes


def special(model):
    """With rows that make their scales special in the first block: zeros, tiny and huge values."""
    attention, size = model.model.layers[0].self_attn, model.config.head_dim
    attention.v_proj.weight[:size] = 0
    attention.v_proj.weight[size : 2 * size] *= 1e-6  # below the smallest scale of float16
    attention.k_proj.weight[:size] *= 1e4
    for projection in (attention.v_proj, attention.k_proj):
        if projection.bias is not None:
            projection.bias.zero_()
    return model


@pytest.mark.parametrize("kv", CACHES)
@pytest.mark.parametrize("case", ["llama", "llama, biases, one head", "llama, odd heads"])
def test_a_cache_holds_what_numbers_makes_of_keys_and_values(case, kv, default_kernels):
    """To the bit, on every instruction set, in whatever parts they come; read back after growing."""
    native = decoder(special(build(case)))
    text = tokens(61)
    exact = native.memory(cache="fp32")
    native.forward([(exact, text)])
    for isa in kernels.isas():
        kernels.use(isa)
        memory = native.memory(16, CACHES[kv])
        for part in (text[:13], text[13:40], text[40:]):
            native.forward([(memory, part)])
        for kept, given in zip(memory.read(), exact.read(), strict=True):
            assert torch.equal(kept[0], quantize(given[0], kv).dequantize()), isa


def edge_rows(grid, width, count):
    """Float32 [count, width]: rows that begin with the largest value, so that their scale is 1, and
    hold every value of the grid, every middle between two, and the floats next to those."""
    codes = (
        torch.arange(0x7F, dtype=torch.uint8)
        if grid.kind == "float"
        else torch.arange(grid.top + 1)
    )
    values = grid.decode(codes)
    points = torch.cat([values, (values[1:] + values[:-1]) / 2])
    points = torch.cat(
        [points, *(torch.nextafter(points, torch.tensor(x)) for x in (0.0, grid.top))]
    )
    points = torch.cat([points, -points])
    rows = points[torch.arange(count * (width - 1)) % len(points)].reshape(count, width - 1)
    assert count * (width - 1) >= len(points)
    return torch.cat([torch.full((count, 1), grid.top), rows], dim=1)


@pytest.mark.parametrize("kv", ["int8", "fp8", "int4"])
def test_a_cached_code_is_the_nearest_with_ties_to_even(kv, default_kernels):
    """The values of a model whose embedding is one-hot are the columns of its weight."""
    width = 256  # a one-hot row times sqrt(width) = 16 is exact
    sizes = {"hidden_size": width, "vocab_size": width, "num_hidden_layers": 1, "head_dim": 64}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(**SMALL | sizes | heads, rms_norm_eps=0.0)
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    rows = edge_rows(parse_kv(kv).grid, 64, width)
    model.model.embed_tokens.weight.copy_(torch.eye(width))
    model.model.layers[0].self_attn.v_proj.weight.copy_(rows.T / 16)
    native = decoder(model)
    for isa in kernels.isas():
        kernels.use(isa)
        memory = native.memory(cache=CACHES[str(parse_kv(kv))])
        native.forward([(memory, range(width))])
        values = memory.read()[1][0, 0]
        assert torch.equal(values, quantize(rows, parse_kv(kv)).dequantize()), isa
        assert torch.equal(values[:, 0], rows[:, 0])


@pytest.mark.parametrize("kv", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("case", ["llama", "mistral", "gemma2", "qwen3"])
def test_both_engines_keep_the_same_cache(case, kv):
    """They differ by float32 rounding, and by the codes that it moves: much less than the format
    costs. At once or token by token is the same in PyTorch too."""
    model, ids, window = build(case), tokens(40), torch.tensor([tokens(40)])
    runner, plain = engine(model, kv), TorchEngine(model, kv=parse_kv(kv))
    assert isinstance(runner, NativeEngine) and runner.keeps() == plain.keeps() == parse_kv(kv)
    theirs = plain.forward([(plain.session(), ids)], None)
    ours = runner.forward([(runner.session(), ids)], None)
    cost = (expected(model, ids) - theirs).square().mean().sqrt()
    assert cost > 0 and (ours - theirs).square().mean().sqrt() < 0.2 * cost
    session = plain.session()
    parts = [plain.forward([(session, part)], None) for part in (ids[:5], ids[5:6], ids[6:])]
    assert (torch.cat(parts) - theirs).square().mean().sqrt() < 0.2 * cost
    for found, logits in ((runner, ours), (plain, theirs)):
        close(torch.cat(list(found.window_logits(window, 40, 7))), logits[:-1])
        close(
            found.window_losses(window, 40, 7),
            cross_entropy(logits[:-1], window[0, 1:], reduction="none"),
        )


def test_a_format_without_a_kernel_is_kept_by_pytorch_and_says_so():
    model = build("llama")
    assert isinstance(engine(model), NativeEngine) and why_torch(model) is None
    assert why_torch(model, "int4") is None and engine(model, "int4") is not engine(model)
    assert engine(model, "int4") is engine(model, "int4 | fp16/row")
    assert engine(model, "int4").decoder is engine(model).decoder
    runner = engine(model, "int4 | fp16/g6")
    assert isinstance(runner, TorchEngine) and runner.keeps() == spec("int4 | fp16/g6")
    assert "no kernel keeps a KV cache in int4 | fp16/g6" in why_torch(model, "int4 | fp16/g6")
    with pytest.raises(UserError, match="no kernel keeps"):
        NativeEngine(engine(model).decoder, spec("nf4 | fp16/row"))
    model.config.quantization_config = {"quant_method": "posttrain", "kv": "int8 | fp16/row"}
    assert engine(model).keeps() == engine(model).keeps(scoring=True) == parse_kv("int8")
    assert engine(model, "fp16").session().cache == "fp16"


WEIGHTS = ("int8 | fp16/row", "int6 | fp16/g16", "int4 | fp16/g16", "nf4 | fp16/g16", "mxfp4")


def quantized(weight, inputs, case="llama", rotate=False):
    model = build(case)
    layer = LayerPlan(weight=spec(weight), input=inputs and spec(inputs), rotate=rotate)
    replace_linears(model, layer)
    return model


def replace_linears(model, layer):
    """Every linear of the blocks, rounded to nearest; those that are quantized anew."""
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.Linear, QuantLinear)) and name != "lm_head":
            q = quantize(module.weight, layer.weight)
            model.set_submodule(name, QuantLinear.from_qtensor(q, layer, module.bias))


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("case", ["llama", "llama, biases, one head"])
def test_quantized_weights_give_the_logits_of_their_values(weight, case):
    model = quantized(weight, None, case)
    ids = tokens(40)
    reference = expected(model, ids)
    native = decoder(model)
    close(native.forward([(native.memory(cache="fp32"), ids)], keep=None), reference)
    close(expected(model, ids), reference, 0)  # the model itself is as before


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("inputs", ["int8h | fp32/row", "int8h | fp16/g16"])
def test_quantized_activations_differ_less_than_they_cost(inputs, rotate):
    """A code that falls on the other side of a tie changes all after it, so the two computations
    part; they must stay nearer to each other than quantized activations are to exact ones."""
    exact = quantized("int6 | fp16/g16", None, rotate=rotate)
    model = quantized("int6 | fp16/g16", inputs, rotate=rotate)
    ids = tokens(60)
    reference = expected(model, ids)
    cost = (expected(exact, ids) - reference).square().mean().sqrt()
    native = decoder(model)
    got = native.forward([(native.memory(cache="fp32"), ids)], keep=None)
    assert (got - reference).square().mean().sqrt() < 0.7 * cost


@pytest.fixture(scope="module")
def mixed():
    """A model with quantized activations: where a different order would show at once."""
    return decoder(quantized("int4 | fp16/g16", "int8h | fp32/row", "llama, wide heads"))


def test_a_model_of_integers_remembers_integers_and_others_floats(mixed):
    runner = NativeEngine(mixed)
    assert runner.keeps() == runner.keeps(scoring=True) == parse_kv("int16")
    assert runner.session().cache == "int16"
    for floats in (build("llama"), quantized("int4 | fp16/g16", None)):
        runner = engine(floats)
        assert runner.keeps() == spec("fp16") and runner.session().cache == "fp16"
        assert runner.keeps(scoring=True) == spec("fp32")


@pytest.fixture
def default_kernels():
    yield
    kernels.use("")
    kernels.set_threads(0)


@pytest.mark.parametrize("cache", CACHES.values())
def test_all_at_once_is_step_by_step_and_side_by_side(mixed, cache):
    texts = [tokens(n, seed=n) for n in (1, 3, 17, 33, 50)]
    alone = [mixed.forward([(mixed.memory(16, cache), text)], keep=None) for text in texts]
    steps = []
    for text in texts:
        memory = mixed.memory(16, cache)
        parts = [text[:2], *([token] for token in text[2:])]
        steps.append(torch.cat([mixed.forward([(memory, p)], keep=None) for p in parts if p]))
    together = mixed.forward([(mixed.memory(16, cache), text) for text in texts], keep=None)
    assert torch.equal(torch.cat(alone), together)
    assert torch.equal(torch.cat(steps), together)


# Texts of several runs of positions (kAttentionRun of native/kernels.h), with windows that begin in
# one of them and end in another.
LONG = {
    "llama": {},
    "llama, wide heads": {},
    "mistral": {"sliding_window": 300},
    "gemma2": {"sliding_window": 700},
}


@pytest.mark.parametrize("case", LONG)
def test_logits_after_long_texts_are_those_of_transformers(case):
    model = build(case, max_position_embeddings=2048, **LONG[case])
    native, ids = decoder(model), tokens(1300)
    close(native.forward([(native.memory(cache="fp32"), ids)], keep=None), expected(model, ids))


@pytest.mark.parametrize(
    "case, cache",
    [("mistral", cache) for cache in CACHES.values()]
    + [(case, cache) for case in LONG if case != "mistral" for cache in ("fp16", "int16")],
)
def test_long_texts_come_in_any_parts(case, cache, default_kernels):
    """Many tokens at once are divided among threads by who looks, a few by what they see."""
    native = decoder(build(case, max_position_embeddings=2048, **LONG[case]))
    text, other = tokens(1200), tokens(703, seed=2)
    whole = native.forward([(native.memory(cache=cache), text)], keep=None)
    beside = native.forward([(native.memory(cache=cache), other)], keep=None)
    for threads in (1, 2, 3):
        kernels.set_threads(threads)
        memory, another = native.memory(cache=cache), native.memory(cache=cache)
        native.forward([(another, other[:700])])
        cuts = [505, 506, 509, 512, 513, 790, 791, 793, 1018, 1031, 1032, 1047, 1190, 1192, 1200]
        for begin, end in zip([0, *cuts], cuts, strict=False):
            found = native.forward([(memory, text[begin:end])], keep=None)
            assert torch.equal(found, whole[begin:end]), (threads, begin, end)
        memory.forget(1020)
        together = native.forward([(memory, text[1020:1026]), (another, other[700:703])], keep=None)
        assert torch.equal(together, torch.cat([whole[1020:1026], beside[700:703]])), threads


@pytest.mark.parametrize("cache", ["fp16", "int16", "int8"])
def test_instruction_sets_agree_on_long_texts(mixed, cache, default_kernels):
    text, found = tokens(1040), []
    for isa in kernels.isas():
        kernels.use(isa)
        memory = mixed.memory(cache=cache)
        parts = [mixed.forward([(memory, part)], keep=4) for part in (text[:1030], text[1030:])]
        found.append(torch.cat(parts))
    assert all(torch.equal(found[0], other) for other in found[1:])


# Logits as they are, scaled, capped.
@pytest.mark.parametrize("case", ["llama", "granite", "gemma2"])
@pytest.mark.parametrize(
    "weight, inputs",
    [
        (None, None),
        ("int8 | fp16/g32", "int8h | fp32/g32"),
        ("int3z | fp16/g16", "int8h | fp32/row"),
        ("int6 | fp32/row", "int8h | fp32/row"),
        ("nf4 | fp16/g16", None),
    ],
)
def test_losses_are_those_of_the_logits_to_the_bit(case, weight, inputs, default_kernels):
    """Though they are taken from a part of the vocabulary at a time."""
    model = build(case, vocab_size=2100)
    if weight is not None:
        layer = LayerPlan(weight=spec(weight), input=inputs and spec(inputs))
        q = quantize(model.lm_head.weight, layer.weight)
        model.set_submodule("lm_head", QuantLinear.from_qtensor(q, layer, None))
    native, generator = decoder(model), torch.Generator().manual_seed(5)
    for rows in (0, 1, 8, 9, 70, 600):
        hidden = torch.randn(rows, 48, generator=generator) * 3
        targets = torch.randint(0, 2100, (rows,), generator=generator)
        targets[:2] = torch.tensor([2099, 0])[: len(targets[:2])]
        if rows == 9:
            hidden[4, 3] = torch.nan
        for isa in kernels.isas():
            kernels.use(isa)
            kernels.set_threads(1 + rows % 2)
            logits = native.logits(hidden)
            wanted = kernels.log_partition(logits) - logits.gather(-1, targets[:, None])[:, 0]
            torch.testing.assert_close(
                native.losses(hidden, targets), wanted, rtol=0, atol=0, equal_nan=True
            )
    with pytest.raises(UserError, match="losses of 1 rows"):
        native.losses(hidden[:1], torch.tensor([2100]))
    with pytest.raises(UserError, match="2 rows have 1 targets"):
        native.losses(hidden[:2], torch.tensor([5]))


SAMPLINGS = [
    kernels.Sampling(),
    kernels.Sampling(temperature=1.3, seed=5),
    kernels.Sampling(repetition_penalty=1.8),
    kernels.Sampling(temperature=0.8, top_k=7, top_p=0.9, repetition_penalty=0.7, seed=2**63),
]


@pytest.mark.parametrize("chunk", [512, 5])
@pytest.mark.parametrize("cache", ["fp16", "int8"])
def test_a_step_draws_what_the_logits_of_a_pass_would(
    mixed, cache, chunk, monkeypatch, default_kernels
):
    monkeypatch.setattr("posttrain.kernels.decoder.CHUNK", chunk)
    prompts = [tokens(n, seed=n) for n in (1, 12, 3, 30)]
    for isa in kernels.isas():
        kernels.use(isa)
        apart = [(mixed.memory(4, cache), list(prompt), list(prompt)) for prompt in prompts]
        beside = [(mixed.memory(4, cache), list(prompt), list(prompt)) for prompt in prompts]
        for _ in range(9):
            logits = mixed.forward([(memory, next) for memory, _, next in apart])
            texts = [text for _, text, _ in beside]
            feeds = [(memory, next) for memory, _, next in beside]
            drawn = mixed.step(feeds, SAMPLINGS, texts)
            for row, how, token, mine, theirs in zip(
                logits, SAMPLINGS, drawn, beside, apart, strict=True
            ):
                assert how.draw(row, theirs[1]) == token
                for _, text, next in (mine, theirs):
                    text.append(token)
                    next[:] = [token]
        assert [m.length for m, _, _ in beside] == [len(prompt) + 8 for prompt in prompts]


def test_a_step_of_a_broken_model_is_refused(mixed):
    model = build("llama")
    model.lm_head.weight[3, 2] = torch.nan
    native = decoder(model)
    with pytest.raises(UserError, match="not numbers"):
        native.step([(native.memory(), [1])], [kernels.Sampling()], [[1]])


def test_long_texts_come_in_chunks(mixed, monkeypatch):
    text = tokens(60)
    whole = mixed.forward([(mixed.memory(), text)], keep=None)
    monkeypatch.setattr("posttrain.kernels.decoder.CHUNK", 7)
    for keep in (0, 1, 9, None):
        got = mixed.forward([(mixed.memory(), text), (mixed.memory(), text[:5])], keep=keep)
        rows = [whole[60 - min(60, keep or 0) if keep is not None else 0 :]]
        rows += [whole[:5][5 - min(5, keep) if keep is not None else 0 :]]
        assert torch.equal(got, torch.cat(rows))


def test_instruction_sets_and_threads_agree_to_the_bit(mixed, default_kernels):
    text = tokens(33)
    for cache in CACHES.values():
        found = []
        for isa in kernels.isas():
            for threads in (1, 2, 3):
                kernels.use(isa)
                kernels.set_threads(threads)
                found.append(mixed.forward([(mixed.memory(cache=cache), text)], keep=None))
        assert all(torch.equal(found[0], other) for other in found[1:]), cache


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"])
def test_a_broken_weight_is_not_hidden(part, default_kernels):
    for isa in kernels.isas():
        kernels.use(isa)
        model = build("llama")
        block = model.model.layers[2]
        getattr(block.mlp if part in ("gate_proj", "down_proj") else block.self_attn, part).weight[
            3, 2
        ] = torch.nan
        native = decoder(model)
        for cache in ("fp32", "int16"):
            assert native.forward([(native.memory(cache=cache), tokens(20))]).isnan().any(), cache


def test_a_memory_goes_back_and_forgets(mixed):
    text = tokens(30)
    memory = mixed.memory()
    first = mixed.forward([(memory, text)], keep=None)
    memory.forget(11)
    assert torch.equal(mixed.forward([(memory, text[11:])], keep=None), first[11:])
    with pytest.raises(UserError, match="go back"):
        memory.forget(31)


@pytest.mark.parametrize("cache", CACHES.values())
def test_a_passing_memory_gives_the_same_and_stays_empty(mixed, cache):
    texts = [tokens(30, seed) for seed in range(3)] + [tokens(77, 3), tokens(1, 4)]
    wanted = [mixed.forward([(mixed.memory(cache=cache), text)], keep=None) for text in texts]
    passing = [mixed.memory(16, cache, passing=True) for _ in texts]
    for text, want in zip(texts, wanted, strict=True):  # one memory, text after text
        assert torch.equal(mixed.forward([(passing[0], text)], keep=None), want)
    beside = mixed.forward(list(zip(passing, texts, strict=True)), keep=None)
    assert torch.equal(beside, torch.cat(wanted))
    assert all(memory.length == memory.nbytes == 0 for memory in passing)
    whole, one = mixed.memory(80, cache), passing[3]
    assert all(
        one._tensors[name].numel() * len(mixed.blocks) == tensor.numel()
        for name, tensor in whole._tensors.items()
    )
    one.length = 1  # as if it remembered
    with pytest.raises(UserError, match="a pass over 3 tokens"):
        mixed.forward([(one, tokens(3))])


@pytest.mark.parametrize(
    "length", [40, 600]
)  # in the memory of one block; longer than one call takes
def test_windows_are_scored_one_by_one(mixed, length):
    windows = torch.tensor([tokens(length, seed) for seed in range(3)])
    texts = windows.tolist()
    runner = NativeEngine(mixed)
    kept = CACHES[str(runner.keeps(scoring=True))]
    logits = [mixed.forward([(mixed.memory(cache=kept), text)], keep=9)[:-1] for text in texts]
    assert torch.equal(torch.cat(list(runner.window_logits(windows, 9, 5))), torch.cat(logits))
    losses = losses_of(iter(logits), windows, 9, 8)
    assert torch.equal(runner.window_losses(windows, 9, 5), losses)


@pytest.mark.parametrize(
    "feeds, message",
    [
        (lambda d, m: [(m, [])], "no tokens"),
        (lambda d, m: [(m, [97])], "from 0 to 96; found 97"),
        (lambda d, m: [(m, [-1])], "found -1"),
        (lambda d, m: [(m, [1, 2**40])], "found 1099511627776"),
        (lambda d, m: [(m, [1]), (m, [2])], "fed once"),
        (lambda d, m: [(decoder(build("llama")).memory(), [1])], "another decoder"),
        (lambda d, m: [(d.memory(passing=True), [1] * 600)], "at most 512 tokens"),
        (lambda d, m: [(d.memory(passing=True), [1] * 300), (m, [1] * 300)], "at most 512 tokens"),
    ],
)
def test_what_cannot_be_fed_is_refused(mixed, feeds, message):
    with pytest.raises(UserError, match=message):
        mixed.forward(feeds(mixed, mixed.memory()))
    given = feeds(mixed, mixed.memory())
    with pytest.raises(UserError, match=message):
        mixed.step(given, [kernels.Sampling()] * len(given), [ids for _, ids in given])
    with pytest.raises(UserError, match="cache='int3'"):
        mixed.memory(cache="int3")


def test_models_it_does_not_know_run_in_pytorch():
    config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2)
    gpt2 = transformers.GPT2LMHeadModel(config).eval()
    assert "gpt2 is not among" in no_decoder(gpt2)
    runner = engine(gpt2)
    assert isinstance(runner, TorchEngine)
    ids = tokens(9)
    session = runner.session()
    got = torch.cat(
        [runner.forward([(session, ids[:4])], None), runner.forward([(session, ids[4:])], None)]
    )
    close(got, expected(gpt2, ids))


def test_quantized_layers_of_unknown_models_run_on_the_kernels(monkeypatch):
    model = quantized("int6 | fp16/g16", None)
    ids = tokens(9)
    reference = expected(model, ids)
    monkeypatch.setattr(sys.modules["posttrain.lm.engine"], "no_decoder", lambda model: "unknown")
    runner = engine(model)
    assert isinstance(runner, TorchEngine)
    calls = []
    linear = kernels.PackedLinear.__call__
    monkeypatch.setattr(
        kernels.PackedLinear, "__call__", lambda self, x: calls.append(1) or linear(self, x)
    )
    close(runner.forward([(runner.session(), ids)], None), reference)
    assert len(calls) == 4 * 7
    close(expected(model, ids), reference, 0)  # and by itself as before
    assert len(calls) == 4 * 7


def test_an_engine_follows_its_model():
    model = build("llama")
    first = engine(model)
    assert isinstance(first, NativeEngine)
    assert engine(model) is first
    model.model.layers[1].mlp.up_proj.weight.data *= 2
    model.model.norm.weight.mul_(1.5)
    changed = engine(model)
    ids = tokens(9)
    close(changed.forward([(changed.session(cache="fp32"), ids)], None), expected(model, ids))
    hook = model.model.layers[0].register_forward_hook(lambda *_: None)
    assert isinstance(engine(model), TorchEngine)
    hook.remove()
    assert isinstance(engine(model), NativeEngine)


@pytest.fixture(scope="module")
def demo():
    return posttrain.load("demo", dtype="float32")


def test_demo_says_what_it_says_in_transformers(demo):
    ids = demo.tokenizer("The river Seine flows through Paris, and the city grew from an island.")
    runner = engine(demo)
    assert runner.name == kernels.isa()
    got = runner.forward([(runner.session(cache="fp32"), ids["input_ids"])], keep=None)
    close(got, expected(demo, ids["input_ids"]))


def test_demo_quantized_says_what_it_says_in_pytorch():
    """With its weights in 6 bits: float32 rounding. With 8-bit activations too, after one block: a
    tenth of what they cost. After thirty: no further apart than two roundings of the same numbers,
    and with the same loss, over so many tokens that PyTorch's own hardly moves with its number of
    threads."""
    model = posttrain.load("demo", dtype="float32")
    ids = model.tokenizer("The city grew from an island in the river, and " * 24)["input_ids"]
    layer = LayerPlan(weight=spec("int6 | fp16/g64"))
    replace_linears(model, layer)
    weights_only = expected(model, ids)
    runner = engine(model)
    close(runner.forward([(runner.session(cache="fp32"), ids)], keep=None), weights_only)
    replace_linears(model, LayerPlan(layer.weight, spec("int8h | fp32/row"), rotate=False))
    reference = expected(model, ids)
    runner = engine(model)
    got = runner.forward([(runner.session(cache="fp32"), ids)], keep=None)
    cost = (weights_only - reference).square().mean().sqrt()
    assert (got - reference).square().mean().sqrt() < 2**0.5 * cost
    wanted = torch.tensor(ids[1:])
    losses = [torch.nn.functional.cross_entropy(x[:-1], wanted) for x in (got, reference)]
    assert abs(losses[0] - losses[1]) < 0.03
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    reference = expected(model, ids)
    runner = engine(model)
    got = runner.forward([(runner.session(cache="fp32"), ids)], keep=None)
    replace_linears(model, layer)
    cost = (expected(model, ids) - reference).square().mean().sqrt()
    assert (got - reference).square().mean().sqrt() < 0.1 * cost


def test_settings_of_a_checkpoint_that_are_not_known_here_are_transformers_business(demo):
    ids = demo.tokenizer("The capital of France is", return_tensors="pt").input_ids
    own = demo.generation_config
    demo.generation_config = transformers.GenerationConfig.from_dict(
        own.to_dict() | {"no_repeat_ngram_size": 1}
    )
    try:
        said = demo.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist()
    finally:
        demo.generation_config = own
    assert len(set(said)) == len(said)
    plain = demo.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist()
    assert said != plain


def test_generate_takes_text_messages_and_token_ids(demo):
    text = "The capital of France is"
    inputs = demo.tokenizer([text, "Once upon a time there"], return_tensors="pt", padding=True)
    options = {"max_new_tokens": 12, "do_sample": False}
    ours = demo.generate(**inputs, **options)
    assert torch.equal(ours, type(demo).generate(demo, **inputs, **options))
    said = demo.generate(text, max_new_tokens=12)
    assert isinstance(said, str) and "Paris" in said
    assert demo.generate([text, text], max_new_tokens=12) == [said, said]
    answer = demo.generate([{"role": "user", "content": "What is 2+2?"}], max_new_tokens=8)
    assert isinstance(answer, str) and answer
    torch.manual_seed(3)
    drawn = demo.generate(inputs["input_ids"][:1], do_sample=True, max_new_tokens=5)
    torch.manual_seed(3)
    assert torch.equal(
        drawn, demo.generate(inputs["input_ids"][:1], do_sample=True, max_new_tokens=5)
    )
    beams = demo.generate(inputs["input_ids"][:1], num_beams=2, max_new_tokens=4, do_sample=False)
    assert beams.shape == (1, inputs["input_ids"].shape[1] + 4)  # transformers' own loop
