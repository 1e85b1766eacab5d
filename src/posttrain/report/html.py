"""HTML and SVG elements built from Python values, escaped by construction.

The only way to get text into an element is `tag`, which escapes everything that is not already
`Markup`, so a model called `<script>` is shown and never run.
"""

import html
import re

# What a browser must not see raw: control characters would vanish or break the parser, and half
# of a surrogate pair cannot be written as UTF-8. Tab and newline stay.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_VOID = frozenset({"meta", "br", "col"})


class Markup(str):
    """Text that is already HTML."""

    __slots__ = ()


Child = object  # Markup, anything printable, None (left out), or a list or tuple of these


def visible(text: str) -> str:
    """`text` with line ends as "\\n", control characters as their pictures (NUL becomes U+2400)."""
    text = text.replace("\r\n", "\n")
    text = _CONTROL.sub(lambda m: chr(0x2400 + ord(m[0])) if ord(m[0]) < 32 else "\ufffd", text)
    return _SURROGATE.sub("\ufffd", text)


def markup(child: Child) -> Markup:
    """One child as HTML: lists are joined, None is nothing, everything else is escaped text."""
    if child is None:
        return Markup()
    if isinstance(child, Markup):
        return child
    if isinstance(child, (list, tuple)):
        return Markup("".join(markup(part) for part in child))
    return Markup(html.escape(visible(str(child))))


def _attribute(name: str, value: object) -> str:
    name = name.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    return f' {name}="{html.escape(visible(text))}"'


def tag(name: str, /, *children: Child, **attributes: object) -> Markup:
    """An element. Attributes: `class_` is class, `aria_label` is aria-label, True is bare, None
    or False is left out, floats are written with two decimals (for SVG coordinates)."""
    kept = [
        (key, value)
        for key, value in attributes.items()
        if value is not None and value is not False and value != ""
    ]
    start = f"<{name}{''.join(_attribute(key, value) for key, value in kept)}>"
    return Markup(start if name in _VOID else f"{start}{markup(children)}</{name}>")
