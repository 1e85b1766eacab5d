"""The page as a document: well formed, complete, self-contained, escaped, deterministic."""

import copy
import math
import re
from html.parser import HTMLParser

import pytest
from report_samples import comparison, searched

from posttrain.errors import UserError
from posttrain.report import render_report
from posttrain.report.html import Markup, tag
from posttrain.report.page import build_page

VOID = {"meta", "br"}
SECTIONS = [
    "verdict",
    "summary",
    "quality",
    "position",
    "layers",
    "generations",
    "method",
    "origin",
]


class Page(HTMLParser):
    """Elements with their attributes; fails on tags that are not closed in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open and self.open[-1] == name, f"</{name}> inside {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text += data

    def names(self, name, attribute):
        return [a[attribute] for n, a in self.elements if n == name and attribute in a]

    @property
    def sections(self):
        return [a["id"] for name, a in self.elements if name in ("header", "section") and "id" in a]


def page(data):
    return Page(build_page(data))


@pytest.mark.parametrize("small", [0, 1, 2, 5])
def test_page_is_well_formed_and_complete(small):
    found = page(comparison(small))
    expected = SECTIONS if small else [s for s in SECTIONS if s not in ("quality", "layers")]
    assert found.sections == expected
    assert found.names("html", "lang") == ["en"]
    assert [name for name, _ in found.elements].count("h1") == 1


@pytest.mark.parametrize(
    ("key", "section"), [("position_nll", "position"), ("generations", "generations")]
)
@pytest.mark.parametrize("gone", [None, KeyError, {}, []])
def test_section_is_there_only_with_its_data(key, section, gone):
    data = comparison()
    data[key] = gone
    if gone is KeyError:
        del data[key]
    assert page(data).sections == [name for name in SECTIONS if name != section]


def test_layers_are_there_with_either_of_their_parts():
    data = comparison()
    del data["models"][1]["layers"]
    assert "layers" in page(data).sections
    del data["models"][1]["block_sensitivity"]
    assert "layers" not in page(data).sections


def test_a_searched_plan_is_shown_with_every_group_and_only_where_there_is_one():
    data = searched(blocks=3)
    found, plain = page(data), page(comparison(blocks=3))
    search = data["models"][1]["search"]
    for group in search["groups"][:-1]:
        block, kind = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", group["group"]).groups()
        said = re.escape(f"block {block}, {kind}\n{group['bits']} bits\n")
        losses = re.findall(said + r"predicted loss ([0-9.]+) nats", found.text)
        assert len(losses) == 2  # for a page and for a phone
        assert float(losses[0]) == pytest.approx(group["predicted_loss"], rel=0.06)
    assert "0.0123 nats a token at 6.98 bits per weight" in found.text
    assert f"lm_head got {search['groups'][-1]['bits']} bits" in found.text
    for block in range(3):
        own = sum(g["predicted_loss"] for g in search["groups"][4 * block : 4 * block + 4])
        bars = [float(x) for x in re.findall(rf"block {block}\n([0-9.]+) nats", found.text)]
        assert pytest.approx(own, rel=0.06) in bars
    assert "searched" not in plain.text and "predicted loss" not in plain.text
    del data["models"][1]["layers"], data["models"][1]["block_sensitivity"]
    assert "layers" in page(data).sections


def test_least_data_makes_a_page():
    models = [{"model": "a", "nll": 2.0, "perplexity": 7.4, "tokens": 100}]
    assert page({"models": models, "pairs": []}).sections == ["verdict", "summary", "method"]


def paths(value, at=()):
    """Every place in the data, with lists of more than two represented by their first two."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value[:2])
        if isinstance(value, list)
        else ()
    )
    for key, part in items:
        yield (*at, key)
        yield from paths(part, (*at, key))


REQUIRED = re.compile(
    r"models|models/\d+(/(model|nll|perplexity|tokens))?|pairs/\d+(/(a|b|"
    r"delta_nll))?|position_nll/models/.*/\d+"
)
SMALLEST = searched(blocks=2)


@pytest.mark.parametrize(
    "path",
    [p for p in paths(SMALLEST) if not REQUIRED.fullmatch("/".join(map(str, p)))],
    ids=lambda path: "/".join(map(str, path)),
)
def test_missing_optional_data_never_breaks_the_page(path):
    for value in (None, KeyError, math.nan, math.inf, "", []):
        data = copy.deepcopy(SMALLEST)
        at = data
        for key in path[:-1]:
            at = at[key]
        if value is KeyError:
            del at[path[-1]]
        else:
            at[path[-1]] = value
        if path == ("pairs",) and value not in (None, KeyError, []):
            continue  # an error that says so: test_report_content
        assert {"verdict", "summary", "method"} <= set(page(data).sections)


def test_numbers_on_the_page_are_the_data():
    data = comparison(5, blocks=3)
    shown = {float(value) for value in page(data).names("data", "value")}
    for pair in data["pairs"]:
        assert {pair["delta_nll"], pair["kl"], pair["greedy_agreement"]} <= shown
    for model in data["models"]:
        keys = (
            "nll",
            "perplexity",
            "tokens",
            "bits_per_weight",
            "bytes",
            "window",
            "stride",
            "seconds",
            "tokens_per_second",
        )
        assert {float(model[key]) for key in keys} <= shown
        assert {layer["qsnr"] for layer in model.get("layers", [])} <= shown
    allowed = {float(v) for v in _numbers(data)}
    assert shown <= allowed


def _numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for part in value for number in _numbers(part)]
    return [value] if isinstance(value, (int, float)) else []


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style></title><b>",
    "]]><!--",
    "&lt;b&gt;",
    "' onload='x",
    "\x00\x1b[31m\x7f\ud800",
    "javascript:alert(1)",
]


@pytest.mark.parametrize("hostile", HOSTILE, ids=ascii)
def test_whatever_is_data_is_text(hostile):
    clean, dirty = comparison(2, blocks=2), comparison(2, blocks=2)
    names = {m["model"]: f"{m['model']} {hostile}" for m in dirty["models"]}
    dirty = _renamed(dirty, names)
    for key in ("command", "created"):
        dirty[key] = hostile
    dirty["notes"], dirty["machine"] = [hostile], {hostile: hostile}
    dirty["text"].update(name=hostile, sha256=hostile)
    for model in dirty["models"]:
        model.update(recipe=hostile, dtype=hostile)
        for layer in model.get("layers", []):
            layer.update(weight=hostile, input=hostile)
    for sample in dirty["generations"]:
        sample["prompt"] = hostile
        sample["outputs"] = {name: hostile + text for name, text in sample["outputs"].items()}
    found = page(dirty)

    def kinds(parsed):
        return {
            (name, attribute) for name, attributes in parsed.elements for attribute in attributes
        }

    assert kinds(found) <= kinds(page(clean)) | {("span", "title"), ("small", "class")}
    assert [n for n, _ in found.elements].count("script") == 1
    assert "<img" not in build_page(dirty) and "<script>alert" not in build_page(dirty)
    build_page(dirty).encode("utf-8")


def _renamed(value, names):
    if isinstance(value, dict):
        return {names.get(key, key): _renamed(part, names) for key, part in value.items()}
    if isinstance(value, list):
        return [_renamed(part, names) for part in value]
    return names.get(value, value) if isinstance(value, str) else value


def test_page_needs_nothing_but_itself():
    found = page(comparison(2))
    for name, attributes in found.elements:
        assert not {"src", "href", "srcset", "action", "style"} & set(attributes), (
            name,
            attributes,
        )
        assert not any(key.startswith("on") for key in attributes)
        assert name not in ("link", "iframe", "object", "embed", "base", "form")
    text = build_page(comparison(2))
    assert "url(" not in text and "@import" not in text
    (policy,) = (a["content"] for n, a in found.elements if a.get("http-equiv"))
    assert "default-src 'none'" in policy and "'unsafe-inline'" not in policy.split("script-src")[1]


def test_charts_have_words_and_tables_have_headings():
    found = page(comparison(2))
    charts = [a for name, a in found.elements if name == "svg"]
    assert charts and all(a.get("role") == "img" and a.get("aria-label") for a in charts)
    heads = [a for name, a in found.elements if name == "th"]
    assert heads and all(a.get("scope") in ("row", "col") for a in heads)


def test_first_difference_is_marked_and_sameness_is_said():
    data = comparison()
    data["generations"] = [
        {"prompt": "p", "outputs": {"demo": "a red fox", names_of(data)[1]: "a red dog"}},
        {"prompt": "q", "outputs": {"demo": "yes", names_of(data)[1]: "yes"}},
    ]
    text = build_page(data)
    assert "a red <mark>dog</mark>" in text
    assert text.count("<em>identical</em>") == 1 and text.count("<mark>") == 1


def names_of(data):
    return [model["model"] for model in data["models"]]


def test_notes_stand_beside_the_numbers():
    text = build_page(comparison())
    summary = text[text.index('id="summary"') : text.index('id="quality"')]
    assert "flatter grids that match" in summary


def test_pairs_that_are_not_with_the_reference_have_their_own_table():
    data = comparison(3)
    _, a, b, _ = names_of(data)
    data["pairs"].append({"a": a, "b": b, "delta_nll": 0.0039, "ci_low": 0.002, "ci_high": 0.006})
    text = page(data).text
    assert "Other pairs" in text and "demo-w6a8 against demo-w8a8" in text
    assert "Other pairs" not in page(comparison(3)).text


def test_a_model_against_itself():
    data = comparison(chosen=(("demo", 31.0, 0.0, 0.0, 0.0, 1.0, 40.0),))
    data["models"][1] = data["models"][0]
    text = page(data).text
    assert "demo (2) needs the same 32 bits per weight and shows no measurable change" in text


def test_same_data_same_bytes(tmp_path):
    first = render_report(comparison(5), tmp_path / "a.html").read_bytes()
    assert render_report(comparison(5), tmp_path / "deep" / "b.html").read_bytes() == first
    assert render_report(comparison(5, seed=1), tmp_path / "c.html").read_bytes() != first


def test_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="report: cannot write .*file"):
        render_report(comparison(), tmp_path / "file" / "report.html")


def test_elements_escape_by_construction():
    assert tag("p", "<b>&", [None, 3, Markup("<i></i>")], title='"', hidden=True, id=None) == (
        '<p title="&quot;" hidden>&lt;b&gt;&amp;3<i></i></p>'
    )
