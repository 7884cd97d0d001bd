"""Names, and weights from files that are right, wrapped, truncated, foreign or not checkpoints at all."""

import collections
import re

import pytest
import torch
from torch import nn

from fastnets.models import CheckpointError, create_model, input_size, list_models, register_model


class TestNames:
    def test_patterns(self):
        assert list_models("resnet*2") == ["resnet152"]
        assert list_models("resnet???") == ["resnet101", "resnet152"]
        assert list_models("*50*") == ["resnet50", "resnet50_fpn", "resnext50_32x4d", "wide_resnet50_2"]
        assert list_models("vgg99*") == []
        assert set(list_models("lenet5*")) < set(list_models())

    @pytest.mark.parametrize("wrong, near", [("resnet51", "resnet50"), ("mobilenetv2", "mobilenet_v2")])
    def test_unknown_name_suggests_near_ones(self, wrong, near):
        with pytest.raises(ValueError, match=f"no model is named '{wrong}': did you mean .*'{near}'"):
            create_model(wrong)

    def test_unknown_name_with_nothing_near(self):
        with pytest.raises(ValueError, match=r"no model is named 'zzz': fastnets.list_models\(\)"):
            input_size("zzz")

    def test_num_classes(self):
        assert create_model("lenet5").fc3.out_features == 10
        assert create_model("resnet18").fc.out_features == 1000
        assert create_model("resnet18", num_classes=4).fc.out_features == 4
        for wrong in (0, -1, 2.0, True, "10"):
            with pytest.raises(ValueError, match="num_classes must be a positive int"):
                create_model("resnet18", num_classes=wrong)

    def test_unknown_option(self):
        with pytest.raises(TypeError, match="depth_mult"):
            create_model("mobilenet_v2", depth_mult=2)

    def test_a_name_is_registered_once(self):
        with pytest.raises(ValueError, match="'resnet18' is registered already"):

            @register_model()
            def resnet18(num_classes=10):
                raise AssertionError("never built")


@pytest.fixture(scope="module")
def lenet():
    torch.manual_seed(3)
    return create_model("lenet5")


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


class TestWeights:
    @pytest.mark.parametrize(
        "wrap",
        [
            lambda state: state,
            lambda state: {"state_dict": state, "epoch": 3, "arch": "lenet5"},
            lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
            lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
            lambda state: {f"_orig_mod.module.{k}": v for k, v in state.items()},
        ],
        ids=["plain", "wrapped", "ddp", "ddp-compile", "compile-ddp"],
    )
    @pytest.mark.parametrize("as_file", [False, True])
    def test_accepted(self, lenet, tmp_path, wrap, as_file):
        weights = wrap(lenet.state_dict())
        if as_file:
            torch.save(weights, tmp_path / "weights.pth")
            weights = tmp_path / "weights.pth"
        assert same_weights(create_model("lenet5", weights=weights), lenet)

    def test_safetensors(self, lenet, tmp_path):
        safetensors = pytest.importorskip("safetensors.torch", reason="needs the safetensors package")
        path = tmp_path / "weights.safetensors"
        safetensors.save_file(lenet.state_dict(), path)
        assert same_weights(create_model("lenet5", weights=str(path)), lenet)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(
            CheckpointError, match=r"weights\.safetensors cannot be read as safetensors: .*again"
        ):
            create_model("lenet5", weights=path)

    def test_old_form_of_torch_save(self, lenet, tmp_path):
        torch.save(lenet.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        assert same_weights(create_model("lenet5", weights=tmp_path / "old.pth"), lenet)

    def test_half_weights_are_cast(self, lenet):
        halved = {key: value.half() for key, value in lenet.state_dict().items()}
        loaded = create_model("lenet5", weights=halved)
        assert loaded.conv1.weight.dtype == torch.float32
        assert torch.equal(loaded.conv1.weight, lenet.conv1.weight.half().float())

    def test_checkpoint_from_before_batches_were_counted(self):
        stock = create_model("resnet18", num_classes=2)
        old = {k: v for k, v in stock.state_dict().items() if not k.endswith("num_batches_tracked")}
        for state in (old, collections.OrderedDict(old)):
            loaded = create_model("resnet18", num_classes=2, weights=state)
            assert torch.equal(loaded.layer4[1].bn2.running_var, stock.layer4[1].bn2.running_var)
            assert loaded.bn1.num_batches_tracked == 0

    def test_nan_weights_load(self, lenet):
        state = {**lenet.state_dict(), "fc3.bias": torch.full((10,), float("nan"))}
        assert create_model("lenet5", weights=state).fc3.bias.isnan().all()


class TestWeightsThatDoNotFit:
    def refused(self, weights, name="lenet5", **options) -> str:
        with pytest.raises(CheckpointError) as caught:
            create_model(name, weights=weights, **options)
        return str(caught.value)

    @pytest.mark.parametrize("kept", [0.999, 0.5, 0.01])
    def test_truncated(self, lenet, tmp_path, kept):
        path = tmp_path / "half.pth"
        torch.save(lenet.state_dict(), path)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * kept)])
        message = self.refused(path)
        assert re.search(
            r"half\.pth cannot be read .* has [\d,]+ bytes and its end is missing .*again", message
        )

    @pytest.mark.parametrize("kept", [0.9, 0.1])
    def test_truncated_old_form(self, lenet, tmp_path, kept):
        path = tmp_path / "old.pth"
        torch.save(lenet.state_dict(), path, _use_new_zipfile_serialization=False)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * kept)])
        assert re.search(r"old\.pth cannot be read .*again", self.refused(path))

    @pytest.mark.parametrize(
        "content, fact",
        [
            (b"", "it is empty"),
            (b"<!DOCTYPE html><html>Not found</html>", "it is a web page"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS pointer.*git lfs pull"),
            (b"\x89PNG\r\n\x1a\n" + bytes(99), "has 107 bytes and begins with b'.x89PNG"),
        ],
    )
    def test_not_a_checkpoint(self, tmp_path, content, fact):
        path = tmp_path / "weights.pth"
        path.write_bytes(content)
        assert re.search(f"weights.pth cannot be read as a PyTorch checkpoint: .*{fact}", self.refused(path))

    def test_missing_file_and_folder(self, tmp_path):
        assert "nowhere.pth does not exist" in self.refused(tmp_path / "nowhere.pth")
        assert "is a folder" in self.refused(tmp_path)

    def test_pickled_model_is_not_run(self, lenet, tmp_path):
        torch.save(lenet, tmp_path / "model.pth")
        assert "holds pickled objects where tensors were expected; save `model.state_dict()`" in self.refused(
            tmp_path / "model.pth"
        )

    @pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {}, torch.ones(3), {3: torch.ones(3)}])
    def test_no_state_dict_in_it(self, tmp_path, content):
        torch.save(content, tmp_path / "odd.pth")
        message = self.refused(tmp_path / "odd.pth")
        assert "odd.pth holds" in message
        assert "save `model.state_dict()`" in message

    def test_foreign_weights_list_at_most_ten_keys(self):
        message = self.refused(create_model("resnet18").state_dict())
        assert message.startswith("the given state dict does not fit lenet5: 9 missing (conv1.bias, ")
        assert re.search(r"121 unexpected \(bn1\.weight, and 120 more\); 1 mis-shaped\. ", message)
        assert len(re.findall(r"\w+\.(?:weight|bias)", message)) == 10

    def test_weights_with_no_key_in_common(self, lenet):
        state = {f"backbone.{key}": value for key, value in lenet.state_dict().items()}
        assert "No key matches: these are another network's weights, or their keys carry" in self.refused(
            state
        )

    def test_another_variant(self):
        message = self.refused(create_model("resnet34").state_dict(), name="resnet18")
        assert re.search(r"unexpected \(layer1\.2\.conv1\.weight, .*, and \d+ more\)", message)

    def test_shapes_are_given(self, lenet):
        state = {**lenet.state_dict(), "conv1.weight": torch.ones(6, 3, 5, 5)}
        assert "1 mis-shaped (conv1.weight [6, 3, 5, 5] for [6, 1, 5, 5])" in self.refused(state)

    def test_other_number_of_classes(self, lenet):
        message = self.refused(lenet.state_dict(), num_classes=26)
        assert "2 mis-shaped (fc3.weight [10, 84] for [26, 84], fc3.bias [10] for [26])" in message
        assert "pass num_classes=10" in message

    def test_not_weights_at_all(self):
        with pytest.raises(TypeError, match="weights must be a path or a state dict, got int"):
            create_model("lenet5", weights=7)
