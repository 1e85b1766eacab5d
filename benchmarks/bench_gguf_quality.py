"""What llama.cpp's types and our recipes cost in quality, at how many bits: one run, paired.

    pip install llama-cpp-python
    python benchmarks/bench_gguf_quality.py [MODEL ...] [--recipe FILE ...] [--windows 128] [--quick]

For each model (default: demo and pico) writes results/gguf-quality-MODEL.json. `rows` pairs
everything with the full-precision model on the embedded evaluation text; `duels` sets each recipe
of ours beside each type of the same width, on the same tokens again, so that the interval is that
of their difference. FILEs are recipes to be measured beside those named here.

llama.cpp quantizes and computes itself: its losses come from its own kernels, which round
activations to INT8 in groups of 32 or 256, so a row of its 16-bit type says what its engine alone
changes. `imatrix` marks types that saw the importance of each channel, over the text that our
solvers are calibrated on. Bits are counted alike: the bytes of all tensors, over all weights.

The weights of `demo` came from a 4-bit grid, so only wider types are compared on it.
"""

import argparse
import ctypes
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from bench_recipes import WORK
from common import run_json, verdict, write_result

from posttrain.bench.contenders import LlamaCpp
from posttrain.bench.gguf_peer import gguf_of
from posttrain.cli.doctor import version
from posttrain.data import load_text, token_windows
from posttrain.errors import UserError
from posttrain.evaluate.divergence import FullTarget
from posttrain.evaluate.pairing import pair
from posttrain.evaluate.perplexity import describe_text, mean_over_windows
from posttrain.evaluate.score import Scorer, Scores, vocabulary
from posttrain.evaluate.windows import Windows
from posttrain.models.load import load
from posttrain.models.walk import decoder_blocks, quantizable
from posttrain.quantize.recipe import load_recipe

MODELS = ("demo", "pico")
WIDTHS = {"demo": (6, 8)}  # of the rest, all
WINDOW = {"demo": 512}  # of the rest, 256: what pico was trained on
TYPES = {  # width -> llama.cpp's types; the first of each model is what its engine alone changes
    16: ("F16",),
    8: ("Q8_0",),
    6: ("Q6_K",),
    4: ("Q4_0", "Q4_K_S", "Q4_K_M"),
}
WITH_IMPORTANCE = ("Q4_K_S", "Q4_K_M")
BATCH = 512  # tokens that llama.cpp is fed at once
CALIBRATION_TOKENS = 128 * 512
KEYS = ("delta_nll", "ci_low", "ci_high", "kl", "kl_ci_low", "kl_ci_high", "greedy_agreement")

PER_TOKEN, PER_32 = "int8h | fp32/row", "int8h | fp32/g32"
GPTQ = {"name": "gptq", "damping": 0.1, "clip": "mse", "sweeps": 8}


def _whole(name: str, weight: str, solver: dict[str, Any], **rule: Any) -> dict[str, Any]:
    """A recipe for every weight of a model: these linears, and a 6-bit head and embedding."""
    head = {"match": "lm_head", "weight": "int6 | fp16/g32"}
    if "input" in rule:
        head["input"] = PER_32
    return {
        "name": name,
        "layers": [{"match": "*", "weight": weight} | rule, head],
        "transform": {"name": "smooth", "alpha": 0.5} if "input" in rule else "none",
        "solver": solver,
        "calibration": {"samples": 128, "window": 512},
    }


# Shipped recipes by name, others as their file would say it. `w6a8`, 8-bit head: more bits than Q6_K.
SHIPPED = ("w8a8", "w6a8", "w6a16", "w4", "w4a8", "w4a16")
RECIPES: dict[str, Any] = {name: name for name in SHIPPED} | {
    made["name"]: made
    for made in (
        _whole("w6a8-head6", "int6h | fp16/g64", GPTQ, input=PER_TOKEN, rotate=True),
        _whole("w4-g64", "int4 | fp16/g64", GPTQ),
        _whole("w4-zero-g64", "int4z | fp16/g64", GPTQ),
        _whole("w4-g32", "int4 | fp16/g32", GPTQ),
        _whole("nf4-g32", "nf4 | fp16/g32", GPTQ),
        _whole("w4-g64-global", "int4 | fp16/g64", {"name": "zq-global", "clip": "mse"}),
    )
}


@dataclass
class Entry:
    """One thing that is scored: what it is called, how wide it is, and what is known of it."""

    name: str
    engine: str
    width: int
    facts: dict[str, Any]
    scorer: Scorer
    scores: Scores = field(init=False)


class LlamaScorer(LlamaCpp):
    """llama.cpp with the logits of every position, as `Scorer` asks its engines for them."""

    name = "llama.cpp"

    def window_logits(self, windows: torch.Tensor, count: int, rows: int) -> Iterator[torch.Tensor]:
        for window in windows:
            self._forget()
            parts = [self._logits(part, start) for start, part in _batches(window.tolist())]
            yield from torch.cat(parts)[-count:-1].split(rows)

    def _logits(self, tokens: list[int], start: int) -> torch.Tensor:
        batch = self.c.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, start + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
        failed = self.c.llama_decode(self.context, batch)
        self.c.llama_batch_free(batch)
        if failed:
            raise UserError("llama.cpp refused a batch")
        count = len(tokens) * self.vocabulary
        address = ctypes.addressof(self.c.llama_get_logits(self.context).contents)
        values = (ctypes.c_float * count).from_address(address)
        return torch.frombuffer(values, dtype=torch.float32).view(-1, self.vocabulary).clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--recipe", action="append", default=[], metavar="FILE")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--quick", action="store_true", help="few windows; writes no result")
    args = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    extra = {Path(file).stem: file for file in args.recipe}
    for model in args.models:
        figures = measure(model, RECIPES | extra, 2 if args.quick else args.windows, args.quick)
        if args.quick:
            print(json.dumps(figures, indent=1))
        else:
            write_result(f"gguf-quality-{Path(model).name}", figures)


def measure(model: str, recipes: dict[str, Any], count: int, quick: bool) -> dict[str, Any]:
    """Everything about one model: rows, duels, text."""
    size, widths = WINDOW.get(model, 256), WIDTHS.get(model, (4, 6, 8))
    reference = load(model, dtype="float32")
    windows = Windows.cut(
        load_text(None, "evaluation"), reference.tokenizer, size, max_tokens=size * count
    )
    entries = [_ours(name, recipe, model, windows, quick) for name, recipe in recipes.items()
               if _width(recipe) in widths]  # fmt: skip
    entries += _theirs(model, (16, *widths), reference, windows, quick)
    unquantized = _score(reference, entries, windows)
    rows = []
    for entry in entries:
        found = pair(model, entry.name, unquantized, entry.scores)
        facts = {"what": entry.name, "engine": entry.engine, "width": entry.width}
        rows.append(facts | entry.facts | {key: found[key] for key in KEYS})
    return {
        "model": model,
        "rows": rows,
        "duels": [_duel(a, b) for a in entries for b in entries
                  if (a.engine, b.engine) == ("posttrain", "llama.cpp") and a.width == b.width],
        "nll": float(unquantized.nll.double().nanmean()),
        "text": describe_text(load_text(None, "evaluation"), windows),
        "window": size,
        "windows": len(windows),
        "peer": {"llama_cpp_python": version("llama_cpp_python")},
    }  # fmt: skip


def _width(recipe: Any) -> int:
    return load_recipe(_file(recipe)).plan.rules[0].weight.bits


def _file(recipe: Any) -> str:
    """Name or path of a recipe; one that is given in words is written down first."""
    if isinstance(recipe, str):
        return recipe
    path = WORK / f"gguf-quality-{recipe['name']}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return str(path)


def _ours(name: str, recipe: Any, model: str, windows: Windows, quick: bool) -> Entry:
    settings = load_recipe(_file(recipe))
    out = WORK / f"gguf-quality-{Path(model).name}-{name}"
    words = ["quantize", model, "--recipe", _file(recipe), "-o", str(out), "--overwrite"]
    if settings.calibrated:  # as many tokens as it says, in windows the model knows
        tokens = settings.calibration.samples * settings.calibration.window
        samples = 2 if quick else tokens // windows.window
        words += ["--window", str(windows.window), "--samples", str(samples)]
    result = run_json(*words)
    made = load(out, dtype="float32")
    facts = {
        "bits_per_weight": result["bits_per_weight"],
        "bytes": result["bytes"],
        "seconds": result["seconds"],
        "solver": result["recipe"]["solver"]["name"],
        "weights": [rule["weight"] for rule in result["recipe"]["layers"]],
    }
    return Entry(name, "posttrain", _width(recipe), facts, Scorer(made, name, windows, True))


def _theirs(
    model: str, widths: Sequence[int], reference: Any, windows: Windows, quick: bool
) -> list[Entry]:
    folder = WORK / f"gguf-quality-{Path(model).name}"
    folder.mkdir(exist_ok=True)
    importance = None
    if 4 in widths:
        tokens = 2 * windows.window if quick else CALIBRATION_TOKENS
        importance = channel_importance(model, windows.window, tokens // windows.window)
    entries = []
    for width in widths:
        for kind in TYPES[width]:
            entries.append(_llama(kind, width, gguf_of(model, kind, folder), reference, windows))
            if kind in WITH_IMPORTANCE:
                made = gguf_of(model, kind, folder, importance)
                entries.append(_llama(f"{kind} imatrix", width, made, reference, windows))
    return entries


def _llama(name: str, width: int, file: Path, reference: Any, windows: Windows) -> Entry:
    engine = LlamaScorer(str(file), torch.get_num_threads(), "fp16")
    if engine.vocabulary != vocabulary(reference):
        raise UserError(f"{file}: {engine.vocabulary} logits, not {vocabulary(reference)}")
    name = f"llama.cpp {name}"
    # The model only says how many logits there are; the engine computes.
    scorer = Scorer(reference, name, windows, True, runner=engine)
    return Entry(name, "llama.cpp", width, stored(file), scorer)


def stored(file: Path) -> dict[str, Any]:
    """Bytes of all tensors of a GGUF file, bits per weight, and how many tensors are of which type.

    The vocabulary and the header are left out, as they are for our checkpoints.
    """
    from gguf import GGUFReader

    tensors = GGUFReader(str(file)).tensors
    size = sum(int(t.n_bytes) for t in tensors)
    names = [t.tensor_type.name for t in tensors if len(t.shape) > 1]
    return {
        "bits_per_weight": 8 * size / sum(int(t.n_elements) for t in tensors),
        "bytes": size,
        "types": {name: names.count(name) for name in sorted(set(names))},
    }


def channel_importance(model: str, window: int, count: int) -> dict[str, torch.Tensor]:
    """Mean square of each input channel of every linear in the blocks, by name, over `count`
    windows of the embedded calibration text."""
    found = load(model, dtype="float32")
    tokens = token_windows(
        load_text(None, "calibration"), found.tokenizer, window, max_windows=count
    )
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def add(module: Any, args: Any) -> None:
            squares = args[0].reshape(-1, args[0].shape[-1]).square().sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

        return add

    names = [name for block, module in decoder_blocks(found) for name in quantizable(block, module)]
    handles = [found.get_submodule(n).register_forward_pre_hook(hook(n)) for n in names]
    with torch.inference_mode():
        for batch in tokens.split(4):
            found(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: value / tokens.numel() for name, value in sums.items()}


def _score(reference: Any, entries: list[Entry], windows: Windows) -> Scores:
    """The reference's scores; those of the entries are put into them, batch by batch."""
    from tqdm import tqdm

    own = Scorer(reference, "reference", windows)
    for batch in tqdm(list(windows.batches(vocabulary(reference))), unit="batch"):
        targets = own(batch, keep=FullTarget)
        for entry in entries:
            entry.scorer(batch, list(targets))
    for entry in entries:
        entry.scores = entry.scorer.scores()
    return own.scores()


def _duel(ours: Entry, theirs: Entry) -> dict[str, Any]:
    """Our recipe less their type, on the same tokens; negative: ours predicts better."""
    difference = ours.scores.nll.double() - theirs.scores.nll.double()
    (delta,) = mean_over_windows([difference])
    fewer = ours.facts["bits_per_weight"] <= theirs.facts["bits_per_weight"]
    return {
        "ours": ours.name,
        "theirs": theirs.name,
        "width": ours.width,
        "bits": ours.facts["bits_per_weight"],
        "their_bits": theirs.facts["bits_per_weight"],
        "delta_nll": delta.mean,
        "ci_low": delta.low,
        "ci_high": delta.high,
        "verdict": f"{verdict(delta.low, delta.high)}, {'no more' if fewer else 'more'} bits",
    }


def _batches(tokens: list[int]) -> Iterator[tuple[int, list[int]]]:
    for start in range(0, len(tokens), BATCH):
        yield start, tokens[start : start + BATCH]


if __name__ == "__main__":
    main()
