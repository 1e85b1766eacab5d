"""What it takes to repeat a comparison, and what to keep in mind when reading it."""

import os
import platform
import shlex
from collections.abc import Sequence
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
DEMO_NOTE = (
    "The weights of demo were themselves stored in 4 bits with groups of 32: 4-bit results on it "
    "flatter whatever lands near the same grid."
)


def notes(subjects: Sequence[Subject], reports: Sequence[dict[str, Any]]) -> list[str]:
    """Caveats about the models themselves."""
    origins: set[Any] = {subject.name for subject in subjects}
    origins |= {str(report.get(key)) for report in reports for key in ("model", "source")}
    return [DEMO_NOTE] if "demo" in origins else []


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
