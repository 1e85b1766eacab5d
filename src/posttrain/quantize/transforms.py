"""Function-preserving changes of a block that make it easier, or harder, to quantize.

For a linear y = W x and any positive d, one factor per input channel,

    W x = (W diag(d)) (x / d)

and x / d costs nothing at run time where x is made by something that can be divided instead: the
norm in front of q/k/v and of gate/up, and the rows of the up projection that a gated MLP multiplies
into the input of its down projection. Transforms differ in the d they take:

    smooth      d = rms(x)^alpha / absmax(W)^(1 - alpha)     rms over calibration tokens, absmax over
                rows of W. It moves the size of loud channels out of the input, where one scale serves
                all channels of a token. SmoothQuant (Xiao et al. 2022, arXiv:2211.10438) has
                absmax(x) in place of rms(x); a few massive tokens would dictate it.
    crossquant  d = absmax(x)^(1 - alpha), the column factor of CrossQuant (Liu et al. 2024,
                arXiv:2410.07505) made static, so that an integer product can use it.
    awq         d = mean|x|^alpha with the alpha in [0, 1] that loses least of the outputs once
                quantized: see `awq`.
    Outliers    d = 1/factor on a few channels: what large models have and small ones lack. For
                experiments only; no recipe asks for it.

A norm's weight is divided in the precision it is stored in, and d is what came out of that, so the
stored model is exactly the one that was measured.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from posttrain.errors import UserError, did_you_mean
from posttrain.models.plan import LayerPlan
from posttrain.models.walk import decoder_blocks, quantizable
from posttrain.quantize.awq import AWQ

# Leaf names (a, b) where b reads act(...) * a(...): dividing the rows of a divides the input of b.
GATED_LEAVES = (("up_proj", "down_proj"), ("w3", "w2"))
TOLERANCE = 1e-3  # relative change of a block's output that float32 arithmetic explains


@dataclass(frozen=True)
class Channels:
    """What is known of each input channel [in] of linears that share their input: over calibration
    tokens its root mean square, largest and mean magnitude, over rows of the weights the second.

    inputs: some of the tokens, [tokens, in]. consumers: weight [out, in] and plan of each linear.
    """

    rms: torch.Tensor
    absmax: torch.Tensor
    weight_absmax: torch.Tensor
    mean: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    inputs: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    consumers: tuple[tuple[torch.Tensor, LayerPlan], ...] = ()


class Transform(Protocol):
    """How a factor per channel is chosen."""

    name: ClassVar[str]

    @property
    def samples(self) -> int:
        """Calibration windows it looks at, rounded up to whole batches (at most what the recipe
        draws)."""

    @property
    def kept(self) -> int:
        """Tokens of each of them that `Channels.inputs` should hold."""

    def factors(self, seen: Channels) -> torch.Tensor:
        """d [in], positive."""


@dataclass(frozen=True)
class Smooth:
    """Per-channel rescaling between linears and what feeds them.

    Args:
        alpha: 0 evens out the columns of the weight, 1 the channels of the input.
        samples: see `Transform`.
    """

    name: ClassVar[str] = "smooth"
    kept: ClassVar[int] = 0
    alpha: float = 0.5
    samples: int = 16

    def __post_init__(self) -> None:
        _check(self.alpha, self.samples)

    def factors(self, seen: Channels) -> torch.Tensor:
        """d [in], with geometric mean 1."""
        return _centred(self.alpha * _log(seen.rms) - (1 - self.alpha) * _log(seen.weight_absmax))


@dataclass(frozen=True)
class CrossQuant:
    """CrossQuant's column factor in the weights; its row factor is the scale of a token.

    Args:
        alpha: share of the row factor: 1 changes nothing, 0 evens out the channels of the input.
        samples: see `Transform`.
    """

    name: ClassVar[str] = "crossquant"
    kept: ClassVar[int] = 0
    alpha: float = 0.15
    samples: int = 16

    def __post_init__(self) -> None:
        _check(self.alpha, self.samples)

    def factors(self, seen: Channels) -> torch.Tensor:
        """d [in], with geometric mean 1."""
        return _centred((1 - self.alpha) * _log(seen.absmax))


@dataclass(frozen=True)
class Outliers:
    """`count` channels, evenly spaced, become `factor` times as loud in the input.

    Nothing else changes: what the block computes stays the same, and quantizing its inputs becomes
    as hard as in models whose channels are that uneven by themselves.
    """

    name: ClassVar[str] = "outliers"
    kept: ClassVar[int] = 0
    factor: float = 20.0
    count: int = 2
    samples: int = 1

    def channels(self, width: int) -> torch.Tensor:
        return (torch.arange(self.count) * 2 + 1) * width // (2 * self.count)

    def factors(self, seen: Channels) -> torch.Tensor:
        d = torch.ones_like(seen.rms)
        d[self.channels(len(d))] = 1 / self.factor
        return d


def _check(alpha: Any, samples: Any) -> None:
    number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if not number or not 0 <= alpha <= 1:
        raise UserError(f"alpha must be between 0 and 1; found {alpha!r}")
    count = isinstance(samples, int) and not isinstance(samples, bool)
    if not count or samples < 1:
        raise UserError(f"samples must be a positive whole number; found {samples!r}")


def _centred(logarithm: torch.Tensor) -> torch.Tensor:
    return (logarithm - logarithm.mean()).exp()


def _log(x: torch.Tensor) -> torch.Tensor:
    """Logarithm, with silent channels at a floor far below the mean."""
    return x.clamp_min(1e-5 * float(x.mean()) or 1.0).log()


TRANSFORMS: dict[str, type[Any]] = {cls.name: cls for cls in (Smooth, CrossQuant, AWQ)}


def make_transform(name: str, **options: Any) -> Transform:
    """The transform called `name` with its options checked; UserError with the nearest match."""
    if name not in TRANSFORMS:
        known_names = [*TRANSFORMS, "none"]
        raise UserError(f"unknown transform {name!r}{did_you_mean(name, known_names)}")
    known = TRANSFORMS[name].__dataclass_fields__
    for option in options:
        if option not in known:
            hint = did_you_mean(option, known) or f"; it has no option {option!r}"
            raise UserError(f"unknown option {option!r}{hint}")
    made: Transform = TRANSFORMS[name](**options)
    return made


@dataclass
class Fold:
    """What changes together: `producer` is divided by d, the columns of `consumers` multiplied.

    producer: full name of a norm, or of a linear whose rows are divided.
    energy, absmax, total: sum of squares, largest magnitude and sum of magnitudes of each channel
        that the consumers read, over `tokens` tokens.
    inputs: some of these, [.., in] each.
    """

    producer: str
    consumers: list[str]
    energy: torch.Tensor
    absmax: torch.Tensor
    total: torch.Tensor
    tokens: int = 0
    inputs: list[torch.Tensor] = field(default_factory=list)

    def see(self, x: torch.Tensor, kept: int) -> None:
        """Count x [batch, window, in], or [tokens, in]; keep `kept` tokens of each window."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
        self.energy += rows.square().sum(0)
        self.absmax = torch.maximum(self.absmax, rows.abs().amax(0))
        self.total += rows.abs().sum(0)
        self.tokens += rows.shape[0]
        if kept:
            some = x[..., :: max(1, x.shape[-2] // kept), :]
            self.inputs.append(some.reshape(-1, x.shape[-1]).to(torch.float32, copy=True))

    def parameters(self, model: nn.Module) -> list[str]:
        """Full names of the parameters it changes."""
        names = [f"{self.producer}.weight", *(f"{name}.weight" for name in self.consumers)]
        biased = _has_bias(model.get_submodule(self.producer))
        return names + ([f"{self.producer}.bias"] if biased else [])


@dataclass
class Smoothing:
    """A transform at work on one decoder block, whose modules are given by full name.

    A norm feeds a linear when the linear is called with the very tensor that the norm returned.
    """

    transform: Transform
    model: nn.Module
    modules: dict[str, nn.Module]
    layers: Mapping[str, LayerPlan] = field(default_factory=dict)
    folds: dict[str, Fold] = field(default_factory=dict)  # by producer
    _of: dict[str, Fold | None] = field(default_factory=dict)  # by consumer
    _made: dict[str, torch.Tensor] = field(default_factory=dict)  # by norm, in the first forward

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Learn from every forward of the block inside this context."""
        handles: list[Any] = []
        for name, module in self.modules.items():
            if isinstance(module, nn.Linear):
                handles.append(module.register_forward_pre_hook(self._reads(name)))
            elif _is_vector_module(module):
                handles.append(module.register_forward_hook(self._returns(name)))
        try:
            yield
        finally:
            self._made.clear()
            for handle in handles:
                handle.remove()

    def _returns(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            self._made.setdefault(name, output)  # kept alive, so that identity is not fooled

        return hook

    def _reads(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0]
            if name not in self._of:
                self._of[name] = self._fold_of(name, x)
            fold = self._of[name]
            if fold is not None and fold.consumers[0] == name:
                fold.see(x, self.transform.kept)

        return hook

    def _fold_of(self, consumer: str, x: torch.Tensor) -> Fold | None:
        producer = next((name for name, made in self._made.items() if made is x), None)
        producer = producer or self._gate_partner(consumer)
        if producer is None:
            return None
        silent = torch.zeros(x.shape[-1])
        fold = self.folds.setdefault(
            producer, Fold(producer, [], silent, silent.clone(), silent.clone())
        )
        fold.consumers.append(consumer)
        return fold

    def _gate_partner(self, consumer: str) -> str | None:
        parent, _, leaf = consumer.rpartition(".")
        for up, down in GATED_LEAVES:
            if leaf == down and isinstance(self.modules.get(f"{parent}.{up}"), nn.Linear):
                return f"{parent}.{up}"
        return None

    def fold(
        self,
        planned: list[str],
        stored: Callable[[str], torch.dtype],
        output: Callable[[], torch.Tensor],
        log: Callable[[str], None],
    ) -> list[str]:
        """Change the block; the full names of the parameters changed.

        Args:
            planned: linears that will be quantized. Nothing else is multiplied or divided row by
                row: what is stored unquantized keeps its precision.
            stored: dtype in which a parameter that stays unquantized will be stored.
            output: the block's output on a sample; what moves it is undone and logged.
            log: where a fold that had to be undone is named.
        """
        ready = [fold for fold in self.folds.values() if self._allowed(fold, set(planned))]
        chosen = {fold.producer: self._factors(fold) for fold in ready}
        ready = [fold for fold in ready if (chosen[fold.producer] != 1).any()]
        reference = output()

        def apply(fold: Fold) -> Callable[[], None]:
            return self._apply(fold, chosen[fold.producer], stored)

        undo = [apply(fold) for fold in ready]
        if ready and not _same(output(), reference):
            for revert in reversed(undo):
                revert()
            ready = [fold for fold in ready if self._keeps(fold, apply, output, reference, log)]
        return [name for fold in ready for name in fold.parameters(self.model)]

    def _allowed(self, fold: Fold, planned: set[str]) -> bool:
        producer: Any = self.model.get_submodule(fold.producer)
        if fold.tokens == 0 or not set(fold.consumers) <= planned:
            return False
        if isinstance(producer, nn.Linear):
            return fold.producer in planned
        return _norm_offset(producer) is not None

    def _keeps(
        self,
        fold: Fold,
        apply: Callable[[Fold], Callable[[], None]],
        output: Callable[[], torch.Tensor],
        reference: torch.Tensor,
        log: Callable[[str], None],
    ) -> bool:
        revert = apply(fold)
        kept = _same(output(), reference)
        if not kept:
            revert()
            log(f"{fold.producer}: not transformed, something besides linears reads its output")
        return kept

    def _factors(self, fold: Fold) -> torch.Tensor:
        linears: list[Any] = [self.model.get_submodule(name) for name in fold.consumers]
        weights = [linear.weight.detach() for linear in linears]
        plans = [self.layers.get(name, LayerPlan(None)) for name in fold.consumers]
        channels = Channels(
            rms=(fold.energy / fold.tokens).sqrt(),
            absmax=fold.absmax,
            weight_absmax=torch.stack([weight.abs().amax(0) for weight in weights]).amax(0),
            mean=fold.total / fold.tokens,
            inputs=torch.cat(fold.inputs) if fold.inputs else torch.empty(0),
            consumers=tuple(zip(weights, plans, strict=True)),
        )
        return self.transform.factors(channels)

    def _apply(
        self, fold: Fold, d: torch.Tensor, stored: Callable[[str], torch.dtype]
    ) -> Callable[[], None]:
        """Fold once; the returned function takes it back."""
        linears: list[Any] = [self.model.get_submodule(name) for name in fold.consumers]
        producer: Any = self.model.get_submodule(fold.producer)
        before = producer.weight.data, producer.bias.data if _has_bias(producer) else None
        if isinstance(producer, nn.Linear):
            producer.weight.data = before[0] / d[:, None]
        else:
            d = _divide_norm(producer, d, stored(f"{fold.producer}.weight"))
        if before[1] is not None:
            dtype = stored(f"{fold.producer}.bias")
            producer.bias.data = (before[1] / d).to(dtype).to(before[1].dtype)
        for linear in linears:
            linear.weight.data.mul_(d)

        def revert() -> None:
            producer.weight.data = before[0]
            if before[1] is not None:
                producer.bias.data = before[1]
            for linear in linears:
                linear.weight.data.div_(d)

        return revert


@torch.no_grad()
def apply(
    model: Any,
    transform: Transform,
    tokens: torch.Tensor,
    layers: Mapping[str, LayerPlan] | None = None,
) -> list[str]:
    """Transform all decoder blocks of a model in memory, as seen on `tokens` [windows, window].

    layers: what each linear will become, for transforms that search by it.
    Returns the full names of the parameters that changed. Raises UserError where the model's
    logits would change with them.
    """
    planned = [name for block in decoder_blocks(model) for name in quantizable(*block)]
    smoothing = Smoothing(transform, model, dict(model.named_modules()), layers or {})
    with smoothing.watching():
        model(input_ids=tokens, use_cache=False)

    def refuse(message: str) -> None:
        raise UserError(f"transform {transform.name}: {message}")

    def output() -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=tokens[:1], use_cache=False).logits
        return logits

    return smoothing.fold(planned, lambda name: torch.float32, output, refuse)


def _has_bias(module: Any) -> bool:
    return getattr(module, "bias", None) is not None


def _divide_norm(norm: Any, d: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """Divide what the norm returns by d, in the precision it is stored in; the d that came out."""
    offset = _norm_offset(norm)
    assert offset is not None
    old = norm.weight.data + offset
    norm.weight.data = (old / d - offset).to(stored).to(old.dtype)
    new = norm.weight.data + offset
    return torch.where((old != 0) & (new != 0), old / new, d)


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return bool((x - y).norm() <= TOLERANCE * y.norm())


def _is_vector_module(module: nn.Module) -> bool:
    """Whether it has no children and no parameters but a vector `weight` and maybe a `bias`."""
    own = dict(module.named_parameters(recurse=False))
    vector = "weight" in own and set(own) <= {"weight", "bias"} and own["weight"].ndim == 1
    return vector and not list(module.children())


def _norm_offset(norm: Any) -> float | None:
    """c where the norm multiplies by (c + weight): 0, or 1 for Gemma's; None for something else."""
    weight = norm.weight.data
    probe = torch.linspace(-1, 1, len(weight), dtype=weight.dtype)[None]
    bias = norm.bias.data if _has_bias(norm) else 0.0
    try:
        for offset in (0.0, 1.0):
            norm.weight.data = torch.full_like(weight, -offset)
            if not (norm(probe) - bias).any():
                return offset
    finally:
        norm.weight.data = weight
    return None
