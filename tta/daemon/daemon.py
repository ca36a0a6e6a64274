"""The daemon: startup, main_loop, shutdown. Owns the sockets between the processes and moves messages.

What is decided lies in `treatment.py`, what is found in `watch.py`, what is kept in `store.py`, `labels.py` and
`library.py`.
"""

import math
import os
import signal
import sqlite3
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq

from tta.auth import Clients, Doorkeeper, key_of
from tta.bundle import check_signed, is_installed, load_bundle, source_is_importable
from tta.config import Config
from tta.connection import prepare_listener
from tta.daemon.calibrations import Calibrations
from tta.daemon.control import Control, Reply
from tta.daemon.deployment import Deployment
from tta.daemon.exchange import Exchange
from tta.daemon.hand import Hand
from tta.daemon.http import HttpServer
from tta.daemon.labellers import Labellers
from tta.daemon.labels import LabelBuffer, room_for_labels
from tta.daemon.ledger import Entry, Ledger
from tta.daemon.library import Library
from tta.daemon.links import AdapterLink, Outputs, ServerLink, ShadowLink
from tta.daemon.metrics import WORKERS, Metrics
from tta.daemon.operation import Operation
from tta.daemon.processes import Logger, Process, runtime_folder
from tta.daemon.retention import Retention, is_more
from tta.daemon.servers import Servers, server_name, server_options
from tta.daemon.standby import Standby
from tta.daemon.store import Store, lock
from tta.daemon.treatment import Treatment
from tta.daemon.watch import Watch, calibrated_for
from tta.daemon.webhook import Webhook
from tta.errors import ConfigError, TTAError
from tta.keys import read_public_key
from tta.monitor.calibration import Calibration, reference_warning
from tta.monitor.regimes import fingerprint
from tta.monitor.stickiness import nearest
from tta.process import allow_files, memory_bytes
from tta.protocol import encode
from tta.server.options import Counters, Observation
from tta.signatures import SigningKey, Trust, signers_of_versions
from tta.versions import SOURCE

Array = np.ndarray[Any, Any]

POLL_MS = 50
BURST = 512
EARLY_S = 1.0  # seconds a label waits for its prediction's observation
MAX_EARLY = 1000  # labels waiting so
BEAT_S = 0.25  # seconds between two rounds of supervision
RATE_S = 60.0  # seconds the rate of images is averaged over
MEASURE_AGAIN_S = 300.0  # seconds alarms are taken as they are after thresholds could not be computed
DISK_TOLD_S = 60.0  # between two complaints about the disk
SAVE_S = 5.0  # seconds between two saves of the stream's position and the charts
EXPIRE_S = 60.0  # seconds between two looks for images that are too old
LIVE_S = 10.0  # seconds without a tick after which /livez fails
ADAPTER_IDLE_S = 120.0  # seconds without work after which the adapter goes
SHADOW_QUEUE = 4  # chart requests waiting before images are dropped


class Daemon:
    """One daemon over one state folder.

    Args:
        config: its settings.
        log: where to.
        deploy: put the state of another bundle aside.
        former: that this one follows in the same process, with another bundle.
        bundle: the one to serve then.
        discard: identity of a bundle that did not come into service: what it left is deleted; "" for none.
    """

    def __init__(
        self,
        config: Config,
        log: Logger,
        deploy: bool = False,
        former: "Daemon | None" = None,
        bundle: Path | None = None,
        discard: str = "",
    ) -> None:
        self.given = config
        self.config = config if bundle is None else config.model_copy(update={"bundle": bundle})
        self.log = log
        self.deploy = deploy or bundle is not None
        # Shared with the one before: a signal that comes between the two counts.
        self.signalled: list[int] = [] if former is None else former.signalled
        self._former = former
        self._discard = discard
        self._ticked = time.monotonic()
        self._since = self._ticked
        self._measure_again = 0.0  # monotonic seconds at which a failed calibration is tried again
        self._expired = float("-inf")  # monotonic seconds, when images were looked through for their age
        self._counted = (0, self._ticked)  # images observed, when
        self._started = False
        self.exchanging = False  # another bundle's servers are warm: this daemon makes way
        self._disk_failed = float("-inf")  # monotonic seconds at which that was told last
        # Labels ahead of their predictions: until when, frames, sender's key.
        self._early: list[tuple[float, list[bytes], str]] = []
        self._doorkeeper: Doorkeeper | None = None
        self._own_key = ""  # public, as it was read last
        self._webhook: Webhook | None = None
        self.mode_reason = ""  # why the mode is not the configured one

    # -- startup ------------------------------------------------------------------------------------------

    def startup(self) -> None:
        """Open state, start or adopt the server, start the shadow, answer.

        Raises:
            TTAError: whatever keeps it from serving; the message says what to do.
        """
        allow_files()
        self._take_what_is_installed()
        self.deployment = Deployment(self.config.state)
        self._take_what_is_deployed()
        self.bundle = load_bundle(self.config.bundle)
        self.trust, key = self._trust()  # before anything is done with what the bundle says
        self._lock_file = lock(self.config.state)
        self.deployment.claim(self.bundle.sha256, self.given.bundle, self.deploy)
        if self._discard:
            self.deployment.discard(self._discard)
        self._keep_bundle()
        config = self.config
        manifest = self.bundle.manifest
        config.check_model([b.name for b in manifest.blocks])
        if not source_is_importable(manifest.source):
            self.log.warning("source_not_importable", source=manifest.source, consequence="cannot adapt")
        self.store = Store(config.state, self.bundle.sha256, key, self.trust.versions)
        self.run_folder = runtime_folder(config.state)
        names = [server_name(number) for number, _ in enumerate(config.server.endpoints)]
        self.metrics = Metrics(manifest, (*names, *WORKERS), self.bundle.sha256)
        self.ledger = Ledger(config.daemon.ledger_bytes, config.daemon.ledger_age_s)
        self.labels = LabelBuffer(
            config.state / "labels.sqlite",
            self._in_force(
                "labels.capacity", config.labels.capacity, room_for_labels(config, manifest.image_shape)
            ),
            config.labels.fit_fraction,
            manifest.image_shape,
            self._labellers,
            self._time_us,
        )
        reference = self.bundle.reference
        home = fingerprint(reference["w"], reference["predictions"])
        kept = config.library
        room = kept.disk_bytes // (kept.capacity * math.prod(manifest.image_shape))
        n_images = self._in_force("library.images", kept.images, min(kept.images, room))
        self.library = Library(config.state, home, manifest.reference_accuracy, kept.capacity, n_images)
        self.calibrations = Calibrations(
            config.state / "calibrations", self.bundle, config.monitor.arl, config.adapt.nice, self.log
        )
        warning = reference_warning(manifest.n_reference, self.calibrations.arl)
        if warning:
            self.log.warning("reference_small", warning=warning)
        watch = Watch(self.bundle, self._first_calibration(), config.monitor, self.library)
        self._doorkeeper = self._bind()
        self._make_processes()
        operation = Operation(
            config,
            self.store,
            self.labels,
            self.ledger,
            self.metrics,
            self.shadow,
            self.adapter,
            self.bundle.anchor,
            self.run_folder / "work",
        )
        self.treatment = Treatment(
            config,
            self.store,
            self.labels,
            self.ledger,
            self.library,
            watch,
            self.metrics,
            self.shadow,
            self.servers,
            self.adapter,
            operation,
            self.log,
        )
        if config.daemon.webhook is not None:
            count = self.metrics.webhook_events.labels
            self._webhook = Webhook(
                config.daemon.webhook, manifest.name, self.log, lambda result: count(result).inc()
            )
            self.treatment.told = self._webhook.tell
        if self._former is not None:  # prediction ids go on beyond those of the bundle before
            self.treatment.clock.advance(self._former.treatment.clock.now_us())
        self.treatment.restore()
        self.exchange = Exchange(
            config,
            self.deployment,
            manifest,
            self.bundle.sha256,
            self.given.bundle,
            self._warm_up,
            self.treatment.record,
            self.log,
        )
        damaged = self.store.damaged | self.library.damaged | self.labels.damaged | self.deployment.damaged
        for aside, why in damaged.items():
            self.log.error("file_damaged", error=why, kept_as=aside)
        self._since = time.monotonic()
        self._counted = (self.treatment.sequence, self._since)
        self.store.discard_candidates()
        self.metrics.version.set(self.treatment.case.serving)
        self.metrics.show_state(self.treatment.cycle.state)
        self.control = Control(
            config,
            manifest,
            self.store,
            self.labels,
            self.ledger,
            self.metrics,
            self.treatment,
            Hand(self.treatment),
            self.servers,
            self.processes,
            self.ready,
            self.exchange.begin,
            self.log,
            self._doorkeeper.clients if self._doorkeeper is not None else None,
            mode_reason=self.mode_reason,
        )
        self.http = HttpServer(config.daemon.http, self.metrics.registry, self.live, self.ready)
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._on_signal)
        self._start_servers()
        self.shadow.process.start()
        self._started = True
        self.log.info(
            "daemon_ready",
            pid=os.getpid(),
            endpoint=config.server.endpoint,
            control=config.daemon.control,
            http_port=self.http.port,
            version=self.treatment.case.serving,
            state=self.treatment.cycle.state,
        )
        try:
            gone = self.deployment.settle(self.bundle.sha256, self.given.bundle, config.daemon.former_bundles)
        except OSError as error:
            self.log.warning("former_bundles_not_deleted", error=str(error))
        else:
            for bundle in gone:
                self.log.info("former_bundle_deleted", bundle=bundle)

    def _take_what_is_deployed(self) -> None:
        """A bundle that was deployed serves over a restart, also where the configuration still names another."""
        if self._former is not None:
            return  # it has said which
        bundle = self.deployment.bundle_in_force(self.config.bundle, self.deploy)
        if bundle != self.config.bundle:
            self.log.warning("configuration_outdated", configured=str(self.config.bundle), serving=str(bundle))
            self.config = self.config.model_copy(update={"bundle": bundle})

    def _keep_bundle(self) -> None:
        """Serve a copy of the bundle, so that a process starts again whatever becomes of the file."""
        try:
            copy = self.deployment.keep(self.config.bundle, self.bundle.sha256)
        except OSError as error:
            self.log.warning("bundle_not_kept", error=str(error), serving=str(self.config.bundle))
            return
        self.config = self.config.model_copy(update={"bundle": copy})
        self.bundle = replace(self.bundle, path=copy)

    def _warm_up(self, bundle: Path, sha256: str) -> Standby:
        """Servers of another bundle beside the present ones, in the version that it served last."""
        config = self.config.model_copy(update={"bundle": bundle})
        options = {
            number: server_options(
                config,
                number,
                self.run_folder,
                self._observe_address(sha256),
                Trust(sha256, self.trust.versions),
                self.deployment.version_of_former(sha256),
                self._public_key(),
                self._time_us(),
            )
            for number, _ in enumerate(config.server.endpoints)
        }
        return Standby(self.run_folder, options, self.log)

    def _take_what_is_installed(self) -> None:
        """Without torch there is no adapter: then the mode is off, and log and status say why."""
        if self.config.mode == "off" or is_installed("torch"):
            return
        why = "torch is not installed: extra [adapt], image target full"
        self.log.warning("monitor_only", wanted=f"mode: {self.config.mode}", in_force="mode: off", reason=why)
        self.config = self.config.model_copy(update={"mode": "off"})
        self.mode_reason = why

    def _trust(self) -> tuple[Trust, SigningKey | None]:
        """What the other processes take for genuine, and what versions are signed with."""
        security = self.config.security
        if security.signers is not None:
            self.log.info("bundle_signed", by=check_signed(self.bundle, security.signers))
        key = SigningKey(security.signing_key) if security.signing_key is not None else None
        return Trust(self.bundle.sha256, signers_of_versions(security.signers, key)), key

    def _in_force(self, what: str, wanted: int, in_force: int) -> int:
        """A number of things to keep, told where it is not the wanted one."""
        if in_force < wanted:
            self.log.warning("disk_budget", what=what, wanted=wanted, in_force=in_force)
        return in_force

    def _labellers(self) -> Labellers:
        clients = self._doorkeeper.clients if self._doorkeeper is not None else None
        return Labellers.listed(clients, self.config.labels.client_share)

    def _first_calibration(self) -> Calibration:
        """Thresholds for the stickiness that is set, else for the one measured before a restart."""
        fixed = self.config.monitor.stickiness
        measured = calibrated_for(self.store.load_watch()) if fixed is None else None
        kept = self.calibrations.kept(measured) if measured is not None else None
        return kept or self.calibrations.now(nearest(fixed or 0.0, 1.0))

    def _open_door(self) -> Doorkeeper | None:
        """Who asks clients for their keys, if anybody does."""
        security = self.config.security
        if security.key is None or security.clients is None:
            if security.plaintext:
                self.log.warning("plaintext", consequence="whoever reaches the sockets can change what is served")
            return None
        return Doorkeeper(self.context, security.key, Clients(security.clients), self.log)

    def _bind(self) -> Doorkeeper | None:
        """Open the sockets; who asks for keys at the control socket, if anybody does."""
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        doorkeeper = self._open_door()
        self._observations = self.context.socket(zmq.PULL)
        self._observations.setsockopt(zmq.RCVHWM, 1000)
        self._workers = self.context.socket(zmq.ROUTER)
        self._workers.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._control = self.context.socket(zmq.ROUTER)
        prepare_listener(self._control, self.config.daemon.control, self.config.server.max_message_bytes)
        if doorkeeper is not None and not doorkeeper.guard(self._control, self.config.daemon.control):
            doorkeeper = None
        for socket, name, address in (
            (self._observations, "observations", self._observe_address()),
            (self._workers, "workers", self._ipc("workers")),
            (self._control, "daemon.control", self.config.daemon.control),
        ):
            socket.setsockopt(zmq.LINGER, 1000)
            try:
                socket.bind(address)
            except zmq.ZMQError as error:
                raise ConfigError(f"{name} = {address!r} cannot be bound: {error}") from error
        for left in self.run_folder.glob("observe-*.ipc"):  # by daemons of other bundles
            if f"ipc://{left}" != self._observe_address():
                left.unlink()
        self._poller = zmq.Poller()
        for socket in (self._observations, self._workers, self._control):
            self._poller.register(socket, zmq.POLLIN)
        if doorkeeper is not None:
            self._poller.register(doorkeeper.socket, zmq.POLLIN)
        return doorkeeper

    def _observe_address(self, sha256: str = "") -> str:
        """Where servers of a bundle, or ours, send what they have seen: what comes is of the right model."""
        return self._ipc(f"observe-{(sha256 or self.bundle.sha256)[:8]}")

    def _ipc(self, name: str) -> str:
        return f"ipc://{self.run_folder / name}.ipc"

    def _make_processes(self) -> None:
        c = self.config
        bundle, workers, nice = str(c.bundle.resolve()), self._ipc("workers"), str(c.adapt.nice)
        trust = self.trust.tell()
        pid, pace = str(os.getpid()), (str(c.adapt.threads), str(c.adapt.share))
        self.servers = Servers(
            self.context,
            c,
            self.run_folder,
            self._observe_address(),
            self.trust,
            self._version_folder,
            self._time_us,
            self._public_key,
            self.log,
        )
        for link in self.servers.links:
            self._poller.register(link.socket, zmq.POLLIN)
        model = (c.device, c.precision, str(c.server.gpu_memory_bytes or ""))
        shadow = Process(
            "shadow", lambda: ["-m", "tta.shadow", bundle, workers, *model, nice, pid, trust], self.log
        )
        adapter = Process(
            "adapter",
            lambda: ["-m", "tta.adapter.worker", bundle, workers, c.device, nice, pid, *pace, trust],
            self.log,
            keep=False,
        )
        self.processes = (*(link.process for link in self.servers.links), shadow, adapter)
        self.shadow = ShadowLink(shadow, self._workers)
        self.adapter = AdapterLink(adapter, self._workers)

    def _version_folder(self) -> Path | None:
        """Of the version a server starts with: the newest that verifies, or a lost folder would keep it down."""
        return self.store.folder(self.store.verified(self.treatment.case.serving))

    def _public_key(self) -> str:
        """The daemon's, by which servers of another are told apart; "" where it has none."""
        key = self.config.security.key
        if self._doorkeeper is not None:
            return self._doorkeeper.public_key
        try:
            self._own_key = read_public_key(key).decode() if key is not None else ""
        except ConfigError as error:  # lost since, or just being replaced: what serves goes on
            self.log.error("key_refused", error=str(error), in_force="the key before")
        return self._own_key

    def _time_us(self) -> int:
        return self.treatment.clock.now_us()

    def _start_servers(self) -> None:
        former, self._former = self._former, None
        standby = former.exchange.standby if former is not None else None
        before = {} if former is None else {n: k.process.pid or 0 for n, k in enumerate(former.servers.links)}

        def wanted() -> bool:
            self._ticked = time.monotonic()
            # Between two bundles there is a server in a moment; then it is stopped as it should be.
            return not self.signalled or former is not None

        self.servers.start_or_adopt(wanted, standby, before)

    def _on_signal(self, signum: int, frame: object) -> None:
        self.signalled.append(signum)

    # -- main loop ----------------------------------------------------------------------------------------

    def main_loop(self) -> None:
        """Move messages and decide until a signal, or until another bundle is to be served."""
        beat = saved = 0.0
        while not self.signalled and not self.exchanging:
            ready = dict(self._poller.poll(POLL_MS))
            now = self._ticked = time.monotonic()
            if self._doorkeeper is not None:
                refused = self._doorkeeper.attend()
                if refused:
                    self.metrics.commands_refused.labels("unauthenticated").inc(refused)
            # Observations first: a label must find its prediction.
            self._drain(self._observations, self._observe)
            if self._workers in ready:
                self._drain(self._workers, self._hear_worker)
            for link in self.servers.links:
                if link.socket in ready:
                    self._drain(link.socket, partial(self._hear_server, link))
            if self._control in ready:
                self._drain(self._control, self._obey, copy=False)
            if self._early:
                self._answer_early(now)
            if now - beat >= BEAT_S:
                beat = now
                self._beat(now)
            if now - saved >= SAVE_S:
                saved = now
                self._compare_clients()
                self.treatment.save()
                self.treatment.save_watch()

    def _compare_clients(self) -> None:
        try:
            self.control.compare_clients()
        except sqlite3.Error as error:
            self.log.warning("clients_not_compared", error=str(error))

    def _beat(self, now: float) -> None:
        """What is due by time. A disk that fails is told, and does not end the daemon."""
        try:
            self._supervise(now)
            self._recalibrate()
            self.treatment.tick()
            self.treatment.retire()
            self._expire(now)
            self.exchanging = self.exchange.turn() and self.servers.settled
            self._refresh_metrics(now)
        except (OSError, sqlite3.Error, TTAError) as error:
            if now - self._disk_failed > DISK_TOLD_S:
                self._disk_failed = now
                self.log.exception("disk_failed", error=str(error))

    def _expire(self, now: float) -> None:
        """Delete images that are older than they may be."""
        age_s = self.config.daemon.images_age_s
        if age_s is None or now - self._expired < EXPIRE_S:
            return
        self._expired = now
        n_labels, n_images = Retention(self.config.state, self.labels).expire(age_s, self._time_us())
        if is_more(n_labels):
            self._expired = float("-inf")  # at the next beat: this loop has other things to do
        if n_labels or n_images:
            self.log.info("images_expired", labels=n_labels, images=n_images, age_s=age_s)

    def _drain(self, socket: "zmq.Socket[bytes]", handle: Any, copy: bool = True) -> None:
        for _ in range(BURST):
            try:
                frames: Any = socket.recv_multipart(zmq.NOBLOCK, copy=copy)
            except zmq.Again:
                return
            try:
                handle(frames)
            except (
                *(msgspec.MsgspecError, TTAError, LookupError, ValueError, TypeError),
                *(OSError, sqlite3.Error),
            ) as error:
                # No message ends the daemon, not even one of our own that we misunderstand.
                self.log.exception("message_refused", error=str(error))

    def _observe(self, frames: list[bytes]) -> None:
        header = msgspec.msgpack.decode(frames[0])
        if header["op"] == "counters":
            self.metrics.server.update(msgspec.convert(header, Counters))
            return
        seen = msgspec.convert(header, Observation)
        logits = np.frombuffer(frames[1], np.float32).reshape(seen.n, -1)
        features = np.frombuffer(frames[2], np.float32).reshape(seen.n, -1)
        x = None
        if seen.inputs:
            x = np.frombuffer(frames[3], np.uint8).reshape(seen.n, *self.bundle.manifest.image_shape)
        sources = np.zeros(seen.n, np.int64)
        if seen.keys:
            number = self.treatment.watch.sources.number
            numbers = np.repeat([number(key) for key, _ in seen.keys], [n for _, n in seen.keys])
            sources[: len(numbers)] = numbers[: seen.n]
        first, now = self.treatment.sequence, time.monotonic()
        self.treatment.sequence += seen.n
        for i in range(seen.n):
            image = x[i] if x is not None else None
            entry = Entry(seen.first_id + i, first + i, seen.version, logits[i], features[i], image, now)
            self.ledger.add(entry, seen.epoch)
        sequences = range(first, first + seen.n)
        if seen.version == SOURCE:
            self._watch(sequences, features, logits, sources)
        elif x is not None:
            self._watch_through_shadow(sequences, x, sources)

    def _watch(self, sequences: range, features: Array, logits: Array, sources: Array) -> None:
        treatment, watch = self.treatment, self.treatment.watch
        refused, thinned = watch.n_refused, watch.n_thinned
        found = watch.features(sequences, features, logits, sources)
        self.metrics.samples_thinned.inc(watch.n_thinned - thinned)
        if watch.n_refused > refused:
            self.metrics.features_refused.inc(watch.n_refused - refused)
            self.log.warning("features_refused", n=watch.n_refused - refused, error="NaN or infinity in features")
        if found is not None:
            treatment.alarm(found)
        treatment.look()

    def _recalibrate(self) -> None:
        """Keep the thresholds right for how sticky the traffic is, off this loop."""
        treatment, monitor = self.treatment, self.treatment.watch.monitor
        if self._measure_again and time.monotonic() > self._measure_again:
            monitor.adaptive, self._measure_again = True, 0.0
        if monitor.wanted is not None:
            self.calibrations.request(monitor.wanted)
        done = self.calibrations.poll()
        if done is None:
            return
        stickiness, calibration = done
        if calibration is None:  # rather a false alarm than none at all
            monitor.wanted, monitor.adaptive = None, False
            self._measure_again = time.monotonic() + MEASURE_AGAIN_S
            return
        treatment.record("recalibrated", **vars(stickiness))
        found = treatment.watch.recalibrated(calibration)
        if found is not None:
            treatment.alarm(found)

    def _watch_through_shadow(self, sequences: range, x: Array, sources: Array) -> None:
        """Another version serves: the source's features come from the shadow, as far as it has time."""
        if self.shadow.waiting >= SHADOW_QUEUE or not self.shadow.process.ready:
            self.metrics.shadow_dropped.inc(len(x))
            return

        def then(outputs: Outputs | None) -> None:
            if outputs is not None:
                logits, features = outputs[0]
                self._watch(sequences, features, logits, sources)

        self.shadow.ask([(SOURCE, None)], x, then)

    def _hear_server(self, link: ServerLink, frames: list[bytes]) -> None:
        link.handle(msgspec.msgpack.decode(frames[0]), time.monotonic())

    def _hear_worker(self, frames: list[bytes]) -> None:
        header = msgspec.msgpack.decode(frames[1])
        if frames[0] == b"shadow":
            self.shadow.handle(header, frames[2:])
        elif frames[0] == b"adapter":
            self.adapter.handle(header, time.monotonic())

    def _obey(self, received: list[zmq.Frame]) -> None:
        # A label must find its prediction: the observation was sent first, but by another way.
        self._drain(self._observations, self._observe)
        frames, key = [frame.bytes for frame in received], key_of(received[-1])
        if len(self._early) < MAX_EARLY and self.control.is_early(frames[1:], key):
            self._early.append((time.monotonic() + EARLY_S, frames, key))
        else:
            self._answer(frames, key)

    def _answer_early(self, now: float) -> None:
        """Answer the labels whose predictions have become known, or that have waited long enough."""
        waiting, self._early = self._early, []
        for until, frames, key in waiting:
            if now < until and self.control.is_early(frames[1:], key):
                self._early.append((until, frames, key))
            else:
                self._answer(frames, key)

    def _answer(self, frames: list[bytes], key: str) -> None:
        identity = frames[0]

        def respond(reply: Reply, *tensors: Array) -> None:
            try:
                self._control.send_multipart([identity, *encode(reply, *tensors)], zmq.NOBLOCK)
            except zmq.ZMQError:  # the client has gone; what it asked for is done all the same
                self.log.warning("reply_undeliverable", code=reply.get("code"))

        self.control.handle(frames[1:], respond, key)

    # -- supervision ------------------------------------------------------------------------------------

    def _supervise(self, now: float) -> None:
        self.servers.say_hello()
        for process in self.processes:
            died = process.supervise()
            if not died:
                continue
            self.metrics.restarts.labels(process.name).inc()
            self.treatment.record("process_died", process=process.name)
            if process.name == "adapter":
                self.adapter.died()
        self._kill_what_hangs(now)
        differing = self.servers.differing(self.treatment.case.serving)
        if differing is not None:
            self.treatment.reconcile(differing)
        idle = self.adapter.idle_since
        needed = self.adapter.busy or self.treatment.cycle.state.value in ("drifted", "adapting")
        if idle is not None and not needed and now - idle > ADAPTER_IDLE_S:
            self.adapter.idle_since = None
            self.adapter.process.stop(0.0)
            self.log.info("adapter_idle_stopped")

    def _kill_what_hangs(self, now: float) -> None:
        """A process that is silent for too long is killed; it is then found dead and started again."""
        limit = self.config.daemon.worker_timeout_s
        for process, seconds, allowed in (
            *self.servers.silent(now, limit),
            (self.shadow.process, self.shadow.oldest_s(now), limit),
            (self.adapter.process, self.adapter.busy_s(now), self.config.adapt.budget_s + limit),
        ):
            if seconds > allowed:
                self.log.error("process_hung", name=process.name, seconds=round(seconds, 1))
                process.kill()

    def _refresh_metrics(self, now: float) -> None:
        m, treatment, watch = self.metrics, self.treatment, self.treatment.watch
        self._measure_rate(now)
        m.show_drift(watch.layout.names, watch.monitor.charts.statistic)
        m.show_shift(treatment.case.cause != "", treatment.case.kind, treatment.case.found_s)
        m.class_statistic.set(watch.monitor.classes.statistic)
        m.conformal_statistic.set(watch.monitor.conformal.statistic)
        m.label_statistic.set(watch.label_statistic)
        m.arl.set(watch.arl)
        m.realised_arl.set(watch.monitor.calibration.realised)
        m.stickiness.set(watch.monitor.calibration.stickiness.repeat)
        m.false_alarms.set(treatment.rate * 86400 / watch.arl)
        m.predicted_accuracy.set(watch.predicted_loss().accuracy or math.nan)  # 0: no samples to judge by
        m.labels_buffered.set(len(self.labels))
        wanted = (
            treatment.case.wanted - self.labels.count(treatment.case.onset) if treatment.case.actionable else 0
        )
        m.labels_wanted.set(max(0, wanted))
        progress = self.adapter.progress
        m.adaptation_progress.set(progress["done"] / max(1, progress["total"]) if progress else 0.0)
        m.ledger_bytes.set(self.ledger.n_bytes)
        for process in self.processes:
            m.up.labels(process.name).set(float(process.ready and process.alive))
            m.memory.labels(process.name).set(memory_bytes(process.pid) if process.pid is not None else 0)
        m.memory.labels("daemon").set(memory_bytes(os.getpid()))

    def _measure_rate(self, now: float) -> None:
        """Observed images a second, averaged over about a minute."""
        treatment = self.treatment
        before, then = self._counted
        if now > then:
            share = 1 - math.exp(-(now - then) / min(RATE_S, now - self._since))
            treatment.rate += share * ((treatment.sequence - before) / (now - then) - treatment.rate)
        self._counted = (treatment.sequence, now)

    def live(self) -> bool:
        """Whether the main loop ticks."""
        return time.monotonic() - self._ticked < LIVE_S

    def ready(self) -> bool:
        """Whether predictions are answered, and commands."""
        return self.servers.ready and (self._doorkeeper is None or self._doorkeeper.is_open)

    # -- shutdown -----------------------------------------------------------------------------------------

    def shutdown(self, stop_server: bool = True) -> None:
        """Save, let the server drain, stop the others.

        Args:
            stop_server: False leaves it serving, for the next daemon to adopt.
        """
        if self._started:
            self.log.info("daemon_draining", stop_server=stop_server)
        if self._started:
            self.treatment.save()
            self.treatment.save_watch()
        if hasattr(self, "calibrations"):
            self.calibrations.close()
        for process in getattr(self, "processes", ()):
            process.keep = False
        if hasattr(self, "exchange") and not self.exchanging:
            self.exchange.close()
        if hasattr(self, "adapter"):
            self.adapter.process.stop(1.0)
            self.shadow.process.stop(1.0)
            if stop_server:
                self.servers.stop()
        if hasattr(self, "http"):
            self.http.close()
        if self._webhook is not None:
            self._webhook.close()
        if hasattr(self, "labels"):
            self.labels.close()
        if hasattr(self, "context"):
            self.context.destroy(linger=500)
        if hasattr(self, "_lock_file"):
            self._lock_file.close()
        if self._started:
            self.log.info("daemon_stopped")


def serve(config: Config, log: Logger, deploy: bool = False) -> int:
    """Run a daemon until a signal; the exit status of `tta serve`.

    Args:
        config: its settings.
        log: where to.
        deploy: put the state of another bundle aside.

    Raises:
        TTAError: it could not start.
    """
    daemon = Daemon(config, log, deploy)
    try:
        return _run(daemon, log)
    except TTAError:
        if daemon.signalled:  # it was not to start any more
            return 0
        raise


def _run(daemon: Daemon, log: Logger) -> int:
    _start(daemon)
    while True:
        try:
            daemon.main_loop()
        except Exception as error:  # a fault of ours must not become an outage: the server goes on alone
            log.exception("daemon_failed", error=str(error))
            daemon.shutdown(stop_server=False)
            return 1
        if daemon.signalled or not daemon.exchanging:
            daemon.exchanging = False
            daemon.shutdown()
            return 0
        daemon.shutdown(stop_server=False)
        daemon = _successor(daemon, log)


def _start(daemon: Daemon) -> None:
    try:
        daemon.startup()
    except BaseException:
        daemon.shutdown()
        raise


def _successor(former: Daemon, log: Logger) -> Daemon:
    """A daemon with the bundle whose servers are warm; else one as before, over the servers that serve still.

    Raises:
        TTAError: not even the former starts again.
    """
    exchange = former.exchange
    daemon = Daemon(former.given, log, former=former, bundle=exchange.copy)
    try:
        daemon.startup()
    except Exception as error:  # whatever it is, the former served a moment ago
        log.exception("deploy_failed", bundle=str(exchange.copy), error=str(error))
        daemon.shutdown(stop_server=False)
        left = "" if exchange.has_served_before else exchange.sha256
        exchange.end_standby()
        daemon = Daemon(former.given, log, former=former, bundle=former.config.bundle, discard=left)
        _start(daemon)
        daemon.treatment.record("deploy_failed", error=str(error))
    else:
        daemon.treatment.record("deployed", bundle=daemon.bundle.sha256, model=daemon.bundle.manifest.name)
    return daemon
