"""Blocks solved at once: what a block should compute, and the problem of making it do so."""

from collections.abc import Mapping
from functools import partial

import torch

from posttrain.numbers import QTensor
from posttrain.quantize.activations import ActivationStore
from posttrain.quantize.job import Job
from posttrain.quantize.problem import BlockProblem, BlockSolver, Log, Problem


def teach(job: Job, index: int, solver: BlockSolver, inputs: ActivationStore) -> None:
    """Fill the reference of `inputs` with the outputs of block `index` in full precision (loaded):
    the targets of this block and, for a full-precision teacher, the next one's inputs."""
    reference = inputs.reference
    assert reference is not None  # made with the inputs of a block solver
    given = reference if solver.teacher == "full" else inputs
    for start in range(0, len(job.windows), job.batch):
        reference.put(start, job.stream.run(index, given.get(start, start + job.batch)))
    reference.advance()


def solve_block(
    job: Job,
    index: int,
    solver: BlockSolver,
    problems: Mapping[str, Problem],
    inputs: ActivationStore,
    log: Log,
) -> dict[str, QTensor]:
    """What the planned linears of block `index` become, after `teach`."""
    if not problems:
        return {}
    name, _ = job.stream.blocks[index]
    reference = inputs.reference
    assert reference is not None

    def window(store: ActivationStore, i: int) -> torch.Tensor:
        return store.get(i, i + 1)

    problem = BlockProblem(
        problems=problems,
        layers={layer: job.layers[layer] for layer in problems},
        modules={layer: job.stream.model.get_submodule(layer) for layer in problems},
        samples=len(job.windows),
        inputs=partial(window, inputs),
        targets=partial(window, reference),
        run=partial(job.stream.forward, index),
        seed=job.seed + index,
        log=lambda text: log(f"{name}: {text}"),
        track=job.track,
    )
    with torch.enable_grad():
        return solver.solve_block(problem)
