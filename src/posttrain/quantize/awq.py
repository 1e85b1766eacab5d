"""AWQ: how far loud input channels are scaled up in the weights is searched, by what rounding loses."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F

from posttrain.errors import UserError
from posttrain.models.linear import seen
from posttrain.models.rotation import rotate
from posttrain.numbers import fake_quantize

if TYPE_CHECKING:
    from posttrain.quantize.transforms import Channels


@dataclass(frozen=True)
class AWQ:
    """Activation-aware scaling (Lin et al. 2023, arXiv:2306.00978): minimise over alpha

        sum over linears of ||X W^T - Q_x(X / d) Q_w(W diag(d))^T||^2,    d = mean|x|^alpha

    for each group of linears that share an input, with the number formats that the plan gives them
    and rounding to nearest. d is divided by the geometric mean of its largest and smallest entry.
    alpha = 0 changes nothing, and is taken where nothing is gained.

    Args:
        steps: values of alpha tried, evenly spaced from 0 to 1.
        balance: also try the factors of `smooth`, which look at the weights too, for each alpha.
        tokens: calibration tokens on which the loss is measured, spread over `samples` windows.
        samples: see `Transform`.
    """

    name: ClassVar[str] = "awq"
    steps: int = 20
    balance: bool = False
    tokens: int = 512
    samples: int = 16

    def __post_init__(self) -> None:
        for name, least in (("steps", 2), ("tokens", 1), ("samples", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"{name} must be a whole number from {least} on; found {value!r}")
        if not isinstance(self.balance, bool):
            raise UserError(f"balance must be true or false; found {self.balance!r}")

    @property
    def kept(self) -> int:
        """Tokens of each window that are kept to measure the loss on."""
        return max(1, self.tokens // self.samples)

    def factors(self, seen: "Channels") -> torch.Tensor:
        """d [in], positive; ones where nothing is gained."""
        if not seen.consumers or any(layer.weight is None for _, layer in seen.consumers):
            raise UserError("transform awq: needs to know what each linear will become")
        best = torch.ones_like(seen.rms)
        least = _loss(seen, best)
        for d in self._candidates(seen):
            if (loss := _loss(seen, d)) < least:
                best, least = d, loss
        return best

    def _candidates(self, seen: "Channels") -> Iterator[torch.Tensor]:
        loud, heavy = _positive(seen.mean), _positive(seen.weight_absmax)
        for alpha in torch.linspace(0, 1, self.steps).tolist():
            yield _middle(loud**alpha)
            if self.balance:
                yield _middle(_positive(seen.rms) ** alpha / heavy ** (1 - alpha))


def _loss(channels: "Channels", d: torch.Tensor) -> float:
    """Squared error of the quantized linears' outputs where d was folded."""
    total = 0.0
    for weight, layer in channels.consumers:
        assert layer.weight is not None  # checked by the caller
        scaled = rotate(weight * d) if layer.rotate else weight * d
        product = F.linear(seen(channels.inputs / d, layer), fake_quantize(scaled, layer.weight))
        total += float((product - F.linear(channels.inputs, weight)).square().sum())
    return total


def _positive(x: torch.Tensor) -> torch.Tensor:
    """x, with silent channels at a floor far below the mean."""
    return x.clamp_min(1e-5 * float(x.mean()) or 1.0)


def _middle(d: torch.Tensor) -> torch.Tensor:
    return d / (d.max() * d.min()).sqrt()
