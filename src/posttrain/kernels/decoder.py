"""A whole decoder of the Llama family on the native kernels: one call per step.

`Decoder` knows dimensions and packed weights, no model library; `models.decoding` makes one from a
loaded model. `Memory` is what a sequence remembers (its KV cache); any number of them, each at its
own length, share a call. Arithmetic between the products is float32, but for attention over a cache
of 16-bit integers.
"""

import ctypes
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from posttrain.errors import UserError
from posttrain.kernels import library
from posttrain.kernels.library import ACTIVATIONS, CACHE_TYPES, Block, Model, Weight
from posttrain.kernels.packed import PackedLinear, PackedWeight
from posttrain.kernels.sampling import Sampling, drawn
from posttrain.numbers import spec

# Angles of positions [start, stop) for rope 0 or 1: [stop - start, rotary], cosines of rotary / 2
# angles, then their sines. Those that change with the length of the sequence are of one that ends at stop.
Angles = Callable[[int, int, int], Tensor]

Feeds = Sequence[tuple["Memory", Sequence[int]]]  # sequences and their next tokens

PANEL = 16  # positions of a cache come in these (layout.h)
CHUNK = 512  # tokens that a call takes at most: workspace grows with them
_CACHE_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "e4m3": torch.uint8,
    "int4": torch.uint8,  # two codes to a byte
    "int16": torch.int16,
}
# Codes under a scale for every token and head -> what the scale is stored in.
CODED = {
    "int8": torch.float16,
    "e4m3": torch.float16,
    "int4": torch.float16,
    "int16": torch.float32,
}


@dataclass(frozen=True)
class Dimensions:
    """What a decoder is besides its weights (`pt_model` of native/posttrain.h)."""

    width: int
    heads: int
    kv_heads: int
    head_size: int
    rotary: int
    vocabulary: int
    activation: str
    eps: float
    attention_scale: float
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    attention_cap: float = 0.0
    logit_cap: float = 0.0


@dataclass(eq=False)
class BlockWeights:
    """One block: linear layers, gains of its norms (None where it has none), how it attends."""

    q: PackedLinear
    k: PackedLinear
    v: PackedLinear
    o: PackedLinear
    gate: PackedLinear
    up: PackedLinear
    down: PackedLinear
    attention_norm: Tensor
    mlp_norm: Tensor
    attention_out_norm: Tensor | None = None
    mlp_out_norm: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    window: int = 0
    rope: int = 0

    def linears(self) -> dict[str, PackedLinear]:
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: item for name, item in found.items() if isinstance(item, PackedLinear)}


class Memory:
    """Keys and values of one sequence of at most `capacity` tokens; grows when it has to.

    Memory is touched only as far as tokens have come, so a generous capacity costs nothing. One that
    is `passing` stays empty, and is as large as a single block needs it.
    """

    def __init__(self, decoder: "Decoder", capacity: int, cache: str, passing: bool) -> None:
        if cache not in CACHE_TYPES:
            raise UserError(f"cache={cache!r}: choose one of {', '.join(CACHE_TYPES)}")
        self.length = 0
        self.cache = cache
        self._decoder = decoder
        self._tensors: dict[str, Tensor] = {}
        self._angles: dict[int, Tensor] = {}  # tables that `struct` points to
        self.struct = library.Memory(type=CACHE_TYPES[cache], passing=passing)
        self.reserve(capacity)

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens."""
        if capacity <= self.struct.capacity:
            return
        capacity = -(-max(capacity, 2 * self.struct.capacity) // PANEL) * PANEL
        dims = self._decoder.dimensions
        heads = (1 if self.struct.passing else len(self._decoder.blocks), dims.kv_heads)
        per = 2 if self.cache == "int4" else 1  # codes in an element
        rows, padded = -(-dims.head_size // per), -(-dims.head_size // (per * PANEL)) * PANEL
        dtype = _CACHE_DTYPES[self.cache]
        fresh = {
            "keys": torch.empty(*heads, capacity // PANEL, rows, PANEL, dtype=dtype),
            "values": torch.empty(*heads, capacity, padded, dtype=dtype),
        }
        if self.cache == "int16":  # pairs of channels, and of positions, side by side
            pairs = -(-dims.head_size // 2)
            fresh["keys"] = torch.empty(*heads, capacity // PANEL, pairs, PANEL, 2, dtype=dtype)
            fresh["values"] = torch.empty(*heads, capacity // 2, padded, 2, dtype=dtype)
        if self.cache in CODED:
            for name in ("key_scales", "value_scales"):
                fresh[name] = torch.empty(*heads, capacity, dtype=CODED[self.cache])
        for name, tensor in fresh.items():
            if name in self._tensors and self.length:
                old = self._tensors[name]
                used = -(-self.length * tensor.shape[2] // capacity)
                tensor[:, :, :used] = old[:, :, :used]
            setattr(self.struct, name, tensor.data_ptr())
        self._tensors = fresh
        self.struct.capacity = capacity

    @property
    def nbytes(self) -> int:
        """Bytes that the tokens remembered so far take."""
        share = self.length / max(self.struct.capacity, 1)
        return int(share * sum(tensor.nbytes for tensor in self._tensors.values()))

    def read(self) -> tuple[Tensor, Tensor]:
        """The keys and the values remembered so far, as attention sees them: float32 [blocks,
        kv_heads, tokens, head_size]."""
        size, length = self._decoder.dimensions.head_size, self.length
        keys, values = self._tensors["keys"], self._tensors["values"]
        if self.cache == "int4":  # pairs of channels; runs of 2 x 16 channels
            keys = _nibbles(keys).movedim(-1, -2).flatten(-3, -2)
            values = (
                _nibbles(values.reshape(*values.shape[:-1], -1, PANEL)).movedim(-1, -2).flatten(-3)
            )
        if self.cache == "int16":
            keys = keys.transpose(-3, -2).flatten(-2).transpose(-2, -1)
            values = values.transpose(-2, -1).flatten(-3, -2)
        found = []
        for name, tensor in (("key", keys.transpose(-2, -1).flatten(2, 3)), ("value", values)):
            codes = tensor[:, :, :length, :size]
            if self.cache not in CODED:
                found.append(codes.float())
                continue
            scales = self._tensors[f"{name}_scales"][:, :, :length, None].float()
            found.append(spec(self.cache).grid.decode(codes.contiguous()) * scales)
        return found[0], found[1]

    def forget(self, length: int = 0) -> None:
        """Go back to the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise UserError(f"cannot go back to {length} tokens: there are {self.length}")
        self.length = length


class Decoder:
    """The forward pass of a model whose blocks are `blocks`.

    angles: of the rotary embedding, see `Angles`; None for a model without.
    changing: whether the angles of a position depend on the length of the sequence (dynamic
        scalings); then they are asked for whenever it grows, for the tokens that came.
    """

    def __init__(
        self,
        dimensions: Dimensions,
        blocks: Sequence[BlockWeights],
        embedding: PackedWeight,
        head: PackedLinear,
        norm: Tensor,
        angles: Angles,
        changing: bool = False,
    ) -> None:
        self.dimensions, self.blocks = dimensions, list(blocks)
        self.embedding, self.head = embedding, head
        self._angles, self._changing = angles, changing
        self._ropes = sorted({block.rope for block in blocks if block.rope >= 0})
        self._tables: dict[int, Tensor] = {}
        self._kept: list[Tensor] = []
        self._structs = (Block * len(self.blocks))(*map(self._block, self.blocks))
        self._model = self._describe(norm)

    @property
    def rounds_inputs(self) -> bool:
        """Whether all layers of its blocks multiply activations that were rounded to integers."""
        inputs = [item.input.struct for block in self.blocks for item in block.linears().values()]
        return all(0 < struct.bits <= 8 for struct in inputs)

    def memory(self, capacity: int = 256, cache: str = "fp16", passing: bool = False) -> Memory:
        """An empty sequence with room for `capacity` tokens; more as it grows.

        cache: what keys and values are kept in: "fp32", "fp16", "bf16", or "int16", "int8", "e4m3"
            and "int4" with one scale for each token and head (`pt_cache_type` of native/posttrain.h
            has the rounding: that of `numbers.quantize`).
        passing: whether each call feeds a whole text, of at most CHUNK tokens, that nothing is to
            follow. Blocks then share the memory of one, which stays in the processor's caches.
        """
        return Memory(self, capacity, cache, passing)

    def rewind(self, memory: Memory, length: int) -> bool:
        """Go back to the first `length` tokens of a sequence; False, and nothing done, where they are
        not remembered as a sequence of no more tokens would, or not by this decoder."""
        if memory._decoder is not self or self._changing:
            return False
        memory.forget(length)
        return True

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, packing included; a tied head counts once."""
        weights = {id(self.embedding): self.embedding, id(self.head.weight): self.head.weight}
        for block in self.blocks:
            weights |= {id(item.weight): item.weight for item in block.linears().values()}
        tensors = {t.data_ptr(): t.nbytes for w in weights.values() for t in w.tensors.values()}
        return sum(tensors.values()) + sum(tensor.nbytes for tensor in self._kept)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the weights that a token meets: all but an embedding that is not the head too, of
        which it takes a row."""
        head = {tensor.data_ptr() for tensor in self.head.weight.tensors.values()}
        tables = [t for t in self.embedding.tensors.values() if t.data_ptr() not in head]
        table = sum(tensor.nbytes for tensor in tables)
        return self.nbytes - table + table // self.dimensions.vocabulary

    def forward(self, feeds: Feeds, keep: int | None = 1) -> Tensor:
        """Feed each sequence its next tokens, whose keys and values it then remembers.

        keep: after how many of the last tokens of each sequence logits are wanted; None: all.

        Returns float32 [sum of kept tokens, vocabulary], sequence by sequence. Raises UserError for
        an empty feed, a sequence fed twice or unknown tokens.
        """
        return self._feed(feeds, keep, hidden=False)

    def hidden(self, feeds: Feeds, keep: int | None = 1) -> Tensor:
        """As `forward`, up to what enters the head: [sum of kept tokens, width]."""
        return self._feed(feeds, keep, hidden=True)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head's float32 [rows, vocabulary] of rows that `hidden` gave."""
        logits = torch.empty(len(hidden), self.dimensions.vocabulary)
        rows = hidden.contiguous()
        status = library.native().pt_head(
            ctypes.byref(self._model), rows.data_ptr(), len(rows), logits.data_ptr()
        )
        library.check(status, f"the head of {len(rows)} rows")
        return logits

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """-log of the probability of int `targets` [rows] after rows that `hidden` gave: float32
        [rows], without all logits ever in memory. Raises UserError for a target that is no token, or
        unless there is one for each row."""
        if len(targets) != len(hidden):
            raise UserError(f"{len(hidden)} rows have {len(targets)} targets: each needs one")
        losses = torch.empty(len(hidden))
        rows, wanted = hidden.contiguous(), targets.int().contiguous()
        status = library.native().pt_losses(
            ctypes.byref(self._model),
            rows.data_ptr(),
            wanted.data_ptr(),
            len(rows),
            losses.data_ptr(),
        )
        library.check(status, f"losses of {len(rows)} rows, targets {list(targets.shape)}")
        return losses

    def step(
        self, feeds: Feeds, samplings: Sequence[Sampling], texts: Sequence[Sequence[int]]
    ) -> list[int]:
        """Feed each sequence its next tokens and draw the one after them, in one native call.

        Python between two tokens costs as much as several blocks of a small model, whose weights
        have driven it out of the caches.

        samplings, texts: of each sequence, how to draw and its text so far, the tokens of `feeds`
            included.

        Raises UserError as `forward` does, and for logits that are not numbers.
        """
        if sum(len(ids) for _, ids in feeds) > CHUNK:
            rows = zip(samplings, self.forward(feeds), texts, strict=True)
            return [sampling.draw(logits, text) for sampling, logits, text in rows]
        self._begin(feeds)
        how = [sampling.struct(text) for sampling, text in zip(samplings, texts, strict=True)]
        draws, tokens = (library.Draw * len(how))(*how), (ctypes.c_int32 * len(how))()
        self._call(feeds, library.native().pt_step, draws, ctypes.addressof(tokens))
        return [drawn(token) for token in tokens]

    def _begin(self, feeds: Feeds) -> None:
        """Make room for the next tokens of sequences, and point to the angles of all of them."""
        self._check(feeds)
        for memory, ids in feeds:
            stop = memory.length + len(ids)
            memory.reserve(stop)
            self._point_at_angles(memory, stop)

    def _check(self, feeds: Feeds) -> None:
        last = self.dimensions.vocabulary - 1
        for memory, ids in feeds:
            if len(ids) == 0:
                raise UserError("a sequence has no tokens to feed")
            for token in (min(ids), max(ids)):
                if not 0 <= token <= last:
                    raise UserError(f"token ids must be from 0 to {last}; found {token}")
            if memory._decoder is not self:
                raise UserError("this memory belongs to another decoder")
            if memory.struct.passing and sum(len(part) for _, part in feeds) > CHUNK:
                raise UserError(f"a passing memory takes texts of at most {CHUNK} tokens in all")
        if len({id(memory) for memory, _ in feeds}) < len(feeds):
            raise UserError("a sequence can be fed once in a call")

    def _feed(self, feeds: Feeds, keep: int | None, hidden: bool) -> Tensor:
        self._begin(feeds)
        kept = [len(ids) if keep is None else min(keep, len(ids)) for _, ids in feeds]
        if sum(len(ids) for _, ids in feeds) <= CHUNK:
            return self._forward(feeds, kept, hidden)
        rows = []  # one long sequence after the other
        for (memory, ids), wanted in zip(feeds, kept, strict=True):
            for start in range(0, len(ids), CHUNK):
                part = ids[start : start + CHUNK]
                after = len(ids) - start - len(part)  # tokens that come later
                some = min(max(wanted - after, 0), len(part))
                rows.append(self._forward([(memory, part)], [some], hidden))
        return torch.cat(rows)

    def _forward(self, feeds: Feeds, kept: Sequence[int], hidden: bool) -> Tensor:
        wanted, end = array("i"), 0
        for (_, part), count in zip(feeds, kept, strict=True):
            end += len(part)
            wanted.extend(range(end - count, end))
        out = torch.empty(
            len(wanted), self.dimensions.width if hidden else self.dimensions.vocabulary
        )
        place = out.data_ptr()
        self._call(
            feeds, library.native().pt_forward,
            wanted.buffer_info()[0], len(wanted), place if hidden else None, place,
        )  # fmt: skip
        return out

    def _call(self, feeds: Feeds, function: Callable[..., int], *arguments: Any) -> None:
        """A native function of the next tokens of sequences, which then remember them."""
        ids = array("i")
        for memory, part in feeds:
            ids.extend(part)
            memory.struct.length, memory.struct.tokens = memory.length, len(part)
        memories = (library.Memory * len(feeds))(*(memory.struct for memory, _ in feeds))
        status = function(
            ctypes.byref(self._model), memories, len(feeds), ids.buffer_info()[0], *arguments
        )
        library.check(status, f"a pass over {len(ids)} tokens")
        for memory, part in feeds:
            memory.length += 0 if memory.struct.passing else len(part)

    def _point_at_angles(self, memory: Memory, stop: int) -> None:
        start = memory.length
        for rope in self._ropes:
            if self._changing:
                table = torch.empty(memory.struct.capacity, self.dimensions.rotary)
                table[start:stop] = self._angles(rope, start, stop)
            else:
                known = self._tables.get(rope)
                if known is None or len(known) < stop:
                    length = max(0 if known is None else 2 * len(known), -(-stop // CHUNK) * CHUNK)
                    known = self._angles(rope, 0, length).to(torch.float32).contiguous()
                    self._tables[rope] = known
                table = known
            if memory._angles.get(rope) is not table:
                memory._angles[rope] = table
                memory.struct.angles[rope] = table.data_ptr()

    def _keep(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self._kept.append(tensor.detach().to(torch.float32).contiguous())
        return self._kept[-1].data_ptr()

    def _block(self, block: BlockWeights) -> Block:
        made = Block(window=block.window, rope=block.rope)
        for name, item in block.linears().items():
            setattr(made, name, ctypes.pointer(item.weight.struct))
        for name in ("attention_norm", "attention_out_norm", "mlp_norm", "mlp_out_norm"):
            setattr(made, name, self._keep(getattr(block, name)))
        made.q_norm, made.k_norm = self._keep(block.q_norm), self._keep(block.k_norm)
        shared = {
            "qkv_input": (block.q, block.k, block.v),
            "o_input": (block.o,),
            "mlp_input": (block.gate, block.up),
            "down_input": (block.down,),
        }
        for name, layers in shared.items():
            setattr(made, name, _one_input(name, layers))
        return made

    def _describe(self, norm: Tensor) -> Model:
        values = {
            item.name: getattr(self.dimensions, item.name) for item in fields(self.dimensions)
        }
        values["activation"] = ACTIVATIONS[self.dimensions.activation]
        return Model(
            **values,
            blocks=len(self.blocks),
            block=ctypes.cast(self._structs, ctypes.POINTER(Block)),
            norm=self._keep(norm),
            embedding=_pointer(self.embedding),
            head=_pointer(self.head.weight),
            head_input=_one_input("head_input", (self.head,)),
        )


def _nibbles(packed: Tensor) -> Tensor:
    """int8 [..., 2]: the lower and the upper nibble of every byte, signed."""
    both = torch.stack([packed & 15, packed >> 4], dim=-1).to(torch.int8)
    return (both ^ 8) - 8


def _pointer(weight: PackedWeight) -> "ctypes._Pointer[Weight]":
    return ctypes.pointer(weight.struct)


def _one_input(name: str, layers: Sequence[PackedLinear]) -> library.Input:
    """The input format that these layers share."""
    for layer in layers:
        if layer.input.spec is not None:
            raise UserError(
                f"{name}: the kernels cannot quantize activations to {layer.input.spec}"
            )
        if bytes(layer.input.struct) != bytes(layers[0].input.struct):
            raise UserError(f"{name}: layers that share their input quantize it in different ways")
    return layers[0].input.struct
