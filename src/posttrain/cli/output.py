"""Writing results: exactly one JSON object for machines, aligned text for people."""

import json
import math
import os
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def only_json_on_stdout() -> Iterator[None]:
    """Send everything written to standard output meanwhile to standard error.

    Both at the level of Python and of the process, so that neither a library's `print` nor a C
    library can put a line before the JSON object.
    """
    python_stdout = sys.stdout
    python_stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stdout = python_stdout
        os.dup2(saved, 1)
        os.close(saved)


def write_json(result: Mapping[str, Any]) -> None:
    """One JSON object on one line. NaN and infinities, which JSON lacks, become null."""
    print(json.dumps(plain(result), ensure_ascii=False, allow_nan=False))


def plain(value: Any) -> Any:
    """`value` in the types of JSON: numbers of numpy and torch, paths and tuples included."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first row being the header; text left, numbers right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    numeric = [all(_looks_numeric(row[i]) for row in rows[1:]) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        return "  ".join(cells).rstrip()

    return "\n".join(line(row) for row in rows)


def _looks_numeric(cell: str) -> bool:
    return cell == "-" or cell.lstrip("+-").replace(",", "")[:1].isdigit()


def facts(title: str, pairs: Sequence[tuple[str, str]]) -> str:
    """A title and one aligned line for each (label, value)."""
    width = max(len(label) for label, _ in pairs)
    return "\n".join([title, *(f"  {label.ljust(width)}  {value}" for label, value in pairs)])


def notes(result: Mapping[str, Any]) -> list[str]:
    """A paragraph for each caveat of a result."""
    said = result.get("notes") or ()
    return [textwrap.fill(f"note: {note}", 96, subsequent_indent="      ") for note in said]


def number(value: Any, places: int = 4, sign: bool = False) -> str:
    """A fixed number of decimals, `-` where there is no number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        return "-"
    return f"{value:+.{places}f}" if sign else f"{value:.{places}f}"


def bytes_text(count: Any) -> str:
    """`134.5 MB`, `1.21 GB`: decimal units, as file managers and model cards count."""
    if not isinstance(count, (int, float)):
        return "-"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return (
                f"{count / factor:.2f} {unit}" if unit == "GB" else f"{count / factor:.1f} {unit}"
            )
    return f"{count:.0f} B"


def kv_text(result: Mapping[str, Any]) -> str:
    """What the KV cache is kept in, and what that takes."""
    if result["kv_bits_per_value"] is None:
        return str(result["kv"])
    bits, count = number(result["kv_bits_per_value"], 2), bytes_text(result["kv_bytes_per_token"])
    return f"{result['kv']}: {bits} bits per value, {count} per token"


def seconds_text(seconds: Any) -> str:
    """`12.3 s`, `4 min 05 s`."""
    if not isinstance(seconds, (int, float)):
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
