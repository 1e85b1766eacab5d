"""The page in a real browser: it renders, fits, and nothing covers anything else."""

import pytest
from report_browser import Browser, find_chromium
from report_samples import CASES, comparison

from posttrain.report import render_report

# Every complaint about the layout as one line of text. Boxes of text are as tall as the line of
# the font, so a few px of them may meet without letters touching.
MEASURE = r"""
(() => {
  const found = [], seen = e => e.getClientRects().length > 0;
  const say = (e, what) => found.push(`${what}: ${(e.textContent || e.tagName).slice(0, 60)}`);
  const page = document.documentElement;
  if (page.scrollWidth > innerWidth) found.push(`page is ${page.scrollWidth} px wide`);
  for (const e of document.querySelectorAll('body *')) {
    if (!seen(e) || e.closest('.scroll > table') || e.closest('svg')) continue;
    const box = e.getBoundingClientRect();
    if (box.right > innerWidth + 0.5 || box.left < -0.5) say(e, 'outside the page');
  }
  for (const svg of document.querySelectorAll('svg')) {
    if (!seen(svg)) continue;
    const outer = svg.getBoundingClientRect(), scale = outer.width / svg.viewBox.baseVal.width;
    const texts = [...svg.querySelectorAll('text')].map(e => [e, e.getBoundingClientRect()]);
    if (texts.length && 11 * scale < 9) say(svg, `text is too small at scale ${scale}`);
    for (const [e, box] of texts)
      if (box.left < outer.left - 1 || box.right > outer.right + 1 || box.top < outer.top - 3 ||
          box.bottom > outer.bottom + 3) say(e, 'outside its chart');
    const meet = (a, b, x, y) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > x &&
      Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > y;
    texts.forEach(([e, box], i) => texts.slice(i + 1).forEach(([other, its]) => {
      if (meet(box, its, 1, 4)) say(e, `covers ${other.textContent}`)}));
    for (const dot of svg.querySelectorAll('circle'))
      for (const [e, box] of texts)
        if (meet(box, dot.getBoundingClientRect(), 2, 4)) say(e, 'covers a dot');
  }
  return found;
})()
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium found; install one or set POSTTRAIN_CHROMIUM to its path")
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    return {name: render_report(make(), folder / f"{name}.html") for name, make in CASES.items()}


@pytest.mark.parametrize("width", [320, 420, 720, 1280])
@pytest.mark.parametrize("case", CASES)
def test_layout(browser, pages, case, width):
    browser.open(pages[case], width)
    assert browser.evaluate(MEASURE) == []
    assert browser.problems == []


def test_measuring_finds_faults(browser, pages, tmp_path):
    # The same page with each fault put in by hand: a test that cannot fail proves nothing.
    page = pages["two"].read_text()
    faults = {
        "outside its chart": ('text-anchor="middle"', 'dx="900"'),
        "covers": ('class="tick"', 'transform="translate(9,9)" x="40" y="40" class="tick"'),
        "page is": ("</main>", '<p><svg width="2000" style="max-width:none"></svg></p></main>'),
    }
    for name, (old, new) in faults.items():
        broken = tmp_path / "broken.html"
        broken.write_text(page.replace(old, new))
        browser.open(broken, 1280)
        assert any(line.startswith(name) for line in browser.evaluate(MEASURE)), name


def test_dark_and_light_differ_and_both_render(browser, pages):
    grounds = []
    for dark in (False, True):
        browser.open(pages["two"], 1280, dark=dark)
        grounds.append(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
        shot = browser.screenshot()
        assert shot.startswith(b"\x89PNG") and len(shot) > 50_000
    assert grounds == ["rgb(246, 245, 242)", "rgb(20, 20, 19)"]


def test_one_drawing_of_each_chart_is_shown(browser, pages):
    for width, hidden in ((420, ".wide"), (1280, ".narrow")):
        browser.open(pages["two"], width)
        shown = f"[...document.querySelectorAll('{hidden}')].filter(e => e.offsetHeight).length"
        assert browser.evaluate(shown) == 0
        assert browser.evaluate("document.querySelectorAll('.wide').length") >= 4


def test_page_is_whole_without_its_script(browser, pages):
    browser.open(pages["two"], 1280)
    text = browser.evaluate("document.querySelector('main').innerText")
    browser.open(pages["two"], 1280, script=False)
    root = browser.call("DOM.getDocument")["root"]["nodeId"]
    main = browser.call("DOM.querySelector", nodeId=root, selector="main")["nodeId"]
    html = browser.call("DOM.getOuterHTML", nodeId=main)["outerHTML"]
    assert "<title>" in html and "<button" not in html  # plain tooltips, plain headings
    for line in text.splitlines():
        assert line.strip() in html or len(line.split()) > 1 or "&" in html


def test_headings_sort_the_layer_table(browser, pages):
    browser.open(pages["two"], 1280)
    browser.evaluate("document.querySelector('details').open = true")
    values = ("[...document.querySelectorAll('table.sort tbody tr')]"
              ".map(row => +row.cells[3].querySelector('data').value)")  # fmt: skip
    qsnr = [layer["qsnr"] for layer in comparison()["models"][1]["layers"]]
    assert browser.evaluate(values) == qsnr
    for expected in (sorted(qsnr), sorted(qsnr, reverse=True)):
        browser.evaluate("document.querySelectorAll('table.sort th button')[3].click()")
        assert browser.evaluate(values) == expected


def test_pointer_shows_the_value_of_a_cell(browser, pages):
    browser.open(pages["two"], 1280)
    point = browser.evaluate(
        "(() => {const e = document.querySelector('.wide rect.heat'); e.scrollIntoView();"
        "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]})()"
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=point[0], y=point[1])
    tip = browser.evaluate("document.querySelector('#tip').textContent")
    qsnr = comparison()["models"][1]["layers"][0]["qsnr"]
    assert tip == f"block 0, self_attn.q_proj\n{qsnr:.1f} dB"


def test_hostile_names_run_nothing(browser, tmp_path):
    data = comparison()
    data["notes"] = ["<img src=x onerror='document.title=1'><script>document.title=1</script>"]
    browser.open(render_report(data, tmp_path / "hostile.html"))
    assert browser.evaluate("document.title") == "demo-w6a8 against demo \u2013 posttrain"
    assert browser.problems == []


A4 = 718  # px of a sheet between its usual margins


@pytest.mark.parametrize("case", ["two", "six"])
def test_it_prints_light_and_whole(browser, pages, case):
    browser.open(pages[case], A4, dark=True)
    assert len(browser.call("Page.printToPDF", printBackground=True)["data"]) > 50_000
    browser.call("Emulation.setEmulatedMedia", media="print")
    try:
        ground = browser.evaluate("getComputedStyle(document.querySelector('h1')).color")
        assert ground == "rgb(28, 27, 25)"
        hidden = "[...document.querySelectorAll('.narrow')].every(e => !e.offsetHeight)"
        assert browser.evaluate(hidden)
        cut = (
            "[...document.querySelectorAll('.scroll')].filter(e => e.offsetHeight && "
            "e.getBoundingClientRect().left + e.scrollWidth > innerWidth + 24).length"
        )
        assert browser.evaluate(cut) == 0
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    finally:
        browser.call("Emulation.setEmulatedMedia", media="")
