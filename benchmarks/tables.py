"""Write the tables of the documentation from results/*.json, so that no number is typed by hand.

    python benchmarks/tables.py            rewrite the tables in README.md and docs/
    python benchmarks/tables.py --check    fail where a table differs from its results

A page asks for a table between two comments; `NAME` is a result, a dot leads into its figures to
a list of objects (of a folder, every file is one), and the columns are `key` or `key:title` or
`key:title:decimals`:

    <!-- table NAME.path columns: model, delta_nll:delta nll:4 -->
    <!-- end -->

Where the result does not exist yet, the page says so.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(<!-- table (?P<where>[\w.-]+) columns: (?P<columns>.*?) -->\n)(?P<old>.*?)(<!-- end -->)",
    re.DOTALL,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail on a difference")
    check = parser.parse_args().check
    stale = [path for path in PAGES if path.is_file() and _update(path, check)]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'stale table' if check else 'rewritten'}")
    return 1 if check and stale else 0


def _update(path: Path, check: bool) -> bool:
    """Whether the tables of a page differ from the results (and are rewritten unless `check`)."""
    text = path.read_text(encoding="utf-8")
    fresh = render(text, ROOT / "results")
    if fresh != text and not check:
        path.write_text(fresh, encoding="utf-8")
    return fresh != text


def render(text: str, results: Path) -> str:
    """The page with every table filled in from the folder of results."""
    return BLOCK.sub(lambda m: m[1] + table(m["where"], m["columns"], results) + m[5], text)


def table(where: str, columns: str, results: Path) -> str:
    """One table in Markdown. Raises TypeError or KeyError where the result has no such rows."""
    name, *path = where.split(".")
    if (results / name).is_dir():  # every file in it is a row
        rows = [
            json.loads(file.read_text("utf-8")) for file in sorted((results / name).glob("*.json"))
        ]
        return _rendered(where, columns, rows, f"`results/{name}/`")
    file = results / f"{name}.json"
    if not file.is_file():
        return f"*Not measured yet: `results/{name}.json` is missing.*\n"
    result = json.loads(file.read_text(encoding="utf-8"))
    rows = result["figures"]
    for step in path:
        rows = rows[step]
    if not isinstance(rows, list):
        raise TypeError(f"{where} is no list of rows")
    source = f"`results/{name}.json`, commit {result['commit'][:10]}, {_machine(result)}"
    return _rendered(where, columns, rows, source)


def _rendered(where: str, columns: str, rows: list[dict[str, Any]], source: str) -> str:
    wanted = [_column(column) for column in columns.split(",")]
    for key, _, _ in wanted:
        if not any(key in row for row in rows):
            raise KeyError(f"no row of {where} has {key!r}")
    lines = [[title for _, title, _ in wanted], ["---"] * len(wanted)]
    lines += [[_cell(row.get(key), places) for key, _, places in wanted] for row in rows]
    body = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"\n{body}\nFrom {source}.\n"


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return f"{machine['processor']}, {machine['cores']} cores"


def _column(text: str) -> tuple[str, str, int]:
    key, _, rest = text.strip().partition(":")
    title, _, places = rest.partition(":")
    return key, title or key, int(places or 4)


def _cell(value: Any, places: int) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.{places}f}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
