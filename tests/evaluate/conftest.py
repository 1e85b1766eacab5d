"""The tiny models and the text that all tests of evaluation share."""

import pytest
import torch
from evaluate_tiny import WORDS, nudged, tiny_llama

from posttrain.data import Text


@pytest.fixture(scope="session")
def tiny():
    return tiny_llama(0)


@pytest.fixture(scope="session")
def near(tiny):
    return nudged(tiny)


@pytest.fixture(scope="session")
def text():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(WORDS, (600,), generator=generator).tolist()
    return Text.of("numbers", [" ".join(f"w{i}" for i in ids)])
