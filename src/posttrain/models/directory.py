"""Models in Hugging Face directories: config.json beside safetensors, whole or in shards."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from posttrain.errors import UserError
from posttrain.models.base import Entry, Source, copy_file, file_states, one_line
from posttrain.models.layout import module_entries
from posttrain.models.shards import StoredTensor, read_header
from posttrain.models.walk import skeleton

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Stands in a directory until the checkpoint in it is finished.
MARKER = "posttrain-unfinished.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
WEIGHT_SUFFIXES = (*PICKLES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
# Written anew beside new weights, or code, which nothing here runs.
NOT_SIDE_FILES = ("config.json", "posttrain.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


class DirectorySource(Source):
    """A directory with config.json and safetensors (`kind` "directory", or "hub" once fetched)."""

    def __init__(self, path: Path, name: str, kind: str = "directory"):
        self.path, self.name, self.kind = path, name, kind
        raw = read_config_file(path)
        self.config = load_config(path, raw)
        self.quantization_config = raw.get("quantization_config")
        stored = read_stored(path)
        self.storage_dtype = _main_dtype(stored)
        if getattr(self.config, "dtype", None) is None:
            self.config.dtype = self.storage_dtype
        self._entries = self._find_entries(stored)
        self._identity = {
            "config": raw,
            "tensors": _headers(stored),
            "files": file_states(s.file for s in stored.values()),
        }

    def _find_entries(self, stored: dict[str, StoredTensor]) -> dict[str, Entry]:
        if self.quantization_config is not None:
            return {n: Entry(s.shape, s.dtype, s.read) for n, s in stored.items()}
        try:
            model = skeleton(self.config)
        except UserError as error:
            raise UserError(f"{self.path}/config.json: {error}") from error
        return module_entries(model, stored, self.path)

    def tokenizer(self) -> Any:
        return read_tokenizer(self.path)

    def copy_side_files(self, out_dir: str | Path) -> None:
        for file in sorted(self.path.iterdir()):
            if file.is_file() and _is_side_file(file.name):
                copy_file(file, Path(out_dir))


def _is_side_file(name: str) -> bool:
    skipped = name in NOT_SIDE_FILES or name.startswith(".") or name.endswith(".py")
    return not skipped and not name.endswith(WEIGHT_SUFFIXES)


def _main_dtype(stored: dict[str, StoredTensor]) -> torch.dtype:
    """The floating dtype that most bytes are stored in (8-bit floats are codes, not values)."""
    count: Counter[torch.dtype] = Counter()
    for tensor in stored.values():
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
            count[tensor.dtype] += tensor.nbytes
    return count.most_common(1)[0][0] if count else torch.float32


def _headers(stored: dict[str, StoredTensor]) -> list[list[Any]]:
    return [[n, list(s.shape), str(s.dtype), s.nbytes, s.start] for n, s in sorted(stored.items())]


def read_tokenizer(path: Path) -> Any:
    """The transformers tokenizer of a directory."""
    from transformers import AutoTokenizer

    if not any((path / file).exists() for file in TOKENIZER_FILES):
        raise UserError(f"{path}: no tokenizer: expected one of {', '.join(TOKENIZER_FILES)}")
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the tokenizer libraries raise bare Exception for bad files
        raise UserError(f"{path}: cannot load its tokenizer: {one_line(error)}") from error


# ---------------------------------------------------------------------------------------- config


def read_config_file(path: Path) -> dict[str, Any]:
    """The raw config.json of a model directory."""
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{path}: no config.json there, so it is not a model directory")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON: {one_line(error)}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise UserError(f'{file}: no "model_type": this is not the config of a transformers model')
    return raw


def load_config(path: Path, raw: dict[str, Any]) -> Any:
    """The transformers config of a directory; UserError unless it is a causal language model that
    the installed transformers knows. Code shipped with a model is never run."""
    from transformers import AutoConfig, __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = raw["model_type"]
    if kind not in CONFIG_MAPPING:
        why = (
            " (it comes with its own code, which posttrain never runs)" if "auto_map" in raw else ""
        )
        raise UserError(
            f"{path}/config.json: unknown architecture: transformers {__version__} has no "
            f'model_type "{kind}"{why}'
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # config classes validate with many exception types
        raise UserError(
            f"{path}/config.json: transformers refuses it: {one_line(error)}"
        ) from error
    check_causal(config, f"{path}/config.json")
    return config


def check_causal(config: Any, where: str) -> None:
    """UserError unless the config is of a model that predicts the next token."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names

    expected = names.get(config.model_type)
    declared = list(getattr(config, "architectures", None) or [])
    heads = [a for a in declared if "For" in a and not a.endswith(("LM", "Generation"))]
    masked = [a for a in declared if a.endswith(("MaskedLM", "ForPreTraining"))]
    if expected is None or ((heads or masked) and expected not in declared):
        what = ", ".join(declared) or config.model_type
        raise UserError(
            f"{where}: {what} is not a causal language model; posttrain works on models that "
            "predict the next token"
        )


# --------------------------------------------------------------------------------------- weights


def read_stored(path: Path) -> dict[str, StoredTensor]:
    """Name on disk -> StoredTensor over all shards, headers checked against the files."""
    if (path / WEIGHTS).is_file():
        return read_header(path / WEIGHTS)
    if (path / INDEX).is_file():
        return _read_sharded(path)
    raise UserError(_no_weights(path))


def _no_weights(path: Path) -> str:
    files = sorted(file.name for file in path.iterdir() if file.is_file())
    pickles = [name for name in files if name.endswith(PICKLES)]
    others = [name for name in files if name.endswith((".safetensors", ".gguf"))]
    start = f"{path}: no {WEIGHTS} or {INDEX}"
    if others:
        return f"{start}; found {', '.join(others[:3])}: pass a .gguf file itself, or add the index"
    if pickles:
        return (
            f"{start}, only {pickles[0]}: a pickle can run code when it is opened, so posttrain "
            "reads safetensors only; save the model again with save_pretrained(...)"
        )
    return f"{start} in it: the weights are missing"


def _read_sharded(path: Path) -> dict[str, StoredTensor]:
    weight_map = _weight_map(path / INDEX)
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if not (path / shard).is_file():
            raise UserError(f"{path / INDEX}: names the shard {shard}, which is not in {path}")
        tensors.update(read_header(path / shard))
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise UserError(f"{path / shard}: lacks tensor {name}, which {INDEX} says it holds")
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{index}: not a safetensors index: no "weight_map" in it') from error
    for shard in pairs.values():
        if "/" in shard or "\\" in shard or shard in ("", ".", ".."):
            raise UserError(f"{index}: shard {shard!r} is not a plain file name")
    return pairs
