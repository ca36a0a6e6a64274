"""What the daemon keeps: ledger, labels, versions, regimes."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from tta.daemon.files import read_json, write_json
from tta.daemon.labels import LabelBuffer, Labelled, fits
from tta.daemon.ledger import Entry, Ledger
from tta.daemon.library import HOME, Library
from tta.daemon.store import Store
from tta.errors import ConfigError, NotFoundError
from tta.monitor.regimes import fingerprint, recognise

ID = 1_700_000_000_000_000


def entry(i: int, seen: float = 0.0) -> Entry:
    """The i-th prediction."""
    x = np.full((4, 4, 3), i % 256, np.uint8)
    return Entry(ID + i, i, 0, np.zeros(3, np.float32), np.zeros(5, np.float32), x, seen)


def labelled(i: int, label: int | None = 1) -> Labelled:
    """The i-th label, of an image of its own."""
    x = np.full((4, 4, 3), i % 256, np.uint8)
    x[0, 0, 0] = i // 256 % 256
    return Labelled(ID + i, i, 0, label, 1, x)


def test_the_ledger_forgets_by_bytes_and_by_age() -> None:
    """The ledger stays within its bytes and drops what is too old, oldest first."""
    ledger = Ledger(max_bytes=10 * entry(0).n_bytes, max_age_s=100)
    for i in range(25):
        ledger.add(entry(i, seen=float(i)))

    assert len(ledger) == 10
    assert ledger.find(ID + 14) is None
    assert ledger.find(ID + 15) is not None
    ledger.add(entry(25, seen=121.0))
    assert ledger.find(ID + 20) is None
    assert ledger.find(ID + 21) is not None


def test_the_ledger_tells_forgotten_from_never_made() -> None:
    """A prediction that was dropped is expired, one that was never made is unknown."""
    ledger = Ledger(max_bytes=2 * entry(0).n_bytes, max_age_s=100)
    for i in range(5):
        ledger.add(entry(i))

    assert ledger.why_missing(ID) == "expired"
    assert ledger.why_missing(ID + 99) == "unknown"
    assert ledger.why_missing(7) == "unknown"


def test_the_ledger_counts_each_server_by_itself() -> None:
    """What one server is ahead of, and what it has forgotten, does not depend on another with far larger ids."""
    ledger = Ledger(1, 3600.0)  # forgets all but nothing of what it was told
    first, second = ID, ID + 10**14
    assert ledger.is_ahead(first)
    for epoch in (first, second):
        for i in range(3):
            ledger.add(replace(entry(i), prediction_id=epoch + i), epoch)

    assert [ledger.is_ahead(i) for i in (first + 2, first + 3, second + 2, second + 3)] == [
        False,
        True,
        False,
        True,
    ]
    assert [ledger.why_missing(i) for i in (first + 2, first + 3, second, ID - 5)] == [
        "expired",
        "unknown",
        "expired",
        "expired",
    ]


def test_a_label_never_changes_sides(tmp_path: Path) -> None:
    """Fit and gate share no label, about in the configured proportion, and the split survives a restart."""
    buffer = LabelBuffer(tmp_path / "l.sqlite", 5000, 0.6, (4, 4, 3))
    buffer.add([labelled(i) for i in range(1000)])
    fit = {r.prediction_id for r in buffer.select(0, fit=True)}
    gate = {r.prediction_id for r in buffer.select(0, fit=False)}
    buffer.close()

    again = LabelBuffer(tmp_path / "l.sqlite", 5000, 0.6, (4, 4, 3))

    assert not fit & gate
    assert 540 < len(fit) < 660
    assert (
        {r.prediction_id for r in again.select(0, fit=True)}
        == fit
        == {ID + i for i in range(1000) if fits(labelled(i), 0.6)}
    )
    again.close()


def test_an_image_counts_once(tmp_path: Path) -> None:
    """A stuck camera's picture, labelled a hundred times, is one label on one side: the newest of them."""
    buffer = LabelBuffer(tmp_path / "l.sqlite", 5000, 0.6, (4, 4, 3))
    stuck = [replace(labelled(i, i % 3), x=labelled(7).x) for i in range(100, 200)]
    buffer.add([*stuck, labelled(300), labelled(301)])
    buffer.attribute(2, 0, 400)

    here = [r for fit in (True, False) for r in buffer.select(0, fit)]
    of_regime = [r for fit in (True, False) for r in buffer.of_regime(2, fit)]

    assert sorted((r.sequence, r.label) for r in here) == [(199, 1), (300, 1), (301, 1)]
    assert sorted(r.sequence for r in of_regime) == [199, 300, 301]
    assert len({fits(r, 0.6) for r in stuck}) == 1
    assert [r.sequence for r in buffer.not_attributed([*here, labelled(400)])] == [400]
    buffer.close()


def test_a_damaged_image_is_passed_over(tmp_path: Path) -> None:
    """A label whose image has lost bytes fits and judges nothing, and the others are there."""
    path = tmp_path / "l.sqlite"
    buffer = LabelBuffer(path, 5000, 0.6, (4, 4, 3))
    buffer.add([labelled(i) for i in range(6)])
    with sqlite3.connect(path) as db:
        db.execute("UPDATE labels SET x = ? WHERE prediction_id = ?", (b"short", ID + 2))
    db.close()

    assert sorted(r.sequence for fit in (True, False) for r in buffer.select(0, fit)) == [0, 1, 3, 4, 5]
    buffer.close()


def test_feedback_fits_and_judges_nothing(tmp_path: Path) -> None:
    """Answers called right or wrong are fitted; no gate sees them till somebody names the class."""
    buffer = LabelBuffer(tmp_path / "l.sqlite", 5000, 0.6, (4, 4, 3))
    buffer.add([labelled(i) for i in range(20)])
    buffer.add([replace(labelled(i, 1 if i % 2 else None), feedback=True) for i in range(20, 60)])

    assert buffer.count(0) == 20
    assert {r.sequence for fit in (True, False) for r in buffer.select(0, fit)} == set(range(20))
    assert [r.sequence for r in buffer.feedback(0)] == list(range(59, 19, -1))
    assert buffer.n_feedback(50) == 10
    assert buffer.outcomes(20, version=0) == (40, 20)
    buffer.add([labelled(30, 2)])
    assert buffer.count(0) == 21
    assert buffer.n_feedback(20) == 39
    buffer.close()


def test_a_late_label_finds_its_regime(tmp_path: Path) -> None:
    """Labels belong to the regime their place in the stream was told to be of, also those that come afterwards."""
    buffer = LabelBuffer(tmp_path / "l.sqlite", 5000, 0.6, (4, 4, 3))
    buffer.add([labelled(i) for i in range(30)])
    buffer.attribute(3, 10, 40)
    buffer.attribute(4, 40, 50)
    buffer.add([labelled(i) for i in range(30, 60)])

    def places(regime: int) -> list[int]:
        return sorted(r.sequence for fit in (True, False) for r in buffer.of_regime(regime, fit))

    assert places(3) == list(range(10, 40))
    assert places(4) == list(range(40, 50))
    assert all(fits(r, 0.6) for r in buffer.of_regime(3, fit=True))
    buffer.forget_regime(3)
    assert places(3) == []
    assert len(buffer) == 60
    buffer.close()


def test_the_buffer_keeps_the_newest(tmp_path: Path) -> None:
    """Beyond its capacity the buffer drops the oldest labels; a corrected label replaces the first."""
    buffer = LabelBuffer(tmp_path / "l.sqlite", 50, 0.6, (4, 4, 3))
    for i in range(80):
        buffer.add([labelled(i)])
    buffer.add([labelled(79, label=2)])

    rows = buffer.select(0, True) + buffer.select(0, False)
    assert len(buffer) == 50
    assert min(r.sequence for r in rows) == 30
    assert next(r.label for r in rows if r.sequence == 79) == 2
    assert buffer.outcomes(70, version=0) == (10, 1)
    buffer.close()


WRITER = """
import sys
import numpy as np
from pathlib import Path
from tests.daemon.test_memory import labelled
from tta.daemon.files import read_json, write_json
from tta.daemon.labels import LabelBuffer
buffer = LabelBuffer(Path(sys.argv[1]), 5000, 0.6, (4, 4, 3))
for i in range(10**6):
    buffer.add([labelled(i)])
    print(i, flush=True)
"""


def test_an_acknowledged_label_survives_kill_9(tmp_path: Path) -> None:
    """Every label acknowledged before the process was killed is in the buffer afterwards."""
    path = tmp_path / "l.sqlite"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        acknowledged = [int(next(writer.stdout)) for _ in range(40)]
        os.kill(writer.pid, signal.SIGKILL)
        acknowledged += [int(line) for line in writer.stdout]

    buffer = LabelBuffer(path, 5000, 0.6, (4, 4, 3))
    have = {r.sequence for r in buffer.select(0, True) + buffer.select(0, False)}
    assert set(acknowledged) <= have
    buffer.close()


def test_labels_that_cannot_be_opened_say_which_file(tmp_path: Path) -> None:
    """A label buffer that is a folder, say, is an error with its name."""
    path = tmp_path / "l.sqlite"
    path.mkdir()

    with pytest.raises(ConfigError, match=r"l\.sqlite cannot be opened"):
        LabelBuffer(path, 50, 0.6, (4, 4, 3))


def delta() -> tuple[bytes, bytes]:
    """The files of a version."""
    return save({"a": np.zeros(2, np.float32)}), save({"x": np.zeros(1), "logits": np.zeros(1)})


def test_a_version_that_does_not_verify_is_not_served(tmp_path: Path) -> None:
    """After a file is damaged the newest version that verifies is the source."""
    store = Store(tmp_path, "hash")
    version = store.write(*delta(), "block1", "source", 0.0, {}, {"outcome": "accepted"})
    assert store.verified(version) == version == 1

    (tmp_path / "versions" / "000001" / "delta.safetensors").write_bytes(b"\0" * 80)

    assert store.verified(version) == 0


def test_a_version_of_another_bundle_is_not_served(tmp_path: Path) -> None:
    """A version made for another model is never taken."""
    version = Store(tmp_path, "one").write(*delta(), "head", "source", 0.0, {}, {})

    assert Store(tmp_path, "two").verified(version) == 0


def test_a_number_is_never_used_again(tmp_path: Path) -> None:
    """A discarded candidate's number is not given to the next version, and the gate's verdict on it stays."""
    store = Store(tmp_path, "hash")
    first = store.write(*delta(), "head", "source", 0.0, {}, {})
    store.discard(first, {"outcome": "rejected"})

    second = store.write(*delta(), "head", "source", 0.0, {}, {})

    assert (first, second) == (1, 2)
    assert store.numbers() == [0, 2]
    assert store.manifest(first).verdict == {"outcome": "rejected"}
    with pytest.raises(NotFoundError, match="there are 0, 2"):
        store.folder(first)


def test_weights_that_nobody_wants_go_though_their_verdict_cannot_be_noted(tmp_path: Path) -> None:
    """A candidate with a damaged manifest is dropped all the same."""
    store = Store(tmp_path, "hash")
    version = store.write(*delta(), "head", "source", 0.0, {}, {})
    (tmp_path / "versions" / "000001" / "manifest.json").write_bytes(b"{")

    store.discard(version, {"outcome": "rejected"})

    assert store.numbers() == [0]


def test_old_versions_are_retired_and_those_in_use_stay(tmp_path: Path) -> None:
    """Of a hundred versions the newest few and those in use stay, and the next number is the hundred-first."""
    store = Store(tmp_path, "hash")
    for number in range(1, 101):
        assert store.write(*delta(), "head", "source", 0.0, {}, {"outcome": "accepted"}) == number
        if number % 3 == 0:
            store.discard(number)

    gone = store.retire({0, 7, 50}, keep=10)

    assert len(gone) == 87
    assert store.numbers() == [0, 7, 50, *(n for n in range(90, 101) if n % 3)]
    assert len(list((tmp_path / "versions").iterdir())) == 13
    assert store.retire({0, 7, 50}, keep=10) == []
    assert store.write(*delta(), "head", "source", 0.0, {}, {}) == 101


def test_candidates_left_by_a_crash_are_dropped(tmp_path: Path) -> None:
    """At a restart what the gate never accepted goes, what it did stays."""
    store = Store(tmp_path, "hash")
    good = store.write(*delta(), "head", "source", 0.0, {}, {"outcome": "accepted"})
    store.write(*delta(), "head", "source", 0.0, {}, {})

    store.discard_candidates()

    assert store.numbers() == [0, good]


def damage(path: Path, how: str) -> None:
    """What a disk may do to a file."""
    data = path.read_bytes()
    half = len(data) // 2
    flipped = bytearray(data)
    flipped[half + half // 2] ^= 0x41
    path.write_bytes(
        {
            "empty": b"",
            "truncated": data[:half],
            "zeros": bytes(len(data)),
            "zeros from the middle on": data[:half] + bytes(len(data) - half),
            "two bits": bytes(flipped),
        }[how]
    )


DAMAGES = ("empty", "truncated", "zeros", "zeros from the middle on", "two bits")


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_is_noticed_and_set_aside(tmp_path: Path, how: str) -> None:
    """Whatever happens to a file of the state folder, it is not taken for what was written, and it is kept."""
    rng = np.random.default_rng(0)
    home, other = (fingerprint(rng.normal(m, 1, (400, 6)), np.zeros(400, np.int64)) for m in (0, 3))
    store, library = Store(tmp_path, "hash"), Library(tmp_path, home, 0.9, 4, n_images=50)
    store.save_state({"state": "stable", "sequence": 123456789})
    store.save_watch({"z": np.arange(64.0)})
    number = library.add(1, "input", 0.8, other, 0).number
    library.keep_images(number, np.ones((40, 4, 4, 3), np.uint8))

    for name in ("state.json", "watch.safetensors"):
        damage(tmp_path / name, how)
    assert store.load_state() is None
    assert store.load_watch() == {}
    assert store.load_state() == {}  # it is out of the way
    damage(library.images_path(number), how)
    assert library.images(number) is None
    damage(tmp_path / "regimes" / f"{number:06d}.safetensors", how)
    again = Library(tmp_path, home, 0.9, 4)
    assert set(again.regimes) == {HOME}
    damage(tmp_path / "library.json", how)
    last = Library(tmp_path, home, 0.9, 4)
    assert set(last.regimes) == {HOME}

    aside = [*store.damaged, *again.damaged, *last.damaged]
    assert [Path(p).name.partition(".damaged-")[0] for p in aside] == [
        "state.json",
        "watch.safetensors",
        f"{number:06d}.safetensors",
        "library.json",
    ]
    assert all(Path(p).is_file() for p in aside)


def test_a_regime_that_cannot_be_read_is_forgotten_alone(tmp_path: Path) -> None:
    """A fingerprint that is gone, or an entry of another release, costs that regime and keeps nothing down."""
    rng = np.random.default_rng(0)
    home, *others = (fingerprint(rng.normal(m, 1, (400, 6)), np.zeros(400, np.int64)) for m in (0, 3, -3, 6))
    library = Library(tmp_path, home, 0.9, 4)
    gone, strange, sound = (library.add(i, "input", 0.8, f, i).number for i, f in enumerate(others, 1))
    (tmp_path / "regimes" / f"{gone:06d}.safetensors").unlink()
    content = read_json(tmp_path / "library.json")
    next(r for r in content["regimes"] if r["number"] == strange)["mood"] = "new"
    write_json(tmp_path / "library.json", content)

    again = Library(tmp_path, home, 0.9, 4)

    assert set(again.regimes) == {HOME, sound}
    assert len(again.damaged) == 2


def test_the_newest_version_that_verifies_is_found(tmp_path: Path) -> None:
    """Of the accepted versions the newest whose files are whole, and the source when none is."""
    store = Store(tmp_path, "hash")
    for outcome in ("accepted", "accepted", "rejected"):
        store.write(*delta(), "block1", "source", 0.0, {}, {"outcome": outcome})
    assert store.newest() == 2
    damage(tmp_path / "versions" / "000002" / "delta.safetensors", "two bits")
    assert store.newest() == 1
    damage(tmp_path / "versions" / "000001" / "manifest.json", "zeros")
    assert store.newest() == 0


@pytest.mark.parametrize("at", ["the start", "the middle"])
def test_what_can_be_read_of_damaged_labels_is_kept(tmp_path: Path, at: str) -> None:
    """A hole in the middle of the label buffer costs the labels in it; the damaged file is set aside."""
    path = tmp_path / "l.sqlite"
    buffer = LabelBuffer(path, 5000, 0.6, (32, 32, 3))
    x = np.zeros((32, 32, 3), np.uint8)
    buffer.add([Labelled(ID + i, i, 0, 1, 1, x) for i in range(300)])
    buffer.close()
    data = bytearray(path.read_bytes())
    begin = 0 if at == "the start" else len(data) // 8192 * 4096
    data[begin : begin + 8192] = bytes(8192)
    path.write_bytes(data)

    again = LabelBuffer(path, 5000, 0.6, (32, 32, 3))

    aside = Path(next(iter(again.damaged)))
    assert aside.read_bytes() == data
    assert f"{len(again)} labels could be read" in again.damaged[str(aside)]
    assert len(again) == 0 if at == "the start" else 290 <= len(again) < 300
    again.add([Labelled(ID + 1000, 1000, 0, 1, 1, x)])
    assert 1000 in {r.sequence for fit in (True, False) for r in again.select(0, fit)}


def test_the_library_survives_and_forgets_the_least_used(tmp_path: Path) -> None:
    """Regimes come back from disk as they were; beyond the capacity the least recently used goes, never home."""
    rng = np.random.default_rng(0)

    def regime(mean: float):
        return fingerprint(rng.normal(mean, 1, (200, 6)), np.zeros(200, np.int64))

    library = Library(tmp_path, regime(0), 0.9, capacity=2)
    for i, mean in enumerate((3.0, -3.0, 6.0)):
        library.add(i + 1, "input", 0.8, regime(mean), sequence=i, keys=("north",))

    again = Library(tmp_path, regime(0), 0.9, capacity=2)

    assert set(again.regimes) == {HOME, 2, 3}
    window = rng.normal(-3, 1, (48, 6))
    known = [r for r in again.regimes.values() if r.fingerprint is not None]
    found = recognise([(r.fingerprint, window) for r in known])
    assert found is not None
    assert (known[found].number, known[found].version, known[found].keys) == (2, 2, ("north",))
    assert json.loads((tmp_path / "library.json").read_text())["regimes"][0]["kind"] == "input"


def test_a_version_may_serve_another_regime_as_well(tmp_path: Path) -> None:
    """Added again a version's regime is replaced; added for another regime both are kept."""
    rng = np.random.default_rng(0)

    def regime(mean: float):
        return fingerprint(rng.normal(mean, 1, (200, 6)), np.zeros(200, np.int64))

    library = Library(tmp_path, regime(0), 0.9, capacity=8)
    first = library.add(1, "input", 0.8, regime(3.0), 0)
    assert library.add(1, "input", 0.7, regime(3.1), 1).number == first.number
    second = library.add(1, "input", 0.6, regime(-3.0), 2, another=True)

    assert second.number != first.number
    assert [r.version for r in library.regimes.values()] == [0, 1, 1]


def test_images_of_a_regime_are_kept_and_go_with_it(tmp_path: Path) -> None:
    """As many images stay as are allowed, old and new; a forgotten regime has no file, home never has."""
    rng = np.random.default_rng(0)
    print_ = fingerprint(rng.normal(size=(400, 6)).astype(np.float32), np.zeros(400, np.int64))
    library = Library(tmp_path, print_, 0.9, 4, n_images=50)
    number = library.add(1, "input", 0.8, print_, 0).number
    for shade in (1, 2):
        library.keep_images(number, np.full((40, 4, 4, 3), shade, np.uint8))
    library.keep_images(HOME, np.full((40, 4, 4, 3), 9, np.uint8))

    kept = Library(tmp_path, print_, 0.9, 4, n_images=50).images(number)
    assert kept is not None
    assert len(kept) == 50
    assert set(np.unique(kept)) == {1, 2}
    assert library.regimes[number].n_images == 80
    assert library.images(HOME) is None
    library.forget(number)
    assert not library.images_path(number).exists()


def test_damaged_images_are_begun_anew(tmp_path: Path) -> None:
    """A truncated file of images costs the images in it and nothing else."""
    rng = np.random.default_rng(0)
    print_ = fingerprint(rng.normal(size=(400, 6)).astype(np.float32), np.zeros(400, np.int64))
    library = Library(tmp_path, print_, 0.9, 4, n_images=50)
    number = library.add(1, "input", 0.8, print_, 0).number
    library.keep_images(number, np.ones((40, 4, 4, 3), np.uint8))
    path = library.images_path(number)
    path.write_bytes(path.read_bytes()[:20])

    assert library.images(number) is None
    library.keep_images(number, np.ones((30, 4, 4, 3), np.uint8))
    kept = library.images(number)
    assert kept is not None
    assert len(kept) == 30
