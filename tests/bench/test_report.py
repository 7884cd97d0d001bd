"""Result files: what they hold, and that bad paths are refused before anything is measured."""

import csv
import io
import json

import pytest
import torch
from rich.console import Console

from fastnets.bench import environment, report
from fastnets.bench.suite import Result, Row, Run
from fastnets.fused.measure import Comparison, Samples


def samples(name: str, seconds: float) -> Samples:
    times = [seconds * (1 + 0.01 * (i % 5)) for i in range(10)]
    return Samples(name, list(range(10)), times, times, calls_per_visit=3, warmup_calls=5, warmup_seconds=0.1)


def measured(name: str, ours: bool = False) -> Row:
    return Row(name, f"what {name} is", ours, "measured", "", 1.0, 1.0, 0.5)


@pytest.fixture
def run() -> Run:
    rows = [
        measured("eager"),
        Row("compile", "compiled", False, "failed", "no C++ compiler"),
        Row("fastnets-triton", "ours", True, "unavailable", "no CUDA device"),
        Row("fastnets-library", "ours", True, "wrong", "error ratio 9.00; not timed", 9.0, 0.5, 0.1),
        measured("fastnets", ours=True),
    ]
    times = {"eager": samples("eager", 0.1), "fastnets": samples("fastnets", 0.05)}
    result = Result("net", "random", (8, 3, 32, 32), "float32", rows, Comparison(times, "cpu", 2))
    result.coverage = 0.98
    result.implementations = {"onednn": 52}
    return Run(environment.describe("cpu"), {"batch_size": 8}, [result])


def test_json_holds_the_raw_samples_and_the_environment(run):
    content = json.loads(report.to_json(run))
    assert content["schema"] == "fastnets-bench"
    assert content["schema_version"] == 1
    assert content["environment"]["torch"] == torch.__version__
    (network,) = content["results"]
    by_name = {row["variant"]: row for row in network["variants"]}
    assert by_name["fastnets"]["samples"]["wall"] == samples("fastnets", 0.05).wall
    assert by_name["fastnets"]["median_seconds"] == pytest.approx(0.051)
    ratio, low, high = by_name["fastnets"]["ratio_to_eager"]
    assert ratio == pytest.approx(2)
    assert low <= ratio <= high
    assert "samples" not in by_name["compile"]
    assert by_name["compile"]["note"] == "no C++ compiler"
    assert network["coverage"] == 0.98


def test_csv_has_a_line_per_variant(run):
    lines = list(csv.DictReader(io.StringIO(report.to_csv(run).decode())))
    assert [line["variant"] for line in lines] == [row.variant for row in run.results[0].rows]
    assert all(None not in line and None not in line.values() for line in lines)  # as many cells as headings
    assert float(lines[-1]["median_ms"]) == pytest.approx(51)
    assert float(lines[-1]["images_per_second"]) == pytest.approx(8 / 0.051)
    assert lines[1]["median_ms"] == ""


@pytest.mark.parametrize("form", ["markdown", "terminal"])
def test_a_table_never_shows_the_speed_of_wrong_answers(run, form):
    if form == "markdown":
        text = report.to_markdown(run).decode()
    else:
        console = Console(width=200, record=True, file=io.StringIO())
        report.print_table(run.results[0], console)
        text = console.export_text()
    (wrong,) = [line for line in text.splitlines() if "fastnets-library" in line and ":" not in line]
    assert wrong.split()[-1 if form == "terminal" else 5] == "wrong"
    assert "×" not in wrong
    assert "fastnets-library: error ratio 9.00; not timed" in text
    (ours,) = [line for line in text.splitlines() if line.strip(" │|").startswith("fastnets ")]
    assert "2.00× [" in ours
    assert "51.00" in ours
    assert "98.0% of the FLOPs" in text
    assert "onednn 52" in text


def test_no_ratio_where_eager_itself_was_not_measured(run):
    run.results[0].rows[0].status = "failed"
    assert report.speedup(run.results[0], run.results[0].rows[-1]) is None


def test_chart_is_a_png_with_something_on_it(run, tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    report.write(run, tmp_path / "chart.png")
    image = Image.open(tmp_path / "chart.png").convert("RGB")
    assert image.width > 600
    assert (42, 157, 92) in {colour for _, colour in image.getcolors(1 << 24)}  # the bar of our variant


def test_chart_of_nothing(run):
    pytest.importorskip("matplotlib")
    run.results.clear()
    assert report.to_png(run).startswith(b"\x89PNG")


@pytest.mark.parametrize("suffix", [".json", ".csv", ".md"])
def test_files_are_written_whole(run, tmp_path, suffix):
    path = tmp_path / f"run{suffix}"
    path.write_text("old")
    report.write(run, path)
    assert path.read_bytes() == report.WRITERS[suffix](run) or suffix == ".json"  # json carries the time
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_failed_write_leaves_the_old_file(run, tmp_path):
    path = tmp_path / "run.json"
    path.write_text("old")
    run.results[0].coverage = float("nan")  # not JSON
    with pytest.raises(ValueError, match="JSON"):
        report.write(run, path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("run.xlsx", "unknown format '.xlsx'"),
        ("run", "unknown format ''"),
        ("missing/run.json", "does not exist"),
        ("folder.json", "is a folder"),
    ],
)
def test_bad_paths_are_refused(tmp_path, name, fact):
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(report.BadOutput, match=fact):
        report.refuse_unwritable([tmp_path / name])
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder.json"]


def test_an_unwritable_folder_is_refused():
    with pytest.raises(report.BadOutput, match="cannot be written"):
        report.refuse_unwritable(["/proc/run.json"])


def test_good_paths_leave_no_trace(tmp_path):
    (tmp_path / "old.json").write_text("kept")
    report.refuse_unwritable([tmp_path / "new.csv", tmp_path / "old.json"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["old.json"]
    assert (tmp_path / "old.json").read_text() == "kept"


def test_run_is_not_ok_when_a_variant_of_ours_is_wrong(run):
    assert not run.ok
    run.results[0].rows[3].status = "unavailable"
    assert run.ok  # a baseline that failed, and a variant that cannot run here, are no failure of ours


def test_environment_block_names_device_versions_threads_and_allocator():
    facts = environment.describe("cpu")
    json.dumps(facts)
    text = "\n".join(environment.summary(facts))
    for part in (torch.__version__, facts["cpu"], f"threads    {torch.get_num_threads()}", "allocator: "):
        assert part in text


@pytest.mark.parametrize(
    ("load", "cores", "busy"), [(0.1, 2, False), (1.5, 2, True), (1.5, 16, False), (None, 2, False)]
)
def test_a_busy_machine_is_noticed(load, cores, busy):
    assert environment.is_busy({"load_average": load, "cores": cores}) is busy


def test_allocator_is_told_from_the_environment(monkeypatch):
    for name in list(environment.ALLOCATORS["keep-pages"]) + ["THP_MEM_ALLOC_ENABLE", "LD_PRELOAD"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert environment.allocator() == "stock"
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    assert environment.allocator() == "thp"
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    assert environment.allocator() == "jemalloc"
