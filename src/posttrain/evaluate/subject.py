"""A model to be evaluated: a name to load it by, or a model that is loaded already."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from posttrain.errors import UserError
from posttrain.evaluate.score import vocabulary
from posttrain.lm.context import beyond_context
from posttrain.lm.engine import Engine, scoring_engine, why_torch
from posttrain.models.base import DTYPES
from posttrain.models.kv import describe_kv, parse_kv
from posttrain.numbers import Spec

# Weights may fill this share of free memory; the rest is for logits, activations and others.
MEMORY_SHARE = 0.6
REPORT_FILE = "posttrain.json"  # what `quantize` measured, beside the checkpoint it wrote
EXPANDED_CAVEAT = (
    "stored as {expanded_from}, {bits_per_weight:.2f} bits per weight in all, and expanded to {dtype} to run; its bits "
    "and size here are those of the file, so a model quantized from it can look larger: what that "
    "model keeps in 16 bits took fewer in the file"
)


@dataclass
class Subject:
    """``name`` as the user gave it; ``model`` is None while it is not in memory. ``given``: the
    user loaded it, so it is not ours to close. ``kv``: what its keys and values are kept in, None
    for what the model says. ``window``: tokens of the windows it was scored on. ``copy``: which of
    the models of this name it is, from 1."""

    name: str
    dtype: str = "float32"
    model: Any = None
    tokenizer: Any = None
    given: bool = False
    kv: Spec | None = None
    window: int = 0
    copy: int = 1

    @classmethod
    def of(
        cls,
        model: Any,
        dtype: str = "float32",
        tokenizer: Any = None,
        kv: str | Spec | None = None,
    ) -> "Subject":
        """From a name or path, or from a loaded transformers model, whose tokenizer is its
        ``.tokenizer`` (as ``posttrain.load`` leaves it) or the one given."""
        keep = None if kv is None else parse_kv(kv)
        if isinstance(model, (str, Path)):
            _torch_dtype(dtype)
            return cls(str(model), dtype, None, tokenizer, kv=keep)
        if not isinstance(model, torch.nn.Module):
            raise UserError(f"a model is a path, a name or a loaded model, not {model!r:.80}")
        tokenizer = tokenizer or getattr(model, "tokenizer", None)
        if tokenizer is None:
            raise UserError("a loaded model needs its tokenizer: set model.tokenizer, "
                            "or load it with posttrain.load")  # fmt: skip
        source = (getattr(model, "posttrain", None) or {}).get("source")
        name = getattr(model, "name_or_path", "") or source or type(model).__name__
        return cls(name, _dtype_name(model.dtype), model.eval(), tokenizer, given=True, kv=keep)

    @property
    def loaded(self) -> bool:
        return self.model is not None

    @property
    def label(self) -> str:
        """``called``; two models that are called alike are numbered."""
        return self.called if self.copy == 1 else f"{self.called} ({self.copy})"

    @property
    def called(self) -> str:
        """``name``, and the format of the cache where it was asked for: the same model may be
        compared with itself."""
        return self.name if self.kv is None else f"{self.name} (kv {self.kv})"

    def engine(self) -> Engine:
        """What scores the open model."""
        return scoring_engine(self.model, self.kv)

    def open(self) -> Any:
        """The model, loaded now if it was not. Where the native decoder cannot score it, quantized
        linears keep their dequantized weights if memory clearly allows: the results are bitwise
        the same, and no weight is unpacked again for every batch."""
        if self.model is None:
            from posttrain.models.load import load, set_resident

            roomy = self.memory_needed() < MEMORY_SHARE * psutil.virtual_memory().available
            self.model = load(self.name, dtype=_torch_dtype(self.dtype))
            if roomy and self.engine().name == "torch":
                set_resident(self.model, "dequantized")
        if self.tokenizer is None:
            self.tokenizer = self.model.tokenizer
        return self.model

    def open_tokenizer(self) -> Any:
        """The tokenizer, without loading the model."""
        if self.tokenizer is None:
            from posttrain.models.source import open_source

            self.tokenizer = open_source(self.name).tokenizer()
        return self.tokenizer

    def vocabulary(self) -> int:
        """Number of logits for a position, without loading the model."""
        return vocabulary(self._configured())

    def blocks(self) -> int | None:
        """Number of decoder blocks, without loading the model; None where its config has none."""
        config = self._configured().config.get_text_config(decoder=True)
        return getattr(config, "num_hidden_layers", None)

    def _configured(self) -> Any:
        """The model, or what it is read from: either has a `config`."""
        if self.model is not None:
            return self.model
        from posttrain.models.source import open_source

        return open_source(self.name)

    def close(self) -> None:
        if not self.given:
            self.model = None

    def memory_needed(self) -> int:
        """Bytes of the weights in the dtype they are computed in; 0 for what is loaded already."""
        if self.loaded:
            return 0
        from posttrain.models.source import open_source
        from posttrain.models.walk import skeleton

        parameters = skeleton(open_source(self.name).config).parameters()
        dtype = _torch_dtype(self.dtype)
        width = 4 if dtype == "auto" else dtype.itemsize
        return width * sum(parameter.numel() for parameter in parameters)

    def facts(self) -> dict[str, Any]:
        """Size and implementation of the open model."""
        from posttrain.models.load import implementation, model_size

        runner = self.engine()
        scorer = runner.name
        info = dict(getattr(self.model, "posttrain", None) or {})
        if not {"bits_per_weight", "bytes"} <= info.keys():
            info |= model_size(self.model)
        found = {key: info[key] for key in ("bits_per_weight", "bytes")}
        optional = ("format", "bytes_quantized", "expanded_from")
        found |= {key: info[key] for key in optional if info.get(key) is not None}
        return found | {
            "dtype": _dtype_name(self.model.dtype),
            "implementation": implementation(self.model) if scorer == "torch" else scorer,
            **describe_kv(runner.keeps(scoring=True), self.model.config),
        }

    def caveats(self) -> list[tuple[str, str]]:
        """(model, what to keep in mind of its weights): of the open model, and of the one it was
        quantized from."""
        own = list((getattr(self.model, "posttrain", None) or {}).get("notes", ()))
        facts = self.facts()
        if "expanded_from" in facts:
            own.insert(0, EXPANDED_CAVEAT.format(**facts))
        beyond = beyond_context(self.model, self.window, "window")
        own += [note for note in (why_torch(self.model, self.kv), beyond) if note]
        report = self.quantize_report()
        origin, inherited = str(report.get("model", self.name)), report.get("notes") or ()
        return [*((self.called, note) for note in own), *((origin, note) for note in inherited)]

    def quantize_report(self) -> dict[str, Any]:
        """What ``posttrain quantize`` measured when it wrote this checkpoint, or ``{}``."""
        path = Path(self.name) / REPORT_FILE
        if not path.is_file():
            return {}
        try:
            # NaN and infinities, such as the QSNR of a lossless layer, are null in every result.
            found = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
        except ValueError as error:
            raise UserError(f"{path} is not JSON: {error}; quantize the model again") from error
        return found if isinstance(found, dict) else {}


def tell_apart(subjects: list[Subject]) -> None:
    """Number those that would have the same label: results are kept by label."""
    taken: set[str] = set()
    for subject in subjects:
        while subject.label in taken:
            subject.copy += 1
        taken.add(subject.label)


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _torch_dtype(dtype: str) -> Any:
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"dtype must be one of auto, {', '.join(DTYPES)}, not {dtype!r}")
    return DTYPES.get(dtype, "auto")


def require_same_tokens(reference: Subject, other: Subject) -> None:
    """Models can be compared token by token only when they cut text into the same tokens."""
    mine, theirs = reference.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    if mine == theirs:
        return
    token = min(dict(mine.items() ^ theirs.items()), key=str)
    raise UserError(
        f"{reference.name} and {other.name} have different tokenizers ({len(mine)} and "
        f"{len(theirs)} tokens; {token!r} is {mine.get(token, 'no token')} in one and "
        f"{theirs.get(token, 'no token')} in the other), so their losses per token cannot be "
        "paired (that would take bits per byte); evaluate them one by one"
    )
