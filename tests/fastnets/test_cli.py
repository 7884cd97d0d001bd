"""The command line as a user meets it: output, exit codes, and one clear line for each bad request."""

import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from fastnets.cli import app


def run(*words: str, expect: int = 0):
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == expect, result.output + repr(result.exception)
    return result


def test_list_prints_one_name_a_line():
    assert run("list", "vgg1?").stdout.splitlines() == ["vgg11", "vgg13", "vgg16", "vgg19"]
    assert "mobilenet_v2" in run("list").stdout.splitlines()


def test_env_prints_what_a_figure_depends_on():
    text = run("env", "--device", "cpu").stdout
    assert torch.__version__ in text
    assert "allocator" in text
    facts = json.loads(run("env", "--device", "cpu", "--json").stdout)
    assert facts["device"] == "cpu"
    assert facts["threads"] == torch.get_num_threads()


def test_explain_shows_layers_and_implementations():
    text = run("explain", "mobilenet_v2", "--img-size", "64", "--device", "cpu").stdout
    assert "mobilenet_v2 on cpu, input 1×3×64×64" in text
    assert "features.0" in text
    assert "100" in text


def test_check_compares_with_float64():
    text = run("check", "mobilenet_v2", "--img-size", "64", "-b", "2", "--device", "cpu").stdout
    assert "mobilenet_v2 on cpu, weights: random (seed 0)" in text
    assert "error ratio" in text.lower()


def test_check_exits_with_1_when_the_answers_are_wrong(monkeypatch):
    import fastnets

    def spoil(model, **options):
        import copy

        wrong = copy.deepcopy(model)
        with torch.no_grad():
            next(wrong.parameters()).mul_(1.5)
        return wrong

    monkeypatch.setattr(fastnets, "optimize", spoil)
    run("check", "lenet5", "--device", "cpu", expect=1)


def test_bench_prints_a_table_and_writes_every_format(tmp_path):
    names = ["run.json", "run.csv", "run.md", "run.png"]
    outputs = [word for name in names for word in ("-o", str(tmp_path / name))]
    result = run(
        *("bench", "lenet5", "mobilenet_v2", "-b", "1", "--device", "cpu"),
        *("--threads", "1"),
        *("--variants", "eager,channels-last,folded,fastnets,fastnets-triton", "--rounds", "3", *outputs),
    )
    for name in names:
        assert (tmp_path / name).stat().st_size > 500
        assert f"{name}" in result.stdout
    content = json.loads((tmp_path / "run.json").read_text())
    assert [network["network"] for network in content["results"]] == ["lenet5", "mobilenet_v2"]
    assert content["environment"]["threads"] == 1
    for network in content["results"]:
        status = {row["variant"]: row["status"] for row in network["variants"]}
        assert status == {
            "eager": "measured",
            "channels-last": "measured",
            "folded": "unavailable" if network["network"] == "lenet5" else "measured",  # no batch norm in it
            "fastnets": "measured",
            "fastnets-triton": "unavailable",
        }
        for row in network["variants"]:
            if row["status"] == "measured":
                assert row["error_ratio"] <= 2
                assert len(row["samples"]["wall"]) == 3
    assert "mobilenet_v2, 1×3×224×224, float32" in result.stdout


def test_bench_does_not_time_a_wrong_variant(monkeypatch, tmp_path):
    import fastnets

    def spoil(model, **options):
        import copy

        wrong = copy.deepcopy(model)
        with torch.no_grad():
            next(wrong.parameters()).mul_(1.5)
        return wrong

    monkeypatch.setattr(fastnets, "optimize", spoil)
    path = tmp_path / "run.json"
    run(
        *("bench", "lenet5", "-b", "2", "--device", "cpu", "--variants", "eager,fastnets"),
        *("--rounds", "3", "-o", str(path)),
        expect=1,
    )
    (network,) = json.loads(path.read_text())["results"]
    by_name = {row["variant"]: row for row in network["variants"]}
    assert by_name["fastnets"]["status"] == "wrong"
    assert by_name["fastnets"]["error_ratio"] > 2
    assert "samples" not in by_name["fastnets"]
    assert by_name["eager"]["status"] == "measured"


def test_bench_names_its_variants():
    text = run("bench", "lenet5", "--variants", "help").stdout
    for name in ("eager", "channels-last", "folded", "compile", "fastnets", "fastnets-library"):
        assert name in text.split()


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (["explain", "resnet5"], ["unknown network 'resnet5'", "resnet50"]),
        (["check", "mobilenetv2"], ["mobilenet_v2"]),
        (["bench", "lenet5", "vgg99"], ["unknown network 'vgg99'"]),
        (["explain", "hub:resnet50"], ["'hub' is not a source", "torchvision:NAME"]),
        (["list", "zzz*"], ["no network matches 'zzz*'"]),
        (["explain", "lenet5", "--device", "gpu"], ["--device gpu", "cpu, cuda"]),
        (["explain", "lenet5", "--device", "mps"], ["--device mps"]),
        (["explain", "lenet5", "--backend", "tritn"], ["tritn", "triton"]),
        (["explain", "lenet5", "--weights", "/nowhere.pth"], ["/nowhere.pth"]),
        (["explain", "lenet5", "--weights", "a.pth", "--pretrained"], ["exclude each other"]),
        (["explain", "lenet5", "--pretrained"], ["--weights FILE"]),
        (["bench", "lenet5", "--variants", "eagr"], ["unknown variant 'eagr'", "eager"]),
        (["bench", "lenet5", "-o", "run.xlsx"], ["unknown format '.xlsx'"]),
        (["bench", "lenet5", "-o", "/nowhere/run.json"], ["the folder /nowhere does not exist"]),
        (["explain", "lenet5", "-b", "0"], ["batch-size"]),
        (["explain", "lenet5", "--dtype", "int8"], ["int8"]),
        (["explode", "lenet5"], ["explode"]),
        (["explain"], ["MODEL"]),
    ],
    ids=" ".join,
)
def test_bad_requests_are_one_clear_message(words, facts):
    result = run(*words, expect=2)
    for fact in facts:
        assert fact in result.output
    assert "Traceback" not in result.output


def test_a_foreign_checkpoint_is_refused(tmp_path):
    from torch import nn

    torch.save(nn.Linear(3, 4).state_dict(), tmp_path / "linear.pth")
    result = run("check", "lenet5", "--weights", str(tmp_path / "linear.pth"), expect=2)
    assert "linear.pth" in result.output
    assert "lenet5" in result.output


def test_a_truncated_checkpoint_is_refused(tmp_path):
    from fastnets.models import create_model

    path = tmp_path / "lenet5.pth"
    torch.save(create_model("lenet5").state_dict(), path)
    path.write_bytes(path.read_bytes()[:1000])
    assert "lenet5.pth" in run("check", "lenet5", "--weights", str(path), expect=2).output


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a CUDA device that is not there")
def test_a_missing_gpu_is_said():
    assert "no CUDA device" in run("explain", "lenet5", "--device", "cuda", expect=2).output


def test_unknown_network_as_a_process(tmp_path):
    """No traceback on the real standard error, nothing on standard output, exit code 2."""
    done = subprocess.run(
        [sys.executable, "-m", "fastnets", "bench", "resnet5"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("fastnets: unknown network 'resnet5': did you mean resnet50")
    assert len(done.stderr.splitlines()) == 1


def test_the_allocator_option_starts_the_command_again(tmp_path):
    path = tmp_path / "run.json"
    words = ["bench", "lenet5", "--device", "cpu", "-b", "2", "--variants", "eager", "--rounds", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "fastnets", *words, "--allocator", "keep-pages", "-o", str(path)],
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "THP_"))},
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(path.read_text())["environment"]
    assert facts["allocator"] == "keep-pages"
    assert facts["environment"]["MALLOC_MMAP_MAX_"] == "0"


def test_tune_keeps_exports_and_takes_choices(tmp_path, monkeypatch):
    from fastnets.fused import dispatch

    monkeypatch.setenv("FASTNETS_CACHE_DIR", str(tmp_path / "here"))
    dispatch.forget_measurements()
    exported = tmp_path / "choices.json"
    try:
        text = run("tune", "lenet5", "-b", "2", "--device", "cpu", "--export", str(exported)).stdout
        assert "distinct layers" in text
        assert "sure" in text
        count = len(json.loads(exported.read_text())["choices"])
        assert count >= 3
        monkeypatch.setenv("FASTNETS_CACHE_DIR", str(tmp_path / "there"))
        assert f"{count} choices added" in run("tune", "--import", str(exported)).stdout
    finally:
        dispatch.forget_measurements()


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (("tune", "lenet5", "--budget", "0"), "nothing can be measured in no time"),
        (("tune", "lenet55"), "did you mean lenet5"),
        (("tune",), "name networks to tune"),
        (("tune", "--import", "/nowhere.json"), "cannot be read"),
        (("tune", "lenet5", "--export", "/nowhere/choices.json"), "does not exist"),
        (("bench",), "name networks, or a suite"),
        (("bench", "--suite", "linage"), "did you mean 'lineage'"),
        (("bench", "lenet5", "-b", "many"), "give numbers"),
        (("bench", "lenet5", "--dtype", "float23"), "did you mean 'float32'"),
        (("bench", "lenet5", "--variants", "eager,fastnet"), "did you mean 'fastnets'"),
        (("bench", "lenet5", "-o", "/nowhere/run.html"), "does not exist"),
    ],
)
def test_requests_that_cannot_be_served(words, fact):
    assert fact in run(*words, expect=2).stderr
