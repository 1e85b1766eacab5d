"""Which blocks cost what: quantize one decoder block at a time and see how far the output moves.

For every block i the reference runs with that one block taken from the quantized model, and the
result is KL(reference || changed reference), the mean over positions of a few windows. Blocks
before i give what they gave in the reference itself, so their outputs are recorded once and
replayed: only the suffix is computed, which halves the work.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from posttrain.errors import UserError
from posttrain.evaluate.divergence import FullTarget
from posttrain.evaluate.score import Scorer
from posttrain.evaluate.windows import Batch, Windows
from posttrain.lm.engine import TorchEngine

WINDOWS, WINDOW = 2, 256


def block_sensitivity(
    reference: torch.nn.Module, model: torch.nn.Module, windows: Windows, progress: bool = True
) -> list[dict[str, Any]]:
    """``[{"block": name, "kl": nats}]`` in block order.

    While it runs, blocks of ``reference`` are replaced and put back, so nothing else may use it.
    Raises UserError when the two models' blocks do not correspond.
    """
    from tqdm import tqdm

    from posttrain.models.walk import decoder_blocks

    blocks, changed = decoder_blocks(reference), dict(decoder_blocks(model))
    if [name for name, _ in blocks] != list(changed):
        raise UserError(
            f"sensitivity needs the same blocks in both models, found {len(blocks)} in the "
            f"reference and {len(changed)} in the other"
        )
    batch = Batch(0, len(windows), 1)
    runner = TorchEngine(reference)  # one engine for all: only blocks may make a difference
    recorder = Scorer(reference, "the reference", windows, runner=runner)
    with _recorded(blocks) as outputs:
        targets = recorder(batch, keep=FullTarget)
    found = []
    for i, (name, _) in enumerate(tqdm(blocks, desc="sensitivity", disable=not progress)):
        swaps = {before: _Replay(block, outputs[before]) for before, block in blocks[:i]}
        scorer = Scorer(reference, f"block {name}", windows, against=True, runner=runner)
        with _swapped(reference, swaps | {name: changed[name]}):
            scorer(batch, targets)
        found.append({"block": name, "kl": float(scorer.scores().parts()["kl"].double().mean())})
    return found


class _Replay(torch.nn.Module):
    """Stands in for a block whose output is known. Everything else a model may ask of a block
    (its attention type, say) is answered by the block itself."""

    def __init__(self, block: torch.nn.Module, output: Any) -> None:
        super().__init__()
        # In a list, so that the block is not registered as a child.
        self._held = [block]
        self._output = output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_held"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._output


@contextmanager
def _recorded(blocks: list[tuple[str, torch.nn.Module]]) -> Iterator[dict[str, Any]]:
    outputs: dict[str, Any] = {}

    def record(name: str) -> Any:
        return lambda module, args, output: outputs.__setitem__(name, output)

    hooks = [block.register_forward_hook(record(name)) for name, block in blocks]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _swapped(model: torch.nn.Module, swaps: dict[str, torch.nn.Module]) -> Iterator[None]:
    originals = {name: model.get_submodule(name) for name in swaps}
    try:
        for name, module in swaps.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)
