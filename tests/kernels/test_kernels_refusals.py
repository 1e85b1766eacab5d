"""Laws of the C interface: what would read or write beyond its memory is refused, whoever asks."""

import ctypes

import pytest
import torch

from posttrain import kernels
from posttrain.kernels import BlockWeights, Decoder, Dimensions, InputFormat, PackedWeight, library
from posttrain.kernels.packed import PackedLinear, product
from posttrain.numbers import quantize, spec

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.find().reason)
WIDTH, HEADS, KV_HEADS, SIZE, HIDDEN, WORDS = 32, 4, 2, 8, 48, 50
BAD_SHAPE, BAD_FORMAT = 1, 2
IDS = [3, 1, 4, 1, 5]


def layer(rows, cols):
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows))
    packed = PackedWeight.from_qtensor(quantize(weight, "w4g16"))
    return PackedLinear(packed, InputFormat.of(spec("a8")))


def decoder() -> Decoder:
    """Two blocks with rotary embeddings of both kinds."""
    queries, keys, gain = HEADS * SIZE, KV_HEADS * SIZE, torch.ones(WIDTH)
    shapes = {"q": (queries, WIDTH), "k": (keys, WIDTH), "v": (keys, WIDTH), "o": (WIDTH, queries)}
    shapes |= {"gate": (HIDDEN, WIDTH), "up": (HIDDEN, WIDTH), "down": (WIDTH, HIDDEN)}
    layers = {name: layer(*shape) for name, shape in shapes.items()}
    blocks = [
        BlockWeights(**layers, attention_norm=gain, mlp_norm=gain, rope=rope) for rope in (0, 1)
    ]
    dimensions = Dimensions(WIDTH, HEADS, KV_HEADS, SIZE, SIZE, WORDS, "silu", 1e-5, 0.3)
    head = layer(WORDS, WIDTH)
    return Decoder(
        dimensions, blocks, head.weight, head, gain,
        lambda rope, start, stop: torch.ones(stop - start, SIZE),
    )  # fmt: skip


class Call:
    """The arguments of pt_forward and pt_step, all in order, for a test to spoil."""

    def __init__(self, cache="fp16"):
        self.decoder = decoder()
        self.memory = self.decoder.memory(16, cache)
        self.decoder._begin([(self.memory, IDS)])
        self.model, self.blocks = self.decoder._model, self.decoder._structs
        self.sequence = self.memory.struct
        self.sequence.tokens = len(IDS)
        self.count, self.ids = 1, (ctypes.c_int32 * len(IDS))(*IDS)
        self.want, self.wanted = (ctypes.c_int32 * 16)(*[4] * 16), 1
        self.hidden, self.logits = None, torch.full((16, WORDS), torch.nan)
        self.draws, self.drawn = (library.Draw * 1)(), (ctypes.c_int32 * 1)(-5)

    def forward(self):
        logits = None if self.logits is None else self.logits.data_ptr()
        hidden = None if self.hidden is None else self.hidden.data_ptr()
        text = self.model, self.sequence, self.count, self.ids
        return library.native().pt_forward(*text, self.want, self.wanted, hidden, logits)

    def step(self):
        text = self.model, self.sequence, self.count, self.ids
        return library.native().pt_step(*text, self.draws, ctypes.addressof(self.drawn))


# What is spoiled -> how, and what the answer is.
SPOILED = {
    "model": [
        *((name, value) for name in ("blocks", "width", "heads", "kv_heads") for value in (0, -1)),
        *((name, value) for name in ("head_size", "vocabulary") for value in (0, -1)),
        *(("rotary", value) for value in (-2, -8, 3, SIZE + 2)),
        ("heads", 3),
    ],
    "blocks": [("rope", 2), ("rope", -2), ("rope", 7), ("window", -1), ("window", -(2**31))],
    "sequence": [
        ("keys", None), ("values", None), ("angles", (None, None)), ("tokens", -1), ("length", -1),
        ("length", 2**63 - 1), ("length", 12), ("capacity", 15), ("passing", 1),
    ],
}  # fmt: skip


def spoil(call, place, name, value):
    struct = getattr(call, place)
    struct = struct[1] if place == "blocks" else struct
    if name == "passing":
        struct.length = 1
    setattr(struct, name, (library._pointer * 2)(*value) if name == "angles" else value)


@pytest.mark.parametrize("function", [Call.forward, Call.step])
@pytest.mark.parametrize(
    "place, name, value", [(place, *how) for place, spoiled in SPOILED.items() for how in spoiled]
)
def test_a_model_or_sequence_that_cannot_be_is_refused(function, place, name, value):
    call = Call()
    spoil(call, place, name, value)
    assert function(call) == BAD_SHAPE
    assert call.logits.isnan().all() and call.drawn[0] == -5


@pytest.mark.parametrize("cache", ["int8", "e4m3", "int4", "int16"])
@pytest.mark.parametrize("name", ["key_scales", "value_scales"])
def test_codes_need_scales(cache, name):
    call = Call(cache)
    assert call.forward() == 0
    spoil(call, "sequence", name, None)
    assert call.forward() == BAD_SHAPE


def test_angles_are_needed_by_blocks_that_turn_only():
    for kind in (0, 1):
        call = Call()
        call.sequence.angles[kind] = None
        assert call.forward() == BAD_SHAPE
        call.blocks[kind].rope = -1
        assert call.forward() == 0
    call = Call()
    spoil(call, "sequence", "angles", (None, None))
    call.model.rotary = 0
    assert call.forward() == 0


@pytest.mark.parametrize("wanted", [-1, -(2**31), len(IDS) + 1, 16])
def test_no_more_logits_than_tokens_are_given(wanted):
    call = Call()
    call.wanted = wanted
    assert call.forward() == BAD_SHAPE
    assert call.logits.isnan().all()


def test_what_enters_the_head_may_be_given_more_than_once():
    call = Call()
    call.wanted, call.hidden = 16, torch.full((16, WIDTH), torch.nan)
    assert call.forward() == 0
    assert torch.equal(call.hidden, call.hidden[:1].expand(16, WIDTH))


@pytest.mark.parametrize("missing", ["ids", "want", "logits"])
def test_what_is_read_or_written_has_to_be_there(missing):
    call = Call()
    setattr(call, missing, None)
    assert call.forward() == BAD_SHAPE


def test_nothing_to_do_is_no_mistake():
    call = Call()
    call.count = 0
    assert call.step() == 0
    assert call.drawn[0] == -5
    call.wanted, call.ids, call.want = 0, None, None
    assert call.forward() == 0
    call.count = -1
    assert call.step() == call.forward() == BAD_SHAPE


def multiply(weight, change):
    x, y = torch.ones(3, weight.struct.cols), torch.zeros(3, weight.struct.rows)
    made = product(x, [weight], InputFormat.of(spec("a8")), [y])
    change(made)
    return library.native().pt_linear(made, 1)


@pytest.mark.parametrize("format", ["w4g16", "w8", "w3g32", "nvfp4", "nf4"])
@pytest.mark.parametrize("group", [0, -1, -16, -(2**31)])
def test_codes_need_groups(format, group):
    """A decoder divides by their width when it reads a row of the embedding."""
    weight = PackedWeight.from_qtensor(quantize(torch.randn(16, 64), format))
    assert multiply(weight, lambda made: None) == 0
    weight.struct.group = group
    assert multiply(weight, lambda made: None) == BAD_FORMAT


@pytest.mark.parametrize("ldx", [63, 1, 0, -64])
def test_tokens_may_not_overlap(ldx):
    weight = PackedWeight.from_tensor(torch.randn(16, 64))
    assert multiply(weight, lambda made: setattr(made, "ldx", 64)) == 0
    assert multiply(weight, lambda made: setattr(made, "ldx", ldx)) == BAD_SHAPE
    codes, scales = torch.zeros(3, 64, dtype=torch.int8), torch.zeros(3)
    status = library.native().pt_quantize(
        torch.ones(3, 64).data_ptr(), ldx, 3, 64, InputFormat.of(spec("a8")).struct,
        codes.data_ptr(), scales.data_ptr(),
    )  # fmt: skip
    assert status == BAD_SHAPE


@pytest.mark.parametrize("vocabulary", [0, -1])
def test_no_token_is_drawn_from_nothing(vocabulary):
    assert library.native().pt_sample(None, vocabulary, library.Draw()) == -1 - BAD_SHAPE
