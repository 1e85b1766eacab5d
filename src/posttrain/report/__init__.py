"""The comparison as a page: one HTML file that needs no network, no script and no font.

words.py   numbers and verdicts as a person writes them
content.py what `compare` measured, checked and put in the shape the page needs
html.py    elements that escape whatever they are given
svg.py     scales, ticks, axes and marks
charts.py  the charts of this report, drawn with svg.py
theme.py   colours, style sheet, the small optional script
page.py    the sections, and `render_report`
"""

from posttrain.report.page import render_report

__all__ = ["render_report"]
