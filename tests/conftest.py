"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of development data sets; tests that need it skip, saying so, without it."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("POSTTRAIN_DATA", default))
    if not path.is_dir():
        pytest.skip(f"no development data at {path}; set POSTTRAIN_DATA to its folder")
    return path
