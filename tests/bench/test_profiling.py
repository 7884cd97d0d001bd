"""``fastnets profile``: names of layers, shares, traces, and no trace of itself afterwards."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fastnets
from fastnets.bench.profiling import profile, tool_commands
from fastnets.cli import app


def network():
    return fastnets.create_model("resnet18", num_classes=10, fused=False).eval()


def test_fused_layers_and_stock_ones_have_their_paths_as_names():
    found = profile(fastnets.optimize(network()), torch.randn(1, 3, 64, 64), steps=2, warmup=1)
    layers = {share.name: share for share in found.layers}
    assert {"conv1", "layer1.0.conv1", "layer4.1.conv2", "fc"} <= layers.keys()
    assert layers["layer1.0.conv1"].calls == 1
    ops = {share.name: share for share in found.ops}
    assert ops["fastnets.conv_bn_act_inference"].calls == 20
    assert sum(s.host_ms for s in found.layers) == pytest.approx(sum(s.host_ms for s in found.ops))


def test_the_backward_belongs_to_the_layer_of_the_forward():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).train()
    found = profile(model, torch.randn(2, 3, 8, 8), steps=1, warmup=1)
    names = [share.name for share in found.layers]
    assert {"0", "0, backward", "3", "3, backward"} <= set(names)


def test_memory_rises_and_its_peak_names_a_layer():
    model = nn.Sequential(nn.Conv2d(3, 32, 3, bias=False), nn.Conv2d(32, 1, 3, bias=False)).eval()
    found = profile(model, torch.randn(4, 3, 64, 64), steps=1, warmup=1)
    assert max(size for _, size in found.memory) >= 4 * 4 * 32 * 62 * 62
    assert found.peaks[0][0] in ("0", "1")
    assert [t for t, _ in found.memory] == sorted(t for t, _ in found.memory)


def test_nothing_is_left_behind():
    call = nn.Module.__call__
    profile(network(), torch.randn(1, 3, 64, 64), steps=1, warmup=0)
    assert nn.Module.__call__ is call
    assert torch._C._len_torch_dispatch_stack() == 0


def test_the_environment_puts_every_op_in_a_range():
    program = (
        "import torch, fastnets.fused as fused\n"
        "with torch.profiler.profile() as found:\n"
        "    fused.bn_add_act(torch.ones(1, 2, 3, 3), activation='relu')\n"
        "print([e.key for e in found.key_averages() if e.key.startswith('fastnets.')])\n"
    )
    for value, names in (("1", "['fastnets.bn_add_act']"), ("0", "[]")):
        environment = {**os.environ, "FASTNETS_NVTX": value}
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
        assert run.stdout.strip() == names, run.stderr


def test_wrong_arguments():
    with pytest.raises(ValueError, match="at least one step"):
        profile(network(), torch.randn(1, 3, 64, 64), steps=0)
    with pytest.raises(ValueError, match="CUDA"):
        profile(network(), torch.randn(1, 3, 64, 64), nvtx=True)


def test_commands_for_nsight_run_the_same_thing():
    for line in tool_commands(["resnet50", "-b", "32", "--trace", "a file.json"]):
        assert "fastnets profile resnet50 -b 32 --trace 'a file.json' --nvtx" in line


def test_the_command_writes_what_it_was_asked_for(tmp_path):
    trace, memory = tmp_path / "trace.json", tmp_path / "memory.svg"
    arguments = ["profile", "lenet5", "-b", "2", "--device", "cpu", "--steps", "1"]
    result = CliRunner().invoke(app, [*arguments, "--trace", str(trace), "--memory", str(memory)])
    assert result.exit_code == 0, result.output
    assert any("fastnets|" in e.get("name", "") for e in json.loads(trace.read_text())["traceEvents"])
    assert "<svg" in memory.read_text()
    assert "by layer" in result.output
    assert "ncu" in result.output
    refused = CliRunner().invoke(app, [*arguments, "--trace", str(tmp_path / "no" / "trace.json")])
    assert refused.exit_code == 2
