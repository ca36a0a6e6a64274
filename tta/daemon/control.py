"""The control socket's operations: labels in, answers and commands out."""

import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from tta import protocol
from tta.auth import Clients
from tta.bundle import Manifest
from tta.config import Config
from tta.daemon.asking import rank
from tta.daemon.cycle import State
from tta.daemon.exchange import Answer, Fail
from tta.daemon.hand import Hand
from tta.daemon.labellers import Disagreement, disagreeing
from tta.daemon.labels import LabelBuffer, Labelled
from tta.daemon.ledger import Ledger
from tta.daemon.metrics import Metrics
from tta.daemon.processes import Logger, Process
from tta.daemon.servers import Servers
from tta.daemon.store import Store
from tta.daemon.treatment import Treatment
from tta.errors import Code, DeniedError, InputError, PreconditionError, TTAError, from_wire
from tta.keys import Role
from tta.monitor.reference import confidence
from tta.versions import SOURCE, has_weights, version_folders

Reply = dict[str, Any]
Array = npt.NDArray[Any]
MAX_LABELS = 1024  # in one request
IMAGE_ID_BITS = 52  # of the number of a request's labelled images; times MAX_LABELS they fit SQLite's 63
MAX_ASKED = 100_000
RECENT = 1000  # predictions that `ask` chooses from, and labels by which clients are compared


def role_for(request: protocol.ControlRequest) -> Role | None:
    """The role that a request needs; None: any. What is not named here changes something: that is for `admin`."""
    match request:
        case protocol.Label() | protocol.Ask():
            return "label"
        case protocol.Status() | protocol.Versions() | protocol.Metadata() | protocol.Ready():
            return None
        case _:
            return "admin"


@dataclass(frozen=True)
class Control:
    """Answers control requests from the daemon's parts; knows no socket."""

    config: Config
    manifest: Manifest
    store: Store
    labels: LabelBuffer
    ledger: Ledger
    metrics: Metrics
    treatment: Treatment
    hand: Hand
    servers: Servers
    processes: tuple[Process, ...]
    ready: Callable[[], bool]
    deploy: Callable[[Path, bool, Answer, Fail], None]
    log: Logger
    clients: Clients | None = None  # None: nobody is asked for a key
    mode_reason: str = ""  # why the mode is not the configured one
    asked: dict[int, str] = field(default_factory=dict)  # predictions named by `ask`, oldest first, and to whom
    # Clients whose labels contradict the others'.
    disagreeing: dict[str, Disagreement] = field(default_factory=dict)

    def handle(self, frames: list[bytes], respond: Callable[..., None], key: str = "") -> None:
        """Answer one request, at once or when the server has swapped; errors become codes.

        Args:
            frames: of the request.
            respond: gets the reply's header and its tensors.
            key: that the sender has proved to hold.
        """
        request_id = protocol.request_id(frames)

        def answer(reply: Reply, *tensors: Array) -> None:
            respond({"v": protocol.PROTOCOL_VERSION, "id": request_id, "code": int(Code.OK), **reply}, *tensors)

        def fail(error: BaseException) -> None:
            respond(protocol.error_reply(request_id, error))

        try:
            request = protocol.decode_control(frames)
            role = role_for(request)
            client = self.clients.check(key, role) if self.clients is not None else ""
            if self.clients is not None and isinstance(request, protocol.Label):
                self.clients.spend(key, labels=max(1, len(request.labels), len(request.correct)))
            if role == "admin":
                self.log.info("command", what=type(request).__name__.lower(), client=client or None)
            if isinstance(request, protocol.Rollback | protocol.Reset):
                self._serve(request, answer, fail)
            elif isinstance(request, protocol.Deploy):
                path = Path(request.bundle)
                if not path.is_absolute():
                    raise InputError(f"bundle {request.bundle!r}: give its absolute path on the daemon's machine")
                self.deploy(path, request.force, answer, fail)
            elif isinstance(request, protocol.Ask):
                answer(*self._ask(request, client))
            else:
                answer(self._answer(request, frames, client))
        except TTAError as error:
            if isinstance(error, DeniedError) and self.clients is not None:
                self.metrics.commands_refused.labels("permission_denied").inc()
                self.log.warning("command_denied", client=self.clients.name_of(key), error=str(error))
            fail(error)
        except Exception as error:  # the client gets a code, the log the traceback
            self.log.exception("control_failed", error=str(error))
            fail(error)

    def is_early(self, frames: list[bytes], key: str) -> bool:
        """Whether somebody who may labels a prediction that the server has answered and not yet told us of."""
        try:
            request = protocol.decode_control(frames) if len(frames) == 1 else None
            if not isinstance(request, protocol.Label):
                return False
            if self.clients is not None:
                self.clients.check(key, role_for(request))
        except TTAError:
            return False
        return any(map(self.ledger.is_ahead, request.prediction_ids[:MAX_LABELS]))

    def _answer(self, request: protocol.ControlRequest, frames: list[bytes], client: str) -> Reply:
        match request:
            case protocol.Label():
                return {"outcomes": self._label(request, frames, client)}
            case protocol.Status():
                return self.status()
            case protocol.Versions():
                return {"versions": self._versions()}
            case protocol.Pause():
                self.hand.pause()
                return {"paused": True}
            case protocol.Resume():
                self.hand.resume()
                return {"paused": False}
            case protocol.Adapt():
                return {"labels": self.hand.adapt_now()}
            case protocol.Approve():
                return {"version": self.hand.approve()}
            case protocol.Accept():
                return {"regime": self.hand.accept()}
            case protocol.Erase():
                if bool(request.prediction_ids) == request.everything:
                    raise InputError("name prediction_ids, or everything")
                if any(not 0 < number < 1 << 63 for number in request.prediction_ids):
                    raise InputError("prediction ids are positive numbers of 63 bits")
                if len(request.prediction_ids) > MAX_LABELS:
                    raise InputError(f"{len(request.prediction_ids)} ids in one request: at most {MAX_LABELS}")
                return dict(self.hand.erase(request.prediction_ids, request.everything))
            case protocol.Metadata():
                return {
                    "name": self.manifest.name,
                    "classes": self.manifest.classes,
                    "max_message_bytes": self.config.server.max_message_bytes,
                }
            case protocol.Ready():
                return {"ready": self.ready()}
            case _:
                raise InputError(f"{type(request).__name__} is not answered here")

    # -- labels -------------------------------------------------------------------------------------------

    def _label(self, request: protocol.Label, frames: list[bytes], client: str) -> list[str]:
        n_classes = self.manifest.n_classes
        bad = [label for label in request.labels if not 0 <= label < n_classes]
        if bad:
            raise InputError(f"label {bad[0]} is not a class: the model has 0 to {n_classes - 1}")
        if request.labels and request.correct:
            raise InputError("send labels or correct, not both")
        if len(frames) == 2:
            return self._label_images(request, frames, client)
        values: list[Any] = list(request.labels or request.correct)
        if not values or len(values) != len(request.prediction_ids):
            raise InputError(
                f"{len(request.prediction_ids)} prediction_ids and {len(values)} labels: send one for each"
            )
        if len(values) > MAX_LABELS:
            raise InputError(f"{len(values)} labels in one request: at most {MAX_LABELS} are taken")
        rows, outcomes = [], []
        ledger = self.ledger
        # What another client has asked for does not change what this one's labels say.
        askers = {client, *self.labels.labellers().admins}
        for prediction_id, value in zip(request.prediction_ids, values, strict=True):
            entry = ledger.find(prediction_id)
            if entry is None:
                outcomes.append(ledger.why_missing(prediction_id))
                continue
            predicted = int(entry.logits.argmax())
            label = value if request.labels else predicted if value else None
            asked = self.asked.get(prediction_id) in askers
            sure = float(confidence(entry.logits[None])[0])
            rows.append(
                Labelled(
                    prediction_id,
                    entry.sequence,
                    entry.version,
                    label,
                    predicted,
                    entry.x,
                    asked,
                    sure,
                    bool(request.correct),
                    client,
                )
            )
            outcomes.append("joined" if entry.x is not None else "no_input")
        contested = self._keep(rows, client)
        pairs = zip(request.prediction_ids, outcomes, strict=True)
        return self._counted(["contested" if number in contested else outcome for number, outcome in pairs])

    def _label_images(self, request: protocol.Label, frames: list[bytes], client: str) -> list[str]:
        x = protocol.decode_images(frames, request.dtype, request.shape, self.manifest.image_shape)
        if len(x) > MAX_LABELS:
            raise InputError(f"{len(x)} images in one request: at most {MAX_LABELS} are taken")
        if len(request.labels) != len(x) or request.prediction_ids:
            raise InputError(
                f"{len(x)} images need {len(x)} labels and no prediction_ids, got {len(request.labels)}"
            )
        treatment = self.treatment
        # Never predicted, so no prediction id: a negative number of its own for each, whatever the clock says.
        base = -MAX_LABELS * (1 + secrets.randbits(IMAGE_ID_BITS))
        rows = [
            Labelled(base - i, treatment.sequence, SOURCE, label, -1, x[i], client=client)
            for i, label in enumerate(request.labels)
        ]
        self._keep(rows, client)
        return self._counted(["joined"] * len(rows))

    def _keep(self, rows: list[Labelled], client: str) -> set[int]:
        """Store labels, on disk before anybody is told; the predictions that clients label differently."""
        if not rows:
            return set()
        added = self.labels.add(rows)
        if added.contested:
            self.log.warning("labels_contested", client=client, n=len(added.contested))
        self.treatment.labelled(added.fresh)
        return added.contested

    def compare_clients(self) -> None:
        """Name the clients whose labels contradict the others', once each; called now and then."""
        if self.clients is None:
            return
        case = self.treatment.case
        found = disagreeing(self.labels.recent_by_client(case.since, case.serving, RECENT))
        for each in found:
            if each.client not in self.disagreeing:
                self.treatment.record("client_disagrees", **asdict(each))
        self.disagreeing.clear()
        self.disagreeing.update({each.client: each for each in found})
        self.metrics.show_disagreeing(self.disagreeing)

    def _counted(self, outcomes: list[str]) -> list[str]:
        for outcome in outcomes:
            self.metrics.labels.labels(outcome).inc()
        return outcomes

    def _ask(self, request: protocol.Ask, client: str) -> tuple[Any, ...]:
        """Unlabelled predictions most worth a label, spread over the predicted classes; and their images."""
        if request.n < 1:
            raise InputError(f"n = {request.n}: ask for at least one")
        n = min(request.n, protocol.MAX_ASKED_IMAGES) if request.images else request.n
        treatment = self.treatment
        since = treatment.case.onset if treatment.cycle.state is State.DRIFTED else 0
        labelled = self.labels.ids_since(since)
        entries = [
            e for e in self.ledger.since(since, RECENT) if e.x is not None and e.prediction_id not in labelled
        ]
        ranked = rank(np.stack([e.logits for e in entries]))[:n] if entries else []
        chosen: list[Reply] = [
            {
                "prediction_id": entries[q.row].prediction_id,
                "predicted": q.predicted,
                "uncertainty": q.uncertainty,
            }
            for q in ranked
        ]
        self.asked.update((reply["prediction_id"], client) for reply in chosen)
        while len(self.asked) > MAX_ASKED:
            del self.asked[next(iter(self.asked))]
        if not request.images:
            return ({"predictions": chosen},)
        shown = [x for q in ranked if (x := entries[q.row].x) is not None]
        x = np.stack(shown) if shown else np.empty((0, *self.manifest.image_shape), np.uint8)
        return {"predictions": chosen, "dtype": "uint8", "shape": list(x.shape)}, x

    # -- versions -----------------------------------------------------------------------------------------

    def _serve(
        self,
        request: protocol.Rollback | protocol.Reset,
        answer: Answer,
        fail: Fail,
    ) -> None:
        treatment = self.treatment
        if isinstance(request, protocol.Reset):
            version, reason = SOURCE, "reset"
        else:
            reason = "rollback"
            version = treatment.case.previous if request.version is None else request.version
            if version == treatment.case.serving:
                raise PreconditionError(f"version {version} is in service already: nothing to roll back to")

        def then(reply: Reply) -> None:
            if "error" in reply:
                fail(from_wire(Code.INTERNAL, f"the server refused version {version}: {reply['error']}"))
            else:
                answer({"version": version})

        self.hand.serve(version, reason, then)

    def _versions(self) -> list[Reply]:
        store, case = self.store, self.treatment.case
        serves = case.serving == SOURCE
        found: list[Reply] = [
            {"version": SOURCE, "block": "", "start": "", "serving": serves, "has_weights": True}
        ]
        for number, folder in version_folders(store.root).items():
            kept = has_weights(folder)
            try:
                manifest = msgspec.to_builtins(store.manifest(number))
            except (OSError, ValueError, msgspec.MsgspecError) as error:
                manifest = {"version": number, "block": "", "start": "", "sha256": {}, "bundle_sha256": ""}
                manifest["damaged"] = str(error)
            if not kept and not manifest.get("verdict"):  # dropped before it was judged: a note on a number
                continue
            del manifest["sha256"], manifest["bundle_sha256"]
            found.append({**manifest, "serving": number == case.serving, "has_weights": kept})
        return found

    # -- status -------------------------------------------------------------------------------------------

    def status(self) -> Reply:
        """Everything worth knowing at a glance."""
        treatment, case = self.treatment, self.treatment.case
        watch = treatment.watch
        in_case = case.cause != ""
        calibration, found = watch.monitor.calibration, treatment.diagnosis
        return {
            "name": self.manifest.name,
            "bundle_sha256": self.store.bundle_sha256,
            "state": treatment.cycle.state.value,
            "version": case.serving,
            "regime": case.regime,
            "regimes": [
                {
                    "regime": r.number,
                    "version": r.version,
                    "kind": r.kind,
                    "accuracy": round(r.accuracy, 4),
                    "keys": list(r.keys),
                }
                for r in treatment.library.regimes.values()
            ],
            "mode": self.config.mode,
            "mode_reason": self.mode_reason,
            "paused": case.paused,
            "shift": {
                "cause": case.cause,
                "onset": case.onset,
                "kind": case.kind,
                "actionable": case.actionable,
                "keys": list(case.keys),
                "diagnosis": asdict(found) if found is not None else None,
                "labels": self.labels.count(case.onset),
                "labels_given": self.labels.given(case.onset),
                "labels_wanted": 0 if case.actionable is False else case.wanted,
                "proposal": case.proposal,
            }
            if in_case
            else None,
            "drift": {
                n: round(float(s), 4)
                for n, s in zip(watch.layout.names, watch.monitor.charts.statistic, strict=True)
            },
            "charts_samples": watch.monitor.charts.n_samples,
            "class_statistic": round(watch.monitor.classes.statistic, 4),
            "conformal_statistic": round(watch.monitor.conformal.statistic, 4),
            "label_statistic": round(watch.label_statistic, 6),
            "accuracy": treatment.probation.accuracy(),
            "arl": watch.arl,
            "realised_arl": round(calibration.realised),
            "stickiness": {"repeat": calibration.stickiness.repeat, "class_run": calibration.stickiness.class_run},
            "images_per_s": round(treatment.rate, 3),
            "traffic": self.metrics.server.totals(),
            "false_alarms_per_day": round(treatment.rate * 86400 / watch.arl, 4),
            "predicted_accuracy": round(treatment.watch.predicted_loss().accuracy, 4),
            "samples": treatment.sequence,
            "labels_buffered": len(self.labels),
            "clients_disagree": [asdict(each) for each in self.disagreeing.values()],
            "labels_contested": self.labels.contests(),
            "adapter": treatment.adapter.progress,
            "processes": {
                p.name: {"pid": p.pid, "ready": p.ready, "restarts": p.restarts} for p in self.processes
            },
            "device": ", ".join(dict.fromkeys(self.servers.devices)),
            "events": list(treatment.events)[-20:],
        }
