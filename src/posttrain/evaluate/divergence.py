"""Kullback-Leibler divergence from a reference, KL(reference || model), in nats per token.

A *target* is what is kept of the reference's logits for some rows (positions): all of them
(``FullTarget``), or the top k log-probabilities and, as one more bucket, the rest of the mass
(``TopTarget``). Merging outcomes into a bucket can only lower KL (log-sum inequality), so the
top-k value is a lower bound that reaches the full one at k = vocabulary.
"""

from dataclasses import dataclass

import torch

_LEAST_MASS = 1e-12  # of the bucket: below float32 rounding of a sum of probabilities


@dataclass(frozen=True)
class FullTarget:
    """Reference logits ``[rows, vocabulary]`` and the logarithm of their partition sum ``[rows]``."""

    logits: torch.Tensor
    log_partition: torch.Tensor

    @property
    def argmax(self) -> torch.Tensor:
        return self.logits.argmax(-1)

    def kl(self, logits: torch.Tensor, log_partition: torch.Tensor) -> torch.Tensor:
        """KL ``[rows]``, float32, of a model's logits of the same shape."""
        probability = (self.logits - self.log_partition[:, None]).exp_()
        log_ratio = (self.logits - logits).masked_fill_(probability == 0, 0)  # 0 log 0 = 0
        mean = torch.linalg.vecdot(probability, log_ratio)
        # Never below 0 but for the rounding of the two partition sums.
        return (mean - (self.log_partition - log_partition)).clamp_min_(0)


@dataclass(frozen=True)
class TopTarget:
    """The reference's k largest log-probabilities ``[rows, k]``, descending, and their tokens."""

    log_probability: torch.Tensor
    token: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, log_partition: torch.Tensor, k: int) -> "TopTarget":
        top = logits.topk(min(k, logits.shape[-1]), dim=-1)
        return cls(top.values - log_partition[:, None], top.indices)

    @property
    def argmax(self) -> torch.Tensor:
        return self.token[:, 0]

    def kl(self, logits: torch.Tensor, log_partition: torch.Tensor) -> torch.Tensor:
        """KL ``[rows]``, float32, over the k tokens and the bucket of all others."""
        theirs = (logits.gather(-1, self.token) - log_partition[:, None]).double()
        p, log_p = _with_rest(self.log_probability.double())
        _, log_q = _with_rest(theirs)
        terms = torch.where(p > 0, p * (log_p - log_q), 0)
        return terms.sum(-1).clamp_min_(0).float()


def _with_rest(log_probability: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and their logarithms, with the remaining mass as the last column."""
    probability = log_probability.exp()
    rest = (1 - probability.sum(-1, keepdim=True)).clamp_min(_LEAST_MASS)
    return torch.cat([probability, rest], -1), torch.cat([log_probability, rest.log()], -1)
