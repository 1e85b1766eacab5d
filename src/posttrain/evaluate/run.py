"""Score several models on the same windows: in lockstep, or one after another.

In lockstep every model is in memory and each batch goes through all of them, so that KL is over
whatever of the reference's logits is wanted. Where memory does not allow that, one model is
loaded at a time and the reference's top-k log-probabilities wait in a temporary file
(``spool``): never all logits at once, on disk or in memory.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from posttrain.evaluate.divergence import FullTarget, TopTarget
from posttrain.evaluate.score import Keep, Scorer, Scores, Target, vocabulary
from posttrain.evaluate.subject import MEMORY_SHARE, Subject
from posttrain.evaluate.windows import Windows
from posttrain.lm.context import beyond_context

Visit = Callable[[Subject], None]  # called with each subject once, while its model is in memory


@dataclass(frozen=True)
class Divergence:
    """How KL is measured: over "full" logits or the reference's "topk"."""

    kind: str = "full"
    top_k: int = 64

    @property
    def used_top_k(self) -> int | None:
        return self.top_k if self.kind == "topk" else None

    def keep(self) -> Keep:
        if self.kind == "full":
            return FullTarget
        return lambda logits, log_partition: TopTarget.of(logits, log_partition, self.top_k)


def fits_together(subjects: list[Subject]) -> bool:
    """Whether all models fit in memory at once."""
    needed = sum(subject.memory_needed() for subject in subjects)
    return needed < MEMORY_SHARE * psutil.virtual_memory().available


def shared_vocabulary(subjects: Sequence[Subject]) -> int:
    """Logits that every model gives: those of the tokens that all know."""
    return min(subject.vocabulary() for subject in subjects)


def _scorer(
    subject: Subject, windows: Windows, against: bool = False, shared: int | None = None
) -> Scorer:
    model = subject.open()
    subject.window = windows.window
    beyond_context(model, windows.window, "window")
    return Scorer(
        model, subject.label, windows, against=against, runner=subject.engine(), shared=shared
    )


def score_one(subject: Subject, windows: Windows, progress: bool) -> Scores:
    """Scores of one model without a reference."""
    scorer = _scorer(subject, windows)
    with _bar(len(windows), subject.name, progress) as bar:
        for batch in windows.batches(vocabulary(subject.model)):
            scorer(batch)
            bar.update(batch.stop - batch.start)
    return scorer.scores()


def score_lockstep(
    subjects: list[Subject], windows: Windows, divergence: Divergence, visit: Visit, progress: bool
) -> list[Scores]:
    """Scores of all models, the first being the reference, batch by batch."""
    shared = shared_vocabulary(subjects)
    scorers = [_scorer(subject, windows, i > 0, shared) for i, subject in enumerate(subjects)]
    with _bar(len(windows) * len(subjects), "compare", progress) as bar:
        for batch in windows.batches(max(vocabulary(subject.model) for subject in subjects)):
            targets = scorers[0](batch, keep=divergence.keep())
            for scorer in scorers[1:]:
                scorer(batch, targets)
            bar.update((batch.stop - batch.start) * len(subjects))
    for subject in subjects:
        visit(subject)
    return [scorer.scores() for scorer in scorers]


def score_in_turn(
    subjects: list[Subject], windows: Windows, divergence: Divergence, visit: Visit, progress: bool
) -> list[Scores]:
    """Scores of all models with one in memory at a time; ``divergence`` must be "topk"."""
    keep = divergence.keep()
    shared = shared_vocabulary(subjects)
    batches = list(windows.batches(max(subject.vocabulary() for subject in subjects)))
    scores = []
    with tempfile.TemporaryDirectory(prefix="posttrain-") as folder:
        for i, subject in enumerate(subjects):
            scorer = _scorer(subject, windows, i > 0, shared)
            with _bar(len(windows), subject.name, progress) as bar:
                for number, batch in enumerate(batches):
                    spool = Path(folder) / f"{number}.safetensors"
                    if i == 0:
                        _write_targets(spool, scorer(batch, keep=keep))
                    else:
                        scorer(batch, _read_targets(spool))
                    bar.update(batch.stop - batch.start)
            visit(subject)
            scores.append(scorer.scores())
            del scorer  # it holds the model too
            subject.close()
    return scores


def _write_targets(path: Path, targets: Sequence[Any]) -> None:
    """``targets`` are all TopTarget."""
    from safetensors.torch import save_file

    tensors = {}
    for i, target in enumerate(targets):
        tensors[f"{i}.log_probability"] = target.log_probability.cpu()
        tensors[f"{i}.token"] = target.token.cpu().int()
    save_file(tensors, path)


def _read_targets(path: Path) -> list[Target]:
    from safetensors.torch import load_file

    tensors = load_file(path)
    return [
        TopTarget(tensors[f"{i}.log_probability"], tensors[f"{i}.token"].long())
        for i in range(len(tensors) // 2)
    ]


@contextmanager
def _bar(total: int, name: str, progress: bool) -> Iterator[Any]:
    """A progress bar over windows, on standard error."""
    from tqdm import tqdm

    with tqdm(total=total, desc=name[-40:], unit="window", disable=not progress) as bar:
        yield bar
