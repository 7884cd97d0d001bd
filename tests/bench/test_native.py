"""Configs run natively: exercised here on the emulator, which the launches cannot tell from a GPU."""

import dataclasses

import pytest
import torch

from fastnets.bench import native, static
from fastnets.bench.native import disagreements, run_case
from fastnets.kernels import plane_mean


def small_case(capability):
    """The first case of the plane mean's, which is the cheapest to emulate."""
    return static.cases(["plane_mean"], (capability,))[0]


@pytest.mark.lanes("sm_80", "gpu")
def test_a_right_kernel_passes(lane):
    with lane:
        result = run_case(small_case(80), lane.device, repeats=2)
    assert (result.status, result.repeats) == ("passed", 2), result.note
    assert result.sample[0][1][0] > 0


@pytest.mark.lanes("sm_80", "gpu")
def test_bits_that_move_and_outputs_nobody_wrote_fail(lane, monkeypatch):
    stock = plane_mean.representative_calls
    runs = []

    def broken(spoil):
        def calls():
            def thunk(config, call):
                y = call.thunk(config)
                if not y.is_meta:
                    runs.append(y)
                    spoil(y, len(runs))
                return y

            return [dataclasses.replace(c, thunk=lambda config, c=c: thunk(config, c)) for c in stock()]

        return calls

    monkeypatch.setattr(plane_mean, "representative_calls", broken(lambda y, n: y.view(-1)[0].fill_(n)))
    with lane:
        result = run_case(small_case(80), lane.device, repeats=2)
    assert result.status == "failed"
    assert "other bits in repetition 2" in result.note
    monkeypatch.setattr(
        plane_mean, "representative_calls", broken(lambda y, n: y.view(-1)[0].fill_(torch.nan))
    )
    with lane:
        result = run_case(small_case(80), lane.device, repeats=2)
    assert result.status == "failed"
    assert "NaN" in result.note


def test_cases_that_are_too_large_are_skipped():
    result = run_case(small_case(80), "cpu", limit_bytes=10)
    assert result.status == "skipped"
    assert "GiB" in result.note


def test_configs_that_disagree_are_named():
    def result(config, value, shape=(4,)):
        values = [value * 2, value, value, value, value]
        return native.NativeResult("m", "call", config, "passed", sample=[(shape, values)], tolerance=1e-3)

    assert disagreements([result("a", 1.0), result("b", 1.001)]) == []
    assert disagreements([result("a", 1.0), result("b", 1.0, (8,))]) == []  # kept per tile
    (line,) = disagreements([result("a", 1.0), result("b", 1.1)])
    assert "b is" in line
    assert line.startswith("m: call")
