"""The recipes, run briefly: fused and stock, on one process and under torchrun."""

import itertools
import json
import math
import sys

import pytest
import torch

import fastnets
from tests.ranks import ROOT, needs_gloo, torchrun

pytest.importorskip("mlxtend")
pytest.importorskip("matplotlib")

EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def examples_are_importable(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("COLUMNS", "120")


def _history(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def _assert_left_behind(folder, name):
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / f"{name}.pt").exists()


# --- the parts ----------------------------------------------------------------------------------------------


def test_digits_are_split_alike_and_evenly():
    import digits

    data, again = digits.load(), digits.load(limit=200)
    assert data.images.shape == (4000, 1, 28, 28)
    assert data.held_out_images.shape == (1000, 1, 28, 28)
    assert (data.labels.bincount() == 400).all()
    assert (data.held_out_labels.bincount() == 100).all()
    assert (again.labels.bincount() == 20).all()
    assert torch.equal(again.images, data.images[:200])
    seen = {image.numpy().tobytes() for image in data.images}
    assert sum(image.numpy().tobytes() in seen for image in data.held_out_images) == 0
    assert data.images.mean().abs() < 0.1
    assert (data.images.std() - 1).abs() < 0.1


def test_the_learning_rate_rises_for_five_per_cent_of_the_steps():
    import training

    rates = [training.learning_rate(step, 200, 0.05) for step in range(201)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1
    assert all(before > after for before, after in itertools.pairwise(rates[10:]))
    assert rates[200] == pytest.approx(0, abs=1e-12)
    assert training.learning_rate(0, 200, 0.0) == 1


@pytest.mark.parametrize("layers", ["--fused", "--stock"])
def test_distillation_weighs_the_teacher_and_the_labels(layers):
    import distill

    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.9), torch.nn.Linear(4, 3))
    images, logits, labels = torch.randn(5, 1, 2, 2), torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    answers = teacher.eval()(images).double()
    soft, ours = (answers / 4).softmax(1), (logits.double() / 4).softmax(1)
    divergence = (soft * (soft / ours).log()).sum(1).mean()
    surprise = -logits.double().softmax(1)[range(5), labels].log().mean()
    expected = 0.7 * 16 * divergence + 0.3 * surprise
    objective = distill.from_teacher(teacher.train(), distill.parse_arguments([layers]))
    logits.requires_grad_()
    loss = objective(logits, images, labels)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert logits.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters()), "the teacher stands still"


# --- LeNet-5 ------------------------------------------------------------------------------------------------

BRIEF = ["--epochs", "2", "--limit", "320", "--batch-size", "32", "--device", "cpu"]


@pytest.fixture(scope="module")
def lenet(tmp_path_factory):
    """The folder of a brief fused run in this process."""
    folder = tmp_path_factory.mktemp("lenet")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        import train_lenet

        train_lenet.main([*BRIEF, "--fused", "--output", str(folder)])
    return folder


def test_lenet_leaves_weights_figures_and_a_curve(lenet):
    _assert_left_behind(lenet, "lenet5_relu")
    history = _history(lenet, "lenet5_relu")
    assert history["fused"] is True
    assert len(history["losses"]) == 20
    assert len(history["accuracies"]) == 2
    assert history["losses"][-1] < 0.7 * history["losses"][0]
    loaded = fastnets.create_model("lenet5_relu", weights=lenet / "lenet5_relu.pt")
    assert torch.cat([p.flatten() for p in loaded.parameters()]).isfinite().all()


def test_stock_lenet_learns_the_same(lenet, tmp_path, capsys):
    import train_lenet

    train_lenet.main([*BRIEF, "--stock", "--output", str(tmp_path)])
    stock = _history(tmp_path, "lenet5_relu")
    assert stock["fused"] is False
    assert stock["losses"] == pytest.approx(_history(lenet, "lenet5_relu")["losses"], rel=1e-3)
    assert "of the held-out digits (stock" in capsys.readouterr().out


@needs_gloo
@pytest.mark.slow
def test_lenet_under_torchrun_takes_the_same_steps(lenet, tmp_path):
    done = torchrun(2, str(EXAMPLES / "train_lenet.py"), *BRIEF, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes") == 1, "rank 0 alone reports"
    assert "20/20" in done.stderr, "no progress bar"
    history, alone = _history(tmp_path, "lenet5_relu"), _history(lenet, "lenet5_relu")
    assert history["world_size"] == 2
    assert history["losses"] == pytest.approx(alone["losses"], rel=1e-3)
    assert history["accuracies"] == pytest.approx(alone["accuracies"], abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layers, backend",
    # On the CPU "auto" may find stock the better for a step; the reference runs the fused ops' own gradients.
    [("--fused", "auto"), ("--fused", "reference"), ("--stock", "auto")],
)
def test_lenet_reads_the_held_out_digits(layers, backend, tmp_path):
    import train_lenet

    with fastnets.backend(backend):
        train_lenet.main([layers, "--device", "cpu", "--output", str(tmp_path)])
    history = _history(tmp_path, "lenet5_relu")
    assert len(history["accuracies"]) == 15
    assert history["accuracies"][-1] >= 0.95


@pytest.mark.parametrize(
    "words, message",
    [
        (["--limit", "20"], "20 digits do not fill one batch of 128"),
        (["--epochs", "0"], "0 is not at least 1"),
        (["--fused", "--stock"], "not allowed with argument"),
    ],
)
def test_what_cannot_be_is_said(words, message, capsys, tmp_path):
    import train_lenet

    with pytest.raises(SystemExit) as stopped:
        train_lenet.main([*words, "--device", "cpu", "--output", str(tmp_path)])
    assert message in f"{stopped.value} {capsys.readouterr().err}"


# --- distillation -------------------------------------------------------------------------------------------

SMALL = ["--epochs", "1", "--limit", "128", "--batch-size", "64", "--device", "cpu", "--teacher", "resnet18"]


def _distilled(folder, *words):
    import distill

    distill.main([*SMALL, "--output", str(folder), *words])
    return [_history(folder, path.stem) for path in sorted(folder.glob("*.json"))]


def test_a_student_learns_from_a_teacher(tmp_path):
    student, teacher = _distilled(tmp_path, "--width-mult", "0.25")
    assert [student["name"], teacher["name"]] == ["mobilenet_v2_of_resnet18", "resnet18"]
    assert all(map(math.isfinite, student["losses"] + teacher["losses"]))
    for name in ("resnet18", "mobilenet_v2_of_resnet18"):
        _assert_left_behind(tmp_path, name)
    sys.modules["distill"].create(
        "mobilenet_v2", width_mult=0.25, weights=tmp_path / "mobilenet_v2_of_resnet18.pt"
    )


@pytest.mark.slow
def test_a_resnet_learns_from_given_weights_fused_as_stock(tmp_path):
    _, teacher = _distilled(tmp_path / "taught", "--student", "mobilenet_v2", "--width-mult", "0.25")
    assert teacher["name"] == "resnet18"
    given = ["--student", "resnet18", "--teacher-weights", str(tmp_path / "taught" / "resnet18.pt")]
    runs = {layers: _distilled(tmp_path / layers, layers, *given) for layers in ("--fused", "--stock")}
    (fused,), (stock,) = runs.values()
    assert fused["losses"] == pytest.approx(stock["losses"], rel=1e-3)


@needs_gloo
@pytest.mark.slow
def test_a_resnet_learns_on_two_ranks_as_on_one(tmp_path):
    """With the statistics of both ranks' images, in the fused layers, which can do so on the CPU."""
    _distilled(tmp_path / "taught", "--width-mult", "0.25")
    given = ["--student", "resnet18", "--teacher-weights", str(tmp_path / "taught" / "resnet18.pt")]
    (alone,) = _distilled(tmp_path / "alone", *given)
    words = [*SMALL, *given, "--sync-bn", "--output", str(tmp_path / "both")]
    done = torchrun(2, str(EXAMPLES / "distill.py"), *words)
    assert done.returncode == 0, done.stderr
    both = _history(tmp_path / "both", "resnet18_of_resnet18")
    assert both["world_size"] == 2
    assert both["losses"] == pytest.approx(alone["losses"], rel=1e-3)
