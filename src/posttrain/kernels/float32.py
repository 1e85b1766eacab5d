"""Float32 products in torch, by the faster of the two libraries it has for them.

torch multiplies float32 matrices with MKL, which leaves AVX-512 unused on AMD's processors; oneDNN,
which torch has too, is twice as fast there (seen on Zen 5) and no less exact. torch hands it float32
only where it is allowed to round the inputs to bfloat16. oneDNN makes use of that where AMX multiplies
bfloat16, and there it is not asked.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

SIZE = 256  # of the product that tells


@contextmanager
def fast_float32() -> Iterator[None]:
    """Inside, torch's float32 products of matrices are as fast as they can be while exact.

    The setting is torch's, hence the whole process's; the one before comes back at the end. Also a
    decorator.
    """
    if not _exact():
        yield
        return
    with _permission():
        yield


@contextmanager
def _permission() -> Iterator[None]:
    """oneDNN may multiply float32 matrices and round their elements to bfloat16."""
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@cache
def _exact() -> bool:
    """Whether oneDNN, allowed to round, does not: by the error of a product."""
    if not hasattr(torch.backends.mkldnn, "matmul"):  # torch before 2.9
        return False
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(SIZE, SIZE, generator=generator) for _ in range(2))
    with _permission():
        product = x @ y
    wanted = x.double() @ y.double()
    return bool((product - wanted).norm() < 1e-5 * wanted.norm())  # bfloat16: 2e-3
