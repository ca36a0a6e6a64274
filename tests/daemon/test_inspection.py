"""`tta check --repair`: every file of a state folder is read, damage is named and mended, nothing is deleted."""

import sqlite3
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.daemon.test_memory import delta, labelled
from tta.commands import app
from tta.daemon.files import write_arrays, write_json
from tta.daemon.inspection import inspect
from tta.daemon.labels import LabelBuffer, salvage
from tta.daemon.store import Store, lock
from tta.errors import ConfigError

FILES = (
    "calibrations/a.safetensors",
    "labels.sqlite",
    "library.json",
    "regimes/000001.safetensors",
    "rehearsed.json",
    "rehearsed.safetensors",
    "state.json",
    "versions/000001/delta.safetensors",
    "watch.safetensors",
)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state folder with one file of each kind."""
    root = tmp_path / "state"
    root.mkdir()
    store = Store(root, "hash")
    store.write(*delta(), "block1", "source", 0.0, {}, {"outcome": "accepted"})
    store.save_state({"sequence": 3})
    store.save_watch({"x": np.arange(50.0)})
    buffer = LabelBuffer(root / "labels.sqlite", 500, 0.6, (4, 4, 3))
    buffer.add([labelled(i) for i in range(200)])
    buffer.close()
    for name in ("library.json", "rehearsed.json"):
        write_json(root / name, {"regimes": [], "n_images": 0})
    for name in ("calibrations", "regimes"):
        (root / name).mkdir()
    write_arrays(root / "rehearsed.safetensors", {"x": np.arange(9.0, dtype=np.float32)})
    write_arrays(root / "calibrations" / "a.safetensors", {"x": np.arange(9.0)})
    write_arrays(root / "regimes" / "000001.safetensors", {"x": np.arange(9.0)})
    return root


def flip(path: Path) -> None:
    """Change a byte in the middle of a file's content."""
    data = bytearray(path.read_bytes())
    middle = 4096 + 8 if path.suffix == ".sqlite" else len(data) - 20
    data[middle : middle + 8] = bytes(b ^ 0x55 for b in data[middle : middle + 8])
    path.write_bytes(data)


def test_a_sound_folder_has_no_findings(state: Path) -> None:
    """Every file is read, and none of them has a problem."""
    found = inspect(state)

    assert sorted(f.file for f in found) == sorted(str(state / name) for name in FILES)
    assert not any(f.problem for f in found)


@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_mended(state: Path, name: str) -> None:
    """A changed file is named, once set aside the folder is sound, and the damaged bytes are still there."""
    flip(state / name)
    damaged = (state / name).read_bytes()

    found = inspect(state)
    assert [f.file for f in found if f.problem] == [str(state / name)]
    assert all(f.consequence for f in found if f.problem)
    assert (state / name).read_bytes() == damaged

    mended = [f for f in inspect(state, repair=True) if f.problem]
    assert [bool(f.repaired) for f in mended] == [True]
    after = inspect(state)
    assert not any(f.problem for f in after)
    (aside,) = [Path(f.file) for f in after if f.consequence]
    assert aside.read_bytes() == damaged


def test_labels_that_can_be_read_are_kept(state: Path) -> None:
    """Of a file of labels with a hole, repair keeps those on whole pages."""
    path = state / "labels.sqlite"
    data = bytearray(path.read_bytes())
    pages = len(data) // 4096
    data[4096 * (pages // 2) : 4096 * (pages // 2 + 1)] = bytes(4096)
    path.write_bytes(data)

    (mended,) = [f for f in inspect(state, repair=True) if f.problem]

    n = int(mended.repaired.split()[0])
    buffer = LabelBuffer(path, 500, 0.6, (4, 4, 3))
    assert len(buffer) == n >= 50
    buffer.close()


def test_what_cannot_be_read_now_is_not_damaged(state: Path) -> None:
    """A file of labels that another process has locked is left alone, with an error that says so."""
    path = state / "labels.sqlite"
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode=DELETE")
    db.execute("BEGIN EXCLUSIVE")
    for repair in (False, True):
        with pytest.raises(ConfigError, match="cannot be read: database is locked"):
            inspect(state, repair)
    db.close()

    assert not [f for f in inspect(state) if f.problem]


def test_a_repair_keeps_the_regimes_of_labels(state: Path) -> None:
    """Which part of the stream was of which regime is kept with the labels."""
    path = state / "labels.sqlite"
    buffer = LabelBuffer(path, 500, 0.6, (4, 4, 3))
    buffer.attribute(4, 0, 200)
    n = len(buffer.of_regime(4, True))
    buffer.close()

    _, n_kept = salvage(path)

    again = LabelBuffer(path, 500, 0.6, (4, 4, 3))
    assert n_kept == 200
    assert len(again.of_regime(4, True)) == n > 50
    again.close()


def test_a_folder_in_use_is_not_repaired(state: Path) -> None:
    """While a daemon holds the folder it can be read, and is not changed."""
    flip(state / "state.json")
    with lock(state):
        assert any(f.problem for f in inspect(state))
        with pytest.raises(ConfigError, match="in use by another daemon"):
            inspect(state, repair=True)

    assert (state / "state.json").exists()


def test_the_command_s_exit_status_says_whether_it_is_sound(state: Path, bundle_path: Path) -> None:
    """`tta check` ends with 1 while a file is damaged, names it, and with 0 once it has been repaired."""

    def run(*extra: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["check", str(bundle_path), "--state", str(state), *extra])
        return result.exit_code, result.stdout

    flip(state / "library.json")
    status, text = run()
    assert (status, "library.json is damaged" in text, "--repair" in text) == (1, True, True)
    status, text = run("--repair")
    assert (status, "kept as library.json.damaged-" in text) == (0, True)
    assert run()[0] == 0
