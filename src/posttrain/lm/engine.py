"""Run a loaded model: on the native decoder where it knows the architecture, else in PyTorch.

Both engines offer the same: sessions that are fed tokens and remember them, several at once, and
give logits in float32, or draw the next token. `engine(model)` chooses; what it made is kept as long as the model is, and
made anew when the model's weights have changed.
"""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from posttrain import kernels
from posttrain.kernels import Decoder, Memory, Sampling
from posttrain.models.decoding import decoder, no_decoder
from posttrain.models.direct import DirectModel
from posttrain.models.linear import QuantLinear, on_kernels

Tokens = Sequence[int]

AT_ONCE = 8  # sequences generated side by side


class Engine(Protocol):
    """A model that can be fed."""

    @property
    def name(self) -> str:
        """What computes: an instruction set, or "torch"."""

    def session(self, capacity: int = 256, cache: str = "fp16") -> Any:
        """An empty sequence; `capacity` is a hint, `cache` the format of keys and values where the
        engine has a choice."""

    def forward(self, feeds: Sequence[tuple[Any, Tokens]], keep: int | None = 1) -> Tensor:
        """Feed sessions; float32 logits [kept tokens, vocabulary] after the last `keep` tokens of
        each (None: all), session by session."""

    def step(
        self,
        feeds: Sequence[tuple[Any, Tokens]],
        samplings: Sequence[Sampling],
        texts: Sequence[Tokens],
    ) -> list[int]:
        """Feed sessions and draw a token after each, whose text so far `texts` holds."""

    def window_logits(self, windows: Tensor, count: int, rows: int) -> Iterator[Tensor]:
        """Logits of the last `count` positions but one of each of `windows` [batch, window], in
        parts of at most `rows` rows: all of them at once would take more time to write than to
        compute."""


class NativeEngine:
    """The native decoder of a model."""

    def __init__(self, native: Decoder) -> None:
        self.decoder = native

    @property
    def name(self) -> str:
        return kernels.isa()

    def session(self, capacity: int = 256, cache: str = "fp16") -> Memory:
        return self.decoder.memory(capacity, cache)

    def forward(self, feeds: Sequence[tuple[Memory, Tokens]], keep: int | None = 1) -> Tensor:
        return self.decoder.forward(feeds, keep)

    def step(
        self,
        feeds: Sequence[tuple[Memory, Tokens]],
        samplings: Sequence[Sampling],
        texts: Sequence[Tokens],
    ) -> list[int]:
        return self.decoder.step(feeds, samplings, texts)

    def window_logits(self, windows: Tensor, count: int, rows: int) -> Iterator[Tensor]:
        for window in windows:
            session = self.session(len(window), "fp32")
            hidden = self.decoder.hidden([(session, window.tolist())], count)[:-1]
            yield from map(self.decoder.logits, hidden.split(rows))


class TorchSession:
    """A transformers cache, and how many tokens went into it."""

    def __init__(self, config: Any) -> None:
        from transformers import DynamicCache

        self.cache = DynamicCache(config=config)
        self.length = 0


class TorchEngine:
    """The model's own forward, one session after the other; in `forward`, quantized layers are
    multiplied on the kernels where there are any, unless `kernels` is False."""

    name = "torch"

    def __init__(self, model: Any, kernels: bool = True) -> None:
        self.model = model
        self._layers = [m for m in model.modules() if kernels and type(m) is QuantLinear]

    def session(self, capacity: int = 256, cache: str = "fp16") -> TorchSession:
        return TorchSession(self.model.config)

    @torch.inference_mode()
    def forward(self, feeds: Sequence[tuple[TorchSession, Tokens]], keep: int | None = 1) -> Tensor:
        rows = []
        for session, ids in feeds:
            wanted = len(ids) if keep is None else min(keep, len(ids))
            tokens = torch.tensor([list(ids)], device=self.model.device)
            with on_kernels(self._layers):
                logits = last_logits(
                    self.model, tokens, wanted, past_key_values=session.cache, use_cache=True
                )
            session.length += len(ids)
            rows.append(logits[0].float().cpu())
        return torch.cat(rows)

    def step(
        self,
        feeds: Sequence[tuple[TorchSession, Tokens]],
        samplings: Sequence[Sampling],
        texts: Sequence[Tokens],
    ) -> list[int]:
        rows = zip(samplings, self.forward(feeds), texts, strict=True)
        return [sampling.draw(logits, text) for sampling, logits, text in rows]

    def window_logits(self, windows: Tensor, count: int, rows: int) -> Iterator[Tensor]:
        logits = last_logits(self.model, windows, count, use_cache=False)[:, :-1]
        for window in logits:
            yield from (part.float() for part in window.split(rows))


def last_logits(model: Any, ids: Tensor, count: int, **options: Any) -> Tensor:
    """Logits [batch, count, vocabulary] by the model's own forward, at the last `count` positions
    of `ids` [batch, tokens]; the head runs on those alone where the model can do so."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = max(count, 1)
    logits: Tensor = model(input_ids=ids, **options).logits
    return logits[:, logits.shape[1] - count :]


_made: "WeakKeyDictionary[Any, tuple[Any, NativeEngine]]" = WeakKeyDictionary()


def engine(model: Any) -> Engine:
    """The engine to run `model` on. The first call on a quantized model repacks its codes."""
    if isinstance(model, DirectModel):
        return NativeEngine(model.decoder)
    if no_decoder(model) is not None:
        return TorchEngine(model)
    kept = _made.get(model)
    if kept is not None and kept[0] == _state(model):
        return kept[1]
    made = NativeEngine(decoder(model))
    _made[model] = _state(model), made
    return made


def scoring_engine(model: Any) -> Engine:
    """The engine to score `model` with: the native decoder, which computes in float32, only where
    that is what the model itself computes in."""
    return engine(model) if model.dtype == torch.float32 else TorchEngine(model)


def _state(model: Any) -> Any:
    """Changes whenever a weight does."""
    tensors = [*model.parameters(), *model.buffers()]
    return tuple((id(tensor), tensor.data_ptr(), _version(tensor)) for tensor in tensors)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def continuations(
    runner: Engine,
    prompts: Sequence[Tokens],
    samplings: Sequence[Sampling],
    at_once: int = AT_ONCE,
    capacity: int = 256,
) -> Iterator[tuple[int, int, Any]]:
    """Token after token of the continuations of all prompts: (prompt, token, stop).

    Up to `at_once` prompts are under way together; a prompt that ends makes room for the next in
    the same step (continuous batching). `stop` is called to end the continuation of that prompt.
    A token depends on its own prompt and seed alone, whatever is beside it.
    """
    waiting = list(range(len(prompts)))[::-1]
    running: dict[int, tuple[Any, list[int], list[int]]] = {}  # session, text, tokens to feed

    def stop(index: int) -> Any:
        return lambda: running.pop(index, None)

    while waiting or running:
        while waiting and len(running) < at_once:
            index = waiting.pop()
            room = len(prompts[index]) + capacity
            running[index] = runner.session(room), list(prompts[index]), list(prompts[index])
        indices = list(running)
        tokens = runner.step(
            [(running[i][0], running[i][2]) for i in indices],
            [samplings[i] for i in indices],
            [running[i][1] for i in indices],
        )
        for index, token in zip(indices, tokens, strict=True):
            session, text, _ = running[index]
            text.append(token)
            running[index] = session, text, [token]
            yield index, token, stop(index)
