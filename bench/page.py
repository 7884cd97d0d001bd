"""A benchmark run as one HTML page that needs nothing else: tables, and charts as SVG inside it."""

from __future__ import annotations

import io
import re
from typing import Any

from fastnets.bench import charts, environment, report
from fastnets.bench.suite import Run

__all__ = ["to_html"]

_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fastnets bench: {{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2430; }
body { max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
pre { background: #f4f5f7; padding: .8rem 1rem; overflow-x: auto; font-size: 13px; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .7rem; text-align: right; border-bottom: 1px solid #e3e6ea; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { border-bottom: 2px solid #b7bec9; }
tr.ours { font-weight: 600; background: #eef8f1; } tr.wrong td, tr.failed td { color: #b3261e; }
tr.unavailable td { color: #8a94a6; font-weight: 400; }
figure { margin: 1.2rem 0; } figure svg { width: 100%; height: auto; }
.scroll { overflow-x: auto; } ul { padding-left: 1.2rem; font-size: 13.5px; color: #47505f; }
</style>
</head>
<body>
<h1>fastnets bench: {{ title }}</h1>
<p>Variants take turns in one process; a figure is a median, and a ratio has a 95&nbsp;% bootstrap interval
over rounds. A variant is timed only after its answers have passed the accuracy check: an error against
float64 of at most {{ allowed }} times the stock network's own. Times and memory are measured, traffic and
FLOPs counted; nothing here is predicted.</p>
<pre>{{ environment }}</pre>
{% for drawing in overview %}<figure>{{ drawing }}</figure>
{% endfor %}
{% for network in networks %}
<h2>{{ network.title }}</h2>
<div class="scroll"><table>
<tr>{% for heading in headings %}<th>{{ heading }}</th>{% endfor %}</tr>
{% for row in network.rows %}<tr class="{{ row.kind }}">
{% for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
<ul>{% for remark in network.remarks %}<li>{{ remark }}</li>{% endfor %}</ul>
{% for drawing in network.drawings %}<figure>{{ drawing }}</figure>
{% endfor %}
{% endfor %}
</body>
</html>
"""


def _svg(drawing: charts.Drawing) -> str:
    """One chart as an ``<svg>`` element, text as text, without a link to anything outside it."""
    import matplotlib
    from matplotlib.figure import Figure

    _, height, draw = drawing
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "fastnets", "font.family": "sans-serif"}
    ):
        figure = Figure(figsize=(11, height), layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    # ids count up in each figure: kept apart, or one chart would clip another
    name = re.sub(r"\W+", "-", drawing[0])
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'xlink:href="#{name}-')
    return text


def to_html(run: Run) -> bytes:
    """The page; needs jinja2, which PyTorch brings, and matplotlib."""
    import jinja2
    from markupsafe import Markup

    from fastnets.bench import training
    from fastnets.fused.check import ALLOWED_RATIO

    drawn = [(drawing[0], Markup(_svg(drawing))) for drawing in charts.drawings(run)]
    networks = []
    for result in run.results:
        own = [svg for name, svg in drawn if name.endswith(f", {charts.label(result)}")]
        rows = [{"kind": _kind(row), "cells": report.cells(result, row)} for row in result.rows]
        networks.append(
            {"title": report.title(result), "rows": rows, "remarks": report.remarks(result), "drawings": own}
        )
    shown = {svg for network in networks for svg in network["drawings"]}
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_TEMPLATE)
    trains = any(result.training for result in run.results)
    return page.render(
        title=", ".join(dict.fromkeys(result.network for result in run.results)) or "nothing was measured",
        allowed=f"{training.ALLOWED_RATIO:g} (training)" if trains else f"{ALLOWED_RATIO:g}",
        environment="\n".join(environment.summary(run.environment)),
        overview=[svg for _, svg in drawn if svg not in shown],
        networks=networks,
        headings=report.HEADINGS,
    ).encode()


def _kind(row: Any) -> str:
    return "ours" if row.ours and row.status == "measured" else row.status
