"""Generate text with a model in this process.

The loop is our own and not ``transformers``' ``generate``, which samples with the global random
generator: here the same seed gives the same text whatever else the program does, and several
threads may generate with one model at once (a call changes nothing in the model).
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from posttrain.errors import UserError

Messages = list[dict[str, str]]

# Tokens by which chat templates end a turn; some checkpoints forget to name theirs as EOS.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|eot|>")


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str | Messages,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stream: Callable[[str], Any] | None = None,
) -> str:
    """The model's continuation of a prompt, or its answer to chat messages.

    Messages go through the tokenizer's chat template; a string is continued as it stands.
    ``temperature=0`` is greedy; otherwise one token at a time is drawn from the softmax of
    logits / temperature, cut to the ``top_k`` likeliest tokens (0: all) and then to the fewest
    likeliest whose probabilities reach ``top_p``. Generation ends at an end-of-text or
    end-of-turn token, which is not part of the answer, or after ``max_new_tokens``.
    ``stream`` is called with each new piece of text; the pieces join to the returned string.
    """
    _check_sampling(max_new_tokens, temperature, top_k, top_p)
    ids = prompt_ids(tokenizer, prompt)
    generator = torch.Generator().manual_seed(seed)
    stops = stop_tokens(model, tokenizer)
    answer: list[int] = []
    text = ""
    for token in sample_tokens(model, ids, generator, temperature, top_k, top_p):
        if token in stops:
            break
        answer.append(token)
        text = _emit(tokenizer, answer, text, stream)
        if len(answer) == max_new_tokens:
            break
    return _emit(tokenizer, answer, text, stream, last=True)


def sample_tokens(
    model: Any,
    ids: torch.Tensor,
    generator: torch.Generator,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Iterator[int]:
    """Token after token of the continuation of ``ids`` (int64 ``[tokens]``), without end."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    step = ids[None].to(model.device)
    while True:
        with torch.inference_mode():
            logits = last_logits(model, step, 1, past_key_values=cache, use_cache=True)
            token = _choose(logits[0, 0].float().cpu(), generator, temperature, top_k, top_p)
        yield token
        step = torch.tensor([[token]], device=model.device)


def last_logits(model: Any, ids: torch.Tensor, count: int, **options: Any) -> torch.Tensor:
    """Logits ``[batch, count, vocabulary]`` at the last ``count`` positions of ``ids``
    ``[batch, tokens]``; the head runs on those alone where the model can do so."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = count
    return model(input_ids=ids, **options).logits[:, -count:]


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


def _choose(
    logits: torch.Tensor, generator: torch.Generator, temperature: float, top_k: int, top_p: float
) -> int:
    if temperature == 0:
        return int(logits.argmax())
    logits, order = (logits / temperature).sort(descending=True, stable=True)
    probabilities = logits.softmax(-1)
    if top_k:
        probabilities[top_k:] = 0
    probabilities /= probabilities.sum()
    before = probabilities.cumsum(-1) - probabilities
    probabilities[before >= top_p] = 0  # the likeliest token always stays: nothing is before it
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


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


def _check_sampling(max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature must be 0 (greedy) or more, not {temperature}")
    if top_k < 0:
        raise UserError(f"top_k must be 0 (all tokens) or more, not {top_k}")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1, not {top_p}")
