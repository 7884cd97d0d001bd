"""Blocks left out by choice at inference and by chance in training."""

import pytest
import torch
from torch import nn

import fastnets
from fastnets.models import create_model
from fastnets.models.dynamic_depth import (
    StochasticDepth,
    blocks_to_skip,
    stochastic_depth,
    stochastic_depth_rates,
)


class TestBlocksToSkip:
    @pytest.mark.parametrize(
        "skip, depth, expected",
        [
            ((), 4, set()),
            ([1, -1], 4, {1, 3}),
            (0.0, 12, set()),
            (0.5, 12, {1, 3, 5, 7, 9, 11}),
            (0.25, 12, {2, 6, 10}),
            (1.0, 3, {0, 1, 2}),
        ],
    )
    def test_indices_and_shares(self, skip, depth, expected):
        assert blocks_to_skip(skip, depth) == expected

    @pytest.mark.parametrize("depth", [1, 2, 7, 16, 33])
    def test_a_share_is_met_exactly_with_optional_blocks_only(self, depth):
        optional = [index for index in range(depth) if index % 4]
        for quarter in range(4):
            share = quarter * len(optional) / depth / 4
            chosen = blocks_to_skip(share, depth, optional=optional)
            assert len(chosen) == round(share * depth)
            assert chosen <= set(optional)

    @pytest.mark.parametrize(
        "skip, error, message",
        [
            ((4,), ValueError, "there is no block 4; the network has 4"),
            ((-5,), ValueError, "there is no block -5"),
            ((0,), ValueError, "block 0 changes the shape of its input.*blocks 1, 2, 3 can"),
            (1.0, ValueError, r"must be between 0 and 0\.75 \(3 of 4 blocks can be skipped\)"),
            (-0.1, ValueError, "must be between 0 and"),
            (float("nan"), ValueError, "must be between 0 and|NaN"),
            (2, TypeError, "collection of block indices or a share"),
            ("12", TypeError, "collection of block indices or a share"),
            ((1.0,), TypeError, r"must hold block indices, got 1\.0"),
            ((True,), TypeError, "must hold block indices, got True"),
        ],
    )
    def test_refusals(self, skip, error, message):
        with pytest.raises(error, match=message):
            blocks_to_skip(skip, 4, optional=(1, 2, 3))


class TestStochasticDepth:
    def test_rates_grow_linearly(self):
        assert stochastic_depth_rates(0.5, 6) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
        assert stochastic_depth_rates(0.5, 1) == [0]

    def test_whole_samples_are_dropped_and_the_others_scaled(self):
        torch.manual_seed(0)
        layer = StochasticDepth(0.25)
        y = layer(torch.ones(4000, 2, 3)).flatten(1)
        assert torch.equal(y, y[:, :1].expand_as(y))
        assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
        assert abs(y.mean() - 1) < 0.05

    def test_evaluation_returns_the_input_itself(self):
        x = torch.randn(3, 2)
        assert StochasticDepth(0.9).eval()(x) is x
        assert isinstance(stochastic_depth(0.0), nn.Identity)
        with pytest.raises(ValueError, match=r"must be in \[0, 1\), got 1"):
            StochasticDepth(1.0)

    def test_as_torchvision_draws_it(self):
        ops = pytest.importorskip("torchvision.ops", reason="torchvision is the reference here")
        x = torch.randn(16, 2, 3, 4)
        outputs = []
        for layer in (ops.StochasticDepth(0.3, "row"), StochasticDepth(0.3)):
            torch.manual_seed(5)
            outputs.append(layer(x))
        torch.testing.assert_close(*outputs)


@pytest.fixture(scope="module")
def small_vit():
    torch.manual_seed(0)
    shape = {"width": 32, "heads": 2, "depth": 4, "image_size": 32}
    return create_model("vit_s_16", num_classes=5, stochastic_depth=0.5, **shape).eval()


@torch.no_grad()
def test_vit_without_some_blocks_is_the_network_of_the_others(small_vit):
    x = torch.randn(2, 3, 32, 32)
    before = {key: value.clone() for key, value in small_vit.state_dict().items()}
    kept = create_model("vit_s_16", num_classes=5, width=32, heads=2, depth=2, image_size=32).eval()
    state = {key: value for key, value in before.items() if not key.startswith(("blocks.1.", "blocks.3."))}
    kept.load_state_dict({key.replace("blocks.2.", "blocks.1."): value for key, value in state.items()})
    for skip in ((1, 3), [-1, -3], {1, 3}, 0.5):
        assert torch.equal(small_vit(x, skip=skip), kept(x))
    assert not torch.equal(small_vit(x), kept(x))
    for key, value in small_vit.state_dict().items():
        assert torch.equal(value, before[key])
    with pytest.raises(ValueError, match="there is no block 4"):
        small_vit(x, skip=(4,))


@torch.no_grad()
def test_skipping_works_on_the_fused_network(small_vit):
    fused = fastnets.optimize(small_vit)
    x = torch.randn(2, 3, 32, 32)
    for skip in ((), (2,), 0.5):
        torch.testing.assert_close(fused(x, skip=skip), small_vit(x, skip=skip))


def test_vit_drops_branches_while_training(small_vit):
    x = torch.randn(8, 3, 32, 32)
    rates = [getattr(block.drop_path1, "probability", 0) for block in small_vit.blocks]
    assert rates == stochastic_depth_rates(0.5, 4)
    small_vit.train()
    try:
        torch.manual_seed(1)
        first, second = small_vit(x), small_vit(x)
    finally:
        small_vit.eval()
    assert not torch.equal(first, second)


@torch.no_grad()
def test_resnet_without_some_blocks_is_the_network_of_the_others():
    deep = create_model("resnet34", num_classes=5).eval()
    kept = create_model("resnet18", num_classes=5).eval()
    # ResNet-34 has 3, 4, 6 and 3 blocks; without these it has ResNet-18's 2 each, the first ones.
    skip = (2, 5, 6, 9, 10, 11, 12, 15)
    kept.load_state_dict({key: value for key, value in deep.state_dict().items() if key in kept.state_dict()})
    x = torch.randn(2, 3, 40, 33)
    assert torch.equal(deep(x, skip=skip), kept(x))
    assert not torch.equal(deep(x), kept(x))
    fused = fastnets.optimize(deep)
    torch.testing.assert_close(fused(x, skip=skip), deep(x, skip=skip), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused(x), deep(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"block 3 changes the shape of its input.*blocks 0, 1, 2, 4, 5"):
        deep(x, skip=(3,))


def test_half_of_a_resnets_blocks_can_be_skipped():
    with torch.device("meta"):
        model = create_model("resnet50").eval()
    ran = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            block.register_forward_hook(lambda *_: ran.append(1))
    model(torch.empty(1, 3, 32, 32, device="meta"), skip=0.5)
    assert len(ran) == 8


def test_resnet_drops_branches_while_training():
    model = create_model("resnet18", num_classes=3, stochastic_depth=0.5)
    blocks = [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]
    rates = [getattr(block.drop_branch, "probability", 0) for block in blocks]
    assert rates == stochastic_depth_rates(0.5, 8)
    x = torch.randn(8, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("name, share", [("convnext_tiny", 0.1), ("efficientnet_b0", 0.2)])
def test_image_networks_have_their_papers_rates(name, share):
    with torch.device("meta"):
        layers = [m for m in create_model(name).modules() if isinstance(m, StochasticDepth)]
    rates = [layer.probability for layer in layers]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(share if name.startswith("convnext") else share * 15 / 16)
