"""How long images stay, how much room they take, and that what is erased is gone from the disk."""

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tta.client import Client
from tta.daemon.clock import wall_us
from tta.daemon.labels import LabelBuffer, Labelled
from tta.daemon.library import Library, expire_images
from tta.daemon.retention import Retention
from tta.errors import InputError, UnavailableError
from tta.monitor.regimes import fingerprint
from tta.protocol import Erase
from tta.scenario import DaemonProcess

SHAPE = (8, 8, 3)
DAY_US = 86_400 * 10**6


def labelled(number: int) -> Labelled:
    """A label whose image is of one unmistakable pattern."""
    return Labelled(number, number, 0, 1, 1, pattern(number))


def pattern(number: int) -> np.ndarray:
    """An image that no other bytes look like."""
    return np.random.default_rng(number).integers(0, 256, SHAPE, np.uint8)


def on_disk(folder: Path, image: np.ndarray) -> list[str]:
    """Files that hold an image's bytes, or most of them: SQLite cuts long ones in pieces."""
    piece = image.tobytes()[:64]
    return [p.name for p in folder.rglob("*") if p.is_file() and piece in p.read_bytes()]


def test_erased_labels_are_not_on_the_disk_any_more(tmp_path: Path) -> None:
    """Of labels erased by id, or by age, no byte of the image is left in the database or its log."""
    now = [DAY_US]
    labels = LabelBuffer(tmp_path / "labels.sqlite", 100, 0.6, SHAPE, now_us=lambda: now[0])
    labels.add([labelled(n) for n in (1, 2, 3)])
    assert on_disk(tmp_path, pattern(2))

    assert labels.delete([2, 77]) == 1
    assert on_disk(tmp_path, pattern(2)) == []
    now[0] += DAY_US
    labels.add([labelled(4)])
    assert labels.expire(3600.0) == 2
    assert on_disk(tmp_path, pattern(1)) == on_disk(tmp_path, pattern(3)) == []
    assert on_disk(tmp_path, pattern(4))
    assert labels.delete_all() == 1
    assert on_disk(tmp_path, pattern(4)) == []
    assert len(labels) == 0
    labels.close()


def test_labels_of_an_older_release_age_from_now_on(tmp_path: Path) -> None:
    """A file without times of storage is opened, and its labels stay for the whole age."""
    path = tmp_path / "labels.sqlite"
    labels = LabelBuffer(path, 100, 0.6, SHAPE, now_us=lambda: DAY_US)
    labels.add([labelled(1)])
    labels.close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        columns = [row[1] for row in db.execute("PRAGMA table_info(labels)") if row[1] != "stored_us"]
        db.execute(f"CREATE TABLE older AS SELECT {', '.join(columns)} FROM labels")
        db.execute("DROP TABLE labels")
        db.execute("ALTER TABLE older RENAME TO labels")
        db.commit()

    now = [wall_us()]
    labels = LabelBuffer(path, 100, 0.6, SHAPE, now_us=lambda: now[0])
    assert labels.expire(3600.0) == 0
    now[0] += DAY_US
    assert labels.expire(3600.0) == 1
    labels.close()


def test_what_somebody_reads_is_not_called_erased(tmp_path: Path) -> None:
    """While a reader keeps the log from being cleared the answer is an error, and afterwards nothing is left."""
    path = tmp_path / "labels.sqlite"
    labels = LabelBuffer(path, 100, 0.6, SHAPE)
    labels.add([labelled(1)])
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM labels").fetchone()
        with pytest.raises(UnavailableError, match="somebody reads the labels"):
            labels.delete([1])
    assert labels.delete([1]) == 0
    assert on_disk(tmp_path, pattern(1)) == []
    labels.close()


def test_what_made_room_is_not_left_in_free_pages(tmp_path: Path) -> None:
    """Of a label that was evicted, or replaced, no byte is left once the log has been cleared."""
    labels = LabelBuffer(tmp_path / "labels.sqlite", 2, 0.6, SHAPE)
    for number in (1, 2, 3):
        labels.add([labelled(number)])
    labels.delete([3])
    assert on_disk(tmp_path, pattern(1)) == on_disk(tmp_path, pattern(3)) == []
    assert on_disk(tmp_path, pattern(2))
    labels.close()


def test_images_of_regimes_go_by_their_age(tmp_path: Path) -> None:
    """Of a regime's images those that are too old go, each by its own age, and the file with the last."""
    home = fingerprint(np.random.default_rng(0).normal(0, 1, (400, 6)), np.zeros(400, np.int64))
    library = Library(tmp_path, home, 0.9, 4, n_images=8)
    number = library.add(1, "input", 0.9, None, 10).number
    library.keep_images(number, np.full((4, *SHAPE), 1, np.uint8), 1000.0)
    library.keep_images(number, np.full((4, *SHAPE), 2, np.uint8), 2000.0)

    assert expire_images(tmp_path, 1500.0) == 4
    left = library.images(number)
    assert left is not None
    assert left.shape == (4, *SHAPE)
    assert set(np.unique(left)) == {2}
    library.keep_images(number, np.full((1, *SHAPE), 3, np.uint8), 3000.0)
    assert expire_images(tmp_path, 2500.0) == 4
    assert expire_images(tmp_path, 3500.0) == 1
    assert not library.images_path(number).exists()
    assert expire_images(tmp_path, 3500.0) == 0


def test_former_bundles_and_damaged_files_age_too(tmp_path: Path) -> None:
    """Labels of a former bundle go by id and by their age, damaged files by their own; versions stay."""
    former = tmp_path / "former" / "abc"
    (former / "versions").mkdir(parents=True)
    now = [wall_us()]
    old = LabelBuffer(former / "labels.sqlite", 100, 0.6, SHAPE, now_us=lambda: now[0])
    old.add([labelled(1), labelled(2), labelled(3)])
    old.close()
    labels = LabelBuffer(tmp_path / "labels.sqlite", 100, 0.6, SHAPE, now_us=lambda: now[0])
    damaged = tmp_path / "labels.sqlite.damaged-1"
    damaged.touch()
    retention = Retention(tmp_path, labels)

    assert retention.erase([2]) == 1
    assert on_disk(tmp_path, pattern(2)) == []
    assert on_disk(tmp_path, pattern(1))
    assert retention.expire(3600.0, now[0]) == (0, 0)
    now[0] += DAY_US
    labels.add([labelled(4)])
    assert retention.expire(3600.0, now[0]) == (2, 0)
    assert on_disk(tmp_path, pattern(1)) == on_disk(tmp_path, pattern(3)) == []
    assert not damaged.exists()
    assert on_disk(tmp_path, pattern(4))
    assert retention.erase_everything() == (1, 0)
    assert on_disk(tmp_path, pattern(4)) == []
    assert (former / "versions").exists()
    labels.close()


def test_a_damaged_file_does_not_keep_others_from_being_erased(tmp_path: Path) -> None:
    """A former bundle's damaged labels are set aside and told; all others go, and those with everything."""
    labels = LabelBuffer(tmp_path / "labels.sqlite", 100, 0.6, SHAPE)
    labels.add([labelled(1)])
    damaged, sound = (tmp_path / "former" / name for name in ("a", "b"))
    for folder in (damaged, sound):
        (folder / "regimes").mkdir(parents=True)
    (damaged / "labels.sqlite").write_bytes(b"no database" * 1000)
    other = LabelBuffer(sound / "labels.sqlite", 100, 0.6, SHAPE)
    other.add([labelled(1)])
    other.close()
    (sound / "regimes" / ".000001-images.safetensors.tmp").write_bytes(pattern(1).tobytes())
    retention = Retention(tmp_path, labels)

    assert retention.erase([1]) == 2
    assert sorted(p.parent.name for p in retention.set_aside()) == ["a", "regimes"]
    assert retention.erase_everything() == (0, 0)
    assert retention.set_aside() == []
    assert on_disk(tmp_path, pattern(1)) == []
    labels.close()


def test_the_disk_budget_bounds_labels_and_images(
    start_daemon: Callable[..., DaemonProcess], stream: tuple[np.ndarray, np.ndarray]
) -> None:
    """As many labels are kept as the budget holds, and the log says so; one too small to adapt by is refused."""
    with pytest.raises(UnavailableError, match=r"labels\.disk_bytes = 1048576 holds"):
        start_daemon(**{"labels.disk_bytes": 1 << 20, "adapt.labels": 500})
    daemon = start_daemon(**{"labels.disk_bytes": 1 << 20, "library.disk_bytes": 1 << 20})
    x, y = stream
    with daemon.client() as client:
        for begin in range(0, 400, 100):
            client.label(x=x[begin : begin + 100], labels=y[begin : begin + 100].tolist())
        kept = client.status()["labels_buffered"]

    log = daemon.log_path.read_text()
    assert kept == (1 << 20) // (x[0].nbytes + 300) < 400
    assert f'"what": "labels.capacity", "wanted": 20000, "in_force": {kept}' in log
    assert '"what": "library.images"' in log


def test_an_operator_erases_what_a_daemon_has_stored(
    start_daemon: Callable[..., DaemonProcess], stream: tuple[np.ndarray, np.ndarray]
) -> None:
    """By id one image goes, and its prediction takes no label any more; with `everything` no image is left."""
    daemon = start_daemon()
    x, y = stream
    state = daemon.folder / "state"
    with daemon.client() as client:
        first = client.predict(x[:4]).prediction_id
        ids = list(range(first, first + 4))
        assert client.label(ids, y[:4].tolist()) == ["joined"] * 4
        assert on_disk(state, x[0])

        assert erased(client, prediction_ids=[first]) == (1, 0)
        assert on_disk(state, x[0]) == []
        assert on_disk(state, x[1])
        assert client.label([first], [int(y[0])]) == ["expired"]
        assert erased(client, everything=True) == (3, 0)
        assert on_disk(state, x[1]) == []
        assert client.status()["labels_buffered"] == 0
        with pytest.raises(InputError, match="name prediction_ids, or everything"):
            client.call(Erase())


def erased(client: Client, **what: object) -> tuple[int, int]:
    """How many labels and images went."""
    reply = client.call(Erase(**what))
    return reply["labels"], reply["images"]
