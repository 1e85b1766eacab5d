"""Generate text with a model in this process.

The loop is our own and not ``transformers``' ``generate``: it runs on the native decoder where
that knows the model, and the same seed gives the same text whatever else the program does.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import index
from pathlib import Path
from types import MethodType
from typing import Any

import torch

from posttrain.errors import UserError
from posttrain.kernels import Sampling
from posttrain.lm.context import beyond_context
from posttrain.lm.engine import AT_ONCE, Held, continuations, engine
from posttrain.lm.tokens import generate_tokens, is_text
from posttrain.numbers import Spec

Messages = list[dict[str, str]]
Prompt = str | Messages

# Tokens by which chat templates end a turn; some checkpoints forget to name theirs as EOS.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|eot|>")

CONTEXT = 8  # tokens before others that the text of these is decoded behind
SETTLED = 64  # tokens after which what is streamed is not decoded anew


def load(model: str | Path, *, dtype: str | torch.dtype = "auto", resident: str = "packed") -> Any:
    """Load a model for inference.

    model: a directory, hub id, .gguf file or "demo"; quantized or not.
    dtype: what `forward` computes in: "auto" (what config.json says), "float32", "bfloat16" or
        "float16".
    resident: how `forward` uses quantized weights: "packed" keeps them packed and expands them for
        every product; "dequantized" also keeps them expanded after their first use (the same
        results bit for bit); "native" multiplies on the native kernels (fastest; results differ by
        float32 rounding).

    Returns the transformers model in eval mode, with `.tokenizer` and `.posttrain`, a dictionary
    of `source`, `format`, `implementation`, `dtype`, `expanded_from` and `notes` (see `Source`),
    `parameters`, `bits_per_weight`, `bytes` and `bytes_quantized` (see `model_size`). Its
    `.generate` takes text or chat messages and runs on the native decoder (see `generate_with`).
    Raises UserError for anything wrong with the files.
    """
    from posttrain.models import load as models  # imports much that `generate` need not

    loaded = models.load(model, dtype=dtype, resident=resident)
    loaded.generate = MethodType(generate_with, loaded)
    return loaded


def generate_with(self: Any, inputs: Any = None, **options: Any) -> Any:
    """`.generate` of a loaded model.

    inputs: a string or chat messages, giving a string; a list of those, giving a list; or token
        ids, given and returned as ``transformers`` does.
    options: for text, those of `generate` (max_new_tokens, temperature, top_k, top_p, min_p,
        repetition_penalty, seed, kv, stream); for token ids, those of ``transformers``.

    Text runs on the native decoder where it knows the model, else in PyTorch. Token ids run there
    too where the options are among those above, do_sample, eos_token_id and pad_token_id; any other
    option goes to ``transformers``' own loop.
    """
    if is_text(inputs):
        return generate(self, self.tokenizer, inputs, **options)
    return generate_tokens(self, inputs, options)


def generate(
    model: Any,
    tokenizer: Any,
    prompt: Any,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] = 0,
    kv: str | Spec | None = None,
    stream: Callable[[str], Any] | None = None,
    held: Held | None = None,
) -> Any:
    """The model's continuation of a prompt, or its answer to chat messages.

    ``prompt`` is a string, continued as it stands, or messages, which go through the tokenizer's
    chat template; or a list of such prompts, which are answered side by side, in a list, each as if
    it were alone. ``temperature=0`` is greedy, whatever top_k, top_p, min_p and seed are; the rule of
    sampling is in `kernels.sampling`. Of one prompt, one ``seed`` gives one answer; for a list it may
    be a list too, with one for each: ``generate([prompt] * 3, seed=[0, 1, 2])``. Generation ends at an
    end-of-text or end-of-turn token, which is not part of the answer, or after ``max_new_tokens``.
    ``kv`` is what keys and values are kept in (see `engine`). ``stream`` (for one prompt) is called
    with each new piece of text; the pieces join to the returned string. ``held`` (for one prompt) is
    what was computed of an earlier text, and is of this one afterwards: where both begin alike,
    nothing is computed again.
    """
    most = _count("max_new_tokens", max_new_tokens)
    one = _is_prompt(prompt)
    prompts = [prompt] if one else list(prompt)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    samplings = _seeded(sampling, seed, len(prompts))
    if stream is not None and not one:
        raise UserError("stream needs one prompt: pieces of several texts cannot be told apart")
    ids = [prompt_ids(tokenizer, item).tolist() for item in prompts]
    texts = [_Answer(tokenizer, before if isinstance(item, str) else [])
             for item, before in zip(prompts, ids, strict=True)]  # fmt: skip
    beyond_context(model, max(map(len, ids), default=0) + most, "prompt and max_new_tokens")
    stops = stop_tokens(model, tokenizer)
    runner = engine(model, kv)
    for which, token, stop in continuations(
        runner, ids, samplings, AT_ONCE, most, held if one else None
    ):
        answer = texts[which]
        if token not in stops:
            answer.tokens.append(token)
            if stream is not None:
                answer.emit(stream)
        if token in stops or len(answer.tokens) == most:
            stop()
    if stream is not None:
        texts[0].emit(stream, last=True)
    return texts[0].text() if one else [answer.text() for answer in texts]


def _count(name: str, value: Any) -> int:
    try:
        number = index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")
    return number


def _seeded(sampling: Sampling, seed: Any, prompts: int) -> list[Sampling]:
    """That of every prompt."""
    if isinstance(seed, Sequence) and not isinstance(seed, (str, bytes)):
        if len(seed) != prompts:
            raise UserError(f"a list of seeds has one for each prompt: {prompts}, not {len(seed)}")
        return [replace(sampling, seed=one) for one in seed]
    one: Any = seed  # checked by Sampling
    return [replace(sampling, seed=one)] * prompts


def _is_prompt(prompt: Any) -> bool:
    """Whether this is one prompt; else it must be a list of prompts. Raises UserError otherwise."""
    if isinstance(prompt, str) or _is_messages(prompt):
        return True
    if isinstance(prompt, Sequence) and all(isinstance(p, str) or _is_messages(p) for p in prompt):
        return False
    raise UserError(
        f"a prompt is a string or a list of messages such as {{'role': 'user', 'content': '...'}}, "
        f"or several of them in a list; found {prompt!r:.80}"
    )


def _is_messages(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, dict) for m in prompt)


def prompt_ids(tokenizer: Any, prompt: str | Messages) -> torch.Tensor:
    """Token ids, int64 ``[tokens]``, of a string or of templated chat messages."""
    if isinstance(prompt, str):
        ids = tokenizer(_encodable(prompt))["input_ids"]
        if not ids and tokenizer.bos_token_id is not None:
            ids = [tokenizer.bos_token_id]
    else:
        ids = _templated(tokenizer, prompt)
    if not ids:
        raise UserError("the prompt is empty: nothing to continue")
    return torch.tensor(ids, dtype=torch.int64)


def stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end an answer: every EOS the checkpoint names, and the known ends of a turn."""
    named = [tokenizer.eos_token_id]
    for config in (model.generation_config, model.config):
        eos = getattr(config, "eos_token_id", None)
        named += eos if isinstance(eos, list) else [eos]
    special = set(tokenizer.get_added_vocab())
    named += [tokenizer.convert_tokens_to_ids(token) for token in TURN_ENDS if token in special]
    return frozenset(token for token in named if token is not None)


def _templated(tokenizer: Any, messages: Messages) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("this model has no chat template; give the prompt as plain text")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise whatever their author chose
        raise UserError(f"the model's chat template refuses these messages: {error}") from error
    return tokenizer(_encodable(text), add_special_tokens=False)["input_ids"]


def _encodable(text: str) -> str:
    """The text. Raises UserError for halves of surrogate pairs: bytes that were no UTF-8 become such."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the prompt is not UTF-8, or has half of a surrogate pair, at character {error.start + 1}"
        ) from error
    return text


class _Answer:
    """The tokens of an answer, and its text; `before` are those of a text that it continues."""

    def __init__(self, tokenizer: Any, before: list[int]) -> None:
        self._tokenizer, self._before = tokenizer, before[-CONTEXT:]
        self._settled, self._tokens_settled = "", 0  # not decoded again
        self._emitted = 0
        self.tokens: list[int] = []

    def text(self) -> str:
        """Decoded behind what stands before it: some tokenizers drop the space that a text begins with."""
        settled = self._tokens_settled
        before = (self._before + self.tokens[max(0, settled - CONTEXT) : settled])[-CONTEXT:]
        fresh = self.tokens[settled:]
        said, text = self._decoded(before), self._decoded(before + fresh)
        if text.startswith(said):
            return self._settled + text[len(said) :]
        return self._settled + self._decoded(fresh)

    def emit(self, stream: Callable[[str], Any], last: bool = False) -> None:
        """What is new goes to `stream`, unless it ends inside a character: a token may hold only the
        first bytes of one, which decode to U+FFFD until the rest arrives."""
        text = self.text()
        if text.endswith("\ufffd") and not last:
            return
        if len(text) > self._emitted:
            stream(text[self._emitted :])
        self._emitted = len(text)
        if len(self.tokens) - self._tokens_settled >= SETTLED:
            self._settled, self._tokens_settled = text, len(self.tokens)

    def _decoded(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text
