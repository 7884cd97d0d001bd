"""The Transformers: outputs, gradients and keys of the libraries whose checkpoints they load."""

import copy

import pytest
import torch
from torch import nn

import fastnets
from fastnets.fused.capture import capture
from fastnets.models import CheckpointError, create_model, example_inputs
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


class TestEva02:
    SMALL = {"depth": 2, "num_classes": 7}

    def test_keys_shapes_and_parameters_are_timms(self):
        timm = pytest.importorskip("timm", reason="timm is the reference here")
        for timms, size in (("eva02_base_patch14_224", 224), ("eva02_base_patch14_448", 448)):
            with torch.device("meta"):
                ours = create_model("eva02_b_14", image_size=size)
                theirs = timm.create_model(timms, num_classes=1000)
            assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
                (k, v.shape) for k, v in theirs.state_dict().items()
            ]

    @pytest.mark.parametrize("size", [28, 70])  # the grid's coordinates are scaled by 8 and by 3.2
    def test_outputs_and_gradients_are_timms(self, size):
        timm = pytest.importorskip("timm", reason="timm is the reference here")
        theirs = timm.create_model("eva02_base_patch14_224", img_size=size, depth=2, num_classes=7)
        randomised(theirs)
        ours = create_model("eva02_b_14", image_size=size, weights=theirs.state_dict(), **self.SMALL)
        assert_same_network(theirs, ours, torch.randn(2, 3, size, size))

    def test_the_last_layers_of_deep_branches_start_small(self):
        torch.manual_seed(0)
        blocks = create_model("eva02_b_14", image_size=28, depth=8).blocks
        assert blocks[7].attn["proj"].weight.std().item() == pytest.approx(0.02 / 4, rel=0.02)
        assert blocks[7].mlp["fc2"].weight.std().item() == pytest.approx(0.02 / 4, rel=0.02)
        assert blocks[7].mlp["fc1_g"].weight.std().item() == pytest.approx(0.02, rel=0.02)

    @torch.no_grad()
    def test_blocks_can_be_left_out(self):
        model = create_model("eva02_b_14", image_size=28, **self.SMALL).eval()
        x = torch.randn(1, 3, 28, 28)
        one = copy.deepcopy(model)
        del one.blocks[0]
        assert torch.equal(model(x, skip=[0]), one(x))

    def test_heads_that_cannot_turn_are_named(self):
        with pytest.raises(ValueError, match="width=72 does not divide into heads=12"):
            create_model("eva02_b_14", width=72)


class TestSwin:
    @pytest.mark.parametrize("size", [(64, 64), (57, 36), (4, 5)], ids=str)
    def test_outputs_and_gradients_are_torchvisions(self, size):
        swin = pytest.importorskip("torchvision.models.swin_transformer", reason="the reference here")
        shape = {"depths": [2, 2], "num_heads": [3, 6], "num_classes": 5}
        theirs = randomised(swin.SwinTransformer([4, 4], 48, window_size=[7, 7], **shape))
        ours = create_model(
            "swin_t", num_classes=5, width=48, depths=(2, 2), heads=(3, 6), weights=theirs.state_dict()
        )
        assert_same_network(theirs, ours, torch.randn(2, 3, *size))

    def test_wrong_images_are_named(self):
        model = create_model("swin_t", width=6, depths=(1,), heads=(1,))
        for shape in ((1, 3, 3, 8), (1, 1, 8, 8), (3, 8, 8)):
            with pytest.raises(
                ValueError, match=r"features\.0\.0: got .* wanted \(N, 3, H, W\) of at least 4×4"
            ):
                model(torch.randn(shape))


class TestTransformer:
    @pytest.mark.parametrize(
        "name, last", [("transformer_encoder", False), ("transformer_encoder_prenorm", True)]
    )
    def test_keys_are_those_of_the_stock_encoder(self, name, last):
        with torch.device("meta"):
            layer = nn.TransformerEncoderLayer(512, 8, batch_first=True)
            stock = nn.TransformerEncoder(
                layer, 6, nn.LayerNorm(512) if last else None, enable_nested_tensor=False
            )
            ours = create_model(name)
        assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
            (k, v.shape) for k, v in stock.state_dict().items()
        ]

    def test_layers_start_with_different_weights_by_xaviers_rule(self):
        first, second = create_model("transformer_encoder", depth=2).layers
        assert not torch.equal(first.linear1.weight, second.linear1.weight)
        assert first.linear1.weight.abs().max().item() == pytest.approx((6 / 2560) ** 0.5, rel=0.01)

    @torch.no_grad()
    def test_the_decoder_and_the_forecast_never_look_ahead(self):
        torch.manual_seed(0)
        small = {"width": 32, "heads": 2, "hidden": 64, "depth": 2, "max_length": 16}
        model = create_model("transformer", vocabulary=50, **small).eval()
        source, target = torch.randint(50, (2, 2, 9))
        changed = target.clone()
        changed[:, 5] = (changed[:, 5] + 1) % 50
        same = (model(source, target) - model(source, changed)).abs().amax((0, 2)) < 1e-5
        assert same.tolist() == [place < 5 for place in range(9)]
        forecaster = create_model("time_series_transformer", **small).eval()
        x = torch.randn(2, 9, 7)
        changed = x.clone()
        changed[:, 5] += 1
        same = (forecaster(x) - forecaster(changed)).abs().amax((0, 2)) < 1e-5
        assert same.tolist() == [place < 5 for place in range(9)]
        with pytest.raises(ValueError, match=r"lengths 1 to 16"):
            forecaster(torch.randn(1, 17, 7))
        with pytest.raises(ValueError, match=r"target: got shape"):
            model(source, torch.zeros(2, 17, dtype=torch.long))

    @torch.no_grad()
    def test_padding_of_the_source_changes_nothing(self):
        small = {"width": 32, "heads": 2, "hidden": 64, "depth": 2}
        model = create_model("transformer", vocabulary=50, **small).eval()
        source, target = torch.randint(50, (2, 2, 6))
        padded = torch.cat([source, torch.zeros(2, 3, dtype=torch.long)], 1)
        padding = torch.arange(9).expand(2, 9) >= 6
        torch.testing.assert_close(model(padded, target, padding), model(source, target))


def encoder_of(bert):
    """The stock encoder with the weights of a BertEncoder: another road to the same answers."""
    first = bert.encoder["layer"][0]
    width, hidden = first.intermediate["dense"].in_features, first.intermediate["dense"].out_features
    layer = nn.TransformerEncoderLayer(
        width, first.heads, hidden, activation="gelu", layer_norm_eps=1e-12, batch_first=True
    )
    stock = nn.TransformerEncoder(layer, len(bert.encoder["layer"]), enable_nested_tensor=False)
    for theirs, ours in zip(stock.layers, bert.encoder["layer"]):
        projections = list(ours.attention["self"].values())
        pairs = {
            "self_attn.in_proj_weight": torch.cat([p.weight for p in projections]),
            "self_attn.in_proj_bias": torch.cat([p.bias for p in projections]),
        }
        for name, module in (
            ("self_attn.out_proj", ours.attention["output"]["dense"]),
            ("norm1", ours.attention["output"]["LayerNorm"]),
            ("linear1", ours.intermediate["dense"]),
            ("linear2", ours.output["dense"]),
            ("norm2", ours.output["LayerNorm"]),
        ):
            pairs |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
        theirs.load_state_dict(pairs)
    return stock.to(first.intermediate["dense"].weight.dtype).eval()


class TestBert:
    SMALL = {"width": 48, "heads": 4, "hidden": 96, "depth": 2, "vocabulary": 60, "max_length": 20}

    @torch.no_grad()
    def test_it_is_the_stock_encoder_on_embeddings(self):
        bert = randomised(create_model("minilm_l6", **self.SMALL)).eval()
        tokens = torch.randint(60, (2, 9))
        mask = torch.ones(2, 9, dtype=torch.long)
        mask[1, 6:] = 0
        exact = copy.deepcopy(bert).double()
        states = [m.embeddings(tokens, None) for m in (exact, bert)]
        stock64, stock = (
            encoder_of(m)(x, src_key_padding_mask=mask == 0) for m, x in zip((exact, bert), states)
        )
        seen = mask.bool()
        assert_close_to(stock64[seen], stock[seen], bert(tokens, mask)[seen])
        alone = bert.sentence_embedding(tokens[1:, :6])
        torch.testing.assert_close(bert.sentence_embedding(tokens, mask)[1:], alone)
        torch.testing.assert_close(alone.norm(dim=1), torch.ones(1))

    def test_checkpoints_in_every_wrapping(self):
        bert = create_model("minilm_l6", **self.SMALL)
        plain = bert.state_dict()
        positions = torch.arange(20)[None]
        for state in (
            {**plain, "embeddings.position_ids": positions},
            {f"bert.{k}": v for k, v in plain.items()}
            | {"bert.embeddings.position_ids": positions, "cls.predictions.bias": torch.zeros(60)},
        ):
            loaded = create_model("minilm_l6", weights=state, **self.SMALL)
            assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), bert.parameters()))

    def test_too_long_a_text_is_named(self):
        with pytest.raises(ValueError, match=r"tokens: got shape .*lengths 1 to 20"):
            create_model("minilm_l6", **self.SMALL)(torch.zeros(1, 21, dtype=torch.long))


def inlined(module):
    return nn.Sequential.forward if type(module) is nn.Sequential else None


@pytest.mark.parametrize(
    "name", ["vit_ti_16", "eva02_b_14", "swin_t", "minilm_l6", "transformer", "time_series_transformer"]
)
def test_every_container_of_ours_can_be_captured(name):
    model = create_model(name)
    for training in (False, True):
        for path, module in model.named_modules():
            if type(module).__module__.startswith("fastnets.models"):
                captured = capture(module, training=training, inline=inlined)
                assert len(captured.graph.nodes) > 1, path


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_ti_16", "swin_t", "minilm_l6", "time_series_transformer"])
def test_optimised_answers_are_stocks(name):
    model = create_model(name).eval()
    inputs = example_inputs(name, generator=torch.Generator().manual_seed(0))
    exact = copy.deepcopy(model).double()(*(x.double() if x.is_floating_point() else x for x in inputs))
    assert_close_to(exact, model(*inputs), fastnets.optimize(model)(*inputs))
