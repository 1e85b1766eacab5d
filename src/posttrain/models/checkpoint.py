"""Write a quantized checkpoint: which format can say it, one shard per decoder block, then the rest.

A checkpoint is a Hugging Face directory. Shards are written one by one while a model streams
through; `finish` writes the index, the side files and, last of all, config.json. Until then the
directory holds a marker file, and no loader takes it for a checkpoint: transformers needs
config.json, and `check_finished` gives a clear error. Every file appears whole or not at all
(temporary file, fsync, rename), and the same tensors give the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from posttrain.errors import UserError
from posttrain.models import compressed_tensors, native, storage
from posttrain.models.base import Entry, Source, one_line
from posttrain.models.directory import MARKER
from posttrain.models.plan import LayerPlan, shorten
from posttrain.models.shards import StoredTensor, read_header
from posttrain.models.walk import skeleton, tied_head
from posttrain.numbers import QTensor, Spec

# Shards are written here and moved out whole: safetensors leaves files of its own when it is killed.
PARTS = ".posttrain-parts"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
SHARD_METADATA = {"format": "pt"}

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Format:
    """How a checkpoint is laid out on disk.

    name: "compressed-tensors" or "posttrain". reason: why it was chosen, for people.
    dtype: what config.json must declare so that the format's own reader works, or None to keep
    the source's compute dtype.
    """

    name: str
    reason: str
    dtype: torch.dtype | None = None


def choose_format(
    layers: Mapping[str, LayerPlan], shapes: Shapes, kv: Spec | None = None
) -> Format:
    """compressed-tensors when its schema can say every layer and the KV cache, else our own format,
    and why."""
    try:
        compressed_tensors.express_kv(kv)
    except compressed_tensors.NotExpressible as error:
        return Format("posttrain", f"the KV cache ({kv}): {error}")
    dtypes: set[torch.dtype | None] = set()
    for name, layer in layers.items():
        try:
            dtypes.add(compressed_tensors.express(layer, shapes[name]).dtype)
        except compressed_tensors.NotExpressible as error:
            return Format("posttrain", f"{name} ({layer.weight}): {error}")
    dtype = next((d for d in dtypes if d is not None), None)
    reason = "the compressed-tensors schema can say every layer"
    if dtype is not None:
        reason += "; its reader computes in bfloat16, so config.json says bfloat16"
    return Format("compressed-tensors", reason, dtype)


class CheckpointWriter:
    """Writes one checkpoint into `out_dir`, shard by shard, resumable.

    source: the model being quantized (its config, tokenizer and side files are carried over).
    layers: what `Plan.resolve` decided. shapes: weight shape of every layer in it.
    n_shards: how many `write_shard` calls there will be (decoder blocks plus one for the rest).
    kv: what the KV cache is to be kept in, or None.
    """

    def __init__(
        self,
        out_dir: str | Path,
        source: Source,
        layers: Mapping[str, LayerPlan],
        shapes: Shapes,
        n_shards: int,
        kv: Spec | None = None,
    ) -> None:
        self.out_dir = Path(out_dir)
        self.source = source
        self.layers = dict(layers)
        self.shapes = dict(shapes)
        self.n_shards = n_shards
        self.kv = kv
        self._model = skeleton(source.config)
        tied = tied_head(self._model)
        self._tied = tied if tied is not None and tied[0] in self.layers else None
        self.format = self._choose_format()
        self._store: Callable[..., dict[str, torch.Tensor]] = _SCHEMAS[self.format.name].store
        if self.out_dir.resolve() == Path(source.path).resolve():
            raise UserError(f"{out_dir}: writing the result over its own source would destroy it")

    def module_tensors(
        self,
        name: str,
        qtensor: QTensor,
        bias: torch.Tensor | None = None,
        branches: Sequence[torch.nn.Module] = (),
    ) -> dict[str, torch.Tensor]:
        """The tensors to store for one quantized layer: full name -> tensor.

        A bias keeps the source's storage dtype (see `kept_tensors`).
        """
        if tuple(qtensor.shape) != tuple(self.shapes[name]):
            raise ValueError(f"{name}: shape {qtensor.shape}, planned {self.shapes[name]}")
        tensors = self._store(name, qtensor, self.layers[name])
        if bias is not None:
            experts = len(qtensor.shape) == 3
            tensors |= self.kept_tensors({f"{name}_bias" if experts else f"{name}.bias": bias})
        for i, branch in enumerate(branches):
            tensors |= branch.state_dict(prefix=f"{name}.branches.{i}.")
        return tensors

    def kept_tensors(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Unquantized tensors as they are stored: matrices in the source's storage dtype (a GGUF
        source computes in float32 but stores float16), vectors such as norms and biases as read."""
        dtype = self.source.storage_dtype
        return {
            name: tensor.to(dtype) if tensor.is_floating_point() and tensor.ndim > 1 else tensor
            for name, tensor in tensors.items()
        }

    def shard_path(self, index: int) -> Path:
        """Where shard `index` (counted from 0) lies."""
        return self.out_dir / f"model-{index + 1:05d}-of-{self.n_shards:05d}.safetensors"

    def write_shard(self, index: int, tensors: Mapping[str, torch.Tensor]) -> Path:
        """Write one shard atomically: it is whole on disk when this returns."""
        self._begin()
        path = self.shard_path(index)
        ordered = {name: tensors[name].detach().contiguous() for name in sorted(tensors)}
        part = self.out_dir / PARTS / path.name
        with writing(path):
            part.parent.mkdir(exist_ok=True)
            save_file(ordered, part, metadata=SHARD_METADATA)
            # It comes out readable by its owner only; the marker has the mode of the user's files.
            part.chmod((self.out_dir / MARKER).stat().st_mode)
            _commit(part, path)
        return path

    def finish(self, metadata: Mapping[str, Any] | None = None) -> None:
        """Write index, posttrain.json (`metadata`), side files and config.json: now it is whole.

        Raises UserError when a shard is missing or a planned layer was never stored.
        """
        weight_map, total = self._collect()
        self._check_complete(weight_map)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(self.out_dir / INDEX, index)
        self.source.copy_side_files(self.out_dir)
        if metadata is not None:
            write_json(self.out_dir / "posttrain.json", dict(metadata))
        shutil.rmtree(self.out_dir / PARTS, ignore_errors=True)
        write_json(self.out_dir / CONFIG, self.config())
        (self.out_dir / MARKER).unlink(missing_ok=True)
        _sync_dir(self.out_dir)

    def config(self) -> dict[str, Any]:
        """The source's config with our dtype, architecture and quantization_config."""
        config: dict[str, Any] = json.loads(self.source.config.to_json_string(use_diff=True))
        for stale in ("quantization_config", "torch_dtype", "_name_or_path"):
            config.pop(stale, None)
        config["dtype"] = str(self.format.dtype or self.source.config.dtype).removeprefix("torch.")
        config["architectures"] = [type(self._model).__name__]
        schema = _SCHEMAS[self.format.name]
        config["quantization_config"] = schema.config(
            self.layers, self.shapes, self._model, self.kv
        )
        if self._tied is not None:  # no longer two names of one parameter
            config["tie_word_embeddings"] = False
        return config

    def written(self) -> Source:
        """What is stored so far, as a source; every shard must be there."""
        return _Written(self)

    def _choose_format(self) -> Format:
        found = choose_format(self.layers, self.shapes, self.kv)
        if self._tied is not None:
            return Format("posttrain", f"{self._tied[0]} is quantized and tied with the embedding")
        rebuilt = compressed_tensors.rebuilt_by_its_reader(self._model)
        if found.name == compressed_tensors.METHOD and rebuilt:
            return Format("posttrain", f"the reader of compressed-tensors rebuilds {rebuilt[0]}")
        return found

    def _begin(self) -> None:
        """Claim the directory before the first shard; an older config.json must not outlive it."""
        if (self.out_dir / MARKER).exists():
            return
        self.out_dir.mkdir(parents=True, exist_ok=True)
        ours = {self.shard_path(i).name for i in range(self.n_shards)}
        strangers = sorted({p.name for p in self.out_dir.glob("*.safetensors")} - ours)
        if strangers:
            raise UserError(
                f"{self.out_dir} already holds weights of another checkpoint "
                f"({shorten(strangers)}); choose an empty directory"
            )
        write_json(self.out_dir / MARKER, {"source": self.source.name, "shards": self.n_shards})
        for stale in (CONFIG, INDEX):
            (self.out_dir / stale).unlink(missing_ok=True)

    def _collect(self) -> tuple[dict[str, str], int]:
        weight_map: dict[str, str] = {}
        total = 0
        for index in range(self.n_shards):
            path = self.shard_path(index)
            if not path.exists():
                raise UserError(f"{path} is missing: the checkpoint is not complete")
            for name, stored in read_header(path).items():
                if name in weight_map:
                    raise UserError(f"{path}: {name} is also in {weight_map[name]}")
                weight_map[name] = path.name
                total += stored.nbytes
        return dict(sorted(weight_map.items())), total

    def _check_complete(self, weight_map: Mapping[str, str]) -> None:
        owners = {name.rpartition(".")[0] for name in weight_map}
        experts = {name.rpartition(storage.CODES_SUFFIX)[0] for name in weight_map}
        lost = [name for name in self.layers if name not in owners | experts]
        if lost:
            raise UserError(f"{self.out_dir}: no shard holds {shorten(lost)}")


class _Written(Source):
    """The shards of a checkpoint that has no config.json yet."""

    def __init__(self, writer: CheckpointWriter) -> None:
        config = writer.config()
        self.name = str(writer.out_dir)
        self.kind, self.path = "directory", writer.out_dir
        self.config = type(writer.source.config).from_dict(config)
        self.quantization_config = config["quantization_config"]
        stored: dict[str, StoredTensor] = {}
        for index in range(writer.n_shards):
            stored |= read_header(writer.shard_path(index))
        self._entries = {name: Entry(t.shape, t.dtype, t.read) for name, t in stored.items()}


def check_finished(path: Path) -> None:
    """UserError for a directory whose quantization was interrupted before `finish`."""
    if (path / MARKER).exists():
        raise UserError(
            f"{path}: unfinished: quantization was interrupted here; resume with the same "
            f"`posttrain quantize ... -o {path}` command"
        )


@contextmanager
def writing(path: Path, *also: type[Exception]) -> Iterator[None]:
    """UserError, which names `path`, where a file of an interruptible run cannot be written: most
    often the disk is full. `also`: what a writer raises besides OSError and SafetensorError."""
    expected: tuple[type[Exception], ...] = (OSError, SafetensorError, *also)
    try:
        yield
    except expected as error:
        raise UserError(
            f"{path}: cannot be written: {one_line(error)}; make room, and the same command "
            "goes on where it stopped"
        ) from error


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON atomically, with a fixed layout so that equal data gives equal bytes."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _commit(part, path)


def _commit(part: Path, path: Path) -> None:
    with part.open("rb") as stream:
        os.fsync(stream.fileno())
    part.replace(path)
    _sync_dir(path.parent)


def _sync_dir(path: Path) -> None:
    """Make renames durable; not every platform can open a directory."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class _Schema:
    """The two functions a checkpoint format needs for writing."""

    store: Callable[[str, QTensor, LayerPlan], dict[str, torch.Tensor]]
    config: Callable[..., dict[str, Any]]


_SCHEMAS = {
    "compressed-tensors": _Schema(compressed_tensors.store, compressed_tensors.quantization_config),
    "posttrain": _Schema(native.store, native.quantization_config),
}
