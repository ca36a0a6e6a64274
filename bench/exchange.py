"""What clients notice of `tta deploy`: `python -m bench.exchange [--times 10]`.

One client asks for one image after another, as fast as it is answered, while a model is deployed in the place of
another and back. Both compute the same; what differs is the bundle.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.digits import digits_bundle
from bench.stamp import publish, stamp
from tta.bundle import write_bundle
from tta.client import Client
from tta.errors import TTAError
from tta.packaging.digits import digits
from tta.protocol import Deploy
from tta.scenario import DaemonProcess

REST_S = 2.0  # between two deployments
LIMIT_S = 60.0


def renamed(bundle: Path, target: Path) -> Path:
    """The same model as another bundle."""
    with zipfile.ZipFile(bundle) as archive:
        files = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    manifest = json.loads(files.pop("manifest.json")) | {"name": "other"}
    write_bundle(target, {k: v for k, v in manifest.items() if k not in ("format", "sha256")}, files)
    return target


class Asker(threading.Thread):
    """Asks without a pause.

    Attributes:
        asked: monotonic seconds and latency in seconds of each request.
        failed: what came instead of an answer.
    """

    def __init__(self, daemon: DaemonProcess) -> None:
        super().__init__(daemon=True)
        self._daemon = daemon
        self.asked: list[tuple[float, float]] = []
        self.failed: list[str] = []
        self.done = threading.Event()

    def run(self) -> None:
        """The thread."""
        x, _ = digits("stream", 64, seed=5)
        with Client(self._daemon.endpoint, self._daemon.control, timeout_s=20) as client:
            while not self.done.is_set():
                began = time.monotonic()
                try:
                    client.predict(x[len(self.asked) % 64])
                except TTAError as error:
                    self.failed.append(repr(error))
                self.asked.append((began, time.monotonic() - began))


def deploy(daemon: DaemonProcess, bundle: Path) -> float:
    """Deploy a bundle and wait until its daemon answers; seconds."""
    began = time.monotonic()
    with daemon.client(LIMIT_S) as client:
        wanted = client.call(Deploy(bundle=str(bundle)))["bundle_sha256"]
    while time.monotonic() < began + LIMIT_S:
        try:
            with daemon.client(1.0) as client:
                if client.status()["bundle_sha256"] == wanted:
                    return time.monotonic() - began
        except TTAError:  # between the two
            continue
    raise TimeoutError(f"{bundle} does not serve")


def run(times: int, folder: Path) -> dict[str, Any]:
    """Seconds of each deployment, the slowest answer in each, and what went wrong."""
    bundles = (digits_bundle(), renamed(digits_bundle(), folder / "other.tta"))
    daemon = DaemonProcess(bundles[0], folder / "daemon", {"daemon.bundles": "/"})
    daemon.start()
    asker = Asker(daemon)
    asker.start()
    try:
        took, slowest = [], []
        for number in range(times):
            time.sleep(REST_S)
            began = time.monotonic()
            took.append(deploy(daemon, bundles[(number + 1) % 2]))
            slowest.append(max(latency for at, latency in list(asker.asked) if at >= began))
    finally:
        asker.done.set()
        asker.join(30)
        daemon.stop()
    return {
        "requests": len(asker.asked),
        "failed": asker.failed,
        "steady_p50_s": float(np.median([latency for _, latency in asker.asked])),
        "took_s": [round(s, 3) for s in took],
        "slowest_s": [round(s, 4) for s in slowest],
    }


def table(r: dict[str, Any]) -> list[str]:
    """The result as Markdown."""
    return [
        "# Another model in the place of the present one",
        "",
        f"{r['date']}, commit {r['commit']}, `{r['command']}`; {len(r['took_s'])} deployments under load, {r['cores']} cores.",
        "",
        *("| | |", "| --- | --- |"),
        f"| requests, of them failed | {r['requests']:,}, {len(r['failed'])} |",
        f"| usual answer, ms | {1e3 * r['steady_p50_s']:.2f} |",
        f"| slowest answer of a deployment, ms: median, most | {1e3 * np.median(r['slowest_s']):.0f}, "
        f"{1e3 * max(r['slowest_s']):.0f} |",
        f"| from the command to the new daemon's answer, s: median, most | {np.median(r['took_s']):.1f}, "
        f"{max(r['took_s']):.1f} |",
    ]


def main() -> int:
    """Measure and write; 1 if a request failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.exchange", description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=10, help="deployments")
    times = parser.parse_args().times
    with tempfile.TemporaryDirectory(prefix="tta-exchange-") as folder:
        found = {**stamp("python -m bench.exchange"), "cores": os.cpu_count(), **run(times, Path(folder))}
    publish("exchange", found, table(found))
    return int(bool(found["failed"]))


if __name__ == "__main__":
    sys.exit(main())
