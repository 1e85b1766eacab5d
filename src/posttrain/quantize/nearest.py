"""Rounding to nearest, and the scales it does best with.

rtn    round each weight to the nearest grid value (scale from absmax).
mse    rtn with each scale shrunk to the ratio that minimises the squared weight error.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from posttrain.numbers import QTensor
from posttrain.numbers.partition import Partition, blocked, matrix_shape
from posttrain.quantize.problem import LinearSolver, Problem, count, require, within


@dataclass(frozen=True)
class RTN(LinearSolver):
    """Round to nearest; the scale maps each block's absmax to the top of the grid."""

    name: ClassVar[str] = "rtn"

    def solve(self, problem: Problem) -> QTensor:
        return problem.rounded()


@dataclass(frozen=True)
class MSEGrid(LinearSolver):
    """Search `steps` ratios from 1 down to `lowest` of the absmax scale, per scale block.

    The best ratio minimises the squared error of the block's weights. The search ends early where
    the error of every block has grown to twice its least: what is cut off then outweighs all else.
    """

    name: ClassVar[str] = "mse"
    steps: int = 24
    lowest: float = 0.5

    def __post_init__(self) -> None:
        require(count(self.steps), self, "steps must be a positive whole number")
        require(within(self.lowest, 1), self, "lowest must be in (0, 1]")

    def solve(self, problem: Problem) -> QTensor:
        return problem.rounded(self.best_ratio(problem))

    def best_ratio(self, problem: Problem) -> torch.Tensor:
        """Ratio per finest block, as `fit_scales(clip_ratio=...)` takes it."""
        partition = problem.spec.factors[0].partition
        best_error: torch.Tensor | None = None
        for ratio in torch.linspace(1.0, self.lowest, self.steps).tolist():
            difference = problem.weight - problem.rounded(ratio).dequantize()
            error = block_sum(difference.square(), partition)
            if best_error is None:
                best_error, best = error, torch.full_like(error, ratio)
                continue
            if (error >= 2 * best_error).all():
                break
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = torch.where(better, ratio, best)
        return best


def block_sum(x: torch.Tensor, partition: Partition) -> torch.Tensor:
    """Sum of `x` over each block of a partition: [block rows, block columns]."""
    matrix = x.reshape(matrix_shape(tuple(x.shape), partition.flat))
    return blocked(matrix, partition.block((matrix.shape[0], matrix.shape[1]))).sum((1, 3))
