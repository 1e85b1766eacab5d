"""Distillation of branches: train what lies beside the quantized weights to say what the model said.

Minimises, over the factors of all low-rank branches of a quantized model, the mean per token of

    KL(teacher || student)  +  ce * cross-entropy of the next token

on the calibration text (LREC: Chai et al. 2023, INT2.1, arXiv:2306.08162). The teacher is the
unquantized model; its `top` likeliest tokens, and the mass of all others, are computed once and kept
on disk. The quantized weights stay as they are: the backward pass expands a part of one at a time
(`models.linear.FrozenProduct`).
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from posttrain.errors import UserError, did_you_mean
from posttrain.evaluate.divergence import TopTarget
from posttrain.kernels import fast_float32
from posttrain.models.branches import LowRank
from posttrain.models.checkpoint import writing

SAVE_SECONDS = 30.0  # between copies of the training state
HELD_BACK = 16  # one of so many windows tells whether training helped
WARMUP = 0.05  # share of the steps in which the rate rises


@dataclass(frozen=True)
class Distillation:
    """How branches are trained.

    Args:
        steps: optimizer steps (AdamW).
        batch: windows of the calibration text in each.
        rate: largest learning rate; it falls to a twentieth along a cosine.
        top: tokens of the teacher that are kept for each position.
        ce: weight of the cross-entropy of the text itself.
    """

    steps: int = 300
    batch: int = 4
    rate: float = 1e-3
    top: int = 64
    ce: float = 0.1

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "top"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{name} must be a positive whole number; found {value!r}")
        for name, least in (("rate", 1e-12), ("ce", 0.0)):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or value < least:
                raise UserError(f"{name} must be a number, {least:g} or more; found {value!r}")

    @classmethod
    def from_dict(cls, data: Any) -> "Distillation":
        """From the mapping in a recipe. Raises UserError."""
        if not isinstance(data, dict):
            raise UserError(f"expected a mapping such as {{steps: 300}}; found {data!r}")
        known = [f.name for f in fields(cls)]
        for key in data:
            if key not in known:
                raise UserError(f"unknown key {key!r}{did_you_mean(str(key), known)}")
        return cls(**data)

    def rate_at(self, step: int) -> float:
        warm = max(1, round(WARMUP * self.steps))
        if step < warm:
            return self.rate * (step + 1) / warm
        done = (step - warm) / max(1, self.steps - warm)
        return self.rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


@torch.inference_mode()
def teacher_targets(
    teacher: Any, windows: Tensor, top: int, batch: int = 4, progress: bool = True
) -> TopTarget:
    """The `top` likeliest next tokens after every token but the last of `windows` [windows, window],
    their log-probabilities, [windows, window - 1, top] each."""
    found = []
    bar = tqdm(windows.split(batch), desc="teacher", unit="batch", disable=not progress)
    for part in bar:
        logits = teacher(input_ids=part, use_cache=False).logits[:, :-1].float()
        rows = logits.reshape(-1, logits.shape[-1])
        target = TopTarget.of(rows, rows.logsumexp(-1), top)
        shape = (len(part), logits.shape[1], -1)
        found.append((target.log_probability.reshape(shape), target.token.reshape(shape)))
    return TopTarget(torch.cat([p for p, _ in found]), torch.cat([t for _, t in found]))


def distillation_loss(logits: Tensor, tokens: Tensor, target: TopTarget, ce: float) -> Tensor:
    """Mean over tokens of KL + ce * cross-entropy.

    logits: [batch, window, vocabulary] of the student; tokens: [batch, window]; target: of the
    teacher, [batch, window - 1, top].
    """
    rows = logits[:, :-1].float().flatten(0, 1)
    known = TopTarget(target.log_probability.flatten(0, 1), target.token.flatten(0, 1))
    divergence = known.kl(rows, rows.logsumexp(-1)).mean()
    return divergence + ce * cross_entropy(rows, tokens[:, 1:].flatten())


@fast_float32()
def distill(
    student: Any,
    windows: Tensor,
    targets: TopTarget,
    settings: Distillation,
    *,
    seed: int = 0,
    state: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train the low-rank branches of `student` in place; their factors end in their stored format.

    windows: token ids [windows, window]; one in sixteen is held back. state: file in which the
    training state is kept, so that a killed run continues and ends the same.

    Returns {"steps", "loss_before", "loss_after", "kept"}: the loss on windows held back, with
    stored factors. Where training did not lower it the branches are as they were ("kept": false).
    Raises UserError where there is no low-rank branch.
    """
    branches = {name: m for name, m in student.named_modules() if isinstance(m, LowRank)}
    if not branches:
        raise UserError(
            "distill: no layer has a low-rank branch to train; add "
            "`branches: [{name: lowrank, rank: 8}]` to a rule of the recipe"
        )
    held = torch.arange(0, len(windows), HELD_BACK)
    rest = (
        torch.tensor([i for i in range(len(windows)) if i % HELD_BACK])
        if len(windows) > 1
        else held
    )
    student.requires_grad_(False)  # but for the factors
    run = _Run(student, windows, targets, settings)
    before = run.held_back_loss(held)
    start = {name: branch.state_dict() for name, branch in branches.items()}
    start = {name: {k: t.clone() for k, t in held_.items()} for name, held_ in start.items()}
    parameters = {
        f"{name}.{factor}": parameter
        for name, branch in branches.items()
        for factor, parameter in zip(branch.shapes, branch.train_factors(), strict=True)
    }
    run.train(parameters, rest, seed, state, progress)
    for branch in branches.values():
        branch.finish_training()
    after = run.held_back_loss(held)
    kept = after < before
    if not kept:
        for name, branch in branches.items():
            branch.load_state_dict(start[name])
    return {
        "steps": settings.steps,
        "loss_before": before,
        "loss_after": after,
        "kept": kept,
    }


@dataclass
class _Run:
    student: Any
    windows: Tensor
    targets: TopTarget
    settings: Distillation

    def loss(self, index: Tensor) -> Tensor:
        tokens = self.windows[index]
        logits = self.student(input_ids=tokens, use_cache=False).logits
        target = TopTarget(self.targets.log_probability[index], self.targets.token[index].long())
        return distillation_loss(logits, tokens, target, self.settings.ce)

    @torch.no_grad()
    def held_back_loss(self, index: Tensor) -> float:
        parts = index.split(self.settings.batch)
        return sum(float(self.loss(part)) * len(part) for part in parts) / len(index)

    def train(
        self,
        parameters: dict[str, nn.Parameter],
        index: Tensor,
        seed: int,
        state: Path | None,
        progress: bool,
    ) -> None:
        optimizer = torch.optim.AdamW(parameters.values(), weight_decay=0.0)
        first = _restore(state, parameters, optimizer)
        saved = time.monotonic()
        bar = tqdm(
            initial=first, total=self.settings.steps, desc="distill", unit="step",
            file=sys.stderr, disable=not progress,
        )  # fmt: skip
        with bar:
            for step in range(first, self.settings.steps):
                for group in optimizer.param_groups:
                    group["lr"] = self.settings.rate_at(step)
                loss = self.loss(index[_batch(len(index), self.settings.batch, step, seed)])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(parameters.values(), 1.0)
                optimizer.step()
                bar.update()
                bar.set_postfix(loss=f"{float(loss.detach()):.4f}")
                if state is not None and time.monotonic() - saved > SAVE_SECONDS:
                    _save(state, parameters, optimizer, step + 1)
                    saved = time.monotonic()
        if state is not None:
            _save(state, parameters, optimizer, self.settings.steps)


def _batch(count: int, size: int, step: int, seed: int) -> Tensor:
    """Places of a step's windows: a fresh order in every pass over them."""
    places = torch.arange(step * size, (step + 1) * size)
    passes: list[Tensor] = []
    for lap in (places // count).unique().tolist():
        own = (seed * 7919 + lap) % (1 << 64)  # what a generator takes
        order = torch.randperm(count, generator=torch.Generator().manual_seed(own))
        passes.append(order[places[places // count == lap] % count])
    return torch.cat(passes)


def _save(
    path: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, step: int
) -> None:
    part = path.with_suffix(".part")
    values = {name: parameter.detach() for name, parameter in parameters.items()}
    kept = {"step": step, "factors": values, "optimizer": optimizer.state_dict()}
    with writing(path, RuntimeError):  # which is what torch makes of a full disk
        torch.save(kept, part)
        part.replace(path)


def _restore(
    path: Path | None, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> int:
    """The step to go on from."""
    if path is None or not path.is_file():
        return 0
    kept = torch.load(path, weights_only=True)
    for name, parameter in parameters.items():
        parameter.data.copy_(kept["factors"][name])
    optimizer.load_state_dict(kept["optimizer"])
    return int(kept["step"])


def cached_targets(path: Path, compute: Callable[[], TopTarget]) -> TopTarget:
    """Teacher targets from a file, or computed and kept there."""
    if not path.is_file():
        made = compute()
        tensors = {"log_probability": made.log_probability, "token": made.token.int()}
        _save_tensors(path, tensors)
    kept = load_file(path)
    return TopTarget(kept["log_probability"], kept["token"])


def cached_training(
    path: Path, train: Callable[[], tuple[dict[str, Any], dict[str, Tensor]]]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `distill` found and the tensors it trained, from a file, or computed and kept there."""
    if not path.is_file():
        found, tensors = train()
        _save_tensors(path, tensors, {"found": json.dumps(found)})
    with safe_open(path, "pt") as file:
        found = json.loads(file.metadata()["found"])
    return found, load_file(path)


def _save_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """All of them or no file."""
    part = path.with_suffix(".part")
    ordered = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with writing(path):
        save_file(ordered, part, metadata)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)


def trained_tensors(student: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and values of what `distill` changed."""
    for name, module in student.named_modules():
        if isinstance(module, LowRank):
            yield from module.state_dict(prefix=f"{name}.").items()
