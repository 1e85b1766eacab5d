"""Run a loaded model: on the native decoder where it knows the architecture, else in PyTorch.

Both engines offer the same: sessions that are fed tokens and remember them, several at once, and
give logits in float32, or draw the next token. `engine(model)` chooses; what it made is kept as long as
the model is, and made anew when the model's weights have changed.

Keys and values are kept in the format `kv` (see `models.kv`) that was asked for, or that the model's
config names. The native decoder keeps them packed where it knows the format; PyTorch rounds to any.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from posttrain import kernels
from posttrain.errors import UserError
from posttrain.kernels import Decoder, Memory, Sampling
from posttrain.kernels.decoder import CHUNK
from posttrain.models.decoding import CACHES, decoder, no_cache, no_decoder
from posttrain.models.direct import DirectModel
from posttrain.models.kv import parse_kv, stored_kv
from posttrain.models.linear import QuantLinear, on_kernels
from posttrain.numbers import Spec, spec

Tokens = Sequence[int]

AT_ONCE = 8  # sequences generated side by side
ROOM = 4096  # tokens that memory is reserved for before there are any; more when they come
WIDE = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Engine(Protocol):
    """A model that can be fed. `kv`: the format that keys and values are kept in, or None for what
    suits the engine."""

    kv: Spec | None

    @property
    def name(self) -> str:
        """What computes: an instruction set, or "torch"."""

    def keeps(self, scoring: bool = False) -> Spec:
        """What keys and values are kept in, when generating or when scoring."""

    def session(self, capacity: int = 256, cache: str | None = None) -> Any:
        """An empty sequence; `capacity` is a hint, `cache` what keys and values are kept in where
        `kv` does not say and the engine has a choice; None is what it `keeps`."""

    def rewind(self, session: Any, length: int) -> bool:
        """Go back to the first `length` tokens of a session, as if no others had been fed; False
        where that cannot be."""

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

    def window_losses(self, windows: Tensor, count: int, rows: int) -> Tensor:
        """-log of the probability of the last `count` - 1 tokens of each of `windows` [batch,
        window]: float32 [batch * (count - 1)]. `rows` as in `window_logits`, where logits are
        written at all."""


class NativeEngine:
    """The native decoder of a model. Raises UserError for a `kv` that it cannot keep."""

    def __init__(self, native: Decoder, kv: Spec | None = None) -> None:
        reason = no_cache(kv)
        if reason is not None:
            raise UserError(reason)
        self.decoder, self.kv = native, kv

    @property
    def name(self) -> str:
        return kernels.isa()

    def keeps(self, scoring: bool = False) -> Spec:
        if self.kv is not None:
            return self.kv
        if self.decoder.rounds_inputs:
            return parse_kv("int16")
        return spec("fp32" if scoring else "fp16")

    def session(
        self, capacity: int = 256, cache: str | None = None, passing: bool = False
    ) -> Memory:
        kept = cache if cache and self.kv is None else CACHES[str(self.keeps())]
        return self.decoder.memory(capacity, kept, passing)

    def rewind(self, session: Memory, length: int) -> bool:
        return self.decoder.rewind(session, length)

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
        for hidden in self._window_hidden(windows, count):
            yield from map(self.decoder.logits, hidden.split(rows))

    def window_losses(self, windows: Tensor, count: int, rows: int) -> Tensor:
        targets = windows[:, windows.shape[1] - count + 1 :]
        hidden = self._window_hidden(windows, count)
        return torch.cat([self.decoder.losses(*rows) for rows in zip(hidden, targets, strict=True)])

    def _window_hidden(self, windows: Tensor, count: int) -> Iterator[Tensor]:
        """What the head makes the logits of `window_logits` from, window by window."""
        length = windows.shape[1]
        kept = CACHES[str(self.keeps(scoring=True))]
        session = self.session(length, kept, passing=length <= CHUNK)
        for window in windows:
            session.forget()
            yield self.decoder.hidden([(session, window.tolist())], count)[:-1]


class TorchSession:
    """A transformers cache, and how many tokens went into it."""

    def __init__(self, config: Any, kv: Spec | None = None) -> None:
        self.cache = new_cache(config, kv)
        self.length = 0


def new_cache(config: Any, kv: Spec | None) -> Any:
    """An empty transformers cache that keeps keys and values in `kv` (None: as they are)."""
    if kv is None:
        from transformers import DynamicCache

        return DynamicCache(config=config)
    from posttrain.lm.rounded import RoundedCache

    return RoundedCache(config, kv)


class TorchEngine:
    """The model's own forward, one session after the other; in `forward`, quantized layers are
    multiplied on the kernels where there are any, unless `kernels` is False."""

    name = "torch"

    def __init__(self, model: Any, kernels: bool = True, kv: Spec | None = None) -> None:
        self.model, self.kv = model, kv
        self._layers = [m for m in model.modules() if kernels and type(m) is QuantLinear]

    def keeps(self, scoring: bool = False) -> Spec:
        return self.kv or spec(WIDE.get(self.model.dtype, "fp32"))

    def session(self, capacity: int = 256, cache: str | None = None) -> TorchSession:
        return TorchSession(self.model.config, self.kv)

    def rewind(self, session: TorchSession, length: int) -> bool:
        return False  # of windows, transformers keeps no more than the last

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
            if self.kv is not None:
                session.cache.check_used(self.model)
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
        options: dict[str, Any] = {"use_cache": False}
        if self.kv is not None:  # attention sees what came back from the cache
            cache = new_cache(self.model.config, self.kv)
            options = {"use_cache": True, "past_key_values": cache}
        logits = last_logits(self.model, windows, count, **options)[:, :-1]
        if self.kv is not None:
            cache.check_used(self.model)
        for window in logits:
            yield from (part.float() for part in window.split(rows))

    def window_losses(self, windows: Tensor, count: int, rows: int) -> Tensor:
        return losses_of(self.window_logits(windows, count, rows), windows, count, rows)


def losses_of(logits: Iterator[Tensor], windows: Tensor, count: int, rows: int) -> Tensor:
    """`Engine.window_losses` from what `Engine.window_logits` gives."""
    targets = windows[:, windows.shape[1] - count + 1 :]
    wanted = [part for window in targets for part in window.split(rows)]
    losses = [
        kernels.log_partition(part) - part.gather(-1, tokens[:, None])[:, 0]
        for part, tokens in zip(logits, wanted, strict=True)
    ]
    return torch.cat(losses)


def last_logits(model: Any, ids: Tensor, count: int, **options: Any) -> Tensor:
    """Logits [batch, count, vocabulary] by the model's own forward, at the last `count` positions
    of `ids` [batch, tokens]; the head runs on those alone where the model can do so."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = max(count, 1)
    logits: Tensor = model(input_ids=ids, **options).logits
    return logits[:, logits.shape[1] - count :]


_made: "WeakKeyDictionary[Any, tuple[Any, dict[str, NativeEngine]]]" = WeakKeyDictionary()


def engine(model: Any, kv: str | Spec | None = None) -> Engine:
    """The engine to run `model` on. The first call on a quantized model repacks its codes.

    kv: what keys and values are kept in (see `models.kv`); None is what the model's config says, or
        the engine's own choice. A format that no kernel keeps means PyTorch (see `why_torch`).
    """
    wanted = _format(model, kv)
    if isinstance(model, DirectModel):
        return NativeEngine(model.decoder, wanted)
    if no_decoder(model) is not None or no_cache(wanted) is not None:
        return TorchEngine(model, kv=wanted)
    state, by_format = _state(model), str(wanted)
    kept = _made.get(model)
    if kept is None or kept[0] != state:
        kept = _made[model] = state, {by_format: NativeEngine(decoder(model), wanted)}
    engines = kept[1]
    if by_format not in engines:  # the same decoder, whatever it keeps
        engines[by_format] = NativeEngine(next(iter(engines.values())).decoder, wanted)
    return engines[by_format]


def scoring_engine(model: Any, kv: str | Spec | None = None) -> Engine:
    """The engine to score `model` with: the native decoder, which computes in float32, only where
    that is what the model itself computes in."""
    if model.dtype == torch.float32:
        return engine(model, kv)
    return TorchEngine(model, kv=_format(model, kv))


def why_torch(model: Any, kv: str | Spec | None = None) -> str | None:
    """Why the format of keys and values keeps `model` from the native decoder, which knows it
    otherwise; None where it does not."""
    reason = no_cache(_format(model, kv))
    if reason is None or (not isinstance(model, DirectModel) and no_decoder(model) is not None):
        return None
    return f"{reason}, so PyTorch computes, which is slower"


def _format(model: Any, kv: str | Spec | None) -> Spec | None:
    return stored_kv(model.config) if kv is None else parse_kv(kv)


def _state(model: Any) -> Any:
    """Changes whenever a weight does."""
    tensors = [*model.parameters(), *model.buffers()]
    return tuple((id(tensor), tensor.data_ptr(), _version(tensor)) for tensor in tensors)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


@dataclass(eq=False)
class Held:
    """The tokens of a text and what was computed of them, for a text that begins alike."""

    session: Any = None
    tokens: list[int] = field(default_factory=list)

    def take(self, runner: Engine, prompt: Tokens, room: int) -> Any:
        """A session that holds as much of `prompt` but its last token as is known. It is no longer
        held: what is interrupted leaves nothing behind."""
        session, self.session = self.session, None
        pairs = zip(self.tokens, prompt[:-1], strict=False)
        common = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if common is None:
            common = min(len(self.tokens), len(prompt) - 1)
        if session is None or not runner.rewind(session, common):
            return runner.session(room)
        return session

    def keep(self, session: Any, text: Tokens) -> None:
        self.session, self.tokens = session, list(text[: session.length])


def continuations(
    runner: Engine,
    prompts: Sequence[Tokens],
    samplings: Sequence[Sampling],
    at_once: int = AT_ONCE,
    capacity: int = 256,
    held: Held | None = None,
) -> Iterator[tuple[int, int, Any]]:
    """Token after token of the continuations of all prompts: (prompt, token, stop).

    Up to `at_once` prompts are under way together; a prompt that ends makes room for the next in
    the same step (continuous batching). `stop` is called to end the continuation of that prompt.
    A token depends on its own prompt and seed alone, whatever is beside it. `held` is of an earlier
    text, and in the end of the first prompt and its continuation.
    """
    waiting = list(range(len(prompts)))[::-1]
    running: dict[int, tuple[Any, list[int], list[int]]] = {}  # session, text, tokens to feed

    def stop(index: int) -> Any:
        return lambda: running.pop(index, None)

    while waiting or running:
        while waiting and len(running) < at_once:
            index = waiting.pop()
            text, room = list(prompts[index]), len(prompts[index]) + min(capacity, ROOM)
            if held is None or index > 0:
                running[index] = runner.session(room), text, text[:]
                continue
            session = held.take(runner, text, room)
            running[index] = first = session, text, text[session.length :]
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
    if held is not None and prompts:
        held.keep(*first[:2])
