"""``fastnets bench-op``: which layers, what work, and that wrong answers get no time."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from fastnets.bench import layers
from fastnets.bench.ceilings import Ceilings, measure_ceilings
from fastnets.bench.layers import bench_operation, select_operations, work_of
from fastnets.bench.operations import OPERATIONS, Inputs
from fastnets.cli import app

POOL = OPERATIONS["global average pool 2048 @7"]


def test_operations_are_chosen_by_name_and_by_family():
    assert {op.family for op in select_operations(["depthwise"])} == {"depthwise"}
    assert [op.name for op in select_operations(["conv 3x3/2 128*"])] == ["conv 3x3/2 128→128 @56"]
    assert len(select_operations()) == len(OPERATIONS)
    with pytest.raises(ValueError, match="families: convolution"):
        select_operations(["convolutoin"])


def test_work_is_counted_from_the_shapes():
    call = OPERATIONS["conv 1x1 256→64 @56"].make(Inputs("meta", torch.float16), 2)
    moved, flops = work_of(call, training=False)
    pixels = 2 * 56 * 56
    assert flops == 2 * pixels * 256 * 64
    assert moved == 2 * (pixels * (256 + 64) + 256 * 64 + 4 * 64)
    moved_back, flops_back = work_of(call, training=True)
    assert flops_back == 2 * flops
    assert moved_back - moved == 2 * (pixels * 256 + 256 * 64 + 2 * 64)


@pytest.mark.parametrize("training", [False, True])
def test_every_right_implementation_is_timed_beside_stock(training):
    result = bench_operation(POOL, "cpu", torch.float32, batch_size=2, training=training, rounds=3)
    ceilings = Ceilings("cpu", "float32", 1e10, 1e11)
    rows = result.rows(ceilings)
    assert {row["implementation"] for row in rows} == {"reference", "library"}
    for row in rows:
        assert row["share"] == pytest.approx(result.moved / 1e10 / (row["ms"] / 1e3))


def test_a_wrong_implementation_gets_no_time():
    def make(inputs, batch_size):
        call = POOL.make(inputs, batch_size)

        def wrong(*tensors, backend, **options):
            y = call.function(*tensors, backend="reference", **options)
            return y * 1.001 if backend == "library" else y

        return dataclasses.replace(call, function=wrong)

    spoiled = dataclasses.replace(POOL, make=make)
    result = bench_operation(spoiled, "cpu", torch.float32, batch_size=2, rounds=3)
    assert "wrong" in result.refused["library"]
    assert list(result.comparison.samples) == ["reference"]


def test_ceilings_are_measured():
    found = measure_ceilings("cpu", torch.float32, rounds=3)
    assert 1e9 < found.bytes_per_second < 1e12
    assert 1e9 < found.flops < 1e14
    assert found.seconds(10**9, 0) == 1e9 / found.bytes_per_second


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "OPERATIONS", {POOL.name: POOL})
    file = tmp_path / "layers.json"
    arguments = ["bench-op", "pool", "-b", "1", "--device", "cpu", "--rounds", "3"]
    result = CliRunner().invoke(app, [*arguments, "-o", str(file)])
    assert result.exit_code == 0, result.output
    assert "of the ceiling" in result.output
    whole = json.loads(file.read_text())
    assert whole["schema"] == layers.SCHEMA
    assert len(whole["operations"][0]["samples"]["reference"]) == 3
    assert CliRunner().invoke(app, ["bench-op", "nothing-like-it"]).exit_code == 2
    assert "pool" in CliRunner().invoke(app, ["bench-op", "--list"]).output
