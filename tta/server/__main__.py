"""`python -m tta.server OPTIONS.json [TRUST]`: one server process.

From here to the model it takes five named calls:
`main` → `Server.main_loop` → `Frontend.tick` → (queue) → `Server.predict_batches` → `Predictor.run`.

Threads: the main thread is the frontend and owns the client sockets; the inference thread runs batches; the
builder thread prepares versions. The frontend goes before the inference thread, and the builder gives way to both.
"""

import contextlib
import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import structlog
import zmq

from tta import log
from tta.auth import Clients, Doorkeeper
from tta.bundle import load_bundle
from tta.errors import TTAError, UnavailableError
from tta.process import allow_files, die_with, give_way, go_first, is_alive, outlive_parent, take_turns
from tta.server.batcher import Batcher, Pending
from tta.server.frontend import Computed, Failed, Frontend
from tta.server.options import Observation, ServerOptions
from tta.server.outbox import send
from tta.server.predictor import Predictor, resolve_precision
from tta.server.statistics import Statistics
from tta.signatures import Trust

OBSERVATION_BYTES = 256 << 20  # memory of batches queued for the daemon
BUILDER_NICE = 10
ID_STRIDE = 10**14  # between two servers' ids: three years of microseconds; those of 16 servers fit a double
SWITCH_S = 0.0005  # Python's 5 ms would be how long the frontend waits for a builder that is busy in Python
N_PROBE = 2  # of a version's images to compute beside the clients': the shadow has compared all before the gate
CANARY_S = 2.0  # seconds without a request after which an image is computed all the same
SHIP_S = 1.0  # seconds between two shipments of counters
SUCCEEDED_S = 0.1  # seconds after which a client refused by a server that is replaced finds the next
GONE_S = 2.0  # seconds to end in, beyond those to finish what was admitted
LOOK_S = 0.002


class Server:
    """One server: startup, main_loop, shutdown."""

    def __init__(self, options: ServerOptions, logger: structlog.typing.FilteringBoundLogger) -> None:
        self.options = options
        self.log = logger
        self.should_exit = False
        # Ids are microseconds at start plus images since: unique over restarts and servers, exact in a double.
        self.epoch = max(time.time_ns() // 1000, options.time_us) + options.number * ID_STRIDE
        self.next_id = self.epoch
        self.building = False
        self.drained = False  # everything admitted has been computed, and nothing more will be
        self.inferred = time.monotonic()  # seconds, when a batch was last computed

    def startup(self) -> None:
        """Load the model, warm it, bind the sockets."""
        options = self.options
        allow_files()
        self.bundle = load_bundle(options.bundle, options.trust.bundle)
        self.predictor = Predictor(
            self.bundle,
            options.device,
            options.threads,
            options.max_batch_size,
            resolve_precision(options.precision, options.device),
            options.gpu_memory_bytes,
            options.trust.versions,
        )
        self.predictor.activate(self._first_version())
        go_first()  # here, and so in libzmq's thread: what is read and sent need not wait for the model's turn
        self.builder = ThreadPoolExecutor(1, "builder", self._become_builder)
        self.context = zmq.Context()
        self.context.set(zmq.MAX_SOCKETS, 4096)
        self.batcher = Batcher(options.max_batch_size, options.max_wait_s, options.queue_images, options.queue_s)
        self._learn_speed()
        self.statistics = Statistics(self.epoch, options.number)
        self.doorkeeper = self._doorkeeper()
        if options.standby:
            self._stand_by()
            self.inferred = time.monotonic()  # it was not asked to meanwhile
        self.frontend = Frontend(
            self.context,
            options,
            self.bundle.manifest,
            self.batcher,
            self.statistics,
            self.handle_admin,
            self.version,
            self.log,
            self.doorkeeper,
        )
        self.inference = threading.Thread(target=self.predict_batches, name="inference", daemon=True)
        self.inference.start()
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._on_signal)
        self.log.info(
            "server_ready",
            pid=os.getpid(),
            endpoint=options.endpoint,
            version=self.version(),
            device=self.predictor.device,
            precision=self.predictor.precision,
        )

    def _stand_by(self) -> None:
        """Wait, warm, until the daemon says whom to succeed; until then die with it."""
        socket = self.context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(self.options.standby)
        self.log.info("server_standing_by", pid=os.getpid())
        while True:
            if not socket.poll(round(1000 * CANARY_S)):
                continue
            identity, body = socket.recv_multipart()
            command = msgspec.msgpack.decode(body, type=dict[str, Any])
            if command["op"] == "hello":
                socket.send_multipart([identity, msgspec.msgpack.encode({"op": "hello", "pid": os.getpid()})])
            elif command["op"] == "succeed":
                break
        outlive_parent()  # from here on there may be no other server
        socket.close()
        Path(self.options.standby.removeprefix("ipc://")).unlink(missing_ok=True)
        if command["pid"]:
            self._succeed(command["pid"])

    def _succeed(self, pid: int) -> None:
        """Let the server before finish what it has admitted and go."""
        admin = self.context.socket(zmq.DEALER)
        admin.setsockopt(zmq.LINGER, 0)
        admin.connect(self.options.admin)
        admin.send(msgspec.msgpack.encode({"op": "hello"}))
        start = time.monotonic()
        if admin.poll(round(1000 * GONE_S)) and msgspec.msgpack.decode(admin.recv())["pid"] == pid:
            admin.send(msgspec.msgpack.encode({"op": "drain", "retry_after_s": SUCCEEDED_S}))
        end = start + self.options.drain_s + GONE_S
        while is_alive(pid):
            time.sleep(LOOK_S)
            if time.monotonic() > end:  # whatever it hangs in: the endpoint is needed
                end += GONE_S
                self.log.warning("server_killed", pid=pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        admin.close()
        self.log.info("server_succeeds", pid=pid, gap_s=round(time.monotonic() - start, 4))

    def _doorkeeper(self) -> Doorkeeper | None:
        key, clients = self.options.key, self.options.clients
        if key is None or clients is None:
            return None
        return Doorkeeper(self.context, Path(key), Clients(Path(clients)), self.log)

    def _learn_speed(self) -> None:
        """How long the smallest and the largest batch take: something to judge the first deadlines by."""
        for size in (1, self.options.max_batch_size):
            x = np.zeros((size, *self.bundle.manifest.image_shape), np.uint8)
            start = time.monotonic()
            self.predictor.run(x)
            self.batcher.observe(size, time.monotonic() - start)
        self.inferred = time.monotonic()

    def _first_version(self) -> Any:
        folder = self.options.version_folder
        try:
            return self.predictor.prepare(Path(folder) if folder else None)
        except TTAError as error:
            if folder is None:
                raise
            self.log.error("version_refused", folder=folder, error=str(error), serving=0)
            return self.predictor.prepare(None)

    def _on_signal(self, signum: int, frame: object) -> None:
        self.should_exit = True

    def version(self) -> int:
        """The version in service."""
        current = self.predictor.current
        assert current is not None
        return current.version

    def main_loop(self) -> None:
        """Serve until a signal or the daemon's `drain`."""
        while not self.should_exit and self.inference.is_alive():
            self.frontend.tick()

    def shutdown(self) -> None:
        """Refuse new requests, finish the admitted ones, close."""
        self.log.info("server_draining", queued_images=self.batcher.images)
        self.frontend.draining = True
        end = time.monotonic() + self.options.drain_s
        self.batcher.close()
        while time.monotonic() < end and self.inference.is_alive() and not self.drained:
            self.frontend.tick()
        left = [*self.batcher.clear(), *self.frontend.give_up_files()]
        self.frontend.finish(Failed(left, UnavailableError("the server went down", self.frontend.retry_after_s)))
        self.frontend.close()
        self.context.destroy(linger=1000)
        self.log.info("server_stopped")

    # -- inference thread ---------------------------------------------------------------------------

    def predict_batches(self) -> None:
        """Take batches until draining is done; one version a batch, one batch a request."""
        take_turns()
        observations = self.context.socket(zmq.PUSH)
        observations.setsockopt(zmq.SNDHWM, self._observation_limit())
        observations.setsockopt(zmq.LINGER, 0)
        observations.connect(self.options.observe)
        shape = (self.options.max_batch_size, *self.bundle.manifest.image_shape)
        self.buffer = np.zeros(shape, np.uint8)  # that batches of several requests are gathered in
        sample = random.Random(self.options.seed)
        shipped = sang = time.monotonic()
        while True:
            # From then on an empty queue stays empty, once no files are left.
            draining = self.frontend.draining and not self.frontend.decoding
            batch, dropped = self.batcher.take(timeout_s=0.1)
            if dropped:
                self.frontend.finish(Failed(dropped))
            if batch:
                start, start_cpu = time.monotonic(), time.thread_time()
                try:
                    computed = self._predict(batch, observations, sample)
                    self.frontend.finish(computed)
                    self.inferred = time.monotonic()
                    cost_s = None if self.predictor.on_gpu else time.thread_time() - start_cpu
                    self.batcher.observe(len(computed.logits), self.inferred - start, cost_s)
                except Exception as error:  # whatever the runtime raises, the clients get an answer
                    self.log.exception("batch_failed", error=str(error))
                    self.frontend.finish(Failed(batch, error))
            elif not dropped and draining:
                break
            elif time.monotonic() - max(self.inferred, sang) >= CANARY_S:
                sang = time.monotonic()
                self._sing()
            if time.monotonic() - shipped >= SHIP_S:
                shipped = time.monotonic()
                self._ship(observations, [msgspec.msgpack.encode(self.statistics.snapshot(self.batcher.images))])
        observations.close()
        self.drained = True
        self.frontend.wake()  # to see that

    def _sing(self) -> None:
        """An idle server computes an image now and then, to know that it could."""
        try:
            self.predictor.run(self.buffer[:1])
            self.inferred = time.monotonic()
        except Exception as error:  # told, and tried again; the daemon ends a server that cannot
            self.log.exception("canary_failed", error=str(error))

    def _stalled_s(self) -> float:
        """Seconds since a batch was last computed, less what the largest takes."""
        largest_s = self.batcher.compute_time.of(self.options.max_batch_size)
        return max(0.0, time.monotonic() - self.inferred - CANARY_S - largest_s)

    def _observation_limit(self) -> int:
        """Batches queued for the daemon at most, by count and by memory."""
        batch_bytes = self.options.max_batch_size * math.prod(self.bundle.manifest.image_shape)
        return max(2, min(self.options.observation_queue, OBSERVATION_BYTES // batch_bytes))

    def _predict(self, batch: list[Pending], observations: "zmq.Socket[bytes]", sample: random.Random) -> Computed:
        # What the daemon is to see goes first: ids and rows of an observation are in one piece.
        batch.sort(key=lambda request: not request.observed)
        start = time.monotonic()
        x = self._gather(batch)
        result = self.predictor.run(x)
        compute_s = time.monotonic() - start
        first_id, self.next_id = self.next_id, self.next_id + len(x)
        self.statistics.images += len(x)
        self.statistics.batches += 1
        # The daemon is told before the client: a label that follows the reply must find its prediction.
        observed = [r for r in batch if r.observed]
        n = sum(len(r.x) for r in observed)
        if n:
            inputs = sample.random() < self.options.input_sample_rate
            observation = Observation(
                epoch=self.epoch,
                first_id=first_id,
                version=result.version,
                n=n,
                inputs=inputs,
                keys=[(r.key, len(r.x)) for r in observed] if any(r.key for r in observed) else [],
            )
            tensors = [result.logits[:n], result.features[:n], *([x[:n]] if inputs else [])]
            self._ship(observations, [msgspec.msgpack.encode(observation), *(t.tobytes() for t in tensors)])
        return Computed(batch, result.version, first_id, result.logits, start, compute_s)

    def _gather(self, batch: list[Pending]) -> npt.NDArray[np.uint8]:
        """The images of a batch in one array: of one request as they lie, of several copied once."""
        if len(batch) == 1:
            return batch[0].x
        n = sum(len(r.x) for r in batch)
        return np.concatenate([r.x for r in batch], out=self.buffer[:n])

    def _ship(self, observations: "zmq.Socket[bytes]", frames: list[bytes]) -> None:
        try:
            send(observations, frames)
        except zmq.Again:  # the daemon is away or slow: predictions never wait for it
            self.statistics.observations_dropped += 1

    # -- admin ----------------------------------------------------------------------------------------

    def handle_admin(self, command: dict[str, Any], respond: Callable[[dict[str, Any]], None]) -> None:
        """Answer the daemon: hello and drain at once, swap when the version is in service."""
        op = command.get("op")
        if op == "hello":
            respond(
                {
                    "op": "hello",
                    "pid": os.getpid(),
                    "epoch": self.epoch,
                    "bundle_sha256": self.bundle.sha256,
                    "options": msgspec.to_builtins(self._options_now()),
                    "version": self.version(),
                    "stalled_s": self._stalled_s(),
                    "listening": self.doorkeeper is None or self.doorkeeper.is_open,
                    "device": self.predictor.device,
                }
            )
        elif op == "release":  # the version in service has proved itself
            self.predictor.release()
        elif op == "drain":
            self.frontend.retry_after_s = command.get("retry_after_s", self.frontend.retry_after_s)
            self.should_exit = True
            respond({"op": "drain"})
        elif op == "swap":
            if self.building:
                respond({"op": "swap", "id": command["id"], "error": "another version is being prepared"})
                return
            self.building = True
            self.builder.submit(self._swap, command)

    def _options_now(self) -> ServerOptions:
        """Those it was started with, and the daemon's key as it is by now."""
        if self.doorkeeper is None:
            return self.options
        return msgspec.structs.replace(self.options, public_key=self.doorkeeper.public_key)

    def _become_builder(self) -> None:
        """Builder thread: not to be in the way of the others."""
        take_turns()
        # With more threads than one a new session's pool would inherit it for good.
        if self.options.threads == 1 and sys.platform == "linux":  # there priorities are a thread's own
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), max(BUILDER_NICE, os.nice(0)))
            give_way()

    def _swap(self, command: dict[str, Any]) -> None:
        """Builder thread: prepare, verify, flip, report."""
        reply: dict[str, Any] = {"op": "swap", "id": command["id"], "version": command["version"]}
        start = time.monotonic()
        try:
            session = self.predictor.find(command["version"])
            if session is None:
                self.predictor.previous = None  # two versions live at a time, not three
                folder = command.get("folder")
                session = self.predictor.prepare(Path(folder) if folder else None, N_PROBE)
            reply["prepare_s"] = time.monotonic() - start
            flip = time.monotonic()
            self.predictor.activate(session)
            reply["flip_s"] = time.monotonic() - flip
        except TTAError as error:
            reply["error"] = str(error)
        except Exception as error:  # reported to the daemon, which keeps the present version
            self.log.exception("swap_failed", error=str(error))
            reply["error"] = f"internal: {type(error).__name__}"
        finally:
            self.building = False  # before the answer, which may bring the next command
            self.frontend.answer_admin(command["identity"], reply)
        self.log.info("swap", **{k: v for k, v in reply.items() if k != "op"})


def main() -> int:
    """Run one server; the exit status says how it ended."""
    options = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=ServerOptions)
    if len(sys.argv) > 2:  # not from the file, which lies where others may write
        options = msgspec.structs.replace(options, trust=Trust.told(sys.argv[2]))
    if options.standby:
        die_with(options.parent)
    sys.setswitchinterval(SWITCH_S)
    logger = log.setup(f"server{options.number or ''}")
    server = Server(options, logger)
    try:
        server.startup()
    except (TTAError, zmq.ZMQError) as error:
        logger.error("server_failed", error=str(error), endpoint=options.endpoint)
        # Whoever started us shows this to its user.
        Path(sys.argv[1]).with_suffix(".error").write_text(f"{error} (endpoint {options.endpoint})")
        return 2
    server.main_loop()
    server.shutdown()
    sys.stderr.flush()
    os._exit(0)  # the runtime takes 0.2 s to clear up, in which whoever follows waits for the endpoint


if __name__ == "__main__":
    sys.exit(main())
