"""``MultiheadAttention`` and the Transformer layers, judged by PyTorch's own module tests."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnets
from fastnets.fused import transformer
from fastnets.fused.multihead_attention import MultiheadAttention
from fastnets.fused.swap import Rewritten
from tests.fused.module_cases import results, samples
from tests.fused.networks import images

OURS = {
    nn.MultiheadAttention: MultiheadAttention,
    nn.TransformerEncoderLayer: transformer.TransformerEncoderLayer,
    nn.TransformerDecoderLayer: transformer.TransformerDecoderLayer,
    nn.TransformerEncoder: transformer.TransformerEncoder,
}
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:.*nested tensors.*")


def _assert_equal_results(stock, ours, arguments, training, grad):
    theirs, found = (results(module, arguments, training, grad) for module in (stock, ours))
    assert len(found) == len(theirs)
    for s, f in zip(theirs, found):
        assert (s is None) == (f is None)
        if s is not None:
            torch.testing.assert_close(f, s, rtol=1e-9, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("stock_class", OURS, ids=lambda cls: cls.__name__)
def test_every_sample_of_pytorch(stock_class, training):
    """Outputs and gradients of the drop-in and of the rewritten module; without gradients, too, where stock
    may take its fast path."""
    count = 0
    for sample in samples(stock_class, torch.float64, training):
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        torch.manual_seed(1)
        stock = stock_class(*args, **kwargs).double()
        torch.manual_seed(1)
        ours = OURS[stock_class](*args, **kwargs).double()
        assert list(ours.state_dict()) == list(stock.state_dict())
        for p, q in zip(stock.parameters(), ours.parameters()):
            assert torch.equal(p, q)
        for fast in (ours, fastnets.optimize(stock)):
            for grad in (True, False):
                _assert_equal_results(stock, fast, sample.forward_input, training, grad)
        count += 1
    assert count > 20


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["self", "shared key", "cross", "dims"])
def test_attention_arguments(batch_first, kind):
    """Every combination of masks, weights and the causal hint."""
    torch.manual_seed(0)
    dims = {"kdim": 6, "vdim": 10} if kind == "dims" else {}
    stock = nn.MultiheadAttention(8, 2, batch_first=batch_first, **dims).eval()
    ours = MultiheadAttention.from_stock(stock)
    N, L, S = 3, 5, 5 if kind == "self" else 7
    shapes = [(N, L, 8), (N, S, dims.get("kdim", 8)), (N, S, dims.get("vdim", 8))]
    q, k, v = (images(*(s if batch_first else (s[1], s[0], s[2])), seed=i) for i, s in enumerate(shapes))
    if kind == "self":
        k = v = q
    elif kind == "shared key":
        v = k
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[:, -2:] = True
    upper = torch.ones(L, S, dtype=torch.bool).triu(1)
    per_head = torch.rand(N * 2, L, S, generator=torch.Generator().manual_seed(3)) > 0.8
    per_head[..., 0] = False
    paddings = (None, padding, padding.float().masked_fill(padding, float("-inf")))
    masks = (None, upper, per_head, images(L, S, seed=9))
    for key_padding_mask, attn_mask, need, average in itertools.product(
        paddings, masks, (True, False), (True, False)
    ):
        if (
            attn_mask is not None
            and key_padding_mask is not None
            and attn_mask.dtype != key_padding_mask.dtype
        ):
            continue
        for is_causal in (False, True) if attn_mask is upper else (False,):
            options = {
                "key_padding_mask": key_padding_mask, "attn_mask": attn_mask, "need_weights": need,
                "average_attn_weights": average, "is_causal": is_causal,
            }  # fmt: skip
            with torch.no_grad():
                expected, weights = stock(q, k, v, **options)
                found, ours_weights = ours(q, k, v, **options)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            assert (weights is None) == (ours_weights is None)
            if weights is not None:
                torch.testing.assert_close(ours_weights, weights, rtol=1e-4, atol=1e-5)


def test_attention_dropout_draws_what_stock_draws_on_the_cpu():
    stock = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    ours = MultiheadAttention.from_stock(stock)
    x = images(2, 6, 8)
    for need in (True, False):
        found = []
        for module in (stock, ours):
            torch.manual_seed(4)
            found.append(module(x, x, x, need_weights=need)[0])
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("norm_first", [True, False])
def test_layer_dropout_draws_what_stock_draws_on_the_cpu(norm_first):
    stock = nn.TransformerEncoderLayer(8, 2, 16, 0.3, batch_first=True, norm_first=norm_first)
    ours = transformer.TransformerEncoderLayer.from_stock(stock)
    found = []
    for module in (stock, ours, fastnets.optimize(stock)):
        torch.manual_seed(4)
        found.append(module(images(2, 6, 8)))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_wrong_arguments_raise_what_stock_raises():
    stock = nn.MultiheadAttention(8, 2, batch_first=True)
    ours = MultiheadAttention.from_stock(stock)
    x = images(2, 5, 8)
    for args, options in (
        ((x, x, images(2, 4, 8)), {}),
        ((images(2, 5, 6),) * 3, {}),
        ((x, x, x), {"attn_mask": torch.zeros(4, 5)}),
        ((x, x, x), {"key_padding_mask": torch.zeros(2, 4, dtype=torch.bool)}),
        ((x, x, x), {"is_causal": True}),
        ((images(5),) * 3, {}),
    ):
        errors = []
        for module in (stock, ours):
            with pytest.raises(Exception) as raised:
                module(*args, **options)
            errors.append((type(raised.value), str(raised.value)))
        assert errors[0] == errors[1]


def test_padding_of_an_encoder_is_zero_where_stock_leaves_it_out():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    stock = nn.TransformerEncoder(layer, 2).eval()
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = padding[2, 1:] = True
    x = images(3, 6, 8)
    for fast in (transformer.TransformerEncoder.from_stock(stock), fastnets.optimize(stock)):
        with torch.no_grad():
            expected = stock(x, src_key_padding_mask=padding)
            found = fast(x, src_key_padding_mask=padding)
        assert (expected[padding] == 0).all()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            fast(x, src_key_padding_mask=padding)[~padding], stock(x, src_key_padding_mask=padding)[~padding]
        )


def test_nested_tensors_run_stock():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    nested = torch.nested.nested_tensor([images(3, 8), images(5, 8, seed=1)])
    for fast in (transformer.TransformerEncoderLayer.from_stock(layer), fastnets.optimize(layer)):
        with torch.no_grad():
            expected, found = (m(nested).to_padded_tensor(0.0) for m in (layer, fast))
        torch.testing.assert_close(found, expected)


def test_from_stock_shares_parameters_and_refuses_others():
    stock = nn.TransformerEncoderLayer(8, 2, 16)
    ours = transformer.TransformerEncoderLayer.from_stock(stock)
    assert all(p is q for p, q in zip(stock.parameters(), ours.parameters()))
    assert isinstance(stock.self_attn, nn.MultiheadAttention)
    assert not isinstance(stock.self_attn, MultiheadAttention)
    with pytest.raises(TypeError, match=r"expected nn\.MultiheadAttention"):
        MultiheadAttention.from_stock(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"expected nn\.TransformerDecoderLayer"):
        transformer.TransformerDecoderLayer.from_stock(stock)


# --- rewritten in a network ---------------------------------------------------------------------------------


class _Own(nn.TransformerEncoderLayer):
    def _ff_block(self, x):
        return super()._ff_block(x) * 2


def _whole():
    torch.manual_seed(0)
    return nn.Transformer(8, 2, 2, 2, 16, dropout=0.0, batch_first=True).eval()


def test_a_whole_transformer_is_rewritten_and_restored():
    stock = _whole()
    fast = fastnets.optimize(stock)
    kinds = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    for s, f in zip(stock.modules(), fast.modules()):
        assert isinstance(f, type(s))
        assert type(f).__name__ == type(s).__name__
        if isinstance(s, kinds):
            assert isinstance(f, Rewritten)
    assert list(fast.state_dict()) == list(stock.state_dict())
    src, tgt = images(2, 5, 8), images(2, 4, 8, seed=1)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    expected = stock(src, tgt, tgt_mask=mask)
    for model in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert isinstance(model.encoder.layers[0].self_attn, Rewritten)
        torch.testing.assert_close(model(src, tgt, tgt_mask=mask), expected, rtol=1e-4, atol=1e-5)
    restored = fastnets.restore(fast)
    assert not any(isinstance(m, Rewritten) for m in restored.modules())
    torch.testing.assert_close(restored(src, tgt, tgt_mask=mask), expected)


def test_hooks_inside_a_rewritten_layer_fire():
    stock = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).train()
    fast = fastnets.optimize(stock)
    for path in ("self_attn", "linear1", "norm1", "dropout1"):
        seen = []
        fast.get_submodule(path).register_forward_hook(lambda m, args, out, seen=seen: seen.append(m))
        fast(images(2, 5, 8))
        assert len(seen) == 1, path


def test_a_layer_with_methods_of_its_own_stays():
    stock = _Own(8, 2, 16, batch_first=True).eval()
    fast = fastnets.optimize(stock)
    assert "_fn_run(" not in fast._fastnets.source
    assert isinstance(fast.self_attn, Rewritten)
    torch.testing.assert_close(fast(images(2, 5, 8)), stock(images(2, 5, 8)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", [F.gelu, nn.GELU(), F.silu, torch.tanh, lambda x: x * 2])
def test_activations_of_a_layer(activation):
    stock = nn.TransformerEncoderLayer(8, 2, 16, activation=activation, batch_first=True).eval()
    fast = transformer.TransformerEncoderLayer.from_stock(stock)
    torch.testing.assert_close(fast(images(2, 5, 8)), stock(images(2, 5, 8)), rtol=1e-4, atol=1e-5)
