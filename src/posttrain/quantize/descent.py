"""Coordinate descent on the error of a layer's output: one column of the weight after the other.

With E = W^ - W and H the second moments of the input, the error sum(E H E^T) is a parabola in any one
weight, least at w^ - (E H) / H_jj. So the grid value nearest to that point is the best one while the
other weights stay, and taking it never raises the error. A sweep visits every column once; columns
are the unit because rows do not depend on each other. QuantEase (Behdin et al. 2023,
arXiv:2309.01885) quantizes by such sweeps; here they finish what a solver began.
"""

from collections.abc import Callable

from torch import Tensor

from posttrain.errors import UserError
from posttrain.kernels.columns import descend_columns, rounds
from posttrain.numbers import QTensor, decode_scaled, encode_scaled, quantize
from posttrain.quantize.calibration import InputMoments

# The grid values nearest to `target` [out] that the weights of column j may take.
Nearest = Callable[[int, Tensor], Tensor]
# A visit to a run of columns: their values, errors and slopes (half the gradient), [columns, out] and
# changed in place; whether any value changed.
Visit = Callable[[slice, Tensor, Tensor, Tensor], bool]
LAZY = 128  # columns whose gradients are kept up to date together (speed only)


def damped(moments: InputMoments, damping: float, name: str) -> Tensor:
    """Mean of x x^T over tokens plus `damping` times its mean diagonal, [in, in] float32."""
    if not moments.gram.isfinite().all():
        raise UserError(f"{name}: calibration met NaN or infinite inputs; use another text, or rtn")
    hessian = moments.gram / moments.tokens
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    return hessian


def quadratic(error: Tensor, hessian: Tensor) -> Tensor:
    """e H e^T for each row e of `error` [out, in]."""
    return ((error @ hessian) * error).sum(1)


def settle(weight: Tensor, start: QTensor, hessian: Tensor, sweeps: int) -> QTensor:
    """`start` after up to `sweeps` sweeps over all values of its grid; its scales stay."""
    if sweeps == 0:
        return start
    grid = start.spec.grid
    step = start.scales.expand(weight.shape).T.contiguous()
    zero = start.scales.expand_zero_point(weight.shape)
    zero = None if zero is None else zero.T.contiguous()

    def nearest(j: int, target: Tensor) -> Tensor:
        offset = None if zero is None else zero[j]
        code = encode_scaled(target, grid, step[j], offset)
        return decode_scaled(code, grid, step[j], offset)

    def natively(run: slice, values: Tensor, error: Tensor, slope: Tensor) -> bool:
        square, zeros = hessian[run, run], None if zero is None else zero[run]
        return descend_columns(values, error, slope, square, grid, step[run], zeros)

    visit = natively if rounds(grid, weight) else one_by_one(hessian, nearest)
    values = sweep(weight, start.dequantize(), hessian, sweeps, visit)
    return quantize(values, start.spec, scales=start.scales)


def sweep(weight: Tensor, values: Tensor, hessian: Tensor, sweeps: int, visit: Visit) -> Tensor:
    """Values [out, in] after sweeps from `values`; they end early where nothing changes any more."""
    # Transposed, so that a column of the weight is contiguous.
    current = values.T.contiguous()
    error = current - weight.T
    for _ in range(sweeps):
        changed = False
        for start in range(0, len(current), LAZY):
            run = slice(start, min(start + LAZY, len(current)))
            slope = hessian[run] @ error  # half the gradient
            changed |= visit(run, current[run], error[run], slope)
        if not changed:
            break
    return current.T.contiguous()


def one_by_one(hessian: Tensor, nearest: Nearest) -> Visit:
    """Visits in plain torch: what `kernels.descend_columns` is held to."""
    curvature = hessian.diagonal().tolist()

    def visit(run: slice, values: Tensor, error: Tensor, slope: Tensor) -> bool:
        changed = False
        for i, j in enumerate(range(run.start, run.stop)):
            if curvature[j] <= 0:
                continue
            new = nearest(j, values[i] - slope[i] / curvature[j])
            move = new - values[i]
            if not move.any():
                continue
            changed = True
            values[i] = new
            error[i] += move
            slope[i + 1 :].addr_(hessian[j + 1 : run.stop, j], move)
        return changed

    return visit
