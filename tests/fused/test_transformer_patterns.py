"""Linear layers, norms, attention and what follows them, fused in captured graphs."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnets
from fastnets.fused import transformer_patterns
from fastnets.fused.swap import Rewritten
from fastnets.fused.variants import variants_in_force
from tests.accuracy import assert_close_to
from tests.fused.networks import assert_same_answers, graphs, images


class Net(nn.Module):
    """``step(self, x)`` over two linear layers, norms and a layer scale."""

    def __init__(self, step):
        super().__init__()
        self.fc1, self.fc2, self.wide = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 32)
        self.square = nn.Linear(8, 8)
        self.norm, self.norm2 = nn.LayerNorm(8), nn.RMSNorm(8)
        self.act, self.drop = nn.GELU(), nn.Dropout(0.2)
        self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, 8))
        self.scale = Scale()
        self.step = step

    def forward(self, x):
        return self.step(self, x)


class Scale(nn.Module):
    def __init__(self, inplace=False):
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(-1, 1, 8))
        self.inplace = inplace

    def forward(self, x):
        return x.mul_(self.gamma) if self.inplace else x * self.gamma


def _two_readers(m, x):
    y = m.square(x)
    return F.relu(y) * y.sum()


def _gate_of_halves(m, x):
    gate, up = m.wide(x).chunk(2, -1)
    return m.fc2(F.silu(gate) * up)


def _sum_read_later(m, x):
    x = x * 2 + x.flip(1)
    return m.norm(x) + x


PATTERNS = {
    "linear": (lambda m, x: m.square(x), ["linear"]),
    "mlp": (lambda m, x: m.fc2(m.drop(m.act(m.fc1(x)))), ["linear+gelu+linear"]),
    "F.silu": (lambda m, x: F.silu(m.fc1(x)), ["linear+silu"]),
    "residual": (lambda m, x: x + m.drop(m.square(x)), ["linear+add"]),
    "parameter scale": (lambda m, x: x + m.gamma * m.square(x), ["linear+scale+add"]),
    "reshaped scale": (lambda m, x: m.square(x) * m.gamma.reshape(1, 1, -1) + x, ["linear+scale+add"]),
    "module scale": (lambda m, x: x + m.drop(m.scale(m.square(x))), ["linear+scale+add"]),
    "scale of one": (lambda m, x: m.square(x) * m.gamma[:1] + x, ["linear"]),
    "activation, scale": (lambda m, x: m.gamma * torch.tanh(m.square(x)), ["linear+tanh+scale"]),
    "add, activation": (lambda m, x: F.relu(m.square(x) + x), ["linear+add"]),
    "two readers": (_two_readers, ["linear"]),
    "norms": (lambda m, x: m.norm2(m.norm(x)), ["layer_norm", "rms_norm"]),
    "sum then norm": (lambda m, x: m.norm(x + x.flip(1)), ["add+layer_norm"]),
    "sum read later": (_sum_read_later, ["add+layer_norm"]),
    "post-norm": (lambda m, x: m.norm(x + m.square(x)), ["layer_norm", "linear+add"]),
    "gate": (lambda m, x: m.fc2(F.silu(m.fc1(x)) * m.wide(x)[..., :16]), ["linear"] * 2 + ["linear+silu"]),
    "SwiGLU": (lambda m, x: F.silu(m.square(x)) * m.fc2(m.fc1(x)), ["linear", "linear+linear", "silu*up"]),
    "GEGLU of halves": (_gate_of_halves, ["linear", "linear", "silu*up"]),
    "attention": (lambda m, x: F.scaled_dot_product_attention(x, x, x), ["attention"]),
    "F.linear": (lambda m, x: F.linear(x, m.square.weight), ["linear"]),
    "F.layer_norm": (lambda m, x: F.layer_norm(x, (8,), m.gamma), ["layer_norm"]),
    "permuted": (lambda m, x: (m.gamma[:, None] * m.square(x).permute(0, 2, 1)) + x.transpose(1, 2),
                 ["linear"]),
}  # fmt: skip


def _kinds(model, training=False):
    model.train(training)
    found = [
        fusion.kind
        for module in model.modules()
        if isinstance(module, Rewritten)
        for variant in variants_in_force(module)
        for fusion in variant.fusions
    ]
    return sorted(found)


@pytest.mark.parametrize("name", PATTERNS)
def test_pattern(name):
    step, expected = PATTERNS[name]
    stock = Net(step).eval()
    fast = fastnets.optimize(stock)
    assert _kinds(fast) == sorted(expected)
    assert_same_answers(stock, fast, images(2, 5, 8))


@pytest.mark.parametrize("name", PATTERNS)
def test_training_step_equals_stock(name):
    stock = Net(PATTERNS[name][0]).train()
    fast = fastnets.optimize(stock)
    found = []
    for model in (stock, fast):
        x = images(2, 5, 8).requires_grad_()
        torch.manual_seed(3)
        y = model(x)
        y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in model.parameters())])
    for s, f in zip(*found):
        assert (s is None) == (f is None)
        if s is not None:
            torch.testing.assert_close(f, s, rtol=1e-4, atol=1e-4)


def _written_input(m, x):
    x += m.square(x)
    return m.norm(x)


def _input_overwritten(m, x):
    y = x * 1.0
    z = m.square(y)
    y.zero_()
    return F.relu(z) + y


def _sum_overwritten(m, x):
    y = x + x.flip(1)
    z = y.mul_(3.0)
    return m.norm(y) + z


@pytest.mark.parametrize("step", [_written_input, _input_overwritten, _sum_overwritten])
def test_in_place_semantics_are_kept(step):
    stock = Net(step).eval()
    assert_same_answers(stock, fastnets.optimize(stock), images(2, 5, 8))


# --- blocks -------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention as timm and Hugging Face write it."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.drop = nn.Dropout(0.0)

    def forward(self, x, attn_mask=None):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.drop(self.proj(x.transpose(1, 2).reshape(B, N, C)))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(8), Attention(), Scale(inplace=True)
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(8), Mlp(), Scale()

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x), attn_mask=None))
        return x + self.ls2(self.mlp(self.norm2(x)))


@pytest.fixture
def stock():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).eval()


def test_a_block_adds_what_its_caller_would(stock):
    fast = fastnets.optimize(stock)
    assert [f.kind for f in variants_in_force(fast[0])[0].fusions].count("block+scale+add") == 2
    assert " + " not in variants_in_force(fast[0])[0].source
    assert_same_answers(stock, fast, images(2, 5, 8))
    for model in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert graphs(model) == graphs(fast)
        assert_same_answers(stock, model, images(2, 5, 8))


def test_training_of_blocks_equals_stock(stock):
    stock.train()
    fast = fastnets.optimize(stock)
    for model in (stock, fast):
        model(images(2, 5, 8)).square().sum().backward()
    for (name, s), f in zip(stock.named_parameters(), fast.parameters()):
        torch.testing.assert_close(f.grad, s.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("path", ["0.attn", "0.mlp", "0.ls1", "0.mlp.fc2", "0.norm1", "0.attn.drop"])
def test_hooks_fire_as_in_stock(stock, path):
    fast = fastnets.optimize(stock)
    seen = []
    for model in (stock, fast):
        model.get_submodule(path).register_forward_hook(lambda m, args, out: seen.append(out.clone()))
        with torch.no_grad():
            model(images(2, 5, 8))
    assert len(seen) == 2
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-5)


def test_a_block_whose_structure_changes(stock):
    fast = fastnets.optimize(stock)
    for model in (stock, fast):
        torch.manual_seed(3)
        model[0].mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        model[1].ls2 = nn.Identity()
        model[1].attn.proj = nn.Linear(8, 8)
    assert_same_answers(stock, fast, images(2, 5, 8))


def test_explain_of_blocks(stock):
    report = fastnets.explain(fastnets.optimize(stock), images(2, 5, 8))
    rows = {(row.path, row.kind): row for row in report.rows}
    assert all(row.fused for row in report.rows)
    assert rows["0.attn", "attention"].flops == 2 * 2 * 2 * 2 * 5 * 5 * 4
    assert rows["0.mlp.fc1", "linear+gelu+linear"].flops == 2 * 2 * 2 * 5 * 8 * 16
    assert ("0.mlp", "block+scale+add") in rows
    assert report.coverage == 1
    assert "attention fused: 2 of 2" in str(report)
    before = fastnets.explain(stock, images(2, 5, 8))
    assert before.coverage == 0
    assert sum(r.flops or 0 for r in before.rows) == sum(r.flops or 0 for r in report.rows)


def test_layers_left_stock_by_the_filter(stock):
    fast = fastnets.optimize(stock, filter_fn=lambda m, name: name != "0.mlp.fc2")
    row = next(r for r in fastnets.explain(fast).rows if r.path == "0.mlp.fc2")
    assert not row.fused
    assert row.reason == "kept stock by filter_fn"
    assert_same_answers(stock, fast, images(2, 5, 8))
    with pytest.raises(ValueError, match=r"0\.mlp\.fc2: kept stock"):
        fastnets.optimize(stock, filter_fn=lambda m, name: name != "0.mlp.fc2", strict=True)


def test_convnext_blocks_fuse_through_the_permutation():
    models = pytest.importorskip("torchvision.models.convnext")
    torch.manual_seed(0)
    stock = models.CNBlock(8, 0.5, 0.1).eval()
    fast = fastnets.optimize(stock)
    found = [fusion.kind for fusion in variants_in_force(fast)[0].fusions]
    assert sorted(found) == ["conv+layer_norm", "linear+gelu", "linear+scale+add"]
    x = images(2, 8, 6, 5)
    assert_same_answers(stock, fast, x)
    assert_same_answers(stock, fast, x.to(memory_format=torch.channels_last))


# --- masks --------------------------------------------------------------------------------------------------


class Windows(nn.Module):
    """Attention in two windows of each image, which differ in their bias."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.bias = nn.Parameter(torch.randn(2, 2, 5, 5))

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.bias.repeat(x.shape[0] // 2, 1, 1, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


def test_a_mask_repeated_along_the_batch_is_read_as_it_is(lane, monkeypatch):
    torch.manual_seed(0)
    stock, x = Windows(), torch.randn(6, 5, 32)
    grads, outs = [], []
    for dtype in (torch.float64, torch.float32):
        model = copy.deepcopy(stock).to(dtype)
        outs.append(model(x.to(dtype)))
        outs[-1].square().sum().backward()
        grads.append(model.bias.grad)
    seen = []
    ours = transformer_patterns.attention
    monkeypatch.setattr(
        transformer_patterns,
        "attention",
        lambda q, *rest, **options: seen.append(q.shape) or ours(q, *rest, **options),
    )
    fast = fastnets.optimize(stock, backend="triton").to(lane.device)
    with lane:
        out = fast(lane.put(x))
        out.square().sum().backward()
    assert seen == [(3, 2, 2, 5, 16)]
    assert_close_to(*(t.detach() for t in (*outs, out)))
    assert_close_to(*grads, fast.bias.grad, ratio=3)
    for size in (6, 2):
        torch.testing.assert_close(fastnets.optimize(stock)(x[:size]), stock(x[:size]))
