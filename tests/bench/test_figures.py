"""Figures of the pages are those of the committed result files."""

import json
import sys
from pathlib import Path

import pytest

from fastnets.bench import figures
from fastnets.bench.report import read_results

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if "<!-- figures: end -->" in page.read_text()
]


def result_file(path: Path, seconds: float, batches: tuple[int, ...] = (8,), compiled: str = "wrong") -> Path:
    environment = {
        "allocator": "stock",
        "cpu": "a CPU",
        "threads": 2,
        "torch": "2",
        "onednn": "3",
        "commit": "abc",
    }

    def variant(name: str, ours: bool, ratio: float) -> dict:
        spread = [ratio, 0.9 * ratio, 1.1 * ratio]
        return {
            "variant": name,
            "ours": ours,
            "status": "measured",
            "median_seconds": seconds / ratio,
            "ratio_to_eager": spread,
        }

    wrong = {"variant": "compile", "ours": False, "status": compiled}
    content = {
        "schema": "fastnets-bench",
        "schema_version": 1,
        "environment": environment,
        "settings": {"dtype": "torch.float32"},
        "results": [
            {
                "network": "net",
                "input_shape": [batch, 3, 9, 9],
                "variants": [variant("eager", False, 1.0), wrong, variant("fastnets", True, 0.25 * batch)],
            }
            for batch in batches
        ],
    }
    path.write_text(json.dumps(content))
    return path


def test_a_line_per_network_and_a_column_per_variant(tmp_path):
    lines = figures.table([read_results(result_file(tmp_path / "a.json", 0.1))]).splitlines()
    assert lines[0] == "| network | batch | eager, ms | compile | **fastnets** |"
    assert lines[2] == "| net | 8 | 100.0 | wrong | 2.00 [1.80, 2.20] |"
    assert lines[3] == ""
    assert "a CPU, 2 threads, float32, torch 2, oneDNN 3, allocator: stock, commit abc" in lines[4]


def test_the_mean_is_geometric_and_of_variants_that_ran_everywhere(tmp_path):
    run = read_results(result_file(tmp_path / "a.json", 0.1, batches=(4, 16)))
    assert figures.table([run]).splitlines()[4] == "| geometric mean | | | – | 2.00 |"


def test_what_is_not_installed_has_no_column(tmp_path):
    run = read_results(result_file(tmp_path / "a.json", 0.1, compiled="unavailable"))
    assert figures.table([run]).splitlines()[0] == "| network | batch | eager, ms | **fastnets** |"


def test_only_what_is_between_the_markers_changes(tmp_path, monkeypatch, capsys):
    result_file(tmp_path / "a.json", 0.1)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- figures: a.json -->\nold\n<!-- figures: end -->\nafter\n")
    monkeypatch.setattr(sys, "argv", ["figures", str(page), "--check"])
    assert figures.main() == 1
    assert "page.md is not up to date" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["figures", str(page)])
    assert figures.main() == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- figures: a.json -->\n\n| network")
    assert text.endswith("<!-- figures: end -->\nafter\n")
    assert "old" not in text
    monkeypatch.setattr(sys, "argv", ["figures", str(page), "--check"])
    assert figures.main() == 0


def test_what_cannot_be_filled_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing here")
    with pytest.raises(ValueError, match=r"page\.md: has no block of figures"):
        figures.fill(page)
    (tmp_path / "other.json").write_text('{"schema": "else"}')
    page.write_text("<!-- figures: other.json -->\n<!-- figures: end -->\n")
    with pytest.raises(ValueError, match=r"other\.json: is not a fastnets-bench file"):
        figures.fill(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_committed_pages_are_up_to_date(page):
    """`make figures-in-pages` would change nothing."""
    assert figures.fill(page) == page.read_text()


def test_the_readme_states_figures():
    assert ROOT / "README.md" in PAGES
