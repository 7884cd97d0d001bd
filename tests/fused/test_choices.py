"""The store of measured choices: what it keeps, and that neither processes nor the disk can break it."""

import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
import warnings

import pytest

from fastnets.fused import choices
from fastnets.fused.choices import Choice, Store

CHOICE = Choice(
    "conv_bn_act", "float32", "8×64×64×64 relu", "library", 0.98, {"reference": 2e-3, "library": 1e-3}
)


@pytest.fixture
def store(tmp_path) -> Store:
    choices._warned.clear()
    return Store(tmp_path / "cache")


def test_a_choice_comes_back_on_its_own_device_and_versions(store, monkeypatch):
    assert not store.exists()
    assert store.read("gpu") == []
    assert store.write("gpu", [CHOICE])
    assert store.read("gpu") == [CHOICE]
    assert store.read("another gpu") == []
    later = CHOICE._replace(backend="reference")
    assert store.write("gpu", [later, CHOICE._replace(shape="another")])
    assert sorted(store.read("gpu")) == sorted([later, CHOICE._replace(shape="another")])
    monkeypatch.setattr(choices, "versions", lambda: "of tomorrow")
    assert store.read("gpu") == []


def test_the_folder_is_the_one_that_was_named(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTNETS_CACHE_DIR", str(tmp_path / "here"))
    assert Store().folder == tmp_path / "here"
    monkeypatch.delenv("FASTNETS_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert Store().folder == tmp_path / "cache" / "fastnets"


def spoil_with_text(path):
    path.write_text("this is no database " * 500)


def spoil_the_middle(path):
    content = bytearray(path.read_bytes())
    content[100:] = b"\xff" * (len(content) - 100)
    path.write_bytes(content)


def spoil_with_another_table(path):
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE choices (colour TEXT)")
        connection.execute("PRAGMA user_version = 1")


@pytest.mark.parametrize("spoil", [spoil_with_text, spoil_the_middle, spoil_with_another_table])
@pytest.mark.parametrize("reading", [True, False])
def test_a_damaged_file_is_put_aside_with_a_warning_and_begun_anew(store, spoil, reading):
    store.write("gpu", [CHOICE])
    spoil(store.path)
    with pytest.warns(UserWarning, match="damaged") as caught:
        assert (store.read("gpu") == []) if reading else store.write("gpu", [CHOICE])
    assert len(caught) == 1
    assert (store.folder / "choices-1.corrupt").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.write("gpu", [CHOICE])
        assert store.read("gpu") == [CHOICE]


def test_a_folder_that_cannot_be_written_to_is_said_once(tmp_path):
    choices._warned.clear()
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "cache")  # also the superuser cannot make a folder inside a file
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [store.write("gpu", [CHOICE]) for _ in range(3)] == [False] * 3
        assert store.read("gpu") == []
    assert len(caught) == 1
    assert "cannot be written" in str(caught[0].message)
    assert "FASTNETS_CACHE_DIR" in str(caught[0].message)


def test_a_read_only_folder_is_read(store):
    store.write("gpu", [CHOICE])
    os.chmod(store.path, 0o444)
    os.chmod(store.folder, 0o555)
    try:
        assert store.read("gpu") == [CHOICE]
        if os.getuid():  # the superuser may write all the same
            with pytest.warns(UserWarning, match="cannot be written"):
                assert store.write("gpu", [CHOICE._replace(shape="another")]) is False
    finally:
        os.chmod(store.folder, 0o755)


def program(store: Store, body: str) -> list[str]:
    setup = (
        "import sys, warnings; from pathlib import Path; from fastnets.fused.choices import Choice, Store; "
        f"store = Store(Path({str(store.folder)!r}))\n"
    )
    return [sys.executable, "-c", setup + body]


def test_a_full_disk_is_said_once_and_what_was_there_stays(store):
    store.write("gpu", [CHOICE])
    body = """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    shapes = [str(i) * 5000 for i in range(20)]
    kept = [store.write("gpu", [Choice("op", "float32", shape, "library", 1.0, {})]) for shape in shapes]
print(len(caught), caught[0].message, kept.count(False))
"""
    limit = store.path.stat().st_size + 20000
    done = subprocess.run(
        program(store, body),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.stdout.startswith("1 fastnets: measured choices cannot be written"), done.stdout + done.stderr
    assert int(done.stdout.split()[-1]) > 5
    assert CHOICE in store.read("gpu")


def test_two_processes_at_once_and_a_kill_leave_one_valid_store(store):
    body = """
name, count = sys.argv[1], int(sys.argv[2])
for i in range(count):
    assert store.write("gpu", [Choice("op", "float32", f"{name} {i}", "library", 1.0, {"library": 1.0})])
    if i == 5:
        print("going", flush=True)
"""
    killed = subprocess.Popen([*program(store, body), "killed", "100000"], stdout=subprocess.PIPE)
    other = subprocess.Popen([*program(store, body), "other", "300"], stdout=subprocess.PIPE)
    assert killed.stdout.readline() == b"going\n"
    assert other.stdout.readline() == b"going\n"
    time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert other.wait(timeout=60) == 0
    found = {choice.shape for choice in store.read("gpu")}
    assert {f"other {i}" for i in range(300)} <= found
    of_killed = sorted(int(shape.split()[1]) for shape in found if shape.startswith("killed"))
    assert len(of_killed) > 5
    assert of_killed == list(range(len(of_killed)))  # each row that was written, and none by half
    with sqlite3.connect(store.path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_export_and_import(store, tmp_path):
    store.write("gpu", [CHOICE, CHOICE._replace(shape="another")])
    store.write("cpu", [CHOICE])
    content = json.loads(json.dumps(store.export()))
    elsewhere = Store(tmp_path / "elsewhere")
    assert elsewhere.take(content) == 3
    assert elsewhere.export() == store.export()
    assert elsewhere.read("cpu") == [CHOICE]


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        ([], "not a fastnets-choices file"),
        ({"schema": "fastnets-bench"}, "not a fastnets-choices file"),
        ({"schema": "fastnets-choices", "schema_version": 0}, "schema version 0, this fastnets reads 1"),
        (
            {"schema": "fastnets-choices", "schema_version": 1, "choices": [{"op": "x"}]},
            "must have the fields",
        ),
    ],
)
def test_what_is_no_export_is_refused(store, content, fact):
    with pytest.raises(ValueError, match=fact):
        store.take(content)
    assert not store.exists()
