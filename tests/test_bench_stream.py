"""The stream's daemon without sockets does what it has to of the real one's interface."""

from pathlib import Path

import numpy as np

from bench.stream import ours
from bench.stream.data import Segment
from tta.packaging.digits import corrupt, digits


def test_a_daemon_without_sockets_serves_a_stream_and_ends(bundle_path: Path, tmp_path: Path) -> None:
    """Every image is answered, labels are taken, a shift is noticed, and the source is compared with itself."""
    x, y = digits("stream", 120, seed=8)
    none, all_of = np.zeros(60, bool), np.ones(60, bool)
    segments = [
        Segment("start", 0, "", x[:60], y[:60], none),
        Segment("first", 1, "noise", corrupt(x[60:], "noise", 8), y[60:], all_of),
    ]

    found = ours.run(segments, bundle_path, tmp_path / "state", {"mode": "off"}, delay=8)

    assert [s["images"] for s in found["segments"]] == [60, 60]
    assert all(s["errors"] == s["errors_source"] for s in found["segments"])
    assert found["segments"][1]["errors"] > found["segments"][0]["errors"]
    assert found["segments"][1]["labels"] == 60 - 8
    assert any(e["what"] == "alarm" for e in found["events"])
