"""Train the small model whose weights never were on a 4-bit grid, from nothing.

    python benchmarks/train_pico.py src/posttrain/models/pico

A Llama of six blocks, 256 wide, with its own 4,096 tokens, on the sources of Python's standard
library (without its tests) and on the embedded calibration texts; the embedded evaluation text is
left out. An interrupted run continues. Takes three quarters of an hour on two cores.
"""

import json
import math
import sys
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from posttrain.data import load_text

STEPS, BATCH, WINDOW, WARMUP = 3000, 16, 256, 100
RATE, LOWEST = 2e-3, 1e-4
END = "<|end|>"
OWN_TEXT = 4  # times that the calibration texts are read for each time the library is
SKIPPED = {"test", "tests", "idle_test", "site-packages", "lib2to3", "__pycache__", "pydoc_data"}
CONFIG = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


def documents() -> list[str]:
    """The training texts. pydoc_data is left out: it holds the evaluation text."""
    library = Path(sysconfig.get_path("stdlib"))
    found = [
        path.read_text(encoding="utf-8", errors="ignore")
        for path in sorted(library.rglob("*.py"))
        if not SKIPPED & set(path.relative_to(library).parts)
        # Tables of characters are no text.
        and path.parent.name != "encodings"
    ]
    own = load_text(None, "calibration").render()
    return [text for text in found if text.strip()] + OWN_TEXT * own


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, CONFIG["vocab_size"], special_tokens=[END])
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token=END, pad_token=END, model_max_length=2048
    )


def rate_at(step: int) -> float:
    if step < WARMUP:
        return RATE * (step + 1) / WARMUP
    done = (step - WARMUP) / (STEPS - WARMUP)
    return LOWEST + (RATE - LOWEST) * 0.5 * (1 + math.cos(math.pi * done))


def batch(stream: Tensor, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(stream) - WINDOW - 1, (BATCH,), generator=generator)
    return stream[starts[:, None] + torch.arange(WINDOW + 1)]


def loss_of(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), tokens[:, 1:].reshape(-1)
    )


def train(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    texts = documents()
    tokenizer = make_tokenizer(texts)
    ids = [tokenizer(text, verbose=False)["input_ids"] + [0] for text in texts]
    stream = torch.tensor([token for document in ids for token in document])
    print(f"{len(texts)} documents, {len(stream)} tokens", flush=True)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    flat = [p for p in model.parameters() if p.ndim < 2]
    wide = [p for p in model.parameters() if p.ndim >= 2]
    groups = [{"params": wide, "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    state, first = out / "training.pt", 0
    if state.is_file():
        kept = torch.load(state)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        first = kept["step"]
    began, losses = time.monotonic(), []
    for step in range(first, STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step)
        loss = loss_of(model, batch(stream, step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if step % 50 == 49:
            seconds = (time.monotonic() - began) / (step + 1 - first)
            print(f"{step + 1} {sum(losses[-50:]) / 50:.4f} {seconds:.3f} s a step", flush=True)
        if step % 500 == 499:
            kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(kept | {"step": step + 1}, state)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    about = {"tokens": len(stream), "steps": STEPS, "loss": sum(losses[-50:]) / 50}
    (out / "training.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    train(Path(sys.argv[1]))
