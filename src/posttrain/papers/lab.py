"""What experiments share: the model, the texts, variants of the model, paired scores.

Everything is measured on tokens of the embedded texts that no calibration saw, and as a difference
to the unchanged model on the same tokens, with its interval over windows of text.
"""

import copy
import hashlib
import io
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from tqdm import tqdm

from posttrain.data import load_text, token_windows
from posttrain.data.text import Split
from posttrain.evaluate.divergence import TopTarget
from posttrain.evaluate.pairing import pair
from posttrain.evaluate.score import Scorer, Scores, Target, vocabulary
from posttrain.evaluate.windows import Windows
from posttrain.kernels import Sampling
from posttrain.lm.engine import continuations, engine
from posttrain.models.linear import QuantLinear
from posttrain.models.plan import LayerPlan
from posttrain.models.rotation import rotate
from posttrain.models.walk import decoder_blocks, quantizable
from posttrain.numbers import QTensor, Spec, quantize
from posttrain.quantize.calibration import MomentCollector
from posttrain.quantize.solvers import GPTQ, Problem

TOP = 25  # tokens of the reference that KL looks at, and one bucket for the rest

Solve = Callable[[str, Tensor, Spec], QTensor]
Beside = Callable[[str, Tensor], list[nn.Module]]


@dataclass(frozen=True)
class Reference:
    """The scores of an unchanged model and, batch by batch, what KL needs of its logits."""

    scores: Scores
    targets: list[list[Target]]


@dataclass
class Lab:
    """A workplace for one experiment.

    quick: a small share of the text and of the variants, for tests: two minutes at most.
    partial: file in which finished steps are kept, so that an interrupted experiment continues.
    progress, name, steps: whether to show a bar, of what, and how many steps there were last time.
    """

    quick: bool = False
    partial: Path | None = None
    progress: bool = True
    name: str = "experiment"
    steps: int | None = None
    _done: dict[str, Any] = field(default_factory=dict)
    _before: float = 0.0  # seconds of runs that were interrupted, up to their last finished step
    _began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.partial is not None and self.partial.is_file():
            kept = json.loads(self.partial.read_text(encoding="utf-8"))
            self._done, self._before = kept["steps"], kept["seconds"]
        self._bar = tqdm(
            desc=self.name,
            total=self.steps,
            initial=len(self._done),
            unit="step",
            file=sys.stderr,
            disable=not self.progress,
        )

    def close(self) -> None:
        """End the bar."""
        self._bar.close()

    @property
    def seconds(self) -> float:
        """Time the experiment has taken, interrupted runs included."""
        return self._before + time.monotonic() - self._began

    def pick(self, full: Any, quick: Any) -> Any:
        """The size of something in a full and in a quick run."""
        return quick if self.quick else full

    def step(self, name: str, compute: Callable[..., Any], *given: Any) -> Any:
        """The JSON value of a part of the experiment, `compute(*given)`, or what an interrupted run
        found it to be."""
        if name not in self._done:
            began = time.monotonic()
            self._bar.set_postfix_str(name)
            self._done[name] = json.loads(json.dumps(compute(*given)))
            self._bar.update()
            if self.progress:
                self._bar.write(f"  {name} ({time.monotonic() - began:.0f} s)", file=sys.stderr)
            if self.partial is not None:
                self.partial.parent.mkdir(parents=True, exist_ok=True)
                fresh = self.partial.with_suffix(".new")
                kept = {"seconds": self.seconds, "steps": self._done}
                fresh.write_text(json.dumps(kept), encoding="utf-8")
                fresh.replace(self.partial)
        return self._done[name]

    # ------------------------------------------------------------------------- model and texts

    @cached_property
    def demo(self) -> Any:
        """SmolLM2-135M-Instruct in float32. Its weights come from a 4-bit grid with groups of 32, so
        it says nothing of formats of 4 bits and fewer."""
        from posttrain.models.load import load

        return load("demo", dtype="float32").eval()

    @cached_property
    def pico(self) -> Any:
        """The small model of this package in float32. Its weights never were on a grid of few bits."""
        from posttrain.models.load import load

        return load("pico", dtype="float32").eval()

    def copy(self, model: Any) -> Any:
        """A model that can be changed for good."""
        made = copy.deepcopy(model)
        made.tokenizer = model.tokenizer
        return made

    def windows(
        self,
        model: Any,
        windows: int = 16,
        window: int = 512,
        corpus: str | None = None,
        split: Split = "evaluation",
    ) -> Windows:
        """Of an embedded text; a quick run takes 4 of 256 tokens."""
        count, size = self.pick((windows, window), (4, 256))
        text = load_text(corpus, split)
        return Windows.cut(text, model.tokenizer, size, max_tokens=count * size)

    def calibration(
        self, model: Any, windows: int = 8, window: int = 512, corpus: str | None = None
    ) -> Tensor:
        """Token ids [windows, window] of the embedded calibration text."""
        count, size = self.pick((windows, window), (2, 256))
        text = load_text(corpus, "calibration")
        return token_windows(text, model.tokenizer, size, max_windows=count)

    @property
    def finished(self) -> set[str]:
        """Names of the steps that need not be computed again."""
        return set(self._done)

    # -------------------------------------------------------------------------------- variants

    def linears(self, model: Any) -> dict[str, nn.Linear]:
        """The linear layers of the decoder blocks by their full names."""
        names = [name for block in decoder_blocks(model) for name in quantizable(*block)]
        return {name: model.get_submodule(name) for name in names}

    @contextmanager
    def quantized(
        self,
        model: Any,
        layers: Mapping[str, LayerPlan],
        solve: Solve | None = None,
        beside: Beside | None = None,
    ) -> Iterator[Any]:
        """The model with these layers quantized, for the time of the context.

        solve: (name, weight, format) to the codes; None rounds to nearest. beside: (name, what
        quantization lost of the weight) to branches.
        """
        originals = {name: model.get_submodule(name) for name in layers}
        try:
            for name, layer in layers.items():
                assert layer.weight is not None
                weight = originals[name].weight.detach()
                weight = rotate(weight) if layer.rotate else weight
                codes = (
                    solve(name, weight, layer.weight) if solve else quantize(weight, layer.weight)
                )
                branches = beside(name, weight - codes.dequantize()) if beside else None
                made = QuantLinear.from_qtensor(
                    codes, layer, originals[name].bias, branches=branches
                )
                made.resident = "dequantized"
                model.set_submodule(name, made)
            yield model
        finally:
            for name, original in originals.items():
                model.set_submodule(name, original)

    @contextmanager
    def recipe(self, model: Any, recipe: Mapping[str, Any]) -> Iterator[Any]:
        """The model as `posttrain quantize` makes it by a recipe; what it says of itself is
        `.made`."""
        from posttrain.models.load import load
        from posttrain.quantize import quantize as make

        with TemporaryDirectory() as folder:
            source, out, file = (Path(folder) / name for name in ("model", "out", "recipe.yaml"))
            model.save_pretrained(source)
            model.tokenizer.save_pretrained(source)
            file.write_text(yaml.safe_dump(dict(recipe)), encoding="utf-8")
            with _quietly():
                made = make(source, recipe=file, out=out, progress=False)
                found = load(out, dtype="float32", resident="dequantized")
            found.made = made
            yield found

    @contextmanager
    def altered(
        self, model: Any, change: Mapping[str, Callable[[Tensor], Tensor]]
    ) -> Iterator[Any]:
        """The model with the inputs of these layers changed, for the time of the context."""

        def hook(how: Callable[[Tensor], Tensor]) -> Any:
            return lambda module, args: (how(args[0]), *args[1:])

        handles = [
            model.get_submodule(name).register_forward_pre_hook(hook(how))
            for name, how in change.items()
        ]
        try:
            yield model
        finally:
            for handle in handles:
                handle.remove()

    @torch.inference_mode()
    def inputs(self, model: Any, names: Iterable[str], tokens: Tensor) -> dict[str, Tensor]:
        """What these layers see of token ids [windows, window]: [tokens, in] each."""
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[Tensor], Tensor]:
            def look(x: Tensor) -> Tensor:
                seen[name] = x.reshape(-1, x.shape[-1]).clone()
                return x

            return look

        with self.altered(model, {name: keep(name) for name in names}):
            model(input_ids=tokens, use_cache=False)
        return seen

    @torch.inference_mode()
    def gptq(self, model: Any, tokens: Tensor) -> Solve:
        """GPTQ of layers by what the unchanged model feeds them on token ids [windows, window]."""
        collector = MomentCollector(self.linears(model))
        for window in tokens:
            with collector.listening():
                model(input_ids=window[None], use_cache=False)

        def solve(name: str, weight: Tensor, form: Spec) -> QTensor:
            return GPTQ(damping=0.1).solve(Problem(weight, form, collector.of(name)))

        return solve

    def greedy(self, model: Any, prompts: list[list[int]], length: int) -> list[list[int]]:
        """The likeliest continuations of prompts, `length` tokens each."""
        written: list[list[int]] = [[] for _ in prompts]
        steps = continuations(engine(model), prompts, [Sampling()] * len(prompts))
        for index, token, stop in steps:
            written[index].append(token)
            if len(written[index]) == length:
                stop()
        return written

    # --------------------------------------------------------------------------------- scoring

    @torch.inference_mode()
    def logits(self, model: Any, tokens: Tensor) -> Tensor:
        """Float32 [tokens, vocabulary] after every token of one window [1, window]."""
        runner = engine(model)
        return runner.forward([(runner.session(tokens.shape[1], "fp32"), tokens[0].tolist())], None)

    def reference(self, model: Any, windows: Windows) -> Reference:
        """Score the unchanged model."""
        scorer = Scorer(model, "the reference", windows)
        keep = lambda logits, partition: TopTarget.of(logits, partition, TOP)
        targets = [scorer(batch, keep=keep) for batch in windows.batches(vocabulary(model))]
        return Reference(scorer.scores(), targets)

    def against(self, reference: Reference, model: Any, windows: Windows) -> dict[str, Any]:
        """`delta_nll` (nats per token, above 0: worse), `ci_low`, `ci_high`, `kl` of a variant."""
        scorer = Scorer(model, "the variant", windows, against=True)
        batches = windows.batches(vocabulary(model))
        for batch, targets in zip(batches, reference.targets, strict=True):
            scorer(batch, targets)
        found = pair("reference", "variant", reference.scores, scorer.scores())
        kept = ("delta_nll", "ci_low", "ci_high", "kl", "kl_ci_low", "kl_ci_high")
        return {name: found[name] for name in kept}


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what verbs say on standard error: an experiment has one line for each step."""
    with redirect_stderr(io.StringIO()):
        yield


def signed(found: Mapping[str, Any], digits: int = 4) -> str:
    """A paired difference with its interval, as a catalogue shows it."""
    low, high = found["ci_low"], found["ci_high"]
    ends = "" if low is None else f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"{found['delta_nll']:+.{digits}f}{ends}"


def rank_correlation(x: Iterable[float], y: Iterable[float]) -> float:
    """Spearman's: the correlation of ranks, ties sharing theirs."""
    ranks = []
    for values in (torch.tensor(list(x)).double(), torch.tensor(list(y)).double()):
        below = (values[:, None] > values).sum(1).double()
        ranks.append(below + ((values[:, None] == values).sum(1) - 1) / 2)
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def fingerprint(*parts: Any) -> str:
    """Of what an experiment depends on: a partial run of anything else is not continued."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
