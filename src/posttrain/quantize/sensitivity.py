"""What precision costs where: the loss to expect when one operand of one group of layers is quantized.

A group is what runtimes fuse (q/k/v; gate/up), hence what must become the same; its operands are the
weight and the input. Two ways to the same figure, nats a token of KL(model || quantized model):

    cheap   A change d of the weights moves the predictions by 1/2 d^T F d in second order, with F the
            Fisher information: the mean of g g^T over gradients g of the loss on tokens drawn from
            the model itself (Martens 2014, arXiv:1412.1193). Rounding errors have signs that are
            nearly independent, so the diagonal of F is what counts, as in Optimal Brain Damage
            (LeCun et al. 1990):

                loss = 1 / (2 tokens) sum_windows sum_ij g_ij^2 d_ij^2

            The input x of a layer likewise, token by token, with h the gradient at x. One forward
            and backward pass over a few windows, whatever the number of formats.
    exact   Each group in each format in turn, everything else in full precision, and the divergence
            measured: one forward of what lies behind it for each row. It also knows how much the
            perplexity rises, hence the classes of ZeroQuant-V2 (Yao et al. 2023, arXiv:2303.08302).

Both hold the whole model in memory in float32; the cheap one its squared gradients too.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from posttrain.evaluate.sensitivity import Recorded
from posttrain.evaluate.windows import Windows
from posttrain.models.linear import seen
from posttrain.models.plan import LayerPlan
from posttrain.models.rotation import rotate
from posttrain.models.walk import Target, decoder_blocks, fusion_groups
from posttrain.numbers import GRIDS, Spec
from posttrain.quantize.solvers import RTN, BlockSolver, LinearSolver, Problem, Solver
from posttrain.quantize.transforms import Smoothing, Transform

CHEAP, EXACT = SCANS = ("cheap", "exact")
SCANNED = {CHEAP: (4, 512), EXACT: (2, 256)}  # windows of calibration text, tokens in each
PART = 1 << 23  # weights that are rounded at a time
WEIGHT_BITS, INPUT_BITS = range(3, 9), (4, 6, 8)
# Up to this rise of perplexity a scheme belongs to the class; above the last, to LAST_CLASS.
CLASSES, LAST_CLASS = ((0.1, "I"), (0.5, "II")), "III"

Row = dict[str, Any]
Keep = Callable[[list[Row]], None]


@dataclass(frozen=True)
class Group:
    """Layers that must become the same, and what they are to become by the recipe.

    names: their full names. targets: one for each. layer: the recipe's plan for all of them.
    """

    names: tuple[str, ...]
    targets: tuple[Target, ...]
    layer: LayerPlan

    @property
    def label(self) -> str:
        """The name of the group: `model.layers.0.self_attn.q_proj+k_proj+v_proj`."""
        parent, _, _ = self.names[0].rpartition(".")
        leaves = "+".join(dict.fromkeys(name.rpartition(".")[2] for name in self.names))
        return f"{parent}.{leaves}" if parent else leaves

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the weights, the axis that products reduce over last."""
        return [stored_shape(target) for target in self.targets]

    @property
    def weight(self) -> Spec:
        assert self.layer.weight is not None
        return self.layer.weight

    def bits(self, weight: Spec) -> float:
        """Bits per weight in this format, scales included."""
        count = sum(math.prod(shape) for shape in self.shapes)
        return sum(weight.stored_bits(shape) for shape in self.shapes) / count


def groups_of(targets: Mapping[str, Target], layers: Mapping[str, LayerPlan]) -> list[Group]:
    """The planned layers by fusion group, in the order of the model."""
    planned = fusion_groups(name for name in targets if name in layers)
    return [Group(names, tuple(targets[n] for n in names), layers[names[0]]) for names in planned]


def stored_shape(target: Target) -> tuple[int, ...]:
    """Shape of a quantized weight: the axis that products reduce over is the last."""
    *experts, rows, columns = target.shape
    return (*experts, columns, rows) if target.transposed else target.shape


def family(spec: Spec, bits: Sequence[int]) -> tuple[Spec, ...]:
    """The same format with other widths of the grid: int6 | fp16/g64 at 3 bits is int3 | fp16/g64.
    Nothing where the grid is not one of a row of widths (floats, tables)."""
    found = []
    for width in bits:
        name = spec.grid_name.replace(str(spec.bits), str(width))
        grid = GRIDS.get(name)
        if grid is not None and (grid.kind, grid.bits) == ("int", width):
            found.append(replace(spec, grid_name=name))
    return tuple(found) if spec in found or spec.grid.kind == "int" else ()


@dataclass
class Scan:
    """A scan of one model in memory, whose weights it changes and puts back.

    model: in float32, as `load` gives it, transformed by the recipe's transform. groups: what is
    looked at. weights, inputs: the formats to try for a group. solver: how codes are chosen; one that
    needs second moments is replaced by rounding to nearest.
    """

    model: Any
    groups: Sequence[Group]
    weights: Callable[[Group], Sequence[Spec]]
    inputs: Callable[[Group], Sequence[Spec]]
    solver: Solver
    progress: bool = True

    def __post_init__(self) -> None:
        if self.solver.calibrated or isinstance(self.solver, BlockSolver):
            self.solver = RTN()

    # ----------------------------------------------------------------------------------- cheap

    def cheap(self, tokens: Tensor, seed: int = 0) -> list[Row]:
        """Rows by the second-order estimate on token ids [windows, window]."""
        fisher, of_inputs = self._gradients(tokens, seed)
        rows = []
        for group in tqdm(self.groups, desc="scan formats", disable=not self.progress):
            for spec in self.weights(group):
                loss = 0.0
                for name, weight in zip(group.names, self._weights(group), strict=True):
                    error = self._solved(weight, spec).sub_(weight)
                    loss += float(error.square_().mul_(fisher[name]).sum(dtype=torch.float64))
                rows.append(_row(group, "weight", spec, loss / (2 * tokens.numel())))
            for spec in self.inputs(group):
                loss = of_inputs[group.label, spec] / (2 * tokens.numel())
                rows.append(_row(group, "input", spec, loss))
            for name in group.names:
                del fisher[name]
        return rows

    def _gradients(
        self, tokens: Tensor, seed: int
    ) -> tuple[dict[str, Tensor], dict[tuple[str, Spec], float]]:
        """Per layer the sum of squared gradients of its weight, as it is stored; per group and
        format of its input the sum of (gradient * error)^2 over tokens and channels."""
        fisher = {
            name: torch.zeros(shape)
            for group in self.groups
            for name, shape in zip(group.names, group.shapes, strict=True)
        }
        of_inputs = {(g.label, spec): 0.0 for g in self.groups for spec in self.inputs(g)}
        generator = torch.Generator().manual_seed(seed)
        with self._watched(fisher, of_inputs), torch.enable_grad():
            for window in tqdm(tokens, desc="scan", unit="window", disable=not self.progress):
                logits = self.model(input_ids=window[None], use_cache=False).logits[0].float()
                drawn = logits.detach().softmax(-1).multinomial(1, generator=generator)[:, 0]
                F.cross_entropy(logits, drawn, reduction="sum").backward()  # type: ignore[no-untyped-call]
        return fisher, of_inputs

    @contextmanager
    def _watched(
        self, fisher: dict[str, Tensor], of_inputs: dict[tuple[str, Spec], float]
    ) -> Iterator[None]:
        """Every backward pass meanwhile adds to the sums."""
        handles: list[Any] = []
        before = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        for parameter in before:
            parameter.requires_grad_(False)
        for group in self.groups:
            for name, target in zip(group.names, group.targets, strict=True):
                parameter = self.model.get_parameter(target.parameters["weight"])
                parameter.requires_grad_(True)
                hook = _squares(fisher[name], target, group.layer.rotate)
                handles.append(parameter.register_post_accumulate_grad_hook(hook))
            if specs := self.inputs(group):
                watch = _InputErrors(group, specs, of_inputs)
                handles += [watch.attach(self.model.get_submodule(name)) for name in group.names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter, required in before.items():
                parameter.requires_grad_(required)

    # ----------------------------------------------------------------------------------- exact

    def exact(
        self, tokens: Tensor, known: Sequence[Row] = (), keep: Keep = lambda rows: None
    ) -> list[Row]:
        """Rows by measurement on token ids [windows, window].

        known: rows that an interrupted scan had finished; its groups are not measured again. keep: is
        given all rows so far whenever a group is finished.
        """
        recorded = self._recorded(tokens)
        before = recorded.scores.nll.double().nanmean()
        blocks = [name for name, _ in decoder_blocks(self.model)]
        rows = list(known)
        finished = {row["group"] for row in rows}
        left = [group for group in self.groups if group.label not in finished]
        bar = tqdm(
            left, "scan exactly", len(self.groups), initial=len(self.groups) - len(left),
            disable=not self.progress,
        )  # fmt: skip
        for group in bar:
            first = self._first_block(group, blocks)
            for operand, specs in (("weight", self.weights(group)), ("input", self.inputs(group))):
                for spec in specs:
                    with self._quantized(group, operand, spec):
                        scores = recorded.against(f"{group.label} in {spec}", first)
                    parts = {k: v.double().nanmean() for k, v in scores.parts().items()}
                    rise = float(parts["nll"].exp() - before.exp())
                    row = _row(group, operand, spec, float(parts["kl"]), _class(rise))
                    rows.append(row | {"perplexity_rise": rise})
            keep(rows)
        return rows

    def together(self, tokens: Tensor, plans: Sequence[Sequence[Spec]]) -> list[float]:
        """Nats a token of KL(model || quantized model) on token ids [windows, window] for each plan,
        the formats of all groups; inputs in full precision."""
        recorded, found = self._recorded(tokens), []
        for plan in plans:
            with ExitStack() as changed:
                for group, spec in zip(self.groups, plan, strict=True):
                    changed.enter_context(self._quantized(group, "weight", spec))
                scores = recorded.against("the plan found")
            found.append(float(scores.parts()["kl"].double().nanmean()))
        return found

    def _recorded(self, tokens: Tensor) -> Recorded:
        window = tokens.shape[1]
        return Recorded(self.model, Windows(tokens, window, None, window, False))

    def _first_block(self, group: Group, blocks: Sequence[str]) -> int:
        """The first block whose output the group changes; past the last for an output head, unless
        tokens enter by the same weight."""
        for i, block in enumerate(blocks):
            if group.names[0].startswith(f"{block}."):
                return i
        weight = self.model.get_parameter(group.targets[0].parameters["weight"])
        tied = weight is self.model.get_input_embeddings().weight
        return 0 if tied else len(blocks)

    @contextmanager
    def _quantized(self, group: Group, operand: str, spec: Spec) -> Iterator[None]:
        """The model with one operand of a group in this format."""
        if operand == "input":
            layer = replace(group.layer, input=spec)
            handles = [
                self.model.get_submodule(name).register_forward_pre_hook(_snapped(layer))
                for name in group.names
            ]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()
            return
        parameters = [self.model.get_parameter(t.parameters["weight"]) for t in group.targets]
        originals = [parameter.data for parameter in parameters]
        changed = [self._solved(weight, spec) for weight in self._weights(group)]
        try:
            for parameter, weight, target in zip(parameters, changed, group.targets, strict=True):
                weight = rotate(weight) if group.layer.rotate else weight  # back again
                parameter.data = weight.transpose(-1, -2) if target.transposed else weight
            yield
        finally:
            for parameter, original in zip(parameters, originals, strict=True):
                parameter.data = original

    # ------------------------------------------------------------------------------------ both

    def _weights(self, group: Group) -> Iterator[Tensor]:
        """The weights of a group as they are stored: reduction axis last, rotated."""
        for target in group.targets:
            weight = self.model.get_parameter(target.parameters["weight"]).detach()
            yield _stored(weight, target, group.layer.rotate)

    def _solved(self, weight: Tensor, spec: Spec) -> Tensor:
        """The weight that this format makes of it; where rows do not depend on each other a part at
        a time, so that the workspace of an output head stays small."""
        count = max(1, PART // math.prod(weight.shape[1:])) if spec.by_rows else len(weight)
        assert isinstance(self.solver, LinearSolver)
        parts = [self.solver.solve(Problem(part, spec)) for part in weight.split(count)]
        return torch.cat([part.dequantize() for part in parts])


def _row(
    group: Group, operand: str, spec: Spec, loss: float, class_: str | None = None
) -> dict[str, Any]:
    width = spec.bits_per_element((1, group.shapes[0][-1]))
    return {
        "group": group.label,
        "operand": operand,
        "format": str(spec),
        "bits": group.bits(spec) if operand == "weight" else width,
        "predicted_loss": loss,
        "class": class_,
    }


def _class(rise: float) -> str:
    return next((name for limit, name in CLASSES if rise <= limit), LAST_CLASS)


def _stored(weight: Tensor, target: Target, rotated: bool) -> Tensor:
    weight = weight.transpose(-1, -2).contiguous() if target.transposed else weight
    return rotate(weight) if rotated else weight


def _squares(total: Tensor, target: Target, rotated: bool) -> Callable[[Tensor], None]:
    """A hook that adds the squared gradient of a parameter and lets the gradient go."""

    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = _stored(parameter.grad, target, rotated)
        total.addcmul_(gradient, gradient)
        parameter.grad = None

    return hook


def _snapped(layer: LayerPlan) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Any, ...]]:
    """A hook that gives a linear its input as a layer of this plan would see it."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        x = seen(args[0], layer)
        return (rotate(x) if layer.rotate else x, *args[1:])

    return hook


class _InputErrors:
    """Sums (gradient * error)^2 of the input that the linears of a group share.

    Each linear hands in its part of the gradient, W^T dL/dy, as the backward pass reaches it; the
    last one of a window settles.
    """

    def __init__(
        self, group: Group, specs: Sequence[Spec], sums: dict[tuple[str, Spec], float]
    ) -> None:
        self.group, self.specs, self.sums = group, specs, sums
        self._gradient: Tensor | None = None
        self._missing = len(group.names)

    def attach(self, module: nn.Module) -> Any:
        def forward(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            x, weight = args[0].detach(), module.weight
            output.register_hook(lambda g: self._add(x, g.detach() @ weight.detach()))  # type: ignore[no-untyped-call]

        return module.register_forward_hook(forward)

    def _add(self, x: Tensor, gradient: Tensor) -> None:
        self._gradient = gradient if self._gradient is None else self._gradient + gradient
        self._missing -= 1
        if self._missing:
            return
        layer, total = self.group.layer, self._gradient
        plain = rotate(x) if layer.rotate else x
        total = rotate(total) if layer.rotate else total
        for spec in self.specs:
            error = seen(x, replace(layer, input=spec)) - plain
            moved = (error * total).square_().sum(dtype=torch.float64)
            self.sums[self.group.label, spec] += float(moved)
        self._gradient, self._missing = None, len(self.group.names)


@torch.no_grad()
def transformed(
    model: Any,
    transform: Transform,
    planned: Sequence[str],
    stored: Callable[[str], torch.dtype],
    tokens: Tensor,
    layers: Mapping[str, LayerPlan],
) -> None:
    """Change a model in memory as the pipeline will, by what it sees on token ids [windows, window].

    planned: layers inside blocks that will be quantized. stored: dtype of a parameter on disk.
    layers: what each becomes by the recipe, for transforms that search by it.
    """
    smoothing = Smoothing(transform, model, dict(model.named_modules()), layers)
    with smoothing.watching():
        for window in tokens[: transform.samples]:
            model(input_ids=window[None], use_cache=False)

    def output() -> Tensor:
        logits: Tensor = model(input_ids=tokens[:1], use_cache=False).logits
        return logits

    smoothing.fold(list(planned), stored, output, _silent)


def _silent(message: str) -> None:
    """What cannot be folded is said when the model is quantized."""
