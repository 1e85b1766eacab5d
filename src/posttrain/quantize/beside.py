"""Fit the branches of a layer (see `models.branches`) around what its solver does."""

import torch
from torch import nn

from posttrain.models.branches import matrix_of
from posttrain.models.plan import LayerPlan
from posttrain.models.rotation import rotate
from posttrain.quantize.calibration import InputMoments

Fitted = dict[int, nn.Module]  # by place in the plan


def set_apart(
    layer: LayerPlan, weight: torch.Tensor, moments: InputMoments | None
) -> tuple[Fitted, torch.Tensor, InputMoments | None]:
    """The branches that take their part of `weight` [out, in] before it is quantized, what is left
    of it, and the moments of the input without the channels that they took."""
    fitted: Fitted = {}
    for place, plan in enumerate(layer.branches):
        if plan.first:
            branch = plan.fit(weight, None if moments is None else moments.energy)
            taken = branch.get_buffer("index")
            weight = weight.index_fill(1, taken, 0.0)
            moments = None if moments is None else moments.without(taken)
            fitted[place] = branch
    return fitted, weight, moments


def compensate(layer: LayerPlan, missing: torch.Tensor, fitted: Fitted) -> list[nn.Module]:
    """All branches in order: those fitted already and those that add what quantization lost,
    `missing` [out, in], in the layer's own coordinates (rotated where it rotates)."""
    missing = rotate(missing) if layer.rotate and layer.branches else missing
    for place, plan in enumerate(layer.branches):
        if place not in fitted:
            fitted[place] = plan.fit(missing, None)
            missing = missing - matrix_of(fitted[place], missing.shape[1])
    return [fitted[place] for place in range(len(layer.branches))]
