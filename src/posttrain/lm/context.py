"""How long a text may be for a model."""

from typing import Any

from torch import nn

from posttrain.errors import UserError


def beyond_context(model: Any, tokens: int, what: str) -> str | None:
    """A sentence where `tokens` are more than the model was made for, else None.

    Raises UserError, which begins with `what`, where the model has no positions for them: it learned one
    vector for each. Rotary positions go on for ever, and only mean less and less to it.
    """
    most = getattr(model.config, "max_position_embeddings", None)
    if most is None or tokens <= most:
        return None
    if _learned_positions(model, most):
        raise UserError(
            f"{what}: {tokens:,} tokens, and this model has {most:,} positions; use fewer"
        )
    return (
        f"{what}: {tokens:,} tokens are more than the {most:,} that this model was made for; "
        "what it says of them means little"
    )


def _learned_positions(model: Any, most: int) -> bool:
    if not hasattr(model, "modules"):  # read by `models.direct`: rotary
        return False
    words = model.get_input_embeddings()
    return any(
        isinstance(module, nn.Embedding)
        and module is not words
        and most <= module.num_embeddings <= most + 2  # OPT skips two
        for module in model.modules()
    )
