"""A norm at the head of the linear layer that reads it, as one op, and the call of rewritten networks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnets
from fastnets.bench.traffic import count
from fastnets.fused import dispatch, norm_linear
from fastnets.kernels.device import DEVICES, assume_device
from fastnets.kernels.launch import observe_launches
from tests.accuracy import assert_close_to
from tests.fused.networks import assert_same_answers, graphs, settled

EPS = 1e-5


def operands(K=48, N=40, rows=(2, 9), dtype=torch.float32):
    x, residual = torch.randn(*rows, K) + 2, torch.randn(*rows, N)
    vectors = {"norm_weight": torch.randn(K), "norm_bias": torch.randn(K), "bias": torch.randn(N)}
    tensors = {"x": x, "weight": torch.randn(N, K) / K**0.5, "residual": residual, **vectors}
    return {name: t.to(dtype) for name, t in tensors.items()}


def stock(tensors, norm="layer_norm", dtype=None):
    t = {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in tensors.items()}
    K = t["x"].shape[-1:]
    if norm == "rms_norm":
        x = F.rms_norm(t["x"], K, t["norm_weight"], EPS)
    else:
        x = F.layer_norm(t["x"], K, t["norm_weight"], t["norm_bias"], EPS)
    return F.gelu(F.linear(x, t["weight"], t["bias"])) + t["residual"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_as_accurate_as_stock(lane, norm, dtype):
    tensors = operands(dtype=dtype)
    if norm == "rms_norm":
        tensors = {**tensors, "norm_bias": None}
    given = {name: None if t is None else lane.put(t) for name, t in tensors.items()}
    with lane, torch.no_grad():
        y = norm_linear.norm_linear(**given, norm=norm, activation="gelu", backend="triton")
    tensors = {name: t for name, t in tensors.items() if t is not None}
    assert_close_to(stock(tensors, norm, torch.float64), stock(tensors, norm), y.cpu())


@pytest.mark.parametrize("backend", ["auto", "library", "reference"])
def test_other_backends_run_one_after_the_other(backend):
    tensors = operands()
    with torch.no_grad():
        y = norm_linear.norm_linear(**tensors, activation="gelu", backend=backend)
    assert_close_to(stock(tensors, dtype=torch.float64), stock(tensors), y)


def arguments(backend="auto"):
    t = operands(5, 3, (4,))
    names = ("x", "weight", "bias", None, "residual", "norm_weight", "norm_bias", None)
    tensors = [None if name is None else t[name] for name in names]
    return (*tensors, "layer_norm", EPS, "silu", 0.0, backend)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("name", ["norm_linear", "norm_linear_statistics"])
def test_ops_are_registered_as_pytorch_asks(name, learns):
    given = arguments()
    if learns:
        given[0].requires_grad_()
    op = getattr(torch.ops.fastnets, name if learns else f"{name}_inference").default
    if learns and name == "norm_linear_statistics":
        assert [t.requires_grad for t in op(*given)] == [True, False]
        return
    torch.library.opcheck(op, given)


def test_gradient_is_that_of_the_parts():
    tensors = {name: t.double().requires_grad_() for name, t in operands(4, 3, (5,)).items()}
    assert torch.autograd.gradcheck(
        lambda *t: norm_linear.norm_linear(**dict(zip(tensors, t)), activation="silu"),
        list(tensors.values()),
        fast_mode=True,
    )


def test_errors_name_the_argument():
    t = operands()
    with pytest.raises(ValueError, match=r"norm_weight is \(47,\)"):
        norm_linear.norm_linear(t["x"], t["weight"], norm_weight=torch.ones(47))
    with pytest.raises(ValueError, match="norm='batch_norm' is not one of"):
        norm_linear.norm_linear(t["x"], t["weight"], norm="batch_norm")
    with pytest.raises(ValueError, match="norm_weight is given"):
        norm_linear.norm_linear(t["x"], t["weight"], norm_weight=torch.ones(48), norm="none")


# --- in networks --------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two branches, each normalised before and added after."""

    def __init__(self, width=48, norm=nn.LayerNorm, scale=False):
        super().__init__()
        self.norm1, self.inner = norm(width), nn.Linear(width, 40)
        self.act, self.proj = nn.SiLU(), nn.Linear(40, width)
        self.norm2, self.fc1, self.gelu, self.fc2 = (
            norm(width),
            nn.Linear(width, 72),
            nn.GELU(),
            nn.Linear(72, width),
        )
        self.gamma = nn.Parameter(torch.full((width,), 0.5)) if scale else None

    def forward(self, x):
        y = self.proj(self.act(self.inner(self.norm1(x))))
        x = x + (y if self.gamma is None else y * self.gamma)
        return x + self.fc2(self.gelu(self.fc1(self.norm2(x))))


def network(**options):
    net = settled(nn.Sequential(Block(**options), Block(**options)))
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net.eval()


class AttentionBlock(nn.Module):
    """torchvision's block: attention of a norm's result, and a perceptron of another's, both added."""

    def __init__(self, width=48, **options):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 3, batch_first=True, **options)
        self.mlp = nn.Sequential(nn.Linear(width, 72), nn.GELU(), nn.Linear(72, width))

    def forward(self, x):
        y = self.norm1(x)
        y, _ = self.attention(y, y, y, need_weights=False)
        x = x + y
        return x + self.mlp(self.norm2(x))


ATTENDING = {
    "block": AttentionBlock,
    "block, bias_k": lambda: AttentionBlock(add_bias_kv=True),
    "prenorm layer": lambda: nn.TransformerEncoderLayer(48, 3, 72, batch_first=True, norm_first=True),
    "sequence first": lambda: nn.TransformerEncoderLayer(48, 3, 72, activation="gelu", norm_first=True),
}


def launched(run):
    launches = []
    with observe_launches(launches.append):
        run()
    return [one.name for one in launches]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm, scale", [(nn.LayerNorm, False), (nn.LayerNorm, True), (nn.RMSNorm, False)])
def test_block_is_as_accurate_as_stock(lane, norm, scale, dtype):
    net = network(norm=norm, scale=scale).to(dtype)
    fast = fastnets.optimize(net, backend="triton")
    x = (torch.randn(3, 11, 48) * 2 + 3).to(dtype)  # 33 rows: no multiple of a tile's
    with torch.no_grad():
        exact, expected = copy.deepcopy(net).double()(x.double()), net(x)
        fast = fast.to(lane.put(x).device)
        with lane:
            names = launched(lambda: fast(lane.put(x)))
            y = fast(lane.put(x))
    assert_close_to(exact, expected, y.cpu())
    assert "layer_norm_kernel" not in names
    assert names.count("row_statistics_kernel") == 2  # the second norm's come from the layer before it
    assert list(fast.state_dict()) == list(net.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ATTENDING)
def test_attention_is_as_accurate_as_stock(lane, name, dtype):
    net = settled(nn.Sequential(ATTENDING[name]())).eval().to(dtype)
    fast = fastnets.optimize(net, backend="triton")
    x = (torch.randn(3, 11, 48) * 2 + 3).to(dtype)
    with torch.no_grad():
        exact, expected = copy.deepcopy(net).double()(x.double()), net(x)
        fast = fast.to(lane.put(x).device)
        with lane:
            names = launched(lambda: fast(lane.put(x)))
            y = fast(lane.put(x))
    assert_close_to(exact, expected, y.cpu())
    assert "layer_norm_kernel" not in names
    assert names.count("row_statistics_kernel") == 1  # the second norm's come from the output projection
    assert list(fast.state_dict()) == list(net.state_dict())


def test_hooks_on_attention_are_called():
    net = settled(AttentionBlock()).eval()
    fast, seen = fastnets.optimize(net), []
    fast.attention.register_forward_hook(lambda *_: seen.append(1))
    assert_same_answers(net, fast, torch.randn(2, 9, 48))
    assert seen


def test_rows_with_a_large_mean(lane):
    net = network()
    fast = fastnets.optimize(net, backend="triton")
    x = torch.randn(2, 9, 48) + 200
    with torch.no_grad():
        exact, expected = copy.deepcopy(net).double()(x.double()), net(x)
        fast = fast.to(lane.put(x).device)
        with lane:
            y = fast(lane.put(x))
    assert_close_to(exact, expected, y.cpu())


def test_weights_that_change_are_seen(lane):
    net = network()
    fast, x = fastnets.optimize(net, backend="triton"), torch.randn(2, 9, 48)
    fast = fast.to(lane.put(x).device)
    with lane, torch.no_grad():
        before = fast(lane.put(x))
        for parameter in fast.parameters():
            parameter.mul_(1.5)
        after = fast(lane.put(x))
    changed = copy.deepcopy(net)
    changed.load_state_dict(fast.state_dict())
    with torch.no_grad():
        exact, expected = copy.deepcopy(changed).double()(x.double()), changed(x)
    assert not torch.equal(before, after)
    assert_close_to(exact, expected, after.cpu())


def test_gradients_are_stocks():
    net = network()
    fast = fastnets.optimize(net)
    x = torch.randn(2, 9, 48, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    net(x).square().sum().backward()
    fast(other).square().sum().backward()
    torch.testing.assert_close(other.grad, x.grad)


def test_bytes_and_launches_shrink():
    """Of a block that is bound by memory: norms neither write nor read."""
    net = network(width=256).to("meta")
    x = torch.empty(8, 197, 256, device="meta")
    with assume_device("a100"), dispatch.assume_device_type("cuda"), dispatch.backend("triton"):
        found = count(fastnets.optimize(net), x)
    names = {op: moved for op, moved in found.by_op.items() if "norm" in op or "statistics" in op}
    assert set(names) == {"triton.row_statistics_kernel"}
    one = x.numel() * x.element_size()
    assert found.by_op["triton.row_statistics_kernel"].bytes < 2 * one * 1.02
    assert found.launches == 2 * 5


def test_a_hook_on_the_norm_is_called():
    net = network()
    fast, seen = fastnets.optimize(net), []
    fast[0].norm2.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        fast(torch.randn(2, 9, 48))
    assert seen == [1]


def test_what_is_measured_is_the_norm_and_the_layer_each_for_itself():
    reads = (
        nn.LayerNorm(256),
        nn.Linear(256, 64),
        None,
        "gelu",
        torch.empty(8, 256, device="meta"),
        "triton",
    )
    with torch.no_grad():
        assert norm_linear.takes_norm(*reads)
        with dispatch.decisions():
            assert not norm_linear.takes_norm(*reads)


def test_a_compiler_sees_the_norm_and_the_layer():
    net = network()
    fast = torch.compile(fastnets.optimize(net), backend="aot_eager", fullgraph=True)
    assert_same_answers(net, fast, torch.randn(2, 9, 48))


class Shared(Block):
    """The norm's result has another reader."""

    def forward(self, x):
        y = self.norm1(x)
        return y + self.proj(self.act(self.inner(y)))


class Writes(Block):
    """Somebody writes to the norm's input before the layer reads its result."""

    def forward(self, x):
        x = x * 2
        y = self.norm1(x)
        x.mul_(3)
        return x + self.proj(self.act(self.inner(y)))


@pytest.mark.parametrize("kind", [Shared, Writes])
def test_what_must_not_be_joined_is_not(kind):
    net = settled(kind()).eval()
    fast = fastnets.optimize(net)
    assert "norm=" not in graphs(fast)
    assert_same_answers(net, fast, torch.randn(2, 9, 48))


def test_explain_names_the_layer_that_normalises():
    fast = fastnets.optimize(network(), backend="triton")
    rows = {row.path: row.implementation for row in fastnets.explain(fast, torch.randn(2, 64, 48)).rows}
    joined = [rows["0.norm1"], rows["1.norm2"]]
    assert joined == ["triton, with 0.inner", "triton, with 1.fc1"]
    layer = fastnets.optimize(settled(ATTENDING["prenorm layer"]()).eval(), backend="triton")
    rows = {row.path: row.implementation for row in fastnets.explain(layer, torch.randn(2, 64, 48)).rows}
    assert [rows["norm1"], rows["norm2"]] == ["triton, with self_attn", "triton, with linear1"]
    stock_rows = fastnets.explain(fastnets.optimize(network()), torch.randn(2, 64, 48)).rows
    assert {row.path: row.implementation for row in stock_rows}["0.norm1"] == "stock"


@pytest.mark.parametrize("gpu", ["a100", "h100"])
def test_left_to_itself_it_joins_only_where_time_is_saved(gpu):
    """Normalising again for each tile of columns has its price: products that are bound by multiplying keep
    their norm, and so do those of one row."""
    sizes = {
        "element_size": 2,
        "precision": "ieee",
        "norm": "layer_norm",
        "known": True,
        "device": DEVICES[gpu],
    }
    assert not norm_linear._gains(6304, 3072, 768, forced=False, **sizes)
    assert norm_linear._gains(6304, 128, 768, forced=False, **sizes)
    assert norm_linear._gains(6304, 3072, 768, forced=True, **sizes)
    assert not norm_linear._gains(1, 3072, 768, forced=True, **sizes)
