"""Measure models: perplexity, and paired comparison with intervals.

windows.py      the tokens that are scored
score.py        loss of every token, batch by batch
divergence.py   KL to a reference, over all logits or its top k
bootstrap.py    confidence intervals over windows
pairing.py      paired differences, loss by position
sensitivity.py  what each quantized block costs
records.py      per-token records on disk
run.py          several models in lockstep or in turn
verb.py, compare.py   the two verbs
"""

from posttrain.evaluate.bootstrap import Interval, bootstrap_mean
from posttrain.evaluate.compare import compare
from posttrain.evaluate.records import read_records
from posttrain.evaluate.sensitivity import block_sensitivity
from posttrain.evaluate.verb import evaluate

__all__ = [
    "Interval",
    "block_sensitivity",
    "bootstrap_mean",
    "compare",
    "evaluate",
    "read_records",
]
