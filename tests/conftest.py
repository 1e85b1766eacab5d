"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes with a thread per core each would wait for one another. Set before torch is
    # imported, and for the commands that tests start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
    """A long test that would come last goes first: one process would run it while the others idle."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


@pytest.fixture(autouse=True)
def same_threads():
    """Sums depend on how many threads torch has: a test that changes that (the bench's contenders do,
    for a process that is theirs alone) leaves it as it was for the next."""
    import torch

    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of development data sets; tests that need it skip, saying so, without it."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("POSTTRAIN_DATA", default))
    if not path.is_dir():
        pytest.skip(f"no development data at {path}; set POSTTRAIN_DATA to its folder")
    return path


@pytest.fixture(scope="session")
def random_llama():
    """Two random blocks that differ enough for every change to show; leave it as it was."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()
