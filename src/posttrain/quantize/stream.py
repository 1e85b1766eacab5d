"""One decoder block in memory at a time: load it from the source, run it, let it go."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from posttrain.errors import UserError
from posttrain.models.source import Source
from posttrain.models.walk import assign, decoder_blocks, skeleton
from posttrain.quantize.activations import ActivationStore

COMPUTE_DTYPE = torch.float32
_Call = tuple[tuple[Any, ...], dict[str, Any]]


class BlockStream:
    """A model on the meta device whose decoder blocks come and go.

    Attributes:
        blocks: (name, module) of every decoder block, in order.
        outside: names of the tensors that belong to no block (embeddings, final norm, head).
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.model: Any = skeleton(source.config)
        self.blocks = decoder_blocks(self.model)
        prefixes = tuple(f"{name}." for name, _ in self.blocks)
        names = source.tensor_names()
        self.outside = [name for name in names if not name.startswith(prefixes)]
        self._inside = {
            name: [tensor for tensor in names if tensor.startswith(f"{name}.")]
            for name, _ in self.blocks
        }
        self._call: dict[int, list[_Call]] = {}  # by batch size, then block

    def tensors(self, block: str) -> list[str]:
        """Names of the tensors of one block."""
        return self._inside[block]

    @contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with its weights in float32; back on the meta device afterwards."""
        name, block = self.blocks[index]
        for tensor in self._inside[name]:
            assign(self.model, "", self.source.read([tensor]), COMPUTE_DTYPE)
        try:
            yield block
        finally:
            block.to("meta")

    @torch.no_grad()
    def embed(self, windows: torch.Tensor, batch: int, store: ActivationStore | None) -> None:
        """Learn how blocks are called with `batch` samples, with the rest that is left over and
        with one, and fill `store` with the first block's inputs.

        Args:
            windows: token ids [samples, window].
            batch: samples per forward.
            store: None when the inputs are there already (a resumed run).
        """
        head = self.model.get_output_embeddings()
        needed = [name for name in self.outside if _module_of(self.model, name) is not head]
        for name in needed:
            assign(self.model, "", self.source.read([name]), COMPUTE_DTYPE)
        for start in range(0, len(windows), batch):
            tokens = windows[start : start + batch]
            if store is not None:
                store.put(start, self._record(tokens))
            elif len(tokens) not in self._call:
                self._record(tokens)
        if 1 not in self._call:
            self._record(windows[:1])
        if store is not None:
            store.advance()
        for name in needed:
            _module_of(self.model, name).to("meta")

    def _record(self, tokens: torch.Tensor) -> torch.Tensor:
        """First block's inputs for `tokens` [batch, window]; remembers how blocks are called."""
        for as_tuple in (False, True):
            recorder = _Recorder(as_tuple)
            if recorder.run(self.model, [block for _, block in self.blocks], tokens):
                if len(tokens) not in self._call:
                    probe = _Recorder(as_tuple)  # other tokens, however few batches there are
                    probe.run(self.model, [block for _, block in self.blocks], tokens.flip(1))
                    self._call[len(tokens)] = probe.calls
                self._check_calls(recorder.calls, self._call[len(tokens)])
                self._call[len(tokens)] = recorder.calls
                return recorder.hidden
        raise UserError(
            f"cannot stream {type(self.model).__name__} block by block: its blocks change the "
            "shape of the hidden states; --solver rtn --transform none needs no text to run through it"
        )

    def _check_calls(self, calls: list[_Call], others: list[_Call]) -> None:
        """UserError unless blocks are called alike whatever the tokens are: all windows are run with
        what those of one batch were called with."""
        compared: set[tuple[int, int]] = set()  # most blocks are handed the very same tensors
        for (_, block), call, other in zip(self.blocks, calls, others, strict=True):
            before = _tensors(block, other)
            for name, tensor in _tensors(block, call).items():
                old = before.get(name, tensor)
                pair = (id(tensor), id(old))
                if pair not in compared and not torch.equal(tensor, old):
                    raise UserError(
                        f"cannot stream {type(self.model).__name__} block by block: its blocks are "
                        f"given {name}, which depends on the tokens; --solver rtn --transform none "
                        "needs no text to run through it"
                    )
                compared.add(pair)

    @torch.no_grad()
    def run(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Output of block `index` (loaded) for inputs `hidden` [batch, window, hidden]."""
        return self.forward(index, hidden)

    def forward(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """`run`, with gradients where they are enabled."""
        args, kwargs = self._call[hidden.shape[0]][index]
        output = self.blocks[index][1](hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


class _Recorder:
    """Runs a model whose blocks pass their input through and note what they were called with.

    Some model families take a tensor from a block, others a tuple led by one; `as_tuple` says
    which to hand back, and `run` tells whether the model accepted it.
    """

    def __init__(self, as_tuple: bool) -> None:
        self.as_tuple = as_tuple
        self.calls: list[_Call] = []
        self.hidden = torch.empty(0)
        self._uniform = True

    def run(self, model: Any, blocks: list[nn.Module], tokens: torch.Tensor) -> bool:
        originals = [block.forward for block in blocks]
        for block in blocks:
            block.forward = self._forward
        base = getattr(model, model.base_model_prefix, model)
        try:
            base(input_ids=tokens, use_cache=False)
        except (RuntimeError, IndexError, ValueError, AttributeError):
            if not self.calls or self._uniform and len(self.calls) == len(blocks):
                raise
            return False
        finally:
            for block, forward in zip(blocks, originals, strict=True):
                block.forward = forward
        return self._uniform and len(self.calls) == len(blocks)

    def _forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.calls:
            self.hidden = hidden_states
        self._uniform &= hidden_states.shape == self.hidden.shape
        self.calls.append((args, kwargs))
        return (hidden_states,) if self.as_tuple else hidden_states


def _tensors(block: nn.Module, call: _Call) -> dict[str, torch.Tensor]:
    """The tensors among the arguments of a block but the first, also in tuples, by name."""
    args, kwargs = call
    positional = list(inspect.signature(type(block).forward).parameters)[2:]  # past self and hidden
    positional += [f"argument {i}" for i in range(len(positional) + 1, len(args) + 1)]
    found: dict[str, torch.Tensor] = {}
    for name, value in (*zip(positional, args, strict=False), *kwargs.items()):
        parts = value if isinstance(value, (tuple, list)) else [value]
        for i, part in enumerate(parts):
            if isinstance(part, torch.Tensor) and not part.is_meta:
                found[name if part is value else f"{name}[{i}]"] = part
    return found


def _module_of(model: nn.Module, tensor: str) -> nn.Module:
    return model.get_submodule(tensor.rpartition(".")[0])
