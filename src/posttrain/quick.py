"""torch without a part that takes a fifth of its import, for programs that only generate.

torch registers, in Python, what its operations make of meta tensors, which have a shape and no data. The
short way to a decoder (`models.direct`) makes no such tensors; whatever takes another way asks for the
whole of torch first.
"""

import importlib
import sys
from contextlib import suppress
from types import ModuleType

PUT_OFF = "torch._meta_registrations"


def import_quick_torch() -> None:
    """Import torch without PUT_OFF, unless it is imported already."""
    if "torch" not in sys.modules:
        sys.modules[PUT_OFF] = ModuleType(PUT_OFF)
        importlib.import_module("torch")


def complete_torch() -> None:
    """Import what was put off, if it was."""
    stub = sys.modules.get(PUT_OFF)
    if stub is not None and stub.__spec__ is None:
        del sys.modules[PUT_OFF]
        with suppress(ImportError):  # a torch without such a part
            importlib.import_module(PUT_OFF)
