"""The command line in this process, with verbs that only record how they were called."""

import json
from collections.abc import Callable
from typing import Any

import pytest

import posttrain
from posttrain.cli import main

EVALUATED = {
    "model": "m",
    "nll": 2.5,
    "perplexity": 12.18,
    "tokens": 100,
    "bits_per_weight": 6.25,
    "bytes": 1000,
}
RESULTS: dict[str, dict[str, Any]] = {
    "quantize": {
        "out": "o",
        "bits_per_weight": 6.25,
        "bytes_quantized": 900,
        "bytes_total": 1000,
        "seconds": 1.0,
        "peak_rss_bytes": 10**9,
        "predicted_peak_bytes": 10**9,
        "layers": [{"name": "model.layers.0.mlp.up_proj", "qsnr": 31.0}],
    },
    "evaluate": EVALUATED,
    "compare": {
        "models": [EVALUATED, {**EVALUATED, "model": "n"}],
        "pairs": [
            {
                "a": "m",
                "b": "n",
                "delta_nll": 0.01,
                "ci_low": 0.0,
                "ci_high": 0.02,
                "kl": 0.003,
                "greedy_agreement": 0.97,
            }
        ],
    },
    "chat": {"model": "m", "prompt": "p", "answer": "a", "seconds": 1.0},
    "run": {"recipe": "r", "out": "o", "seconds": 1.0, "stages": []},
}


class Fakes:
    """Stand-ins for the public functions: `calls` keeps what they got."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self._monkeypatch = monkeypatch
        for name in RESULTS:
            self.replace(name, lambda **_: None)

    def replace(self, name: str, does: Callable[..., Any]) -> None:
        """Make the verb do something before it answers; what `does` returns is the answer."""

        def verb(*args: Any, **kwargs: Any) -> dict[str, Any]:
            assert not args, "the command line names every argument"
            self.calls.append((name, kwargs))
            return does(**kwargs) or RESULTS[name]

        # Not setattr: reading the old value would import the real verb and all of PyTorch.
        self._monkeypatch.setitem(vars(posttrain), name, verb)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return Fakes(monkeypatch)


@pytest.fixture
def posttrain_json(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any, str]]:
    """Run with --json: (status, the object on standard output, standard error)."""

    def run(*argv: str) -> tuple[int, Any, str]:
        status = main([*argv, "--json"])
        out, err = capfd.readouterr()
        return status, json.loads(out), err

    return run
