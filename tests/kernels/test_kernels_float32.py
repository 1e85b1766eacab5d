"""`fast_float32` makes products faster, never less exact, and puts the setting back."""

from contextlib import contextmanager

import pytest
import torch

from posttrain.kernels import fast_float32, float32


def setting() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision


@pytest.mark.parametrize("rows,inner,columns", [(1, 64, 8), (37, 576, 100), (512, 1536, 576)])
def test_products_are_as_exact_as_float32_is(rows, inner, columns):
    x, y = torch.randn(rows, inner), torch.randn(inner, columns)
    with fast_float32():
        product, total = x @ y, torch.zeros(columns, columns).addmm_(y.T, y)
    for found, (a, b) in ((product, (x, y)), (total, (y.T, y))):
        reach = a.double().abs() @ b.double().abs()
        assert ((found - a.double() @ b.double()).abs() <= inner * 2.0**-24 * reach).all()


def test_the_setting_of_before_comes_back():
    before = setting()
    with pytest.raises(KeyError), fast_float32(), fast_float32():
        raise KeyError
    assert setting() == before


def test_where_inputs_would_be_rounded_nothing_is_set(monkeypatch):
    """As on a processor with AMX."""
    product = torch.Tensor.__matmul__

    @contextmanager
    def rounding():
        with monkeypatch.context() as patch:
            short = lambda x, y: product(x.bfloat16().float(), y.bfloat16().float())
            patch.setattr(torch.Tensor, "__matmul__", short)
            yield

    with monkeypatch.context() as patch:
        patch.setattr(float32, "_permission", rounding)
        exact = float32._exact.__wrapped__()
    assert not exact
    monkeypatch.setattr(float32, "_exact", lambda: exact)
    before = setting()
    with fast_float32():
        assert setting() == before
