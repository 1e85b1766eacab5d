"""`.generate` on token ids, with the arguments and results of ``transformers``."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from posttrain.errors import UserError
from posttrain.kernels import Sampling
from posttrain.lm.engine import AT_ONCE, TorchEngine, continuations, engine, new_cache
from posttrain.numbers import Spec

# Options of transformers' generate that mean the same here; with any other it runs itself.
KNOWN = {
    "input_ids", "attention_mask", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p",
    "min_p", "repetition_penalty", "eos_token_id", "pad_token_id", "use_cache",
}  # fmt: skip
# Entries of a generation config that do not change what is generated here.
INERT = {"_from_model_config", "transformers_version", "bos_token_id", "max_length"}


def is_text(inputs: Any) -> bool:
    """Whether `inputs` are prompts (or none, or what was meant as such) rather than token ids."""
    if isinstance(inputs, Sequence) and not isinstance(inputs, (str, bytes)):
        return not inputs or is_text(inputs[0]) or isinstance(inputs[0], Mapping)
    return isinstance(inputs, (str, bytes, dict))


def generate_tokens(model: Any, inputs: Any, options: dict[str, Any]) -> Any:
    """Token ids [batch, prompt + new], as ``transformers`` returns them for the same call."""
    if inputs is not None:
        options = {"input_ids": inputs, **options}
    ids = options.get("input_ids")
    runner = engine(model)
    if not isinstance(ids, Tensor) or set(options) - KNOWN or isinstance(runner, TorchEngine):
        return _theirs(model, options, runner.kv)
    settled = _settled(model, options)
    if settled is None:
        return _theirs(model, options, runner.kv)
    prompts = _prompts(ids, _mask(ids, options.get("attention_mask"), settled))
    new = _continue(runner, prompts, settled)
    width = max(len(part) for part in new)
    pad = settled["pad_token_id"]
    rows = [torch.tensor(part + [pad] * (width - len(part))) for part in new]
    return torch.cat([ids.reshape(len(new), -1), torch.stack(rows).to(ids.dtype)], dim=1)


def _theirs(model: Any, options: dict[str, Any], kv: Spec | None) -> Any:
    """What ``transformers``' own loop gives, with keys and values in the format of the model unless
    the call says how it wants them kept."""
    own = {"past_key_values", "cache_implementation"} & set(options)
    if kv is not None and not own and options.get("use_cache", True):
        options = options | {"past_key_values": new_cache(model.config, kv)}
    return type(model).generate(model, **options)


def _settled(model: Any, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """All options with the model's own defaults, or None where those ask for something else."""
    config = model.generation_config.to_diff_dict()  # what differs from transformers' defaults
    if {name for name, value in config.items() if value} - KNOWN - INERT:
        return None

    def option(name: str, default: Any) -> Any:
        for source in (options, config):
            if source.get(name) is not None:
                return source[name]
        return default

    count = options.get("max_new_tokens")
    if not isinstance(count, Integral) or count < 1:
        return None  # max_length, its warnings and errors are transformers' own
    sampled = option("do_sample", False)
    stops = torch.as_tensor(option("eos_token_id", [])).reshape(-1).tolist()
    return {
        "sampling": {
            "temperature": option("temperature", 1.0) if sampled else 0.0,
            "top_k": option("top_k", 50) if sampled else 0,
            "top_p": option("top_p", 1.0) if sampled else 1.0,
            "min_p": option("min_p", 0.0) if sampled else 0.0,
            "repetition_penalty": option("repetition_penalty", 1.0),
        },
        # Like transformers, whose draws follow torch.manual_seed.
        "seed": int(torch.randint(2**62, ())) if sampled else 0,
        "stops": stops,
        "pad_token_id": option("pad_token_id", next(iter(stops), None)),
        "max_new_tokens": int(count),
    }


def _mask(ids: Tensor, mask: Tensor | None, settled: Mapping[str, Any]) -> Tensor:
    """Which of `ids` are text. Not told, transformers takes all but padding, unless padding is also
    what ends a text."""
    if mask is not None:
        return mask
    pad = settled["pad_token_id"]
    return torch.ones_like(ids) if pad is None or pad in settled["stops"] else ids != pad


def _prompts(ids: Tensor, mask: Tensor) -> list[list[int]]:
    rows = ids.reshape(-1, ids.shape[-1])
    mask = mask.reshape(rows.shape).bool()
    prompts = [row[keep].tolist() for row, keep in zip(rows, mask, strict=True)]
    if not all(prompts):
        raise UserError("a prompt has no tokens: nothing to continue")
    return prompts


def _continue(runner: Any, prompts: list[list[int]], how: dict[str, Any]) -> list[list[int]]:
    samplings = [Sampling(**how["sampling"], seed=how["seed"] + i) for i in range(len(prompts))]
    new: list[list[int]] = [[] for _ in prompts]
    for index, token, stop in continuations(
        runner, prompts, samplings, AT_ONCE, how["max_new_tokens"]
    ):
        new[index].append(token)
        if token in how["stops"] or len(new[index]) == how["max_new_tokens"]:
            stop()
    return new
