"""Stream, capture, solve, replace: quantize a model one decoder block at a time.

    for each decoder block:
        load it from disk
        capture what its linears see, under the already quantized prefix   (calibrated solvers)
        solve each linear, put a QuantLinear in its place
        run the quantized block to get the next block's inputs             (calibrated solvers)
        write its shard, record progress, let it go

Peak memory is one block, its statistics and a bounded activation cache. A killed run continues
where it stopped and ends with the same bytes.
"""

import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from posttrain import __version__
from posttrain.data.text import load_text, token_windows
from posttrain.errors import UserError
from posttrain.models.checkpoint import CheckpointWriter
from posttrain.models.linear import QuantLinear
from posttrain.models.plan import LayerPlan
from posttrain.models.shards import read_header
from posttrain.models.source import Source, open_source, require_unquantized
from posttrain.models.walk import Target, assign, quantizable
from posttrain.numbers import QTensor, fake_quantize, qsnr
from posttrain.quantize.activations import ActivationStore
from posttrain.quantize.calibration import InputMoments, MomentCollector
from posttrain.quantize.memory import GIB, Demand, PeakMemory
from posttrain.quantize.progress import (
    MEASURED,
    Progress,
    finished_result,
    open_progress,
    write_json,
)
from posttrain.quantize.recipe import Calibration, QuantRecipe, load_recipe
from posttrain.quantize.solvers import RTN, Log
from posttrain.quantize.stream import COMPUTE_DTYPE, BlockStream

BATCH_TOKENS = 4096  # per forward of a block: enough to keep two cores busy
TIED_WITH_EMBEDDING = ("lm_head",)  # named by every recipe, absent where the head is tied
SNAPSHOT_SECONDS = 30.0  # between snapshots of in-memory block inputs


def quantize(
    model: str | Path,
    *,
    recipe: str | Path = "w6a8",
    out: str | Path,
    solver: str | None = None,
    calibration: str | None = None,
    samples: int | None = None,
    window: int | None = None,
    chat: bool | None = None,
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
        solver: overrides the recipe's solver ("rtn", "mse", "gptq").
        calibration: text file or corpus name the solver calibrates on.
        samples: calibration windows.
        window: tokens per calibration window.
        chat: apply the chat template to calibration records with messages.
        memory_budget: GiB the activation cache may hold before it spills to disk (default: a
            quarter of the memory that is free now).
        seed: which calibration windows are drawn.
        progress: show a progress bar on standard error.
        resume: continue an interrupted run instead of starting over.
        overwrite: replace another result in `out`.

    Returns:
        What was done and measured: see docs/json.md.

    Raises:
        UserError: bad model, recipe, text or output directory; a layer no rule covers.
    """
    settings = load_recipe(recipe).override(
        solver, text=calibration, samples=samples, window=window, chat=chat
    )
    with PeakMemory() as memory:
        job = _prepare(str(model), settings, Path(out), seed, memory_budget)
        result = None if overwrite else finished_result(job.out, job.fingerprint)
        if result is not None:
            _say(f"{job.out} already holds this result")
            return {"out": str(job.out), **result}
        job.predicted_peak = memory.baseline + _demand(job).peak
        _say(f"predicted peak memory {job.predicted_peak / GIB:.2f} GiB")
        state = open_progress(job.out, job.fingerprint, resume, overwrite)
        if state.next_block:
            _say(f"resuming at block {state.next_block} of {len(job.stream.blocks)}")
        started = time.monotonic() - state.seconds
        _quantize_blocks(job, state, started, progress)
        outside = _quantize_outside(job, _say)
        result = _result(job, state.layers + outside)
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
    return {"out": str(job.out), **result, **measured}


@dataclass
class Job:
    """One resolved run: what is to be done to which layer, and with what."""

    model: str
    settings: QuantRecipe
    out: Path
    seed: int
    source: Source
    stream: BlockStream
    targets: dict[str, dict[str, Target]]  # block name ("" outside blocks) -> layer name -> target
    layers: dict[str, LayerPlan]
    writer: CheckpointWriter
    windows: torch.Tensor | None  # calibration token ids [samples, window]
    text: dict[str, Any] | None  # identity of the calibration text
    budget: int
    fingerprint: str
    predicted_peak: int = 0

    @property
    def batch(self) -> int:
        """Windows per forward."""
        return max(1, BATCH_TOKENS // self.settings.calibration.window)

    def target(self, name: str) -> Target:
        return next(group[name] for group in self.targets.values() if name in group)


def _prepare(
    model: str, settings: QuantRecipe, out: Path, seed: int, memory_budget: float | None
) -> Job:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a directory to write to")
    source = open_source(model)
    require_unquantized(source)
    stream = BlockStream(source)
    targets = {name: quantizable(name, block) for name, block in stream.blocks}
    targets[""] = _outside_targets(stream)
    flat = {name: target for group in targets.values() for name, target in group.items()}
    layers = settings.plan.resolve(flat)
    for pattern in settings.plan.idle_patterns(flat):
        if pattern not in TIED_WITH_EMBEDDING:
            _say(f"{pattern!r} in the recipe matches no layer of this model")
    windows, text = None, None
    if settings.solver.calibrated:
        windows, text = _calibration_windows(source, settings.calibration, seed)
    shapes = {name: _stored_shape(target) for name, target in flat.items()}
    return Job(
        model=model,
        settings=settings,
        out=out,
        seed=seed,
        source=source,
        stream=stream,
        targets=targets,
        layers=layers,
        writer=CheckpointWriter(out, source, layers, shapes, len(stream.blocks) + 1),
        windows=windows,
        text=text,
        budget=_activation_budget(memory_budget),
        fingerprint=_fingerprint(source, settings, seed, windows),
    )


def _outside_targets(stream: BlockStream) -> dict[str, Target]:
    """Linears with a weight of their own outside the blocks: an untied output head."""
    return {
        name: Target("linear", tuple(module.weight.shape), ("weight",))
        for name, module in stream.model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in stream.outside
    }


def _calibration_windows(
    source: Source, settings: Calibration, seed: int
) -> tuple[torch.Tensor, dict[str, Any]]:
    text = load_text(settings.text, split="calibration")
    windows = token_windows(text, source.tokenizer(), settings.window, chat=settings.chat)
    if len(windows) < settings.samples:
        _say(
            f"calibration text {text.name} has {len(windows)} windows of {settings.window} tokens, "
            f"{settings.samples} were asked for: using {len(windows)}"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(windows), generator=generator)[: settings.samples]
    windows = windows[drawn.sort().values]
    identity = {"name": text.name, "sha256": text.sha256, "tokens": windows.numel()}
    return windows, identity


def _activation_budget(gib: float | None) -> int:
    if gib is not None and gib <= 0:
        raise UserError(f"memory budget must be positive, found {gib} GiB")
    import psutil

    return int(gib * GIB) if gib is not None else psutil.virtual_memory().available // 4


def _fingerprint(
    source: Source, settings: QuantRecipe, seed: int, windows: torch.Tensor | None
) -> str:
    parts: dict[str, Any] = {
        "source": source.fingerprint(),
        "recipe": settings.to_dict(),
        "posttrain": __version__,
        "torch": torch.__version__,
    }
    if windows is not None:
        # Sums over tokens depend on how the threads share them.
        parts |= {
            "seed": seed,
            "threads": torch.get_num_threads(),
            "windows": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# Bytes per weight that a solve holds beside the weight itself: scaled values, codes, the
# dequantized copy and its error for rounding; the working copy, steps and codes for GPTQ.
SOLVE_BYTES = {"rtn": 16, "mse": 28, "gptq": 40}


def _demand(job: Job) -> Demand:
    """Predict memory from shapes alone."""
    source, calibration = job.source, job.settings.calibration
    blocks = [job.stream.tensors(name) for name, _ in job.stream.blocks]
    flat = {name: target for group in job.targets.values() for name, target in group.items()}
    planned = {name: math.prod(flat[name].shape) for name in job.layers}
    linears = [flat[name].shape for name in job.layers if flat[name].kind == "linear"]
    widest = max((max(shape) for shape in linears), default=0)
    outside = [source.nbytes(name) for name in job.stream.outside]
    running = job.windows is not None
    gram = 4 * max((shape[1] ** 2 for shape in linears), default=0)
    cache = 4 * job.windows.numel() * source.config.get_text_config().hidden_size if running else 0
    return Demand(
        outside=sum(outside) + max(outside),
        embed=2 * sum(outside) if running else 0,
        block=4 * max(_weights(source, names) for names in blocks),
        stored=2 * max(_weights(source, names) for names in blocks),
        solve=SOLVE_BYTES[job.settings.solver.name] * max(planned.values(), default=0)
        + (10 * gram if running else 0),
        statistics=3 * gram if running else 0,
        activations=cache if cache <= job.budget else 0,
        forward=4 * 6 * job.batch * calibration.window * widest if running else 0,
    )


def _weights(source: Source, names: list[str]) -> int:
    return sum(math.prod(source.shape(name)) for name in names)


def _quantize_blocks(job: Job, state: Progress, started: float, progress: bool) -> None:
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
    with bar:
        for index in range(state.next_block, len(job.stream.blocks)):
            state.layers += _quantize_block(job, index, inputs, bar.write)
            bar.update()
            if inputs is not None and not inputs.spilled:
                if time.monotonic() - saved < SNAPSHOT_SECONDS:
                    continue
            state.next_block = index + 1
            state.activations = inputs.snapshot(index + 1) if inputs is not None else None
            state.seconds = time.monotonic() - started
            state.save()
            if inputs is not None:
                inputs.forget_older(state.activations)
            saved = time.monotonic()


def _block_inputs(job: Job, state: Progress) -> ActivationStore | None:
    """The inputs of `state.next_block`; the run starts over if their snapshot is gone."""
    if job.windows is None:
        return None
    shape = (*job.windows.shape, job.source.config.get_text_config().hidden_size)
    inputs = ActivationStore(state.folder, shape, job.budget)
    restored = state.activations is not None and inputs.restore(state.activations)
    if not restored:
        state.next_block, state.layers = 0, []
    job.stream.embed(job.windows, job.batch, None if restored else inputs)
    return inputs


def _quantize_block(
    job: Job, index: int, inputs: ActivationStore | None, log: Log
) -> list[dict[str, Any]]:
    name, _ = job.stream.blocks[index]
    planned = [layer for layer in job.targets[name] if layer in job.layers]
    tensors, records = {}, []
    with job.stream.loaded(index), _replaced(job.stream.model) as replace:
        moments = _capture(job, index, planned, inputs) if inputs is not None else {}
        for layer in planned:
            stored, record, qweight = _solve(job, layer, moments.get(layer), log)
            tensors |= stored
            records.append(record)
            if inputs is not None:
                target = job.target(layer)
                replace(layer, target, job.layers[layer], qweight, _bias(job.stream.model, target))
        if inputs is not None:
            _advance(job, index, inputs)
    tensors |= _kept(job, job.stream.tensors(name), planned)
    job.writer.write_shard(index + 1, tensors)
    return records


def _capture(
    job: Job, index: int, planned: list[str], inputs: ActivationStore
) -> dict[str, InputMoments | None]:
    """Second moments of the inputs of the block's planned linears."""
    linears = {
        name: job.stream.model.get_submodule(name)
        for name in planned
        if job.target(name).kind == "linear"
    }
    prepare = {
        name: lambda x, spec=job.layers[name].input: fake_quantize(x, spec)
        for name in linears
        if job.layers[name].input is not None
    }
    collector = MomentCollector(linears, prepare)
    for start in range(0, len(job.windows), job.batch):
        with collector.listening():
            job.stream.run(index, inputs.get(start, start + job.batch))
    return {name: collector.of(name) for name in linears}


def _advance(job: Job, index: int, inputs: ActivationStore) -> None:
    for start in range(0, len(job.windows), job.batch):
        inputs.put(start, job.stream.run(index, inputs.get(start, start + job.batch)))
    inputs.advance()


def _solve(
    job: Job, name: str, moments: InputMoments | None, log: Log
) -> tuple[dict[str, torch.Tensor], dict[str, Any], QTensor]:
    """Tensors to store, the record of the layer, and its quantized weight."""
    begun = time.monotonic()
    target, layer = job.target(name), job.layers[name]
    solver = job.settings.solver
    if solver.calibrated and target.kind != "linear":
        # A router decides which tokens an expert sees; its second moments are not gathered.
        solver = RTN()
    weight = _weight(job.stream.model, target)
    qweight = solver.solve(weight, layer.weight, moments, lambda text: log(f"{name}: {text}"))
    stored = job.writer.module_tensors(name, qweight, _bias(job.stream.model, target))
    record = {
        "name": name,
        "shape": list(target.shape),
        "weight": str(layer.weight),
        "input": None if layer.input is None else str(layer.input),
        "solver": solver.name,
        "qsnr": round(qsnr(weight, qweight.dequantize()), 4),
        "bits_per_weight": 8 * qweight.nbytes / weight.numel(),
        "seconds": time.monotonic() - begun,
    }
    return stored, record, qweight


def _stored_shape(target: Target) -> tuple[int, ...]:
    """Shape of a quantized weight: the axis that products reduce over is the last."""
    *experts, rows, columns = target.shape
    return (*experts, columns, rows) if target.transposed else target.shape


def _weight(model: nn.Module, target: Target) -> torch.Tensor:
    """The weight of a target in its stored shape."""
    weight = model.get_parameter(target.parameters["weight"]).detach()
    return weight.transpose(-1, -2).contiguous() if target.transposed else weight


def _bias(model: nn.Module, target: Target) -> torch.Tensor | None:
    name = target.parameters.get("bias")
    return None if name is None else model.get_parameter(name).detach()


@contextmanager
def _replaced(model: nn.Module) -> Iterator[Callable[[str, Target, LayerPlan, QTensor, Any], None]]:
    """Put quantized layers into the model for the time of the context."""
    originals: dict[str, nn.Module] = {}

    def replace(name: str, target: Target, layer: LayerPlan, qweight: QTensor, bias: Any) -> None:
        if target.kind == "linear":
            originals[name] = model.get_submodule(name)
            module = QuantLinear.from_qtensor(qweight, layer, bias)
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


def _kept(job: Job, names: list[str], quantized: list[str]) -> dict[str, torch.Tensor]:
    """The tensors that stay in full precision, as they are stored."""
    covered = {
        parameter for name in quantized for parameter in job.target(name).parameters.values()
    }
    kept: dict[str, torch.Tensor] = {}
    for name in names:
        if name not in covered:
            kept |= job.writer.kept_tensors(job.source.read([name]))
    return kept


def _quantize_outside(job: Job, log: Log) -> list[dict[str, Any]]:
    """The tensors outside the blocks: embeddings, final norm, and an output head if planned."""
    planned = [name for name in job.targets[""] if name in job.layers]
    tensors, records = {}, []
    for name in planned:
        for parameter in job.target(name).parameters.values():
            assign(job.stream.model, "", job.source.read([parameter]), COMPUTE_DTYPE)
        stored, record, _ = _solve(job, name, None, log)
        job.stream.model.get_submodule(name).to("meta")
        tensors |= stored
        records.append(record)
    tensors |= _kept(job, job.stream.outside, planned)
    job.writer.write_shard(0, tensors)
    return records


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
        "notes": job.source.notes,
        "fingerprint": job.fingerprint,
        "layers": [{k: v for k, v in layer.items() if k != "seconds"} for layer in layers],
    }


def _say(message: str) -> None:
    print(f"posttrain: {message}", file=sys.stderr)
