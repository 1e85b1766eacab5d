"""Measure models: perplexity, and paired comparison with intervals.

subject.py      a model to be measured: by name, or loaded already
windows.py      the tokens that are scored
score.py        loss of every token, batch by batch
divergence.py   KL to a reference, over all logits or its top k
bootstrap.py    confidence intervals over windows
perplexity.py   the perplexity task, and what is said of one model's scores
pairing.py      paired differences, loss by position
sensitivity.py  what each quantized block costs
generations.py  answers to the same few prompts
records.py      per-token records on disk
provenance.py   command, machine, and what to keep in mind of the models
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
