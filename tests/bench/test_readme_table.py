"""The README's figures are those of the committed result files."""

import json
import re
import sys
from pathlib import Path

import pytest

from fastnets.bench import readme_table

ROOT = Path(__file__).resolve().parent.parent.parent


def result_file(path: Path, allocator: str, seconds: float) -> Path:
    environment = {
        "allocator": allocator,
        "cpu": "a CPU",
        "threads": 2,
        "torch": "2",
        "onednn": "3",
        "commit": "abc",
    }
    row = {"variant": "eager", "median_seconds": 2 * seconds, "ratio_to_eager": [1.0, 1.0, 1.0]}
    ours = {"variant": "fastnets", "median_seconds": seconds, "ratio_to_eager": [2.0, 1.9, 2.1]}
    wrong = {"variant": "compile", "status": "wrong"}
    result = {"network": "net", "input_shape": [8, 3, 9, 9], "variants": [row, wrong, ours]}
    content = {
        "schema": "fastnets-bench",
        "schema_version": 1,
        "environment": environment,
        "settings": {"dtype": "torch.float32"},
        "results": [result],
    }
    path.write_text(json.dumps(content))
    return path


def test_a_line_per_measured_variant_and_two_columns_per_run(tmp_path):
    files = [result_file(tmp_path / "a.json", "stock", 0.05), result_file(tmp_path / "b.json", "thp", 0.02)]
    lines = readme_table.table([readme_table.read_results(file) for file in files]).splitlines()
    assert lines[2] == "| net, batch 8 | eager | 100.0 | 1.00× [1.00, 1.00] | 40.0 | 1.00× [1.00, 1.00] |"
    assert (
        lines[3] == "| net, batch 8 | **fastnets** | 50.0 | 2.00× [1.90, 2.10] | 20.0 | 2.00× [1.90, 2.10] |"
    )
    assert lines[4] == ""
    assert "a CPU, 2 threads, float32, torch 2, oneDNN 3, at commit abc" in lines[5]


def test_only_what_is_between_the_markers_changes(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{readme_table.START}\nold\n{readme_table.END}\nafter\n")
    results = str(result_file(tmp_path / "a.json", "stock", 0.05))
    monkeypatch.setattr(sys, "argv", ["readme_table", str(readme), results, "--check"])
    assert readme_table.main() == 1
    monkeypatch.setattr(sys, "argv", ["readme_table", str(readme), results])
    assert readme_table.main() == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{readme_table.START}\n| network")
    assert text.endswith(f"{readme_table.END}\nafter\n")
    assert "old" not in text
    monkeypatch.setattr(sys, "argv", ["readme_table", str(readme), results, "--check"])
    assert readme_table.main() == 0


def test_foreign_files_are_refused(tmp_path):
    (tmp_path / "other.json").write_text('{"schema": "else"}')
    with pytest.raises(ValueError, match=r"other\.json: is not a fastnets-bench file"):
        readme_table.read_results(tmp_path / "other.json")
    with pytest.raises(ValueError, match="no marker lines"):
        readme_table.insert("nothing here", "figures")


def test_the_committed_readme_is_up_to_date():
    """`make readme-table` would change nothing: every figure in the README has its committed result file."""
    names = re.search(r"^RESULTS = (.+)$", (ROOT / "Makefile").read_text(), re.M).group(1).split()
    readme = (ROOT / "README.md").read_text()
    present = [ROOT / name for name in names if (ROOT / name).exists()]
    if not present:
        assert f"{readme_table.START}\n{readme_table.END}" in readme, "figures without result files"
        return
    assert len(present) == len(names), f"of {names} only {present} are there"
    runs = [readme_table.read_results(path) for path in present]
    assert readme_table.insert(readme, readme_table.table(runs)) == readme
