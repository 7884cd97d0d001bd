"""``python -m fastnets.verify``: what it judges, writes and refuses."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from fastnets.bench import verify
from fastnets.bench.operations import OPERATIONS, Call, Inputs
from fastnets.bench.verify import OpResult, Verification, verify_op


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_every_operation_runs_and_has_gradients(name):
    operation = OPERATIONS[name]
    call = operation.make(Inputs("meta", torch.bfloat16), 2)
    y = call.run("reference")
    assert y.dtype == torch.bfloat16
    assert call.compulsory_bytes > y.numel() * y.element_size()
    gradients = call.gradients("reference", torch.empty_like(y))
    learning = [call.tensors[p] for p in call.learns if call.tensors[p] is not None]
    assert [g.shape for g in gradients] == [t.shape for t in learning]


def test_a_right_op_passes_and_a_wrong_one_does_not():
    operation = OPERATIONS["bn + add + relu 2048 @7"]
    assert verify_op(operation, "auto", torch.float32, "cpu").passed

    def off_by_a_little(*tensors, backend, **options):
        y = operation.make(Inputs("cpu", torch.float32), 1).function(*tensors, backend=backend, **options)
        return y * (1 + 1e-4) if backend == "auto" else y

    def make(inputs, batch_size):
        return dataclasses.replace(operation.make(inputs, batch_size), function=off_by_a_little)

    wrong = verify_op(dataclasses.replace(operation, make=make), "auto", torch.float32, "cpu")
    assert not wrong.passed
    assert wrong.forward > 2
    assert wrong.gradients > 3


def test_an_op_that_raises_is_reported():
    def raises(*tensors, backend):
        raise RuntimeError("no such kernel\nand more")

    operation = dataclasses.replace(
        OPERATIONS["cross-entropy 1000"], make=lambda inputs, N: Call(raises, (inputs.normal(2),))
    )
    result = verify_op(operation, "auto", torch.float32, "cpu")
    assert not result.passed
    assert result.error == "RuntimeError: no such kernel"


def test_the_verdict_needs_everything_to_be_right():
    right = OpResult("a", "float32", "auto", 1.0, 2.9)
    assert Verification({}, ops=[right]).passed
    assert not Verification({}, ops=[right, OpResult("b", "float32", "auto", 2.1)]).passed
    assert not Verification({}, ops=[right, OpResult("b", "float32", "auto", 1.0, 3.1)]).passed
    assert not Verification({}, ops=[right, OpResult("b", "float32", "auto", float("nan"))]).passed
    assert not Verification({}, disagreements=["m: call: ..."]).passed


def application():
    import typer

    app = typer.Typer()
    app.command()(verify.command)
    return app


def test_the_report_on_the_cpu_says_what_was_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "OPERATIONS", {"one": OPERATIONS["global average pool 2048 @7"]})
    monkeypatch.setattr(verify, "NETWORKS", ("lenet5", "lenet5"))
    file = tmp_path / "report.json"
    result = CliRunner().invoke(application(), ["--device", "cpu", "--no-bench", "-o", str(file)])
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    assert report["schema"] == verify.SCHEMA
    assert report["passed"] is True
    assert {r["name"] for r in report["ops"]} == {"global average pool 2048 @7"}
    assert any("CUDA" in line for line in report["left_out"])
    assert "left out" in result.output


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    result = CliRunner().invoke(
        application(), ["--device", "cpu", "-o", str(tmp_path / "no" / "report.json")]
    )
    assert result.exit_code == 2
    assert "cannot be written" in result.output
