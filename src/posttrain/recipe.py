"""Recipes of whole jobs: stages in order, each one verb with its options, as YAML.

    description: one line for `posttrain recipes`
    out: build/mine              # where everything goes; `-o` overrides it
    stages:
      - quantize: {model: demo, recipe: w6a8}
      - compare: {models: [demo, "{out}"], max_tokens: 16384}
      - report: {}

`{out}` in an option stands for the output folder; paths are relative to where the command runs.
A stage is finished when its result stands in `OUT/run.json` under the fingerprint of its options
and inputs, and the files it wrote are there unchanged; a second run skips it. An interrupted
stage continues where its verb can.

The signature of a verb is the schema of its stage: option names, types and defaults are read from
it. A new kind of stage is one row of `STAGES`.
"""

import hashlib
import inspect
import json
import sys
import time
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from posttrain import __version__
from posttrain.errors import UserError, did_you_mean

SHIPPED = Path(__file__).parent / "recipes"
KEYS = ("name", "description", "out", "stages")
STATE = "run.json"
# Arguments that are about this run of a verb and not about its result.
_RUN_ARGUMENTS = ("progress", "resume", "overwrite", "stream", "results")
_LEAST = {"seed": 0}  # what types do not say of an option, checked before the first stage runs


@dataclass(frozen=True)
class Kind:
    """A kind of stage.

    Attributes:
        verb: "module:function" that does it.
        reads: options that name models, folders or files; what these hold is part of the
            stage's fingerprint.
        writes: options that name what the stage writes; checked before the stage is skipped.
        defaults: options a recipe may leave out although the verb requires them.
    """

    verb: str
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def function(self) -> Callable[..., dict[str, Any]]:
        module, _, name = self.verb.partition(":")
        return getattr(import_module(module), name)  # type: ignore[no-any-return]

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.function).parameters)


STAGES: dict[str, Kind] = {
    "quantize": Kind(
        "posttrain.quantize:quantize",
        reads=("model", "recipe", "calibration"),
        writes=("out",),
        defaults={"out": "{out}"},
    ),
    "evaluate": Kind("posttrain.evaluate:evaluate", reads=("model", "text"), writes=("records",)),
    "compare": Kind(
        "posttrain.report.verb:compare", reads=("models", "text"), writes=("out", "records")
    ),
    "chat": Kind("posttrain.lm.chat:chat", reads=("model",)),
    "report": Kind(
        "posttrain.recipe:report", writes=("out",), defaults={"out": "{out}/report.html"}
    ),
}


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe, its options checked and complete."""

    kind: str
    number: int
    options: dict[str, Any]
    where: str  # "file:line", for errors

    @property
    def name(self) -> str:
        return f"{self.number}-{self.kind}"

    def paths(self, role: str) -> list[str]:
        """The values of the options that the stage reads or writes."""
        values = [self.options.get(option) for option in getattr(STAGES[self.kind], role)]
        flat = [v for value in values for v in (value if isinstance(value, list) else [value])]
        return [str(value) for value in flat if value is not None]


@dataclass(frozen=True)
class Recipe:
    """A recipe as read: stages whose options still hold `{out}`."""

    name: str
    description: str
    out: str
    stages: tuple[Stage, ...]


def run(
    recipe: str | Path,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Run the stages of a recipe in order; what is finished already is not done again.

    Args:
        recipe: name of a shipped recipe ("demo"), or path of a YAML file.
        out: output folder instead of the recipe's.
        overwrite: do every stage anew, replacing what earlier runs left.
        progress: say on standard error what goes on.

    Returns:
        `{"recipe", "out", "seconds", "stages": [{"name", "stage", "status", "seconds", "result"}]}`
        with status "ran" or "reused"; `seconds` of a stage is what it took when it ran.

    Raises:
        UserError: naming file, line and field where the recipe is wrong, or the stage that failed.
    """
    started = time.monotonic()
    plan = load(recipe)
    folder = Path(out) if out is not None else Path(plan.out)
    stages = [_placed(stage, folder) for stage in plan.stages]
    state = _State(folder / STATE, {} if overwrite else None)
    done: list[dict[str, Any]] = []
    prints: dict[str, str] = {}  # what a finished stage wrote -> its fingerprint
    for stage in stages:
        fingerprint = _fingerprint(stage, prints, done)
        others = {Path(p) for s in stages if s is not stage for p in s.paths("writes")}
        entry = state.finished(stage, fingerprint)
        _say(
            progress,
            f"[{stage.number}/{len(stages)}] {_describe(stage)}{': already done' if entry else ''}",
        )
        status = "reused" if entry else "ran"
        if entry is None:
            redo = overwrite or state.replaces(stage, fingerprint)
            entry = _run_stage(stage, fingerprint, done, redo, progress)
            # Digests of large files take long: a run killed meanwhile need not do it all again.
            state.record(stage, entry)
            entry["files"] = _digests(stage, others | {state.path})
            state.record(stage, entry)
        prints |= dict.fromkeys(stage.paths("writes"), fingerprint)
        done.append(
            {
                "name": stage.name,
                "stage": stage.kind,
                "status": status,
                "seconds": entry["seconds"],
                "fingerprint": fingerprint,
                "result": entry["result"],
            }
        )
    seconds = time.monotonic() - started
    return {"recipe": plan.name, "out": str(folder), "seconds": seconds, "stages": done}


def report(
    results: list[dict[str, Any]], *, out: str | Path, title: str | None = None
) -> dict[str, Any]:
    """Write the HTML report of a run: its last comparison (or evaluation) and its chat answers.

    Returns `{"report": path}`. Raises UserError where no stage before it measured anything.
    """
    from posttrain.report import render_report

    measured = [r["result"] for r in results if r["stage"] in ("compare", "evaluate")]
    if not measured:
        raise UserError("nothing to report: put a compare or evaluate stage before it")
    data = dict(measured[-1])
    if "models" not in data:
        data = {"models": [data], "pairs": [], "text": data.get("text"), "notes": data.get("notes")}
    chats = [r["result"] for r in results if r["stage"] == "chat"]
    data["generations"] = [*(data.get("generations") or []), *map(_generation, chats)]
    if title is not None:
        data["title"] = title
    return {"report": str(render_report(data, Path(out)))}


def _generation(answered: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": answered["prompt"], "outputs": {answered["model"]: answered["answer"]}}


# --- reading -----------------------------------------------------------------------------------


def shipped() -> list[dict[str, Any]]:
    """The recipes that come with the package: `{"name", "verb", "description", "path"}` each."""
    found = []
    for path in sorted(SHIPPED.glob("*.yaml")):
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        about = str(data.get("description") or "").strip()
        verb = "run" if "stages" in data else "quantize"
        found.append({"name": path.stem, "verb": verb, "description": about, "path": str(path)})
    return found


def load(name: str | Path) -> Recipe:
    """A recipe by name (shipped) or by path, checked as far as that goes without running it."""
    from posttrain.quantize.recipe import read_text

    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise UserError(f"recipe {name}: no such file")
        return parse(read_text(path), str(path), path.stem)
    known = [entry["name"] for entry in shipped() if entry["verb"] == "run"]
    if str(name) not in known:
        hint = did_you_mean(str(name), known)
        raise UserError(f"unknown recipe {str(name)!r}{hint} (or give the path of a YAML file)")
    path = SHIPPED / f"{name}.yaml"
    return parse(path.read_text(encoding="utf-8"), path.name, str(name))


def parse(text: str, where: str, name: str) -> Recipe:
    """Read the YAML `text` of a recipe; `where` names it in errors."""
    # Here, as it imports what quantizes: a list of recipes should not wait for that.
    from posttrain.quantize.recipe import place, read_yaml, text_of

    data, lines = read_yaml(text, where)
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected the keys {', '.join(KEYS)}")
    if "layers" in data and "stages" not in data:
        raise UserError(
            f"{where} is a recipe for `posttrain quantize --recipe`; run needs one with stages"
        )
    for key in data:
        if key not in KEYS:
            at = place(where, lines, (key,))
            raise UserError(f"{at}: unknown key {key!r}{did_you_mean(str(key), KEYS)}")
    entries = data.get("stages")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{where}: stages must be a list such as `- quantize: {{model: demo}}`")
    stages = tuple(_stage(entry, i, where, lines) for i, entry in enumerate(entries))
    name = text_of(data, "name", name, where, lines)
    out = text_of(data, "out", f"build/{name}", where, lines)
    return Recipe(name, text_of(data, "description", "", where, lines).strip(), out, stages)


def _stage(entry: Any, index: int, where: str, lines: dict[tuple[Any, ...], int]) -> Stage:
    from posttrain.quantize.recipe import place

    at = place(where, lines, ("stages", index))
    if isinstance(entry, str):
        entry = {entry: None}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise UserError(f"{at}: a stage is one verb with its options, like `- quantize: {{...}}`")
    kind, options = next(iter(entry.items()))
    if kind not in STAGES:
        raise UserError(f"{at}: unknown stage {kind!r}{did_you_mean(str(kind), STAGES)}")
    if options is not None and not isinstance(options, dict):
        raise UserError(f"{at}: the options of {kind} must be a mapping, found {options!r}")
    options = {**STAGES[kind].defaults, **(options or {})}
    here = {key: place(where, lines, ("stages", index, kind, key)) for key in options}
    _check_options(kind, options, here, at)
    return Stage(kind, index + 1, options, at)


def _check_options(kind: str, options: dict[str, Any], here: dict[str, str], at: str) -> None:
    """Names and types against the signature of the verb."""
    parameters = {k: p for k, p in STAGES[kind].parameters.items() if k not in _RUN_ARGUMENTS}
    hints = typing.get_type_hints(STAGES[kind].function)
    for key, value in options.items():
        if key not in parameters:
            hint = did_you_mean(str(key), parameters)
            raise UserError(f"{here[key]}: {kind} has no option {key!r}{hint}")
        if not _fits(value, hints.get(key, Any)):
            wanted = _words(hints[key])
            raise UserError(f"{here[key]}: {kind}: {key} must be {wanted}, found {value!r}")
        if key in _LEAST and value < _LEAST[key]:
            least = f"at least {_LEAST[key]}"
            raise UserError(f"{here[key]}: {kind}: {key} must be {least}, found {value!r}")
    required = [k for k, p in parameters.items() if p.default is p.empty]
    for key in required:
        if key not in options:
            raise UserError(f"{at}: {kind} needs the option {key!r}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a YAML value suits a type hint; hints this does not know suit everything."""
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    kinds = _kinds(hint)
    known = [kind for kind in kinds if kind in (*_WORDS, type(None))]
    return Any in kinds or not known or any(_is(value, kind) for kind in known)


def _kinds(hint: Any) -> list[Any]:
    """The alternatives of a hint as the types YAML has: Path is text, any sequence a list."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [kind for inner in typing.get_args(hint) for kind in _kinds(inner)]
    kind = typing.get_origin(hint) or hint
    if kind is Path:
        return [str]
    if inspect.isclass(kind) and kind not in (str, object) and issubclass(list, kind):
        return [list]
    return [kind]


def _is(value: Any, kind: Any) -> bool:
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind)


_WORDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
}


def _words(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    return " or ".join(dict.fromkeys(_WORDS[kind] for kind in _kinds(hint) if kind in _WORDS))


# --- running -----------------------------------------------------------------------------------


def _placed(stage: Stage, folder: Path) -> Stage:
    """The stage with `{out}` put in place."""

    def place(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace("{out}", str(folder))
        return [place(v) for v in value] if isinstance(value, list) else value

    options = {key: place(value) for key, value in stage.options.items()}
    return Stage(stage.kind, stage.number, options, stage.where)


def _describe(stage: Stage) -> str:
    named = [*stage.paths("reads"), *(f"-> {path}" for path in stage.paths("writes"))]
    return " ".join([stage.kind, *named])


def _run_stage(
    stage: Stage,
    fingerprint: str,
    done: list[dict[str, Any]],
    redo: bool,
    progress: bool,
) -> dict[str, Any]:
    """Run one stage; returns its entry of the state file, but for the digests of its files."""
    kind = STAGES[stage.kind]
    # Only what this runner wrote before is replaced: `redo` says so.
    offered = {"progress": progress, "resume": True, "overwrite": redo, "results": done}
    given = {name: value for name, value in offered.items() if name in kind.parameters}
    started = time.monotonic()
    try:
        result = kind.function(**stage.options, **given)
    except UserError as error:
        raise UserError(f"{stage.where}: {stage.kind}: {error}") from error
    return {
        "fingerprint": fingerprint,
        "seconds": time.monotonic() - started,
        "files": None,
        # As a second run reads it: NaN and infinities, which JSON lacks, are null.
        "result": json.loads(json.dumps(result, default=str), parse_constant=lambda _: None),
    }


def _fingerprint(stage: Stage, prints: dict[str, str], done: list[dict[str, Any]]) -> str:
    """What decides the result of a stage: version, options, and the content of what it reads."""
    kind = STAGES[stage.kind]
    parts: dict[str, Any] = {
        "posttrain": __version__,
        "stage": stage.kind,
        "options": stage.options,
        "reads": [prints.get(path) or _identity(path) for path in stage.paths("reads")],
    }
    if "results" in kind.parameters:
        parts["results"] = [entry["fingerprint"] for entry in done]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _identity(name: str) -> Any:
    """A file by its content, a folder by names, sizes and times, a shipped recipe by its text;
    anything else (a hub id, `demo`) by its name."""
    path = Path(name).expanduser()
    if path.is_file():
        return _digest(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    recipe = SHIPPED / f"{name}.yaml"
    return _digest(recipe) if recipe.is_file() else name


def _digests(stage: Stage, foreign: set[Path]) -> dict[str, str]:
    """SHA-256 of every file the stage wrote; `foreign` files are other stages'."""
    files: dict[str, str] = {}
    for name in stage.paths("writes"):
        path = Path(name)
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        files |= {str(p): _digest(p) for p in inside if p.is_file() and p not in foreign}
    return files


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        hasher = hashlib.sha256()
        while chunk := file.read(1 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()


class _State:
    """`run.json`: the finished stages of a run, replaced atomically after each."""

    def __init__(self, path: Path, entries: dict[str, Any] | None = None) -> None:
        self.path = path
        self.entries = self._read() if entries is None else entries

    def _read(self) -> dict[str, Any]:
        if not self.path.is_file():
            return {}
        try:
            stages = json.loads(self.path.read_text(encoding="utf-8"))["stages"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.path} is no state of a run; remove it to start anew") from None
        return dict(stages)

    def replaces(self, stage: Stage, fingerprint: str) -> bool:
        """Whether an earlier run finished this stage here, and what it left is to be replaced. Where
        this very stage ended and was killed before its digests, its verb may still find its own."""
        entry = self.entries.get(stage.name)
        if entry is None:
            return False
        return entry["files"] is not None or entry["fingerprint"] != fingerprint

    def finished(self, stage: Stage, fingerprint: str) -> dict[str, Any] | None:
        """The entry of a stage that need not run: same fingerprint, its files unchanged."""
        entry = self.entries.get(stage.name)
        if entry is None or entry["fingerprint"] != fingerprint or entry["files"] is None:
            return None
        unchanged = all(
            Path(name).is_file() and _digest(Path(name)) == digest
            for name, digest in entry["files"].items()
        )
        return dict(entry) if unchanged else None

    def record(self, stage: Stage, entry: dict[str, Any]) -> None:
        self.entries[stage.name] = entry
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        text = json.dumps({"posttrain": __version__, "stages": self.entries}, indent=1)
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(self.path)


def _say(progress: bool, message: str) -> None:
    if progress:
        print(message, file=sys.stderr, flush=True)
