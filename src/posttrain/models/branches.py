"""Additive side paths of a quantized layer (see `linear.QuantLinear`): what they store and compute.

A plan of a branch says what there is, without values; `build` makes the empty module that a
checkpoint fills, `fit` one with values. A plan with `first` takes its part of the weight before the
rest is quantized, the others add what quantization lost.

    lowrank   W - W^ is about up @ down: by SVD (LoRC: Yao et al. 2023, ZeroQuant-V2, arXiv:2303.08302)
              or from nothing, to be trained (LREC, LoRA: see `quantize.distill`)
    columns   the loudest input channels, whose weights stay in 16 bits (static outlier channels of
              LLM.int8(): Dettmers et al. 2022, arXiv:2208.07339)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.errors import UserError, did_you_mean
from posttrain.models import storage
from posttrain.numbers import QTensor, Spec, quantize, spec

STARTS = ("svd", "zero")


class BranchPlan(Protocol):
    """What a branch stores."""

    name: ClassVar[str]
    first: ClassVar[bool]

    def build(self, out_features: int, in_features: int) -> nn.Module:
        """The module with buffers on the meta device."""

    def fit(self, missing: Tensor, energy: Tensor | None) -> nn.Module:
        """The module that adds its best share of `missing` [out, in]. energy: mean square of each
        input channel [in] over the calibration text, or None where there was no text."""


@dataclass(frozen=True)
class LowRankPlan:
    """up @ down of a rank, its factors [out, rank] and [rank, in] stored as `weight` says; the rank
    of a layer that has fewer rows or columns is theirs.

    start: "svd" (the closest of its rank), or "zero": up is 0 and down random, adding nothing until
    it is trained.
    """

    name: ClassVar[str] = "lowrank"
    first: ClassVar[bool] = False
    rank: int
    weight: Spec = field(default_factory=lambda: spec("fp16"))
    start: str = "svd"

    def __post_init__(self) -> None:
        _require_count(self, "rank", self.rank)
        if isinstance(self.weight, str):
            object.__setattr__(self, "weight", spec(self.weight))
        if not isinstance(self.weight, Spec):
            raise UserError(f'branch lowrank: weight must be a number format such as "fp16" or '
                            f'"int8 | fp16/row"; found {self.weight!r}')  # fmt: skip
        if self.start not in STARTS:
            raise UserError(f"branch lowrank: start must be svd or zero; found {self.start!r}")

    def build(self, out_features: int, in_features: int) -> nn.Module:
        return LowRank(self, out_features, in_features)

    def fit(self, missing: Tensor, energy: Tensor | None) -> nn.Module:
        if self.start == "zero":
            generator = torch.Generator().manual_seed(0)
            rank = min(self.rank, *missing.shape)
            down = torch.randn(rank, missing.shape[1], generator=generator)
            down /= missing.shape[1] ** 0.5
            return LowRank.of(self, torch.zeros(missing.shape[0], rank), down)
        return LowRank.of(self, *low_rank_factors(missing, self.rank))


@dataclass(frozen=True)
class ColumnsPlan:
    """The weights of the `count` input channels of the largest energy, in 16 bits."""

    name: ClassVar[str] = "columns"
    first: ClassVar[bool] = True
    count: int

    def __post_init__(self) -> None:
        _require_count(self, "count", self.count)

    def build(self, out_features: int, in_features: int) -> nn.Module:
        count = min(self.count, in_features)
        index = torch.empty(count, dtype=torch.int64, device="meta")
        weight = torch.empty(out_features, count, dtype=torch.float16, device="meta")
        return Columns(index, weight)

    def fit(self, missing: Tensor, energy: Tensor | None) -> nn.Module:
        if energy is None:
            raise UserError(
                "branch columns: the loudest channels are found on a calibration text; choose a "
                "solver that sees one, such as gptq"
            )
        index = energy.topk(min(self.count, len(energy))).indices.sort().values
        return Columns(index, missing[:, index].to(torch.float16))


BRANCHES: dict[str, Any] = {plan.name: plan for plan in (LowRankPlan, ColumnsPlan)}


def make_branch(data: object, where: str) -> BranchPlan:
    """The plan of a branch from a mapping with `name` and its options. Raises UserError."""
    if not isinstance(data, dict) or data.get("name") not in BRANCHES:
        raise UserError(f"{where}: expected a mapping with `name`: {', '.join(BRANCHES)}, and its "
                        f"options, such as {{name: lowrank, rank: 8}}; found {data!r}")  # fmt: skip
    options = {key: value for key, value in data.items() if key != "name"}
    kind = BRANCHES[data["name"]]
    known = {f.name: f for f in fields(kind)}
    for option in options:
        if option not in known:
            raise UserError(f"{where}: unknown option {option!r}{did_you_mean(option, known)}")
    try:
        made: BranchPlan = kind(**options)
    except TypeError:
        required = ", ".join(name for name in known if name in ("rank", "count"))
        raise UserError(f"{where}: branch {data['name']} needs {required}") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return made


def branch_dict(plan: BranchPlan) -> dict[str, Any]:
    """What `make_branch` reads."""
    options = asdict(plan)  # type: ignore[call-overload]
    return {"name": plan.name} | {
        key: str(getattr(plan, key)) if isinstance(getattr(plan, key), Spec) else value
        for key, value in options.items()
    }


def low_rank_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """up [out, rank] and down [rank, in] whose product is the closest of this rank to `matrix`
    (Eckart-Young); each holds the root of the singular values."""
    left, values, right = torch.linalg.svd(matrix.to(torch.float32), full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


class LowRank(nn.Module):
    """x down^T up^T.

    The factors are buffers in their stored format, or, after `train_factors`, float32 parameters.
    """

    def __init__(self, plan: LowRankPlan, out_features: int, in_features: int) -> None:
        super().__init__()
        self.plan = plan
        rank = min(plan.rank, out_features, in_features)
        self.shapes = {"up": (out_features, rank), "down": (rank, in_features)}
        self.trained: dict[str, nn.Parameter] = {}
        for name, shape in self.shapes.items():
            for buffer, (size, dtype) in storage.layout(name, plan.weight, shape).items():
                self.register_buffer(buffer, torch.empty(size, dtype=dtype, device="meta"))

    @classmethod
    def of(cls, plan: LowRankPlan, up: Tensor, down: Tensor) -> LowRank:
        """With these factors, rounded to the stored format."""
        made = cls(plan, up.shape[0], down.shape[1])
        made.store(up, down)
        return made

    def store(self, up: Tensor, down: Tensor) -> None:
        """Round the factors to the stored format; they are parameters no longer."""
        self.trained.clear()
        for name in self.shapes:
            self._parameters.pop(name, None)
        for name, factor in (("up", up), ("down", down)):
            packed = storage.pack_qtensor(name, quantize(factor.detach(), self.plan.weight))
            for buffer, tensor in packed.items():
                self._buffers[buffer] = tensor

    def train_factors(self) -> list[nn.Parameter]:
        """The factors as parameters, from their stored values; `finish_training` rounds them."""
        for name in self.shapes:
            parameter = nn.Parameter(self.factor(name).to(torch.float32))
            self.trained[name] = parameter
            self.register_parameter(name, parameter)
        return list(self.trained.values())

    def finish_training(self) -> None:
        if self.trained:
            self.store(self.trained["up"], self.trained["down"])

    def factor(self, name: str) -> Tensor:
        """ "up" or "down" as values."""
        if name in self.trained:
            return self.trained[name]
        return self._qtensor(name).dequantize()

    def _qtensor(self, name: str) -> QTensor:
        return storage.unpack_qtensor(name, self._buffers, self.plan.weight, self.shapes[name])

    def forward(self, x: Tensor) -> Tensor:
        inner = F.linear(x, self.factor("down").to(x.dtype))
        return F.linear(inner, self.factor("up").to(x.dtype))


class Columns(nn.Module):
    """A few input channels in full precision: x[..., index] times the weight's columns.

    The quantized weight has zeros there. index: int64 [n]; weight: [out, n], any float dtype.
    """

    index: Tensor
    weight: Tensor

    def __init__(self, index: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x[..., self.index], self.weight.to(x.dtype))


def stored_bytes(plan: BranchPlan, out_features: int, in_features: int) -> int:
    """What a branch of a layer of this shape takes."""
    return sum(t.nbytes for t in plan.build(out_features, in_features).state_dict().values())


def matrix_of(branch: nn.Module, in_features: int) -> Tensor:
    """What a branch adds to the weight: float32 [out, in]."""
    matrix: Tensor = branch(torch.eye(in_features)).detach().T
    return matrix


def _require_count(plan: BranchPlan, option: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(
            f"branch {plan.name}: {option} must be a positive whole number; found {value!r}"
        )
