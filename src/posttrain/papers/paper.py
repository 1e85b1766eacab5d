"""What a paper is here: how its parts are wired, and its claim as an experiment.

The conditions and controls of an experiment are part of the paper's file: they are written before it
is run. A condition is what the claim says; a control is what has to hold for the experiment to mean
anything (a change that must be seen, or must not be).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.papers.lab import Lab

AREAS = ("quantize", "train", "data", "align", "prompt", "vision")
VERDICTS = ("reproduced", "partly", "not reproduced", "needs a GPU", "not run")


@dataclass
class Evidence:
    """What an experiment found.

    figure: the one number (with its interval) that a catalogue shows.
    measured: everything else, as JSON can hold it; lists of rows for tables.
    holds: whether each condition and each control was met.
    seeds: of the random numbers it used.
    """

    figure: str
    measured: dict[str, Any]
    holds: Mapping[str, bool]
    seeds: Sequence[int] = (0,)


@dataclass(frozen=True)
class Paper:
    """A published method and its headline claim.

    key: its name on the command line and of its file.
    about: what the method does, in a few sentences.
    usage: commands that apply it to a model of the user's own.
    full_size: the command of the experiment at the size of the paper, for a machine that has it.
    conditions, controls: short name -> what must hold, see the top of this file.
    experiment: finds out; its docstring says on which model and text.
    picture: draws what was measured, as SVG.
    """

    key: str
    title: str
    year: int
    area: str
    claim: str
    about: str
    usage: str
    full_size: str
    conditions: Mapping[str, str]
    experiment: Callable[[Lab], Evidence]
    controls: Mapping[str, str] = field(default_factory=dict)
    picture: Callable[[Mapping[str, Any]], str] | None = None

    def __post_init__(self) -> None:
        if self.area not in AREAS:
            raise ValueError(f"{self.key}: area {self.area!r} is none of {', '.join(AREAS)}")
        if not self.conditions:
            raise ValueError(f"{self.key}: a claim without a condition cannot be tested")

    def verdict(self, holds: Mapping[str, bool]) -> str:
        """Without its controls an experiment shows nothing."""
        if set(holds) != {*self.conditions, *self.controls}:
            raise ValueError(f"{self.key}: {sorted(holds)} is not what the file promised to test")
        met = [holds[name] for name in self.conditions]
        if not any(met) or not all(holds[name] for name in self.controls):
            return "not reproduced"
        return "reproduced" if all(met) else "partly"
