"""The compare verb: models on the same tokens, each paired with the first one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.data import Text
from posttrain.errors import UserError
from posttrain.evaluate import bootstrap, provenance
from posttrain.evaluate.generations import answers, side_by_side
from posttrain.evaluate.pairing import pair, position_nll
from posttrain.evaluate.perplexity import Options, describe_scores, describe_text
from posttrain.evaluate.records import check_records_path, write_records
from posttrain.evaluate.run import Divergence, fits_together, score_in_turn, score_lockstep
from posttrain.evaluate.score import Scores
from posttrain.evaluate.sensitivity import WINDOW, WINDOWS, block_sensitivity
from posttrain.evaluate.subject import Subject, require_same_tokens, tell_apart
from posttrain.evaluate.windows import Windows
from posttrain.models.load import set_resident
from posttrain.numbers import Spec

KL_KINDS = ("full", "topk")


def compare(
    models: Sequence[Any],
    *,
    text: str | Path | Text | None = None,
    window: int = 512,
    stride: int | None = None,
    max_tokens: int | None = None,
    chat: bool = False,
    dtype: str = "float32",
    kv: str | Spec | None = None,
    kl: str = "full",
    top_k: int = 64,
    generations: bool = True,
    sensitivity: bool = False,
    records: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure models on the same tokens and pair each with the first, the reference.

    Arguments are those of ``evaluate``. ``kv`` is of every model but the first, which keeps its own:
    so a model can be compared with itself. ``kl`` is "full" or "topk" (the reference's ``top_k``
    likeliest tokens and the rest as one bucket). Models run in lockstep if they fit in memory
    together, else one after another with ``kl="topk"``: ``mode`` and ``notes`` in the result say
    which. ``posttrain.compare`` is this and, with ``out``, the page of the result.

    Result: ``models`` (each as ``evaluate`` gives it, with ``layers`` and ``recipe`` where the
    model's folder has them, and ``block_sensitivity`` where asked for) and ``pairs`` of ``a``
    (the reference), ``b``, ``delta_nll`` = NLL of b minus NLL of a (positive: b is worse),
    ``ci_low`` and ``ci_high`` (its 95% bootstrap interval over windows, BCa; None for a
    single window), ``kl`` = KL(a || b) in nats per token with its interval, and
    ``greedy_agreement`` (share of positions with the same likeliest token). Where heads are padded to
    different sizes both are over the tokens that all models have, renormalized to them, and
    ``notes`` say so; losses are over each model's own. Models of one name are numbered:
    ``name``, ``name (2)``. Further: ``text``, ``mode``, ``kl``,
    ``bootstrap``, ``position_nll`` (loss by position in the window), ``generations``, ``notes``,
    ``created``, ``machine``, ``command`` and, where asked for, ``records``.
    """
    _check(models, kl, top_k, records, seed)
    options = Options(text, window, stride, max_tokens, chat, records, progress)
    comparison = _Comparison(
        [Subject.of(model, dtype, kv=kv if i else None) for i, model in enumerate(models)],
        options,
        Divergence(kl, top_k),
        seed,
    )
    if sensitivity:
        comparison.require_same_depth()
    comparison.score(generations)
    result = comparison.result()
    if sensitivity:
        comparison.add_sensitivity(result)
    extra = {
        "kv": kv,
        "kl": kl,
        "top-k": top_k if kl == "topk" else None,
        "sensitivity": sensitivity,
        "no-generations": not generations,
        "seed": seed or None,
    }
    result["command"] = provenance.command(comparison.subjects, options, extra)
    if records is not None:
        result["records"] = str(comparison.write_records(records))
    return result


def _check(models: Sequence[Any], kl: str, top_k: int, records: Any, seed: int) -> None:
    if isinstance(models, (str, Path)) or len(models) < 2:
        raise UserError("compare needs a list of two or more models; the first is the reference")
    if kl not in KL_KINDS:
        raise UserError(f"kl must be one of {', '.join(KL_KINDS)}, not {kl!r}")
    if top_k < 1:
        raise UserError(f"top_k must be at least 1, not {top_k}")
    if not isinstance(seed, int) or seed < 0:
        raise UserError(f"seed must be a whole number of at least 0, not {seed!r}")
    if records is not None:
        check_records_path(records)


@dataclass
class _Comparison:
    """The models, the windows they all see, and what has been measured so far."""

    subjects: list[Subject]
    options: Options
    divergence: Divergence
    seed: int
    text: Text = field(init=False)
    windows: Windows = field(init=False)
    scores: list[Scores] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)
    answers: dict[str, list[str]] = field(default_factory=dict)
    caveats: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        tell_apart(self.subjects)
        self.text = self.options.load_text()
        for subject in self.subjects:
            subject.open_tokenizer()
            require_same_tokens(self.subjects[0], subject)
        self.windows = self.options.cut(self.text, self.subjects[0].tokenizer)
        self.lockstep = fits_together(self.subjects)
        if not self.lockstep:
            self.divergence = Divergence("topk", self.divergence.top_k)
            self.notes.append(provenance.IN_TURN_NOTE.format(k=self.divergence.top_k))
        sizes = [subject.vocabulary() for subject in self.subjects]
        if len(set(sizes)) > 1:
            said = provenance.VOCABULARY_NOTE.format(least=min(sizes), most=max(sizes))
            self.notes.append(said)

    def require_same_depth(self) -> None:
        """Raises UserError where blocks cannot be swapped, before anything is scored."""
        wanted, *depths = [subject.blocks() for subject in self.subjects]
        for subject, blocks in zip(self.subjects[1:], depths, strict=True):
            if None not in (wanted, blocks) and blocks != wanted:
                raise UserError(
                    f"sensitivity swaps blocks: {self.subjects[0].label} has {wanted}, "
                    f"{subject.label} {blocks}; leave it out or compare others"
                )

    def score(self, generations: bool) -> None:
        def visit(subject: Subject) -> None:
            report = subject.quantize_report()
            self.facts.append(subject.facts() | _from_report(report))
            self.caveats += subject.caveats()
            if generations:
                self.answers[subject.label] = answers(subject.model, subject.tokenizer, subject.kv)

        run = score_lockstep if self.lockstep else score_in_turn
        self.scores = run(
            self.subjects, self.windows, self.divergence, visit, self.options.progress
        )
        self.notes += provenance.notes(self.caveats)

    def result(self) -> dict[str, Any]:
        return {
            "models": [
                {"model": subject.label, **describe_scores(scores, self.windows), **facts}
                for subject, scores, facts in self._measured()
            ],
            "pairs": self._pairs(),
            "text": describe_text(self.text, self.windows),
            "mode": "lockstep" if self.lockstep else "in turn",
            "kl": {"kind": self.divergence.kind, "top_k": self.divergence.used_top_k},
            "bootstrap": {
                "method": "BCa over windows",
                "confidence": bootstrap.CONFIDENCE,
                "resamples": bootstrap.RESAMPLES,
                "seed": self.seed,
            },
            "position_nll": position_nll(self._named_scores(), self.windows, self.seed),
            "generations": side_by_side(self.answers) if self.answers else [],
            "notes": self.notes,
            "created": provenance.created(),
            "machine": provenance.machine(),
        }

    def add_sensitivity(self, result: dict[str, Any]) -> None:
        reference = self.subjects[0]
        short = Options(self.text, min(WINDOW, self.options.window), chat=self.options.chat)
        windows = short.cut(self.text, reference.tokenizer).head(WINDOWS)
        for subject, entry in zip(self.subjects[1:], result["models"][1:], strict=True):
            if not fits_together([reference, subject]):
                self.notes.append(provenance.NO_SENSITIVITY_NOTE.format(name=subject.label))
                continue
            # Block by block is PyTorch's work, which should not unpack a weight more than once.
            set_resident(subject.open(), "dequantized")
            entry["block_sensitivity"] = block_sensitivity(
                reference.open(), subject.open(), windows, self.options.progress
            )
            if not self.lockstep:
                subject.close()

    def write_records(self, path: str | Path) -> Path:
        return write_records(path, self.windows, self.text.sha256, self._named_scores())

    def _measured(self) -> Any:
        return zip(self.subjects, self.scores, self.facts, strict=True)

    def _named_scores(self) -> list[tuple[str, Scores]]:
        return [(subject.label, scores) for subject, scores, _ in self._measured()]

    def _pairs(self) -> list[dict[str, Any]]:
        (a, reference), *others = self._named_scores()
        return [pair(a, b, reference, scores, self.seed) for b, scores in others]


def _from_report(report: dict[str, Any]) -> dict[str, Any]:
    """What ``quantize`` wrote beside the checkpoint, as far as a comparison shows it."""
    kept = ("layers", "recipe", "search")
    found: dict[str, Any] = {key: report[key] for key in kept if key in report}
    if isinstance(found.get("recipe"), dict):  # the whole recipe; its name is enough here
        found["recipe"] = found["recipe"].get("name")
    return found
