"""Quantization recipes: Plan, transform, solver, calibration text, as YAML a user can edit."""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from posttrain.errors import UserError, did_you_mean
from posttrain.models.plan import PLAN_KEYS, Plan
from posttrain.quantize.distill import Distillation
from posttrain.quantize.solvers import SOLVERS, Solver, make_solver
from posttrain.quantize.transforms import Transform, make_transform

SHIPPED = files("posttrain") / "recipes"
NO_TRANSFORM = "none"
LARGEST = sys.float_info.max  # neither NaN nor an infinity is within it
Lines = dict[tuple[Any, ...], int]  # of a YAML file: path of a key or entry -> line
_TAG = "tag:yaml.org,2002:"
TEXT_OPTIONS = ("calibration", "samples", "window", "chat")  # of `quantize`: what is looked at
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
        return parse_recipe(read_text(path), str(path))
    if str(name) not in shipped_recipes():
        hint = did_you_mean(str(name), shipped_recipes())
        raise UserError(f"unknown recipe {str(name)!r}{hint} (or give the path of a YAML file)")
    return parse_recipe((SHIPPED / f"{name}.yaml").read_text(encoding="utf-8"), f"{name}.yaml")


def parse_recipe(text: str, where: str) -> QuantRecipe:
    """Read the YAML `text` of a recipe; `where` names it in errors."""
    data, lines = read_yaml(text, where)
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected keys {', '.join(KEYS)}, found {type(data).__name__}")
    if "stages" in data:
        raise UserError(f"{where} is a recipe for `posttrain run`; quantize needs one with layers")
    _check_keys(data, KEYS, where)
    _check_values(data, lines, where)
    if "layers" not in data:
        raise UserError(f"{where}: no `layers`: say which modules become what")
    return QuantRecipe(
        name=text_of(data, "name", Path(where).stem, where, lines),
        description=text_of(data, "description", "", where, lines).strip(),
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
    named = isinstance(options, dict) and isinstance(options.get("name"), str)
    if not named or not all(isinstance(key, str) for key in options):
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
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not number or not 1 <= weight <= LARGEST:
        raise UserError(f"{where}: first_token_weight must be 1 or more, found {weight!r}")
    if not isinstance(data.get("text"), (str, Path, type(None))):
        raise UserError(f"{where}: text must be a file or a corpus name, found {data['text']!r}")
    if not isinstance(data.get("chat", False), bool):
        raise UserError(f"{where}: chat must be true or false, found {data['chat']!r}")
    return Calibration(**data)


def _check_keys(data: dict[str, Any], known: Any, where: str) -> None:
    for key in data:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{did_you_mean(str(key), known)}")


def _check_values(data: Any, lines: Lines, where: str) -> None:
    """Numbers are finite, and what is looked up by name is text, wherever they stand."""
    for path, value in _walk(data):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and not -LARGEST <= value <= LARGEST:
            raise UserError(
                f"{place(where, lines, path)}: {path[-1]} must be a finite number, found {value!r:.40}"
            )
        if path[-1] == "name" and len(path) > 1 and not isinstance(value, str):
            raise UserError(
                f"{place(where, lines, path)}: {path[0]}: expected a mapping with `name`, which is "
                f"text; found the name {value!r}"
            )


def _walk(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Everything inside `value` with its path, as in `Lines`."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in inside:
        yield (*path, key), child
        if isinstance(child, (dict, list)):
            yield from _walk(child, (*path, key))


def _as_dict(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in fields(value)}


def with_idle_options_noted(given: Mapping[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """The result of `quantize`, with a note on options given that nothing looked at.

    given: TEXT_OPTIONS and memory_budget, None where not given. result: what came of them.
    """
    recipe = result["recipe"]
    solver = SOLVERS[recipe["solver"]["name"]]
    idle = () if solver.calibrated or recipe["transform"] else ("memory_budget",)
    idle = idle if result["calibration"] else (*TEXT_OPTIONS, *idle)
    named = [name for name in idle if given[name] is not None]
    if not named:
        return result
    note = (
        f"{', '.join(named)} had no effect: the solver {solver.name} without a transform quantizes "
        "without text; choose a solver or a transform that looks at one, or leave this out"
    )
    return result | {"notes": [*(result.get("notes") or ()), note]}


# --- reading YAML, of recipes of `posttrain run` too ---------------------------------------------


def read_text(path: Path) -> str:
    """The text of a recipe's file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: not UTF-8 text, found the byte {error.object[error.start]:#04x}; save "
            "the file as UTF-8"
        ) from None


def read_yaml(text: str, where: str) -> tuple[Any, Lines]:
    """The data, and the line of every key and list entry by its path. Raises UserError: for what
    is not YAML, and for keys that are given twice or are no words, of which it takes the last."""
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None, {}
            lines = dict(_lines(loader, node, (), where))
            return loader.construct_document(node), lines
        finally:
            loader.dispose()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"{where}:{line}: not valid YAML: found the control character {chr(error.character)!r}; "
            "remove it"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f"{where}:{mark.line + 1}" if mark else where
        raise UserError(f"{at}: not valid YAML: {error.problem}") from None
    except RecursionError:
        raise UserError(f"{where}: lists and mappings are nested too deeply") from None


def place(where: str, lines: Lines, path: tuple[Any, ...]) -> str:
    """Where a key or entry stands, "file:line"; the file alone for what a merge key (`<<`) brought."""
    return f"{where}:{lines[path]}" if path in lines else where


def text_of(data: dict[str, Any], key: str, default: str, where: str, lines: Lines) -> str:
    """What a recipe says of itself. Raises UserError for what is no text, or none where some is due."""
    value = data.get(key, default)
    if not isinstance(value, str) or (default and not value):
        at = place(where, lines, (key,))
        raise UserError(f"{at}: {key} must be text, in quotes if need be; found {value!r}")
    return value


def _lines(
    loader: yaml.SafeLoader, node: yaml.Node, path: tuple[Any, ...], where: str
) -> Iterator[tuple[tuple[Any, ...], int]]:
    if isinstance(node, yaml.SequenceNode):
        for i, child in enumerate(node.value):
            yield (*path, i), child.start_mark.line + 1
            yield from _lines(loader, child, (*path, i), where)
    elif isinstance(node, yaml.MappingNode):
        seen = set()
        for key, child in node.value:
            line = key.start_mark.line + 1
            _check_key(key, f"{where}:{line}")
            if key.value in seen:
                raise UserError(f"{where}:{line}: {key.value!r} is given twice")
            seen.add(key.value)
            yield (*path, key.value), line
            yield from _lines(loader, child, (*path, key.value), where)
    else:
        _check_scalar(loader, node, f"{where}:{node.start_mark.line + 1}")


def _check_key(key: yaml.Node, at: str) -> None:
    if not isinstance(key, yaml.ScalarNode):
        raise UserError(
            f"{at}: found braces or brackets where a key should be; put text that holds them in "
            'quotes, such as "{out}"'
        )
    kind = key.tag.removeprefix(_TAG)
    if kind not in ("str", "merge"):
        raise UserError(
            f"{at}: no option is called {key.value!r}, which is no word in YAML but of type {kind}; "
            "keys are names"
        )


def _check_scalar(loader: yaml.SafeLoader, node: yaml.Node, at: str) -> None:
    """PyYAML lets through whatever a conversion raises, such as that of the date 2024-13-45; a number
    of thousands of digits is one that Python does not print."""
    try:
        str(loader.construct_object(node))
    except (ValueError, KeyError, IndexError, AttributeError):
        raise UserError(
            f"{at}: {node.value!r:.40} looks like a value of YAML's type {node.tag.removeprefix(_TAG)} "
            "and is none; put it in quotes if it is text"
        ) from None
