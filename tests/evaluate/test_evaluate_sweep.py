"""Laws of decoding sweeps: paired by prompt and seed, lengths are prefixes, metrics by hand."""

import pytest
import torch

from posttrain.evaluate.sweep import (
    Setting,
    difference,
    distinct,
    divergence,
    grid,
    judged,
    repetition,
    write,
)
from posttrain.kernels import Sampling
from posttrain.lm.engine import engine

PROMPTS, SEEDS = [[5, 6, 7], [9], [11, 12]], range(3)


@pytest.fixture
def model(random_llama):
    return random_llama


def test_every_cell_is_what_its_prompt_and_seed_alone_would_write(model):
    settings = grid((0.0, 0.9), (0, 5), (3, 8))
    assert len(settings) == 8 and len(set(settings)) == 8
    written = write(model, PROMPTS, settings, SEEDS)
    for setting, texts in written.items():
        assert [len(text) for text in texts] == [setting.length] * 9
        longest = written[Setting(setting.temperature, setting.top_k, 8)]
        assert texts == [text[: setting.length] for text in longest]
        for i, prompt in enumerate(PROMPTS):
            for j, seed in enumerate(SEEDS):
                runner, text = engine(model), list(prompt)
                session, how = (
                    runner.session(),
                    Sampling(setting.temperature, setting.top_k, seed=seed),
                )
                feed = text
                for _ in range(setting.length):
                    (token,) = runner.step([(session, feed)], [how], [text])
                    feed = [token]
                    text = [*text, token]
                assert texts[3 * i + j] == text[len(prompt) :]
    cold = written[Setting(0.0, 0, 8)]
    assert all(cold[3 * i] == cold[3 * i + 1] == cold[3 * i + 2] for i in range(3))
    assert len({tuple(text) for text in written[Setting(0.9, 0, 8)]}) > 3


def test_a_judge_reads_the_text_after_its_prompt(model):
    texts = [[1, 2, 3, 4], [90], [8, 8]]
    for prompt, text, found in zip(PROMPTS, texts, judged(model, PROMPTS, texts), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *text]])).logits[0, len(prompt) - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(text))
        assert found == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize(
    ("text", "different", "repeated"),
    [
        ([], 1, 0), ([1], 1, 0), ([1, 2, 3, 4, 5, 6], 1, 0), ([1] * 6, 1 / 5, 2 / 3),
        ([1, 2, 1, 2, 1, 2, 1, 2], 2 / 7, 3 / 5),
    ],
)  # fmt: skip
def test_distinct_and_repeated_runs(text, different, repeated):
    assert distinct(text) == pytest.approx(different)
    assert repetition(text) == pytest.approx(repeated)


def test_divergence_at_a_temperature():
    torch.manual_seed(0)
    p, q = torch.randn(4, 9), torch.randn(4, 9)
    assert divergence(p, p, 0.3) == pytest.approx(0, abs=1e-6)
    for temperature in (0.5, 1.0, 2.0):
        a, b = (p / temperature).softmax(-1), (q / temperature).softmax(-1)
        assert divergence(p, q, temperature) == pytest.approx(
            float((a * (a / b).log()).sum(-1).mean()), rel=1e-5
        )
    assert divergence(p, q, 0.5) > divergence(p, q, 2.0)


def test_differences_are_paired_and_their_interval_is_over_prompts():
    noise = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)) * 10
    ours, theirs = (noise + 1).flatten().tolist(), noise.flatten().tolist()
    found = difference(ours, theirs, 12)
    assert found.mean == pytest.approx(1) and found.low == pytest.approx(1, abs=1e-3)
    prompts = torch.arange(12.0)[:, None].expand(12, 5)  # gaps differ by prompt alone
    wide = difference((noise + prompts).flatten().tolist(), theirs, 12)
    assert wide.mean == pytest.approx(5.5, abs=1e-4) and wide.low < 4 and wide.high > 7
