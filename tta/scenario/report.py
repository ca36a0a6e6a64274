"""What a scenario showed: accuracies, recoveries, and whether every reply came from the version it names."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tta.bundle import load_bundle
from tta.scenario.run import Scenario, Sent

Array = npt.NDArray[Any]
REPLY_TOLERANCE = 1e-3  # of the largest logit, between a reply and the version it names


@dataclass
class PhaseReport:
    """What a phase showed; accuracies are shares of unlabelled images, None where there were none."""

    name: str
    shift_kind: str
    alarm_after_samples: int | None
    accuracy_source: float | None
    accuracy_before: float | None
    accuracy_after: float | None
    block: str
    version: int
    labels: int
    seconds_to_recover: float | None
    from_library: bool
    images_after: int
    state: str


@dataclass
class Report:
    """What a scenario showed."""

    requests: int
    lost: int
    errors: int
    mixed_version_replies: int
    promotions_clean: int
    alarms_clean: int
    alarms_clean_expected: float
    labels_used: int
    home_recognised: int
    phases: list[PhaseReport]
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


def measure(scenario: Scenario, bundle: Path) -> Report:
    """Measure; needs the `serve` extra, since it runs every version again."""
    expected = expected_logits(scenario, bundle)
    scenario.source_logits = expected[0]
    mixed = count_mixed(scenario, expected)
    answered = sum(s.logits is not None for s in scenario.sent)
    reports = [_phase_report(scenario, i, expected[0]) for i in range(len(scenario.phases))]
    clean = [i for i, p in enumerate(scenario.phases) if p.shift_kind == "none"]
    promoted = [e for e in scenario.events if e["event"] == "swapped" and e.get("reason") == "promotion"]
    alarms = [e for e in scenario.events if e["event"] == "alarm"]
    n_clean = sum(1 for s in scenario.sent if s.phase in clean)
    report = Report(
        requests=len(scenario.sent),
        lost=len(scenario.sent) - answered - scenario.errors,
        errors=scenario.errors,
        mixed_version_replies=mixed,
        promotions_clean=sum(_phase_at(scenario, e["sequence"]) in clean for e in promoted),
        alarms_clean=sum(_phase_at(scenario, e.get("sample", e["sequence"])) in clean for e in alarms),
        alarms_clean_expected=round(n_clean / float(scenario.status["arl"]), 4),
        labels_used=sum(scenario.labels_sent),
        home_recognised=sum(e["event"] == "home_recognised" for e in scenario.events),
        phases=reports,
        seconds=round(scenario.seconds(), 1),
    )
    report.failures = _failures(report)
    return report


def count_mixed(scenario: Scenario, expected: dict[int, Array]) -> int:
    """How many replies are not what the version they name computes."""
    mixed = 0
    for sent in scenario.sent:
        if sent.logits is not None:
            want = expected[sent.version][scenario.flat_index(sent)]
            limit = REPLY_TOLERANCE * max(1.0, float(np.abs(want).max()))
            mixed += int(np.abs(sent.logits - want).max() > limit)
    return mixed


def _phase_at(scenario: Scenario, sequence: int) -> int:
    return max(i for i, (first, _) in enumerate(scenario.starts) if first <= sequence or i == 0)


def expected_logits(scenario: Scenario, bundle: Path) -> dict[int, Array]:
    """Logits of every image under every version that answered, recomputed from the store."""
    from tta.server.predictor import Predictor

    predictor = Predictor(load_bundle(bundle), "cpu", threads=os.cpu_count() or 1, max_batch_size=64)
    used = np.concatenate([[0], [s.version for s in scenario.sent if s.version >= 0]])
    result = {}
    for version in sorted({int(v) for v in used}):
        folder = scenario.daemon.folder / "state" / "versions" / f"{version:06d}" if version else None
        session = predictor.prepare(folder)
        parts = [
            predictor.run_with(session, p.x[i : i + 64]).logits
            for p in scenario.phases
            for i in range(0, len(p.x), 64)
        ]
        result[version] = np.concatenate(parts)
    return result


def _phase_report(scenario: Scenario, number: int, source_logits: Array) -> PhaseReport:
    phase, (first, began) = scenario.phases[number], scenario.starts[number]
    end = scenario.starts[number + 1][0] if number + 1 < len(scenario.starts) else len(scenario.sent)
    mine = scenario.sent[first:end]
    labelled = {s.index for s in mine if s.labelled}
    final = next((s.version for s in reversed(mine) if s.version >= 0), 0)
    before_version = scenario.phase_start_version(number)
    changed = final != before_version
    cure = next((i for i, s in enumerate(mine) if s.version == final), 0) if changed else None
    offset = sum(len(p.x) for p in scenario.phases[:number])
    free = sorted({s.index for s in mine} - labelled)
    source_right = source_logits[[offset + i for i in free]].argmax(axis=1) == phase.y[free]
    swap: dict[str, Any] = next(
        (
            e
            for e in reversed(scenario.events)
            if e["event"] == "swapped" and first <= e["sequence"] <= end + 1 and e["serving"] == final
        ),
        {},
    )
    alarm = next((e for e in scenario.events if e["event"] == "alarm" and first <= e["sequence"] < end), None)
    known = next((e for e in scenario.events if e["event"] == "known" and first <= e["sequence"] < end), None)
    noticed = alarm or known
    cured_at = mine[cure].answered_s if cure is not None else None
    return PhaseReport(
        name=phase.name,
        shift_kind=phase.shift_kind,
        alarm_after_samples=_noticed(noticed) - first + 1 if noticed else None,
        accuracy_source=_mean(source_right.tolist()),
        accuracy_before=_accuracy(scenario, mine[:cure], labelled),
        accuracy_after=_accuracy(scenario, mine[cure:], labelled) if cure is not None else None,
        block=block_of(scenario, final),
        version=final,
        labels=scenario.labels_sent[number],
        seconds_to_recover=round(cured_at - began, 2) if cured_at is not None else None,
        from_library=swap.get("reason") == "recall",
        images_after=_unique(mine[cure:], labelled) if cure is not None else 0,
        state=scenario.moments[-1].state if end == len(scenario.sent) else "",
    )


def _noticed(event: dict[str, Any]) -> int:
    """Image at which the charts crossed; for labelled errors, the one at which enough labels had come."""
    return int(event.get("sample", event["sequence"]))


def _accuracy(scenario: Scenario, sent: Sequence[Sent], labelled: set[int]) -> float | None:
    """Share right, each unlabelled image counted once."""
    right: dict[int, bool] = {}
    for s in sent:
        if s.logits is not None and s.index not in labelled:
            right.setdefault(s.index, scenario.is_right(s))
    return _mean(list(right.values()))


def _unique(sent: Sequence[Sent], labelled: set[int]) -> int:
    return len({s.index for s in sent if s.logits is not None and s.index not in labelled})


def block_of(scenario: Scenario, version: int) -> str:
    """What was operated on to make a version; "" for the source."""
    if version == 0:
        return ""
    path = scenario.daemon.folder / "state" / "versions" / f"{version:06d}" / "manifest.json"
    return str(json.loads(path.read_text())["block"])


def _failures(report: Report) -> list[str]:
    """What a user would call broken."""
    failures = []
    for name in ("lost", "errors", "mixed_version_replies", "promotions_clean"):
        if getattr(report, name):
            failures.append(f"{name} = {getattr(report, name)}")
    home = report.phases[0].accuracy_source or 0.0
    for phase in report.phases:
        if phase.shift_kind == "none":
            if phase.version != 0:
                failures.append(f"{phase.name}: version {phase.version} still serves, home was not recognised")
            continue
        cost = home - (phase.accuracy_source or 0.0)
        gained = (phase.accuracy_after or 0.0) - (phase.accuracy_source or 0.0)
        if gained < cost / 2:
            failures.append(f"{phase.name}: regained {100 * gained:.1f} of {100 * cost:.1f} points")
    return failures


def _mean(values: Sequence[bool]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None
