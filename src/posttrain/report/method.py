"""The sections of the page about the measurement: what, how, on which machine."""

import json
import shlex
from collections.abc import Callable, Mapping
from typing import Any

from posttrain.report import content, words
from posttrain.report.html import Child, Markup, tag
from posttrain.report.parts import Report, exact, facts, row_head, section, table

TERMS = {
    "NLL": "mean negative log-likelihood of the next token, in nats; perplexity is its exponential",
    "\u0394NLL": "NLL of the model minus NLL of the reference, token by token on the same windows; "
    "positive is worse",
    f"{words.CONFIDENCE} interval": "bootstrap over windows of the paired differences; it covers "
    "the choice of windows, not other kinds of text",
    "KL": "Kullback\u2013Leibler divergence of the model's next-token distribution from the "
    "reference's, in nats, averaged over positions; zero means the same predictions",
    "Same next token": "share of positions where both models rank the same token first",
    "Bits per weight": "stored bits over parameters, with scales, zero points and everything that "
    "stayed in higher precision",
    "QSNR": "power of a weight matrix over the power of its quantization error, in dB",
}


def method(report: Report) -> Markup:
    return section(
        "method",
        "How this was measured",
        facts(_text_facts(report) + _pair_facts(report)),
        _measured(report),
        _recipes(report),
        tag("h3", "Terms"),
        facts(list(TERMS.items())),
    )


def _text_facts(report: Report) -> list[tuple[str, Child]]:
    found = report.data.get("text")
    if not isinstance(found, Mapping):
        return [("Text", found)] if isinstance(found, str) else []
    tokens, sha = found.get("tokens"), found.get("sha256")
    return [
        ("Text", found.get("name")),
        ("SHA-256", tag("code", sha) if sha else None),
        ("Tokens", exact(tokens, words.number(tokens, 0)) if content.real(tokens) else None),
    ]


def _pair_facts(report: Report) -> list[tuple[str, Child]]:
    """How intervals and KL were computed, where the comparison says so."""
    kl, bootstrap = report.data.get("kl"), report.data.get("bootstrap")
    found: list[tuple[str, Child]] = []
    if isinstance(bootstrap, Mapping):
        drawn = [f"{name} {value}" for name, value in bootstrap.items() if name != "method"]
        found.append(("Intervals", ", ".join([str(bootstrap.get("method")), *drawn])))
    if isinstance(kl, Mapping):
        top = f"over the {kl.get('top_k')} likeliest tokens of the reference and one bucket for "
        full = kl.get("kind") == "full"
        found.append(("KL", "over the whole vocabulary" if full else f"{top}the rest"))
    return found


def _count(value: float) -> str:
    return words.number(value, 0)


MEASURED: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("NLL, nats per token", "nll", words.loss),
    ("computed in", "dtype", str),
    ("window", "window", _count),
    ("stride", "stride", _count),
    ("tokens scored", "tokens", _count),
    ("time", "seconds", words.seconds),
    ("tokens per second", "tokens_per_second", _count),
    ("linears run by", "implementation", str),
    ("recipe", "recipe", str),
)


def _measured(report: Report) -> Markup:
    """How each model was scored: the columns that at least one model has."""
    columns = [
        (head, key, say)
        for head, key, say in MEASURED
        if any(model.values.get(key) is not None for model in report.models)
    ]
    rows = [
        tag(
            "tr",
            row_head(report, model, model.name if model.name != model.short else ""),
            [tag("td", _measure(model.values.get(key), say)) for _, key, say in columns],
        )
        for model in report.models
    ]
    return table(["model", *(head for head, _, _ in columns)], rows, "how each model was scored")


def _measure(value: Any, say: Callable[[Any], str]) -> Child:
    if isinstance(value, Mapping):  # a recipe
        value = value.get("name")
    if value is None or isinstance(value, (list, tuple)):
        return words.MISSING
    return exact(value, say(value)) if content.real(value) else str(value)


def _recipes(report: Report) -> list[Markup]:
    """Each recipe in full, folded away."""
    found = [(model, model.values.get("recipe")) for model in report.models]
    return [
        tag(
            "details",
            tag("summary", f"Recipe of {model.short}"),
            tag("pre", tag("code", json.dumps(recipe, indent=2, default=str, ensure_ascii=False))),
        )
        for model, recipe in found
        if isinstance(recipe, Mapping)
    ]


def origin(report: Report) -> Child:
    """The command and the machine: what it takes to repeat this."""
    command, machine = report.data.get("command"), report.data.get("machine")
    if isinstance(command, (list, tuple)):
        command = shlex.join(map(str, command))
    known: list[tuple[str, Child]] = [("created", report.data.get("created"))]
    if isinstance(machine, Mapping):
        known += _machine(machine)
    else:
        known.append(("machine", machine))
    if not command and not any(value for _, value in known):
        return None
    shown = tag("pre", tag("code", command)) if command else None
    return section("origin", "To repeat it", shown, facts(known))


def _plain(value: Any) -> Child:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def _machine(machine: Mapping[str, Any]) -> list[tuple[str, Child]]:
    """Facts about the machine; what ends in `_bytes` is a size."""
    return [
        (
            name.removesuffix("_bytes").replace("_", " "),
            words.size(value) if name.endswith("_bytes") and content.real(value) else _plain(value),
        )
        for name, value in ((str(name), value) for name, value in machine.items())
    ]
