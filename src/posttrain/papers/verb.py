"""The verbs `papers` and `reproduce`."""

import json
import pkgutil
import subprocess
from contextlib import closing
from datetime import datetime, timezone
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from posttrain import __version__
from posttrain.errors import UserError, did_you_mean
from posttrain.evaluate.provenance import machine
from posttrain.kernels import fast_float32
from posttrain.models.checkpoint import write_json
from posttrain.papers.lab import Lab, fingerprint
from posttrain.papers.paper import Paper

RESULTS = Path("results") / "papers"  # where `reproduce` writes
HERE = Path(__file__).resolve().parent
SHIPPED = (HERE.parents[2] / RESULTS, HERE / "results")  # in the source tree; once installed
LISTED = ("key", "title", "year", "area", "claim")


@cache
def catalogue() -> dict[str, Paper]:
    """Every paper by its key, oldest first."""
    found = [
        import_module(f"posttrain.papers.{entry.name}")
        for entry in pkgutil.iter_modules([str(HERE)])
    ]
    known = [module.PAPER for module in found if hasattr(module, "PAPER")]
    return {paper.key: paper for paper in sorted(known, key=lambda p: (p.year, p.key))}


def papers(name: str | None = None) -> list[dict[str, Any]] | dict[str, Any]:
    """The catalogue, or the card of one paper.

    Args:
        name: key of a paper.

    Returns:
        A list of `{"key", "title", "year", "area", "claim", "verdict", "figure", "date"}`; with a
        name one such entry with `about`, `usage`, `full_size`, `conditions`, `controls` and
        `evidence` (what `reproduce` wrote, or None).

    Raises:
        UserError: no paper of that name.
    """
    if name is not None:
        return _card(_named(name))
    return [_entry(paper, _evidence(paper.key)) for paper in catalogue().values()]


def reproduce(
    name: str = "all",
    *,
    quick: bool = False,
    out: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any] | list[dict[str, Any]]:
    """Run the experiment of a paper and say whether its claim holds.

    Args:
        name: key of a paper, or "all".
        quick: less text and fewer variants: a rehearsal of two minutes at most. Its figures say
            little, so they are written nowhere unless `out` is given.
        out: directory for KEY.json; default: results/papers where one is. An interrupted run is
            continued.
        progress: name finished steps on standard error.

    Returns:
        `{"key", "verdict", "claim", "figure", "measured", "passed", "conditions", "controls",
        "seconds", ...}`, or a list of them for "all". `conditions` and `controls` are lists of
        `{"name", "text", "passed"}`.

    Raises:
        UserError: no paper of that name.
    """
    if name == "all":
        return [_reproduce(paper, quick, out, progress) for paper in catalogue().values()]
    return _reproduce(_named(name), quick, out, progress)


@fast_float32()
def _reproduce(paper: Paper, quick: bool, out: str | Path | None, progress: bool) -> dict[str, Any]:
    folder = Path(out) if out is not None else None if quick else RESULTS
    partial = None
    if folder is not None:
        sources = [paper.experiment.__module__, Lab.__module__]
        files = [Path(str(import_module(name).__file__)).read_bytes() for name in sources]
        mark = fingerprint(__version__, quick, files)
        partial = folder / f".{paper.key}-{mark}.partial"
    steps = (_evidence(paper.key) or {}).get("steps") if not quick else None
    with closing(Lab(quick, partial, progress, paper.key, steps)) as lab:
        found = paper.experiment(lab)
    verdict = paper.verdict(found.holds)

    def tested(texts: Any) -> list[dict[str, Any]]:
        return [{"name": n, "text": t, "passed": bool(found.holds[n])} for n, t in texts.items()]

    result = {
        "key": paper.key,
        "verdict": verdict,
        "claim": paper.claim,
        "figure": found.figure,
        "measured": found.measured,
        "passed": verdict == "reproduced",
        "conditions": tested(paper.conditions),
        "controls": tested(paper.controls),
        "quick": quick,
        "seconds": round(lab.seconds, 1),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": f"posttrain reproduce {paper.key}{' --quick' if quick else ''}",
        "posttrain": __version__,
        "commit": _commit(),
        "machine": machine(),
        "seeds": list(found.seeds),
        "steps": len(lab.finished),
    }
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{paper.key}.json", result)
        if paper.picture is not None:
            picture = paper.picture(found.measured)
            (folder / f"{paper.key}.svg").write_text(picture, encoding="utf-8")
        if partial is not None:
            partial.unlink(missing_ok=True)
    return result


def _commit() -> str | None:
    """Of the source tree this runs from, with `-dirty` where it differs; None outside of one."""
    root = HERE.parents[2]

    def git(*words: str) -> str:
        ended = subprocess.run(
            ["git", *words], cwd=root, capture_output=True, text=True, check=False
        )
        return ended.stdout.strip() if ended.returncode == 0 else ""

    head = git("rev-parse", "HEAD") if (root / ".git").exists() else ""
    return f"{head}-dirty" if head and git("status", "--porcelain", "--", "src") else head or None


def _named(name: str) -> Paper:
    if name not in catalogue():
        raise UserError(f"no paper {name!r}{did_you_mean(name, catalogue())}")
    return catalogue()[name]


def _entry(paper: Paper, evidence: dict[str, Any] | None) -> dict[str, Any]:
    found = evidence or {"verdict": "not run", "figure": None, "date": None}
    listed = {name: getattr(paper, name) for name in LISTED}
    return listed | {name: found[name] for name in ("verdict", "figure", "date")}


def _card(paper: Paper) -> dict[str, Any]:
    evidence = _evidence(paper.key)
    said = ("about", "usage", "full_size", "conditions", "controls")
    return _entry(paper, evidence) | {n: getattr(paper, n) for n in said} | {"evidence": evidence}


def _evidence(key: str) -> dict[str, Any] | None:
    """What was measured last where one is, or else what posttrain comes with."""
    for folder in (RESULTS, *SHIPPED):
        path = folder / f"{key}.json"
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(
                    f"{path} is not JSON ({error}); run posttrain reproduce {key} again"
                ) from None
            if isinstance(found, dict) and found.get("key") == key:
                return found
            raise UserError(f"{path} is no result for {key}; run posttrain reproduce {key} again")
    return None
