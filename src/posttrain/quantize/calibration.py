"""Second moments of what each linear sees, gathered while a block runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass
class InputMoments:
    """Weighted sum of x x^T over tokens: `gram` is [in, in] float32, `tokens` sums the weights.

    `memo` keeps what a solver derives from them, for the linears that share this input. `held` are
    the moments of windows held back, which are not in `gram`.
    """

    gram: torch.Tensor
    tokens: float = 0
    held: "InputMoments | None" = None
    memo: dict[Any, Any] = field(default_factory=dict)

    @property
    def energy(self) -> torch.Tensor:
        """Mean square of each input channel: float32 [in]."""
        return self.gram.diagonal() / max(self.tokens, 1)

    def without(self, index: torch.Tensor) -> "InputMoments":
        """The moments of the same input with zeros in these channels."""
        key = ("without", *index.tolist())
        if key not in self.memo:
            gram = self.gram.index_fill(0, index, 0.0).index_fill_(1, index, 0.0)
            held = None if self.held is None else self.held.without(index)
            self.memo[key] = InputMoments(gram, self.tokens, held)
        found: InputMoments = self.memo[key]
        return found

    def add(self, x: torch.Tensor, weight: float = 1.0) -> None:
        """Add the rows of x [..., in], each `weight` times."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
        self.gram.addmm_(rows.T, rows, alpha=weight)
        self.tokens += weight * rows.shape[0]


@dataclass
class MomentCollector:
    """Hooks the linears of one block; linears fed by the same tensor share one accumulator.

    Args:
        linears: full name -> module.
        prepare: full name -> what is done to an input before it counts (activation
            quantization), so that the solver minimises the error of the product that will run.
        kinds: full name -> what tells one preparation from another; only linears of one kind share.
        first_token_weight: how often the first token of each window counts. Most heads attend to
            it whatever else they see (an attention sink: Xiao et al. 2023, arXiv:2309.17453), so an
            error in its value reaches every token, while it is one token among hundreds here.
    """

    linears: Mapping[str, nn.Module]
    prepare: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict)
    first_token_weight: float = 1.0
    kinds: Mapping[str, Any] = field(default_factory=dict)
    moments: dict[str, InputMoments] = field(default_factory=dict)
    owner: dict[str, str] = field(default_factory=dict)
    _held: list[int] = field(default_factory=list)

    @contextmanager
    def listening(self, held: Sequence[int] = ()) -> Iterator[None]:
        """Collect during every forward of the block inside this context.

        Args:
            held: positions of windows in the batch that are held back, in ascending order.
        """
        self._held = list(held)
        seen: list[tuple[str, torch.Tensor]] = []
        handles = [
            module.register_forward_pre_hook(self._hook(name, seen))
            for name, module in self.linears.items()
            if self.owner.get(name, name) == name
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, seen: list[tuple[str, torch.Tensor]]):
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0]
            if name not in self.owner:
                # `seen` keeps the tensors alive, so identity is not fooled by reused memory.
                kind = self.kinds.get(name)
                alike = (n for n, y in seen if y is x and self.kinds.get(n) == kind)
                self.owner[name] = next(alike, name)
                seen.append((name, x))
            if self.owner[name] == name:
                self._accumulate(name, x)

        return hook

    def _accumulate(self, name: str, x: torch.Tensor) -> None:
        if name not in self.moments:
            self.moments[name] = InputMoments(torch.zeros(x.shape[-1], x.shape[-1]))
        prepare = self.prepare.get(name)
        x = prepare(x) if prepare else x
        moments = self.moments[name]
        if x.ndim != 3:  # a routed expert sees tokens without a position
            moments.add(x)
            return
        if self._held:  # of x [batch, window, in]
            moments.held = moments.held or InputMoments(torch.zeros_like(moments.gram))
            self._add(moments.held, x[self._held])
            x = x[[i for i in range(len(x)) if i not in self._held]]
        self._add(moments, x)

    def _add(self, moments: InputMoments, x: torch.Tensor) -> None:
        moments.add(x)
        moments.add(x[:, 0], self.first_token_weight - 1)

    def of(self, name: str) -> InputMoments | None:
        """Moments of the input of linear `name`; None if it never ran."""
        return self.moments.get(self.owner.get(name, name))
