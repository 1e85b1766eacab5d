"""Quantizers of others, each run by the Python of its own environment; bench_quantizers.py calls it.

    PEER_PYTHON benchmarks/quantizer_peers.py JOB.json

A job is `{"model": folder, "tokens": file, "out": folder, "recipe": name}`: the checkpoint to
quantize, calibration windows (`tokens` in a safetensors file, int64 [windows, window]), where the
result goes, and one of RECIPES. Prints `{"seconds": of quantizing and saving, "versions": {...}}`.
Without a job it only imports what it would use. Imports nothing of posttrain.
"""

import json
import sys
import time
from importlib.metadata import version
from typing import Any

# Whatever libraries print must not stand between the answer and its reader.
OUT, sys.stdout = sys.stdout, sys.stderr

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file
from torch.utils.data import DataLoader

PACKAGES = ("llmcompressor", "compressed-tensors", "transformers", "torch")
W4G64 = {
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64},
        }
    },
    "ignore": ["lm_head"],
}  # fmt: skip
W8A8 = {"targets": "Linear", "scheme": "W8A8", "ignore": ["lm_head"]}
# As llm-compressor's own examples have them; what is not named is its default.
RECIPES: dict[str, Any] = {
    "w4 rtn": lambda: QuantizationModifier(**W4G64),
    "w4 gptq": lambda: GPTQModifier(**W4G64),
    "w4 smoothquant gptq": lambda: [
        SmoothQuantModifier(smoothing_strength=0.5),
        GPTQModifier(**W4G64),
    ],
    "w4 awq": lambda: [AWQModifier(), QuantizationModifier(**W4G64)],
    "w8a8 rtn": lambda: QuantizationModifier(**W8A8),
    "w8a8 smoothquant gptq": lambda: [
        SmoothQuantModifier(smoothing_strength=0.8),
        GPTQModifier(**W8A8),
    ],
}


def main(path: str) -> None:
    with open(path, encoding="utf-8") as read:
        job = json.load(read)
    if not torch.accelerator.is_available():
        # AWQ pins its cache in memory, for copies to an accelerator, and ends without one.
        IntermediatesCache.pin_memory = lambda *args, **options: None  # type: ignore[method-assign]
    windows = load_file(job["tokens"])["tokens"]
    begun = time.monotonic()
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in windows]
    oneshot(
        model=job["model"],
        recipe=RECIPES[job["recipe"]](),
        dataset=DataLoader(rows, batch_size=1),  # type: ignore[arg-type]
        num_calibration_samples=len(rows),
        max_seq_length=windows.shape[1],
        output_dir=job["out"],
    )
    seconds = time.monotonic() - begun
    versions = {name: version(name) for name in PACKAGES}
    print(json.dumps({"seconds": seconds, "versions": versions}), file=OUT)


if __name__ == "__main__":
    if sys.argv[1:]:
        main(sys.argv[1])
