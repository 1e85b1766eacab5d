"""What it takes to repeat a comparison, and what to keep in mind when reading it."""

import os
import platform
import shlex
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from typing import Any

import psutil
import torch

from posttrain.data import Text
from posttrain.evaluate.perplexity import Options
from posttrain.evaluate.subject import Subject

IN_TURN_NOTE = (
    "The models did not fit in memory together, so they were scored one after another, and KL is "
    "over the {k} likeliest tokens of the reference and one bucket for the rest: a lower bound."
)
NO_SENSITIVITY_NOTE = (
    "Block sensitivity of {name} was not measured: it and the reference do not fit in memory "
    "together."
)

VOCABULARY_NOTE = (
    "The models give {least} to {most} logits for a position (heads are padded differently), so KL "
    "and greedy agreement are over the first {least}, each model's probabilities renormalized to them."
)


def notes(caveats: Iterable[tuple[str, str]]) -> list[str]:
    """(model, caveat about its weights) as sentences, each caveat once with all its models."""
    about: dict[str, dict[str, None]] = {}
    for name, caveat in caveats:
        about.setdefault(caveat, {})[name] = None
    return [f"{' and '.join(names)}: {caveat}" for caveat, names in about.items()]


def machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
    }


def created() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def command(subjects: Sequence[Subject], options: Options, extra: dict[str, Any]) -> str | None:
    """The command line that repeats this; None where a model has no name to load it by."""
    if any(subject.given for subject in subjects):
        return None
    text = options.text.name if isinstance(options.text, Text) else options.text
    values = {
        "text": text,
        "window": options.window,
        "stride": options.stride,
        "max-tokens": options.max_tokens,
        "chat": options.chat,
        "dtype": subjects[0].dtype,
        **extra,
    }
    words = ["posttrain", "compare", *(subject.name for subject in subjects)]
    for name, value in values.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words += [f"--{name}", str(value)]
    return shlex.join(words)
