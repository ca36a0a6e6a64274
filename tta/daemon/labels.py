"""The labelled buffer: SQLite on disk, durable when a label is acknowledged.

Each label is split once, by a hash of its prediction id, into those that fit a candidate and those that judge it;
a label never changes sides. Which regime a label belongs to follows from its place in the stream, so that late
ones find theirs.
"""

import hashlib
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tta.daemon.files import set_aside
from tta.errors import ConfigError, UnavailableError

Array = npt.NDArray[Any]

SCHEMA = """
CREATE TABLE IF NOT EXISTS labels (
    prediction_id INTEGER PRIMARY KEY,
    sequence INTEGER NOT NULL,
    version INTEGER NOT NULL,
    label INTEGER,              -- NULL: known to be wrong, but not what would be right
    predicted INTEGER NOT NULL, -- -1: given with the image, never predicted
    fit INTEGER NOT NULL,       -- 1: fits a candidate, 0: judges it
    asked INTEGER NOT NULL,     -- 1: we asked for it, so it is no random sample
    x BLOB,
    feedback INTEGER NOT NULL DEFAULT 0 -- 1: the answer was called right or wrong; nobody named a class
);
CREATE INDEX IF NOT EXISTS by_sequence ON labels (sequence);
CREATE INDEX IF NOT EXISTS usable ON labels (sequence, fit) WHERE label IS NOT NULL AND x IS NOT NULL;
CREATE TABLE IF NOT EXISTS spans ( -- of the stream, and the regime its traffic was of
    since INTEGER PRIMARY KEY,
    until INTEGER NOT NULL,
    regime INTEGER NOT NULL
);
"""
CHECKED_BYTES = 256 << 20  # of a file read through at each start; of a larger one damage shows when it is used
INSERT = "INSERT OR REPLACE INTO labels VALUES (?,?,?,?,?,?,?,?,?)"
RETRY_S = 5.0  # until labels that could not be stored may be sent again
MAX_SPANS = 4096  # remembered; older labels belong to no regime any more
# "Right" is said of what the serving version got right: a sample that no other version can look better on.
NAMED = "label IS NOT NULL AND NOT feedback AND x IS NOT NULL"


@dataclass(frozen=True)
class Labelled:
    """One label joined with its prediction.

    Attributes:
        label: class index, or None if only "wrong" is known.
        predicted: class the serving version answered; -1 if the image came with the label.
        x: (H, W, C) uint8, or None.
        asked: we asked for this label because the prediction was uncertain.
        feedback: somebody called the answer right or wrong, and named no class.
        confidence: of the prediction, see `tta.monitor.reference.confidence`; not kept on disk.
    """

    prediction_id: int
    sequence: int
    version: int
    label: int | None
    predicted: int
    x: Array | None
    asked: bool = False
    confidence: float | None = None
    feedback: bool = False


def fits(prediction_id: int, fit_fraction: float) -> bool:
    """Whether a label is for fitting; a pure function of the id, so a label never changes sides."""
    digest = hashlib.blake2b(prediction_id.to_bytes(8, "little", signed=True), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fit_fraction * 2**64


def _open(path: Path) -> sqlite3.Connection:
    """The database, made if it is not there.

    Raises:
        sqlite3.DatabaseError: it is damaged.
    """
    db = sqlite3.connect(path, isolation_level=None)
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")  # an acknowledged label survives a power cut
        db.executescript(SCHEMA)
        if "feedback" not in {row[1] for row in db.execute("PRAGMA table_info(labels)")}:
            db.execute("ALTER TABLE labels ADD COLUMN feedback INTEGER NOT NULL DEFAULT 0")
            db.execute("UPDATE labels SET feedback = 1 WHERE label IS NULL")
        small = path.stat().st_size <= CHECKED_BYTES
        problem = db.execute("PRAGMA quick_check(1)").fetchone()[0] if small else "ok"
        if problem != "ok":
            raise sqlite3.DatabaseError(problem)
    except sqlite3.DatabaseError:
        db.close()
        raise
    return db


def _readable(path: Path) -> list[tuple[Any, ...]]:
    """The labels of a damaged file that can be read: from both ends up to what cannot."""
    rows: dict[int, tuple[Any, ...]] = {}
    for order in ("ASC", "DESC"):
        db = sqlite3.connect(path)
        try:
            for row in db.execute(f"SELECT * FROM labels NOT INDEXED ORDER BY prediction_id {order}"):
                rows[row[0]] = row
        except sqlite3.DatabaseError:
            continue
        finally:
            db.close()
    return list(rows.values())


class LabelBuffer:
    """Labels on disk. Owned by the daemon's main thread."""

    def __init__(self, path: Path, capacity: int, fit_fraction: float, image_shape: Sequence[int]) -> None:
        self.capacity = capacity
        self.fit_fraction = fit_fraction
        self.image_shape = tuple(image_shape)
        self.damaged: dict[str, str] = {}  # files set aside, by their new name, and why
        try:
            self._db = _open(path)
        except sqlite3.OperationalError as error:  # the disk is full, say, or the file is another user's
            raise ConfigError(f"label buffer {path} cannot be opened: {error}") from error
        except sqlite3.DatabaseError as error:
            self._db = self._salvage(path, error)

    def _salvage(self, path: Path, error: sqlite3.DatabaseError) -> sqlite3.Connection:
        """Set a damaged file aside and begin another with what can be read of it."""
        aside = set_aside(path)
        for suffix in ("-wal", "-shm"):  # SQLite looks for them beside the file
            beside = path.with_name(path.name + suffix)
            if beside.exists():
                beside.rename(aside.with_name(aside.name + suffix))
        fresh = _open(path)
        found = _readable(aside)
        fresh.execute("BEGIN")  # one wait for the disk, not one for each
        fresh.executemany(INSERT, found)
        fresh.execute("COMMIT")
        self.damaged[str(aside)] = f"{path} is damaged: {error}; {len(found)} labels could be read"
        return fresh

    def add(self, labelled: Sequence[Labelled]) -> list[Labelled]:
        """Store labels; when this returns they are on disk. A second label for a prediction replaces the first.

        Returns:
            Those for predictions that had no label yet: a label sent twice is no new evidence.

        Raises:
            UnavailableError: they cannot be written, the disk is full, say; none of them is kept.
        """
        labelled = list({r.prediction_id: r for r in labelled}.values())
        rows = [
            (
                r.prediction_id,
                r.sequence,
                r.version,
                r.label,
                r.predicted,
                int(fits(r.prediction_id, self.fit_fraction)),
                int(r.asked),
                None if r.x is None else np.ascontiguousarray(r.x).tobytes(),
                int(r.feedback),
            )
            for r in labelled
        ]
        try:
            self._db.execute("BEGIN IMMEDIATE")
            known = {i for i in (r.prediction_id for r in labelled) if self._has(i)}
            self._db.executemany(INSERT, rows)
            excess = len(self) - self.capacity
            if excess > 0:
                self._db.execute(
                    "DELETE FROM labels WHERE prediction_id IN "
                    "(SELECT prediction_id FROM labels ORDER BY sequence LIMIT ?)",
                    (excess,),
                )
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if self._db.in_transaction:  # SQLite may have rolled back already
                self._db.execute("ROLLBACK")
            raise UnavailableError(f"labels cannot be stored, none was kept: {error}", RETRY_S) from error
        return [r for r in labelled if r.prediction_id not in known]

    def _has(self, prediction_id: int) -> bool:
        row = self._db.execute("SELECT 1 FROM labels WHERE prediction_id = ?", (prediction_id,)).fetchone()
        return row is not None

    def __len__(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM labels").fetchone()[0])

    def last_sequence(self) -> int:
        """The newest label's place in the stream; -1 if there is none."""
        return int(self._db.execute("SELECT coalesce(max(sequence), -1) FROM labels").fetchone()[0])

    def count(self, since: int) -> int:
        """Labels with a class and an image from `since` on."""
        query = f"SELECT count(*) FROM labels WHERE sequence >= ? AND {NAMED}"
        return int(self._db.execute(query, (since,)).fetchone()[0])

    def select(self, since: int, fit: bool, limit: int = -1) -> list[Labelled]:
        """Labels with a class and an image from `since` on, of one side of the split, newest first.

        Args:
            since: place in the stream.
            fit: which side.
            limit: at most so many; -1 for all.
        """
        return self._rows(f"WHERE sequence >= ? AND fit = ? AND {NAMED}", (since, int(fit)), limit)

    def attribute(self, regime: int, since: int, until: int) -> None:
        """Say that the traffic from `since` to before `until` was of a regime; an empty span says nothing."""
        if since >= until:
            return
        self._db.execute("INSERT OR REPLACE INTO spans VALUES (?,?,?)", (since, until, regime))
        self._db.execute(
            "DELETE FROM spans WHERE since NOT IN (SELECT since FROM spans ORDER BY since DESC LIMIT ?)",
            (MAX_SPANS,),
        )

    def forget_regime(self, regime: int) -> None:
        """Its labels belong to no regime from now on."""
        self._db.execute("DELETE FROM spans WHERE regime = ?", (regime,))

    def of_regime(self, regime: int, fit: bool, limit: int = -1) -> list[Labelled]:
        """Labels with a class and an image from traffic of a regime, of one side of the split, newest first."""
        return self._rows(
            f"JOIN spans ON sequence >= since AND sequence < until WHERE regime = ? AND fit = ? AND {NAMED}",
            (regime, int(fit)),
            limit,
        )

    def feedback(self, since: int, limit: int = -1) -> list[Labelled]:
        """Images from `since` on whose answers were called right or wrong, newest first. All of them fit.

        They judge nothing at a gate: of another version, "wrong" says only which answer would be wrong too.
        """
        return self._rows("WHERE sequence >= ? AND feedback AND predicted >= 0 AND x IS NOT NULL", (since,), limit)

    def n_feedback(self, since: int) -> int:
        """How many of `feedback`."""
        query = "SELECT count(*) FROM labels WHERE sequence >= ? AND feedback AND predicted >= 0 AND x IS NOT NULL"
        return int(self._db.execute(query, (since,)).fetchone()[0])

    def ids_since(self, since: int) -> set[int]:
        """Prediction ids labelled from `since` on."""
        return {
            int(row[0])
            for row in self._db.execute("SELECT prediction_id FROM labels WHERE sequence >= ?", (since,))
        }

    def outcomes(self, since: int, version: int) -> tuple[int, int]:
        """How many predictions of `version` since then were labelled unasked, and how many of them wrong."""
        row = self._db.execute(
            "SELECT count(*), coalesce(sum(label IS NULL OR label <> predicted), 0) FROM labels "
            "WHERE sequence >= ? AND version = ? AND predicted >= 0 AND NOT asked",
            (since, version),
        ).fetchone()
        return int(row[0]), int(row[1])

    def _rows(self, where: str, parameters: tuple[int, ...], limit: int) -> list[Labelled]:
        cursor = self._db.execute(
            f"SELECT prediction_id, sequence, version, label, predicted, x, asked, feedback FROM labels {where} "
            "ORDER BY sequence DESC LIMIT ?",
            (*parameters, limit),
        )
        return [
            Labelled(r[0], r[1], r[2], r[3], r[4], self._image(r[5]), bool(r[6]), feedback=bool(r[7]))
            for r in cursor
        ]

    def _image(self, blob: bytes | None) -> Array | None:
        return None if blob is None else np.frombuffer(blob, np.uint8).reshape(self.image_shape)

    def close(self) -> None:
        """Close the database."""
        self._db.close()
