"""What theory says a format keeps of Gaussian values, by their crest factor alone.

The noise of uniform steps is step^2 / 12; a floating-point format has steps in proportion to the
value down to its smallest normal number, and uniform ones below. With a scale per block, the step
follows from the block's absmax, hence from the crest factor kappa = absmax / RMS (Chen et al. 2025,
"INT v.s. FP", arXiv:2510.25602). `rho` >= 1 is how much larger than needed the scale is: its format
rounds it.
"""

import math
from statistics import NormalDist

from posttrain.errors import UserError
from posttrain.numbers.grids import FloatGrid
from posttrain.numbers.spec import Spec

_NORMAL = NormalDist()
POWER_OF_TWO = 1.5  # mean overhead of a scale rounded up to a power of two
FLOAT = 1.05  # and of one rounded to E4M3


def predicted_qsnr(spec: str | Spec, crest_factor: float) -> float:
    """Signal to quantization noise in dB of blocks with this crest factor.

    spec: an integer or floating-point grid under block scales, such as "mxint8" or "nvfp4". Where
        scales are floats the largest value of a block of g is exact, but for the scale's rounding:
        its share crest_factor^2 / g of the energy makes no noise.

    Raises UserError for other formats.
    """
    found = Spec.parse(spec)
    grid = found.grid
    block = found.factors[0].partition.cols if found.factors else 0
    if not (grid.kind == "int" or isinstance(grid, FloatGrid)) or not block:
        raise UserError(f"{found}: theory knows integers and floats in blocks, such as mxint8")
    exact = found.factors[0].grid.kind == "float"
    rho_kappa = (FLOAT if exact else POWER_OF_TWO) * crest_factor
    if not isinstance(grid, FloatGrid):
        gain = 10 * math.log10(block / (block - 1)) if exact else 0.0
        return 4.78 + 6.02 * found.bits - 20 * math.log10(rho_kappa) + gain
    top, bias, mantissa = grid.max, grid.bias, grid.mantissa
    least_normal = rho_kappa * 2.0 ** (1 - bias) / top  # in units of the RMS
    normal_energy = 2 * (least_normal * _NORMAL.pdf(least_normal) + _NORMAL.cdf(-least_normal))
    if exact:
        normal_energy = max(normal_energy - crest_factor**2 / block, 0.0)
    subnormal_step = rho_kappa * 2.0 ** (1 - bias - mantissa) / top
    subnormal_share = 2 * _NORMAL.cdf(least_normal) - 1
    noise = normal_energy / (24 * 4**mantissa) + subnormal_step**2 / 12 * subnormal_share
    return -10 * math.log10(noise)


def crossover(integer: str | Spec, floating: str | Spec) -> tuple[float, float]:
    """The crest factor below which the integer format is the better one, and the QSNR there."""
    low, high = 1.0, 32.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        better = predicted_qsnr(integer, middle) > predicted_qsnr(floating, middle)
        low, high = (middle, high) if better else (low, middle)
    return low, predicted_qsnr(integer, low)
