"""What a daemon would have done with a recorded stream: read it, measure what happened, write the report."""

import base64
import csv
import html
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import numpy.typing as npt

from tta.bundle import Manifest
from tta.errors import InputError
from tta.images import find_images, read_image, read_labelled
from tta.scenario.report import block_of, count_mixed, expected_logits
from tta.scenario.run import Scenario

Array = npt.NDArray[Any]
Track = Callable[[Sequence[Path]], Iterable[Path]]
UNKNOWN = -1
TOLD = {  # events
    *("alarm", "actionable", "notice", "enough_labels", "accepted", "proposed", "not_accepted", "swapped"),
    *("known", "quiet", "harmless", "moved_on", "disagreed", "confirmed", "home_recognised"),
}


@dataclass(frozen=True)
class Part:
    """What became of one recording; accuracies are shares of unlabelled images whose class is known, else None."""

    name: str
    images: int
    alarms: int
    accuracy_source: float | None
    accuracy_served: float | None
    labels: int


@dataclass(frozen=True)
class Stretch:
    """Images that one version answered, from one swap to the next; accuracies as of a `Part`."""

    first: int
    images: int
    version: int
    block: str
    reason: str
    accuracy_source: float | None
    accuracy_served: float | None


@dataclass(frozen=True)
class Replay:
    """What would have happened; accuracies as of a `Part`.

    Attributes:
        rate: images a second.
        answered: images; the others were refused or lost.
        mixed_version_replies: replies that are not what the version they name computes.
        alarms: of all kinds, false ones among them.
        alarms_expected: false ones, if nothing had ever shifted.
        adapted: candidates made.
        promoted: of them.
        state: of the cycle at the end.
        events: as `tta status` tells them, the telling ones.
    """

    images: int
    rate: float
    seconds: float
    answered: int
    mixed_version_replies: int
    alarms: int
    alarms_expected: float
    adapted: int
    promoted: int
    labels: int
    accuracy_source: float | None
    accuracy_served: float | None
    state: str
    parts: list[Part]
    stretches: list[Stretch]
    events: list[dict[str, Any]]


def read_stream(path: Path, manifest: Manifest, track: Track = iter) -> tuple[Array, Array]:
    """Read one recording, in the order in which it was recorded.

    Args:
        path: an `.npz` with x and y, in order; a `.csv` with lines PICTURE,CLASS (the class may be missing); a
            folder of class folders, or of pictures whose class nobody knows, in the order of the files' names.
        manifest: of the model.
        track: wraps the list of files, for a progress bar.

    Returns:
        x (N, H, W, C) uint8, and y (N,) int64 with -1 for unknown.

    Raises:
        InputError: it cannot be read, or names a class that the model does not have.
    """
    shape, resize = manifest.image_shape, manifest.resize
    if path.suffix == ".npz":
        x, y, names = read_labelled(path, shape, resize)
        if names == [str(i) for i in range(len(names))]:  # the file names no classes, or these: indices are meant
            if len(names) > manifest.n_classes:
                raise InputError(f"{path}: class {len(names) - 1}, the model has 0 to {manifest.n_classes - 1}")
            return x, y
    elif path.suffix == ".csv":
        return _read_csv(path, manifest, track)
    elif path.is_dir() and not any(p.is_dir() for p in path.iterdir()):
        pictures = find_images(path)
        x = np.stack([read_image(file, shape, resize) for file in track(pictures)])
        return x, np.full(len(x), UNKNOWN)
    elif path.is_dir():
        pictures = sorted(find_images(path), key=lambda file: file.name)
        x = np.stack([read_image(file, shape, resize) for file in track(pictures)])
        return x, _indices([file.relative_to(path).parts[0] for file in pictures], manifest, path)
    else:
        raise InputError(f"{path} is no recording: give an .npz, a .csv with PICTURE,CLASS, or a folder")
    return x, _indices([names[i] for i in y], manifest, path)


def _read_csv(path: Path, manifest: Manifest, track: Track) -> tuple[Array, Array]:
    try:
        with path.open(newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not rows:
        raise InputError(f"{path} is empty: write lines PICTURE,CLASS")
    pictures = [path.parent / row[0].strip() for row in rows]
    x = np.stack([read_image(file, manifest.image_shape, manifest.resize) for file in track(pictures)])
    return x, _indices([row[1].strip() if len(row) > 1 else "" for row in rows], manifest, path)


def _indices(names: Sequence[str], manifest: Manifest, path: Path) -> Array:
    index = {name: i for i, name in enumerate(manifest.classes)} | {"": UNKNOWN}
    digits = {str(i): i for i in range(manifest.n_classes)}
    strange = sorted({name for name in names if name not in index and name not in digits})
    if strange:
        known = ", ".join(manifest.classes[:10]) + (", …" if manifest.n_classes > 10 else "")
        raise InputError(f"{path}: {strange[0]!r} is no class of the model: it has {known}")
    return np.array([index.get(name, digits.get(name, UNKNOWN)) for name in names], np.int64)


def measure_replay(scenario: Scenario, bundle: Path) -> Replay:
    """Measure; needs the `serve` extra, since it runs every version again, the source on all images."""
    expected = expected_logits(scenario, bundle)
    scenario.source_logits = expected[0]
    truth = np.concatenate([p.y for p in scenario.phases])
    at = np.array([scenario.flat_index(s) for s in scenario.sent])
    served = np.array([UNKNOWN if s.logits is None else int(s.logits.argmax()) for s in scenario.sent])
    versions = np.array([s.version for s in scenario.sent])
    y = truth[at]
    counted = (served >= 0) & np.array([scenario.is_scored(s) for s in scenario.sent])
    source = expected[0].argmax(axis=1)[at]

    def shares(chosen: Array) -> tuple[float | None, float | None]:
        chosen = chosen & counted
        if not chosen.any():
            return None, None
        right = [round(float((classes[chosen] == y[chosen]).mean()), 4) for classes in (source, served)]
        return right[0], right[1]

    number = np.array([s.phase for s in scenario.sent])
    alarms = [e for e in scenario.events if e["event"] == "alarm"]
    of_alarm = [number[min(e.get("sample", e["sequence"]), len(number) - 1)] for e in alarms]
    parts = [
        Part(p.name, int((number == i).sum()), of_alarm.count(i), *shares(number == i), scenario.labels_sent[i])
        for i, p in enumerate(scenario.phases)
    ]
    answered = np.flatnonzero(served >= 0)
    changes = [0, *(np.flatnonzero(np.diff(versions[answered])) + 1), len(answered)]
    stretches = []
    for begin, end in itertools.pairwise(changes):
        mine, version = answered[begin:end], int(versions[answered[begin]])
        chosen = np.zeros(len(served), bool)
        chosen[mine] = True
        block, reason = _why(scenario, version, int(mine[0]))
        stretches.append(Stretch(int(mine[0]), len(mine), version, block, reason, *shares(chosen)))
    swaps = [e for e in scenario.events if e["event"] == "swapped"]
    made = [e for e in scenario.events if e["event"] in ("accepted", "proposed", "not_accepted")]
    return Replay(
        images=len(scenario.sent),
        rate=scenario.rate,
        seconds=round(scenario.seconds(), 1),
        answered=len(answered),
        mixed_version_replies=count_mixed(scenario, expected),
        alarms=len(alarms),
        alarms_expected=round(len(scenario.sent) / float(scenario.status["arl"]), 3),
        adapted=len(made),
        promoted=sum(e.get("reason") == "promotion" for e in swaps),
        labels=sum(scenario.labels_sent),
        **dict(zip(("accuracy_source", "accuracy_served"), shares(counted), strict=True)),
        state=str(scenario.status["state"]),
        parts=parts,
        stretches=stretches,
        events=[e for e in scenario.events if e["event"] in TOLD],
    )


def _why(scenario: Scenario, version: int, first: int) -> tuple[str, str]:
    """Block of a version, and the reason of the swap that brought it before image `first`."""
    # The daemon hears of a swap a little after the first images that the new version answers.
    swaps = [e for e in scenario.events if e["event"] == "swapped" and e["serving"] == version]
    swap: dict[str, Any] = min(swaps, key=lambda e: abs(e["sequence"] - first), default={}) if first else {}
    return block_of(scenario, version), str(swap.get("reason", ""))


def write_report(replay: Replay, path: Path, picture: Path, title: str, lines: Sequence[str]) -> None:
    """Write one HTML file that needs nothing else.

    Args:
        replay: what happened.
        path: of the file.
        picture: PNG of the timeline.
        title: of the page.
        lines: of each event, for people, as long as `replay.events`.
    """
    page = Template(files("tta.scenario").joinpath("replay.html").read_text())
    summary = [
        ("images", f"{replay.images:,} at {replay.rate:g} a second"),
        ("answered", f"{replay.answered:,}; {replay.mixed_version_replies} of mixed version"),
        ("accuracy, source model", percent(replay.accuracy_source)),
        ("accuracy, served", percent(replay.accuracy_served)),
        ("alarms", f"{replay.alarms} ({replay.alarms_expected:g} expected if nothing had ever shifted)"),
        ("candidates made, promoted", f"{replay.adapted}, {replay.promoted}"),
        ("labels used", f"{replay.labels:,}"),
        ("at the end", f"{replay.state}, version {replay.stretches[-1].version if replay.stretches else 0}"),
    ]
    path.write_text(
        page.substitute(
            title=html.escape(title),
            summary=_rows(summary),
            picture=base64.b64encode(picture.read_bytes()).decode(),
            parts=_rows(part_rows(replay)),
            stretches=_rows(stretch_rows(replay)),
            events=html.escape("\n".join(lines)) or "none",
            data=html.escape(json.dumps(asdict(replay), indent=1, default=str)),
        )
    )


def part_rows(replay: Replay) -> list[tuple[str, ...]]:
    """Of each recording: name, images, alarms, source's and served accuracy, labels."""
    return [
        (
            p.name,
            str(p.images),
            str(p.alarms),
            percent(p.accuracy_source),
            percent(p.accuracy_served),
            str(p.labels),
        )
        for p in replay.parts
    ]


def stretch_rows(replay: Replay) -> list[tuple[str, ...]]:
    """Of each stretch: from, images, version, block, reason, source's and served accuracy."""
    return [
        (
            str(s.first),
            str(s.images),
            str(s.version),
            s.block or ("norm" if s.version else "–"),
            s.reason or "–",
            percent(s.accuracy_source),
            percent(s.accuracy_served),
        )
        for s in replay.stretches
    ]


def percent(value: float | None) -> str:
    """A share in %, with one decimal; a dash for None."""
    return "–" if value is None else f"{100 * value:.1f} %"


def _rows(rows: Iterable[Sequence[str]]) -> str:
    cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return "\n".join(f"<tr>{row}</tr>" for row in cells)
