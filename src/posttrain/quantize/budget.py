"""From a budget to a plan: the model whole in memory, scanned, and the knapsack solved.

The quantization that follows streams again, so a search needs far more memory than what it is for.
"""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from posttrain.errors import UserError
from posttrain.models.checkpoint import write_json
from posttrain.models.compressed_tensors import METHOD
from posttrain.models.load import load
from posttrain.models.memory import trim
from posttrain.models.source import Source
from posttrain.numbers import Spec, spec
from posttrain.quantize.job import ROTATED_BYTES, SOLVE_BYTES, Job, prepare, say
from posttrain.quantize.memory import GIB, PeakMemory
from posttrain.quantize.progress import RECIPE, SCAN, Progress
from posttrain.quantize.recipe import load_recipe
from posttrain.quantize.search import (
    Search,
    Sizes,
    best,
    check_reachable,
    describe,
    found_plan,
    uniform,
)
from posttrain.quantize.sensitivity import (
    CHEAP,
    EXACT,
    INPUT_BITS,
    PART,
    SCANNED,
    WEIGHT_BITS,
    Group,
    Keep,
    Row,
    Scan,
    family,
    groups_of,
    transformed,
)

Formats = Callable[[Group], Sequence[Spec]]
# float32 values that a forward with gradients keeps, for each that goes into or out of a linear.
KEPT_VALUES = 2
LOGIT_COPIES = 4  # logits, their softmax, their gradient, and one in the making


def scan(
    model: str | Path,
    *,
    recipe: str | Path = "w6a8",
    method: str = CHEAP,
    weights: Sequence[str] | None = None,
    inputs: Sequence[str] | None = None,
    solver: str | None = None,
    transform: str | None = None,
    calibration: str | None = None,
    samples: int | None = None,
    window: int | None = None,
    chat: bool | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """What precision costs where: every fusion group, operand and format of a model.

    The model is held whole in memory, in float32, with its squared gradients (method "cheap").

    Args:
        model: directory, hub id, GGUF file or "demo", in full precision.
        recipe: which layers, and the transform, solver and text; see `quantize`.
        method: "cheap", a second-order estimate from one pass, or "exact", measured one by one.
        weights: formats to try for weights (default: the recipe's at 3 to 8 bits). [] tries none.
        inputs: formats to try for inputs that the recipe quantizes (default: the recipe's at 4, 6
            and 8 bits). [] tries none.
        solver, transform, calibration, samples, window, chat, seed: as in `quantize`.
        progress: show progress bars on standard error.

    Returns:
        `method`, `calibration`, `rows`: a list of `group`, `operand` ("weight" or "input"),
        `format`, `bits` (per element, scales included), `predicted_loss` (nats a token of KL from the
        full-precision model) and `class` (ZeroQuant-V2's I, II or III; null unless exact; then
        `perplexity_rise` is there too).

    Raises:
        UserError: bad model, recipe, text or format; a layer no rule covers.
    """
    settings = load_recipe(recipe).override(
        solver, transform, text=calibration, samples=samples, window=window, chat=chat
    )
    # Nothing is written; a run without a budget has no plan to look for, but text to look at.
    job = prepare(str(model), settings, Path("unwritten"), seed, None, Search(scan=method))
    of_weights, of_inputs = _formats(weights, "weights"), _formats(inputs, "inputs")

    def weights_of(group: Group) -> Sequence[Spec]:
        return family(group.weight, WEIGHT_BITS) if of_weights is None else of_weights

    def inputs_of(group: Group) -> Sequence[Spec]:
        own = group.layer.input
        if own is None:
            return ()
        return family(own, INPUT_BITS) if of_inputs is None else of_inputs

    say(f"predicted peak memory {(PeakMemory().now() + scan_peak(job)) / GIB:.2f} GiB")
    with _scanner(job, weights_of, inputs_of, progress) as scanner:
        return {"method": method, "calibration": job.text, "rows": _rows(job, scanner)}


def _formats(texts: Sequence[str] | None, where: str) -> tuple[Spec, ...] | None:
    try:
        return None if texts is None else tuple(map(spec, texts))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def check_budget(job: Job) -> None:
    """UserError where the budget of a run cannot be met, before any work."""
    assert job.search is not None
    check_reachable(job.search, groups_of(job.flat, job.layers), _sizes(job))


def with_plan(job: Job, state: Progress, progress: bool) -> Job:
    """The run with the plan that its budget asks for: found now, or by an earlier attempt."""
    assert job.search is not None
    if state.search is None:
        say("searching for the plan: the whole model is in memory meanwhile")
        state.search = _found(job, state, progress)
        state.scanned = []
        state.save()
    found = state.search
    plan = found_plan(job.settings.plan, job.layers, found)
    name = f"{job.settings.name} at {found['predicted_bits_per_weight']:.2f} bits"
    description = f"{job.settings.description or job.settings.name}; plan found for a budget"
    settings = replace(job.settings, name=name, description=description, plan=plan)
    (job.out / RECIPE).write_text(
        yaml.safe_dump(settings.to_dict(), sort_keys=False, allow_unicode=True, width=1000),
        encoding="utf-8",
    )
    return job.replanned(settings)


def _found(job: Job, state: Progress, progress: bool) -> dict[str, Any]:
    """The plan of least predicted loss, beside one width for all; where that measures better, it.

    Losses of groups do not quite add up, least of all at few bits.
    """

    def keep(rows: list[Row]) -> None:
        state.scanned = rows
        state.save()

    search, sizes = job.search, _sizes(job)
    assert search is not None
    with _scanner(job, search.options, lambda group: (), progress) as scanner:
        rows = _rows(job, scanner, state.scanned, keep)
        write_json(job.out / SCAN, {"method": search.scan, "rows": rows})
        plans = [best(search, scanner.groups, rows, sizes)]
        plain = uniform(search, scanner.groups, sizes)
        plans += [plain] if plain and plain != plans[0] else []
        measured = scanner.together(_tokens(job, EXACT), plans)
        described = [
            describe(search, scanner.groups, plan, rows, sizes) | {"measured_loss": loss}
            for plan, loss in zip(plans, measured, strict=True)
        ]
    keys = ("predicted_bits_per_weight", "predicted_loss", "measured_loss")
    beside = {key: described[-1][key] for key in keys} if plain else None
    chosen = min(described, key=lambda plan: plan["measured_loss"])
    return chosen | {"uniform": beside, "is_uniform": chosen is not described[0]}


def scan_peak(job: Job) -> int:
    """Bytes that a scan holds above what the process holds when it starts, from shapes alone."""
    assert job.search is not None
    source, tokens = job.source, _tokens(job, job.search.scan)
    whole = 4 * sum(math.prod(source.shape(name)) for name in source.tensor_names())
    shapes = [job.flat[name].shape for name in job.layers]
    weights = [math.prod(shape) for shape in shapes]
    solve_bytes = SOLVE_BYTES["rtn" if job.settings.solver.calibrated else job.settings.solver.name]
    solving = (solve_bytes + ROTATED_BYTES) * min(max(weights), PART) + 12 * max(weights)
    logits = 4 * LOGIT_COPIES * tokens.shape[1] * source.config.get_text_config().vocab_size
    if job.search.scan == EXACT:
        outputs = tokens.numel() * source.config.get_text_config().hidden_size
        kept = 4 * outputs * len(job.stream.blocks) + len(tokens) * logits
        return whole + 4 * sum(weights) + max(solving, kept)
    values = sum(sum(shape[-2:]) for shape in shapes)
    running = 4 * KEPT_VALUES * tokens.shape[1] * values + logits + 8 * max(weights)
    return whole + 4 * sum(weights) + max(solving, running)


def _tokens(job: Job, method: str) -> Tensor:
    """The calibration tokens that a scan looks at."""
    count, window = SCANNED[method]
    return job.scanned[:count, :window]


@contextmanager
def _scanner(job: Job, weights: Formats, inputs: Formats, progress: bool) -> Iterator[Scan]:
    """The model loaded and transformed, to be scanned and let go."""
    model: Any = load(job.model, dtype="float32")
    settings = job.settings
    if settings.transform is not None:
        inside = [name for name in job.layers if name not in job.targets[""]]
        transformed(model, settings.transform, inside, job.source.dtype, job.scanned, job.layers)
    groups = groups_of(job.flat, job.layers)
    scanner = Scan(model, groups, weights, inputs, settings.solver, progress)
    del model
    try:
        yield scanner
    finally:
        scanner.model = None
        gc.collect()
        trim()


def _rows(
    job: Job, scanner: Scan, known: Sequence[Row] = (), keep: Keep = lambda rows: None
) -> list[Row]:
    """What the scan that was asked for finds. known, keep: see `Scan.exact`."""
    assert job.search is not None
    tokens = _tokens(job, job.search.scan)
    if job.search.scan == EXACT:
        return scanner.exact(tokens, known, keep)
    return scanner.cheap(tokens, job.seed)


def _sizes(job: Job) -> Sizes:
    """What a plan for this model weighs, and what the rest of it does."""
    source = job.source
    names = source.tensor_names()
    covered = {job.flat[name].parameters["weight"] for name in job.layers}
    kept = sum(_kept_bytes(source, name) for name in names if name not in covered)
    parameters = sum(math.prod(source.shape(name)) for name in names)
    return Sizes(parameters, kept, padded=job.writer.format.name == METHOD)


def _kept_bytes(source: Source, name: str) -> int:
    """As `CheckpointWriter.kept_tensors` stores it."""
    shape, dtype = source.shape(name), source.dtype(name)
    if dtype.is_floating_point and len(shape) > 1:
        dtype = source.storage_dtype
    return math.prod(shape) * dtype.itemsize
