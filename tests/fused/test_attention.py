"""``fastnets.attention``: PyTorch's semantics for PyTorch's arguments, what goes beyond them, and the ops."""

import math

import pytest
import torch
import torch.nn.functional as F

import fastnets
from fastnets.fused import dispatch
from fastnets.fused.attention import _chooses_library, attention
from tests.accuracy import assert_close_to, assert_exact

ops = torch.ops.fastnets
SEED = torch.tensor([42], dtype=torch.int64)


def qkv(*shape, heads=2, key_heads=None, keys=None, dtype=torch.float32, grad=False):
    """q [*shape, heads, 9, 8] and k, v of ``keys`` rows."""
    key_heads, keys = key_heads or heads, keys or 9
    sizes = [(heads, 9), (key_heads, keys), (key_heads, keys)]
    return [torch.randn(*shape, *size, 8, dtype=dtype, requires_grad=grad) for size in sizes]


def agree(ours, stock, tolerance=1e-5):
    torch.testing.assert_close(ours, stock, rtol=tolerance, atol=tolerance)


MASKS = {
    "none": lambda: None,
    "bool": lambda: torch.rand(2, 1, 9, 9) < 0.7,
    "two dims": lambda: torch.randn(9, 9),
    "one row": lambda: torch.rand(2, 2, 1, 9) < 0.9,
    "float": lambda: torch.randn(2, 2, 9, 9),
}


@pytest.mark.parametrize("backend", ["reference", "library", "triton"])
@pytest.mark.parametrize("mask", MASKS)
def test_pytorch_s_arguments(backend, mask):
    from tests.interpreter import interpreter

    mask = MASKS[mask]()
    for leading in ((2,), (), (1, 2)):
        if mask is not None and mask.dim() > 3 and leading != (2,):
            continue
        q, k, v = qkv(*leading)
        stock = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3)
        with interpreter():
            agree(attention(q, k, v, mask, scale=0.3, backend=backend), stock)
    q, k, v = qkv(2, heads=4, key_heads=2, keys=11)
    stock = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    with interpreter():
        agree(attention(q, k, v, is_causal=True, enable_gqa=True, backend=backend), stock)


def test_it_is_public_and_stock_on_the_cpu():
    assert fastnets.attention is attention
    q, k, v = qkv(2)
    assert_exact(F.scaled_dot_product_attention(q, k, v), attention(q, k, v))


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True, "softcap": 2.0, "bias": (1, 2, 9, 9)},
        {"window": 3, "bias": (2, 1, 1, 9)},
        {"window": (2, None), "alibi_slopes": torch.tensor([0.5, 0.25])},
        {"attn_mask": torch.rand(9, 9) < 0.6, "bias": (2, 9, 9)},
        {"is_causal": True, "causal_alignment": "bottom_right"},
    ],
)
def test_gradient_formulas(options):
    q, k, v = qkv(2, keys=9, dtype=torch.float64, grad=True)
    if "causal_alignment" in options:
        k, v = qkv(2, keys=12, dtype=torch.float64, grad=True)[1:]
    bias = None
    if "bias" in options:
        bias = torch.randn(options["bias"], dtype=torch.float64, requires_grad=True)

    def call(q, k, v, bias):
        return attention(q, k, v, **{**options, "bias": bias}, return_lse=True, backend="reference")

    if bias is not None and bias.dim() == 4 and bias.shape[0] == 2:
        assert torch.autograd.gradcheck(call, (q, k, v, bias), fast_mode=True)
    assert torch.autograd.gradcheck(call, (q, k, v, bias), fast_mode=True)


def test_gradient_formulas_with_grouped_heads():
    q, k, v = qkv(2, heads=4, key_heads=2, dtype=torch.float64, grad=True)
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention(q, k, v, enable_gqa=True, window=4, backend="reference"),
        (q, k, v), fast_mode=True,
    )  # fmt: skip


def test_queries_that_see_nothing():
    q, k, v = qkv(2, grad=True)
    mask = torch.ones(9, 9, dtype=torch.bool)
    mask[3] = False
    out, lse = attention(q, k, v, mask, return_lse=True)
    assert (out[:, :, 3] == 0).all()
    assert (lse[:, :, 3] == -math.inf).all()
    assert lse[:, :, :3].isfinite().all()
    out.sum().backward()
    assert (q.grad[:, :, 3] == 0).all()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


def test_the_lse_is_that_of_the_scores():
    q, k, v = qkv(2)
    _, lse = attention(q, k, v, return_lse=True, scale=0.7)
    agree(lse, torch.logsumexp(q @ k.mT * 0.7, -1))


def test_heads_merge_without_a_copy(lane):
    packed = torch.randn(2, 9, 3, 2, 16)
    q, k, v = lane.put(packed).permute(2, 0, 3, 1, 4).unbind(0)
    with lane:
        out = attention(q, k, v, backend="triton")
    assert out.shape == (2, 2, 9, 16)
    merged = out.transpose(1, 2)
    assert merged.is_contiguous()
    assert merged.flatten(2).data_ptr() == out.data_ptr()


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_packed_sequences(lane, alignment):
    lengths, key_lengths = [5, 0, 20], [9, 3, 20]
    cu, cu_key = (
        torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32) for n in (lengths, key_lengths)
    )
    q, k, v = (torch.randn(1, 2, sum(n), 16) for n in (lengths, key_lengths, key_lengths))
    dout = torch.randn(1, 2, sum(lengths), 16)
    slopes = torch.tensor([0.5, 0.1])
    options = {"is_causal": True, "causal_alignment": alignment, "window": 30}
    leaves = [lane.put(t).detach().requires_grad_() for t in (q, k, v)]
    with lane:
        out = attention(
            *leaves, **options, alibi_slopes=lane.put(slopes), cu_seqlens=(lane.put(cu), lane.put(cu_key)),
            backend="triton",
        )  # fmt: skip
        out.backward(lane.put(dout))
    ours = [out, *(t.grad for t in leaves)]
    for i in range(3):
        rows, keys = (slice(int(ends[i]), int(ends[i + 1])) for ends in (cu, cu_key))
        expected = []
        for dtype in (torch.float64, torch.float32):
            parts = [t[:, :, s].to(dtype).requires_grad_() for t, s in ((q, rows), (k, keys), (v, keys))]
            one = attention(*parts, **options, alibi_slopes=slopes, backend="reference")
            one.backward(dout[:, :, rows].to(dtype))
            expected.append([one.detach(), *(t.grad for t in parts)])
        for whole, exact, stock, span in zip(ours, *expected, (rows, rows, keys, keys)):
            assert_close_to(exact, stock, whole.detach()[:, :, span], ratio=3.0)


@pytest.mark.lanes("sm_80", "gpu")
def test_repeated_calls_decide_nothing_anew(lane, monkeypatch):
    from fastnets.kernels import attention as forward
    from fastnets.kernels import attention_backward as backward

    made = []
    for module, name in ((forward, "attention_forward"), (backward, "attention_backward")):
        launcher = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, launcher=launcher, **k: made.append(1) or launcher(*a, **k)
        )
    cu = lane.put(torch.tensor([0, 4, 9], dtype=torch.int32))
    with lane:
        for turn in range(4):
            tensors = [torch.randn(1, 2, 9, 16) for _ in range(4)]
            results = []
            for backend in ("triton", "reference"):
                leaves = [lane.put(t).detach().requires_grad_() for t in tensors[:3]]
                out = attention(*leaves, window=4, cu_seqlens=cu, backend=backend)
                out.backward(lane.put(tensors[3]))
                results.append([out.detach(), *(t.grad for t in leaves)])
            for ours, reference in zip(*results):
                torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
            assert len(made) == 2 * min(turn + 1, 2)


@pytest.mark.parametrize("p", [0.25, 1.0])
def test_dropout_is_that_of_the_reference(lane, p):
    results = []
    tensors = [*qkv(2, keys=70), torch.randn(2, 2, 9, 8)]
    for backend in ("triton", "reference"):
        q, k, v, dout = (lane.put(t).detach() for t in tensors)
        leaves = [t.requires_grad_() for t in (q, k, v)]
        torch.manual_seed(3)
        scalars = (0.3, -1, 0, False, 0.0, p, backend)
        with lane:
            out, _ = ops.attention(*leaves, None, None, None, lane.put(SEED), None, None, *scalars)
            out.backward(dout)
        results.append([out.detach(), *(t.grad for t in leaves)])
    for ours, reference in zip(*results):
        torch.testing.assert_close(ours.cpu(), reference.cpu(), rtol=1e-4, atol=1e-5)


def test_dropout_keeps_the_mean_and_follows_the_generator():
    q, k = torch.zeros(1, 1, 400, 8), torch.zeros(1, 1, 300, 8)
    v = torch.ones(1, 1, 300, 8)
    torch.manual_seed(1)
    first, second = (attention(q, k, v, dropout_p=0.3, backend="reference") for _ in range(2))
    assert abs(float(first.mean()) - 1) < 5 * math.sqrt(0.3 / 0.7 / 120_000)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert_exact(first, attention(q, k, v, dropout_p=0.3, backend="reference"))


def test_ops_are_registered_as_pytorch_asks():
    q, k, v = qkv(2, heads=4, key_heads=2)
    bias, mask = torch.randn(1, 4, 9, 9), torch.rand(2, 1, 1, 9) < 0.8
    scalars = (0.3, 4, 0, False, 2.0, 0.25, "auto")
    leaves = [t.clone().requires_grad_() for t in (q, k, v, bias)]
    rest = (mask, torch.rand(1, 4), SEED, None, None, *scalars)
    torch.library.opcheck(ops.attention.default, (*leaves, *rest))
    torch.library.opcheck(ops.attention_inference.default, (q, k, v, bias, *rest))
    of_decode = (q, k, v, bias, *rest[:2], *scalars[:5], "auto")
    torch.library.opcheck(ops.attention_decode.default, of_decode)
    out, lse = ops.attention(q, k, v, bias, *rest)
    of_backward = (out, lse, q, k, v, out, lse, bias, *rest[:-1], True, rest[-1])
    torch.library.opcheck(ops.attention_backward.default, of_backward)


def test_flops_are_those_of_the_products():
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = qkv(2, grad=True)
    with FlopCounterMode(display=False) as counter:
        attention(q, k, v, window=3).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 2 * 9 * 9 * 8) * (2 + 5)


def test_autocast():
    q, k, v = qkv(2, grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(q, k, v, window=3)
        stock = F.scaled_dot_product_attention(q, k, v)
    assert out.dtype == stock.dtype == torch.bfloat16
    out.sum().backward()
    assert q.grad.dtype == torch.float32


def test_compiled_and_transformed():
    q, k, v = qkv(2, grad=True)
    step = torch.compile(lambda q: attention(q, k, v, window=3), fullgraph=True, backend="aot_eager")
    out = step(q)
    agree(out, attention(q, k, v, window=3))
    (compiled,) = torch.autograd.grad(out.square().sum(), q)
    (eager,) = torch.autograd.grad(attention(q, k, v, window=3).square().sum(), q)
    agree(compiled, eager)
    transformed = torch.func.grad(lambda t: attention(t, k, v, window=3).square().sum())(q.detach())
    agree(transformed, eager)


def test_windows_of_a_batch_share_one_mask(lane):
    # Swin's: [batch, windows, heads, n, d], a mask for each window and a bias for each head.
    tensors = [torch.randn(3, 4, 2, 9, 16) for _ in range(4)]
    mask, bias = torch.rand(4, 1, 9, 9) < 0.7, torch.randn(1, 2, 9, 9)
    mask[..., 0] = True
    results = []
    for backend, put in (("triton", lane.put), ("reference", lambda t: t)):
        leaves = [put(t).detach().requires_grad_() for t in (*tensors[:3], bias)]
        with lane:
            out = attention(*leaves[:3], put(mask), bias=leaves[3], backend=backend)
            out.backward(put(tensors[3]))
        results.append([out.detach().cpu(), *(t.grad.cpu() for t in leaves)])
    for ours, reference in zip(*results):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


def q_with(**changes):
    q, k, v = qkv(2, **changes)
    return {"query": q, "key": k, "value": v}


CU = torch.tensor([0, 4, 9], dtype=torch.int32)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"is_causal": True, "attn_mask": torch.ones(9, 9)}, RuntimeError, "attn_mask cannot be given"),
        ({"window": 0}, ValueError, "window=0"),
        ({"window": (-1, 2)}, ValueError, "window="),
        ({"softcap": -1.0}, ValueError, "softcap=-1.0 is negative"),
        ({"key": torch.ones(2, 2, 9, 8).half()}, TypeError, "key is torch.float16, query torch.float32"),
        ({"value": torch.ones(2, 2, 7, 8)}, ValueError, "value is"),
        ({"key": torch.ones(2, 2, 9, 6)}, ValueError, "key is .* head dim"),
        ({"attn_mask": torch.ones(4, 9) > 0}, ValueError, r"attn_mask is \(4, 9\), which does not broadcast"),
        ({"attn_mask": torch.ones(9, 9).int()}, TypeError, "attn_mask is torch.int32"),
        ({"bias": torch.ones(9, 9) > 0}, TypeError, "bias is torch.bool"),
        ({"bias": torch.ones(3, 9, 9)}, ValueError, r"bias is \(3, 9, 9\), which does not broadcast"),
        ({"alibi_slopes": torch.ones(3)}, ValueError, "alibi_slopes is"),
        ({"causal_alignment": "left"}, ValueError, "causal_alignment='left' is neither"),
        ({"backend": "tritn"}, ValueError, "did you mean 'triton'"),
        ({"backend": "library", "window": 3}, dispatch.UnsupportedByBackend, "has no window"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p=1.5"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(change, error, message):
    arguments = {**q_with(), "backend": "reference", **change}
    with pytest.raises(error, match=message):
        attention(**arguments)


@pytest.mark.parametrize(
    "cu, message",
    [
        (torch.tensor([0, 5, 4, 9], dtype=torch.int32), "does not ascend"),
        (torch.tensor([0, 5, 8], dtype=torch.int32), "does not ascend from 0 to the packed length, 9"),
        (torch.tensor([0, 9]), "expected int32"),
    ],
)
def test_wrong_packing_is_named(cu, message):
    q, k, v = qkv(1)
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, cu_seqlens=cu)


def test_heads_and_head_dims_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="no multiple of the 2"):
        attention(**q_with(heads=3, key_heads=2), enable_gqa=True, backend="reference")
    with pytest.raises(ValueError, match="enable_gqa"):
        attention(**q_with(heads=4, key_heads=2), backend="reference")
    wide = torch.ones(1, 1, 4, 320)
    with pytest.raises(dispatch.UnsupportedByBackend, match=r"head dim 320 .*at most 256"):
        attention(wide, wide, wide, backend="triton")
    with pytest.raises(dispatch.UnsupportedByBackend, match="float64"):
        attention(*[torch.ones(1, 1, 4, 8).double()] * 3, backend="triton")


def test_who_runs_on_cuda():
    def runs(dtype=torch.bfloat16, **options):
        q = torch.empty(2, 12, 197, 64, dtype=dtype, device="meta")
        if "attn_mask" in options:
            options["attn_mask"] = torch.empty(197, 197, dtype=torch.bool, device="meta")
        few = "keys" in options
        if few:
            q = torch.empty(2, 32, 1, 128, dtype=dtype, device="meta")
        k = torch.empty(2, 8, options["keys"], 128, device="meta") if few else q
        with dispatch.assume_device_type("cuda"):
            kept = _chooses_library(q, k, k, options.get("attn_mask"), "window" in options, "auto", few)
        return "library" if kept else "triton"

    assert runs() == "library"
    assert runs(window=3) == runs(attn_mask=True) == "triton"
    assert (
        runs(torch.float64, attn_mask=True) == runs(keys=100) == runs(torch.float32, keys=4096) == "library"
    )
    assert runs(keys=4096) == "triton"
