"""Additive side paths of a quantized layer (see `linear.QuantLinear`)."""

import torch.nn.functional as F
from torch import Tensor, nn


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
