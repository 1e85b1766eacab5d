"""Solvers: given a weight and a Spec, decide the codes.

    rtn         the nearest grid value (scale from absmax)                              nearest.py
    mse         rtn with each scale shrunk to the ratio of the least squared error      nearest.py
    gptq        minimise ||X W^T - X W^^T||^2, column by column                         gptq.py
    adaround    the same over the two grid values next to each weight                   adaround.py
    zq-local    the same over weights and scales, by gradients                          zeroquant.py
    zq-global   minimise ||f(x) - f^(x)||^2 of a decoder block over the weights and scales of all
                its linears                                                             zeroquant.py

The first five take a `Problem`, a linear, and return a QTensor; the last takes a `BlockProblem`.
This file knows them by name.
"""

from dataclasses import fields
from typing import Any

from posttrain.errors import UserError, did_you_mean
from posttrain.quantize.adaround import AdaRound
from posttrain.quantize.gptq import GPTQ
from posttrain.quantize.nearest import RTN, MSEGrid, block_sum
from posttrain.quantize.problem import BlockProblem, BlockSolver, LinearSolver, Log, Problem, Solver
from posttrain.quantize.zeroquant import ZQGlobal, ZQLocal

__all__ = [
    "GPTQ",
    "RTN",
    "SOLVERS",
    "AdaRound",
    "BlockProblem",
    "BlockSolver",
    "LinearSolver",
    "Log",
    "MSEGrid",
    "Problem",
    "Solver",
    "ZQGlobal",
    "ZQLocal",
    "block_sum",
    "make_solver",
]

SOLVERS: dict[str, type[Any]] = {
    cls.name: cls for cls in (RTN, MSEGrid, GPTQ, AdaRound, ZQLocal, ZQGlobal)
}


def make_solver(name: str, **options: Any) -> Solver:
    """The solver called `name` with its options checked; UserError with the nearest match."""
    if name not in SOLVERS:
        raise UserError(f"unknown solver {name!r}{did_you_mean(name, SOLVERS)}")
    known = {field.name for field in fields(SOLVERS[name])}
    for option in options:
        if option not in known:
            hint = did_you_mean(option, known) or f"; it has no option {option!r}"
            raise UserError(f"solver {name}: unknown option {option!r}{hint}")
    return SOLVERS[name](**options)
