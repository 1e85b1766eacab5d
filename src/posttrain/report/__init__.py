"""The comparison as a page: one HTML file that needs no network, no script and no font.

verb.py    the compare verb: measure, and with `out` the page
page.py    the order of the sections, and `render_report`
words.py   numbers as a person writes them, with their units
content.py what `compare` measured, checked and in the shape the page needs
verdict.py what the measurements say, in sentences
parts.py   what sections share: the models they speak of, tables, figures, notes
results.py sections about whole models: verdict, summary, bits against quality, loss by position
detail.py  sections about the inside of models: layers, and what they write
method.py  sections about the measurement: how it was done, the command and the machine
html.py    elements that escape whatever they are given
svg.py     scales, ticks, axes and marks
charts.py  the charts of this report, drawn with svg.py
theme.py   colours, style sheet, the small optional script
"""

from posttrain.report.page import render_report

__all__ = ["render_report"]
