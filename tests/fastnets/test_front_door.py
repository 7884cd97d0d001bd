"""The public names on a whole network: what they promise together, and what they say to bad input."""

import pytest
import torch
from torch import nn

import fastnets


@pytest.fixture
def stock() -> nn.Module:
    torch.manual_seed(0)
    return fastnets.create_model("resnet18", num_classes=10, fused=False).eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(1))


def snapshot(model: nn.Module) -> dict[str, object]:
    """What must not change when a call with a bad argument fails."""
    return {
        "types": {name: type(module) for name, module in model.named_modules()},
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "training": model.training,
    }


def assert_untouched(model: nn.Module, before: dict[str, object]) -> None:
    after = snapshot(model)
    assert after["types"] == before["types"]
    assert after["training"] == before["training"]
    assert list(after["state"]) == list(before["state"])
    for key, value in before["state"].items():
        assert torch.equal(after["state"][key], value), key


def test_one_line_in_and_back_again(stock, x):
    """optimize, explain, check, restore: the round trip of the README."""
    before = snapshot(stock)
    fused = fastnets.optimize(stock)
    assert_untouched(stock, before)
    assert fastnets.check(stock, fused, x).ok
    report = fastnets.explain(fused, x)
    assert report.coverage > 0.95
    assert "convolutions fused: 20 of 20" in str(report)
    again = fastnets.restore(fused)
    assert {name: type(module) for name, module in again.named_modules()} == before["types"]
    with torch.no_grad():
        torch.testing.assert_close(again(x), stock(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lenet5", "resnet18", "mobilenet_v2"])
def test_create_model_fused_and_stock_share_keys_and_answers(name):
    torch.manual_seed(0)
    stock = fastnets.create_model(name, fused=False)
    fused = fastnets.create_model(name, weights=stock.state_dict())
    assert list(fused.state_dict()) == list(stock.state_dict())
    assert fused.training
    from fastnets.models import input_size

    image = torch.randn(1, *input_size(name))
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(image), stock.eval()(image), rtol=1e-3, atol=1e-4)


def test_an_unknown_model_suggests_near_ones():
    with pytest.raises(ValueError, match="mobilenet_v2"):
        fastnets.create_model("mobilenetv2")


@pytest.mark.parametrize("model", [None, "resnet18", 3, torch.zeros(2), nn.Linear, [nn.Linear(2, 2)]])
@pytest.mark.parametrize("call", ["optimize", "explain", "restore"])
def test_what_is_no_module_is_refused(call, model):
    with pytest.raises(TypeError, match=r"nn\.Module|instance"):
        getattr(fastnets, call)(model)


def test_check_wants_a_module_and_a_callable(stock, x):
    with pytest.raises(TypeError, match=r"nn\.Module"):
        fastnets.check("stock", stock, x)
    with pytest.raises(TypeError, match="callable"):
        fastnets.check(stock, None, x)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"backend": "cuda"},
        {"mode": "fast"},
        {"select": "guess"},
        {"dtype": torch.int8},
        {"filter_fn": "layer1"},
    ],
    ids=str,
)
def test_bad_options_leave_the_model_untouched(stock, options, inplace):
    before = snapshot(stock)
    (name,) = options
    with pytest.raises((ValueError, TypeError), match=name):
        fastnets.optimize(stock, inplace=inplace, **options)
    assert_untouched(stock, before)


def test_an_unknown_backend_suggests_the_nearest():
    with pytest.raises(ValueError, match="'triton'"):
        with fastnets.backend("tritn"):
            pass


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (torch.randn(3, 40), (RuntimeError, ValueError)),  # neither [N, C, H, W] nor [C, H, W]
        (torch.randn(2, 4, 40, 40), (RuntimeError, ValueError)),  # the stem takes 3 channels
        (torch.randint(0, 255, (2, 3, 40, 40)), (RuntimeError, TypeError)),
        (torch.randn(2, 3, 40, 40, dtype=torch.float64), (RuntimeError, TypeError)),
        (torch.randn(2, 3, 40, 40, device="meta"), (RuntimeError, ValueError)),  # weights are on the CPU
    ],
    ids=["rank", "channels", "integers", "dtype", "device"],
)
def test_bad_inputs_are_refused_as_stock_refuses_them(stock, bad, error):
    with torch.no_grad():
        with pytest.raises(error):
            stock(bad)
        with pytest.raises(error) as raised:
            fastnets.optimize(stock)(bad)
    assert len(str(raised.value)) > 20


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_show_in_the_answer(stock, x, value):
    with torch.no_grad():
        stock.layer1[0].conv1.weight[3, 2, 1, 1] = value
        expected = stock(x)
        answer = fastnets.optimize(stock)(x)
    assert torch.equal(torch.isnan(answer), torch.isnan(expected))
    assert not torch.isfinite(answer).all()
    assert torch.equal(torch.isinf(answer), torch.isinf(expected))


def test_checkpoints_that_do_not_fit_leave_the_model_untouched(stock, tmp_path):
    from fastnets.models import CheckpointError, load_weights

    fused = fastnets.optimize(stock)
    before = snapshot(fused)
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "foreign.pth")
    torch.save(stock.state_dict(), tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:10_000])
    for name in ("foreign.pth", "cut.pth", "missing.pth"):
        with pytest.raises(CheckpointError, match=name):
            load_weights(fused, tmp_path / name)
        with pytest.raises(ValueError, match=name):
            fastnets.create_model("resnet18", weights=tmp_path / name)
    assert_untouched(fused, before)


def test_refresh_makes_silent_writes_visible(stock, x):
    fused = fastnets.optimize(stock)
    with torch.no_grad():
        fused(x)
        for model in (stock, fused):
            model.conv1.weight.data.mul_(-1)
        fastnets.refresh(fused)
        torch.testing.assert_close(fused(x), stock(x), rtol=1e-3, atol=1e-4)
    with pytest.raises(TypeError, match=r"nn\.Module"):
        fastnets.refresh("model")


SLIPS = {
    "inplace must be True or False, got 'yes'": lambda m, x: fastnets.optimize(m, inplace="yes"),
    "strict must be True or False, got 1": lambda m, x: fastnets.optimize(m, strict=1),
    "cuda_graphs must be True or False, got None": lambda m, x: fastnets.optimize(m, cuda_graphs=None),
    "filter_fn.*module, name.*not take two": lambda m, x: fastnets.optimize(m, filter_fn=lambda m: True),
    "filter_fn.*module, name.*got str": lambda m, x: fastnets.optimize(m, filter_fn="conv1"),
    r"create_model\('resnet50'\) builds": lambda m, x: fastnets.optimize("resnet50"),
    r"example_inputs=\(1, 3, 40, 40\) holds no tensor: .*randn": (
        lambda m, x: fastnets.optimize(m, (1, 3, 40, 40))
    ),
    r"example_inputs=\(2, 3, 40, 40\) holds no tensor": lambda m, x: fastnets.explain(m, tuple(x.shape)),
    "example_inputs='x' holds no tensor": lambda m, x: fastnets.check(m, m, "x"),
    r"example_inputs=\(\) holds no tensor": lambda m, x: fastnets.check(m, m, ()),
    "check needs example_inputs": lambda m, x: fastnets.check(m, m, None),
    "lenet5: fused must be True or False, got 'no'": lambda m, x: fastnets.create_model("lenet5", fused="no"),
    "lenet5 has no option 'pretrained': give weights=": (
        lambda m, x: fastnets.create_model("lenet5", pretrained=True)
    ),
    "has no option 'in_chans'; did you mean 'in_channels'": (
        lambda m, x: fastnets.create_model("resnet18", in_chans=1)
    ),
    r"transformer has no option 'num_classes' \(it has: vocabulary": (
        lambda m, x: fastnets.create_model("transformer", num_classes=3)
    ),
    r"pattern must be a str such as 'resnet\*', got 3": lambda m, x: fastnets.list_models(3),
    "value must be a tensor.*got NoneType": lambda m, x: fastnets.attention(x, x, None),
    "query must be a tensor.*got list": lambda m, x: fastnets.attention([1.0], x, x),
}


@pytest.mark.parametrize("message", SLIPS)
def test_a_wrong_argument_is_named_with_its_remedy(stock, x, message):
    before = snapshot(stock)
    with pytest.raises(TypeError, match=message):
        SLIPS[message](stock, x)
    assert_untouched(stock, before)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_attention_names_sizes_that_do_not_go_together(backend):
    q, k = torch.randn(2, 4, 5, 16), torch.randn(2, 4, 6, 16)
    for wrong, message in (
        ((q, k[..., :8], k), "key is .*8.*: their head dims differ"),
        (
            (q, k, k[..., :5, :]),
            "value is .*5, 16.*: give each key a value",
        ),  # PyTorch reads what lies behind, on the CPU
        ((q, k[:, :2], k[:, :2]), "query has 4 heads, key 2; fewer need enable_gqa=True"),
        ((q[0, 0, 0], k, k), r"\[..., heads, length, D\], got \(16,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            fastnets.attention(*wrong, backend=backend)
