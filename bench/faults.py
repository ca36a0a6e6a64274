"""Two hundred random faults under constant load: what is lost?

    python -m bench.faults [--faults 200] [--seed 0]

A daemon with two servers serves the digits; a client keeps a ledger: every request, its answer's version and logits,
every label that was acknowledged. It reaches the second server through a proxy. Images are clean, noisy or blurred by
turns, so that versions are made and recalled all the while. Then, at random: kill -9 and SIGSTOP of each process,
computations that do not end, a disk that takes nothing (RLIMIT_FSIZE) or is full (a small tmpfs, where one can be
mounted), files of the state folder cut, zeroed and changed while the daemon is down, a wall clock that jumps, connections
that are dropped and delayed, frames that nobody should send, floods of labels and of requests. After each it waits until
everything is as before. At the end the ledger is compared with the disk, and every answer with what its version computes.
What only a damaged file of labels or of a version held is counted apart. Writes `results/faults.{json,md}`.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq

from bench.digits import digits_bundle
from bench.fuzz import TARGETS, kept
from bench.proxy import Proxy
from bench.stamp import publish, stamp
from tta.bundle import load_bundle
from tta.client import Client, Prediction
from tta.errors import TTAError
from tta.packaging.digits import corrupt, digits
from tta.scenario import DaemonProcess
from tta.server.predictor import Predictor
from tta.versions import VersionManifest

SETTINGS: dict[str, Any] = {
    **{"adapt.labels": 96, "adapt.retry_labels": 24, "adapt.augment": ["crop"], "adapt.epochs": 8},
    **{
        "monitor.window": 256,
        "gate.probation_s": 1.0,
        "daemon.worker_timeout_s": 8.0,
        "labels.capacity": 100_000,
    },
}
RATE = 50.0  # requests a second
LABEL_EVERY = 4
TIMEOUT_S = 60.0  # a request that is not answered by then is lost
RECOVERY_S = 90.0
DISK_MB = 512  # of the tmpfs
KEPT = ("server", "server1", "shadow")  # processes that always run
FAULTS_A_REGIME = 8  # and the pictures change
TOLERANCE = 2e-3  # of logits, between batches of different sizes
# Loaded by every process of a daemon before its own modules: a clock that can be set, and a computation that
# does not end, as with a driver that hangs.
SITE = """
import sys, time
from pathlib import Path
folder = Path(__file__).parent
real_ns = time.time_ns
def shifted_ns():
    path = folder / "clock_ns"
    return real_ns() + (int(path.read_text() or 0) if path.exists() else 0)
time.time_ns = shifted_ns
time.time = lambda: shifted_ns() / 1e9
if "tta.server" in sys.orig_argv:
    from tta.server.predictor import Predictor
    run = Predictor.run
    def stuck(self, x):
        while (folder / "hang").exists():
            time.sleep(0.02)
        return run(self, x)
    Predictor.run = stuck
"""

Json = dict[str, Any]


class Ledger(threading.Thread):
    """A client with a book of everything it was told."""

    def __init__(self, endpoints: str, control: str, regimes: list[Any], y: Any) -> None:
        super().__init__(daemon=True)
        self._addresses = (endpoints, control)
        self._regimes, self.y = regimes, y
        self.regime = 0
        self.sent = 0
        self.answers: list[tuple[int, int, int, int, Any]] = []  # prediction id, regime, image, version, logits
        self.refused: Counter[str] = Counter()
        self.acknowledged: set[int] = set()
        self.unacknowledged = 0  # labels that were refused or not answered
        self.twice = 0  # answers to a request that had one
        self.unanswered = 0
        self.failure: BaseException | None = None
        self._done = threading.Event()
        self._to_label: list[tuple[int, int]] = []

    def run(self) -> None:
        """The thread."""
        labeller = threading.Thread(target=self._label, daemon=True)
        labeller.start()
        try:
            with Client(*self._addresses, timeout_s=TIMEOUT_S) as client:
                self._send(client)
        except BaseException as error:
            self.failure = error
            raise
        finally:
            self._done.set()
            labeller.join(30)

    def _send(self, client: Client) -> None:
        pending: dict[int | str, tuple[int, int]] = {}
        began = time.monotonic()
        while pending or not self._done.is_set():
            if not self._done.is_set() and self.sent < RATE * (time.monotonic() - began):
                image = self.sent % len(self.y)
                pending[client.submit(self._regimes[self.regime][image])] = (self.regime, image)
                self.sent += 1
            for request, answer in client.results(0.005):
                if request not in pending:
                    self.twice += 1
                    continue
                regime, image = pending.pop(request)
                if isinstance(answer, Prediction):
                    self.answers.append((answer.prediction_id, regime, image, answer.version, answer.logits[0]))
                    if len(self.answers) % LABEL_EVERY == 0:
                        self._to_label.append((answer.prediction_id, int(self.y[image])))
                else:
                    name = getattr(getattr(answer, "code", None), "name", type(answer).__name__).lower()
                    self.refused[name] += 1
        self.unanswered = len(pending)

    def _label(self) -> None:
        with Client(*self._addresses, timeout_s=5.0) as client:
            while not self._done.wait(0.1):
                rows, self._to_label = self._to_label[:64], self._to_label[64:]
                if not rows:
                    continue
                try:
                    outcomes = client.label([i for i, _ in rows], [label for _, label in rows])
                except TTAError:  # nothing was promised
                    self.unacknowledged += len(rows)
                    continue
                self.acknowledged |= {i for (i, _), o in zip(rows, outcomes, strict=True) if o == "joined"}

    def stop(self) -> None:
        """Send nothing more, wait for what is due."""
        self._done.set()
        self.join(TIMEOUT_S + 30)


class Bench:
    """The daemon, its ledger, and what can be done to them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self._killed: dict[str, int] = {}  # the process that was killed last, by name
        self.site = folder / "site"
        self.site.mkdir()
        (self.site / "sitecustomize.py").write_text(SITE)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(self.site), os.environ.get("PYTHONPATH")]))
        self.bundle = digits_bundle()
        self.disk = folder / "daemon"
        self.disk.mkdir()
        self.has_disk = mounted(self.disk)
        self.daemon = DaemonProcess(self.bundle, self.disk, SETTINGS, n_servers=2)
        self.state = self.disk / "state"
        self.copies = folder / "copies"  # of versions that were damaged, as they were
        self.labels_damaged: set[int] = set()  # ids whose labels only a damaged file held
        first, second = self.daemon.endpoint.split(",")
        self.proxy = Proxy(int(second.rpartition(":")[2]))
        x, y = digits("stream", 600, seed=21)
        regimes = [x, corrupt(x, "noise", 1), corrupt(x, "blur", 1)]
        self.regimes = regimes
        self.daemon.start()
        self.ledger = Ledger(f"{first},{self.proxy.endpoint}", self.daemon.control, regimes, y)
        self.ledger.start()
        self.kinds: dict[str, Callable[[], None]] = {
            **{
                f"kill -9 {name}": self._ending(name, signal.SIGKILL)
                for name in ("server", "server1", "shadow", "adapter")
            },
            "kill -9 daemon": lambda: self._restart(lambda: None),
            **{f"SIGSTOP {name}": self._stopping(name) for name in ("server", "server1", "shadow", "daemon")},
            **{f"SIGSTOP {name} for good": self._ending(name, signal.SIGSTOP) for name in ("server", "server1")},
            "computation hangs": self._hang,
            "disk takes nothing": self._forbidden_disk,
            **({"disk full": self._full_disk} if self.has_disk else {}),
            "damaged state file": lambda: self._restart(lambda: self._damage(self._state_files())),
            "damaged version": lambda: self._restart(self._damage_version),
            "damaged labels": self._damage_labels,
            "clock jumps": self._clock,
            "connections dropped": self.proxy.drop,
            "connections delayed": self._delay,
            "hostile frames": self._hostile,
            "label flood": self._label_flood,
            "request flood": self._request_flood,
        }

    # -- faults -------------------------------------------------------------------------------------------

    def _pid(self, name: str) -> int | None:
        if name == "daemon":
            assert self.daemon.process is not None
            return self.daemon.process.pid
        found = self.status().get("processes", {}).get(name, {}).get("pid")
        return int(found) if found else None

    def _ending(self, name: str, signum: int) -> Callable[[], None]:
        """By SIGKILL at once, or by SIGSTOP, until the daemon kills what does not answer."""

        def act() -> None:
            pid = self._pid(name)
            if pid is not None:  # the adapter comes and goes
                os.kill(pid, signum)
                self._killed[name] = pid

        return act

    def _stopping(self, name: str) -> Callable[[], None]:
        def act() -> None:
            pid = self._pid(name)
            if pid is not None:
                os.kill(pid, signal.SIGSTOP)
                time.sleep(self.random.uniform(0.2, 3.0))
                os.kill(pid, signal.SIGCONT)

        return act

    def _hang(self) -> None:
        """Neither server computes, until one of them has been killed for it."""

        def hung() -> list[str]:
            return [line for line in self.daemon.log_path.read_text().splitlines() if '"process_hung"' in line]

        before, pids = len(hung()), {name: self._pid(name) for name in ("server", "server1")}
        (self.site / "hang").touch()
        end = time.monotonic() + RECOVERY_S
        while time.monotonic() < end and len(hung()) == before:
            time.sleep(0.2)
        (self.site / "hang").unlink()
        self._killed |= {json.loads(line)["name"]: pids[json.loads(line)["name"]] or 0 for line in hung()[before:]}

    def _restart(self, meanwhile: Callable[[], None]) -> None:
        process = self.daemon.process
        assert process is not None
        process.kill()
        process.wait()
        meanwhile()
        time.sleep(self.random.uniform(0.0, 1.0))
        self.daemon.start()

    def _state_files(self) -> list[Path]:
        names = ["state.json", "library.json", "watch.safetensors", "rehearsed.json"]
        files = [self.state / name for name in names if (self.state / name).exists()]
        return files + sorted((self.state / "regimes").glob("*.safetensors"))

    def _damage(self, files: list[Path]) -> None:
        path = self.random.choice(files)
        data = path.read_bytes()
        cut = self.random.randrange(len(data))
        path.write_bytes(
            self.random.choice(
                [data[:cut], bytes(len(data)), data[:cut] + bytes([data[cut] ^ 16]) + data[cut + 1 :]]
            )
        )

    def _damage_version(self) -> None:
        """The newest, which often is the one that serves."""
        whole = self.promoted() - {int(path.name) for path in self.copies.glob("*")}
        if not whole:
            return
        folder = self.state / "versions" / f"{max(whole):06d}"
        shutil.copytree(folder, self.copies / folder.name)
        self._damage([folder / "delta.safetensors", folder / "manifest.json"])

    def _damage_labels(self) -> None:
        before: set[int] = set()

        def damage() -> None:
            before.update(self.labels_on_disk())  # the last connection puts all into one file when it is closed
            self._damage([self.state / "labels.sqlite"])

        self._restart(damage)
        self.labels_damaged |= before - self.labels_on_disk()

    def _full_disk(self) -> None:
        """All of it is taken for some seconds."""
        filler = self.disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(1 << 20))
        with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(512))
        time.sleep(self.random.uniform(0.5, 3.0))
        filler.unlink()

    def _forbidden_disk(self) -> None:
        pid = self._pid("daemon")
        assert pid is not None
        limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, limits[1]))
        time.sleep(self.random.uniform(0.5, 3.0))
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)

    def _clock(self) -> None:
        shift_s = self.random.choice([-1, 1]) * 10 ** self.random.uniform(0, 8.5)
        fresh = self.site / "clock.new"
        fresh.write_text(str(int(1e9 * shift_s)))
        fresh.rename(self.site / "clock_ns")

    def _delay(self) -> None:
        self.proxy.delay_s = self.random.uniform(0.05, 1.0)
        time.sleep(2.0)
        self.proxy.delay_s = 0.0

    def _hostile(self) -> None:
        addresses = [*self.daemon.endpoint.split(","), self.daemon.control]
        for _ in range(20):
            host, _, port = self.random.choice(addresses).removeprefix("tcp://").rpartition(":")
            data = self.random.randbytes(self.random.randrange(1, 3000))  # no ZeroMQ at all
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 5) as raw:
                raw.sendall(data)
        corpus = [data for name in TARGETS for data in kept(name)] or [b"\0" * 10]
        context = zmq.Context()
        for address in addresses:
            dealer = context.socket(zmq.DEALER)
            dealer.connect(address)
            for _ in range(100):
                frames = [
                    self.random.choice([self.random.randbytes(30), self.random.choice(corpus), b""])
                    for _ in range(self.random.randrange(1, 6))
                ]
                dealer.send_multipart(frames)
            dealer.close(linger=1000)
        context.term()

    def _label_flood(self) -> None:
        with Client(self.daemon.endpoint, self.daemon.control, timeout_s=20.0) as client:
            for _ in range(10):
                client.label([self.random.randrange(10**16) for _ in range(1000)], [1] * 1000)
            recent = {i: int(self.ledger.y[image]) for i, _, image, _, _ in self.ledger.answers[-800:]}
            again = [i for i in recent if i in self.ledger.acknowledged]
            if again:
                client.label(again, [recent[i] for i in again])

    def _request_flood(self) -> None:
        x = self.regimes[0]
        with Client(self.daemon.endpoint, self.daemon.control, timeout_s=20.0, retry=False) as client:
            end = time.monotonic() + 1.5
            while time.monotonic() < end:
                for i in range(64):
                    client.submit(x[i : i + 4])
                for _ in client.results(0.0):
                    pass

    # -- recovery -----------------------------------------------------------------------------------------

    def status(self) -> Json:
        """The daemon's status; empty while it does not answer."""
        with Client(self.daemon.endpoint, self.daemon.control, timeout_s=2.0) as client:
            try:
                return client.status()
            except TTAError:
                return {}

    def recovered(self) -> bool:
        """Whether all processes are ready and answers come."""
        n = len(self.ledger.answers)
        up = self.status().get("processes", {})
        if not up or not all(up[name]["ready"] for name in KEPT):
            return False
        if any(up[name]["pid"] == self._killed.get(name) for name in KEPT):  # it has not been noticed yet
            return False
        end = time.monotonic() + 2.0
        while time.monotonic() < end and len(self.ledger.answers) < n + 5:
            time.sleep(0.02)
        return len(self.ledger.answers) >= n + 5

    def promoted(self) -> set[int]:
        """Versions the gate has accepted, with their weights."""
        found = set()
        for path in (self.state / "versions").glob("*/manifest.json"):
            try:
                manifest = msgspec.json.decode(path.read_bytes(), type=VersionManifest)
            except (msgspec.MsgspecError, UnicodeDecodeError):  # one that we have damaged
                continue
            if manifest.verdict.get("outcome") == "accepted" and (path.parent / "delta.safetensors").exists():
                found.add(manifest.version)
        return found

    def labels_on_disk(self) -> set[int]:
        """Their prediction ids."""
        with sqlite3.connect(self.state / "labels.sqlite") as db:
            return {row[0] for row in db.execute("SELECT prediction_id FROM labels")}

    def keep_log(self) -> None:
        """Somewhere else than in the folder that goes."""
        (Path(tempfile.gettempdir()) / "tta-faults.log").write_text(self.daemon.log_path.read_text())

    def one(self, kind: str) -> Json:
        """Do it, wait until all is well; how long that took."""
        before = Counter(self.ledger.refused)
        began = time.monotonic()
        self.kinds[kind]()
        done = time.monotonic()
        while not self.recovered():
            if time.monotonic() - done > RECOVERY_S:
                return {"kind": kind, "recovery_s": None}
        refused = dict(Counter(self.ledger.refused) - before)
        return {
            "kind": kind,
            "fault_s": round(done - began, 2),
            "recovery_s": round(time.monotonic() - done, 2),
            "refused": refused,
        }

    def wrong_answers(self) -> int:
        """How many answers are not what the version they name computes."""
        predictor = Predictor(load_bundle(self.bundle), "cpu", 1, 64)
        wrong = 0
        for version in sorted({v for _, _, _, v, _ in self.ledger.answers}):
            name = f"{version:06d}"
            kept_whole = self.copies if (self.copies / name).exists() else self.state / "versions"
            folder = kept_whole / name if version else None
            session = predictor.prepare(folder)
            for regime in range(len(self.regimes)):
                rows = [
                    (image, logits)
                    for _, r, image, v, logits in self.ledger.answers
                    if (r, v) == (regime, version)
                ]
                images = sorted({image for image, _ in rows})
                expected: dict[int, Any] = {}
                for i in range(0, len(images), 64):
                    part = images[i : i + 64]
                    found = predictor.run_with(session, self.regimes[regime][part]).logits
                    expected |= dict(zip(part, found, strict=True))
                wrong += sum(not np.allclose(logits, expected[image], atol=TOLERANCE) for image, logits in rows)
        return wrong


def run(n: int, seed: int, only: list[str] | None) -> Json:
    """All faults, and the account."""
    with tempfile.TemporaryDirectory(prefix="tta-faults-") as folder:
        bench = Bench(Path(folder), seed)
        faults: list[Json] = []
        promoted: set[int] = set()
        try:
            names = [k for k in bench.kinds if not only or k in only]
            order = [names[i % len(names)] for i in range(n)]
            bench.random.shuffle(order)
            for i, kind in enumerate(order):
                if i % FAULTS_A_REGIME == 0:
                    bench.ledger.regime = (i // FAULTS_A_REGIME) % len(bench.regimes)
                faults.append(bench.one(kind))
                promoted |= bench.promoted()
                took = faults[-1]["recovery_s"]
                print(f"{i + 1} of {n}: {kind}: {took} s", file=sys.stderr, flush=True)
            served_last = bench.status()
            bench.ledger.stop()
            damaged = {int(path.name) for path in bench.copies.glob("*")}
            lost_versions = promoted - bench.promoted() - damaged
            lost_labels = bench.ledger.acknowledged - bench.labels_on_disk()
            ids = [answer[0] for answer in bench.ledger.answers]
            ledger = bench.ledger
            return {
                "faults": faults,
                "requests": ledger.sent,
                "answered": len(ids),
                "refused": dict(ledger.refused),
                "unanswered": ledger.unanswered,
                "answered_twice": ledger.twice,
                "ids_given_twice": len(ids) - len(set(ids)),
                "wrong_answers": bench.wrong_answers(),
                "labels_acknowledged": len(ledger.acknowledged),
                "labels_refused": ledger.unacknowledged,
                "labels_lost": len(lost_labels - bench.labels_damaged),
                "labels_damaged": len(lost_labels & bench.labels_damaged),
                "versions_promoted": len(promoted),
                "versions_damaged": len(damaged),
                "versions_lost": len(lost_versions),
                "versions_answering": len({answer[3] for answer in ledger.answers}),
                "client_failed": repr(ledger.failure) if ledger.failure else "",
                "restarts": {k: p["restarts"] for k, p in served_last.get("processes", {}).items()},
                "tracebacks": bench.daemon.log_path.read_text().count("Traceback"),
            }
        finally:
            bench.ledger._done.set()
            bench.daemon.stop()
            bench.proxy.close()
            bench.keep_log()
            if bench.has_disk:
                subprocess.run(["umount", str(bench.disk)], check=False)


def mounted(folder: Path) -> bool:
    """Whether a small disk could be mounted there."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0


def table(result: Json) -> list[str]:
    """As Markdown."""
    faults = result["faults"]
    kinds = sorted({f["kind"] for f in faults})
    lines = [
        "# Faults",
        "",
        f"{result['date']}, commit {result['commit']}, `{result['command']}`; digits, two servers, {RATE:.0f} requests a "
        f"second, {len(faults)} faults.",
        "",
        "| | |",
        "| --- | --- |",
        f"| requests | {result['requests']:,} |",
        f"| answered | {result['answered']:,} |",
        f"| refused with a code | {sum(result['refused'].values()):,} {result['refused'] or ''} |",
        f"| neither | {result['unanswered']} |",
        f"| answered twice | {result['answered_twice']} |",
        f"| prediction ids given twice | {result['ids_given_twice']} |",
        f"| answers that are not their version's | {result['wrong_answers']} |",
        f"| labels acknowledged | {result['labels_acknowledged']:,} |",
        f"| of those lost | {result['labels_lost']} |",
        f"| of those only in a damaged file, where it could not be read | {result['labels_damaged']:,} |",
        f"| labels refused, or not answered in time | {result['labels_refused']:,} |",
        f"| versions promoted | {result['versions_promoted']} |",
        f"| of those lost | {result['versions_lost']} |",
        f"| of those damaged | {result['versions_damaged']} |",
        f"| versions that answered | {result['versions_answering']} |",
        "",
        "| fault | times | recovered | seconds until all was well, median | most | requests refused meanwhile |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind in kinds:
        own = [f for f in faults if f["kind"] == kind]
        took = [f["recovery_s"] for f in own if f["recovery_s"] is not None]
        refused = sum(sum(f.get("refused", {}).values()) for f in own)
        lines.append(
            f"| {kind} | {len(own)} | {len(took)} | {np.median(took) if took else float('nan'):.1f} | "
            f"{max(took, default=float('nan')):.1f} | {refused} |"
        )
    return [
        *lines,
        "",
        "Well is: both servers and the shadow ready, the daemon answers, five more answers. The fault itself (a stop, a "
        "restart of the daemon) is not counted.",
    ]


def main() -> int:
    """Run and write the report; 1 if anything was lost."""
    parser = argparse.ArgumentParser(prog="python -m bench.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=200, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of their order and kind")
    parser.add_argument("--only", nargs="*", metavar="KIND", help="these kinds only, and no report")
    arguments = parser.parse_args()
    found = run(arguments.faults, arguments.seed, arguments.only)
    result = {**stamp(f"python -m bench.faults --faults {arguments.faults} --seed {arguments.seed}"), **found}
    if arguments.only:
        print("\n".join(table(result)))
    else:
        publish("faults", result, table(result))
    lost = ("unanswered", "answered_twice", "ids_given_twice", "wrong_answers", "labels_lost", "versions_lost")
    recovered = all(f["recovery_s"] is not None for f in result["faults"])
    return int(any(result[name] for name in lost) or not recovered or bool(result["client_failed"]))


if __name__ == "__main__":
    sys.exit(main())
