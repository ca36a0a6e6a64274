"""Run the libraries people use today on streams that `python -m bench.drift` has written; in their own environment.

    python -m venv peers && peers/bin/pip install 'alibi-detect[torch]==0.13.0' frouros==0.9.0
    python -m venv river && river/bin/pip install river==0.26.1
    python -m bench.drift --peers peers/bin/python --peers river/bin/python

Needs nothing of this project. alibi-detect's licence (BSL 1.1) allows this and forbids production use.
"""

import argparse
import json
import os
import time
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402

ARL = 1000
WINDOW = 20
ALIBI_REFERENCE = 1000  # half of the streams' reference: its bootstrap takes up to 9 GB with more
FROUROS_REFERENCE = 500  # its cost grows with the reference: the whole MMD is computed anew for each sample


def alibi(kind, reference, out):
    """alibi-detect's own calibration to ARL 1,000; returns a function stream -> index of the alarm, and it."""
    from alibi_detect.cd import LSDDDriftOnline, MMDDriftOnline

    cls = {"alibi MMD": MMDDriftOnline, "alibi LSDD": LSDDDriftOnline}[kind]
    np.random.seed(0)
    start = time.process_time()
    detector = cls(
        reference.astype(np.float32),
        ert=ARL,
        window_size=WINDOW,
        backend="pytorch",
        n_bootstraps=2000,
        verbose=False,
    )
    out["configure_s"] = time.process_time() - start

    def first(stream, limit):
        detector.reset_state()
        for t in range(min(limit, len(stream))):
            if detector.predict(stream[t], return_test_stat=False)["data"]["is_drift"]:
                return t
        return None

    def values(stream):
        detector.reset_state()
        return [float(detector.predict(row)["data"]["test_stat"]) for row in stream]

    return first, values


def frouros_mmd(reference, null, out):
    """Frouros gives a distance and no threshold: ours is the quantile that gives ARL 1,000 on null streams."""
    from functools import partial

    from frouros.detectors.data_drift import MMDStreaming
    from frouros.utils.kernels import rbf_kernel

    squares = np.square(reference[:500, None] - reference[None, :500]).sum(-1)
    sigma = float(np.sqrt(np.median(squares[np.triu_indices(len(squares), 1)]) / 2))

    def values(stream):
        start = time.process_time()
        detector = MMDStreaming(window_size=WINDOW, kernel=partial(rbf_kernel, sigma=sigma))
        detector.fit(X=reference)
        out["configure_s"] = time.process_time() - start
        found = []
        for row in stream:
            result, _ = detector.update(value=row)
            found.append(-np.inf if result is None else result.distance)
        return np.array(found)

    runs = [values(stream) for stream in null]
    threshold = _threshold(runs)

    def first(stream, limit):
        over = np.flatnonzero(values(stream[:limit]) > threshold)
        return int(over[0]) if len(over) else None

    return first, values, runs, threshold


def river_adwin(null, out):
    """ADWIN on the entropy; its delta is chosen for ARL 1,000 on null streams."""
    from river.drift import ADWIN

    def first_with(delta, stream, limit):
        detector = ADWIN(delta=delta)
        for t, value in enumerate(stream[:limit]):
            detector.update(float(value))
            if detector.drift_detected:
                return t
        return None

    best, error = 0.002, np.inf
    for delta in np.geomspace(1e-6, 0.9, 30):
        ends = [first_with(delta, s, len(s)) for s in null]
        exposure = sum(len(s) if e is None else e + 1 for s, e in zip(null, ends, strict=True))
        arl = exposure / max(1, sum(e is not None for e in ends))
        if abs(np.log(arl / ARL)) < error:
            best, error = delta, abs(np.log(arl / ARL))
    out["delta"] = best
    out["configure_s"] = 0.0
    return lambda stream, limit: first_with(best, stream, limit)


def _threshold(runs):
    """Smallest threshold at which the runs' mean length is ARL."""
    for value in np.unique(np.quantile(np.concatenate(runs), np.linspace(0.95, 1, 500))):
        ends = [np.flatnonzero(r > value) for r in runs]
        exposure = sum(int(e[0]) + 1 if len(e) else len(r) for e, r in zip(ends, runs, strict=True))
        if exposure / max(1, sum(len(e) > 0 for e in ends)) >= ARL:
            return float(value)
    return float("inf")


def main():
    """Run one detector on one file of streams and write its results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("detector", choices=["alibi MMD", "alibi LSDD", "frouros MMD", "river ADWIN"])
    parser.add_argument("streams")
    parser.add_argument("out")
    arguments = parser.parse_args()
    data = np.load(arguments.streams)
    try:
        import torch

        torch.set_num_threads(1)
    except ImportError:
        pass
    out = {}
    null = [data["table"][rows] for rows in data["null"]]
    values = None
    if arguments.detector.startswith("alibi"):
        first, values = alibi(arguments.detector, data["reference"][:ALIBI_REFERENCE], out)
    elif arguments.detector == "frouros MMD":
        first, values, runs, threshold = frouros_mmd(data["reference"][:FROUROS_REFERENCE], null[:10], out)
        ends = [np.flatnonzero(r > threshold) for r in runs]
        out["null"] = [
            [int(e[0]) + 1 if len(e) else len(r), bool(len(e))] for e, r in zip(ends, runs, strict=True)
        ]
    else:
        first = river_adwin(null, out)
    if "null" not in out:
        out["null"] = []
        for stream in null:
            end = first(stream, len(stream))
            out["null"].append([len(stream) if end is None else end + 1, end is not None])
    start, before = time.process_time(), 0
    change, censor = int(data["change"]), int(data["censor"])
    out["delays"] = {}
    for name, rows in zip(data["names"], data["shifted"], strict=True):
        delays = []
        for row in rows:
            end = first(data["table_" + str(name)][row], change + censor)
            before += change + censor if end is None else end + 1
            if end is None or end >= change:  # an earlier alarm is a false one, and says nothing of the delay
                delays.append([censor if end is None else end - change + 1, end is not None])
        out["delays"][str(name)] = delays
    out["us_per_sample"] = (time.process_time() - start) / max(1, before) * 1e6
    if values is not None:
        out["statistics"] = [float(v) for v in values(null[0][:200])]
    with open(arguments.out, "w") as file:
        json.dump(out, file)


if __name__ == "__main__":
    main()
