"""The repository as a package: what importing it does, who may import whom, wheel and source distribution."""

import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("fastnets", "kernels", "fused", "models", "bench")

# Makes triton unimportable, as on a machine that does not have it.
NO_TRITON = "import sys; sys.modules['triton'] = None\n"


def python(code: str, cwd: Path, **environment: str) -> str:
    """Run code in a fresh interpreter without a GPU, in another folder than the repository."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules(folder: str) -> list[str]:
    """Names of the modules of a folder, as they are imported."""
    prefix = "fastnets" if folder == "fastnets" else f"fastnets.{folder}"
    names = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        inner = path.relative_to(ROOT / folder).with_suffix("").parts
        if inner[-1] == "__main__":
            continue
        names.append(".".join([prefix, *(part for part in inner if part != "__init__")]))
    return names


def test_importing_is_light(tmp_path):
    """No torch, no triton, no kernel: the public names are looked up when they are used."""
    out = python(
        "import sys, fastnets; print(fastnets.__version__);"
        "print(*sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'triton', 'numpy')))",
        tmp_path,
    )
    assert out.splitlines()[0] == importlib.metadata.version("fastnets")
    assert out.splitlines()[1:] in ([], [""])


def test_everything_but_the_kernels_imports_without_triton_and_without_a_gpu(tmp_path):
    names = [name for folder in ("fastnets", "fused", "models", "bench") for name in modules(folder)]
    out = python(
        NO_TRITON
        + f"import importlib\nfor name in {names}: importlib.import_module(name)\n"
        + "import fastnets, torch\n"
        + "for name in fastnets.__all__: getattr(fastnets, name)\n"
        + "assert not torch.cuda.is_initialized()\nprint('imported', len(fastnets.__all__))",
        tmp_path,
    )
    assert out.startswith("imported ")


def test_the_main_job_runs_without_triton_and_without_a_gpu(tmp_path):
    out = python(
        NO_TRITON
        + "import torch, fastnets\n"
        + "model = fastnets.create_model('resnet18', fused=False).eval()\n"
        + "fast = fastnets.optimize(model)\n"
        + "x = torch.randn(2, 3, 64, 64)\n"
        + "with torch.no_grad(): torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=1e-4)\n"
        + "print(fastnets.explain(fast).coverage)",
        tmp_path,
    )
    assert float(out) > 0.9


def test_importing_kernels_touches_no_gpu(tmp_path):
    pytest.importorskip("triton")
    python(
        f"import importlib\nfor name in {modules('kernels')}: importlib.import_module(name)\n"
        "import torch\nassert not torch.cuda.is_initialized()",
        tmp_path,
    )


def test_unknown_names_are_attribute_errors():
    import fastnets

    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        _ = fastnets.optimise
    assert {*fastnets.__all__, "kernels", "fused", "models", "bench"} <= set(dir(fastnets))


MAY_IMPORT = {
    "models": {"models"},
    "kernels": {"kernels"},
    "fused": {"fused", "kernels"},
    "bench": {"bench", "fused", "kernels", "models"},
}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_dependencies_point_one_way(folder):
    """models needs torch only, kernels knows no modules, fused builds on kernels, bench on all of them."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
                if node.module == "fastnets":
                    names = [f"fastnets.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in names:
                top, _, rest = name.partition(".")
                assert top not in FOLDERS[1:], f"{path}:{node.lineno}: import it as fastnets.{name}"
                if top == "fastnets" and rest:
                    allowed = MAY_IMPORT[folder] | ({"fastnets"} if folder == "bench" else set())
                    assert rest.split(".")[0] in allowed, f"{path}:{node.lineno}: {folder} imports {name}"
                if folder == "models":
                    assert top != "triton", f"{path}:{node.lineno}"


def test_the_command_is_installed():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="fastnets")
    assert entry.value == "fastnets.cli:main"


def test_the_editable_install_resolves_to_this_checkout(tmp_path):
    """Without importing the folders' contents: where each package would come from."""
    names = ["fastnets" if folder == "fastnets" else f"fastnets.{folder}" for folder in FOLDERS]
    out = python(
        f"from importlib.util import find_spec\nfor n in {names}: print(find_spec(n).origin)", tmp_path
    )
    assert [Path(line).parent for line in out.splitlines()] == [ROOT / folder for folder in FOLDERS]


@pytest.fixture(scope="module")
def source_copy(tmp_path_factory) -> Path:
    """The files that git knows or would add, so that building leaves nothing in the checkout."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("source")
    for name in filter(None, listing.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def pip(*words: str | Path, cwd: Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def build_wheel(source: Path | str, into: Path) -> Path:
    pip("wheel", source, "--no-deps", "--no-build-isolation", "--wheel-dir", into, cwd=into.parent)
    (wheel,) = into.glob("fastnets-*.whl")
    return wheel


def expected_files(source: Path) -> set[str]:
    """What a wheel holds: every source file of the five folders under its installed name."""
    files = {"fastnets/py.typed"}
    for folder in FOLDERS:
        for path in (source / folder).rglob("*.py"):
            inner = path.relative_to(source / folder).as_posix()
            files.add(f"fastnets/{inner}" if folder == "fastnets" else f"fastnets/{folder}/{inner}")
    return files


def test_wheel_holds_every_package_and_works_elsewhere(source_copy, tmp_path):
    wheel = build_wheel(source_copy, tmp_path / "wheels")
    held = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in held if ".dist-info/" in name}
    assert held - metadata == expected_files(source_copy)
    assert any(name.endswith("LICENSE") for name in metadata)

    site = tmp_path / "site"
    pip("install", wheel, "--no-deps", "--target", site, cwd=tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    out = python(
        NO_TRITON
        + "import torch, fastnets, fastnets.kernels, fastnets.fused.measure as m\n"
        + "print(fastnets.__file__, fastnets.kernels.__file__, m.__file__, sep='\\n')\n"
        + "model = fastnets.create_model('mobilenet_v2').eval()\n"
        + "print(tuple(model(torch.randn(1, 3, 32, 32)).shape))",
        elsewhere,
        PYTHONPATH=str(site),
    )
    *paths, shape = out.splitlines()
    assert all(path.startswith(str(site)) for path in paths)
    assert shape == "(1, 1000)"
    done = subprocess.run(
        [sys.executable, "-m", "fastnets", "list", "lenet*"],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert "lenet5" in done.stdout.split()


def test_a_wheel_from_the_source_distribution_is_the_same(source_copy, tmp_path):
    code = "import setuptools.build_meta as b, sys; print(b.build_sdist(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=source_copy, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("fastnets-*.tar.gz")
    wheel = build_wheel(archive, tmp_path / "wheels")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected_files(source_copy)
