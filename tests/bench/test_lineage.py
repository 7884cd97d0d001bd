"""The tour of the lineage: counted, complete, and every name in it exists."""

import torch

from fastnets.bench import lineage
from fastnets.models import list_models


def test_a_stop_counts_and_says_what_the_network_brought():
    stop = lineage.visit("lenet5_relu", batch_size=4, dtype=torch.float32, gpu="h100")
    assert stop.parameters == 61_706
    assert stop.traffic.ratio < 1
    assert "LeNet-5" in stop.brought
    assert "1998" in stop.source
    assert any("conv" in kind for kind in stop.kinds)


def test_the_page_has_a_line_and_a_section_for_each_network(tmp_path):
    page = tmp_path / "lineage.md"
    assert lineage.main(["lenet5", "lenet5_relu", "-b", "2", "-o", str(page)]) == 0
    text = page.read_text()
    assert text.count("| [lenet5") == 2
    assert "## lenet5_relu {#lenet5_relu}" in text
    assert "Batch 2, bfloat16" in text
    assert "<svg" in page.with_suffix(".svg").read_text()


def test_the_tour_names_networks_that_exist():
    assert set(lineage.LINEAGE) <= set(list_models())
