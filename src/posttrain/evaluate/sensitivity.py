"""Which blocks cost what: quantize one decoder block at a time and see how far the output moves.

For every block i the reference runs with that one block taken from the quantized model, and the
result is KL(reference || changed reference), the mean over positions of a few windows. Blocks
before i give what they gave in the reference itself, so their outputs are recorded once and
replayed: only the suffix is computed, which halves the work.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from posttrain.errors import UserError
from posttrain.evaluate.divergence import FullTarget
from posttrain.evaluate.score import Scorer, Scores
from posttrain.evaluate.windows import Batch, Windows
from posttrain.lm.engine import TorchEngine
from posttrain.models.walk import decoder_blocks

WINDOWS, WINDOW = 2, 256


def block_sensitivity(
    reference: torch.nn.Module, model: torch.nn.Module, windows: Windows, progress: bool = True
) -> list[dict[str, Any]]:
    """``[{"block": name, "kl": nats}]`` in block order.

    While it runs, blocks of ``reference`` are replaced and put back, so nothing else may use it.
    Raises UserError when the two models' blocks do not correspond.
    """
    from tqdm import tqdm

    blocks, changed = decoder_blocks(reference), dict(decoder_blocks(model))
    if [name for name, _ in blocks] != list(changed):
        raise UserError(
            f"sensitivity needs the same blocks in both models, found {len(blocks)} in the "
            f"reference and {len(changed)} in the other"
        )
    recorded = Recorded(reference, windows)
    found = []
    for i, (name, _) in enumerate(tqdm(blocks, desc="sensitivity", disable=not progress)):
        with _swapped(reference, {name: changed[name]}):
            parts = recorded.against(f"block {name}", first=i).parts()
        found.append({"block": name, "kl": float(parts["kl"].double().mean())})
    return found


class Recorded:
    """What ``reference`` says of all windows, and what each of its blocks gave on the way.

    Its weights or blocks may then be changed, and put back, to see by how much that moves what it
    says; blocks before the first that changes are not computed again.
    """

    def __init__(self, reference: torch.nn.Module, windows: Windows) -> None:
        self._model, self._windows = reference, windows
        self._batch = Batch(0, len(windows), 1)
        # One engine for all: only what is changed may make a difference.
        self._runner = TorchEngine(reference)
        self._blocks = decoder_blocks(reference)
        scorer = Scorer(reference, "the reference", windows, runner=self._runner)
        with _recorded(self._blocks) as self._outputs:
            self._targets = scorer(self._batch, keep=FullTarget)
        self.scores = scorer.scores()

    def against(self, name: str, first: int = 0) -> Scores:
        """Scores of the model as it is now, against what it said before. ``name``: for errors.
        ``first``: the first block that is not what it was; those before give what they gave."""
        known = {before: _Replay(block, self._outputs[before])
                 for before, block in self._blocks[:first]}  # fmt: skip
        scorer = Scorer(self._model, name, self._windows, against=True, runner=self._runner)
        with _swapped(self._model, known):
            scorer(self._batch, self._targets)
        return scorer.scores()


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
def _swapped(model: torch.nn.Module, swaps: Mapping[str, torch.nn.Module]) -> Iterator[None]:
    originals = {name: model.get_submodule(name) for name in swaps}
    try:
        for name, module in swaps.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)
