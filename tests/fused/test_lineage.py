"""Every network of ``list_models`` through ``explain``: each operation is in a row, fused or told why not."""

import collections

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import fastnets
from fastnets.fused.activation import ACTIVATIONS
from fastnets.models import create_model, example_inputs, list_models

# One of each family; the others are slow.
FAST = """
    alexnet_2012 convnext_tiny efficientnet_lite0 eva02_b_14 googlenet_2014 lenet5 lenet5_1998 llama_small
    minilm_l6 mnasnet0_5 mobilenet_v1 mobilenet_v2 mobilenet_v3_small nin regnet_y_400mf resnet18
    resnet18_fpn resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_1 swin_t transformer transformer_encoder
    vgg11_bn vit_ti_16"""
# What is left stock, and why.
OWN = "has a forward of its own"
LEFT = {
    "lenet5_1998": {
        "s2": f"Subsampling {OWN}",
        "c3": f"SparseConv2d {OWN}",  # the sparse table of the paper
        "s4": f"Subsampling {OWN}",
    },
    "minilm_l6": dict.fromkeys(  # BERT's pooler: weights that sentence embeddings do not use
        ["pooler.dense", "pooler.act"], "its container does not call it as a layer"
    ),
}

_CALLS = {
    **dict.fromkeys([torch.conv2d, F.conv2d], "conv"),
    F.linear: "linear",
    F.batch_norm: "bn",
    **dict.fromkeys([F.layer_norm, F.rms_norm], "norm"),
    F.local_response_norm: "response norm",
    **dict.fromkeys([F.scaled_dot_product_attention, F.multi_head_attention_forward], "attention"),
    **dict.fromkeys([F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d], "pool"),
    **dict.fromkeys(
        [F.relu, F.relu6, F.hardtanh, F.silu, F.hardswish, F.hardsigmoid, F.gelu, F.sigmoid, torch.sigmoid,
         torch.relu, torch.tanh, torch.sigmoid_, torch.relu_], "activation"),
}  # fmt: skip


class _Calls(TorchFunctionMode):
    """Counts what stock does, by the functions that its layers call."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _CALLS:
            self.counts[_CALLS[func]] += 1
        return func(*args, **(kwargs or {}))


def counted(rows) -> collections.Counter:
    """The same operations, by the kinds of the report's rows."""
    found = collections.Counter()
    for row in rows:
        for part in row.kind.split("*")[0].split("+"):
            part = "activation" if part in ACTIVATIONS else part
            found["norm" if part in ("layer_norm", "rms_norm") else part] += 1
    return found


@pytest.mark.parametrize(
    "name", [n if n in FAST.split() else pytest.param(n, marks=pytest.mark.slow) for n in list_models()]
)
def test_every_operation_is_fused_or_told_why(name):
    with torch.device("meta"):
        model = create_model(name).eval()
    inputs = tuple(x.to("meta") for x in example_inputs(name))
    with _Calls() as stock, torch.no_grad():
        model(*inputs)
    report = fastnets.explain(fastnets.optimize(model, inplace=True), inputs)
    assert {row.path: row.reason for row in report.rows if not row.fused} == LEFT.get(name, {})
    found = counted(row for row in report.rows if row.path not in LEFT.get(name, {}))
    assert stock.counts["conv"] + stock.counts["linear"] > 3
    for what, calls in stock.counts.items():
        # Means over all pixels are pools, too. Of the network of 1998 one convolution is left.
        assert found[what] == calls or (what == "pool" and found[what] > calls) or name == "lenet5_1998", what
    assert report.coverage == 1
    if name != "minilm_l6":
        assert report.coverage_by["layers"] == 1
