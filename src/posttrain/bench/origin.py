"""The model that a quantized one was made from: peers get that, each in a form of its own."""

import json
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.models.base import Source
from posttrain.models.source import DEMO, PICO, open_source

REPORT = "posttrain.json"  # what `quantize` writes beside a checkpoint
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers")  # equal in both


def report_of(model: str) -> dict[str, Any]:
    """What `quantize` said of a checkpoint of ours; {} for any other model."""
    file = _report_file(model)
    if not file.is_file():
        return {}
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}; quantize the model again") from error
    return report if isinstance(report, dict) else {}


def origin_of(model: str) -> str:
    """The model that `model` was quantized from, or itself.

    Its name was typed in a folder unknown now: it is looked for here, then in every folder that the
    quantized model lies in, and has to have the same sizes.
    """
    report = report_of(model)
    if not report:
        return model
    named, ours = str(report.get("model")), _sizes(open_source(model))
    misfits = []
    for place in _places(named, _report_file(model).parent):
        misfit = _misfit(place, ours)
        if misfit is None:
            return place
        misfits.append(misfit)
    raise UserError(
        f'{_report_file(model)}: "model" is {named!r}, from which this one was quantized and which '
        f"peers need, but {'; '.join(misfits)}; run where it was quantized, or write that model's "
        "path there"
    )


def open_plain(origin: str, peer: str) -> Source:
    """The open model for a peer that reads no quantized checkpoint; UserError for one of those."""
    source = open_source(origin)
    if source.quantization_config is not None:
        method = source.quantization_config.get("quant_method", "an unnamed method")
        raise UserError(
            f"{source.path}: already quantized ({method}), and no {REPORT} there says from which "
            f"model, so {peer} cannot get the same one; leave it out of --against"
        )
    return source


def _report_file(model: str) -> Path:
    return Path(model).expanduser() / REPORT


def _places(named: str, folder: Path) -> list[str]:
    """Where the model may be; a name that is no path there stands for itself."""
    if named in (DEMO, PICO):
        return [named]
    paths = [Path(named).expanduser(), *(above / named for above in folder.resolve().parents)]
    return list(dict.fromkeys(str(path) for path in paths if path.exists())) or [named]


def _misfit(place: str, ours: dict[str, Any]) -> str | None:
    """Why this cannot be the model that was quantized, or None."""
    try:
        source = open_source(place)
    except UserError as error:
        return str(error)
    if source.quantization_config is not None:
        return f"{place} is quantized itself"
    differ = [
        f"{name} {size} and not {ours[name]}"
        for name, size in _sizes(source).items()
        if size != ours[name]
    ]
    return f"{place} has {', '.join(differ)}" if differ else None


def _sizes(source: Source) -> dict[str, Any]:
    config = source.config.get_text_config()
    return {name: getattr(config, name, None) for name in SIZES}
