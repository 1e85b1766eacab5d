"""The golden QSNR table of the method cards (part 1.15), and mean crest factors.

Each number was computed once by an independent simulation on 1024 x 4096 samples of
N (standard normal), t4 (Student t, 4 degrees of freedom) and O (normal, two columns times 60).

Tolerances: N is 0.1 dB, as the table states. t4 and O are single random draws: over seeds QSNR
has a standard deviation of up to 0.13 dB (int8 per row on t4) and 0.1 dB, 0.22 for the OCP floor
rule (O), both in the table and here; 0.3 dB is two to three standard deviations of the difference.
"""

from functools import cache

import pytest
import torch
from torch import Tensor

from posttrain.numbers import crest_factor, fake_quantize, qsnr

SHAPE = (1024, 4096)
TOLERANCE = {"N": 0.1, "t4": 0.3, "O": 0.3}


@cache
def samples(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    normal = torch.randn(SHAPE, generator=generator)
    if kind == "t4":
        squares = sum(torch.randn(SHAPE, generator=generator).square() for _ in range(4))
        return normal / (squares / 4).sqrt()  # type: ignore[operator]
    if kind == "O":
        normal[:, [100, 3000]] *= 60
    return normal


GOLDEN = {
    "int8 | e8m0.ceil/g32": (41.6, 39.3, 36.0),
    "e4m3 | e8m0.ceil/g32": (31.5, 31.5, 31.4),
    "e4m3 | e8m0.floor/g32": (30.7, 29.8, 28.3),
    "int6 | e8m0.ceil/g32": (29.4, 27.0, 25.8),
    "e2m3 | e8m0.ceil/g32": (31.0, 29.9, 27.9),
    "e3m2 | e8m0.ceil/g32": (25.5, 25.6, 25.5),
    "int4 | e8m0.ceil/g32": (16.8, 14.3, 18.4),
    "e2m1 | e8m0.ceil/g32": (18.8, 17.1, 18.1),
    "nvfp4": (20.4, 20.7, 22.7),
    "nvint4": (21.3, 19.4, 22.8),
    "bnb-fp4": (18.3, 15.5, 19.7),
    "int8 | fp32/row": (41.3, 31.6, 19.6),
    "e4m3 | fp32/row": (31.6, 31.7, 34.7),
    "e5m2 | fp32/row": (25.6, 25.7, 28.7),
    "int6 | fp32/row": (29.0, 19.3, 8.4),
    "e3m2 | fp32/row": (25.6, 25.7, 27.4),
    "int6 | fp16/g128": (31.5, 27.1, 22.3),
    "int4 | fp32/row": (16.1, 7.2, 4.7),
    "e2m1 | fp32/row": (18.5, 11.2, 5.2),
    "int4 | fp16/g128": (18.6, 14.3, 16.6),
    "nf4": (20.7, 19.1, 20.0),
    "e2m1 | fp32/g64": (19.5, 18.7, 19.7),
}


@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize("text", GOLDEN)
def test_golden_qsnr(text: str, kind: str) -> None:
    x = samples(kind)
    expected = GOLDEN[text][list(TOLERANCE).index(kind)]
    assert qsnr(x, fake_quantize(x, text)) == pytest.approx(expected, abs=TOLERANCE[kind])


@pytest.mark.parametrize(
    "partition,expected",
    [("g16", 2.11), ("g32", 2.37), ("g64", 2.61), ("g128", 2.84), ("row", 3.80)],
)
def test_mean_crest_factor_of_a_normal(partition: str, expected: float) -> None:
    assert crest_factor(samples("N"), partition).mean().item() == pytest.approx(expected, abs=0.015)
