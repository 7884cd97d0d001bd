"""Rotary embedding as an op: gradients, in place, the forms of others, registration, errors."""

import pytest
import torch

from fastnets import fused
from fastnets.fused.rope import apply_rope
from tests.accuracy import assert_close_to, assert_exact
from tests.kernels.test_rope import stock


def angles(L, W, *batch):
    angle = torch.randn(*batch, L, W, dtype=torch.float64)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [8, 4, 6])
def test_gradient_formula(interleaved, width):
    q = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 1, 5, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = angles(5, width, 2)
    options = {"interleaved": interleaved, "backend": "reference"}

    def out(q, k):
        return apply_rope(q, k, cos, sin, **options)

    def in_place(q, k):
        return apply_rope(q * 1, k * 1, cos, sin, inplace=True, **options)

    for function in (out, in_place):
        assert torch.autograd.gradcheck(function, (q, k), fast_mode=True)
    for one, two in zip(out(q, k), in_place(q, k)):
        assert_exact(one.detach(), two.detach())


@pytest.mark.lanes("interpreter", "sm_90", "gpu")
@pytest.mark.parametrize("inplace", [False, True])
def test_triton_serves_the_op(lane, inplace):
    """On views of a packed projection, a class token left out, as EVA-02 has it."""
    packed, dy = torch.randn(2, 6, 3, 4, 16).half(), torch.randn(2, 4, 5, 16).half()
    cos, sin = (t.float() for t in angles(5, 16))

    def run(put, dtype, rotate):
        leaf = put(packed.to(dtype)).detach().clone().requires_grad_()
        qkv = leaf * 1
        q, k = (qkv[:, :, i].transpose(1, 2)[:, :, 1:] for i in range(2))
        q, k = rotate(q, k)
        (q * put(dy.to(dtype)) + k.square()).sum().backward()
        return q.detach(), k.detach(), leaf.grad

    def ours(q, k):
        return apply_rope(
            q, k, lane.put(cos), lane.put(sin), interleaved=True, inplace=inplace, backend="triton"
        )

    def stocks(dtype):
        tables = cos[None].to(torch.promote_types(dtype, torch.float32)), sin[None].to(dtype)
        return lambda q, k: tuple(stock(x, *tables, 16, True, dtype) for x in (q, k))

    with lane:
        results = run(lane.put, torch.float16, ours)
    expected = run(lambda t: t, torch.float64, stocks(torch.float64))
    same = run(lambda t: t, torch.float16, stocks(torch.float16))
    for reference, like, value, ratio in zip(expected, same, results, (2, 2, 3)):
        assert_close_to(reference, like, value, ratio)


def test_ops_are_registered_as_pytorch_asks():
    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 1, 5, 8)
    cos, sin = (t.float()[None] for t in angles(5, 8))
    ops = torch.ops.fastnets
    leaves = [t.clone().requires_grad_() for t in (q, k)]
    options = (cos, sin, 8, True, False, "auto")
    torch.library.opcheck(ops.rope.default, (*leaves, *options))
    torch.library.opcheck(ops.rope_inference.default, (q, None, *options))
    torch.library.opcheck(ops.rope_.default, (q.clone(), k.clone(), *options))


def test_as_hugging_face_and_timm_write_it():
    q, k = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16)
    frequencies = torch.outer(torch.arange(9.0), 10000 ** (-torch.arange(0, 16, 2) / 16))
    table = torch.cat([frequencies, frequencies], -1)

    def rotate_half(x):
        one, two = x.chunk(2, -1)
        return torch.cat([-two, one], -1)

    ours = apply_rope(q, k, table.cos(), table.sin())
    for x, y in zip((q, k), ours):
        torch.testing.assert_close(y, x * table.cos() + rotate_half(x) * table.sin())
    rotary = pytest.importorskip("timm.layers.pos_embed_sincos")
    module = rotary.RotaryEmbeddingCat(16, in_pixels=False, feat_shape=[3, 3], ref_feat_shape=[4, 4])
    embedding = module.get_embed()
    sin, cos = embedding.chunk(2, -1)
    y, _ = fused.apply_rope(q, None, cos, sin, interleaved=True, backend="reference")
    torch.testing.assert_close(y, rotary.apply_rot_embed_cat(q, embedding))


def test_in_place_and_other_ranks():
    cos, sin = (t.float() for t in angles(5, 4))
    q, k = torch.randn(3, 5, 8), torch.randn(1, 5, 8)
    expected = apply_rope(q, k, cos, sin)
    again = apply_rope(q[None, None], k[None, None], cos, sin)
    result = apply_rope(q, k, cos, sin, inplace=True)
    assert result[0] is q
    for one, two, three in zip(expected, result, again):
        assert_exact(one, two)
        assert_exact(one, three[0, 0])


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"k": torch.ones(2, 1, 4, 8)}, ValueError, "only heads may differ"),
        ({"cos": torch.ones(4, 8)}, ValueError, r"cos is \(1, 4, 8\)"),
        ({"sin": torch.ones(5, 4)}, ValueError, "sin is"),
        ({"rotary_dim": 7}, ValueError, "rotary_dim=7 must be even"),
        ({"cos": torch.ones(5, 8, requires_grad=True)}, ValueError, "cos requires a gradient"),
        ({"q": torch.ones(5, 8)}, ValueError, r"expected \[\.\.\., heads"),
        ({"q": torch.ones(2, 1, 5, 8).int(), "k": None}, TypeError, "q is torch.int32"),
        ({"backend": "tritn"}, ValueError, "did you mean 'triton'"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    x, table = torch.ones(2, 1, 5, 8), torch.ones(5, 8)
    arguments = {"q": x, "k": x, "cos": table, "sin": table, **change}
    with pytest.raises(error, match=message):
        apply_rope(**arguments)
