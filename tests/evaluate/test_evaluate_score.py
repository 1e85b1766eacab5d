"""Laws of scoring: the loss of transformers, each token once, whatever the batch or the chunk."""

import pytest
import torch
from evaluate_tiny import tiny_llama

from posttrain.errors import UserError
from posttrain.evaluate import score as score_module
from posttrain.evaluate.divergence import FullTarget, TopTarget
from posttrain.evaluate.score import Scorer
from posttrain.evaluate.windows import Windows


def scores(model, windows, size=None, against=None, keep=FullTarget):
    scorer = Scorer(model, "tiny", windows, against=against is not None)
    reference = against and Scorer(against, "reference", windows)
    for batch in windows.batches(61, size):
        scorer(batch, reference and reference(batch, keep=keep))
    return scorer.scores()


@pytest.fixture(scope="module")
def windows(tiny, text):
    return Windows.cut(text, tiny.tokenizer, 32)


def test_nll_is_the_loss_of_transformers(tiny, windows):
    found = scores(tiny, windows)
    for ids, nll in zip(windows.tokens, found.nll, strict=True):
        with torch.inference_mode():
            loss = tiny(ids[None], labels=ids[None]).loss
        assert torch.isclose(nll.mean(), loss, atol=1e-5)


@pytest.mark.parametrize("window, stride", [(32, 8), (32, 31), (32, 32), (20, 1), (17, 5)])
def test_a_stride_scores_every_token_once_with_its_own_context(tiny, text, window, stride):
    windows = Windows.cut(text, tiny.tokenizer, window, stride, max_tokens=100)
    found = scores(tiny, windows)
    stream = Windows.cut(text, tiny.tokenizer, 100).tokens[0]
    expected, seen = [], 0
    for start in range(0, 100 - window + 1, stride):
        with torch.inference_mode():
            log_p = tiny(stream[None, start : start + window]).logits[0].log_softmax(-1)
        for position in range(max(1, seen - start), window):  # without the first of the stream
            expected.append(-log_p[position - 1, stream[start + position]])
        seen = start + window
    assert windows.scored().sum() == len(expected)
    assert torch.allclose(found.nll[windows.scored()], torch.stack(expected), atol=1e-5)
    assert found.nll[~windows.scored()].isnan().all()


def test_batches_and_chunks_do_not_change_results(tiny, near, windows, monkeypatch):
    whole = scores(near, windows, against=tiny).parts()
    for size, rows in [(1, 1000), (3, 7), (8, 1)]:
        monkeypatch.setattr(score_module, "CHUNK_BYTES", rows * 4 * 61)
        again = scores(near, windows, size, against=tiny).parts()
        for part, values in whole.items():
            assert torch.allclose(again[part], values, atol=2e-5), (part, size, rows)


def test_batches_cover_every_window_once(tiny, text):
    for stride in (None, 7):
        windows = Windows.cut(text, tiny.tokenizer, 32, stride)
        for size in (None, 1, 4, 1000):
            covered = [i for b in windows.batches(61, size) for i in range(b.start, b.stop)]
            assert covered == list(range(len(windows)))
            for batch in windows.batches(61, size):
                firsts = {windows.first_scored(i) for i in range(batch.start, batch.stop)}
                assert firsts == {batch.first}


def test_a_batch_never_has_more_logits_than_its_budget(tiny, text):
    windows = Windows.cut(text, tiny.tokenizer, 32)
    for vocabulary in (1000, 300_000, 3_000_000):
        for batch in windows.batches(vocabulary):
            rows = batch.stop - batch.start
            assert rows == 1 or rows * 32 * vocabulary * 4 <= 256 * 2**20


def test_a_model_that_gives_nan_is_named(windows):
    broken = tiny_llama(5)
    broken.lm_head.weight.data[3, 3] = torch.nan
    with pytest.raises(UserError, match="tiny gives non-finite logits in windows 0 to"):
        scores(broken, windows)


def kl_by_hand(reference, other):
    p, q = reference.double().softmax(-1), other.double().softmax(-1)
    return (p * (p.log() - q.log())).sum(-1)


@pytest.mark.parametrize("spread", [1e-3, 0.3, 3.0, 30.0])
def test_full_kl_is_the_sum_over_the_vocabulary(spread):
    generator = torch.Generator().manual_seed(0)
    a = 4 * torch.randn(50, 200, generator=generator)
    b = a + spread * torch.randn(50, 200, generator=generator)
    found = FullTarget(a, a.logsumexp(-1)).kl(b, b.logsumexp(-1))
    assert torch.allclose(found.double(), kl_by_hand(a, b), rtol=1e-4, atol=2e-6)
    assert (found >= 0).all()


def test_tokens_without_probability_add_nothing():
    a = torch.tensor([[1.0, 2.0, -torch.inf]])
    b = torch.tensor([[1.5, 1.0, -torch.inf]])
    found = FullTarget(a, a.logsumexp(-1)).kl(b, b.logsumexp(-1))
    assert torch.allclose(found.double(), kl_by_hand(a[:, :2], b[:, :2]), atol=1e-6)


def test_top_k_kl_rises_to_the_full_one():
    generator = torch.Generator().manual_seed(1)
    a = 3 * torch.randn(40, 128, generator=generator)
    b = a + torch.randn(40, 128, generator=generator)
    za, zb = a.logsumexp(-1), b.logsumexp(-1)
    full = FullTarget(a, za).kl(b, zb)
    previous = torch.zeros(40)
    for k in (1, 2, 8, 32, 127, 128, 1000):
        found = TopTarget.of(a, za, k).kl(b, zb)
        assert (found >= previous - 1e-5).all()
        assert (found <= full + 1e-5).all()
        previous = found
    assert torch.allclose(previous, full, atol=1e-5)
    assert (TopTarget.of(a, za, 1).kl(b, zb) < 0.9 * full).any()


def test_top_k_kl_by_hand():
    p, q = torch.tensor([[0.5, 0.3, 0.15, 0.05]]), torch.tensor([[0.4, 0.2, 0.3, 0.1]])
    found = TopTarget.of(p.log(), torch.zeros(1), 2).kl(q.log(), torch.zeros(1))
    expected = 0.5 * torch.tensor(0.5 / 0.4).log() + 0.3 * torch.tensor(0.3 / 0.2).log()
    expected += 0.2 * torch.tensor(0.2 / 0.4).log()
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("keep", [FullTarget, lambda a, z: TopTarget.of(a, z, 5)])
def test_a_model_against_itself_has_no_divergence(tiny, windows, keep):
    found = scores(tiny, windows, against=tiny, keep=keep)
    assert (found.kl == 0).all()
    assert (found.agree == 1).all()


def test_agreement_counts_equal_argmaxes(tiny, near, windows):
    found = scores(near, windows, against=tiny)
    with torch.inference_mode():
        a, b = (m(windows.tokens).logits[:, :-1].argmax(-1) for m in (tiny, near))
    assert torch.equal(found.agree, (a == b).float())
    assert 0 < found.agree.mean() < 1
