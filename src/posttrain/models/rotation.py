"""Block-Hadamard rotation of a layer's input: outliers of a token are spread over its neighbours.

With H orthonormal and symmetric, block-diagonal over runs of `block` channels,

    W x = (W H) (H x)

so a layer that stores W H and rotates its input computes the same, and H x has no channel far
above the others: one scale per token then serves all of them (Ashkboos et al. 2024, QuaRot,
arXiv:2404.00456, whose online rotations these are; here in front of every layer that asks).
"""

import math
from functools import cache

import torch
from torch import Tensor

LARGEST_BLOCK = 512  # bounds the work per channel


def block_size(channels: int) -> int:
    """Largest power of two that divides `channels`, up to `LARGEST_BLOCK`. 1 rotates nothing."""
    return min(channels & -channels, LARGEST_BLOCK)


def rotate(x: Tensor) -> Tensor:
    """x [..., channels] times H, computed in float32, in x's dtype. Its own inverse."""
    block = block_size(x.shape[-1])
    left = 1 << (block.bit_length() // 2)
    right = block // left
    # Sylvester's H of a product of powers of two is a Kronecker product: two small products do.
    runs = x.to(torch.float32).reshape(x.numel() // block, left, right)
    runs = _hadamard(left, x.device) @ runs @ _hadamard(right, x.device)
    return runs.reshape(x.shape).to(x.dtype)


@cache
def _hadamard(size: int, device: torch.device) -> Tensor:
    """Sylvester's orthonormal Hadamard matrix [size, size], float32."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    matrix = matrix / math.sqrt(size)
    return matrix.to(device)
