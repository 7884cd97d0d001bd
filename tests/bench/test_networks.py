"""Networks by name, and the statistics that untrained ones are given."""

import pytest
import torch
from torch import nn

from fastnets.bench import networks
from fastnets.bench.networks import Network, UnknownNetwork, settle_batch_norms


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet5", "resnet50"),
        ("mobilenetv2", "mobilenet_v2"),
        ("torchvision:resnet5", "torchvision:resnet50"),
        ("torchvsion:resnet50", "not a source of networks"),
        ("timm:resnet_18", "timm:resnet18"),
        ("zzz", "no name is near"),
    ],
)
def test_an_unknown_name_suggests_near_ones(name, near):
    if name.startswith(("timm:", "torchvision:")):
        pytest.importorskip(name.partition(":")[0])
    with pytest.raises(UnknownNetwork, match=near):
        networks.load(name)


def test_a_missing_library_says_how_to_get_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(networks.MissingPackage, match=r"pip install 'fastnets\[vision\]'"):
        networks.load("timm:resnet18")


def test_lists():
    assert "resnet50" in networks.list_names()
    assert networks.list_names("resnet1??") == ["resnet101", "resnet152"]
    assert networks.list_names("nothing*") == []


@pytest.mark.parametrize("source", ["torchvision", "timm"])
def test_lists_of_other_libraries(source):
    pytest.importorskip(source)
    names = networks.list_names(f"{source}:resnet1*")
    assert f"{source}:resnet18" in names
    assert all(name.startswith(f"{source}:resnet1") for name in names)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("lenet5", (1, 28, 28)), ("torchvision:resnet18", (3, 224, 224)), ("timm:resnet18", (3, 224, 224))],
)
def test_load_gives_an_eval_network_and_its_input(name, shape):
    source, _ = networks.split_name(name)
    if source != "fastnets":
        pytest.importorskip(source)
    network = networks.load(name, num_classes=7)
    assert not network.model.training
    assert network.input_shape == shape
    x = network.inputs(2, dtype=torch.float32, device="cpu")
    assert x.shape == (2, *shape)
    with torch.no_grad():
        assert network.model(x).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "shapes", "dtype"),
    [
        ("minilm_l6", [(2, 128)], torch.int64),
        ("transformer", [(2, 64), (2, 64)], torch.int64),
        ("time_series_transformer", [(2, 96, 7)], torch.bfloat16),
        ("llama_small", [(2, 128)], torch.int64),
    ],
)
def test_inputs_are_what_the_network_takes(name, shapes, dtype, monkeypatch):
    monkeypatch.setattr(networks, "create_model", lambda name, weights: nn.Identity())
    network = networks.load(name)
    x = network.inputs(2, dtype=torch.bfloat16, device="meta", seed=3)
    inputs = networks.arguments(x)
    assert [tuple(t.shape) for t in inputs] == shapes
    assert {t.dtype for t in inputs} == {dtype}
    assert isinstance(x, torch.Tensor) == (len(shapes) == 1)
    assert networks.describe(x).count("×") == sum(len(shape) - 1 for shape in shapes)
    with pytest.raises(ValueError, match=f"--img-size 96: {name} takes no images"):
        networks.load(name, img_size=96)


def test_same_seed_same_network():
    one, same, other = (networks.load("lenet5", seed=seed).model.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


def test_weights_come_from_a_checkpoint(tmp_path):
    values = networks.load("lenet5", seed=5).model.state_dict()
    torch.save(values, tmp_path / "lenet5.pth")
    network = networks.load("lenet5", weights=tmp_path / "lenet5.pth", seed=6)
    assert network.weights == str(tmp_path / "lenet5.pth")
    assert all(torch.equal(values[key], value) for key, value in network.model.state_dict().items())


def test_torchvision_weights_come_from_a_checkpoint(tmp_path):
    pytest.importorskip("torchvision")
    values = networks.load("torchvision:resnet18", seed=5).model.state_dict()
    torch.save(values, tmp_path / "resnet18.pth")
    network = networks.load("torchvision:resnet18", weights=tmp_path / "resnet18.pth", seed=6)
    assert all(torch.equal(values[key], value) for key, value in network.model.state_dict().items())


@pytest.mark.parametrize("options", [{"weights": "a.pth", "pretrained": True}, {"img_size": 0}])
def test_options_that_contradict(options):
    with pytest.raises(ValueError):
        networks.load("lenet5", **options)


def test_own_networks_have_no_weights_to_download():
    with pytest.raises(ValueError, match="--weights FILE, or torchvision:resnet18"):
        networks.load("resnet18", pretrained=True)


def test_images_are_repeated_to_fill_a_batch():
    images = torch.arange(3.0).view(3, 1, 1, 1)
    network = Network("net", nn.Identity(), (1, 1, 1), "none", images=images)
    batch = network.inputs(5, dtype=torch.float64, device="cpu")
    assert batch.flatten().tolist() == [0, 1, 2, 0, 1]
    assert batch.dtype == torch.float64


def test_settled_batch_norms_normalise_and_have_affine_values_of_their_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, momentum=0.3), nn.ReLU(), nn.Dropout(0.5))
    model.eval()
    settle_batch_norms(model, (3, 32, 32))
    norm = model[1]
    assert not any(module.training for module in model.modules())
    assert norm.momentum == 0.3
    assert norm.weight.std() > 0.1
    assert norm.bias.std() > 0.05
    with torch.no_grad():
        y = model[:2](torch.randn(64, 3, 32, 32))
    normalised = (y - norm.bias.view(-1, 1, 1)) / norm.weight.view(-1, 1, 1)
    assert normalised.mean(dim=(0, 2, 3)).abs().max() < 0.1
    torch.testing.assert_close(normalised.std(dim=(0, 2, 3)), torch.ones(16), rtol=0.1, atol=0)


def test_settling_leaves_a_network_without_batch_norm_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    settle_batch_norms(model, (3, 8, 8))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
