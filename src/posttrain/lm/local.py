"""Generate text with a model in this process.

The loop is our own and not ``transformers``' ``generate``: it runs on the native decoder where
that knows the model, and the same seed gives the same text whatever else the program does.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch

from posttrain.errors import UserError
from posttrain.kernels import Sampling
from posttrain.lm.engine import AT_ONCE, continuations, engine
from posttrain.lm.tokens import generate_tokens, is_text
from posttrain.numbers import Spec

Messages = list[dict[str, str]]
Prompt = str | Messages

# Tokens by which chat templates end a turn; some checkpoints forget to name theirs as EOS.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|eot|>")


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
    seed: int = 0,
    kv: str | Spec | None = None,
    stream: Callable[[str], Any] | None = None,
) -> Any:
    """The model's continuation of a prompt, or its answer to chat messages.

    ``prompt`` is a string, continued as it stands, or messages, which go through the tokenizer's
    chat template; or a list of such prompts, which are answered side by side, in a list, each as if
    it were alone. ``temperature=0`` is greedy; the rule of sampling is in `kernels.sampling`.
    Generation ends at an end-of-text or end-of-turn token, which is not part of the answer, or
    after ``max_new_tokens``. ``kv`` is what keys and values are kept in (see `engine`). ``stream`` (for one prompt) is called with each new piece of text; the
    pieces join to the returned string.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    one = _is_prompt(prompt)
    prompts = [prompt] if one else list(prompt)
    if stream is not None and not one:
        raise UserError("stream needs one prompt: pieces of several texts cannot be told apart")
    ids = [prompt_ids(tokenizer, item).tolist() for item in prompts]
    stops = stop_tokens(model, tokenizer)
    answers: list[list[int]] = [[] for _ in prompts]
    text = ""
    steps = continuations(engine(model, kv), ids, [sampling] * len(ids), AT_ONCE, max_new_tokens)
    for index, token, stop in steps:
        if token in stops:
            stop()
            continue
        answers[index].append(token)
        if one:
            text = _emit(tokenizer, answers[0], text, stream)
        if len(answers[index]) == max_new_tokens:
            stop()
    if one:
        return _emit(tokenizer, answers[0], text, stream, last=True)
    return [_emit(tokenizer, answer, "", None, last=True) for answer in answers]


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
        ids = tokenizer(prompt)["input_ids"]
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
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _emit(
    tokenizer: Any,
    ids: list[int],
    emitted: str,
    stream: Callable[[str], Any] | None,
    last: bool = False,
) -> str:
    """Text so far; what is new goes to ``stream``, unless it ends inside a character: a token
    may hold only the first bytes of one, which decode to U+FFFD until the rest arrives."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if text.endswith("\ufffd") and not last:
        return emitted
    if stream is not None and text != emitted:
        stream(text[len(emitted) :])
    return text
