"""Stream, capture, solve, replace: quantize a model one decoder block at a time.

    for each decoder block:
        load it from disk
        transform it, function preserved                                   (recipes that say so)
        capture what its linears see, under the already quantized prefix   (calibrated solvers)
        solve each linear, or the block at once, put a QuantLinear in its place
        run the quantized block to get the next block's inputs             (calibrated solvers)
        write its shard, record progress, let it go

Peak memory is one block, its statistics and a bounded activation cache. A killed run continues
where it stopped and ends with the same bytes.
"""

import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from posttrain import __version__
from posttrain.errors import UserError
from posttrain.evaluate.divergence import TopTarget
from posttrain.kernels import fast_float32
from posttrain.models.base import DEMO, PICO
from posttrain.models.branches import branch_dict
from posttrain.models.checkpoint import write_json
from posttrain.models.linear import QuantLinear, seen
from posttrain.models.load import load_source
from posttrain.models.memory import trim
from posttrain.models.plan import LayerPlan
from posttrain.models.rotation import rotate
from posttrain.models.shards import OpenFiles, read_header
from posttrain.models.walk import Target, assign, fusion_groups
from posttrain.numbers import QTensor, concatenated, fit_scales, qsnr
from posttrain.quantize.activations import ActivationStore
from posttrain.quantize.beside import Fitted, compensate, set_apart
from posttrain.quantize.blockwise import solve_block, teach
from posttrain.quantize.budget import check_budget, scan_peak, with_plan
from posttrain.quantize.calibration import InputMoments, MomentCollector
from posttrain.quantize.distill import (
    cached_targets,
    cached_training,
    distill,
    teacher_targets,
    trained_tensors,
)
from posttrain.quantize.job import HEAD_PART, Job, demand, prepare, say
from posttrain.quantize.memory import GIB, PeakMemory
from posttrain.quantize.nearest import RTN
from posttrain.quantize.problem import BlockSolver, LinearSolver, Log, Problem, held_back
from posttrain.quantize.progress import MEASURED, Progress, finished_result, nested, open_progress
from posttrain.quantize.recipe import load_recipe, with_idle_options_noted
from posttrain.quantize.search import Search
from posttrain.quantize.stream import COMPUTE_DTYPE
from posttrain.quantize.transforms import Smoothing

SNAPSHOT_SECONDS = 30.0  # between snapshots of in-memory block inputs


@fast_float32()
def quantize(
    model: str | Path,
    *,
    recipe: str | Path = "w6a8",
    out: str | Path,
    solver: str | None = None,
    transform: str | None = None,
    calibration: str | None = None,
    samples: int | None = None,
    window: int | None = None,
    chat: bool | None = None,
    bits: float | None = None,
    max_bytes: int | None = None,
    scan: str | None = None,
    candidates: str | Sequence[str] | None = None,
    memory_budget: float | None = None,
    seed: int = 0,
    progress: bool = True,
    resume: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Quantize `model` by `recipe` into the directory `out`.

    Args:
        model: directory, hub id, GGUF file or "demo".
        recipe: name of a shipped recipe, or path of a YAML file.
        out: directory to write; an interrupted identical run in it is continued.
        solver: overrides the recipe's solver ("rtn", "mse", "gptq", "adaround", "zq-local",
            "zq-global").
        transform: overrides the recipe's transform ("smooth", "crossquant", "awq", "none").
        calibration: text file or corpus name that transform and solver look at.
        samples: calibration windows.
        window: tokens per calibration window.
        chat: apply the chat template to calibration records with messages.
        bits: find the plan that loses least at so many bits per weight, counted over the whole model
            as `bits_per_weight` is; the recipe gives all but the formats of the weights. The search
            holds the model whole in memory, with its squared gradients.
        max_bytes: the same, for a budget in bytes of all tensors.
        scan: how the search predicts losses: "cheap" (the default) or "exact".
        candidates: number formats to choose from, as a list or separated by commas (default: the
            recipe's at 3 to 8 bits).
        memory_budget: GiB the activation cache may hold before it spills to disk (default: a
            quarter of the memory that is free now).
        seed: which calibration windows are drawn.
        progress: show a progress bar on standard error.
        resume: continue an interrupted run instead of starting over.
        overwrite: replace another result in `out`.

    Returns:
        What was done and measured: see docs/json.md.

    Raises:
        UserError: bad model, recipe, text or output directory; a layer no rule covers; a budget
            that no choice of formats meets.
    """
    if str(out) in (DEMO, PICO):
        raise UserError(
            f"out={str(out)!r} is the name of a built-in model, which every command would read "
            "instead; choose another"
        )
    settings = load_recipe(recipe).override(
        solver, transform, text=calibration, samples=samples, window=window, chat=chat
    )
    given = {
        "calibration": calibration, "samples": samples, "window": window, "chat": chat,
        "memory_budget": memory_budget,
    }  # fmt: skip
    search = Search.asked(bits, max_bytes, scan, candidates)
    memory = PeakMemory()
    with ExitStack() as run:  # the lock on `out` is held to its end
        with memory:
            job = prepare(str(model), settings, Path(out), seed, memory_budget, search)
            result = None if overwrite else finished_result(job.out, job.fingerprint)
            if result is not None:
                say(f"{job.out} already holds this result")
                return with_idle_options_noted(given, {"out": str(job.out), **result})
            if search is not None:
                check_budget(job)
            trim()
            # From here on: libraries are imported and headers read, no weight is loaded yet.
            searching = 0 if search is None else scan_peak(job)
            job.predicted_peak = memory.now() + max(demand(job).peak, searching)
            say(f"predicted peak memory {job.predicted_peak / GIB:.2f} GiB")
            state = open_progress(job.out, job.fingerprint, resume, overwrite)
            run.callback(state.release)
            if state.next_block:
                say(f"resuming at block {state.next_block} of {len(job.stream.blocks)}")
            job.track = nested if progress else job.track
            _say_what_is_rounded(job)
            started = time.monotonic() - state.seconds
            job = job if search is None else with_plan(job, state, progress)
            _quantize_blocks(job, state, started, progress)
            outside = _quantize_outside(job, say)
            distilled = _distill(job, state, started, progress)
            result = _result(job, state.layers + outside) | distilled
            if state.search is not None:
                result["search"] = state.search
            job.writer.finish(result)
        measured = {
            "seconds": time.monotonic() - started,
            "peak_rss_bytes": memory.peak,
            "predicted_peak_bytes": job.predicted_peak,
            "machine": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        }
        write_json(job.out / MEASURED, measured)
        state.finish()
        return with_idle_options_noted(given, {"out": str(job.out), **result, **measured})


def _quantize_blocks(job: Job, state: Progress, started: float, progress: bool) -> None:
    if state.next_block == len(job.stream.blocks):
        return
    inputs = _block_inputs(job, state)
    saved = time.monotonic()
    bar = tqdm(
        total=len(job.stream.blocks),
        initial=state.next_block,
        desc=f"quantize {job.settings.name}",
        unit="block",
        file=sys.stderr,
        disable=not progress,
    )
    log = partial(bar.write, file=sys.stderr)  # standard output is the result's
    with bar:
        for index in range(state.next_block, len(job.stream.blocks)):
            state.layers += _quantize_block(job, index, inputs, log)
            bar.update()
            if inputs is None or inputs.spilled or time.monotonic() - saved > SNAPSHOT_SECONDS:
                state.seconds = time.monotonic() - started
                _save(state, index + 1, inputs)
                saved = time.monotonic()


def _save(state: Progress, next_block: int, inputs: ActivationStore | None) -> None:
    state.next_block = next_block
    if inputs is not None:
        state.activations = inputs.snapshot(next_block)
    state.save()
    if state.activations is not None and inputs is not None:
        inputs.forget_older(state.activations)


def _block_inputs(job: Job, state: Progress) -> ActivationStore | None:
    """The inputs of `state.next_block`; the run starts over if their snapshot is gone."""
    if not job.calibrated:
        return None
    shape = (*job.windows.shape, job.source.config.get_text_config().hidden_size)
    if isinstance(job.settings.solver, BlockSolver):
        inputs = ActivationStore(state.folder, shape, job.budget // 2)
        inputs.reference = ActivationStore(state.folder / "reference", shape, job.budget // 2)
    else:
        inputs = ActivationStore(state.folder, shape, job.budget)
    restored = state.activations is not None and inputs.restore(state.activations)
    if not restored:
        state.next_block, state.layers = 0, []
    job.stream.embed(job.windows, job.batch, None if restored else inputs)
    if inputs.reference is not None and not restored:
        for start in range(0, len(job.windows), job.batch):
            inputs.reference.put(start, inputs.get(start, start + job.batch))
        inputs.reference.advance()
    return inputs


def _quantize_block(
    job: Job, index: int, inputs: ActivationStore | None, log: Log
) -> list[dict[str, Any]]:
    name, _ = job.stream.blocks[index]
    planned = [layer for layer in job.targets[name] if layer in job.layers]
    tensors: dict[str, torch.Tensor] = {}
    records = []
    solver, calibrated = job.settings.solver, job.settings.solver.calibrated
    with job.stream.loaded(index), _replaced(job.stream.model) as replace:
        changed = _transform(job, index, planned, inputs, log) if inputs is not None else []
        moments: dict[str, InputMoments | None] = {}
        if inputs is not None and solver.needs_moments:
            moments = _capture(job, index, planned, inputs)
        shared = _shared_factors(job, planned, moments)
        decided: dict[str, QTensor] = {}
        if inputs is not None and isinstance(solver, BlockSolver):
            teach(job, index, solver, inputs)
            problems = {
                layer: _problem(job, layer, moments.get(layer), log, shared[layer])[0]
                for layer in planned
                if job.target(layer).kind == "linear"
            }
            decided = solve_block(job, index, solver, problems, inputs, log)
            del problems
        for layer in planned:
            found = _solve(
                job, layer, moments.get(layer), log, shared[layer], decided.pop(layer, None)
            )
            stored, record, qweight, branches = found
            tensors |= stored
            records.append(record | {"smoothed": f"{layer}.weight" in changed})
            if calibrated:
                target = job.target(layer)
                bias = _bias(job.stream.model, target)
                replace(layer, target, job.layers[layer], qweight, bias, branches)
        if inputs is not None and calibrated:
            _advance(job, index, inputs)
        tensors |= _kept(job, job.stream.tensors(name), planned, changed)
    job.writer.write_shard(index + 1, tensors)
    del tensors
    trim()
    return records


def _transform(
    job: Job, index: int, planned: list[str], inputs: ActivationStore, log: Log
) -> list[str]:
    """Transform the block; names of the parameters changed.

    A solver that sees no text leaves it at that: the block's own outputs, seen on the way, are the
    next block's inputs.
    """
    transform, solver = job.settings.transform, job.settings.solver
    if transform is None:
        return []
    name, block = job.stream.blocks[index]
    modules = {f"{name}.{local}": module for local, module in block.named_modules()}
    smoothing = Smoothing(transform, job.stream.model, modules, job.layers)
    sample = inputs.get(0, 1)
    for start in range(0, len(job.windows), job.batch):
        watched = start < transform.samples
        if solver.calibrated and not watched:
            break
        with smoothing.watching() if watched else nullcontext():
            output = job.stream.run(index, inputs.get(start, start + job.batch))
        if not solver.calibrated:
            inputs.put(start, output)
    if not solver.calibrated:
        inputs.advance()
    return smoothing.fold(planned, job.source.dtype, lambda: job.stream.run(index, sample), log)


def _capture(
    job: Job, index: int, planned: list[str], inputs: ActivationStore
) -> dict[str, InputMoments | None]:
    """Second moments of the inputs of the block's planned linears."""
    linears = {
        name: job.stream.model.get_submodule(name)
        for name in planned
        if job.target(name).kind == "linear"
    }
    prepare = {name: partial(seen, layer=job.layers[name]) for name in linears}
    weight = job.settings.calibration.first_token_weight
    plans = {name: job.layers[name] for name in linears}
    kinds = {name: (plan.rotate, plan.input, plan.outliers) for name, plan in plans.items()}
    collector = MomentCollector(linears, prepare, weight, kinds)
    solver = job.settings.solver
    held = held_back(len(job.windows)) if solver.holds_back else []
    for start in range(0, len(job.windows), job.batch):
        with collector.listening([i - start for i in held if 0 <= i - start < job.batch]):
            job.stream.run(index, inputs.get(start, start + job.batch))
    return {name: collector.of(name) for name in linears}


def _shared_factors(
    job: Job, planned: list[str], moments: dict[str, InputMoments | None]
) -> dict[str, dict[int, torch.Tensor]]:
    """Per layer, the per-tensor factors of its scale chain that its fusion group has in common.

    Runtimes that fuse q/k/v or gate/up need one NVFP4 global scale for the fused matrix.
    """
    shared: dict[str, dict[int, torch.Tensor]] = {}
    for group in fusion_groups(planned):
        spec = job.spec(group[0])
        whole = [i for i, f in enumerate(spec.factors) if i and str(f.partition) == "tensor"]
        stored: tuple[Any, ...] = ()
        if whole and len(group) > 1:
            # What is quantized: columns that a branch sets apart would widen the factor for nothing.
            weights = [
                set_apart(job.layers[name], _weight(job, name), moments.get(name))[1]
                for name in group
            ]
            stored = fit_scales(torch.cat(weights, dim=-2), spec).stored
        for name in group:
            # Each layer stores its own copy: a checkpoint has no shared tensors.
            shared[name] = {i: stored[i].clone() for i in whole if stored}
    return shared


def _advance(job: Job, index: int, inputs: ActivationStore) -> None:
    for start in range(0, len(job.windows), job.batch):
        inputs.put(start, job.stream.run(index, inputs.get(start, start + job.batch)))
    inputs.advance()


def _solve(
    job: Job,
    name: str,
    moments: InputMoments | None,
    log: Log,
    known: dict[int, torch.Tensor] | None = None,
    decided: QTensor | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, Any], QTensor, list[nn.Module]]:
    """Tensors to store, the record of the layer, its quantized weight and its branches.

    `decided` is that weight where it was solved with its block.
    """
    begun = time.monotonic()
    target, layer = job.target(name), job.layers[name]
    solver = job.settings.solver if decided is not None else _solver_of(job, target)
    problem, apart = _problem(job, name, moments, log, known)
    weight = problem.weight

    def solve(part: torch.Tensor) -> QTensor:
        assert isinstance(solver, LinearSolver)
        return solver.solve(replace(problem, weight=part))

    head = name in job.targets[""] and job.spec(name).by_rows
    if decided is not None:
        qweight = decided
    else:
        qweight = concatenated(map(solve, _row_parts(weight))) if head else solve(weight)
    decoded = qweight.dequantize()
    branches = compensate(layer, weight - decoded, apart) if layer.branches else []
    bias = _bias(job.stream.model, target)
    stored = job.writer.module_tensors(name, qweight, bias, branches)
    beside = sum(t.nbytes for branch in branches for t in branch.state_dict().values())
    record = {
        "name": name,
        "shape": list(target.shape),
        "weight": str(layer.weight),
        "input": None if layer.input is None else str(layer.input),
        "rotated": layer.rotate,
        "outliers": layer.outliers,
        "solver": solver.name,
        "branches": list(map(branch_dict, layer.branches)),
        "qsnr": round(qsnr(weight, decoded), 4),
        "bits_per_weight": 8 * (qweight.nbytes + beside) / weight.numel(),
        "seconds": time.monotonic() - begun,
    }
    return stored, record, qweight, branches


def _problem(
    job: Job,
    name: str,
    moments: InputMoments | None,
    log: Log,
    known: dict[int, torch.Tensor] | None = None,
) -> tuple[Problem, Fitted]:
    """What a solver is to do for a layer, and the branches that took their part of it before."""
    apart, weight, moments = set_apart(job.layers[name], _weight(job, name), moments)
    problem = Problem(
        weight,
        job.spec(name),
        moments,
        known or {},
        log=lambda text: log(f"{name}: {text}"),
        track=job.track,
    )
    return problem, apart


def _solver_of(job: Job, target: Target) -> LinearSolver:
    """What decides a layer that is solved by itself."""
    solver = job.settings.solver
    if solver.calibrated and target.kind != "linear":
        # A router decides which tokens an expert sees; its second moments are not gathered.
        return RTN()
    return solver.first if isinstance(solver, BlockSolver) else solver


def _say_what_is_rounded(job: Job) -> None:
    solver = job.settings.solver
    experts = [name for name in job.layers if job.target(name).kind != "linear"]
    if solver.calibrated and experts:
        say(
            f"{len(experts)} layers of experts are rounded to nearest: {solver.name} would have to "
            "know which tokens a router sends to each"
        )


def _row_parts(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A head is far larger than other layers; where rows do not depend on each other it is solved
    a part at a time, so that its workspace is not."""
    return weight.split(max(1, HEAD_PART // weight.shape[1]))


def _weight(job: Job, name: str) -> torch.Tensor:
    """The weight of a layer as it is stored: the axis that products reduce over last, rotated."""
    target = job.target(name)
    weight = job.stream.model.get_parameter(target.parameters["weight"]).detach()
    weight = weight.transpose(-1, -2).contiguous() if target.transposed else weight
    return rotate(weight) if job.layers[name].rotate else weight


def _bias(model: nn.Module, target: Target) -> torch.Tensor | None:
    name = target.parameters.get("bias")
    return None if name is None else model.get_parameter(name).detach()


@contextmanager
def _replaced(model: nn.Module) -> Iterator[Callable[..., None]]:
    """Put quantized layers into the model for the time of the context."""
    originals: dict[str, nn.Module] = {}

    def replace(
        name: str,
        target: Target,
        layer: LayerPlan,
        qweight: QTensor,
        bias: torch.Tensor | None,
        branches: Sequence[nn.Module],
    ) -> None:
        if target.kind == "linear":
            originals[name] = model.get_submodule(name)
            module = QuantLinear.from_qtensor(qweight, layer, bias, branches=branches)
            module.resident = "dequantized"
            model.set_submodule(name, module)
            return
        parameter = model.get_parameter(name)
        value = qweight.dequantize(parameter.dtype)
        parameter.data.copy_(value.transpose(-1, -2) if target.transposed else value)

    try:
        yield replace
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)


def _kept(
    job: Job, names: list[str], quantized: list[str], changed: Sequence[str] = ()
) -> dict[str, torch.Tensor]:
    """The tensors that stay in full precision, as they are stored; `changed` come from the model."""
    covered = {
        parameter for name in quantized for parameter in job.target(name).parameters.values()
    }
    kept: dict[str, torch.Tensor] = {}
    for name in names:
        if name in covered:
            continue
        if name in changed:
            tensor = job.stream.model.get_parameter(name).detach()
            kept[name] = tensor.to(job.source.dtype(name))
        else:
            kept |= job.writer.kept_tensors(job.source.read([name]))
    return kept


def _quantize_outside(job: Job, log: Log) -> list[dict[str, Any]]:
    """The tensors outside the blocks: embeddings, final norm, and an output head if planned."""
    planned = [name for name in job.targets[""] if name in job.layers]
    tensors: dict[str, torch.Tensor] = {}
    records = []
    for name in planned:
        for parameter in job.target(name).parameters.values():
            assign(job.stream.model, "", job.source.read([parameter]), COMPUTE_DTYPE)
        stored, record, _, _ = _solve(job, name, None, log)
        job.stream.model.get_submodule(name).to("meta")
        tensors |= stored
        records.append(record)
    tensors |= _kept(job, job.stream.outside, planned)
    job.writer.write_shard(0, tensors)
    return records


def _distill(job: Job, state: Progress, started: float, progress: bool) -> dict[str, Any]:
    """Train the branches of what is written, where the recipe says so, and write them again."""
    settings = job.settings.distill
    if settings is None:
        return {}
    state.next_block, state.activations = len(job.stream.blocks), None
    state.seconds = time.monotonic() - started
    state.save()

    def teach() -> TopTarget:
        teacher = load_source(job.source, COMPUTE_DTYPE)
        return teacher_targets(teacher, job.windows, settings.top, job.batch, progress)

    def train() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        targets = cached_targets(state.folder / "teacher.safetensors", teach)
        trim()
        student = load_source(job.writer.written(), COMPUTE_DTYPE, resident="native")
        found = distill(
            student, job.windows, targets, settings,
            seed=job.seed, state=state.folder / "distill.pt", progress=progress,
        )  # fmt: skip
        return found, dict(trained_tensors(student))

    # Kept before the first shard is written again: a student is never read from mixed shards.
    found, trained = cached_training(state.folder / "trained.safetensors", train)
    if not found["kept"]:
        say("distillation did not lower the loss on text held back: branches are as fitted")
    for index in range(len(job.stream.blocks) + 1):
        stored = _read_shard(job.writer.shard_path(index))
        if any(name in trained for name in stored):
            job.writer.write_shard(index, stored | {n: trained[n] for n in stored if n in trained})
    return {"distilled": found}


def _read_shard(path: Path) -> dict[str, torch.Tensor]:
    with OpenFiles() as files:
        return {name: stored.read(files) for name, stored in read_header(path).items()}


def _result(job: Job, layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything about the run that does not depend on the machine's mood: posttrain.json."""
    shards = [job.writer.shard_path(i) for i in range(len(job.stream.blocks) + 1)]
    stored_bytes = sum(t.nbytes for shard in shards for t in read_header(shard).values())
    names = job.source.tensor_names()
    counts = {name: math.prod(job.source.shape(name)) for name in names}
    covered = [
        parameter for layer in layers for parameter in job.target(layer["name"]).parameters.values()
    ]
    total = sum(job.source.nbytes(name) for name in names)
    quantized = sum(job.source.nbytes(name) for name in covered)
    return {
        "posttrain": __version__,
        "model": job.model,
        "recipe": job.settings.to_dict(),
        "format": job.writer.format.name,
        "format_reason": job.writer.format.reason,
        "bits_per_weight": 8 * stored_bytes / sum(counts.values()),
        "bytes": stored_bytes,
        "bytes_quantized": quantized,
        "bytes_total": total,
        "coverage": quantized / total,
        "left_out": sorted(set(names) - set(covered)),
        "calibration": job.text,
        "seed": job.seed,
        "notes": list(getattr(job.source, "notes", [])),
        "fingerprint": job.fingerprint,
        "layers": [{k: v for k, v in layer.items() if k != "seconds"} for layer in layers],
    }
