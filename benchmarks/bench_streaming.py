"""Stream a random checkpoint of Llama-3.2-1B's shape through RTN INT6: peak memory and time.

    python benchmarks/bench_streaming.py

Writes results/streaming-1b.json. Needs 4 GB of disk under build/. The peak is that of the whole
process less what a process holds that has imported the same libraries.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from common import ROOT, run_json, write_result
from safetensors.torch import save_file

SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
}
RECIPE = """
layers: [{match: "*", weight: int6 | fp16/g64, input: int8h | fp32/row}]
ignore: [lm_head]
solver: rtn
"""
BASELINE = """
import psutil, torch, posttrain.quantize
from transformers import AutoConfig, AutoModelForCausalLM
with torch.device("meta"):
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("{model}"))
print(psutil.Process().memory_info().rss)
"""
WORK = ROOT / "build" / "bench"


def main() -> None:
    model, out, recipe = WORK / "random-1b", WORK / "random-1b-w6", WORK / "w6.yaml"
    build(model)
    recipe.write_text(RECIPE)
    words = ["quantize", str(model), "--recipe", str(recipe), "-o", str(out), "--overwrite"]
    result = run_json(*words)
    code = BASELINE.format(model=model)
    interpreter = int(subprocess.check_output([sys.executable, "-c", code], text=True))
    row = {
        "model": "random weights, Llama-3.2-1B's shape, bfloat16",
        "source_gib": result["bytes_total"] / 2**30,
        "bits_per_weight": result["bits_per_weight"],
        "seconds": result["seconds"],
        "peak_gib": result["peak_rss_bytes"] / 2**30,
        "interpreter_gib": interpreter / 2**30,
        "above_interpreter_gib": (result["peak_rss_bytes"] - interpreter) / 2**30,
        "predicted_over_measured": result["predicted_peak_bytes"] / result["peak_rss_bytes"],
    }
    write_result("streaming-1b", {"rows": [row]})
    shutil.rmtree(out)
    shutil.rmtree(model)


def build(folder: Path) -> None:
    """Write the checkpoint shard by shard, one decoder block each, so that memory stays small."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**SHAPE, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, list[tuple[str, torch.Size]]] = {}
    for name, parameter in model.named_parameters():
        block = name.split(".")[2] if ".layers." in name else "outside"
        shards.setdefault(block, []).append((name, parameter.shape))
    weight_map = {}
    for index, tensors in enumerate(shards.values(), start=1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        data = {
            name: torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
            for name, shape in tensors
        }
        save_file(data, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(data, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    main()
