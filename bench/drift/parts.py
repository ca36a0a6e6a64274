"""The measurements, each for one draw of the reference; what they return is JSON."""

import functools
import time
import tracemalloc
from collections import Counter
from typing import Any

import numpy as np

from bench.corruptions import CORRUPTIONS
from bench.drift import detectors
from bench.drift.data import SEVERITIES, Array, Draw, Pool, null_indices, shift_indices
from tta.monitor.accuracy import ErrorDetector
from tta.monitor.calibration import Calibration, calibrate
from tta.monitor.charts import Alarm
from tta.monitor.conformal import ConformalDetector
from tta.monitor.diagnosis import diagnose, fit_cut
from tta.monitor.history import Samples
from tta.monitor.monitor import DriftMonitor
from tta.monitor.regimes import fingerprint, recognise
from tta.monitor.stickiness import Stickiness, nearest

Json = dict[str, Any]
ANNOUNCED = "announced"
NULLS = ("iid", "half", "runs 20", "runs 100", "sticky 2", "sticky 5", "sticky 10")
SETS = ("last", "all", "ours")
WARM_UP = 200  # null samples before the change
CENSOR = 2000
N_STREAMS = 20  # a condition
N_NULL = 100
SHIFTS = tuple(f"{name} {severity}" for name in CORRUPTIONS for severity in SEVERITIES)
OTHER_SHIFTS = (
    "population 0",
    "population 3",
    "population 6",
    "prior 30",
    "prior 50",
    "gaussian_noise 4 contaminated 25",
    "gaussian_noise 4 contaminated 10",
    "contrast 4 contaminated 25",
    "contrast 4 contaminated 10",
    "gaussian_noise 5 ramp 500",
    "contrast 5 ramp 500",
)
FITTED_ON = (
    "gaussian_noise",
    "shot_noise",
    "defocus_blur",
    "contrast",
    "brightness",
    "pixelate",
)  # or like what was


def samples_of(pool: Pool, rows: Array, first: int = 0) -> Samples:
    """Rows of a pool as the monitor takes them."""
    n = len(rows)
    return Samples(
        pool.sets["ours"][rows],
        pool.predictions[rows],
        pool.logits[rows],
        np.arange(first, first + n),
        np.zeros(n, np.int64),
    )


class Calibrated:
    """A draw with thresholds for any stickiness, each computed once."""

    def __init__(self, draw: Draw, arl: float) -> None:
        self.draw, self.arl = draw, arl
        self.calibration = functools.lru_cache(maxsize=None)(self._calibration)

    def _calibration(self, stickiness: Stickiness) -> Calibration:
        return calibrate(self.draw.reference, self.arl, stickiness)

    def monitor(self, stickiness: Stickiness | None = None) -> DriftMonitor:
        """A fresh monitor."""
        return DriftMonitor(self.draw.reference, self.calibration(stickiness or Stickiness()))

    def watch(self, monitor: DriftMonitor, samples: Samples, batch: int = 32) -> tuple[int, Alarm] | None:
        """Feed samples; place of the first alarm within them. New thresholds are there when they are wanted."""
        for start in range(0, len(samples), batch):
            part = samples[start : start + batch]
            alarm = monitor.update(part)
            place = start + alarm.index if alarm is not None else 0
            if alarm is None and monitor.wanted is not None:
                alarm = monitor.recalibrated(self.calibration(monitor.wanted))
                place = start + len(part) - 1 + alarm.index if alarm is not None else 0
            if alarm is not None:
                return max(0, place), alarm
        return None


def null_run_lengths(draw: Draw, arl: int, n_streams: int = 40) -> Json:
    """Realised run length of the whole monitor on null streams, its stickiness announced or not."""
    calibrated, clean = Calibrated(draw, arl), draw.pool()
    found: Json = {}
    for kind in NULLS:
        name, _, number = kind.partition(" ")
        for announced in (False, True):
            if announced and name not in ("runs", "sticky"):
                continue
            known = nearest(1 - 1 / float(number), 1) if name == "sticky" else Stickiness(0.0, int(number or 1))
            exposure = alarms = 0
            ends: Counter[str] = Counter()
            for seed in range(n_streams):
                rng = np.random.default_rng([seed, arl])
                monitor = calibrated.monitor(known if announced else None)
                stream = samples_of(clean, null_indices(kind, clean.predictions, 3 * arl, rng))
                alarm = calibrated.watch(monitor, stream)
                exposure += len(stream) if alarm is None else alarm[0] + 1
                alarms += alarm is not None
                ends[f"{monitor.calibration.stickiness.repeat:g}/{monitor.calibration.stickiness.class_run}"] += 1
            label = f"{kind} {ANNOUNCED}" if announced else kind
            found[label] = {"exposure": exposure, "alarms": alarms, "ends": dict(ends.most_common(3))}
    calibration = calibrated.calibration(Stickiness())
    found["calibration"] = {"realised": calibration.realised, "margin": calibration.margin}
    return found


def whole_monitor(draw: Draw, seed: int, arl: int = 10_000, n_streams: int = 6) -> Json:
    """Delays of the monitor as the daemon runs it, own thresholds and stickiness measured, at severities 3 to 5."""
    calibrated, clean, rng = Calibrated(draw, arl), draw.pool(), np.random.default_rng([seed, 6])
    found: list[int] = []
    held = 0
    for shift in (s for s in SHIFTS if s[-1] in "345"):
        shifted = draw.shift(shift)
        for _ in range(n_streams):
            monitor = calibrated.monitor()
            before = samples_of(clean, rng.integers(len(clean.predictions), size=WARM_UP))
            after = samples_of(shifted, rng.integers(len(shifted.predictions), size=CENSOR), WARM_UP)
            if calibrated.watch(monitor, before, batch=8) is not None:
                continue
            alarm = calibrated.watch(monitor, after, batch=1)
            found.append(CENSOR if alarm is None else alarm[0] + 1)
            held += monitor.calibration.stickiness.repeat > 0
    return {"delays": found, "held": held / len(found)}


def slow_tier(draw: Draw, seed: int, arl: int = 10_000) -> Json:
    """The conformal detector alone: false alarms against its bound, and delays at severities 3 to 5."""
    clean, rng = draw.pool(), np.random.default_rng([seed, 5])
    exposure = alarms = 0
    for _ in range(40):
        detector = ConformalDetector(draw.reference, arl)
        rows = rng.integers(len(clean.predictions), size=3 * arl)
        index = detector.update(clean.sets["ours"][rows])
        exposure += 3 * arl if index is None else index + 1
        alarms += index is not None
    found: list[int] = []
    for shift in (s for s in SHIFTS if s[-1] in "345"):
        shifted = draw.shift(shift)
        for _ in range(5):
            detector = ConformalDetector(draw.reference, arl)
            rows = rng.integers(len(shifted.predictions), size=CENSOR)
            index = detector.update(shifted.sets["ours"][rows])
            found.append(CENSOR if index is None else index + 1)
    return {"exposure": exposure, "alarms": alarms, "delays": found}


def calibration_cost(draw: Draw) -> Json:
    """CPU seconds of a calibration at several run lengths, and sticky; the best of three."""
    found: Json = {}
    for name, arl, stickiness in (
        ("arl 1000", 1_000, Stickiness()),
        ("arl 10000", 10_000, Stickiness()),
        ("arl 20000", 20_000, Stickiness()),
        ("arl 100000", 100_000, Stickiness()),
        ("arl 20000, sticky, by class", 20_000, Stickiness(0.8, 20)),
    ):
        seconds = []
        for _ in range(3):
            start = time.process_time()
            calibrate(draw.reference, arl, stickiness)
            seconds.append(time.process_time() - start)
        found[name] = min(seconds)
    return found


def _statistics(draw: Draw, calibration: Calibration, shifted: Pool, seed: int, only: str) -> dict[str, Any]:
    """Every detector on a table of clean rows, then shifted rows; "ours", or "peers"."""
    clean, reference = draw.pool(), draw.reference_sets
    tables = {s: np.concatenate([clean.sets[s], shifted.sets[s]]) for s in SETS}
    if only == "ours":
        return {"tta MEWMA | ours": detectors.ours(draw, calibration, tables["ours"])}
    found: dict[str, Any] = {}
    entropy = np.concatenate([clean.confidences, shifted.confidences])
    found["EWMA | entropy"] = detectors.ewma_entropy(draw.reference_confidences, entropy)
    for s in SETS:
        rng = np.random.default_rng([seed, 7])
        sigma = detectors.median_sigma(reference[s], rng)
        for window in (20, 50):
            found[f"MMD W={window} | {s}"] = detectors.mmd(reference[s], window, tables[s], sigma)
        found[f"QT-EWMA K=32 | {s}"] = detectors.qt_ewma(reference[s], tables[s], np.random.default_rng(seed))
    return found


def null_statistics(draw: Draw, calibration: Calibration, arl: int, seed: int) -> dict[str, Array]:
    """Statistics of every detector on iid null streams of three run lengths, for the common calibration."""
    clean = draw.pool()
    n_streams = N_NULL if arl <= 1000 else N_NULL // 2
    rng = np.random.default_rng([seed, arl, 1])
    rows = rng.integers(len(clean.predictions), size=(n_streams, 3 * arl))
    empty = Pool({s: v[:0] for s, v in clean.sets.items()}, clean.logits[:0], clean.labels[:0])
    found = {}
    for only in ("ours", "peers"):
        for name, statistic in _statistics(draw, calibration, empty, seed, only).items():
            found[name] = statistic(rows)
    return found


def common_thresholds(draw: Draw, arl: int, seed: int) -> Json:
    """The threshold at which each detector realises `arl` on iid null streams, with the interval of that."""
    calibration = calibrate(draw.reference, arl)
    found: Json = {}
    for name, statistics in null_statistics(draw, calibration, arl, seed).items():
        threshold = detectors.threshold_for(statistics, arl)
        found[name] = {"threshold": threshold, "realised": detectors.realised(statistics, threshold)}
        if name.startswith("tta"):
            found[name]["realised_at_1"] = detectors.realised(statistics, 1.0)
    return found


def delays(draw: Draw, arl: int, seed: int, shift: str, thresholds: Json) -> Json:
    """Delays of every detector on one shift, at the common run length; ours also with its own thresholds."""
    calibration = calibrate(draw.reference, arl) if arl not in _calibrations(draw) else _calibrations(draw)[arl]
    _calibrations(draw)[arl] = calibration
    clean, shifted = draw.pool(), draw.shift(shift.split(" contaminated")[0].split(" ramp")[0])
    n_clean = len(clean.predictions)
    rng = np.random.default_rng([seed, arl, 2])
    rows = rng.integers(n_clean, size=(N_STREAMS, WARM_UP + CENSOR))
    for i in range(N_STREAMS):
        after, is_shifted = shift_indices(shift, shifted.predictions, CENSOR, rng)
        rows[i, WARM_UP:] = np.where(is_shifted, n_clean + after, rows[i, WARM_UP:])
    severe = shift.split()[1] in ("3", "4", "5") or shift in OTHER_SHIFTS
    found: Json = {}
    for only in ("ours", "peers") if severe else ("ours",):
        for name, statistic in _statistics(draw, calibration, shifted, seed, only).items():
            values = statistic(rows)
            found[name] = _delays(values, thresholds[name]["threshold"])
            if name.startswith("tta"):
                found["tta MEWMA, own thresholds | ours"] = _delays(values, 1.0)
    return found


@functools.lru_cache(maxsize=8)
def _calibrations(draw: Draw) -> dict[int, Calibration]:
    return {}


def _delays(values: Array, threshold: float) -> list[int]:
    """Samples from the change to the alarm; `CENSOR` for none; streams with an earlier alarm are left out."""
    early = (values[:, :WARM_UP] > threshold).any(axis=1)
    lengths, _ = detectors.run_lengths(values[~early, WARM_UP:], threshold)
    return [int(n) for n in lengths]


# -- diagnosis --------------------------------------------------------------------------------------------


def diagnosis(draw: Draw, seed: int, windows: tuple[int, ...] = (16, 48, 128), n_streams: int = 12) -> Json:
    """Confusion counts by window after the alarm of the whole monitor at ARL 20,000."""
    from bench.drift.data import _taps, images  # the cut is fitted as packaging does it
    from tta.packaging.reference import corruptions, populations, raw_features

    calibrated, clean = Calibrated(draw, 20_000), draw.pool()
    replayed = []
    for corrupted in corruptions(images("test")[0][draw._fit[:160]], seed):
        logits, blocks = raw_features(_taps(), corrupted, lambda n: None)
        replayed.append(draw.reference.residuals(draw.whitening.apply(blocks), logits.argmax(axis=1)))
    cut, right = fit_cut(replayed, populations(draw.reference, seed), draw.layout, seed=seed)
    cases = {
        "input": [f"{n} {s}" for n in CORRUPTIONS if n not in FITTED_ON for s in (3, 4, 5)],
        "feature": [f"population {k}" for k in range(10)] * 3,
        "prior": ["prior 50"] * 30,
        "output": ["swap"] * 30,
    }
    counts: Json = {str(w): {kind: Counter() for kind in cases} for w in windows}
    silent: Counter[str] = Counter()
    rng = np.random.default_rng([seed, 3])
    for kind, shifts in cases.items():
        for shift in shifts:
            for _ in range(max(1, n_streams * 30 // len(shifts) // 12)):
                verdicts = _one_diagnosis(calibrated, clean, draw, kind, shift, cut, windows, rng)
                if verdicts is None:
                    silent[kind] += 1
                    continue
                for window, verdict in zip(windows, verdicts, strict=True):
                    counts[str(window)][kind][verdict] += 1
    return {
        "cut": cut,
        "cut_right": right,
        "silent": dict(silent),
        "confusion": {w: {k: dict(c) for k, c in table.items()} for w, table in counts.items()},
    }


def _one_diagnosis(
    calibrated: Calibrated,
    clean: Pool,
    draw: Draw,
    kind: str,
    shift: str,
    cut: float,
    windows: tuple[int, ...],
    rng: Any,
) -> list[str] | None:
    """Verdicts after an alarm, or None without one in 1,500 samples."""
    monitor = calibrated.monitor()
    before = samples_of(clean, rng.integers(len(clean.predictions), size=WARM_UP))
    if calibrated.watch(monitor, before, batch=8) is not None:
        return None
    shifted = clean if kind in ("prior", "output") else draw.shift(shift)
    n = 1500
    rows, _ = shift_indices(shift, shifted.predictions, n, rng)
    stream = samples_of(shifted, rows, WARM_UP)
    true = shifted.labels[rows].copy()
    if kind == "output":
        a, b = rng.choice(10, 2, replace=False)
        true = np.where(true == a, b, np.where(true == b, a, true))
    reference = draw.reference
    right = float((reference.predictions == reference.labels).mean())
    errors = ErrorDetector(1 - right + 0.05, 4000)
    alarmed, errors_up, onset = None, False, 0
    for start in range(0, n, 8):
        part = stream[start : start + 8]
        found = calibrated.watch(monitor, part, batch=8)
        if kind == "output":
            for i in range(start, min(n, start + 8)):
                errors.update(bool(stream.predictions[i] != true[i]))
            if errors.drift_detected and alarmed is None:
                alarmed, errors_up, onset = start + 8, True, start + 8 - errors.labels_since_onset
        if alarmed is None and found is not None:
            place, alarm = found
            alarmed, onset = start + place, start + place - alarm.lag
        if alarmed is None and monitor.classes.drift_detected:
            alarmed, onset = start + 8, start + 8 - 32
        if alarmed is not None:
            break
    if alarmed is None:
        return None
    verdicts, end = [], start + 8
    for window in windows:
        until = min(n, alarmed + window)
        if until > end:
            monitor.update(stream[end:until])
            end = until
        seen = stream[max(0, onset) : until][-max(window, 16) :]
        moved = monitor.classes.drift_detected
        verdicts.append(diagnose(seen.w, draw.layout, cut, errors_up, moved).kind)
    return verdicts


# -- regimes ----------------------------------------------------------------------------------------------

REGIMES = (
    "gaussian_noise 3",
    "gaussian_noise 5",
    "contrast 3",
    "contrast 5",
    "defocus_blur 4",
    "defocus_blur 5",
    "fog 4",
    "brightness 5",
    "snow 5",
    "frost 4",
    "pixelate 5",
    "jpeg_compression 4",
)


def recall(draw: Draw, seed: int, n_windows: int = 100) -> Json:
    """How often the regime a window comes from is recognised, home among twelve others, by window size.

    And how often it is taken for another where its own is not known.
    """
    rng = np.random.default_rng([seed, 4])
    pools = [draw.pool(), *(draw.shift(name) for name in REGIMES)]
    half = len(pools[0].predictions) // 2
    prints = []
    for i, pool in enumerate(pools):
        if i == 0:
            prints.append(fingerprint(draw.reference.w, draw.reference.predictions))
            continue
        rows = rng.permutation(half)[:512]
        prints.append(fingerprint(pool.sets["ours"][rows], pool.predictions[rows]))
    found: Json = {}
    for size in (4, 8, 16, 48):
        counts: Counter[str] = Counter()
        wrong: Counter[str] = Counter()
        for i, pool in enumerate(pools):
            for _ in range(n_windows):
                window = pool.sets["ours"][half + rng.integers(half, size=size)]
                chosen = recognise([(p, window) for p in prints])
                others = [(p, window) for j, p in enumerate(prints) if j != i]
                counts["right"] += chosen == i
                counts["wrong"] += chosen is not None and chosen != i
                counts["unknown_taken"] += recognise(others) is not None
                if chosen is not None and chosen != i:
                    wrong[f"{('home', *REGIMES)[i]} taken for {('home', *REGIMES)[chosen]}"] += 1
        total = n_windows * len(pools)
        shares = {name: counts[name] / total for name in ("right", "wrong", "unknown_taken")}
        found[str(size)] = {**shares, "confused": dict(wrong.most_common(4))}
    return found


# -- cost -------------------------------------------------------------------------------------------------


def cost(draw: Draw, n_memory: int = 1_000_000) -> Json:
    """CPU of everything the daemon's monitor does with a sample, by batch size, and memory over many samples."""
    calibrated, clean = Calibrated(draw, 20_000), draw.pool()
    reference = draw.reference
    rng = np.random.default_rng(0)
    features, logits = draw.clean_features()
    found: Json = {}
    for batch in (1, 8, 64):
        monitor, best = calibrated.monitor(), np.inf
        for _ in range(40):  # the best of many: other load on the machine only adds
            start = time.process_time()
            for i in range(0, 2048, batch):
                rows = slice(i, i + batch)
                predictions = logits[rows].argmax(axis=1)
                w = reference.residuals(features[rows], predictions)
                monitor.update(
                    Samples(
                        w,
                        predictions,
                        logits[rows],
                        np.arange(i, i + batch),
                        np.zeros(batch, np.int64),
                    )
                )
            best = min(best, (time.process_time() - start) / 2048 * 1e6)
        found[f"us a sample, batch {batch}"] = best
    monitor = calibrated.monitor()
    stream = samples_of(clean, rng.integers(len(clean.predictions), size=4096))
    for _ in range(4):
        monitor.update(stream)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(n_memory // 4096):
        for i in range(0, 4096, 64):
            monitor.update(stream[i : i + 64])
    found["bytes kept per million samples"] = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return found
