"""Tune, shrink, evaluate and run language models, and show by measurement that they still work.

Every verb of the command line is a function here with the same name and the same arguments::

    import posttrain

    posttrain.quantize("demo", recipe="w6a8", out="small")
    posttrain.compare(["demo", "small"], out="report.html")
    model = posttrain.load("small")

Nothing heavy is imported until one of them is used.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

from posttrain.errors import UserError as UserError

__version__ = "0.1.0"

# Public name -> (module, function in it); the module is imported when the name is first used.
_VERBS = {
    "quantize": ("posttrain.quantize", "quantize"),
    "evaluate": ("posttrain.evaluate", "evaluate"),
    "compare": ("posttrain.report.verb", "compare"),
    "bench": ("posttrain.bench.verb", "bench"),
    "load": ("posttrain.lm.local", "load"),
    "chat": ("posttrain.lm.chat", "chat"),
    "run": ("posttrain.recipe", "run"),
    "papers": ("posttrain.papers", "papers"),
    "reproduce": ("posttrain.papers", "reproduce"),
}
__all__ = [
    "UserError",
    "__version__",
    "bench",
    "chat",
    "compare",
    "evaluate",
    "load",
    "papers",
    "quantize",
    "reproduce",
    "run",
]

if TYPE_CHECKING:
    from posttrain.bench import bench as bench
    from posttrain.evaluate import evaluate as evaluate
    from posttrain.lm.chat import chat as chat
    from posttrain.lm.local import load as load
    from posttrain.papers import papers as papers
    from posttrain.papers import reproduce as reproduce
    from posttrain.quantize import quantize as quantize
    from posttrain.recipe import run as run
    from posttrain.report.verb import compare as compare


class _VerbPackage(ModuleType):
    """A sub-package that shares its name with a verb, and can be called as that verb.

    Python binds `posttrain.quantize` to the sub-package as soon as anything in it is imported,
    which would hide a function of that name; so the sub-package itself answers the call.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, function = _VERBS[self.__name__.rpartition(".")[2]]
        return getattr(import_module(module), function)(*args, **kwargs)

    @property
    def __signature__(self) -> Any:
        import inspect

        module, function = _VERBS[self.__name__.rpartition(".")[2]]
        return inspect.signature(getattr(import_module(module), function))


class _Posttrain(ModuleType):
    """This package; makes the sub-packages named like verbs callable when they are bound."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _VERBS and isinstance(value, ModuleType):
            value.__class__ = _VerbPackage
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in _VERBS:
        raise AttributeError(f"module 'posttrain' has no attribute {name!r}")
    module, function = _VERBS[name]
    imported = import_module(module)
    return imported if module == f"posttrain.{name}" else getattr(imported, function)


def __dir__() -> list[str]:
    return sorted({*globals(), *_VERBS})


class _QuantizerHook(MetaPathFinder):
    """Registers our checkpoint format once transformers' own table of quantizers is imported.

    transformers imports that table when a model is first loaded, so whichever of posttrain and
    transformers comes first, `AutoModelForCausalLM.from_pretrained` knows our format, and
    `import posttrain` need not import transformers.
    """

    TABLE = "transformers.quantizers.auto"

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != self.TABLE:
            return None
        found = PathFinder.find_spec(fullname, path, target)
        if found is not None and found.loader is not None:
            loader, run = found.loader, found.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                self.register()

            loader.exec_module = run_and_register  # type: ignore[method-assign]
        return found

    @staticmethod
    def register() -> None:
        import_module("posttrain.models.hf").register()

    @classmethod
    def install(cls) -> None:
        if cls.TABLE in sys.modules:
            cls.register()
        elif not any(isinstance(finder, cls) for finder in sys.meta_path):
            sys.meta_path.insert(0, cls())


sys.modules[__name__].__class__ = _Posttrain
_QuantizerHook.install()
