"""The evaluate verb: tasks over one model, gathered in one result."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from posttrain.data import Text
from posttrain.errors import UserError
from posttrain.evaluate.perplexity import Options, perplexity
from posttrain.evaluate.provenance import notes
from posttrain.evaluate.subject import Subject
from posttrain.numbers import Spec

# A task takes an open-able subject and the options and returns its part of the result; it
# keeps per-example records so that two models can be compared in pairs.
Task = Callable[[Subject, Options], dict[str, Any]]
TASKS: dict[str, Task] = {"perplexity": perplexity}


def evaluate(
    model: Any,
    *,
    tasks: str | Sequence[str] = ("perplexity",),
    text: str | Path | Text | None = None,
    window: int = 512,
    stride: int | None = None,
    max_tokens: int | None = None,
    chat: bool = False,
    dtype: str = "float32",
    kv: str | Spec | None = None,
    tokenizer: Any = None,
    records: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a model on a text.

    ``model`` is a directory, hub id, GGUF file or ``demo``, or a loaded transformers model (then
    ``dtype`` is the model's own). ``text`` is a file, a corpus name or None for Python's language
    reference. The text is read in windows of ``window`` tokens, ``stride`` apart (None: windows
    side by side, every token but the first of each scored; smaller than the window: they
    overlap, and each window after the first scores its last ``stride`` tokens). ``max_tokens``
    bounds the tokens of text that are used. ``chat`` applies the chat template to rows of messages.
    ``kv`` is what keys and values are kept in: "int8", "fp8", "int4", "int16" (one scale for each
    token and head), "fp16", "fp32", or any number format of rows of head_dim; None is what the model
    says, else int16 where its activations are integers, else what it computes in. Attention then
    sees rounded keys and values, of the token itself too.
    ``records`` is a file (.jsonl, .jsonl.gz, .npz) for the loss of every token.

    The result holds ``model``, ``nll`` (nats per scored token), ``perplexity``, ``tokens``
    (scored), ``bits_per_weight``, ``bytes``, and: ``nll_ci_low``/``nll_ci_high`` (95% bootstrap
    interval over windows; None for a single window), ``window``, ``stride``, ``windows``, ``bos``,
    ``window_nll`` (mean of each window), ``text`` (``name``, ``sha256``, ``tokens`` covered),
    ``dtype``, ``implementation``, ``kv`` (format of the cache), ``kv_bits_per_value`` (scales
    included), ``kv_bytes_per_token`` (of context), ``seconds`` (of scoring), ``tokens_per_second`` (scored),
    ``notes`` (what to keep in mind of this model's weights, a sentence each).
    Raises UserError for whatever the user can mend.
    """
    tasks = [tasks] if isinstance(tasks, str) else tasks
    unknown = [str(task) for task in tasks if not isinstance(task, str) or task not in TASKS]
    if unknown or not tasks:
        raise UserError(f"unknown task {', '.join(unknown)!r}; known are {', '.join(TASKS)}")
    subject = Subject.of(model, dtype, tokenizer, kv)
    options = Options(text, window, stride, max_tokens, chat, records, progress)
    result: dict[str, Any] = {"model": subject.name}
    for task in tasks:
        result |= TASKS[task](subject, options)
    return result | subject.facts() | {"notes": notes(subject.caveats())}
