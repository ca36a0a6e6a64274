"""The labelled buffer: SQLite on disk, durable when a label is acknowledged.

Each label is split once, by a hash of its image, into those that fit a candidate and those that judge it; a label
never changes sides, and the same image sent again is on the same. An image that was labelled several times counts
once, with its newest label: a camera that is stuck proves nothing. Which regime a label belongs to follows from
its place in the stream, so that late ones find theirs.
"""

import contextlib
import hashlib
import math
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tta.config import Config
from tta.daemon.clock import wall_us
from tta.daemon.files import set_aside, sync
from tta.daemon.labellers import Labellers
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
    feedback INTEGER NOT NULL DEFAULT 0, -- 1: the answer was called right or wrong; nobody named a class
    client TEXT NOT NULL DEFAULT '', -- who gave it; '' where nobody is asked for a key, or if two clients agree
    contested TEXT NOT NULL DEFAULT '', -- another client, who gave another label: it is not used
    stored_us INTEGER NOT NULL DEFAULT 0 -- when it was stored, since the epoch; 0: not known yet
);
CREATE TABLE IF NOT EXISTS spans ( -- of the stream, and the regime its traffic was of
    since INTEGER PRIMARY KEY,
    until INTEGER NOT NULL,
    regime INTEGER NOT NULL
);
"""
ADDED = {  # columns that older files lack
    "feedback": "INTEGER NOT NULL DEFAULT 0",
    "client": "TEXT NOT NULL DEFAULT ''",
    "contested": "TEXT NOT NULL DEFAULT ''",
    "stored_us": "INTEGER NOT NULL DEFAULT 0",
}
CHECKED_BYTES = 256 << 20  # of a file read through at each start; of a larger one damage shows when it is used
COLUMNS = (
    *("prediction_id", "sequence", "version", "label", "predicted", "fit", "asked", "x", "feedback"),
    *("client", "contested", "stored_us"),
)
IMAGE = COLUMNS.index("x")
ABSENT = {  # what older files mean without them
    "feedback": "label IS NULL",
    "client": "''",
    "contested": "''",
    "stored_us": "0",
}
LEAST = {"label": 0, "predicted": -1}
INSERT = f"INSERT OR REPLACE INTO labels ({', '.join(COLUMNS)}) VALUES ({','.join('?' * len(COLUMNS))})"
BUSY_MS = 1000  # that the daemon's loop waits for whoever reads the file
EXPIRED_AT_A_TIME = 256
RETRY_S = 5.0  # until labels that could not be stored may be sent again
ROW_BYTES = 300  # of a label beside its image, with its place in the indexes
MAX_SPANS = 4096  # remembered; older labels belong to no regime any more
# "Right" is said of what the serving version got right: a sample that no other version can look better on.
NAMED = "label IS NOT NULL AND NOT feedback AND contested = '' AND x IS NOT NULL"
CALLED = "feedback AND contested = '' AND predicted >= 0 AND x IS NOT NULL"
OUTCOME = "predicted >= 0 AND NOT asked AND contested = ''"
WRONG = "(label IS NULL OR label <> predicted)"
SIDE = f"WHERE sequence >= ? AND fit = ? AND {NAMED}"
# What is counted at every tick, or label, is counted in an index: a row's image lies before some of its columns.
INDEXES = f"""
DROP INDEX IF EXISTS usable;
CREATE INDEX IF NOT EXISTS by_sequence ON labels (sequence);
CREATE INDEX IF NOT EXISTS by_age ON labels (stored_us);
CREATE INDEX IF NOT EXISTS by_client ON labels (client, sequence);
CREATE INDEX IF NOT EXISTS named ON labels (fit, client, sequence) WHERE {NAMED};
CREATE INDEX IF NOT EXISTS called ON labels (client, sequence) WHERE {CALLED};
CREATE INDEX IF NOT EXISTS contest ON labels (client, contested) WHERE contested <> '';
CREATE INDEX IF NOT EXISTS outcome ON labels (version, client, sequence, {WRONG}) WHERE {OUTCOME};
"""


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
        client: who gave it; "" where nobody is asked for a key, or if two clients agree on it.
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
    client: str = ""

    def agrees(self, label: int | None) -> bool:
        """Whether another label of the same prediction, None for "wrong", can be true beside this one."""
        if label is None or self.label is None:
            return label == self.label or self.predicted not in (label, self.label)
        return label == self.label


@dataclass(frozen=True)
class Added:
    """What became of labels.

    Attributes:
        fresh: those for predictions that had none yet: a label sent twice is no new evidence.
        contested: ids of predictions for which another client has given another label.
    """

    fresh: list[Labelled]
    contested: set[int]


def fits(row: Labelled, fit_fraction: float) -> bool:
    """Whether a label is for fitting; a pure function of its image, or of the prediction's id without one."""
    content = row.prediction_id.to_bytes(8, "little", signed=True) if row.x is None else row.x.tobytes()
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "little") < fit_fraction * 2**64


def image_hash(x: Array) -> bytes:
    """Of an image, by which it is known again."""
    return hashlib.blake2b(x.tobytes(), digest_size=16).digest()


def distinct(rows: Sequence[Labelled]) -> list[Labelled]:
    """The first of those with the same image, without those whose image is damaged."""
    first: dict[bytes, Labelled] = {}
    for row in rows:
        if row.x is not None:
            first.setdefault(image_hash(row.x), row)
    return list(first.values())


def _open(path: Path, check: bool = True) -> sqlite3.Connection:
    """The database, made if it is not there; `check` reads a small one through.

    Raises:
        sqlite3.DatabaseError: it is damaged.
    """
    db = sqlite3.connect(path, isolation_level=None)
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")  # an acknowledged label survives a power cut
        db.execute("PRAGMA secure_delete=ON")  # zeros in the place of an image that goes
        db.execute(f"PRAGMA busy_timeout={BUSY_MS}")
        db.executescript(SCHEMA)
        has = _columns(db)
        for name, kind in ADDED.items():
            if name not in has:
                db.execute(f"ALTER TABLE labels ADD COLUMN {name} {kind}")
        if "feedback" not in has:
            db.execute("UPDATE labels SET feedback = 1 WHERE label IS NULL")
        db.executescript(INDEXES)
        db.execute("UPDATE labels SET stored_us = ? WHERE stored_us = 0", (wall_us(),))
        if "stored_us" not in has:
            db.execute("VACUUM")  # an older release left images in free pages
        small = path.stat().st_size <= CHECKED_BYTES
        problem = db.execute("PRAGMA quick_check(1)").fetchone()[0] if small and check else "ok"
        if problem != "ok":
            raise sqlite3.DatabaseError(problem)
    except sqlite3.DatabaseError:
        db.close()
        raise
    except UnicodeError as error:  # in what SQLite says of it
        db.close()
        raise sqlite3.DatabaseError(str(error)) from error
    return db


def _columns(db: sqlite3.Connection) -> list[str]:
    return [row[1] for row in db.execute("PRAGMA table_info(labels)")]


def _readable(path: Path) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """Labels and spans of a damaged file that can be read and may be true: from both ends up to what cannot."""
    rows: dict[int, tuple[Any, ...]] = {}
    spans: dict[int, tuple[Any, ...]] = {}
    for order in ("ASC", "DESC"):
        db = sqlite3.connect(path)
        with contextlib.suppress(sqlite3.DatabaseError, UnicodeError, KeyError):
            has = _columns(db)
            wanted = ", ".join(c if c in has else ABSENT[c] for c in COLUMNS)
            for row in db.execute(f"SELECT {wanted} FROM labels NOT INDEXED ORDER BY prediction_id {order}"):
                rows[row[0]] = row
        with contextlib.suppress(sqlite3.DatabaseError, UnicodeError):
            for span in db.execute(f"SELECT since, until, regime FROM spans ORDER BY since {order}"):
                spans[span[0]] = span
        db.close()
    lengths = Counter(len(row[IMAGE]) for row in rows.values() if isinstance(row[IMAGE], bytes))
    usual = next((n for n, _ in lengths.most_common(1)), 0)
    true_spans = [span for span in spans.values() if all(isinstance(value, int) for value in span)]
    return [row for row in rows.values() if _is_label(row, usual)], true_spans


def _is_label(row: tuple[Any, ...], n_bytes: int) -> bool:
    """Whether every column holds what it should; of the images all have as many bytes."""
    for name, value in zip(COLUMNS, row, strict=True):
        if name == "x":
            right = value is None or (isinstance(value, bytes) and len(value) == n_bytes)
        elif name in ("client", "contested"):
            right = isinstance(value, str)
        elif name == "label" and value is None:
            right = True
        else:
            right = isinstance(value, int) and value >= LEAST.get(name, value)
        if not right:
            return False
    return True


def is_damage(error: sqlite3.DatabaseError) -> bool:
    """Whether an error is of the file's content: a full disk, a lock or another user's file is none.

    A table without our columns is, for which SQLite has the code of a wrong query.
    """
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    return not isinstance(error, sqlite3.OperationalError) or code == sqlite3.SQLITE_ERROR


def check_labels(path: Path) -> None:
    """Read a file of labels to its end.

    Raises:
        sqlite3.DatabaseError: it is damaged.
        ConfigError: it cannot be read now.
    """
    db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=1.0)
    try:
        problem = db.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if problem != "ok":
            raise sqlite3.DatabaseError(problem)
        lacking = {*COLUMNS} - {*_columns(db), *ADDED}
        if lacking:
            raise sqlite3.DatabaseError(f"no column {', '.join(sorted(lacking))}")
    except UnicodeError as error:
        raise sqlite3.DatabaseError(str(error)) from error
    except sqlite3.DatabaseError as error:
        if is_damage(error):
            raise
        raise ConfigError(f"label buffer {path} cannot be read: {error}") from error
    finally:
        db.close()


def salvage(path: Path) -> tuple[Path, int]:
    """Set a damaged file aside and put another with what can be read of it in its place.

    Returns:
        The damaged file's new name, and how many labels the other has.

    Raises:
        ConfigError: no other can be written; the damaged file is where it was.
    """
    labels, spans = _readable(path)
    fresh = path.with_name(f".{path.name}.new")
    try:
        fresh.unlink(missing_ok=True)
        db = _open(fresh)
        try:
            db.execute("BEGIN")  # one wait for the disk, not one for each
            db.executemany(INSERT, labels)
            db.executemany("INSERT OR REPLACE INTO spans VALUES (?,?,?)", spans)
            db.execute("COMMIT")
        finally:
            db.close()
        aside = set_aside(path)
        for suffix in ("-wal", "-shm"):  # SQLite looks for them beside the file
            beside = path.with_name(path.name + suffix)
            if beside.exists():
                beside.rename(aside.with_name(aside.name + suffix))
        fresh.rename(path)
        sync(path.parent)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"label buffer {path} is damaged, and no other can be written: {error}") from error
    return aside, len(labels)


def read_labelled_images(path: Path, image_shape: Sequence[int]) -> tuple[Array, Array, list[str]]:
    """The images on disk whose class somebody has named and nobody contests; the daemon may run meanwhile.

    Args:
        path: of the file.
        image_shape: (H, W, C) of the model.

    Returns:
        x (N, H, W, C) uint8, y (N,) int64 and who gave each label ("": nobody was asked for a key, or two agree),
        the oldest first.

    Raises:
        ConfigError: it cannot be read.
    """
    named = "x IS NOT NULL AND label IS NOT NULL AND contested = '' AND feedback = 0"
    query = f"SELECT x, label, client FROM labels WHERE {named}"
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=1.0)
        ) as db:
            rows = db.execute(f"{query} ORDER BY sequence, prediction_id").fetchall()
    except sqlite3.Error as error:
        raise ConfigError(f"{path} cannot be read: {error}; see `tta check --state`") from error
    size = math.prod(image_shape)
    rows = [row for row in rows if len(row[0]) == size]  # a damaged row is no image of this model
    x = np.frombuffer(b"".join(row[0] for row in rows), np.uint8).reshape(-1, *image_shape)
    return x, np.array([row[1] for row in rows], np.int64), [row[2] for row in rows]


def room_for_labels(config: Config, image_shape: Sequence[int]) -> int:
    """How many labels are kept: what `labels.capacity` says, or as many as the disk may take.

    Raises:
        ConfigError: too few to adapt by.
    """
    each = math.prod(image_shape) + ROW_BYTES
    labels, least = config.labels, 2 * config.adapt.labels
    room = min(labels.capacity, labels.disk_bytes // each)
    if room < least:
        raise ConfigError(
            f"labels.disk_bytes = {labels.disk_bytes} holds {room} labels with their images: at least "
            f"{least * each} are needed for twice adapt.labels = {config.adapt.labels}"
        )
    return room


def _stored_before(db: sqlite3.Connection, time_us: int) -> list[int]:
    """Ids of labels stored before a time, `EXPIRED_AT_A_TIME` at most."""
    query = "SELECT prediction_id FROM labels WHERE stored_us < ? LIMIT ?"
    return [row[0] for row in db.execute(query, (time_us, EXPIRED_AT_A_TIME))]


def _erase(db: sqlite3.Connection, prediction_ids: Sequence[int]) -> int:
    """Delete labels and their bytes, also from the log; how many there were.

    Raises:
        UnavailableError: the disk refuses, or somebody reads the file.
    """
    before = db.total_changes
    try:
        db.execute("BEGIN IMMEDIATE")
        db.executemany("DELETE FROM labels WHERE prediction_id = ?", [(number,) for number in prediction_ids])
        db.execute("COMMIT")
        # Also without a change: what was deleted while somebody read may lie in the log still.
        busy = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] if prediction_ids else 0
    except (sqlite3.Error, OverflowError) as error:
        raise UnavailableError(f"labels cannot be deleted: {error}", RETRY_S) from error
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")
    if busy:
        raise UnavailableError("somebody reads the labels, and their file cannot be cleared: try again", RETRY_S)
    return db.total_changes - before


def erase_labels(path: Path, prediction_ids: Sequence[int] = (), before_us: int = 0) -> int:
    """Delete labels from a file that no daemon has open; how many there were. A damaged one is set aside.

    Args:
        path: of the file.
        prediction_ids: those to delete.
        before_us: and those stored before, microseconds since the epoch; `EXPIRED_AT_A_TIME` at most.

    Raises:
        UnavailableError: they cannot be deleted.
    """
    try:
        with contextlib.closing(_open(path, check=False)) as db:
            return _erase(db, [*prediction_ids, *_stored_before(db, before_us)])
    except sqlite3.DatabaseError as error:
        if is_damage(error):
            set_aside(path)
            return 0
        raise UnavailableError(f"labels in {path} cannot be deleted: {error}", RETRY_S) from error


class LabelBuffer:
    """Labels on disk. Owned by the daemon's main thread.

    Args:
        path: of the SQLite file.
        capacity: labels kept.
        fit_fraction: share that fits, in (0, 1).
        image_shape: (H, W, C).
        labellers: who may label now. What is counted and selected here is what they are believed.
        now_us: microseconds since the epoch, of a clock that never goes back.
    """

    def __init__(
        self,
        path: Path,
        capacity: int,
        fit_fraction: float,
        image_shape: Sequence[int],
        labellers: Callable[[], Labellers] = Labellers,
        now_us: Callable[[], int] = wall_us,
    ) -> None:
        self._path = path
        self._now_us = now_us
        self.labellers = labellers
        self.capacity = capacity
        self.fit_fraction = fit_fraction
        self.image_shape = tuple(image_shape)
        self.damaged: dict[str, str] = {}  # files set aside, by their new name, and why
        try:
            self._db = _open(path)
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise ConfigError(f"label buffer {path} cannot be opened: {error}") from error
            aside, n = salvage(path)
            self.damaged[str(aside)] = f"{path} is damaged: {error}; {n} labels could be read"
            self._db = _open(path)

    def add(self, labelled: Sequence[Labelled]) -> Added:
        """Store labels; when this returns they are on disk.

        A client's second label for a prediction replaces its first. Where two clients agree, the label is no
        longer one client's; where they do not, it is contested, and neither is used. An admin's label stands
        against any other's, and anybody's against that of a client that may not label any more.

        Args:
            labelled: of one client.

        Raises:
            UnavailableError: they cannot be written, the disk is full, say; none of them is kept.
        """
        labelled = list({r.prediction_id: r for r in labelled}.values())
        added, who = Added([], set()), self.labellers()
        try:
            self._db.execute("BEGIN IMMEDIATE")
            for row in labelled:
                self._add(row, who, added)
            self._evict()
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if self._db.in_transaction:  # SQLite may have rolled back already
                self._db.execute("ROLLBACK")
            raise UnavailableError(f"labels cannot be stored, none was kept: {error}", RETRY_S) from error
        return added

    def _add(self, row: Labelled, who: Labellers, added: Added) -> None:
        query = "SELECT client, label, feedback, contested FROM labels WHERE prediction_id = ?"
        known = self._db.execute(query, (row.prediction_id,)).fetchone()
        if known is None:
            added.fresh.append(row)
        if known is None or row.client in who.admins or not who.are_used(known[0]):
            self._put(row)
            return
        client, label, feedback, contested = known
        contested = contested if who.are_used(contested) else ""
        if client != row.client and not row.agrees(label):
            contested = contested or row.client
        if contested:
            added.contested.add(row.prediction_id)
        if client in who.admins:
            return
        if client == row.client:
            self._put(row, contested)
        elif contested:
            self._db.execute(
                "UPDATE labels SET contested = ? WHERE prediction_id = ?", (contested, row.prediction_id)
            )
        else:  # two say so; of them who names the class says more
            if feedback and not row.feedback:
                self._put(row)
            self._db.execute("UPDATE labels SET client = '' WHERE prediction_id = ?", (row.prediction_id,))

    def _put(self, row: Labelled, contested: str = "") -> None:
        self._db.execute(
            INSERT,
            (
                row.prediction_id,
                row.sequence,
                row.version,
                row.label,
                row.predicted,
                int(fits(row, self.fit_fraction)),
                int(row.asked),
                None if row.x is None else np.ascontiguousarray(row.x).tobytes(),
                int(row.feedback),
                row.client,
                contested,
                self._now_us(),
            ),
        )

    def _evict(self) -> None:
        """Keep to the capacity: the oldest go, of those clients that have most."""
        if len(self) <= self.capacity:
            return
        counts = dict(self._db.execute("SELECT client, count(*) FROM labels GROUP BY client").fetchall())
        room, rest = self.capacity, len(counts)
        for client, n in sorted(counts.items(), key=lambda pair: pair[1]):
            kept = min(n, room // rest)
            room, rest = room - kept, rest - 1
            self._db.execute(
                "DELETE FROM labels WHERE prediction_id IN "
                "(SELECT prediction_id FROM labels WHERE client = ? ORDER BY sequence LIMIT ?)",
                (client, n - kept),
            )

    def delete(self, prediction_ids: Sequence[int]) -> int:
        """Delete labels with their images, and their bytes on the disk; how many there were.

        Raises:
            UnavailableError: the disk refuses, or somebody reads the file; then some or all are still there.
        """
        return _erase(self._db, prediction_ids)

    def expire(self, age_s: float) -> int:
        """The same with those stored longer ago, `EXPIRED_AT_A_TIME` at most."""
        return _erase(self._db, _stored_before(self._db, self._now_us() - round(1e6 * age_s)))

    def delete_all(self) -> int:
        """The same with every label: the file begins anew.

        Raises:
            UnavailableError: the disk refuses.
        """
        n = len(self)
        self._db.close()
        try:
            for suffix in ("", "-wal", "-shm"):
                self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
        except OSError as error:
            raise UnavailableError(f"labels cannot be deleted: {error}", RETRY_S) from error
        finally:
            self._db = _open(self._path)
        return n

    def __len__(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM labels").fetchone()[0])

    def last_sequence(self) -> int:
        """The newest label's place in the stream; -1 if there is none."""
        return int(self._db.execute("SELECT coalesce(max(sequence), -1) FROM labels").fetchone()[0])

    def count(self, since: int) -> int:
        """Labels with a class and an image from `since` on, as many as are used."""
        return sum(sum(self._used(SIDE, (since, fit)).values()) for fit in (0, 1))

    def given(self, since: int) -> int:
        """The same with those that are not used."""
        return sum(sum(self._given(SIDE, (since, fit)).values()) for fit in (0, 1))

    def select(self, since: int, fit: bool, limit: int = -1) -> list[Labelled]:
        """Labels with a class and an image from `since` on, of one side of the split; newest first, an image once.

        Args:
            since: place in the stream.
            fit: which side.
            limit: at most so many; -1 for all.
        """
        return distinct(self._rows(SIDE, (since, int(fit)), limit))

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
        """Labels with a class and an image from traffic of a regime, of one side; newest first, an image once."""
        rows = self._rows(
            f"JOIN spans ON sequence >= since AND sequence < until WHERE regime = ? AND fit = ? AND {NAMED}",
            (regime, int(fit)),
            limit,
        )
        return distinct(rows)

    def not_attributed(self, rows: Sequence[Labelled]) -> list[Labelled]:
        """Those that belong to no regime yet, so that no regime has learned from them."""
        oldest = min((r.sequence for r in rows), default=0)
        spans = self._db.execute("SELECT since, until FROM spans WHERE until > ?", (oldest,)).fetchall()
        return [r for r in rows if not any(since <= r.sequence < until for since, until in spans)]

    def feedback(self, since: int, limit: int = -1) -> list[Labelled]:
        """Images from `since` on whose answers were called right or wrong, newest first. All of them fit.

        They judge nothing at a gate: of another version, "wrong" says only which answer would be wrong too.
        """
        return self._rows(f"WHERE sequence >= ? AND {CALLED}", (since,), limit)

    def n_feedback(self, since: int) -> int:
        """How many of `feedback`."""
        return sum(self._used(f"WHERE sequence >= ? AND {CALLED}", (since,)).values())

    def ids_since(self, since: int) -> set[int]:
        """Prediction ids labelled from `since` on."""
        return {
            int(row[0])
            for row in self._db.execute("SELECT prediction_id FROM labels WHERE sequence >= ?", (since,))
        }

    def outcomes(self, since: int, version: int, without: str | None = None) -> tuple[int, int]:
        """How many predictions of `version` since then were labelled unasked, and how many of them wrong."""
        given = self.outcomes_by_client(since, version)
        used = self.labellers().used({client: n for client, (n, _) in given.items()})
        used = {client: n for client, n in used.items() if client != without}
        wrong = 0
        for client, n in used.items():
            if n == given[client][0]:
                wrong += given[client][1]
                continue
            query = (
                f"SELECT {WRONG} AS wrong FROM labels WHERE sequence >= ? AND version = ? AND {OUTCOME} "
                "AND client = ? ORDER BY sequence DESC LIMIT ?"
            )
            wrong += sum(row[0] for row in self._db.execute(query, (since, version, client, n)))
        return sum(used.values()), wrong

    def outcomes_by_client(self, since: int, version: int) -> dict[str, tuple[int, int]]:
        """The same of each client, with those that are not used."""
        query = (
            f"SELECT client, count(*), sum({WRONG}) FROM labels "
            f"WHERE sequence >= ? AND version = ? AND {OUTCOME} GROUP BY client"
        )
        return {client: (n, wrong) for client, n, wrong in self._db.execute(query, (since, version))}

    def recent_by_client(self, since: int, version: int, newest: int) -> dict[str, tuple[int, int]]:
        """The same of the newest labels of each client whose labels are used."""
        query = (
            f"SELECT client, count(*), sum(wrong) FROM (SELECT client, {WRONG} AS wrong, "
            f"row_number() OVER (PARTITION BY client ORDER BY sequence DESC) AS nth FROM labels "
            f"WHERE sequence >= ? AND version = ? AND {OUTCOME}) WHERE nth <= ? GROUP BY client"
        )
        found = self._db.execute(query, (since, version, newest)).fetchall()
        who = self.labellers()
        return {client: (n, wrong) for client, n, wrong in found if who.are_used(client)}

    def contests(self) -> dict[str, int]:
        """In how many contests each client is, those with most first."""
        query = "SELECT client, contested, count(*) FROM labels WHERE contested <> '' GROUP BY client, contested"
        totals: Counter[str] = Counter()
        for client, other, n in self._db.execute(query):
            totals.update({client: n, other: n})
        return dict(totals.most_common())

    def _given(self, where: str, parameters: tuple[int, ...]) -> dict[str, int]:
        """How many labels each client gave, of those that a clause selects."""
        query = f"SELECT client, count(*) FROM labels {where} GROUP BY client"
        return dict(self._db.execute(query, parameters).fetchall())

    def _used(self, where: str, parameters: tuple[int, ...], limit: int = -1) -> dict[str, int]:
        """How many of them are used."""
        return self.labellers().used(self._given(where, parameters), limit)

    def _rows(self, where: str, parameters: tuple[int, ...], limit: int) -> list[Labelled]:
        """Those used, newest first."""
        names = "prediction_id, sequence, version, label, predicted, x, asked, feedback, client"
        query = f"SELECT {names} FROM labels {where} AND client = ? ORDER BY sequence DESC LIMIT ?"
        found = [
            Labelled(r[0], r[1], r[2], r[3], r[4], self._image(r[5]), bool(r[6]), None, bool(r[7]), r[8])
            for client, n in self._used(where, parameters, limit).items()
            for r in self._db.execute(query, (*parameters, client, n))
        ]
        return sorted(found, key=lambda r: -r.sequence)

    def _image(self, blob: bytes | None) -> Array | None:
        if not isinstance(blob, bytes) or len(blob) != math.prod(
            self.image_shape
        ):  # damage that SQLite did not see
            return None
        return np.frombuffer(blob, np.uint8).reshape(self.image_shape)

    def close(self) -> None:
        """Close the database."""
        self._db.close()
