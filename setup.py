"""Packaging of fastnets.

The source folders stand at the root of the repository (``kernels/``, ``fused/``, ...) and are installed as
subpackages of ``fastnets``. The mapping below is the only place that knows about it; an editable install, a
wheel and a source distribution all go through it.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
FOLDERS = ("kernels", "fused", "models", "bench")

package_dir = {"fastnets": "fastnets"}
packages = ["fastnets"]
for folder in FOLDERS:
    package_dir[f"fastnets.{folder}"] = folder
    packages.append(f"fastnets.{folder}")
    packages += [f"fastnets.{folder}.{inner}" for inner in find_packages(folder)]

version = re.search(r'^__version__ = "([^"]+)"', (ROOT / "fastnets/__init__.py").read_text(), re.M).group(1)

bench = ["jinja2>=3.1", "matplotlib>=3.8", "psutil>=5.9"]
vision = ["torchvision>=0.26", "timm>=1.0"]
examples = [*bench, *vision, "mlxtend>=0.23", "scikit-learn>=1.4", "scikit-image>=0.22", "pillow>=10"]
test = [
    *examples,
    "expecttest",
    "hypothesis>=6.100",
    "onnx>=1.16",
    "pytest>=8",
    "pytest-benchmark>=5",
    "pytest-xdist>=3.5",
    "ruff>=0.9",
    "safetensors>=0.4",
    "setuptools>=77",
    "wheel",
]

setup(
    name="fastnets",
    version=version,
    description="Stock PyTorch networks with fused layers, written in Triton: same weights, same answers.",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    package_dir=package_dir,
    packages=packages,
    package_data={"fastnets": ["py.typed"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; sys_platform == 'linux'",
        "numpy",
        "rich>=13",
        "typer>=0.12",
    ],
    extras_require={"bench": bench, "vision": vision, "examples": examples, "test": test},
    entry_points={"console_scripts": ["fastnets = fastnets.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
