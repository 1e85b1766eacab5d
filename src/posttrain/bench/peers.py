"""The tools that are measured beside ours: what each needs, with one clear error where it lacks."""

import importlib
import importlib.util
from types import ModuleType

from posttrain.errors import UserError, did_you_mean
from posttrain.models.base import one_line

# name -> the module it needs, and the package that brings it
PEERS = {
    "llama.cpp": ("llama_cpp", "llama-cpp-python"),
    "transformers": ("transformers", "transformers"),
    "ctranslate2": ("ctranslate2", "ctranslate2"),
}


def check_peer(name: str) -> None:
    """UserError unless this is a peer, installed here, and can be imported."""
    if name not in PEERS:
        raise UserError(f"unknown peer {name!r}{did_you_mean(name, PEERS)}")
    module, package = PEERS[name]
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{name} is not installed here: pip install {package}")
    import_peer(name)


def import_peer(name: str) -> ModuleType:
    """The peer's module; UserError where it is there but broken."""
    module, package = PEERS[name]
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever its own libraries raise
        raise UserError(
            f"{name} cannot be imported ({type(error).__name__}: {one_line(error)}): reinstall it "
            f"(pip install --force-reinstall {package}) or leave it out of --against"
        ) from error
