"""Counts small enough to be done by hand, and the totals of whole networks."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastnets.bench.counter import Moved
from fastnets.bench.traffic import Comparison, Traffic, compare, count, main
from fastnets.fused import conv as fused_conv
from fastnets.fused import dispatch
from fastnets.fused.optimize import optimize
from fastnets.models import create_model

FLOAT = 4
DEVICES = ["cpu", "meta"]


def counted(function, *inputs, **options) -> tuple[int, int, int]:
    """(elements read, elements written, launches) of float32 work."""
    traffic = count(function, *inputs, **options)
    return traffic.bytes_read / FLOAT, traffic.bytes_written / FLOAT, traffic.launches


def on_meta(name: str, **options) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **options)


def images(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


class TestOneOp:
    """One rule: each argument is read once, each result written once."""

    def test_pointwise(self):
        a, b = torch.ones(3, 5), torch.ones(3, 5)
        assert counted(torch.add, a, b) == (30, 15, 1)
        assert counted(lambda: a * 2) == (15, 15, 1)
        assert counted(lambda: a.sigmoid()) == (15, 15, 1)

    def test_broadcast_operand_counts_its_own_size(self):
        assert counted(torch.add, torch.ones(4, 6), torch.ones(6)) == (30, 24, 1)
        assert counted(torch.add, torch.ones(4, 6), torch.ones(6).expand(4, 6)) == (30, 24, 1)

    def test_in_place(self):
        a, b = torch.ones(7), torch.ones(7)
        assert counted(lambda: a.add_(b)) == (14, 7, 1)
        assert counted(lambda: a.relu_()) == (7, 7, 1)
        assert counted(lambda: a.copy_(b)) == (7, 7, 1)
        assert counted(lambda: a.zero_()) == (0, 7, 1)
        assert counted(lambda: a.fill_(3)) == (0, 7, 1)
        assert counted(lambda: torch.add(a, b, out=a)) == (14, 7, 1)

    def test_matrix_product(self):
        a, b, bias = torch.ones(3, 4), torch.ones(4, 5), torch.ones(5)
        assert counted(torch.mm, a, b) == (32, 15, 1)
        traffic = count(F.linear, a, b.t().contiguous(), bias)
        assert (traffic.bytes_read, traffic.bytes_written, traffic.flops) == (37 * FLOAT, 15 * FLOAT, 2 * 60)

    def test_reduction(self):
        assert counted(lambda: torch.ones(0)) == (0, 0, 0)
        x = torch.ones(2, 3, 4, 4)
        assert counted(F.adaptive_avg_pool2d, x, 1) == (96, 6, 1)
        assert counted(torch.sum, x) == (96, 1, 1)

    def test_lists_of_tensors(self):
        a, b = torch.ones(2, 3), torch.ones(2, 5)
        assert counted(lambda: torch.cat([a, b], 1)) == (16, 16, 1)
        assert counted(lambda: torch._foreach_add_([a, b], [a, b])) == (32, 16, 1)
        assert counted(lambda: a.split(1, 1)) == (0, 0, 0)

    def test_dtypes(self):
        x = torch.ones(10, dtype=torch.bfloat16)
        traffic = count(lambda: x.float())
        assert (traffic.bytes_read, traffic.bytes_written) == (20, 40)

    @pytest.mark.parametrize(
        "view",
        [
            lambda x: x.view(6, 4),
            lambda x: x.t(),
            lambda x: x[1:, ::2],
            lambda x: x.reshape(24),
            lambda x: x.unsqueeze(0).expand(5, 4, 6),
            lambda x: x.contiguous(),
            lambda x: x.detach().flatten(),
            lambda x: x.to(torch.float32),
            lambda x: torch.empty_like(x),
            lambda x: x.new_empty(5),
            lambda x: x[:0] + 1,
            lambda x: x.chunk(2),
            lambda x: x.detach().unsqueeze_(0),
        ],
    )
    @pytest.mark.parametrize("device", DEVICES)
    def test_views_and_empty_work_are_free(self, view, device):
        traffic = count(view, torch.empty(4, 6, device=device))
        assert traffic.total == Moved()
        assert traffic.records == []

    def test_copies_are_not_views(self):
        x = torch.ones(4, 6)
        assert counted(lambda: x.t().contiguous()) == (24, 24, 1)
        assert counted(lambda: x.t().reshape(24)) == (24, 24, 1)
        y = torch.ones(2, 3, 4, 4)
        assert counted(lambda: y.contiguous(memory_format=torch.channels_last)) == (96, 96, 1)

    def test_gathers_touch_what_they_take(self):
        table, index = torch.ones(1000, 8), torch.tensor([3, 5])
        traffic = count(F.embedding, index, table)
        assert (traffic.bytes_read, traffic.bytes_written) == (2 * 8 * FLOAT + 16, 2 * 8 * FLOAT)
        traffic = count(lambda: table[index])
        assert (traffic.bytes_read, traffic.bytes_written) == (2 * 8 * FLOAT + 16, 2 * 8 * FLOAT)
        traffic = count(lambda: table.index_add_(0, index, torch.ones(2, 8)))
        assert traffic.by_op["aten.index_add_"].bytes_written == 2 * 8 * FLOAT

    def test_max_pool_writes_its_indices(self):
        traffic = count(F.max_pool2d, torch.ones(1, 2, 4, 4), 2)
        assert (traffic.bytes_read, traffic.bytes_written) == (32 * FLOAT, 8 * FLOAT + 8 * 8)

    def test_inference_mode_counts_the_same(self):
        layer, x = (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval(),
            torch.ones(1, 3, 8, 8),
        )
        expected = count(layer, x)
        with torch.inference_mode():
            assert count(lambda: layer(x)).total == expected.total


class TestConvBNReLU:
    """Stock conv → BN → ReLU, small enough to write out."""

    N, C, H, K = 2, 3, 8, 4

    def network(self, device, inplace=True):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(self.C, self.K, 3, padding=1), nn.BatchNorm2d(self.K), nn.ReLU(inplace)
        )
        return network.to(device), torch.ones(self.N, self.C, self.H, self.H, device=device)

    @property
    def x(self):
        return self.N * self.C * self.H * self.H

    @property
    def y(self):
        return self.N * self.K * self.H * self.H

    @property
    def w(self):
        return self.K * self.C * 9

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("inplace", [True, False])
    def test_inference(self, device, inplace):
        network, x = self.network(device, inplace)
        traffic = count(network, x)
        assert traffic.bytes_read == FLOAT * (self.x + self.w + self.K + self.y + 4 * self.K + self.y)
        assert traffic.bytes_written == FLOAT * 3 * self.y
        assert traffic.launches == 3
        assert traffic.flops == 2 * self.y * self.C * 9
        assert traffic.saved_bytes == 0
        assert [record.layer for record in traffic.records] == ["0", "1", "2"]

    @pytest.mark.parametrize("device", DEVICES)
    def test_training(self, device):
        network, x = self.network(device)
        traffic = count(network, x, training=True)
        x, y, w, k = self.x, self.y, self.w, self.K
        conv, bn, relu = (traffic.by_layer[layer] for layer in "012")
        # Forward; then wgrad (dY, x) and the bias gradient (dY): the image needs no gradient.
        assert conv.bytes_read == FLOAT * ((x + w + k) + (y + x) + y)
        assert conv.bytes_written == FLOAT * (y + w + k)
        assert conv.launches == 3
        assert conv.flops == 2 * 2 * y * self.C * 9
        # Statistics, then normalise; the count of batches (int64) goes up by one. Backward: sums, then dx.
        forward = (y + 2 * k) + (y + 2 * k)
        backward = 2 * (2 * y + 2 * k) + k
        assert bn.bytes_read == FLOAT * (forward + backward) + 8
        assert bn.bytes_written == FLOAT * ((y + 2 * k + 2 * k) + (y + 2 * k)) + 8
        assert bn.launches == 5
        # The gradient that arrives is one expanded number.
        assert relu.bytes_read == FLOAT * (y + 1 + y)
        assert relu.bytes_written == FLOAT * (y + y)
        assert traffic.flops == conv.flops
        # Kept: the image, conv's result, BN's mean and rstd, ReLU's result.
        assert traffic.saved_bytes == FLOAT * (x + y + 2 * k + y)
        assert traffic.total == conv + bn + relu

    def test_gradient_of_the_input_is_a_third_pass(self):
        conv, x = nn.Conv2d(3, 4, 3, bias=False), torch.ones(1, 3, 5, 5, requires_grad=True)
        y, w = 4 * 9, 4 * 27
        traffic = count(conv, x, training=True)
        backward = traffic.by_op["aten.convolution_backward"]
        assert backward.bytes_read == FLOAT * ((1 + w) + (1 + 75))  # dY is one expanded number here
        assert backward.bytes_written == FLOAT * (75 + w)
        assert backward.launches == 2
        assert backward.flops == 2 * 2 * y * 27

    def test_batch_norm_in_eval_is_one_pass_backward(self):
        bn, x = nn.BatchNorm2d(2).eval(), torch.ones(3, 2, 4, 4, requires_grad=True)
        traffic = count(lambda: bn(x).backward(torch.ones(3, 2, 4, 4)), model=bn)
        backward = traffic.by_op["aten.native_batch_norm_backward"]
        assert backward.launches == 1
        assert backward.bytes_written == FLOAT * (96 + 2 + 2)

    def test_state_is_put_back(self):
        network, x = self.network("cpu")
        network[0].weight.grad = torch.ones_like(network[0].weight)
        network[1].eval()
        before = {key: value.clone() for key, value in network.state_dict().items()}
        modes = [module.training for module in network.modules()]
        count(network, torch.randn_like(x), training=True)
        assert modes == [module.training for module in network.modules()]
        assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
        assert (network[0].weight.grad == 1).all()
        assert network[0].bias.grad is None
        count(network, x)
        assert modes == [module.training for module in network.modules()]

    def test_after_an_error_modules_are_called_as_before(self):
        call = nn.Module.__call__
        with pytest.raises(RuntimeError):
            count(nn.Linear(3, 4), torch.ones(2, 5))
        assert nn.Module.__call__ is call
        assert torch.backends.mha.get_fastpath_enabled()

    def test_training_is_for_modules(self):
        with pytest.raises(ValueError, match="training=True is for modules"):
            count(lambda: None, training=True)


class TestWholeStep:
    def test_loss_and_optimizer_are_counted(self):
        model, x, target = nn.Linear(6, 3), torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)

        def step():
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(x), target).backward()
            optimizer.step()

        step()  # makes the momentum buffers
        before = model.weight.detach().clone()
        traffic = count(step, model=model)
        assert not torch.equal(before, model.weight)
        ops = traffic.by_op
        assert ops["aten._log_softmax"].bytes_read == 15 * FLOAT
        assert ops["aten.nll_loss_forward"].launches == 1
        # Momentum: mul_ and add_ on both buffers; the update: add_ on both parameters.
        assert ops["aten.mul_"].bytes_written == 21 * FLOAT
        assert ops["aten.add_"].bytes_written == 2 * 21 * FLOAT
        assert traffic.by_layer[""].launches >= 6

    def test_backward_belongs_to_the_layer_that_recorded_it(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = nn.Conv2d(3, 3, 3, padding=1)
                self.body = nn.ModuleDict({"act": nn.SiLU(), "second": nn.Conv2d(3, 3, 1)})

            def forward(self, x):
                x = self.first(x)
                return self.body["second"](self.body["act"](x)) + x

        traffic = count(Twice(), torch.ones(2, 3, 4, 4), training=True)
        by_layer = {}
        for record in traffic.records:
            by_layer.setdefault(record.layer, []).append((record.op, record.in_backward))
        assert by_layer["first"] == [("aten.convolution", False), ("aten.convolution_backward", True)]
        assert by_layer["body.second"] == [("aten.convolution", False), ("aten.convolution_backward", True)]
        # The two gradients of the fork are summed after the second of them was made.
        assert by_layer["body.act"] == [
            ("aten.silu", False),
            ("aten.silu_backward", True),
            ("aten.add", True),
        ]
        assert ("aten.add", False) in by_layer[""]

    def test_saved_memory_counts_once(self):
        x = torch.randn(8, requires_grad=True)

        def run():
            y = x.exp()  # saves its result
            return (y * y).sum(), y.view(2, 4).sin()  # saves y, twice, and a view of y

        assert count(run).saved_bytes == 8 * FLOAT

    def test_parameters_are_not_saved_for_backward(self):
        model, x = nn.Linear(16, 4), torch.randn(2, 16)
        assert count(model, x, training=True).saved_bytes == 2 * 16 * FLOAT


class TestAttention:
    B, HEADS, L, D = 2, 4, 16, 32

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("masked", [False, True])
    def test_inference_is_one_op(self, device, masked):
        q, k, v = torch.randn(3, self.B, self.HEADS, self.L, self.D, device=device)
        mask = torch.zeros(self.L, self.L, device=device) if masked else None
        with torch.no_grad():
            traffic = count(F.scaled_dot_product_attention, q, k, v, attn_mask=mask)
        assert list(traffic.by_op) == ["scaled_dot_product_attention"]
        assert traffic.bytes_read == FLOAT * (3 * q.numel() + masked * self.L**2)
        assert traffic.bytes_written == FLOAT * q.numel()
        assert traffic.flops == 2 * 2 * self.B * self.HEADS * self.L**2 * self.D

    def test_grouped_queries(self):
        q, (k, v) = torch.randn(2, 8, 16, 32), torch.randn(2, 2, 2, 16, 32)
        with torch.no_grad():
            traffic = count(F.scaled_dot_product_attention, q, k, v, enable_gqa=True, is_causal=True)
        assert traffic.bytes == FLOAT * (2 * q.numel() + 2 * k.numel())
        assert traffic.flops == 2 * 2 * 2 * 8 * 16 * 16 * 32

    def test_masked_training_on_shapes_alone(self):
        q, k, v = torch.empty(3, 2, 4, 16, 32, device="meta", requires_grad=True)
        mask = torch.empty(16, 16, device="meta", dtype=torch.bool)
        traffic = count(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward())
        assert [op for op in traffic.by_op if "attention" in op] == [
            "aten._scaled_dot_product_efficient_attention_backward",
            "aten._scaled_dot_product_efficient_attention",
        ]
        assert traffic.by_op["aten._scaled_dot_product_efficient_attention"].bytes_read == FLOAT * (
            3 * q.numel() + 256
        )

    @pytest.mark.parametrize("device", DEVICES)
    def test_training_is_one_op_each_way(self, device):
        q, k, v = (
            torch.randn(self.B, self.HEADS, self.L, self.D, device=device, requires_grad=True)
            for _ in range(3)
        )
        grad = torch.empty(self.B, self.HEADS, self.L, self.D, device=device)
        traffic = count(lambda: F.scaled_dot_product_attention(q, k, v).backward(grad))
        forward, backward = (
            [
                record.moved
                for record in traffic.records
                if "attention" in record.op and record.in_backward == way
            ]
            for way in (False, True)
        )
        assert len(forward) == len(backward) == 1
        (backward,) = backward
        # What else there may be: the gradients copied into the layout of their leaves.
        assert all("attention" in op or op in ("aten.clone", "aten.copy_") for op in traffic.by_op)
        size = q.numel()
        # dO and O for the row sums; then dO, Q, K, V and the log-sum-exp of each row.
        rows = self.B * self.HEADS * self.L
        assert backward.bytes_read - FLOAT * 6 * size in (
            FLOAT * rows,
            FLOAT * 2 * rows,
        )  # padded rows on meta
        assert backward.bytes_written == FLOAT * 3 * size

    @pytest.mark.parametrize("device", DEVICES)
    def test_transformer_layer_runs_its_slow_path(self, device):
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, device=device)
        traffic = count(layer, torch.empty(2, 8, 32, device=device).zero_())
        assert traffic.by_op["scaled_dot_product_attention"].launches == 1
        assert traffic.by_op["aten.native_layer_norm"].launches == 2
        assert traffic.by_layer["linear1"].flops == 2 * 16 * 32 * 64


class FusedPair(nn.Module):
    """conv → BN → ReLU, then conv → BN → add → ReLU, by the calls that rewritten networks make."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()

    def forward(self, x):
        call = fused_conv.call_conv_bn_act
        y = call(self.conv1, self.bn1, self.relu, x, activation="relu")
        return call(self.conv2, self.bn2, self.relu, y, residual=y, activation="relu")


class TestFusedOps:
    X, Y, W1, W2, K = 2 * 8 * 64, 2 * 16 * 64, 16 * 8 * 9, 16 * 16 * 9, 16
    FLOPS = 2 * Y * 9 * (8 + 16)

    def pair(self, device):
        return FusedPair().to(device).eval(), torch.ones(2, 8, 8, 8, device=device)

    def test_triton_kernels_are_counted_and_not_launched(self):
        with dispatch.backend("triton"):
            traffic = count(*self.pair("meta"))
        assert traffic.launches == 2
        assert all(op.startswith("triton.") for op in traffic.by_op)
        assert traffic.bytes_read == FLOAT * (self.X + self.W1 + self.Y + self.W2 + self.Y + 8 * self.K)
        assert traffic.bytes_written == FLOAT * 2 * self.Y
        assert traffic.flops == self.FLOPS
        assert [(record.layer, record.moved.launches) for record in traffic.records] == [
            ("conv1", 1),
            ("conv2", 1),
        ]

    def test_kernels_that_run_are_counted_like_those_that_are_only_reported(self, lane):
        model, x = self.pair("meta")
        with dispatch.backend("triton"):
            reported = count(lambda: model(x), model=model)
            model, x = self.pair("cpu")
            model, x = model.to(lane.device), lane.put(x)
            with lane, torch.no_grad():
                run = count(lambda: model(x), model=model)
        assert {(r.layer, r.moved.bytes, r.moved.flops) for r in run.records} == {
            (r.layer, r.moved.bytes, r.moved.flops) for r in reported.records
        }

    def test_vendor_convolution_with_our_epilogue(self):
        with dispatch.assume_device_type("cuda"):
            traffic = count(*self.pair("meta"))
        ops = traffic.by_op
        assert ops["aten.convolution"].bytes == FLOAT * (self.X + self.W1 + self.W2 + 3 * self.Y)
        assert ops["triton.bn_add_act_kernel"].bytes == FLOAT * (2 * self.Y + 3 * self.Y + 8 * self.K)
        assert ops["aten.clone"].launches == 1  # the image becomes channels-last; what follows stays so
        assert traffic.launches == 5
        assert traffic.flops == self.FLOPS

    @pytest.mark.parametrize("device", DEVICES)
    def test_onednn_without_the_making_of_its_weights(self, device):
        if not torch.backends.mkldnn.is_available():
            pytest.skip("this PyTorch has no oneDNN")
        with dispatch.backend("library"):
            traffic = count(*self.pair(device))
        ops = traffic.by_op
        assert ops["mkldnn._convolution_pointwise"].launches == 2
        folded = 2 * self.K  # biases
        moved = self.X + self.W1 + self.W2 + folded + 4 * self.Y
        assert ops["mkldnn._convolution_pointwise"].bytes == FLOAT * moved
        assert traffic.launches == 3  # and the image's layout
        assert traffic.flops == self.FLOPS

    def test_the_assumed_device_decides_for_meta_tensors(self):
        model, x = self.pair("meta")
        for device, op in (
            ("cuda", "aten.cudnn_convolution_relu"),
            ("cpu", "mkldnn._convolution_pointwise"),
        ) * 2:
            with dispatch.backend("library"), dispatch.assume_device_type(device):
                traffic = count(model, x)
            assert op in traffic.by_op
            assert traffic.launches == 3  # two convolutions, and the image's layout
            assert traffic.flops == self.FLOPS

    @pytest.mark.parametrize("device", DEVICES)
    def test_reference_is_opened_up(self, device):
        with dispatch.backend("reference"):
            traffic = count(*self.pair(device))
        assert traffic.by_op["aten.convolution"].launches == 2
        assert traffic.flops == self.FLOPS
        assert set(traffic.by_layer) == {"conv1", "conv2"}

    def test_counting_changes_no_result(self):
        model, _ = self.pair("cpu")
        x = torch.randn(2, 8, 8, 8)
        results = []
        with torch.no_grad():
            expected = model(x)
            count(lambda: results.append(model(x)))
        assert torch.equal(results[0], expected)


# name: launches, and MiB of activations per image (float32, batch 32, 224×224) as counted by another program
# that leaves out weights and the indices of max pooling.
EAGER = {
    "resnet18": (68, 66.90),
    "resnet50": (174, 308.57),
    "resnext50_32x4d": (174, 383.79),
    "mobilenet_v2": (151, 151.55),
}
LAUNCHES = {
    **{name: launches for name, (launches, _) in EAGER.items()},
    "alexnet_2012": 32,
    "vgg16_bn": 50,
    "densenet121": 426,
    "efficientnet_b0": 238,
    "googlenet_2014": 152,
    "convnext_tiny": 137,
}


class TestNetworks:
    @pytest.mark.parametrize("name", EAGER)
    def test_eager_totals(self, name):
        launches, mebibytes = EAGER[name]
        model = on_meta(name)
        traffic = count(model, images(32, 3, 224, 224))
        assert traffic.launches == launches
        state = {key: v for key, v in model.state_dict().items() if not key.endswith("num_batches_tracked")}
        weights = sum(v.nbytes for v in state.values())
        indices = 32 * 64 * 56 * 56 * 8 if "resn" in name else 0
        assert (traffic.bytes - weights - indices) / 32 / 2**20 == pytest.approx(mebibytes, abs=0.01)

    def test_flops_are_twice_the_multiply_adds(self):
        assert count(on_meta("resnet50"), images(1, 3, 224, 224)).flops / 2e9 == pytest.approx(
            4.089, abs=1e-3
        )
        assert count(on_meta("mobilenet_v2"), images(1, 3, 224, 224)).flops / 2e9 == pytest.approx(
            0.3008, abs=1e-3
        )

    def test_meta_counts_what_a_real_run_counts(self):
        model, x = create_model("mobilenet_v2", width_mult=0.35, num_classes=4), torch.randn(2, 3, 32, 32)
        real = count(model, x)
        shapes = count(model.to("meta"), x.to("meta"))
        assert real.total == shapes.total
        assert list(real.by_layer.items()) == list(shapes.by_layer.items())

    def test_training_saves_and_moves_more(self):
        model, x = on_meta("resnet18"), images(4, 3, 64, 64)
        inference, training = count(model, x), count(model, x, training=True)
        assert training.flops == pytest.approx(3 * inference.flops, rel=0.1)
        assert training.bytes > 2.5 * inference.bytes
        # conv inputs and BN inputs; in-place ReLU's result is the next conv's input
        assert 0 < training.saved_bytes < inference.bytes
        assert set(training.by_layer) == set(inference.by_layer)

    @pytest.mark.parametrize(
        "name, backend, share, launches",
        [
            ("alexnet_2012", "triton", 0.286, 13),
            ("vgg16_bn", "triton", 0.246, 19),
            ("resnet50", "triton", 0.320, 53),
            ("densenet121", "triton", 0.260, 222),
            ("mobilenet_v2", "triton", 0.349, 55),
            ("efficientnet_b0", "triton", 0.353, 87),
            ("googlenet_2014", "triton", 0.352, 80),
            ("convnext_tiny", "triton", 0.515, 66),
            ("resnet50", "auto", 0.354, 68),
            ("mobilenet_v2", "auto", 0.349, 54),
            *(
                pytest.param(*row, marks=pytest.mark.slow)
                for row in (
                    ("alexnet_2012", "auto", 0.295, 13),
                    ("vgg16_bn", "auto", 0.604, 35),
                    ("densenet121", "auto", 0.259, 205),
                    ("efficientnet_b0", "auto", 0.353, 86),
                    ("googlenet_2014", "auto", 0.461, 113),
                    ("convnext_tiny", "auto", 0.862, 101),
                )
            ),
        ],
    )
    def test_fused_shares(self, name, backend, share, launches):
        """What ``python -m fastnets.bench.traffic NAME -b 32 --gpu a100`` counts, as bounds."""
        from fastnets.fused.optimize import optimize
        from fastnets.kernels.device import assume_device

        stock, size = on_meta(name), 227 if name == "alexnet_2012" else 224
        with dispatch.assume_device_type("cuda"), assume_device("a100"), dispatch.backend(backend):
            found = compare(stock, optimize(stock), images(32, 3, size, size))
        assert found.stock.launches == LAUNCHES[name]
        assert found.fast.launches <= launches
        assert found.ratio <= share
        assert found.fast.flops == found.stock.flops
        if name != "efficientnet_b0":  # whose gates are made by the convolution behind them
            # A ResNet's shortcuts are computed by the last convolutions of their blocks, and the convolutions
            # that GoogLeNet concatenates by one call.
            depth = {"resnet50": 2, "googlenet_2014": 1}.get(name, 0)
            for layer, before, after in found.rows(depth=depth):
                assert after.flops == before.flops, layer  # each convolution's work stays with its name

    def test_backward_of_every_layer_is_found(self):
        torchvision = pytest.importorskip("torchvision", reason="its ViT reshapes a lot")
        with torch.device("meta"):
            model = torchvision.models.VisionTransformer(32, 8, 2, 2, 64, 128)
        traffic = count(model, images(2, 3, 32, 32), training=True)
        outside = [record.op for record in traffic.records if record.layer == ""]
        # The class token is concatenated, and the first token taken, by the network itself.
        assert sorted(outside) == ["aten.cat", "aten.select_backward", "aten.sum"]
        assert traffic.by_op["aten._scaled_dot_product_efficient_attention"].launches == 2


class TestTable:
    def comparison(self) -> Comparison:
        stock, fast = (
            nn.Sequential(nn.Conv2d(3, 4, 1), act, nn.Flatten()) for act in (nn.ReLU(), nn.Identity())
        )
        return compare(stock, fast, images(1, 3, 8, 8), title="a title")

    def test_rows_and_ratio(self):
        found = self.comparison()
        (conv, relu) = found.rows()
        assert conv[0] == "0"
        assert conv[1] == conv[2]
        assert relu == ("1", Moved(4 * 64 * FLOAT, 4 * 64 * FLOAT, 0, 1, 1), Moved())
        assert found.ratio == found.fast.bytes / found.stock.bytes < 1

    def test_printed(self):
        text = str(self.comparison())
        assert "a title" in text
        total = next(line for line in text.splitlines() if "total" in line)
        assert f"{self.comparison().ratio:.3f}" in total
        assert text.index("total") > text.index("layer")

    def test_depth_groups_layers(self):
        traffic = count(on_meta("resnet18"), images(1, 3, 32, 32))
        assert list(traffic.grouped(1)) == [
            *("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc")
        ]
        assert sum(traffic.grouped(2).values(), Moved()) == traffic.total

    def test_traffic_prints_its_totals(self):
        traffic = count(torch.add, torch.ones(2**18), torch.ones(2**18))
        assert str(traffic) == "3.0 MiB (2.0 read, 1.0 written), 1 launches, 0.00 GFLOP"
        assert str(Traffic()) == "0.0 MiB (0.0 read, 0.0 written), 0 launches, 0.00 GFLOP"


class TestCommand:
    def test_prints_and_writes(self, capsys, tmp_path, monkeypatch):
        monkeypatch.setenv("COLUMNS", "140")
        path = tmp_path / "traffic.json"
        arguments = ["lenet5_relu", "-b", "4", "--backend", "triton", "--gpu", "h100", "--json", str(path)]
        assert main(arguments) == 0
        assert "lenet5_relu, inference, 4×1×28×28, float32, cuda, backend triton" in _joined(capsys)
        (found,) = json.loads(path.read_text())
        assert found["stock"]["launches"] > found["fused"]["launches"] > 0
        assert math.isclose(found["ratio"], found["fused"]["bytes"] / found["stock"]["bytes"])
        assert sum(layer["fused"]["bytes"] for layer in found["layers"]) == found["fused"]["bytes"]

    def test_training_on_this_cpu(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "140")
        assert main(["lenet5", "-b", "2", "--device", "cpu", "--training", "--depth", "0"]) == 0
        assert "│ saved │" in _joined(capsys)

    @pytest.mark.parametrize(
        "name, message", [("resnet51", "resnet50"), ("nowhere:resnet18", "not a source")]
    )
    def test_unknown_name(self, capsys, name, message):
        with pytest.raises(SystemExit) as caught:
            main([name])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


def _joined(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_a_vision_transformer_moves_little_more_than_half():
    """Two blocks of torchvision's ViT; ``python -m fastnets.bench.traffic torchvision:vit_b_16 -b 32
    --backend triton`` counts the whole one."""
    vision = pytest.importorskip("torchvision.models.vision_transformer")
    stock = vision.VisionTransformer(64, 16, 2, 4, 256, 1024, num_classes=10).eval().to("meta")
    images = torch.empty(32, 3, 64, 64, device="meta")
    with dispatch.assume_device_type("cuda"), dispatch.backend("triton"):
        counted = compare(stock, optimize(stock), images)
    assert counted.fast.flops == counted.stock.flops
    activations = 32 * 17 * 256 * 4  # bytes of one [N, tokens, width]
    per_block = 26 * activations + 12 * 256 * 256 * 4
    rest = counted.fast.bytes - 2 * per_block  # the image, its embedding, the last norm
    assert 0 < rest < 13 * activations, "a block moves more than its norms, projections and attention must"
    assert counted.ratio < 0.6
