"""Write quantized checkpoints of tiny models by rounding to nearest, for tests of the formats."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from posttrain.models.checkpoint import CheckpointWriter
from posttrain.models.experts import stored_shape
from posttrain.models.plan import Plan
from posttrain.models.rotation import rotate
from posttrain.models.source import Source, open_source
from posttrain.models.walk import decoder_blocks, quantizable, skeleton
from posttrain.numbers import quantize

# Sizes that groups of 32, 64 and 128 divide.
CONFIG = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attention_bias": True,
    "tie_word_embeddings": True,
}


def rules(weight: str, inputs: str | None = None, ignore: tuple[str, ...] = ()) -> Plan:
    """One rule for all layers; experts get it without its input."""
    layers = [{"match": "*", "weight": weight, "input": inputs}]
    if inputs is not None:
        layers.append({"match": "*.experts.*", "weight": weight})
    return Plan.from_dict({"layers": layers, "ignore": list(ignore)})


def save_llama(folder: Path, dtype: str = "float32", seed: int = 0, **changes: Any) -> Path:
    """A Llama with random weights, norms and biases."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**{**CONFIG, "dtype": dtype, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.1 + (1.0 if parameter.dim() == 1 else 0.0))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def writer_for(
    model: str | Path | Source, out: Path, plan: Plan
) -> tuple[CheckpointWriter, dict[int, Any]]:
    """A writer, and the tensors of each of its shards."""
    source = model if isinstance(model, Source) else open_source(model)
    blocks = decoder_blocks(skeleton(source.config))
    targets = {k: t for name, block in blocks for k, t in quantizable(name, block).items()}
    layers = plan.resolve(targets)
    shapes = {name: stored_shape(t.shape, t.transposed) for name, t in targets.items()}
    writer = CheckpointWriter(out, source, layers, shapes, len(blocks) + 1, plan.kv)
    left = source.tensor_names()
    shards = []
    for block, _ in blocks:
        own = [name for name in left if name.startswith(f"{block}.")]
        left = [name for name in left if name not in own]
        tensors, stored = source.read(own), {}
        for name in [n for n in layers if n.startswith(f"{block}.")]:
            target = targets[name]
            weight = tensors.pop(target.parameters["weight"])
            weight = weight.transpose(-1, -2).contiguous() if target.transposed else weight
            bias = tensors.pop(target.parameters["bias"]) if "bias" in target.parameters else None
            weight = rotate(weight) if layers[name].rotate else weight
            stored |= writer.module_tensors(name, quantize(weight, layers[name].weight), bias)
        shards.append(stored | writer.kept_tensors(tensors))
    shards.append(writer.kept_tensors(source.read(left)))
    return writer, dict(enumerate(shards))


def write(model: str | Path, out: Path, plan: Plan) -> CheckpointWriter:
    """Quantize by rounding and write the whole checkpoint."""
    writer, shards = writer_for(model, out, plan)
    for index, tensors in shards.items():
        writer.write_shard(index, tensors)
    writer.finish({"note": "written by a test"})
    return writer


def tokens() -> torch.Tensor:
    return torch.randint(3, 96, (2, 17), generator=torch.Generator().manual_seed(7))


SCRIPT = """
import sys, torch
{imports}
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
tokens = load_file(sys.argv[1])["tokens"]
logits, errors = {{}}, {{}}
for path in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        logits[path] = model(tokens).logits
save_file(logits, sys.argv[2])
assert ("posttrain" in sys.modules) == {ours}
"""


def logits_in_fresh_process(
    paths: list[Path], folder: Path, imports: str = ""
) -> dict[str, torch.Tensor]:
    """Logits of plain `AutoModelForCausalLM.from_pretrained` for each checkpoint, by path."""
    from safetensors.torch import load_file, save_file

    save_file({"tokens": tokens()}, folder / "tokens.safetensors")
    script = SCRIPT.format(imports=imports, ours="posttrain" in imports)
    command = [sys.executable, "-c", script, folder / "tokens.safetensors", folder / "logits"]
    command = [*map(str, command), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "logits")


def read_config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found
