"""Convolutions of touching patches, as a matrix product of runs, against stock PyTorch in every lane."""

import pytest
import torch

from fastnets.kernels.conv import conv_bn_act
from fastnets.kernels.launch import observe_launches
from tests.kernels.conv_cases import Case, check, check_exact
from tests.lanes import STRICT_LANES

HALF, BFLOAT, FULL = torch.float16, torch.bfloat16, torch.float32
VIT = {
    "N": 1,
    "C": 3,
    "H": 32,
    "W": 48,
    "K": 40,
    "R": 16,
    "S": 16,
    "stride": (16, 16),
    "bn": None,
    "bias": True,
}
SWIN = {"N": 2, "C": 3, "H": 13, "W": 18, "K": 24, "R": 4, "S": 4, "stride": (4, 4), "bn": None, "bias": True}

CASES = {
    "ViT": (HALF, Case(**VIT, activation="none", x="contiguous", weight="contiguous")),
    "ViT, channels-last": (BFLOAT, Case(**VIT, activation="none")),
    "Swin, pixels left over": (HALF, Case(**SWIN, activation="none", x="contiguous", weight="contiguous")),
    "Swin, fp32, channels-last weight": (FULL, Case(**SWIN, activation="gelu", x="contiguous")),
    "BN, residual": (
        HALF,
        Case(N=2, C=5, H=8, W=12, K=19, R=2, S=2, stride=(2, 2), residual="last", x="contiguous"),
    ),
    "sliced": (BFLOAT, Case(**SWIN, activation="relu", x="sliced")),
    "14×14": (HALF, Case(N=1, C=3, H=28, W=28, K=16, R=14, S=14, stride=(14, 14), bn=None, x="contiguous")),
}


@pytest.fixture(autouse=True)
def exact_fp32():
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.lanes("interpreter", "sm_90", "gpu")
@pytest.mark.parametrize("name", CASES)
def test_patches(lane, name):
    dtype, case = CASES[name]
    check(lane, conv_bn_act, case, dtype)


@pytest.mark.lanes(*STRICT_LANES)
def test_strictly(lane):
    check(lane, conv_bn_act, CASES["Swin, pixels left over"][1], HALF)


@pytest.mark.lanes("sm_80", "gpu")
def test_integers_are_exact(lane):
    check_exact(lane, conv_bn_act, CASES["Swin, pixels left over"][1], HALF)


def kernels_of(x, weight, **options):
    seen = []
    with observe_launches(seen.append):
        conv_bn_act(x, weight, **options)
    return [launch.name for launch in seen]


def test_which_convolutions_are_patches():
    def meta(*size):
        return torch.empty(size, dtype=HALF, device="meta")

    image, filters = meta(2, 3, 32, 32), meta(8, 3, 4, 4)
    assert kernels_of(image, filters, stride=(4, 4)) == ["patch_embedding_kernel"]
    assert kernels_of(image, filters, stride=(2, 2)) == ["pack_rows_kernel", "conv_rows_kernel"]
    assert kernels_of(image, filters, stride=(4, 4), padding=(1, 1)) == [
        "pack_rows_kernel",
        "conv_rows_kernel",
    ]
    assert kernels_of(image.transpose(2, 3), filters, stride=(4, 4)) == ["conv_joint_kernel"]


def test_the_image_is_read_once_and_the_tokens_lie_as_transformers_want_them():
    x, weight = torch.empty(32, 3, 224, 224, device="meta"), torch.empty(768, 3, 16, 16, device="meta")
    seen = []
    with observe_launches(seen.append):
        y = conv_bn_act(x, weight, stride=(16, 16))
    assert sum(launch.bytes for launch in seen) == 4 * (x.numel() + weight.numel() + y.numel())
    assert y.flatten(2).transpose(1, 2).is_contiguous()
