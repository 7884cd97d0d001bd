"""The Transformers: outputs, gradients and keys of the libraries whose checkpoints they load."""

import copy

import pytest
import torch

from fastnets.models import CheckpointError, create_model
from tests.accuracy import assert_close_to


def randomised(model):
    """The network with weights that leave no layer the identity, a bias zero or a scale one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                bound = (3 / parameter[0].numel()) ** 0.5
                parameter.uniform_(-bound, bound, generator=generator)
            else:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3, generator=generator))
    return model


def assert_same_network(theirs, ours, *inputs, names=lambda key: key):
    """Outputs and gradients by error ratio against theirs in float64, in evaluation.

    names: our name for a parameter of theirs.
    """
    results = []
    for model, dtype in ((theirs, torch.float64), (theirs, torch.float32), (ours, torch.float32)):
        model = copy.deepcopy(model).to(dtype).eval()
        out = model(*(x.to(dtype) if x.is_floating_point() else x for x in inputs))
        out.square().sum().backward()
        rename = str if len(results) == 2 else names
        grads = {rename(key): p.grad for key, p in model.named_parameters() if p.grad is not None}
        results.append((out.detach(), grads))
    (out64, grads64), (out_theirs, grads_theirs), (out_ours, grads_ours) = results
    assert_close_to(out64, out_theirs, out_ours)
    assert grads64.keys() == grads_ours.keys()
    for key, grad in grads_ours.items():
        assert_close_to(grads64[key], grads_theirs[key], grad, ratio=3)


class TestVisionTransformer:
    SMALL = {"image_size": 32, "depth": 3, "num_classes": 7}

    def test_torchvisions_checkpoint_loads_and_gives_its_outputs(self, tmp_path):
        tv = pytest.importorskip("torchvision.models.vision_transformer", reason="the reference here")
        theirs = randomised(tv.VisionTransformer(32, 16, 3, 3, 192, 768, num_classes=7))
        torch.save(theirs.state_dict(), tmp_path / "vit.pth")
        ours = create_model("vit_ti_16", weights=tmp_path / "vit.pth", **self.SMALL)
        assert_same_network(theirs, ours, torch.randn(2, 3, 32, 32), names=ours.key_styles[0].ours)
        old = {
            key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): value
            for key, value in theirs.state_dict().items()
        }
        again = create_model("vit_ti_16", weights=old, **self.SMALL)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters()))

    @pytest.mark.parametrize(
        "name, timms",
        [
            ("vit_ti_16", "vit_tiny_patch16_224"),
            ("vit_s_16", "vit_small_patch16_224"),
            ("vit_b_16", "vit_base_patch16_224"),
            ("vit_b_32", "vit_base_patch32_224"),
            ("vit_l_16", "vit_large_patch16_224"),
            ("vit_h_14", "vit_huge_patch14_224"),
            ("dinov2_s_14", "vit_small_patch14_dinov2"),
        ],
    )
    def test_keys_and_shapes_are_timms(self, name, timms):
        timm = pytest.importorskip("timm", reason="timm is the reference here")
        with torch.device("meta"):
            ours = create_model(name)
            theirs = timm.create_model(timms, num_classes=getattr(ours.head, "out_features", 0))
        assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
            (k, v.shape) for k, v in theirs.state_dict().items()
        ]

    @pytest.mark.parametrize("name", ["vit_b_16", "vit_b_32", "vit_l_16", "vit_h_14"])
    def test_torchvisions_keys_are_all_known(self, name):
        models = pytest.importorskip("torchvision.models", reason="torchvision is the reference here")
        with torch.device("meta"):
            theirs, ours = getattr(models, name)().state_dict(), create_model(name)
        style = ours.key_styles[0]
        own = {key: value.shape for key, value in ours.state_dict().items()}
        assert {style.ours(key): value.shape for key, value in theirs.items()} == own
        assert {style.theirs(key) for key in own} == set(theirs)

    @pytest.mark.parametrize(
        "name, timms, size", [("vit_ti_16", "vit_tiny_patch16_224", 32), ("dinov2_s_14", None, 42)]
    )
    def test_outputs_and_gradients_are_timms(self, name, timms, size):
        timm = pytest.importorskip("timm", reason="timm is the reference here")
        timms = timms or "vit_small_patch14_dinov2"
        theirs = randomised(timm.create_model(timms, img_size=size, depth=3, num_classes=7))
        options = self.SMALL | {"image_size": size}
        ours = create_model(name, weights=theirs.state_dict(), **options)
        assert_same_network(theirs, ours, torch.randn(2, 3, size, size))

    @torch.no_grad()
    def test_features_are_timms(self):
        timm = pytest.importorskip("timm", reason="timm is the reference here")
        theirs = randomised(timm.create_model("vit_small_patch14_dinov2", img_size=42, depth=2)).eval()
        ours = create_model("dinov2_s_14", image_size=42, depth=2, weights=theirs.state_dict()).eval()
        x = torch.randn(2, 3, 42, 42)
        assert ours.forward_features(x).shape == (2, 10, 384)
        torch.testing.assert_close(ours.forward_features(x), theirs.forward_features(x))
        torch.testing.assert_close(ours(x), theirs(x))

    def test_initialisation(self):
        torch.manual_seed(0)
        model = create_model("vit_s_16", depth=2)
        query = model.blocks[1].attn.qkv.weight[:384]
        assert query.abs().max().item() == pytest.approx((6 / (2 * 384)) ** 0.5, rel=0.01)
        assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.02)
        assert model.patch_embed.proj.weight.std().item() == pytest.approx((1 / 768) ** 0.5, rel=0.02)
        assert not model.cls_token.any()
        assert (create_model("dinov2_s_14", depth=1, image_size=28).blocks[0].ls2.gamma == 1e-5).all()

    def test_wrong_images_are_named(self):
        model = create_model("vit_ti_16", **self.SMALL)
        wanted = r"patch_embed\.proj: got images of shape .*positions for \(N, 3, 32, 32\)"
        for shape in ((1, 3, 48, 48), (1, 3, 16, 16), (1, 1, 32, 32), (3, 32, 32)):
            with pytest.raises(ValueError, match=wanted):
                model(torch.randn(shape))
        with pytest.raises(ValueError, match="image_size=40 is not a multiple of the patches' 16"):
            create_model("vit_ti_16", image_size=40)
        with pytest.raises(ValueError, match=r"image_size=8 .*the least is 16"):
            create_model("vit_ti_16", image_size=8)
        with pytest.raises(ValueError, match="width=100 does not divide into heads=3"):
            create_model("vit_ti_16", width=100)

    def test_weights_of_another_variant_quote_the_checkpoints_own_keys(self):
        tv = pytest.importorskip("torchvision.models.vision_transformer", reason="the reference here")
        state = tv.VisionTransformer(32, 16, 4, 3, 192, 768, num_classes=7).state_dict()
        with pytest.raises(CheckpointError) as caught:
            create_model("vit_ti_16", weights=state, **self.SMALL)
        message = str(caught.value)
        assert "12 unexpected (encoder.layers.encoder_layer_3.ln_1.weight, " in message
        assert message.count("encoder.layers.encoder_layer_3") == 10
        assert "and 2 more" in message
        with pytest.raises(CheckpointError, match=r"heads\.head\.weight \[7, 192\] for \[9, 192\]"):
            create_model("vit_ti_16", weights=state, **self.SMALL | {"num_classes": 9, "depth": 4})
