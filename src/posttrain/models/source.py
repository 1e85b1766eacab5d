"""Find a model by what the user typed: a directory, a hub id, a GGUF file, "demo" or "pico"."""

import difflib
import os
from pathlib import Path

from posttrain.errors import UserError
from posttrain.models.base import DEMO, PICO, Entry, Source
from posttrain.models.directory import DirectorySource
from posttrain.models.gguf import GgufSource, demo_path
from posttrain.models.hub import fetch, looks_like_hub_id

__all__ = ["DEMO", "PICO", "Entry", "Source", "open_source", "require_unquantized"]


def open_source(model: str | Path) -> Source:
    """Open a model without reading its weights.

    model: a directory with config.json and safetensors; a .gguf file; a hub id ("owner/name",
    fetched or taken from the local cache); "demo" or "pico". A local path that exists wins over a hub
    id.
    Every problem with the files is one UserError that names the file, what is wrong, what to do.
    """
    text = str(model)
    if text == DEMO:
        return GgufSource(demo_path(), name=DEMO)
    if text == PICO:
        return DirectorySource(Path(__file__).parent / PICO, name=PICO)
    path = Path(os.path.expanduser(model))  # a user that does not exist is left as it is
    if path.is_dir():
        return DirectorySource(path, name=text)
    if path.is_file():
        return _open_file(path, text)
    if isinstance(model, str) and looks_like_hub_id(text):
        return DirectorySource(fetch(text, _near(path)), name=text, kind="hub")
    missing = "" if path.parent.is_dir() else f" ({path.parent} does not exist either)"
    raise UserError(f"{text}: no such file or directory{missing or _near(path)}")


def _open_file(path: Path, name: str) -> Source:
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic == b"GGUF":
        return GgufSource(path, name=name)
    if path.suffix == ".gguf":
        raise UserError(f"{path}: not a GGUF file: it does not begin with the letters GGUF")
    if (path.parent / "config.json").is_file():
        raise UserError(f"{path}: pass the directory instead: {path.parent}")
    raise UserError(f"{path}: a file, but not a GGUF one; pass a .gguf file or a model directory")


def _near(path: Path) -> str:
    """'; did you mean ...?' with the nearest neighbour of a path that does not exist, or ''."""
    if not path.parent.is_dir():
        return ""
    names = [child.name for child in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def require_unquantized(source: Source) -> None:
    """UserError if the source is a checkpoint that is already quantized."""
    config = source.quantization_config
    if config is None:
        return
    method = config.get("quant_method", "an unnamed method")
    form = f", format {config['format']}" if config.get("format") else ""
    raise UserError(
        f"{source.path}: already quantized ({method}{form}); quantizing it again would add its "
        "error twice. Give the full-precision model it was made from"
    )
