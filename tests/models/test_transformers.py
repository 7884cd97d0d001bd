"""The Transformers: outputs, gradients and keys of the libraries whose checkpoints they load."""

import copy

import pytest
import torch
from torch import nn

import fastnets
from fastnets.fused.capture import capture
from fastnets.models import (
    CheckpointError,
    KeyValueCache,
    LlamaDecoder,
    create_model,
    example_inputs,
    load_weights,
)
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


class TestLlama:
    SMALL = {"width": 256, "heads": 16, "key_heads": 2, "head_dim": 16, "hidden": 96, "depth": 2}
    SMALL |= {"vocabulary": 60, "max_length": 24}

    def small(self, **options):
        torch.manual_seed(0)
        return randomised(create_model("llama_small", **self.SMALL, **options)).eval()

    def test_the_70b_is_these_rules_at_another_size(self):
        with torch.device("meta"):
            large = LlamaDecoder(width=8192, depth=80)
            three = LlamaDecoder(width=8192, depth=80, vocabulary=128_256)
        assert sum(p.numel() for p in large.parameters()) == 68_976_648_192
        assert sum(p.numel() for p in three.parameters()) == 70_553_706_496
        shapes = {key: tuple(value.shape) for key, value in large.state_dict().items()}
        layer = "model.layers.79."
        assert {key.removeprefix(layer): s for key, s in shapes.items() if key.startswith(layer)} == {
            "self_attn.q_proj.weight": (8192, 8192),
            "self_attn.k_proj.weight": (1024, 8192),
            "self_attn.v_proj.weight": (1024, 8192),
            "self_attn.o_proj.weight": (8192, 8192),
            "mlp.gate_proj.weight": (28672, 8192),
            "mlp.up_proj.weight": (28672, 8192),
            "mlp.down_proj.weight": (8192, 28672),
            "input_layernorm.weight": (8192,),
            "post_attention_layernorm.weight": (8192,),
        }
        rest = {key: s for key, s in shapes.items() if not key.startswith("model.layers.")}
        assert rest == {
            "model.embed_tokens.weight": (32000, 8192),
            "model.norm.weight": (8192,),
            "lm_head.weight": (32000, 8192),
        }

    @torch.no_grad()
    def test_it_is_metas_formulas_on_metas_checkpoint(self):
        """Another road: Meta's names, rotation of complex numbers, heads repeated, softmax written out."""
        torch.manual_seed(0)
        shapes = self.small().state_dict()
        style = LlamaDecoder.key_styles[1]
        meta = {style.theirs(key): torch.randn_like(value) * 0.06 for key, value in shapes.items()}
        meta = {key: value * 3 + 1 if value.dim() == 1 else value for key, value in meta.items()}
        assert {"layers.1.attention.wk.weight", "tok_embeddings.weight", "output.weight"} < set(meta)
        ours = self.small()
        load_weights(ours, {**meta, "rope.freqs": torch.zeros(8)})
        tokens = torch.randint(60, (2, 9))
        results = [llama_of_meta(meta, tokens, dtype) for dtype in (torch.float64, torch.float32)]
        assert_close_to(*results, ours(tokens))

    @torch.no_grad()
    def test_no_token_sees_a_later_one(self):
        model = self.small()
        tokens = torch.randint(60, (2, 9))
        changed = tokens.clone()
        changed[:, 5] = (changed[:, 5] + 1) % 60
        same = (model(tokens) - model(changed)).abs().amax((0, 2)) < 1e-6
        assert same.tolist() == [place < 5 for place in range(9)]

    @torch.no_grad()
    @pytest.mark.parametrize("optimised", [False, True], ids=["stock", "optimised"])
    @pytest.mark.parametrize("pieces", [(9,), (1,) * 9, (4, 1, 1, 3)], ids=str)
    def test_logits_with_a_cache_are_those_without(self, pieces, optimised):
        model = self.small()
        tokens = torch.randint(60, (2, 9))
        exact, stock = copy.deepcopy(model).double()(tokens), model(tokens)
        if optimised:
            model = fastnets.optimize(model)
        cache = KeyValueCache(model, batch_size=2, max_length=9)
        for layer in cache.layers:
            for stored in layer:
                stored.fill_(float("nan"))  # what is not filled is not read
        logits = torch.cat([model(piece, cache) for piece in tokens.split(pieces, 1)], 1)
        assert cache.length == 9
        assert_close_to(exact, stock, logits)
        with pytest.raises(ValueError, match=r"with those in the cache before: got shape .*lengths 1 to 0"):
            model(tokens[:, :1], cache)

    @torch.no_grad()
    def test_generation_takes_the_likeliest_token_at_every_step(self):
        model = self.small()
        start = torch.randint(60, (2, 5))
        text = model.generate(start, 7)
        assert torch.equal(model.generate(start, 7), text)
        assert torch.equal(fastnets.optimize(model).generate(start, 7), text)
        again = start
        for _ in range(7):
            again = torch.cat([again, model(again)[:, -1:].argmax(2)], 1)
        assert torch.equal(text, again)
        assert torch.equal(model.generate(start, 0), start)

    @torch.no_grad()
    def test_generation_ends_at_the_given_token(self):
        model = self.small()
        start = torch.randint(60, (2, 5))
        text = model.generate(start, 6)
        end = text[0, 6].item()
        ended = model.generate(start, 6, end=end)
        for before, after in zip(text, ended):
            places = (before[5:] == end).nonzero()
            first = 5 + places[0].item() if len(places) else 11
            assert torch.equal(before[:first], after[:first])
            assert (after[first:] == end).all()
        assert (ended[0, 7:] == end).all()

    def test_wrong_sizes_are_named(self):
        for options, message in (
            ({"width": 200}, r"width=200 is not heads=1 of head_dim=128"),
            ({"width": 384, "key_heads": 2}, r"heads=3 does not divide into groups for key_heads=2"),
            ({"width": 15, "head_dim": 15}, r"head_dim=15 is odd"),
        ):
            with pytest.raises(ValueError, match=message):
                create_model("llama_small", vocabulary=8, depth=1, **options)
        model = self.small()
        with pytest.raises(ValueError, match=r"tokens: got shape .*lengths 1 to 24"):
            model(torch.zeros(1, 25, dtype=torch.long))
        with pytest.raises(ValueError, match=r"with room for 20 more: got shape .*lengths 1 to 4"):
            model.generate(torch.zeros(1, 5, dtype=torch.long), 20)
        with pytest.raises(ValueError, match="max_length=25: the network has positions for 1 to 24"):
            KeyValueCache(model, 1, 25)


def llama_of_meta(state, tokens, dtype, heads=16, key_heads=2, head_dim=16):
    """Logits from a checkpoint with Meta's names, as the paper has the formulas."""
    state = {key: value.to(dtype) for key, value in state.items()}
    length = tokens.shape[1]
    bands = 10_000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * bands
    turns = torch.polar(torch.ones_like(angles), angles).to(
        torch.complex(*torch.zeros(2, 1, dtype=dtype)).dtype
    )

    def normed(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def turned(x):  # (N, L, heads, head_dim): neighbours are a complex number
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns[:, None]).flatten(-2)

    x = state["tok_embeddings.weight"][tokens]
    for index in range(2):
        layer = {k.removeprefix(f"layers.{index}."): v for k, v in state.items()}
        states = normed(x, layer["attention_norm.weight"])
        query, key, value = (
            (states @ layer[f"attention.w{name}.weight"].T).unflatten(2, (-1, head_dim)) for name in "qkv"
        )
        key, value = (t.repeat_interleave(heads // key_heads, 2) for t in (turned(key), value))
        scores = torch.einsum("nqhd,nkhd->nhqk", turned(query), key) / head_dim**0.5
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
        mixed = torch.einsum("nhqk,nkhd->nqhd", scores.softmax(3), value).flatten(2)
        x = x + mixed @ layer["attention.wo.weight"].T
        states = normed(x, layer["ffn_norm.weight"])
        gate, up = (states @ layer[f"feed_forward.w{number}.weight"].T for number in (1, 3))
        x = x + (gate * gate.sigmoid() * up) @ layer["feed_forward.w2.weight"].T
    return normed(x, state["norm.weight"]) @ state["output.weight"].T


def inlined(module):
    return nn.Sequential.forward if type(module) is nn.Sequential else None


@pytest.mark.parametrize(
    "name",
    [
        "vit_ti_16",
        "eva02_b_14",
        "swin_t",
        "minilm_l6",
        "transformer",
        "time_series_transformer",
        "llama_small",
    ],
)
def test_every_container_of_ours_can_be_captured(name):
    model = create_model(name)
    for training in (False, True):
        for path, module in model.named_modules():
            if type(module).__module__.startswith("fastnets.models"):
                captured = capture(module, training=training, inline=inlined)
                assert len(captured.graph.nodes) > 1, path


@torch.no_grad()
@pytest.mark.parametrize(
    "name, options",
    [
        ("vit_ti_16", {}),
        ("eva02_b_14", {"depth": 1}),
        ("swin_t", {}),
        ("minilm_l6", {}),
        ("time_series_transformer", {}),
        ("llama_small", {"depth": 2}),
    ],
)
def test_optimised_answers_are_stocks(name, options):
    model = create_model(name, **options).eval()
    inputs = example_inputs(name, generator=torch.Generator().manual_seed(0))
    exact = copy.deepcopy(model).double()(*(x.double() if x.is_floating_point() else x for x in inputs))
    assert_close_to(exact, model(*inputs), fastnets.optimize(model)(*inputs))


@pytest.mark.parametrize(
    "name, options",
    [
        ("eva02_b_14", {"heads": 2, "image_size": 28, "num_classes": 5}),
        ("llama_small", {"heads": 4, "key_heads": 2, "head_dim": 16, "vocabulary": 60, "max_length": 9}),
    ],
)
@torch.no_grad()
def test_our_kernels_serve_small_ones(name, options, lane):
    torch.manual_seed(0)
    model = randomised(create_model(name, width=64, hidden=96, depth=1, **options)).eval()
    texts = name == "llama_small"
    x = torch.randint(60, (2, 9)) if texts else torch.randn(1, 3, 28, 28)
    exact, stock = copy.deepcopy(model).double()(x if texts else x.double()), model(x)
    fast = fastnets.optimize(model, backend="triton").to(lane.device)
    with lane:
        outs = [fast(lane.put(x))]
        if texts:
            cache = KeyValueCache(fast, 2)
            outs.append(torch.cat([fast(lane.put(part), cache) for part in x.split((4, 1, 4), 1)], 1))
    for out in outs:
        assert_close_to(exact, stock, out)
