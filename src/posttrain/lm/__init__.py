"""A language model you can sample from."""

from posttrain.lm.local import generate, sample_tokens

__all__ = ["generate", "sample_tokens"]
