"""What models say to the same few prompts, for a person to read side by side."""

from typing import Any

from posttrain.lm import generate

# Questions a small chat model can answer: fact, instruction, explanation.
PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Write one sentence that uses the words river, lantern and promise.",
    "Explain to a child why the sky looks blue.",
)
NEW_TOKENS = 48


def answers(model: Any, tokenizer: Any, kv: Any = None) -> list[str]:
    """Greedy answers to PROMPTS: through the chat template if there is one, as continuations of
    the plain prompt if not. ``kv``: what keys and values are kept in."""
    chat = bool(getattr(tokenizer, "chat_template", None))
    return [
        generate(
            model,
            tokenizer,
            [{"role": "user", "content": prompt}] if chat else prompt,
            max_new_tokens=NEW_TOKENS,
            kv=kv,
        ).strip()
        for prompt in PROMPTS
    ]


def side_by_side(by_model: dict[str, list[str]]) -> list[dict[str, Any]]:
    """``[{"prompt", "outputs": {model: text}}]`` from each model's answers."""
    return [
        {"prompt": prompt, "outputs": {name: texts[i] for name, texts in by_model.items()}}
        for i, prompt in enumerate(PROMPTS)
    ]
