"""The compare verb with its page: what `evaluate` measures, then the report of it."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.data import Text
from posttrain.evaluate import compare as measure
from posttrain.numbers import Spec
from posttrain.report.page import check_path, render_report


def compare(
    models: Sequence[Any],
    *,
    out: str | Path | None = None,
    text: str | Path | Text | None = None,
    window: int = 512,
    stride: int | None = None,
    max_tokens: int | None = None,
    chat: bool = False,
    dtype: str = "float32",
    kv: str | Spec | None = None,
    kl: str = "full",
    top_k: int = 64,
    generations: bool = True,
    sensitivity: bool = False,
    records: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure models on the same tokens, pair each with the first, and write the HTML report.

    ``out`` is the file of the report, its path checked before any work starts; None writes none.
    The other arguments and the result are those of ``posttrain.evaluate.compare``; with ``out``
    the result has ``report``, the path of the page, and ``command`` names it too. Raises UserError
    for whatever the user can mend.
    """
    page = None if out is None else check_path(out)
    result = measure(
        models,
        text=text,
        window=window,
        stride=stride,
        max_tokens=max_tokens,
        chat=chat,
        dtype=dtype,
        kv=kv,
        kl=kl,
        top_k=top_k,
        generations=generations,
        sensitivity=sensitivity,
        records=records,
        seed=seed,
        progress=progress,
    )
    if page is not None:
        if result["command"] is not None:
            result["command"] += f" --out {shlex.quote(str(page))}"
        result["report"] = str(render_report(result, page))
    return result
