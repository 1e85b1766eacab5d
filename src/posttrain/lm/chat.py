"""A conversation with a model, and its shortest form: one question, one answer."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain import kernels
from posttrain.errors import UserError
from posttrain.lm.context import beyond_context
from posttrain.lm.engine import Held, engine, why_torch
from posttrain.lm.local import Messages, generate
from posttrain.models.decoding import no_cache
from posttrain.models.direct import open_direct
from posttrain.models.kv import describe_kv, parse_kv, stored_kv
from posttrain.numbers import Spec
from posttrain.quick import complete_torch

Stream = Callable[[str], Any]

MEMORY_SHARE = 0.5  # of the free memory that expanded weights may take


class Conversation:
    """Chat messages with a model; every question carries the history before it, of which nothing is
    computed twice where the engine can hold it.

    `model` is a path or name, or a loaded model. Here it only generates where its files can be read
    without transformers (`models.direct`), else it is the transformers model. `kv` is what keys and
    values are kept in (see `engine`).
    """

    def __init__(self, model: Any, *, system: str | None = None, kv: str | None = None) -> None:
        self.kv = None if kv is None else parse_kv(kv)
        self.model = _open(model, self.kv)
        self._system: Messages = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages: Messages = list(self._system)
        self._held = Held()

    def say(self, text: str, *, stream: Stream | None = None, **sampling: Any) -> str:
        """The model's answer to `text`; `sampling` are the options of `generate`.

        Where no answer comes (an error, an interruption) the history stays as it was.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        answer = generate(
            self.model,
            self.model.tokenizer,
            asked,
            kv=self.kv,
            stream=stream,
            held=self._held,
            **sampling,
        )
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        return answer

    def facts(self) -> dict[str, Any]:
        """What computes, what keys and values are kept in, and what to know of that."""
        runner = engine(self.model, self.kv)
        beyond = beyond_context(self.model, len(self._held.tokens), "conversation")
        return {
            "implementation": runner.name,
            **describe_kv(runner.keeps(), self.model.config),
            "notes": [note for note in (why_torch(self.model, self.kv), beyond) if note],
        }


def _open(model: Any, kv: Spec | None) -> Any:
    """The model, ready to answer. Where PyTorch has to run it, its weights are expanded if memory
    allows: expanding them again for every token costs far more than the token itself."""
    if not isinstance(model, (str, Path)):
        if getattr(model, "tokenizer", None) is None:
            raise UserError("a loaded model needs its tokenizer: load it with posttrain.load")
        return model
    direct = open_direct(model)
    if direct is not None and no_cache(kv or stored_kv(direct.config)) is None:
        return direct
    complete_torch()
    import psutil

    from posttrain.models.load import load, set_resident

    loaded = load(model)
    needed = loaded.posttrain["parameters"] * loaded.dtype.itemsize
    if kernels.available() and why_torch(loaded, kv) is None:
        set_resident(loaded, "native")
    elif needed < MEMORY_SHARE * psutil.virtual_memory().available:
        set_resident(loaded, "dequantized")
    return loaded


def chat(
    model: Any,
    *,
    prompt: str,
    system: str | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    kv: str | None = None,
    stream: Stream | None = None,
) -> dict[str, Any]:
    """Ask `model` one thing.

    Args:
        model: directory, hub id, GGUF file or "demo"; or a loaded model.
        prompt: what the user says.
        system: instructions put before it.
        temperature: 0 is greedy, whatever the options of sampling are; higher is more random.
        top_k: sample among this many likeliest tokens; 0 is all.
        top_p: sample among the likeliest tokens that together have this probability, (0, 1].
        min_p: leave out tokens less than this many times as likely as the likeliest, [0, 1].
        repetition_penalty: above 1 makes tokens that occurred less likely.
        max_new_tokens: longest answer, in tokens.
        seed: of the sampling.
        kv: what keys and values are kept in: int8, fp8, int4, int16 (one scale for each token and
            head), fp16, fp32, or any number format of rows; None: what the model says, else int16 where
            its activations are integers, fp16 elsewhere.
        stream: called with each new piece of the answer.

    Returns:
        `{"model", "prompt", "answer", "seconds"}`; the seconds are of the answer, not of loading.
        Then `implementation`, `kv` (the format of the cache), `kv_bits_per_value` (scales included),
        `kv_bytes_per_token` (of context) and `notes`.

    Raises:
        UserError: no such model or format, or a model without a chat template.
    """
    talk = Conversation(model, system=system, kv=kv)
    started = time.monotonic()
    answer = talk.say(
        prompt,
        stream=stream,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    seconds = time.monotonic() - started
    name = model if isinstance(model, (str, Path)) else model.config.name_or_path
    found = {"model": str(name), "prompt": prompt, "answer": answer, "seconds": seconds}
    facts = talk.facts()
    facts["notes"] += unused(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    return found | facts


def unused(*, temperature: float, top_k: int, top_p: float, min_p: float, **_: Any) -> list[str]:
    """A sentence about options of sampling that change nothing."""
    given = {"top_k": top_k, "top_p": top_p % 1, "min_p": min_p}
    names = [name for name, value in given.items() if value]
    if temperature or not names:
        return []
    return [f"{', '.join(names)} without a temperature: the likeliest token is taken all the same"]
