"""The report: sections in reading order, each there only when its data is."""

import base64
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.report import content
from posttrain.report.detail import generations, layers
from posttrain.report.html import Markup, tag
from posttrain.report.method import method, origin
from posttrain.report.parts import Report
from posttrain.report.results import position, quality, summary, verdict_section
from posttrain.report.theme import SCRIPT, STYLE

SECTIONS = (verdict_section, summary, quality, position, layers, generations, method, origin)


def render_report(data: Mapping[str, Any], out: str | Path) -> Path:
    """Write what `compare` measured as one HTML file that needs nothing else, and return its path.

    `data` is the dict that `posttrain.compare` returns: `models` with `model`, `nll`,
    `perplexity` and `tokens` each, and `pairs` (b minus a) with `a`, `b`, `delta_nll`, `ci_low`,
    `ci_high`; everything else is optional. The same data gives the same bytes. Raises UserError
    naming the field where a required one is missing, or the path that cannot be written.
    """
    page = build_page(data).encode("utf-8")
    out = check_path(out)
    try:
        out.write_bytes(page)
    except OSError as error:
        raise _cannot_write(out, error) from error
    return out


def check_path(out: str | Path) -> Path:
    """The path of a page that is to be written; makes its folder.

    Raises UserError where no file can be written: a comparison can take hours, and its page is
    the last thing it makes.
    """
    out = Path(out)
    if os.path.isdir(out):
        raise UserError(f"report: {out} is a folder; name a file, such as {out / 'report.html'}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        new = not out.exists()
        out.open("ab").close()  # only opening it tells; an older page stays as it is
        if new:
            out.unlink()
    except OSError as error:
        raise _cannot_write(out, error) from error
    return out


def _cannot_write(out: Path, error: OSError) -> UserError:
    return UserError(f"report: cannot write {out}: {error.strerror or error}")


def build_page(data: Mapping[str, Any]) -> str:
    """The page as text: see `render_report`."""
    models = content.read_models(data)
    report = Report(data, models, content.read_pairs(data, models))
    title = " against ".join([*(p.b.short for p in report.main_pairs[:1]), report.reference.short])
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{title} \u2013 posttrain"),
        tag("style", Markup(STYLE)),
    )
    body = tag(
        "body", tag("main", [make(report) for make in SECTIONS]), tag("script", Markup(SCRIPT))
    )
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"
