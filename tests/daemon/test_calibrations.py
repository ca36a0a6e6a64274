"""Thresholds computed beside the daemon's loop, in a real process."""

import os
import signal
from pathlib import Path

import pytest
import structlog

from tests.waiting import until
from tta.bundle import Bundle
from tta.daemon import calibrations
from tta.daemon.calibrations import Calibrations
from tta.monitor.stickiness import Stickiness


def test_thresholds_that_take_long_come_late_and_are_not_waited_for(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that gets no time is reported once, so that alarms go on, and what it computes later is taken."""
    monkeypatch.setattr(calibrations, "COMPUTE_S", 0.0)
    wanted = Stickiness(0.3)
    kept = Calibrations(tmp_path / "calibrations", bundle, None, 0, structlog.get_logger())
    kept.request(wanted)
    assert kept._process is not None
    os.kill(kept._process.pid, signal.SIGSTOP)
    try:
        assert kept.poll() == (wanted, None)
        assert kept.poll() is None
    finally:
        os.kill(kept._process.pid, signal.SIGCONT)

    found = until(kept.poll, "the thresholds", 200)
    assert found[0] == wanted
    assert found[1] is not None
    assert found[1].stickiness == wanted
    assert kept.kept(wanted) is not None
