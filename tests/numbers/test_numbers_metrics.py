"""Metrics on tensors whose answers are known, partitions, and the package's own imports."""

import ast
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import posttrain.numbers
from posttrain.errors import UserError
from posttrain.numbers import (
    Partition,
    clip_fraction,
    crest_factor,
    dynamic_range,
    fit_scales,
    kernel_fraction,
    qsnr,
)


def test_qsnr() -> None:
    x = torch.tensor([3.0, 4.0])
    assert qsnr(x, x + torch.tensor([0.5, 0.0])) == pytest.approx(20.0)
    assert qsnr(x, x) == math.inf and qsnr(torch.zeros(3), torch.zeros(3)) == math.inf
    assert qsnr(torch.zeros(1), torch.ones(1)) == -math.inf
    assert qsnr(torch.zeros(0), torch.zeros(0)) == math.inf
    assert math.isnan(qsnr(x, x * math.nan))


def test_crest_factor() -> None:
    x = torch.tensor([[1.0, 1, 1, 1, 3, 0, 0, 0]])
    assert crest_factor(x, "g4").tolist() == [[1.0, 2.0]]
    assert crest_factor(x, Partition(0, 0)).item() == pytest.approx(3 / math.sqrt(13 / 8))
    # A partial block counts its own elements only.
    assert crest_factor(torch.ones(1, 6), "g4").tolist() == [[1.0, 1.0]]
    assert crest_factor(torch.zeros(1, 4), "row").isnan().all()
    with pytest.raises(UserError, match="grp4"):
        crest_factor(x, "grp4")


def test_kernel_fraction() -> None:
    x = torch.tensor([0.0, 1.0, 0.1, -0.2, 5.0])
    assert kernel_fraction(x, torch.tensor([0.0, 1, 0, 0, 5])) == 0.5
    assert kernel_fraction(torch.zeros(3), torch.zeros(3)) == 0.0


def test_clip_fraction() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0, -8.0]])
    assert clip_fraction(x, "int4 | fp32/row") == 0.0
    frozen = fit_scales(torch.tensor([[2.0, 0, 0, 0]]), "int4 | fp32/row")
    assert clip_fraction(x, "int4 | fp32/row", frozen) == 0.5
    # A zero point rounds: the ends of a range may lie a fraction of a step outside.
    assert clip_fraction(torch.tensor([[7.0, 2.0, -8.0]]), "int4z | fp32/row") == 0.0
    assert clip_fraction(x, "int4z | fp32/row") == 0.25
    assert clip_fraction(torch.zeros(0, 4), "int4 | fp32/row") == 0.0
    # The OCP floor rule clips when the mantissa of the maximum exceeds that of the format.
    assert clip_fraction(torch.tensor([[7.9] + [0.1] * 31]), "mxfp4-ocp") == 1 / 32


def test_dynamic_range() -> None:
    assert dynamic_range(torch.tensor([0.0, -0.5, 4.0])) == 8.0
    assert dynamic_range(torch.zeros(3)) == 1.0


@pytest.mark.parametrize("text", ["tensor", "row", "col", "g64", "t16x16", "flat64", "t1x1"])
def test_partition_text(text: str) -> None:
    found = Partition.parse(text)
    assert found is not None and Partition.parse(str(found)) == found


@pytest.mark.parametrize("text", ["", "g", "g0", "g-1", "t16", "t0x4", "rows", "flat", "g6 4"])
def test_what_is_not_a_partition(text: str) -> None:
    assert Partition.parse(text) is None


def test_nesting_of_partitions() -> None:
    order = {name: Partition.parse(name) for name in
             ("g16", "g64", "row", "col", "tensor", "t16x16", "flat64", "g24")}  # fmt: skip
    inside = {(a, b) for a, x in order.items() for b, y in order.items() if x and y and x.inside(y)}
    assert inside == {(a, a) for a in order} | {(a, "tensor") for a in order} | {
        ("g16", "g64"), ("g16", "row"), ("g64", "row"), ("g24", "row"), ("g16", "t16x16"),
    }  # fmt: skip


FOLDER = Path(posttrain.numbers.__file__).parent


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda f: f.name)
def test_numbers_imports_torch_and_nothing_else(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: relative import"
            names = [node.module or ""]
        for name in names:
            ours = name.startswith(("posttrain.numbers", "posttrain.errors"))
            root = name.split(".")[0]
            assert ours or root == "torch" or root in sys.stdlib_module_names, name


def test_importing_numbers_loads_no_other_part_of_posttrain() -> None:
    script = (
        "import sys, posttrain.numbers; "
        "print(*sorted({'.'.join(m.split('.')[:2]) for m in sys.modules "
        "if m.startswith('posttrain.')}), *('transformers' in sys.modules,))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert set(out.stdout.split()) == {"posttrain.numbers", "posttrain.errors", "False"}
