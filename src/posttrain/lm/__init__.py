"""A language model you can sample from and score with."""

from posttrain.lm.engine import engine
from posttrain.lm.local import generate, load

__all__ = ["engine", "generate", "load"]
