"""The result of a bench as one picture: speed of every contender, for prompts and for answers."""

import os
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.report.html import Markup
from posttrain.report.svg import drawing, line, rect, text, text_width
from posttrain.report.words import number

WIDTH, ROW, LEFT, TOP, GAP = 640, 22, 190, 34, 30
STYLE = (
    "<style>text{font:12px system-ui,sans-serif;fill:#333}.head{font-weight:600}"
    ".ours{fill:#2563eb}.peer{fill:#94a3b8}.axis{stroke:#cbd5e1}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.peer{fill:#64748b}.axis{stroke:#475569}}"
    "</style>"
)


def check_plot_path(path: str | Path) -> Path:
    """The path, if a plot can be written there; asked before the work, not after it."""
    path = Path(path).expanduser()
    if path.suffix != ".svg":
        raise UserError(f"plot {path}: the name must end in .svg, which is what is drawn")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"plot {path}: the folder does not exist")
    if path.is_dir():
        raise UserError(f"plot {path}: that is a folder; name a file")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"plot {path}: it cannot be written there; choose another place")
    return path


def draw(result: dict[str, Any], path: Path) -> Path:
    """Write the picture as SVG; returns its path. UserError where it cannot be written."""
    marks: list[Markup] = [Markup(STYLE)]
    y = TOP
    after = f" after {result['depth']} tokens" if result["depth"] else ""
    titles = {"prefill": "prompt", "decode": f"answer{after}", "score": "scoring"}
    for what, title in titles.items():
        bars = _bars(result, what)
        if len(bars) < 1:
            continue
        marks.append(text(0, y - 10, f"{title}, tokens per second", "head"))
        most = max(value for _, value, _ in bars)
        for name, value, class_ in bars:
            wide = (WIDTH - LEFT - 110) * value / most
            marks.append(text(LEFT - 8, y + 14, name, "name", "end"))
            marks.append(rect(LEFT, y + 3, wide, ROW - 6, class_))
            marks.append(text(LEFT + wide + 6, y + 14, number(value, 0), "value"))
            y += ROW
        marks.append(line(LEFT, y - ROW * len(bars), LEFT, y, "axis"))
        y += GAP
    label = f"Speed of {result['model']} with {result['threads']} threads"
    picture = drawing(WIDTH, y, label, *marks)
    content = str(picture).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: the plot cannot be written: {error.strerror}") from error
    return path


def _bars(result: dict[str, Any], what: str) -> list[tuple[str, float, str]]:
    found = []
    for entry in result["by_threads"]:
        suffix = f", {entry['threads']} thread{'s' * (entry['threads'] > 1)}"
        found.append((f"posttrain{suffix}", entry[f"{what}_tps"], "ours"))
        for peer in entry["peers"]:
            if f"{what}_tps" in peer:
                name = " ".join(filter(None, (peer["name"], peer.get("type"))))
                found.append((f"{name}{suffix}", peer[f"{what}_tps"], "peer"))
    return [(name if text_width(name) < LEFT else name[:28], value, c) for name, value, c in found]
