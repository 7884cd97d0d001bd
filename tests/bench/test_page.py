"""The page and the charts: whole, with nothing from outside, and with every figure that was measured."""

import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from torch import nn

from fastnets.bench import environment, report, suite
from fastnets.bench.breakdown import break_down
from fastnets.bench.charts import drawings
from fastnets.bench.networks import Network, settle_batch_norms


@pytest.fixture(scope="module")
def run() -> suite.Run:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    layers += [nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 256, 5)).eval()
    settle_batch_norms(model, (3, 16, 16))
    network = Network("small <net>", model, (3, 16, 16), "random")
    options = {"variants": ("eager", "openvino", "fastnets"), "rounds": 4, "threads": 1, "breakdown": True}
    settings = [suite.Settings(batch_size=size, **options) for size in (1, 4)]
    return suite.run([lambda: network], settings)


def test_each_distinct_layer_is_taken_apart(run):
    for batch, result in zip((1, 4), run.results):
        found = result.breakdown
        convolutions = [layer for layer in found.layers if layer.kind == "conv_bn_act"]
        assert [layer.calls for layer in convolutions] == [1, 1]
        assert convolutions[0].flops == 2 * batch * 16 * 16 * 16 * 27
        assert convolutions[0].moved == 4 * (batch * 256 * (3 + 16) + 16 * 27 + 4 * 16)
        assert all(layer.stock_seconds > 0 and layer.fused_seconds > 0 for layer in found.layers)
        assert found.ceilings.flops > 0
        assert 0 < found.fused_traffic < found.stock_traffic


def test_taking_apart_changes_nothing(run):
    layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    break_down(layer, torch.randn(2, 3, 8, 8), 0.01)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_every_chart_has_its_figures(run):
    names = [name for name, _, _ in drawings(run)]
    assert names[:3] == ["speed-up", "memory", "traffic"]
    for batch in (1, 4):
        assert f"where the time went, small <net>, batch {batch}, float32" in names
        assert f"roofline, small <net>, batch {batch}, float32" in names
    nothing = suite.Run(run.environment, {}, [])
    assert drawings(nothing) == []
    for ending in (".png", ".svg", ".html"):
        assert report.WRITERS[ending](nothing)


def test_the_page_needs_nothing_from_outside(run, tmp_path):
    report.write(run, tmp_path / "run.html")
    page = (tmp_path / "run.html").read_text()
    assert "small &lt;net&gt;" in page
    assert "<net>" not in page
    assert "openvino is not installed" in page or "openvino" in page
    assert page.count("<svg") == 7
    assert not re.search(r"<(script|link|img|iframe|object)\b|@import|url\((?!#)", page)
    outside = set(re.findall(r'(?:src|href)="([^"]+)"', page))
    assert all(link.startswith("#") for link in outside)
    for result in run.results:
        for row in result.rows:
            for cell in report.cells(result, row):
                assert f"<td>{cell}</td>" in page
    for line in environment.summary(run.environment):
        assert line.split()[0] in page
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert {link[1:] for link in outside} <= set(identifiers)


def test_the_charts_as_one_svg_file(run, tmp_path):
    report.write(run, tmp_path / "run.svg")
    root = ElementTree.parse(tmp_path / "run.svg").getroot()
    assert root.tag.endswith("svg")
