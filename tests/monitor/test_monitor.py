"""The monitor as a whole: sticky traffic, the slow tier, keys, and going on after a restart."""

from dataclasses import replace

import numpy as np

from tests.monitor.stream import LAYOUT, make_reference, stream
from tta.monitor.calibration import calibrate
from tta.monitor.charts import Alarm
from tta.monitor.conformal import ConformalDetector, stride
from tta.monitor.history import History, Samples
from tta.monitor.monitor import DriftMonitor
from tta.monitor.regimes import fingerprint
from tta.monitor.sources import Sources
from tta.monitor.stickiness import Stickiness, measure, nearest

REFERENCE = make_reference(2000, 1)
PLAIN = calibrate(REFERENCE, 2000)


def watched(samples: Samples, monitor: DriftMonitor, batch: int = 16) -> int | None:
    """Index of the first alarm; thresholds are there as soon as they are wanted."""
    for start in range(0, len(samples), batch):
        alarm = monitor.update(samples[start : start + batch])
        if alarm is None and monitor.wanted is not None:
            alarm = monitor.recalibrated(calibrate(REFERENCE, 2000, monitor.wanted))
        if alarm is not None:
            return start + max(0, alarm.index)
    return None


def joined(*parts: Samples) -> Samples:
    """One stream of several, with places that count up."""
    columns = [np.concatenate(c) for c in zip(*(vars(p).values() for p in parts), strict=True)]
    return replace(Samples(*columns), sequences=np.arange(len(columns[0])))


def test_stickiness_is_measured_also_during_a_shift() -> None:
    """Repeat is found within a tenth on quiet traffic, about a new mean, and across the change."""
    for repeat in (0.0, 0.5, 0.9):
        quiet, moved = stream(512, 2, repeat=repeat), stream(512, 3, mean=2.0, repeat=repeat)
        for samples in (quiet, moved, joined(quiet, moved)):
            assert abs(measure(samples.w, samples.predictions)[0] - repeat) < 0.1


def test_one_picture_again_and_again_is_all_copies() -> None:
    """Copies that differ by rounding only are copies, however few, and whatever pattern the rounding has."""
    for n in (6, 7, 40):
        w = stream(1, 4).w + 1e-6 * stream(n, 5).w
        assert measure(w, np.zeros(n, np.int64))[0] == 1.0


def test_thresholds_that_are_not_sticky_enough_raise_no_alarm() -> None:
    """Thresholds for a repeat of 0.3 come back for traffic of 0.9: no alarm, but stickier ones are asked for."""
    monitor = DriftMonitor(REFERENCE, PLAIN)
    sticky = stream(600, 6, repeat=0.9)
    for start in range(0, len(sticky), 16):
        assert monitor.update(sticky[start : start + 16]) is None

    too_low = calibrate(REFERENCE, 2000, Stickiness(0.3))
    plain = DriftMonitor(REFERENCE, too_low, adaptive=False)
    assert plain.update(sticky) is not None  # as they would without measuring again
    assert monitor.recalibrated(too_low) is None
    assert monitor.wanted is not None
    assert monitor.wanted.repeat > 0.5


def test_cameras_that_take_turns_are_sticky_too() -> None:
    """Eight cameras in turn, each showing a picture ten times, have no copies side by side and are sticky."""
    cameras = [stream(128, 10 + i, repeat=0.9).w for i in range(8)]
    in_turn = np.stack(cameras, axis=1).reshape(1024, -1)

    assert measure(in_turn, np.zeros(1024, np.int64))[0] > 0.5


def test_near_copies_ask_for_other_thresholds_and_then_seldom_alarm() -> None:
    """Sticky quiet streams alarm at once with plain thresholds, ten times later with those asked for."""
    plain, adapted, found = [], [], []
    for seed in range(10):
        samples = stream(500, seed, repeat=0.8)
        adaptive = DriftMonitor(REFERENCE, PLAIN)
        for alarms, monitor in ((plain, DriftMonitor(REFERENCE, PLAIN, adaptive=False)), (adapted, adaptive)):
            alarm = watched(samples, monitor)
            alarms.append(len(samples) if alarm is None else alarm)
        found.append(adaptive.calibration.stickiness.repeat)

    assert np.mean(adapted) > 10 * np.mean(plain)
    assert 0.65 <= np.median(found) <= 0.9


def test_the_first_pictures_shown_again_and_again_are_no_shift() -> None:
    """A stream that begins with ten copies each of odd pictures raises no alarm, wherever its charts cross."""
    for mean in (0.8, 1.2, 1.6, 2.0, 3.0):
        first = stream(24, 3, mean=mean)[np.arange(24) // 10]
        for batch in (1, 3, 4, 8):
            monitor = DriftMonitor(REFERENCE, PLAIN)
            for start in range(0, 24, batch):
                assert monitor.update(first[start : start + batch]) is None, (mean, batch, start)
            assert monitor.wanted is not None


def test_a_shift_in_sticky_traffic_is_found() -> None:
    """After the thresholds have risen for sticky traffic, a shift of it still alarms within 150 samples."""
    samples = joined(stream(1500, 5, repeat=0.8), stream(500, 6, mean=2.0, repeat=0.8))

    found = watched(samples, DriftMonitor(REFERENCE, PLAIN))

    assert found is not None
    assert 1500 <= found < 1650


def test_one_picture_for_ever_moves_the_class_histogram() -> None:
    """A stuck sensor is too sticky for the feature charts; the histogram of classes notices."""
    stuck = joined(stream(400, 7), stream(400, 7)[np.full(400, 3)])
    monitor = DriftMonitor(REFERENCE, PLAIN)
    watched(stuck, monitor)

    assert monitor.classes.drift_detected


def test_thresholds_are_for_the_next_step_up() -> None:
    """A measured stickiness is covered by the step it is rounded to."""
    assert nearest(0.0, 1.0) == Stickiness(0.0, 1)
    assert nearest(0.45, 3.0).repeat == 0.5
    assert nearest(0.2, 30.0) == Stickiness(0.3, 20)
    assert Stickiness(0.5, 20).covers(Stickiness(0.3, 5))
    assert not Stickiness(0.5, 1).covers(Stickiness(0.0, 5))


def test_the_slow_tier_keeps_its_bound() -> None:
    """On fresh in-control streams the conformal detector alarms less often than once in `arl` samples."""
    samples = alarms = 0
    for seed in range(40):
        detector = ConformalDetector(REFERENCE, 1000)
        fresh = stream(2000, 100 + seed)
        index = detector.update(fresh.w)
        samples += 2000 if index is None else index + 1
        alarms += index is not None

    assert samples / max(alarms, 1) > 1000


def test_the_slow_tier_finds_a_shift_that_lasts() -> None:
    """Samples spread twice as wide are found within 500 samples, and batches change nothing."""
    wide = stream(500, 8)
    wide = replace(wide, w=wide.w * 2)
    whole, parts = ConformalDetector(REFERENCE, 20_000), ConformalDetector(REFERENCE, 20_000)

    index = whole.update(wide.w)
    starts = range(0, 500, 7)
    found = [parts.update(wide.w[i : i + 7]) for i in starts]

    assert index is not None
    assert index == next(i + n for i, n in zip(starts, found, strict=True) if n is not None)


def test_the_slow_tier_finds_a_shift_of_the_mean() -> None:
    """A mean moved by half a standard deviation, which hardly lengthens one residual, is found in 500 samples."""
    for seed in range(20, 25):
        assert ConformalDetector(REFERENCE, 20_000).update(stream(500, seed, mean=0.5).w) is not None


def test_only_every_nth_sticky_sample_counts() -> None:
    """With a stride of five the slow tier sees what it sees of every fifth sample."""
    assert stride(0.5) == 5
    samples = stream(300, 9)
    thinned, every = ConformalDetector(REFERENCE, 1e9, stride=5), ConformalDetector(REFERENCE, 1e9)
    for part in (samples[:7], samples[7:130], samples[130:]):
        thinned.update(part.w)
    every.update(samples.w[::5])

    assert thinned.statistic == every.statistic


def test_a_monitor_restored_goes_on_alike() -> None:
    """A monitor restored from a saved state raises the same alarm as one that was never stopped."""
    samples = joined(stream(200, 10), stream(60, 11, mean=0.7))
    whole, first, second = (DriftMonitor(REFERENCE, PLAIN, adaptive=False) for _ in range(3))

    def run(monitor: DriftMonitor, part: Samples) -> list[tuple[int, Alarm]]:
        alarms = [(int(part.sequences[i]), monitor.update(part[i : i + 1])) for i in range(len(part))]
        return [(place, alarm) for place, alarm in alarms if alarm is not None]

    expected = run(whole, samples)
    before = run(first, samples[:150])
    second.load_state(first.state())

    assert expected
    assert before + run(second, samples[150:]) == expected
    np.testing.assert_allclose(second.classes.statistic, whole.classes.statistic, rtol=1e-9)
    assert second.conformal.statistic == whole.conformal.statistic


def test_history_keeps_the_newest() -> None:
    """Whatever the sizes of what is appended, the newest samples are there in order."""
    history, samples = History(LAYOUT.n_features, 4, 50), stream(500, 12)
    taken = 0
    for size in (1, 30, 49, 50, 120, 3, 47, 60):
        history.append(samples[taken : taken + size])
        taken += size
        n = min(50, taken)
        assert history.newest(50).sequences.tolist() == list(range(taken - n, taken))
        np.testing.assert_array_equal(history.newest(50).w, samples.w[taken - n : taken])
    assert history.since(taken - 7).sequences.tolist() == list(range(taken - 7, taken))


def test_one_chatty_key_does_not_drown_the_rest() -> None:
    """A key with nine tenths of the traffic gives the charts at most twice what the others give on average."""
    sources = Sources()
    numbers = [sources.number(f"camera {i}") for i in range(5)]
    rng = np.random.default_rng(13)
    sent = rng.choice(numbers, size=4096, p=[0.9, 0.025, 0.025, 0.025, 0.025])
    taken = np.concatenate([sources.admit(part) for part in np.split(sent, 64)])

    counts = np.bincount(sent[1024:][taken[1024:]], minlength=6)[1:]
    assert counts[0] < 2.5 * counts[1:].mean()
    assert counts[1:].sum() == np.isin(sent[1024:], numbers[1:]).sum()


def test_without_keys_everything_is_taken() -> None:
    """Traffic without keys, and traffic of one key, is not thinned; too many keys count as none."""
    sources = Sources()
    assert sources.admit(np.zeros(500, np.int64)) is None
    only = sources.number("only")
    assert all(sources.admit(np.full(200, only)).all() for _ in range(5))
    assert {sources.number(f"key {i}") for i in range(2000)} >= {0}
    assert len(sources.names) <= 1001


def test_one_cameras_shift_is_told_from_all_cameras_shift() -> None:
    """The keys that left home are named if others have not; a shift of all names none."""
    sources = Sources()
    a, b, c = (sources.number(name) for name in "abc")
    home = fingerprint(REFERENCE.w, REFERENCE.predictions)
    quiet = [stream(20, 20 + k, key=k) for k in (a, b)]

    assert sources.shifted(joined(*quiet, stream(20, 30, mean=1.5, key=c)), home) == ("c",)
    assert sources.shifted(joined(*quiet, stream(20, 31, key=c)), home) == ()
    everywhere = joined(*(stream(20, 40 + k, mean=1.5, key=k) for k in (a, b, c)))
    assert sources.shifted(everywhere, home) == ()
    assert len(sources.of(everywhere, ("b",))) == 20


def test_a_change_within_the_samples_is_not_taken_for_copies() -> None:
    """A shift of mean or spread within 128 independent samples is not called sticky; copies across it are."""
    for cut in (20, 64, 100):
        samples = joined(stream(cut, 8), stream(128 - cut, 9, mean=3.0))
        assert measure(samples.w, samples.predictions)[0] < 0.1
    wide = replace(stream(64, 9), w=4 * stream(64, 9).w)
    spread = joined(stream(64, 8), wide)
    assert measure(spread.w, spread.predictions)[0] < 0.1
    sticky = joined(stream(64, 8, repeat=0.8), stream(64, 9, mean=3.0, repeat=0.8))
    assert 0.6 < measure(sticky.w, sticky.predictions)[0] < 0.95
