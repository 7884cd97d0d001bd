"""The networks themselves: parameter counts, keys and outputs of torchvision's and timm's, image sizes."""

import pytest
import torch
from torch import nn

from fastnets.models import create_model, input_size, list_models, load_weights

# name: exact count of trainable parameters
PARAMETERS = {
    "alexnet": 61_100_840,
    "alexnet_2012": 60_965_224,
    "convnext_base": 88_591_464,
    "convnext_large": 197_767_336,
    "convnext_small": 50_223_688,
    "convnext_tiny": 28_589_128,
    "convnext_xlarge": 350_196_968,
    "densenet121": 7_978_856,
    "densenet161": 28_681_000,
    "densenet169": 14_149_480,
    "densenet201": 20_013_928,
    "dinov2_s_14": 22_056_192,
    "efficientnet_b0": 5_288_548,
    "efficientnet_b1": 7_794_184,
    "efficientnet_b2": 9_109_994,
    "efficientnet_b3": 12_233_232,
    "efficientnet_b4": 19_341_616,
    "efficientnet_b5": 30_389_784,
    "efficientnet_b6": 43_040_704,
    "efficientnet_b7": 66_347_960,
    "efficientnet_lite0": 4_652_008,
    "efficientnet_v2_s": 21_458_488,
    "eva02_b_14": 86_527_720,
    "googlenet": 6_624_904,
    "googlenet_2014": 6_998_552,
    "inception_v3": 23_834_568,
    "lenet5": 61_706,
    "lenet5_1998": 60_000,
    "lenet5_relu": 61_706,
    "llama_small": 172_508_160,
    "mnasnet0_5": 2_218_512,
    "mnasnet1_0": 4_383_312,
    "mobilenet_v1": 4_231_976,
    "minilm_l6": 22_713_216,
    "mobilenet_v2": 3_504_872,
    "mobilenet_v3_large": 5_483_032,
    "mobilenet_v3_small": 2_542_856,
    "nin": 7_595_176,
    "nin_teaching": 7_439_608,
    "regnet_x_400mf": 5_495_976,
    "regnet_y_400mf": 4_344_144,
    "resnet18": 11_689_512,
    "resnet18_fpn": 13_783_616,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet50_fpn": 26_852_416,
    "resnet101": 44_549_160,
    "resnet101_fpn": 45_844_544,
    "resnet152": 60_192_808,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "shufflenet_v2_x0_5": 1_366_792,
    "shufflenet_v2_x1_0": 2_278_604,
    "squeezenet1_0": 1_248_424,
    "squeezenet1_1": 1_235_496,
    "swin_t": 28_288_354,
    "time_series_transformer": 9_612_551,
    "transformer": 63_082_496,
    "transformer_encoder": 18_914_304,
    "transformer_encoder_prenorm": 18_915_328,
    "vgg11": 132_863_336,
    "vgg11_bn": 132_868_840,
    "vgg13": 133_047_848,
    "vgg13_bn": 133_053_736,
    "vgg16": 138_357_544,
    "vgg16_bn": 138_365_992,
    "vgg19": 143_667_240,
    "vgg19_bn": 143_678_248,
    "vit_b_16": 86_567_656,
    "vit_b_32": 88_224_232,
    "vit_h_14": 632_045_800,
    "vit_l_16": 304_326_632,
    "vit_s_16": 22_050_664,
    "vit_ti_16": 5_717_416,
    "wide_resnet50_2": 68_883_240,
    "wide_resnet101_2": 126_886_696,
}
# Nobody else's keys; test_transformers.py has the Transformers' own.
OWN_KEYS = ("lenet", "alexnet_2012", "googlenet_2014", "nin", "vit", "dinov2", "eva02")
OWN_KEYS += ("minilm", "transformer", "llama", "time_series")
WITH_STOCK_KEYS = [name for name in PARAMETERS if not name.startswith(OWN_KEYS)]
# What timm calls those whose keys are its own, and what it drops only where it is asked to.
TIMM = {
    "convnext_xlarge": ("convnext_xlarge", {"drop_path_rate": 0.5}),
    "efficientnet_lite0": ("tf_efficientnet_lite0", {"drop_rate": 0.2}),
    "mobilenet_v1": ("mobilenetv1_100", {}),
}


def on_meta(name, **options):
    with torch.device("meta"):
        return create_model(name, **options)


def stock_network(name, **options):
    """torchvision's network, or timm's, on the meta device."""
    with torch.device("meta"):
        if name in TIMM:
            timm = pytest.importorskip("timm", reason="timm is the reference here")
            theirs, drops = TIMM[name]
            return timm.create_model(theirs, **drops, **options)
        models = pytest.importorskip("torchvision.models", reason="torchvision is the reference here")
        if name.endswith("_fpn"):
            build = pytest.importorskip("torchvision.models.detection.backbone_utils").resnet_fpn_backbone
            options = {"norm_layer": nn.BatchNorm2d, "trainable_layers": 5, **options}
            return build(backbone_name=name.removesuffix("_fpn"), weights=None, **options)
        if name in ("googlenet", "inception_v3"):
            options = {"init_weights": False, "aux_logits": False, **options}
        # RegNet's widths come out of a computation with tensors, which meta tensors cannot do.
        with torch.device("cpu" if name.startswith("regnet") else "meta"):
            return getattr(models, name)(**options)


def same_network_twice(name, **options):
    """The stock one and ours, with the same weights, and statistics that leave no layer the identity."""
    stock = stock_network(name, **options).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for key, value in stock.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.dim() > 1:
            bound = (6 / value[0].numel()) ** 0.5
            value.uniform_(-bound, bound, generator=generator)
        elif value.is_floating_point():
            value.uniform_(-0.2, 0.2, generator=generator).add_("weight" in key)
        else:
            value.zero_()
    ours = on_meta(name, **options).to_empty(device="cpu")
    load_weights(ours, stock.state_dict())
    return stock, ours


def test_every_listed_model_is_counted_here():
    assert sorted(PARAMETERS) == sorted(list_models())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    assert sum(p.numel() for p in on_meta(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", WITH_STOCK_KEYS)
def test_state_dict_is_the_stock_ones(name):
    theirs = stock_network(name).state_dict()
    ours = on_meta(name).state_dict()
    assert [(k, v.shape, v.dtype) for k, v in ours.items()] == [
        (k, v.shape, v.dtype) for k, v in theirs.items()
    ]


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "mobilenet_v2"])
@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients_are_torchvisions(name, training):
    stock, ours = (model.train(training) for model in same_network_twice(name, num_classes=7))
    x = torch.randn(2, 3, 48, 33, generator=torch.Generator().manual_seed(1))
    outputs = []
    for model in (stock, ours):
        torch.manual_seed(2)  # dropout draws
        out = model(x)
        out.square().sum().backward()
        outputs.append(out)
    assert torch.equal(*outputs)
    for (key, theirs), mine in zip(stock.named_parameters(), ours.parameters()):
        assert torch.equal(theirs.grad, mine.grad), key
    for key, value in stock.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key]), key


def test_mobilenet_width_is_torchvisions():
    for width in (0.35, 0.5, 0.75, 1.4):
        stock, ours = (model.eval() for model in same_network_twice("mobilenet_v2", width_mult=width))
        x = torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(stock(x), ours(x)), width


def test_resnet_options():
    ours = create_model("resnet50", zero_init_residual=True, in_channels=1, num_classes=3)
    assert not ours.layer1[0].bn3.weight.any()
    assert ours.layer1[0].bn1.weight.all()
    assert ours.eval()(torch.randn(1, 1, 32, 32)).shape == (1, 3)
    wider = on_meta("resnet50", width_per_group=32)
    assert wider.layer1[0].conv2.weight.shape == (32, 32, 3, 3)


@pytest.mark.parametrize("size", [(1, 1), (33, 47), (64, 65)])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_any_image_size(name, size):
    model = create_model(name, num_classes=5).eval()
    with torch.no_grad():
        out = model(torch.randn(2, 3, *size))
    assert out.shape == (2, 5)
    assert out.isfinite().all()


@pytest.mark.parametrize("name", ["alexnet", "vgg11_bn", "wide_resnet50_2"])
def test_outputs_of_large_networks_are_torchvisions(name):
    stock, ours = same_network_twice(name, num_classes=7)
    x = torch.randn(2, 3, 75, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for training in (False, True):
            outputs = []
            for model in (stock, ours):
                torch.manual_seed(2)  # dropout draws
                outputs.append(model.train(training)(x))
            assert torch.equal(*outputs)


class TestAlexNet2012:
    def test_shapes_and_first_layer(self):
        model = create_model("alexnet_2012", num_classes=3).eval()
        with torch.no_grad():
            first = model.features[0](torch.randn(1, 3, 227, 227))
            assert first.shape == (1, 96, 55, 55)
            assert model.features[1:](first).shape == (1, 256, 6, 6)

    def test_response_norm_is_the_papers(self):
        norm = on_meta("alexnet_2012").features[2]
        x = torch.arange(1.0, 8).reshape(1, 7, 1, 1)
        # Channel 3 (value 4) sees the values 2 to 6, channel 0 (value 1) those that exist: 1, 2 and 3.
        expected = {
            3: 4 / (2 + 1e-4 * (4 + 9 + 16 + 25 + 36)) ** 0.75,
            0: 1 / (2 + 1e-4 * (1 + 4 + 9)) ** 0.75,
        }
        for channel, value in expected.items():
            assert norm(x)[0, channel].item() == pytest.approx(value, rel=1e-6)

    def test_initialisation(self):
        model = create_model("alexnet_2012", num_classes=3)
        biases = [m.bias.unique().tolist() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert biases == [[0], [1], [0], [1], [1], [1], [1], [0]]
        assert model.features[8].weight.std().item() == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize("name", ["nin", "nin_teaching"])
@pytest.mark.parametrize("size", [(39, 39), (75, 64)])
def test_network_in_network(name, size):
    torch.manual_seed(0)
    model = create_model(name, num_classes=5).eval()
    assert not any(isinstance(m, nn.Linear) for m in model.modules())
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        out, maps = model(x), model.features(x)
    assert out.shape == (2, 5)
    torch.testing.assert_close(out, maps.mean((2, 3)))
    assert maps.std() > 0.01  # He initialisation carries the signal through twelve layers


@pytest.mark.parametrize(
    "name",
    [
        "alexnet_2012",
        "lenet5",
        "lenet5_1998",
        "mobilenet_v2",
        "nin",
        "resnet18",
        "vgg11",
        "densenet121",
        "efficientnet_lite0",
        "googlenet",
        "shufflenet_v2_x0_5",
    ],
)
def test_networks_can_be_traced(name):
    model = on_meta(name).eval()
    traced = torch.fx.symbolic_trace(model)
    size = input_size(name)
    x = torch.empty(2, *size, device="meta")
    assert traced(x).shape == model(x).shape == (2, 10 if name.startswith("lenet") else 1000)
    if name.startswith("resnet"):
        with pytest.raises(ValueError, match="a traced network runs all its blocks"):
            traced(x, skip=(1,))
    if name.startswith("lenet"):  # the traced network still names a wrong size
        with pytest.raises(ValueError, match="give images of"):
            traced(torch.empty(2, *size, device="meta").repeat(1, 1, 2, 2))


def test_he_initialisation_keeps_gradients_in_scale():
    torch.manual_seed(0)
    conv = create_model("resnet18").layer3[0].conv2
    wanted = (2 / (256 * 9)) ** 0.5  # fan-out
    assert abs(conv.weight.std().item() / wanted - 1) < 0.02
    conv = create_model("mobilenet_v2").features[18][0]
    assert abs(conv.weight.std().item() / (2 / 1280) ** 0.5 - 1) < 0.02


class TestLeNet:
    @pytest.mark.parametrize("name", list_models("lenet5*"))
    def test_forward_and_gradients(self, name):
        torch.manual_seed(0)
        model = create_model(name)
        x = torch.randn(4, *input_size(name))
        out = model(x)
        assert out.shape == (4, 10)
        nn.functional.cross_entropy(out, torch.tensor([1, 2, 3, 4])).backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad.abs().sum() > 0, key

    def test_teaching_form_is_the_written_out_network(self):
        torch.manual_seed(0)
        ours = create_model("lenet5", activation="tanh", pool="average")
        layers = [m for m in ours.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        written_out = nn.Sequential(
            *(layers[0], nn.Tanh(), nn.AvgPool2d(2), layers[1], nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()),
            *(layers[2], nn.Tanh(), layers[3], nn.Tanh(), layers[4]),
        )
        x = torch.randn(3, 1, 28, 28)
        assert torch.equal(ours(x), written_out(x))

    def test_switches(self):
        model = create_model("lenet5_relu")
        assert isinstance(model.act1, nn.ReLU)
        assert isinstance(model.pool2, nn.MaxPool2d)
        with pytest.raises(ValueError, match="pool must be one of average, max, got 'mean'"):
            create_model("lenet5", pool="mean")
        with pytest.raises(ValueError, match=r"activation must be one of .*relu, got 'gelu'"):
            create_model("lenet5", activation="gelu")

    @pytest.mark.parametrize("name, size", [("lenet5", 32), ("lenet5_1998", 36)])
    def test_wrong_image_size_is_named(self, name, size):
        wanted = input_size(name)[1]
        with pytest.raises(ValueError, match=f"give images of {wanted}×{wanted} pixels"):
            create_model(name)(torch.randn(1, 1, size, size))

    def test_original_counts_by_layer(self):
        model = create_model("lenet5_1998")
        counts = {
            name: sum(p.numel() for p in getattr(model, name).parameters())
            for name in ("c1", "s2", "c3", "s4", "c5", "f6", "output")
        }
        assert counts == {"c1": 156, "s2": 12, "c3": 1516, "s4": 32, "c5": 48120, "f6": 10164, "output": 0}

    def test_c3_sees_only_its_inputs(self):
        from fastnets.models.lenet import C3_SEES

        c3 = create_model("lenet5_1998").c3.double()
        x = torch.randn(1, 6, 14, 14, dtype=torch.float64)
        before = c3(x)
        for channel in range(6):
            changed = x.clone()
            changed[:, channel] += 1
            moved = (c3(changed) - before).abs().amax((0, 2, 3)) > 1e-9
            assert moved.tolist() == [channel in inputs for inputs in C3_SEES]
        # Against one small convolution per output map.
        position = 0
        for k, inputs in enumerate(C3_SEES):
            weight = c3.weight[position : position + len(inputs)]
            position += len(inputs)
            alone = nn.functional.conv2d(x[:, list(inputs)], weight[None], c3.bias[k : k + 1])
            torch.testing.assert_close(before[:, k : k + 1], alone)

    def test_subsampling_on_integers(self):
        from fastnets.models.lenet import Subsampling

        pool = Subsampling(1)
        with torch.no_grad():
            pool.weight.fill_(2)
            pool.bias.fill_(-1)
        x = torch.arange(16.0).reshape(1, 1, 4, 4)
        assert pool(x).tolist() == [[[[2 * 10 - 1, 2 * 18 - 1], [2 * 42 - 1, 2 * 50 - 1]]]]

    def test_output_codes_are_distances_to_ten_drawings(self):
        from fastnets.models.lenet import CodeDistance

        output = CodeDistance(84, 12)
        assert output.codes.shape == (12, 84)
        assert set(output.codes.flatten().tolist()) == {-1.0, 1.0}
        scores = output(output.codes)
        assert (scores.diagonal() == 0).all()  # each code is its own class's
        assert (scores - torch.eye(12) < 0).all()  # and no other's
        assert scores[0, 1] == -4 * (output.codes[0] != output.codes[1]).sum()
