"""The convolutional networks beside torchvision's and timm's with the same weights, and what they refuse."""

import pytest
import torch
from torch import nn

from fastnets.models import CheckpointError, ConvNeXtTimm, create_model, load_weights
from tests.accuracy import assert_close_to
from tests.models.test_architectures import on_meta, same_network_twice, stock_network

slow = pytest.mark.slow
# name, image size (height, width); of each family the smallest runs by default
NETWORKS = [
    ("convnext_tiny", (40, 33)),
    pytest.param("convnext_small", (40, 33), marks=slow),
    pytest.param("convnext_base", (40, 33), marks=slow),
    pytest.param("convnext_large", (40, 33), marks=slow),
    pytest.param("convnext_xlarge", (40, 33), marks=slow),
    ("densenet121", (40, 33)),
    pytest.param("densenet161", (40, 33), marks=slow),
    pytest.param("densenet169", (40, 33), marks=slow),
    pytest.param("densenet201", (40, 33), marks=slow),
    ("efficientnet_b0", (40, 33)),
    *(pytest.param(f"efficientnet_b{i}", (40, 33), marks=slow) for i in range(1, 8)),
    pytest.param("efficientnet_v2_s", (40, 33), marks=slow),
    ("efficientnet_lite0", (40, 33)),
    ("googlenet", (47, 33)),
    ("inception_v3", (75, 80)),
    ("mnasnet0_5", (40, 33)),
    pytest.param("mnasnet1_0", (40, 33), marks=slow),
    ("mobilenet_v1", (40, 33)),
    ("mobilenet_v3_small", (40, 33)),
    pytest.param("mobilenet_v3_large", (40, 33), marks=slow),
    ("regnet_y_400mf", (40, 33)),
    pytest.param("regnet_x_400mf", (40, 33), marks=slow),
    ("resnet18_fpn", (97, 65)),
    pytest.param("resnet50_fpn", (97, 65), marks=slow),
    pytest.param("resnet101_fpn", (97, 65), marks=slow),
    ("shufflenet_v2_x0_5", (40, 33)),
    pytest.param("shufflenet_v2_x1_0", (40, 33), marks=slow),
    ("squeezenet1_1", (40, 33)),
    pytest.param("squeezenet1_0", (40, 33), marks=slow),
]


def outputs_of(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """What the network returns, as a list, with the same random numbers drawn in each call."""
    torch.manual_seed(2)
    out = model(x)
    return [out] if isinstance(out, torch.Tensor) else list(out.values() if isinstance(out, dict) else out)


def gradients_of(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    sum(out.square().mean() for out in outputs_of(model, x)).backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("name, size", NETWORKS)
def test_outputs_are_the_stock_networks(name, size):
    stock, ours = (model.eval() for model in same_network_twice(name))
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs, mine = outputs_of(stock, x), outputs_of(ours, x)
        exact = outputs_of(stock.double(), x.double())
    assert len(theirs) == len(mine)
    for reference, a, b in zip(exact, theirs, mine):
        assert a.std() > 0
        assert_close_to(reference, a, b)


# One of each class, and those by default: with concatenation, a shuffle, squeeze-and-excite, one of timm's.
TRAINED = [
    network if network[0] in
    ("googlenet", "mobilenet_v1", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1")
    else pytest.param(*network, marks=slow)
    for network in NETWORKS if type(network) is tuple
] + [pytest.param("efficientnet_v2_s", (40, 33), marks=slow)]  # fmt: skip


@pytest.mark.parametrize("name, size", TRAINED)
def test_training_is_the_stock_networks(name, size):
    stock, ours = (model.train() for model in same_network_twice(name))
    x = torch.randn(4, 3, *size, generator=torch.Generator().manual_seed(1))
    theirs, mine = gradients_of(stock, x), gradients_of(ours, x)
    for (key, value), buffer in zip(stock.named_buffers(), ours.buffers()):
        torch.testing.assert_close(buffer, value, rtol=1e-4, atol=1e-5, msg=key)
    exact = gradients_of(stock.double(), x.double())
    flat = [torch.cat([g.flatten() for g in gradients]) for gradients in (exact, theirs, mine)]
    assert_close_to(*flat, ratio=3)


def test_training_of_timms_convnext_is_timms():
    """What convnext_xlarge is, at a size that can be trained here."""
    timm = pytest.importorskip("timm", reason="timm is the reference here")
    depths, channels = (1, 1, 2, 1), (16, 24, 32, 48)
    torch.manual_seed(0)
    stock = timm.create_model(
        "convnext_xlarge", depths=depths, dims=channels, drop_path_rate=0.5, num_classes=7
    )
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ours = ConvNeXtTimm(depths, channels, num_classes=7, drop_branch=0.5)
    load_weights(ours, stock.state_dict())
    x = torch.randn(4, 3, 40, 33)
    theirs, mine = gradients_of(stock.train(), x), gradients_of(ours.train(), x)
    exact = gradients_of(stock.double(), x.double())
    for reference, a, b in zip(exact, theirs, mine, strict=True):
        assert_close_to(reference, a, b, ratio=3)


@pytest.mark.parametrize("name, size", [("googlenet", (224, 224)), ("inception_v3", (299, 299))])
def test_auxiliary_classifiers_are_torchvisions(name, size):
    stock, ours = (model.train() for model in same_network_twice(name, num_classes=7, aux_logits=True))
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.manual_seed(2)
        theirs = stock(x)
        torch.manual_seed(2)
        mine = ours(x)
    assert type(mine)._fields == type(theirs)._fields
    for a, b in zip(theirs, mine):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    assert isinstance(ours.eval()(x), torch.Tensor)
    assert all(not p.grad_fn for p in ours.parameters())


def test_auxiliary_classifiers_of_the_2014_network():
    model = create_model("googlenet_2014", num_classes=5, aux_logits=True)
    outputs = model(torch.randn(2, 3, 224, 224))
    assert [tuple(y.shape) for y in outputs] == [(2, 5)] * 3
    sum(y.square().sum() for y in outputs).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_googlenet_2014_sees_5x5_and_normalises_responses():
    model = on_meta("googlenet_2014")
    assert model.inception3a.branch3[1].conv.kernel_size == (5, 5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert [type(m) for m in (model.norm1, model.norm2)] == [nn.LocalResponseNorm] * 2


class TestCheckpoints:
    """What torchvision publishes differs from its networks' keys; both load."""

    def test_densenets_first_keys(self):
        ours = create_model("densenet121", num_classes=2)
        first = {
            key.replace("norm1", "norm.1").replace("norm2", "norm.2").replace("conv1", "conv.1")
            .replace("conv2", "conv.2"): value
            for key, value in ours.state_dict().items()
        }  # fmt: skip
        assert "features.denseblock1.denselayer1.norm.1.weight" in first
        loaded = create_model("densenet121", num_classes=2, weights=first)
        for key, value in ours.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key

    @pytest.mark.parametrize("name, prefix", [("googlenet", "aux1."), ("inception_v3", "AuxLogits.")])
    def test_auxiliary_weights_are_not_needed(self, name, prefix):
        published = create_model(name, num_classes=2, aux_logits=True).state_dict()
        assert any(key.startswith(prefix) for key in published)
        loaded = create_model(name, num_classes=2, weights=published)
        assert torch.equal(loaded.fc.weight, published["fc.weight"])
        again = create_model(name, num_classes=2, aux_logits=True, weights=published)
        assert len(again.state_dict()) == len(published)

    def test_auxiliary_weights_are_missed_where_they_are_wanted(self):
        without = create_model("googlenet", num_classes=2).state_dict()
        with pytest.raises(CheckpointError, match=r"missing \(aux1\.conv\.conv\.weight"):
            create_model("googlenet", num_classes=2, aux_logits=True, weights=without)

    def test_frozen_batch_norms_of_a_pyramid(self):
        from torchvision.ops.misc import FrozenBatchNorm2d

        frozen = stock_network("resnet18_fpn", norm_layer=FrozenBatchNorm2d).to_empty(device="cpu")
        for value in frozen.state_dict().values():
            value.fill_(0.5)
        ours = create_model("resnet18_fpn", weights=frozen.state_dict()).eval()
        assert ours.body.bn1.running_var.unique() == 0.5

    def test_classifiers_weights_serve_a_pyramid(self):
        classifier = create_model("resnet18", num_classes=3)
        pyramid = create_model("resnet18_fpn")
        load_weights(pyramid.body, classifier.state_dict())
        assert torch.equal(pyramid.body.layer4[1].conv2.weight, classifier.layer4[1].conv2.weight)

    @pytest.mark.parametrize(
        "name, other",
        [
            ("densenet121", "densenet169"),
            ("squeezenet1_0", "squeezenet1_1"),
            ("mobilenet_v3_large", "mobilenet_v3_small"),
            ("googlenet", "googlenet_2014"),
        ],
    )
    def test_another_variants_weights_list_at_most_ten_keys(self, name, other):
        with pytest.raises(CheckpointError) as caught:
            load_weights(on_meta(name), on_meta(other).state_dict(), name=name)
        message = str(caught.value)
        assert f"does not fit {name}: " in message
        listed = [word for word in message.replace("(", " ").replace(",", " ").split() if "." in word[:-1]]
        assert 0 < len([word for word in listed if word.split(".")[-1] in
                        ("weight", "bias", "running_mean", "running_var")]) <= 10  # fmt: skip


class TestPyramid:
    def test_maps(self):
        model = create_model("resnet18_fpn", channels=16).eval()
        with torch.no_grad():
            maps = model(torch.randn(1, 3, 100, 64))
        assert {name: tuple(y.shape) for name, y in maps.items()} == {
            "0": (1, 16, 25, 16),
            "1": (1, 16, 13, 8),
            "2": (1, 16, 7, 4),
            "3": (1, 16, 4, 2),
            "pool": (1, 16, 2, 1),
        }

    @pytest.mark.parametrize("layers", [0, 3, 5])
    def test_trainable_layers_are_torchvisions(self, layers):
        theirs = stock_network("resnet18_fpn", trainable_layers=layers)
        ours = on_meta("resnet18_fpn", trainable_layers=layers)
        theirs = {name: p.requires_grad for name, p in theirs.named_parameters()}
        assert {name: p.requires_grad for name, p in ours.named_parameters()} == {
            **theirs,
            "body.bn1.weight": layers == 5,  # torchvision's rule for the stem's batch norm ...
            "body.bn1.bias": layers == 5,
        }

    def test_number_of_trainable_layers(self):
        with pytest.raises(ValueError, match="trainable_layers must be from 0 to 5, got 6"):
            create_model("resnet18_fpn", trainable_layers=6)


# name: least image size, and the layer that needs it
LEAST = {
    "alexnet": (63, "features.12"),
    "alexnet_2012": (227, "classifier.1"),
    "convnext_tiny": (32, "features.6.1"),
    "convnext_xlarge": (32, "stages.3.downsample.1"),
    "densenet121": (29, "features.transition3.pool"),
    "googlenet": (15, "maxpool3"),
    "googlenet_2014": (31, "maxpool4"),
    "inception_v3": (75, "Mixed_7a"),
    "lenet5": (28, "fc1"),
    "lenet5_1998": (32, "f6"),
    "nin": (39, "features.20"),
    "squeezenet1_0": (21, "features.11"),
    "squeezenet1_1": (17, "features.8"),
    "vgg11": (32, "features.20"),
    "vgg16_bn": (32, "features.43"),
}
LARGEST = {"alexnet_2012": 258, "lenet5": 31, "lenet5_1998": 35}


class TestImages:
    @pytest.mark.parametrize("name", LEAST)
    def test_least_size_is_exact(self, name):
        least, layer = LEAST[name]
        model = on_meta(name).eval()
        channels = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels
        classes = 10 if name.startswith("lenet") else 1000
        for size in {least, LARGEST.get(name, least)}:
            assert model(torch.empty(2, channels, size, size, device="meta")).shape == (2, classes)
        assert layer in dict(model.named_modules())
        for height, width in ((least - 1, least), (least, least - 1)):
            wanted = f"{height}×{width} pixels are too small for {layer}: .* {least}×{least} pixels"
            with pytest.raises(ValueError, match=wanted):
                model(torch.empty(2, channels, height, width, device="meta"))

    @pytest.mark.parametrize("name", LARGEST)
    def test_largest_size_is_exact(self, name):
        largest = LARGEST[name]
        model = on_meta(name).eval()
        x = torch.empty(2, 1 if name.startswith("lenet") else 3, largest + 1, largest, device="meta")
        wanted = rf"too large for {LEAST[name][1]}: .* pixels \(up to {largest}×{largest} will do\)"
        with pytest.raises(ValueError, match=wanted):
            model(x)

    @pytest.mark.parametrize("name", ["densenet121", "lenet5", "mobilenet_v3_small", "resnet18_fpn", "vgg11"])
    def test_channels_and_dimensions(self, name):
        model = on_meta(name).eval()
        with pytest.raises(ValueError, match=r"takes images of [13] channels, got 4: \(2, 4, 64, 64\)"):
            model(torch.empty(2, 4, 64, 64, device="meta"))
        with pytest.raises(ValueError, match=r"got 3 dimensions .*unsqueeze\(0\) makes a batch of one"):
            model(torch.empty(3, 64, 64, device="meta"))

    @pytest.mark.parametrize(
        "name",
        [
            *("mnasnet0_5", "mobilenet_v1", "mobilenet_v3_small", "regnet_y_400mf", "resnet18_fpn"),
            *("efficientnet_b0", "efficientnet_lite0", "shufflenet_v2_x0_5"),
        ],
    )
    def test_one_pixel_will_do_for_most(self, name):
        outputs_of(on_meta(name).eval(), torch.empty(2, 3, 1, 1, device="meta"))

    def test_a_fused_network_still_says_so(self):
        import fastnets

        fast = fastnets.optimize(create_model("squeezenet1_1", num_classes=2).eval())
        with pytest.raises(ValueError, match="SqueezeNet: images of 16×17 pixels are too small"):
            fast(torch.randn(1, 3, 16, 17))

    def test_a_new_first_layer_says_what_it_takes(self):
        model = create_model("resnet18").eval()
        model.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
        with torch.no_grad():
            assert model(torch.randn(1, 1, 32, 32)).shape == (1, 1000)


def test_scaled_widths():
    for name in ("mobilenet_v3_small", "mnasnet1_0"):
        with pytest.raises(ValueError, match="width_mult must be above 0, got 0"):
            on_meta(name, width_mult=0)
    half = on_meta("mobilenet_v3_large", width_mult=0.5)
    theirs = stock_network("mobilenet_v3_large", width_mult=0.5)
    assert [v.shape for v in half.state_dict().values()] == [v.shape for v in theirs.state_dict().values()]
