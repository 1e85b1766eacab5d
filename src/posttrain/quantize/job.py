"""One resolved run: model, plan, calibration tokens and destination, checked before work starts."""

import hashlib
import json
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from posttrain import __version__
from posttrain.data.text import load_text, token_windows
from posttrain.errors import UserError
from posttrain.lm.context import beyond_context
from posttrain.models.branches import LowRankPlan
from posttrain.models.checkpoint import CheckpointWriter
from posttrain.models.linear import require_plain_embedding
from posttrain.models.plan import LayerPlan, Plan
from posttrain.models.source import Source, open_source, require_unquantized
from posttrain.models.walk import Target, quantizable, tied_head
from posttrain.numbers import Spec
from posttrain.quantize.memory import GIB, Demand
from posttrain.quantize.problem import BlockSolver, Track, untracked
from posttrain.quantize.recipe import Calibration, QuantRecipe
from posttrain.quantize.search import Search
from posttrain.quantize.sensitivity import stored_shape
from posttrain.quantize.stream import BlockStream

SEEDS = 1 << 63  # what random generators take, on either side of 0
BATCH_TOKENS = 4096  # per forward of a block: enough to keep two cores busy
TIED_WITH_EMBEDDING = ("lm_head",)  # named by every recipe, absent where the head is tied


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
    windows: torch.Tensor  # calibration token ids [samples, window]; no sample for RTN
    text: dict[str, Any] | None  # identity of the calibration text
    budget: int
    fingerprint: str
    search: Search | None = None  # a budget to find the plan by
    scanned: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # token ids it looks at
    predicted_peak: int = 0
    track: Track = untracked

    @property
    def calibrated(self) -> bool:
        """Whether block inputs flow through the model while it is quantized."""
        return self.settings.calibrated

    @property
    def batch(self) -> int:
        """Windows per forward."""
        return max(1, BATCH_TOKENS // self.settings.calibration.window)

    def spec(self, name: str) -> Spec:
        """What the weight of a planned layer becomes."""
        spec = self.layers[name].weight
        assert spec is not None  # Plan.resolve gives no layer without one
        return spec

    def target(self, name: str) -> Target:
        return next(group[name] for group in self.targets.values() if name in group)

    @property
    def flat(self) -> dict[str, Target]:
        """All targets by name."""
        return {name: target for group in self.targets.values() for name, target in group.items()}

    def replanned(self, settings: QuantRecipe) -> "Job":
        """The same run by a recipe with another plan for the same layers."""
        layers = settings.plan.resolve(self.flat)
        old = self.writer
        writer = CheckpointWriter(self.out, self.source, layers, old.shapes, old.n_shards, old.kv)
        return replace(self, settings=settings, layers=layers, writer=writer)


def prepare(
    model: str,
    settings: QuantRecipe,
    out: Path,
    seed: int,
    memory_budget: float | None,
    search: Search | None = None,
) -> Job:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a directory to write to")
    if not -SEEDS <= seed < SEEDS:
        raise UserError(f"seed must be a whole number below {SEEDS}; found {seed}")
    source = open_source(model)
    require_unquantized(source)
    stream = BlockStream(source)
    targets = {name: quantizable(name, block) for name, block in stream.blocks}
    targets[""] = _outside_targets(stream, settings.plan)
    flat = {name: target for group in targets.values() for name, target in group.items()}
    layers = settings.plan.resolve(flat)
    for pattern in settings.plan.idle_patterns(flat):
        if pattern not in TIED_WITH_EMBEDDING:
            say(f"{pattern!r} in the recipe matches no layer of this model")
    if settings.distill is not None and not any(map(_trainable, layers.values())):
        raise UserError(
            f"recipe {settings.name}: distill needs low-rank branches to train; add "
            "`branches: [{name: lowrank, rank: 8}]` to a rule"
        )
    apart = any(branch.first for layer in layers.values() for branch in layer.branches)
    if apart and isinstance(settings.solver, BlockSolver):
        raise UserError(
            f"recipe {settings.name}: columns of the input are set apart layer by layer; "
            f"{settings.solver.name} solves a block at once: choose another solver, such as gptq"
        )
    nothing = torch.empty(0, settings.calibration.window, dtype=torch.long)
    seen, text = nothing, None
    if settings.sees_text or search is not None:
        note = beyond_context(stream.model, settings.calibration.window, "window")
        if note is not None:
            say(note)
        seen, text = calibration_windows(source, settings.calibration, seed)
    shapes = {name: stored_shape(target) for name, target in flat.items()}
    return Job(
        model=model,
        settings=settings,
        out=out,
        seed=seed,
        source=source,
        stream=stream,
        targets=targets,
        layers=layers,
        writer=CheckpointWriter(
            out, source, layers, shapes, len(stream.blocks) + 1, settings.plan.kv
        ),
        windows=seen if settings.sees_text else nothing,
        text=text,
        budget=_activation_budget(memory_budget),
        fingerprint=_fingerprint(source, settings, seed, seen, search),
        search=search,
        scanned=nothing if search is None else seen,
    )


def _trainable(layer: LayerPlan) -> bool:
    return any(isinstance(branch, LowRankPlan) for branch in layer.branches)


def _outside_targets(stream: BlockStream, plan: Plan) -> dict[str, Target]:
    """Linears outside the blocks: an output head. One that is tied with the embedding changes what
    tokens enter as, so it stays as it is unless the plan names it."""
    tied = tied_head(stream.model)
    if tied is not None and plan.names(tied[0]):
        head, embedding = tied
        require_plain_embedding(stream.model, embedding)
        (target,) = quantizable(head, stream.model.get_submodule(head)).values()
        return {head: replace(target, parameters={"weight": f"{embedding}.weight"})}
    inside = tuple(f"{name}." for name, _ in stream.blocks)
    found: dict[str, Target] = {}
    for name, module in stream.model.named_modules():
        owned = f"{name}.weight" in stream.outside and not name.startswith(inside)
        if isinstance(module, nn.Linear) and owned:
            found |= quantizable(name, module)
    return found


def calibration_windows(
    source: Source, settings: Calibration, seed: int
) -> tuple[torch.Tensor, dict[str, Any]]:
    text = load_text(settings.text, split="calibration")
    try:
        tokenizer = source.tokenizer()
    except UserError as error:
        fix = "add it, or look at no text with --solver rtn --transform none, without a budget"
        raise UserError(f"{error}; {fix}") from None
    windows = token_windows(text, tokenizer, settings.window, chat=settings.chat)
    if len(windows) < settings.samples:
        say(
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
    return int(gib * GIB) if gib is not None else psutil.virtual_memory().available // 4


def _fingerprint(
    source: Source,
    settings: QuantRecipe,
    seed: int,
    windows: torch.Tensor,
    search: Search | None,
) -> str:
    parts: dict[str, Any] = {
        "source": source.fingerprint(),
        "recipe": settings.to_dict(),
        "posttrain": __version__,
        "torch": torch.__version__,
    }
    if search is not None:
        parts["search"] = search.to_dict()
    if len(windows):
        # Sums over tokens depend on how the threads share them.
        parts |= {
            "seed": seed,
            "threads": torch.get_num_threads(),
            "windows": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# Bytes per weight that a solve holds beside the weight itself: scaled values, codes, the
# dequantized copy and its error for rounding; the working copy, steps and codes for GPTQ; what is
# learnt, its gradient, Adam's two moments and what is kept to go backward for the others.
SOLVE_BYTES = {"rtn": 16, "mse": 28, "gptq": 40, "adaround": 72, "zq-local": 80, "zq-global": 64}
TEACHER_COPIES = 3  # of the logits, while the teacher's likeliest tokens are found
BACKWARD_BYTES = 4 * 12  # per token and channel of the widest linear, kept to go backward
ROTATED_BYTES = 4  # and of the rotated weight
HEAD_PART = 1 << 23  # weights of an output head that are solved at a time
HEAD_BYTES = 6  # of a head's weight in float32 and its codes
# Freed memory that the C library keeps for reuse, as measured: factorisations leave holes.
RTN_KEEPS, CALIBRATED_KEEPS = 32 << 20, 128 << 20


def demand(job: Job) -> Demand:
    """Predict memory from shapes alone."""
    source, calibration = job.source, job.settings.calibration
    blocks = [job.stream.tensors(name) for name, _ in job.stream.blocks]
    flat = job.flat
    planned = {name: math.prod(flat[name].shape) for name in job.layers}
    inside = [name for name in job.layers if name not in job.targets[""]]
    linears = [flat[name].shape for name in inside if flat[name].kind == "linear"]
    widest = max((max(shape) for shape in linears), default=0)
    outside = [source.nbytes(name) for name in job.stream.outside]
    heads = [planned.pop(name) for name in job.targets[""] if name in planned]
    running = job.calibrated
    gram = 4 * max((shape[1] ** 2 for shape in linears), default=0)
    gram *= job.settings.solver.needs_moments
    cache = 4 * job.windows.numel() * source.config.get_text_config().hidden_size
    rotated = any(layer.rotate for layer in job.layers.values())
    solver = job.settings.solver
    solve = SOLVE_BYTES[solver.name] + ROTATED_BYTES * rotated
    searched = job.settings.transform is not None and job.settings.transform.kept > 0
    at_once, backward = max(planned.values(), default=0), 0
    if isinstance(solver, BlockSolver):
        groups = job.targets.values()
        at_once = max(sum(planned.get(name, 0) for name in group) for group in groups)
        backward = BACKWARD_BYTES * calibration.window * widest
        cache *= 2
    return Demand(
        outside=_kept_bytes(source, job.stream.outside)
        + HEAD_BYTES * sum(heads)
        + solve * min(max(heads, default=0), HEAD_PART),
        embed=2 * sum(outside) if running else 0,
        block=4 * max(_weights(source, names) for names in blocks),
        stored=2 * max(_weights(source, names) for names in blocks),
        solve=solve * at_once + 10 * gram + backward,
        statistics=3 * gram * (1 + solver.holds_back),
        activations=cache if cache <= job.budget else 0,
        forward=4 * 6 * job.batch * calibration.window * widest if running else 0,
        distill=_distill_bytes(job),
        allocator=CALIBRATED_KEEPS if solver.calibrated or searched else RTN_KEEPS,
    )


def _distill_bytes(job: Job) -> int:
    """Distilling holds the teacher whole and the logits of a batch, then the student and what its
    backward pass needs."""
    settings = job.settings.distill
    if settings is None:
        return 0
    config = job.source.config.get_text_config()
    everything = 4 * _weights(job.source, job.source.tensor_names())
    tokens = settings.batch * job.settings.calibration.window
    heads = config.num_attention_heads
    window = job.settings.calibration.window
    # Logits, those of all tokens but the last, and what their normalisation makes of them.
    teacher = 4 * TEACHER_COPIES * job.batch * window * config.vocab_size
    # Logits, their gradient and softmax; per block the inputs of its linears and the attention.
    logits = 4 * 5 * tokens * config.vocab_size
    kept = 4 * len(job.stream.blocks) * tokens * (
        8 * config.hidden_size + 4 * config.intermediate_size + heads * window
    )  # fmt: skip
    return everything + max(teacher, logits + kept)


def _kept_bytes(source: Source, names: list[str]) -> int:
    """Tensors as they are stored, and the largest read one beside its converted copy."""
    converted = [name for name in names if source.dtype(name) != source.storage_dtype]
    stored = source.storage_dtype.itemsize * _weights(source, names)
    return stored + max((source.nbytes(name) for name in converted), default=0)


def _weights(source: Source, names: list[str]) -> int:
    return sum(math.prod(source.shape(name)) for name in names)


def say(message: str) -> None:
    print(f"posttrain: {message}", file=sys.stderr)
