"""Partitions: which elements share one scale.

A tensor is looked at as a matrix [rows, K] (leading axes flattened, K the last axis, along which a
linear layer reduces). A partition cuts that matrix into blocks of `rows` x `cols` elements, where 0
means the whole axis:

    tensor (0, 0)   row (1, 0)   col (0, 1)   gN (1, N)   tRxC (R, C)   flatN (1, N) of the
    matrix flattened to [1, rows * K], so that a block may straddle rows (bitsandbytes)

Edge blocks are padded with zeros where the size does not divide; padding is never stored.
"""

import math
import re
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

Shape2d = tuple[int, int]
# Blocks whose size is fixed by their name; the sized ones are matched by _SIZED.
_NAMED: dict[str, tuple[int, int]] = {"tensor": (0, 0), "row": (1, 0), "col": (0, 1)}
_SIZED = re.compile(r"(?:(g|flat)([1-9]\d*)|t([1-9]\d*)x([1-9]\d*))\Z")
PARTITION_EXAMPLES = (*_NAMED, "g64", "t16x16", "flat64")


@dataclass(frozen=True)
class Partition:
    """Blocks of `rows` x `cols` elements (0 = the whole axis), of the flattened tensor if `flat`."""

    rows: int
    cols: int
    flat: bool = False

    @classmethod
    def parse(cls, text: str) -> "Partition | None":
        """The partition called `text` (such as "g64"), or None when there is no such partition."""
        if text in _NAMED:
            return cls(*_NAMED[text])
        found = _SIZED.match(text)
        if found is None:
            return None
        kind, size, rows, cols = found.groups()
        if kind:
            return cls(1, int(size), flat=kind == "flat")
        return cls(int(rows), int(cols))

    def __str__(self) -> str:
        if self.flat:
            return f"flat{self.cols}"
        for name, block in _NAMED.items():
            if block == (self.rows, self.cols):
                return name
        # A 1 x N tile is the group of N; "gN" is its canonical name.
        return f"g{self.cols}" if self.rows == 1 else f"t{self.rows}x{self.cols}"

    def block(self, matrix: Shape2d) -> Shape2d:
        """Block size on a matrix of this shape, whole axes filled in (at least 1)."""
        return self.rows or max(1, matrix[0]), self.cols or max(1, matrix[1])

    def counts(self, matrix: Shape2d) -> Shape2d:
        """Number of blocks along each axis, edge blocks included: the shape of a factor tensor."""
        rows = -(-matrix[0] // self.rows) if self.rows else 1
        cols = -(-matrix[1] // self.cols) if self.cols else 1
        return rows, cols

    def inside(self, coarse: "Partition") -> bool:
        """Whether every block of this partition lies in one block of `coarse`, on any matrix."""
        if coarse.flat != self.flat and (coarse.rows, coarse.cols) != (0, 0):
            return False
        return _divides(self.rows, coarse.rows) and _divides(self.cols, coarse.cols)


def _divides(fine: int, coarse: int) -> bool:
    if coarse == 0:
        return True
    return fine != 0 and coarse % fine == 0


def matrix_shape(shape: tuple[int, ...], flat: bool) -> Shape2d:
    """The [rows, K] shape a tensor is partitioned as: [1, numel] for flat partitions."""
    numel = math.prod(shape)
    if flat or not shape:
        return 1, numel
    return math.prod(shape[:-1]), shape[-1]


def blocked(x: Tensor, block: Shape2d) -> Tensor:
    """View a matrix [R, K] as [R/r, r, K/c, c], padded with zeros where the block does not divide."""
    rows, cols = x.shape
    r, c = block
    pad_rows, pad_cols = -rows % r, -cols % c
    if pad_rows or pad_cols:
        x = F.pad(x, (0, pad_cols, 0, pad_rows))
    return x.reshape(x.shape[0] // r, r, x.shape[1] // c, c)


def unblocked(y: Tensor, matrix: Shape2d) -> Tensor:
    """The inverse of `blocked`: [R/r, r, K/c, c] back to [R, K], padding cut off."""
    full = y.reshape(y.shape[0] * y.shape[1], y.shape[2] * y.shape[3])
    if full.shape == matrix:
        return full
    return full[: matrix[0], : matrix[1]].contiguous()


def common_block(partitions: list[Partition], matrix: Shape2d) -> Shape2d:
    """The largest block that lies inside one block of every given partition."""
    rows = math.gcd(*(p.rows for p in partitions)) or max(1, matrix[0])
    cols = math.gcd(*(p.cols for p in partitions)) or max(1, matrix[1])
    return rows, cols


def upsample(factor: Tensor, own: Shape2d, fine: Shape2d, counts: Shape2d) -> Tensor:
    """Repeat a factor [nr, nc] of blocks `own` onto the finer blocks `fine`, [counts] of them.

    Axes the factor has one entry for are left at 1 (they broadcast).
    """
    for axis in (0, 1):
        repeat = own[axis] // fine[axis]
        if factor.shape[axis] > 1 and repeat > 1:
            factor = factor.repeat_interleave(repeat, axis).narrow(axis, 0, counts[axis])
    return factor


def coarsen_max(stat: Tensor, fine: Shape2d, coarse: Shape2d) -> Tensor:
    """Maximum of a per-block statistic [nr, nc] >= 0 over coarser blocks that contain them."""
    ratio = (-(-coarse[0] // fine[0]), -(-coarse[1] // fine[1]))
    return blocked(stat, ratio).amax(dim=(1, 3))
