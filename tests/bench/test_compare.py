"""Two runs beside each other: a planted slowdown is seen, equal ones are quiet, bad files are told."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from fastnets.bench import report
from fastnets.bench.compare import compare_runs
from fastnets.cli import app


def run(seed: int, *, slowdown: float = 1.0, machine: float = 1.0, variants=("eager", "fastnets")) -> dict:
    """A result file's content: fastnets twice as fast as eager, with noise that both share and noise of each.

    slowdown: of fastnets alone. machine: how slow the whole machine was that day.
    """
    draws = np.random.default_rng(seed)
    spells = machine * draws.lognormal(0, 0.15, 20)
    times = {"eager": 0.1 * spells * draws.lognormal(0, 0.03, 20)}
    times["fastnets"] = 0.05 * slowdown * spells * draws.lognormal(0, 0.03, 20)
    rows = [
        {
            "variant": name,
            "status": "measured",
            "samples": {"rounds": list(range(20)), "wall": list(times[name])},
        }
        for name in variants
    ]
    result = {"network": "net", "input_shape": [8, 3, 32, 32], "dtype": "float32", "training": False}
    return {
        "schema": report.SCHEMA,
        "schema_version": report.SCHEMA_VERSION,
        "results": [{**result, "variants": rows}],
    }


def test_a_planted_slowdown_of_a_fifth_is_flagged():
    for seed in range(20):
        (change,) = compare_runs(run(seed), run(100 + seed, slowdown=1.2))
        assert change.verdict == "slower"
        assert change.change.low <= 1 / 1.2 * 1.03
        (change,) = compare_runs(run(seed, slowdown=1.2), run(100 + seed))
        assert change.verdict == "faster"


def test_two_runs_of_the_same_code_are_the_same():
    verdicts = [compare_runs(run(i), run(100 + i, machine=1.5))[0].verdict for i in range(40)]
    assert verdicts == ["same"] * 40


def test_what_one_run_lacks_is_said():
    (change,) = compare_runs(run(0), run(1, variants=("eager",)))
    assert change.verdict == "not measured in B"
    assert change.change is None
    assert change.before == pytest.approx(2, rel=0.1)


def test_runs_with_nothing_in_common():
    other = run(1)
    other["results"][0]["network"] = "another"
    with pytest.raises(ValueError, match=r"nothing in common: net 8×3×32×32 float32 against another"):
        compare_runs(run(0), other)
    with pytest.raises(ValueError, match="margin=2"):
        compare_runs(run(0), run(1), margin=2)


@pytest.fixture
def files(tmp_path):
    def write(name: str, content) -> str:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


def test_the_command_fails_where_ours_became_slower(files):
    first, same, slow = (
        files("a.json", run(0)),
        files("b.json", run(1)),
        files("c.json", run(2, slowdown=1.2)),
    )
    invoke = CliRunner().invoke
    assert invoke(app, ["compare", first, same]).exit_code == 0
    result = invoke(app, ["compare", first, slow])
    assert result.exit_code == 1
    assert "slower" in result.stdout
    assert invoke(app, ["compare", first, slow, "--fail-under", "0.5"]).exit_code == 0
    assert invoke(app, ["compare", first, same, "--fail-under", "1.5"]).exit_code == 1


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        ("{ no json", "is no JSON"),
        ({"schema": "fastnets-verify/1"}, "is not a fastnets-bench file"),
        (
            {"schema": "fastnets-bench", "schema_version": 0},
            "has schema version 0, and this fastnets reads 1",
        ),
    ],
)
def test_files_that_cannot_be_compared(files, content, fact):
    result = CliRunner().invoke(app, ["compare", files("a.json", content), files("b.json", run(0))])
    assert result.exit_code == 2
    assert fact in result.stderr
    result = CliRunner().invoke(app, ["compare", "/nowhere/a.json", files("b.json", run(0))])
    assert result.exit_code == 2
    assert "cannot be read" in result.stderr
