"""Every metric in one registry; the server's totals go on rising when a server is restarted.

Prefix `tta_`, base units, closed label sets.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

import tta
from tta.bundle import Manifest
from tta.daemon.cycle import State
from tta.daemon.gate import Verdict
from tta.server.options import BATCH_BUCKETS, DURATION_BUCKETS_S, Counters

WORKERS = ("shadow", "adapter")
KINDS = ("input", "feature", "prior", "output", "unknown")  # of shifts
PHASE_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)

_HISTOGRAMS = {
    "request_duration_seconds": ("Seconds from a request's arrival to its reply", DURATION_BUCKETS_S),
    "queue_duration_seconds": ("Seconds a request waited in the queue", DURATION_BUCKETS_S),
    "compute_duration_seconds": ("Seconds a batch took to compute", DURATION_BUCKETS_S),
    "batch_size": ("Images computed together", BATCH_BUCKETS),
}


_NOTHING = Counters(
    epoch=0,
    requests={},
    rejected={},
    undeliverable=0,
    repeated=0,
    images=0,
    batches=0,
    observations_dropped=0,
    queue_images=0,
    histograms={name: ([0] * (len(bounds) + 1), 0.0) for name, (_, bounds) in _HISTOGRAMS.items()},
)


class ServerTotals(Collector):
    """Sums the counters of all server processes this daemon has seen."""

    def __init__(self) -> None:
        self._seen: dict[int, dict[int, Counters]] = {}  # by number of the server, then by epoch

    def update(self, counters: Counters) -> None:
        """Take a server's newest totals."""
        by_epoch = self._seen.setdefault(counters.number, {})
        by_epoch[counters.epoch] = counters
        if len(by_epoch) > 2:  # fold the older ones into one
            oldest, second = sorted(by_epoch)[:2]
            by_epoch[second] = _added(by_epoch.pop(oldest), by_epoch[second], second)

    def totals(self) -> dict[str, Any]:
        """What `status` tells of the traffic: totals since ever, whose differences are rates and quantiles.

        Returns:
            `images`, `queue_images`, `requests` and `rejected` by code, `bounds_s` of the buckets of requests'
            durations, and `durations`, how many fell into each and, last, beyond all.
        """
        total = self._total()
        return {
            "images": total.images,
            "queue_images": self._queued(),
            "requests": total.requests,
            "rejected": total.rejected,
            "bounds_s": list(DURATION_BUCKETS_S),
            "durations": total.histograms["request_duration_seconds"][0],
        }

    def _total(self) -> Counters:
        """Of all servers, since ever; but for what is queued now."""
        every = (c for by_epoch in self._seen.values() for c in by_epoch.values())
        return reduce(lambda a, b: _added(a, b, b.epoch), every, _NOTHING)

    def _queued(self) -> int:
        return sum(by_epoch[max(by_epoch)].queue_images for by_epoch in self._seen.values())

    def collect(self) -> Iterator[Any]:
        """Metric families, for prometheus_client."""
        total = self._total()
        for name, text, codes, usual in (
            ("tta_requests", "Requests answered, by code", total.requests, {"ok"}),
            (
                *("tta_rejected", "Requests refused on arrival, by code", total.rejected),
                {"resource_exhausted", "deadline_exceeded"},
            ),
        ):
            family = CounterMetricFamily(name, text, labels=["code"])
            for code in sorted(usual | {*codes}):
                family.add_metric([code], codes.get(code, 0))
            yield family
        for name, text, value in (
            ("tta_images", "Images predicted", total.images),
            ("tta_batches", "Batches computed", total.batches),
            ("tta_undeliverable_replies", "Replies a client did not take", total.undeliverable),
            ("tta_repeated_requests", "Requests sent again and not computed again", total.repeated),
            ("tta_observations_dropped", "Batches the daemon did not see", total.observations_dropped),
        ):
            yield CounterMetricFamily(name, text, value=value)
        yield GaugeMetricFamily("tta_queue_images", "Images queued now", value=self._queued())
        for name, (text, bounds) in _HISTOGRAMS.items():
            counts, seconds = total.histograms[name]
            ends = zip([*map(str, bounds), "+Inf"], accumulate(counts), strict=True)
            yield HistogramMetricFamily(f"tta_{name}", text, buckets=list(ends), sum_value=seconds)


def _added(a: Counters, b: Counters, epoch: int) -> Counters:
    def merged(x: dict[str, int], y: dict[str, int]) -> dict[str, int]:
        return {k: x.get(k, 0) + y.get(k, 0) for k in {*x, *y}}

    return Counters(
        number=b.number,
        epoch=epoch,
        requests=merged(a.requests, b.requests),
        rejected=merged(a.rejected, b.rejected),
        undeliverable=a.undeliverable + b.undeliverable,
        repeated=a.repeated + b.repeated,
        images=a.images + b.images,
        batches=a.batches + b.batches,
        observations_dropped=a.observations_dropped + b.observations_dropped,
        queue_images=b.queue_images,
        histograms={
            k: (
                [m + n for m, n in zip(a.histograms[k][0], b.histograms[k][0], strict=True)],
                a.histograms[k][1] + b.histograms[k][1],
            )
            for k in b.histograms
        },
    )


class Metrics:
    """The daemon's metrics; attributes are named as the metrics without the prefix."""

    def __init__(
        self, manifest: Manifest, processes: Sequence[str] = ("server", *WORKERS), bundle_sha256: str = ""
    ) -> None:
        self.registry = CollectorRegistry()
        self.server = ServerTotals()
        self.registry.register(self.server)
        self.commands_refused = self._counter(
            "commands_refused", "Connections and requests turned away at the control socket, by code", "code"
        )
        self.drift_statistic = self._gauge(
            "drift_statistic", "Chart over its threshold; above 1 is an alarm", "block"
        )
        self.drift_detected = self._gauge("drift_detected", "1 while a shift is being dealt with")
        self.shift = self._gauge("shift", "1 for the kind of the present shift; unknown until diagnosed", "kind")
        self.shift_start = self._gauge(
            "shift_start_timestamp_seconds", "Unix time at which the present shift was found; 0 without one"
        )
        self.label_statistic = self._gauge("label_statistic", "Error test over its threshold; above 1 is an alarm")
        self.class_statistic = self._gauge(
            "class_statistic", "Histogram of predicted classes over its threshold; above 1 is another class mix"
        )
        self.conformal_statistic = self._gauge(
            "conformal_statistic", "The slow, guaranteed detector over its threshold; above 1 is an alarm"
        )
        self.arl = self._gauge("arl_samples", "Samples between two false alarms, as wanted")
        self.realised_arl = self._gauge(
            "realised_arl_samples", "The same, as estimated on held-out reference data"
        )
        self.false_alarms = self._gauge("expected_false_alarms_per_day", "At the present rate of images")
        self.stickiness = self._gauge("stickiness", "Chance of a repeated sample that thresholds are for")
        self.predicted_accuracy = self._gauge(
            "predicted_accuracy",
            "Of the source model on the newest samples, by its confidence, 0 to 1; NaN without any",
        )
        self.alarms = self._counter("alarms", "Alarms, by what raised them", "cause")
        self.notices = self._counter("notices", "Shifts that are no reason to act, by kind", "kind")
        self.regime = self._gauge("regime", "Regime the traffic is in; 0 is home")
        self.state = self._gauge("state", "1 for the state the cycle is in", "state")
        self.transitions = self._counter("transitions", "State changes", "event")
        self.labels = self._counter("labels", "Labels received, by outcome", "outcome")
        self.client_disagrees = self._gauge(
            "client_disagrees", "1 for a client whose labels contradict the others'", "client"
        )
        self._disagreed: set[str] = set()  # at any time
        self.labels_buffered = self._gauge("labels_buffered", "Labels on disk")
        self.labels_wanted = self._gauge("labels_wanted", "Labels still wanted before the next adaptation")
        self.accuracy = self._gauge("labelled_accuracy", "Accuracy on the last labels, 0 to 1", "model")
        self.adaptations = self._counter("adaptations", "Candidates, by block and outcome", "block", "outcome")
        self.gate_accuracy = self._gauge(
            "gate_accuracy",
            "At the newest verdict, on gate labels or clean anchor images, 0 to 1",
            "model",
            "images",
        )
        self.gate_p_value = self._gauge("gate_p_value", "Of the newest verdict; at most alpha to be accepted")
        self.gate_labels = self._gauge("gate_labels", "Labels of the newest verdict")
        self.gate_labels_needed = self._gauge(
            "gate_labels_needed", "More gate labels that would probably decide it; 0 if it is decided"
        )
        self.adaptation_progress = self._gauge(
            "adaptation_progress", "Share of the adaptation under way that is done, 0 to 1; 0 without one"
        )
        self.phase_s = Histogram(
            "tta_adaptation_duration_seconds",
            "Seconds a phase of an adaptation took",
            ["phase"],
            buckets=PHASE_BUCKETS_S,
            registry=self.registry,
        )
        self.swaps = self._counter("swaps", "Swaps, by why and how they ended", "reason", "result")
        self.swap_s = Histogram(
            "tta_swap_duration_seconds",
            "Seconds a swap took, by phase",
            ["phase"],
            buckets=(1e-6, 1e-5, 1e-4, *PHASE_BUCKETS_S),
            registry=self.registry,
        )
        self.version = self._gauge("weight_version", "Version in service; 0 is the source")
        self.up = self._gauge("process_up", "1 if the process is ready", "process")
        self.restarts = self._counter("process_restarts", "Restarts of a process that died", "process")
        self.memory = self._gauge(
            "process_memory_bytes", "Memory of a process; from a swap on a server holds two versions", "process"
        )
        self.ledger_bytes = self._gauge("ledger_bytes", "Memory of recent predictions")
        self.shadow_dropped = self._counter("shadow_images_dropped", "Images the shadow had no time for")
        self.features_refused = self._counter("features_refused", "Samples with features that are not finite")
        self.webhook_events = self._counter("webhook_events", "Events for the webhook, by result", "result")
        self.samples_thinned = self._counter("samples_thinned", "Samples of chatty keys the charts left out")
        info = Gauge("tta_model_info", "Always 1", ["name", "source", "bundle", "tta"], registry=self.registry)
        info.labels(manifest.name, manifest.source, bundle_sha256[:12], tta.__version__).set(1)
        # Closed label sets: every child exists from the start, so that rates begin at zero.
        for block in manifest.blocks:
            self.drift_statistic.labels(block.name).set(0)
        for state in State:
            self.state.labels(state.value).set(0)
        for cause in ("charts", "labels", "operator"):
            self.alarms.labels(cause)
        for kind in KINDS:
            self.shift.labels(kind).set(0)
            self.notices.labels(kind)
        for result in ("delivered", "failed", "dropped"):
            self.webhook_events.labels(result)
        for reason in ("promotion", "relief", "recall", "rollback", "reset"):
            self.swaps.labels(reason, "ok")
        for outcome in ("joined", "no_input", "expired", "unknown", "contested"):
            self.labels.labels(outcome)
        for process in processes:
            self.up.labels(process).set(0)
            self.memory.labels(process).set(0)
            self.restarts.labels(process)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"tta_{name}", text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"tta_{name}", text, labels, registry=self.registry)

    def show_state(self, state: State) -> None:
        """Set the state gauges."""
        for each in State:
            self.state.labels(each.value).set(float(each is state))
        self.drift_detected.set(float(state in (State.DRIFTED, State.ADAPTING)))

    def show_shift(self, in_case: bool, kind: str, found_s: float) -> None:
        """Set whether there is a shift, of which kind ("": not diagnosed yet), and its Unix time."""
        for each in KINDS:
            self.shift.labels(each).set(float(in_case and each == (kind if kind in KINDS else "unknown")))
        self.shift_start.set(found_s if in_case else 0)

    def show_verdict(self, verdict: Verdict) -> None:
        """Set the gate's gauges."""
        on_labels = {
            "candidate": verdict.accuracy_candidate,
            "serving": verdict.accuracy_serving,
            "source": verdict.accuracy_source,
        }
        for images, shares in (("gate", on_labels), ("anchor", verdict.anchor)):
            for model, share in shares.items():
                self.gate_accuracy.labels(model, images).set(share)
        self.gate_p_value.set(verdict.p_val)
        self.gate_labels.set(verdict.n_labels)
        self.gate_labels_needed.set(verdict.labels_needed)

    def show_disagreeing(self, clients: Iterable[str]) -> None:
        """Set whose labels contradict the others'; whose no longer do goes to 0."""
        disagreeing = set(clients)
        self._disagreed |= disagreeing
        for client in self._disagreed:
            self.client_disagrees.labels(client).set(float(client in disagreeing))

    def show_drift(self, names: Sequence[str], statistic: Any) -> None:
        """Set each block's drift statistic."""
        for name, value in zip(names, statistic, strict=True):
            self.drift_statistic.labels(name).set(float(value))
