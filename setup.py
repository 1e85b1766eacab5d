"""What pyproject.toml cannot say: compile the native kernels, and do without where needed; put what
was measured of each paper, results/papers, into the package."""

import importlib.util
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent


def _builder():
    """posttrain/kernels/build.py by its path: the package itself is not installed yet."""
    path = HERE / "src/posttrain/kernels/build.py"
    spec = importlib.util.spec_from_file_location("kernels_build", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildNative(build_ext):
    """One shared library that belongs to no version of Python."""

    def get_ext_filename(self, name):
        return f"{name.replace('.', '/')}.so"

    def build_extension(self, ext):
        builder = _builder()
        try:
            builder.build(Path(self.get_ext_fullpath(ext.name)))
        except builder.BuildError as error:
            bar = "=" * 78
            print(
                f"{bar}\nposttrain: the native kernels were NOT built; models will run through "
                f"torch alone,\nseveral times slower. `posttrain doctor` says what to do.\n{error}\n{bar}",
                file=sys.stderr,
            )


class WithResults(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib) / "posttrain/papers/results"
            folder.mkdir(parents=True, exist_ok=True)
            for path in (HERE / "results/papers").glob("*.json"):
                shutil.copyfile(path, folder / path.name)


class AnyPython(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("posttrain.kernels._native", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative, "build_py": WithResults, "bdist_wheel": AnyPython},
)
