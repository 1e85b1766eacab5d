"""Quantization recipes: Plan, transform, solver, calibration text, as YAML a user can edit."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from posttrain.errors import UserError, did_you_mean
from posttrain.models.plan import PLAN_KEYS, Plan
from posttrain.quantize.distill import Distillation
from posttrain.quantize.solvers import Solver, make_solver
from posttrain.quantize.transforms import Transform, make_transform

SHIPPED = files("posttrain") / "recipes"
NO_TRANSFORM = "none"
KEYS = (
    "name", "description", "layers", "ignore", "kv", "transform", "solver", "distill", "calibration",
)  # fmt: skip


@dataclass(frozen=True)
class Calibration:
    """What the solver sees.

    Args:
        text: file (.txt, .jsonl, .gz) or corpus name; None is the built-in corpus.
        samples: windows drawn from it.
        window: tokens per window.
        chat: render JSONL `messages` with the model's chat template.
        first_token_weight: how often the first token of a window counts for solvers that use second
            moments (see `calibration.MomentCollector`).
    """

    text: str | None = None
    samples: int = 128
    window: int = 512
    chat: bool = False
    first_token_weight: float = 64.0


@dataclass(frozen=True)
class QuantRecipe:
    """Everything `posttrain quantize` needs to know besides the model."""

    name: str
    plan: Plan
    solver: Solver
    transform: Transform | None = None
    description: str = ""
    calibration: Calibration = field(default_factory=Calibration)
    distill: Distillation | None = None

    @property
    def calibrated(self) -> bool:
        """Whether block inputs flow through the model while it is quantized."""
        return self.solver.calibrated or self.transform is not None

    @property
    def sees_text(self) -> bool:
        """Whether there has to be a calibration text."""
        return self.calibrated or self.distill is not None

    def override(
        self,
        solver: str | dict[str, Any] | None = None,
        transform: str | dict[str, Any] | None = None,
        **calibration: Any,
    ) -> "QuantRecipe":
        """A copy with the options that are not None put in place."""
        changed: dict[str, Any] = {}
        if solver is not None:
            changed["solver"] = _made(make_solver, solver, "the option --solver")
        if transform is not None:
            changed["transform"] = _transform(transform, "the option --transform")
        given = {key: value for key, value in calibration.items() if value is not None}
        settings = _calibration({**_as_dict(self.calibration), **given}, "the options given")
        return replace(self, calibration=settings, **changed)

    def to_dict(self) -> dict[str, Any]:
        """The YAML shape of this recipe."""
        transform = self.transform
        return {
            "name": self.name,
            "description": self.description,
            **self.plan.to_dict(),
            "transform": transform and {"name": transform.name, **_as_dict(transform)},
            "solver": {"name": self.solver.name, **_as_dict(self.solver)},
            **({} if self.distill is None else {"distill": _as_dict(self.distill)}),
            "calibration": _as_dict(self.calibration),
        }


def shipped_recipes() -> list[str]:
    """Names of the quantization recipes that come with the package."""
    return sorted(
        Path(entry.name).stem
        for entry in SHIPPED.iterdir()
        if entry.name.endswith(".yaml") and "\nlayers:" in entry.read_text(encoding="utf-8")
    )


def load_recipe(name: str | Path) -> QuantRecipe:
    """A recipe by name (shipped) or by path; UserError names the file and the key."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise UserError(f"recipe {name}: no such file")
        return parse_recipe(path.read_text(encoding="utf-8"), str(path))
    if str(name) not in shipped_recipes():
        hint = did_you_mean(str(name), shipped_recipes())
        raise UserError(f"unknown recipe {str(name)!r}{hint} (or give the path of a YAML file)")
    return parse_recipe((SHIPPED / f"{name}.yaml").read_text(encoding="utf-8"), f"{name}.yaml")


def parse_recipe(text: str, where: str) -> QuantRecipe:
    """Read the YAML `text` of a recipe; `where` names it in errors."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected keys {', '.join(KEYS)}, found {type(data).__name__}")
    if "stages" in data:
        raise UserError(f"{where} is a recipe for `posttrain run`; quantize needs one with layers")
    _check_keys(data, KEYS, where)
    if "layers" not in data:
        raise UserError(f"{where}: no `layers`: say which modules become what")
    return QuantRecipe(
        name=str(data.get("name", Path(where).stem)),
        description=str(data.get("description", "")).strip(),
        plan=_plan({key: data[key] for key in PLAN_KEYS if key in data}, where),
        transform=_transform(data.get("transform"), f"{where}: transform"),
        solver=_made(make_solver, data.get("solver", "rtn"), f"{where}: solver"),
        distill=_distill(data.get("distill"), f"{where}: distill"),
        calibration=_calibration(data.get("calibration") or {}, f"{where}: calibration"),
    )


def _plan(data: dict[str, Any], where: str) -> Plan:
    try:
        return Plan.from_dict(data)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _transform(value: Any, where: str) -> Transform | None:
    return None if value in (None, NO_TRANSFORM) else _made(make_transform, value, where)


def _distill(value: Any, where: str) -> Distillation | None:
    if value is None:
        return None
    try:
        return Distillation.from_dict(value)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _made(make: Callable[..., Any], value: Any, where: str) -> Any:
    """What `make` builds from a name, or from a mapping with `name` and options."""
    options = {"name": value} if isinstance(value, str) else value
    if not isinstance(options, dict) or "name" not in options:
        raise UserError(f"{where}: expected a name or a mapping with `name`, found {value!r}")
    try:
        return make(**options)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _calibration(data: Any, where: str) -> Calibration:
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected a mapping, found {data!r}")
    _check_keys(data, [f.name for f in fields(Calibration)], where)
    for key in ("samples", "window"):
        value = data.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{where}: {key} must be a positive whole number, found {value!r}")
    weight = data.get("first_token_weight", 1)
    if not isinstance(weight, (int, float)) or isinstance(weight, bool) or weight < 1:
        raise UserError(f"{where}: first_token_weight must be 1 or more, found {weight!r}")
    if not isinstance(data.get("chat", False), bool):
        raise UserError(f"{where}: chat must be true or false, found {data['chat']!r}")
    return Calibration(**data)


def _check_keys(data: dict[str, Any], known: Any, where: str) -> None:
    for key in data:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{did_you_mean(str(key), known)}")


def _as_dict(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in fields(value)}
