"""What can a client do who may label, and labels wrongly on purpose?

    TTA_DATA=... python -m bench.poisoning [--processes 2] [--images 3000]

The daemon's own decisions over a ResNet-20 (see `bench/stream/ours.py`), on clean images or under Gaussian noise of
severity 5. Two honest clients label a sixth of the images; Mallory beside them

    flips     gives 30 % of the labels, each of them another class (y + 1), as the issue has it
    one class labels every image of one class as another: most labels of that class are his
    flood     labels every image, all as one class

once known by his key, as where `security.clients` is set, and once as anybody, as where nobody is asked for a key.
Counted is how often the served version is right and how often the source would have been, from the onset to the end.
Writes `results/poisoning.{json,md,png}`.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import zmq

from bench import cifar
from bench.stamp import stamp
from bench.stream.data import N_REFERENCE, corrupted
from bench.stream.ours import BATCH, FIRST_ID, Book, StreamDaemon
from tta.auth import Clients
from tta.config import load_config
from tta.protocol import Label, encode

RESULTS = Path(__file__).parent / "results"
SETTINGS: dict[str, Any] = {"adapt.labels": 96, "adapt.budget_s": 1e9, "gate.probation_s": 1e-3}
HONEST, MALLORY = ("anna", "bert"), "mallory"
LABELLED_EVERY = 6  # images
N_BEFORE = 300  # clean images before it begins
COMPARED_EVERY = 100  # images
FLIPPED = 0.3  # of the labels
TARGET, ANOTHER = 3, 5  # cats, as dogs
ATTACKS = ("nobody", "flips", "one class", "flood")
TRAFFIC = ("clean", "gaussian_noise")
TOLERANCE = 2.0  # points that served accuracy may be below the source's by chance, of 3,000 images

Json = dict[str, Any]


class KeyedDaemon(StreamDaemon):
    """The daemon without its sockets, with a list of clients or none."""

    keys: dict[str, str]
    clients: Clients | None = None

    def _bind(self) -> Any:
        return None if self.clients is None else SimpleNamespace(clients=self.clients)

    def labels_of(self, client: str, ids: list[int], labels: list[int]) -> None:
        """Take a client's labels."""
        replies: list[Json] = []
        request = Label(id=1, prediction_ids=ids, labels=labels)
        self.control.handle(encode(request), replies.append, self.keys[client])
        assert replies[0]["code"] == 0, replies[0]


def given(attack: str, i: int, y: int, rng: np.random.Generator) -> list[tuple[str, int]]:
    """Who labels the i-th image, and how: (client, class), honest ones first."""
    labels: list[tuple[str, int]] = []
    if i % LABELLED_EVERY == 0:
        labels.append((HONEST[i // LABELLED_EVERY % 2], y))
    if attack == "flips" and labels and rng.random() < FLIPPED:
        labels = [(MALLORY, (y + 1) % 10)]
    elif (attack == "one class" and y == TARGET) or attack == "flood":
        labels.append((MALLORY, ANOTHER))
    return labels


def run(traffic: str, attack: str, keys: bool, n_images: int) -> Json:
    """One stream; what was right, what was promoted, who was named."""
    x, y, classes = cifar.images("test")
    bundle, _ = cifar.resnet20_bundle(x[:N_REFERENCE], y[:N_REFERENCE], classes)
    rng = np.random.default_rng(5)
    rows = rng.permutation(np.arange(N_REFERENCE, len(x)))[: N_BEFORE + n_images]
    shown = x[rows].copy()
    if traffic != "clean":
        shown[N_BEFORE:] = corrupted(traffic)[rows[N_BEFORE:]]
    with tempfile.TemporaryDirectory(prefix="tta-poisoning-") as folder:
        state = Path(folder) / "state"
        state.mkdir()
        config = load_config(
            None,
            {
                "bundle": str(bundle),
                "state": str(state),
                "daemon.http": "127.0.0.1:0",
                "device": "cpu",
                **SETTINGS,
            },
        )
        book = Book()
        daemon = KeyedDaemon(config, book)  # type: ignore[arg-type]
        people = (*HONEST, MALLORY)
        daemon.keys = {name: zmq.curve_keypair()[0].decode() if keys else "" for name in people}
        if keys:
            listed = Path(folder) / "clients.yaml"
            listed.write_text(
                json.dumps({name: {"key": daemon.keys[name], "roles": ["label"]} for name in people})
            )
            daemon.clients = Clients(listed)
        daemon.startup()
        found = _serve(daemon, shown, y[rows], lambda i, label: given(attack, i, label, rng))
        daemon.shutdown()
    events = [e for e in book.events if e["log"] == "transition"]
    verdicts = [e for e in events if "outcome" in e]
    promoted = [e for e in events if e["what"] == "swapped" and e["reason"] == "promotion"]
    return {
        **{"traffic": traffic, "attack": attack, "keys": keys, "images": n_images, **found},
        "accepted": sum(e["outcome"] == "accepted" for e in verdicts),
        "refused": [e["reason"] for e in verdicts if e["outcome"] != "accepted"],
        "promoted": len(promoted),
        "rolled_back": sum(e["what"] == "swapped" and e["reason"] == "rollback" for e in events),
        "named": sorted({e["client"] for e in events if e["what"] == "client_disagrees"}),
    }


def _serve(
    daemon: KeyedDaemon, shown: Any, y: Any, labels_for: Callable[[int, int], list[tuple[str, int]]]
) -> Json:
    source = daemon.shadow.session(None)  # type: ignore[attr-defined]
    right, right_source = [], []
    for begin in range(0, len(shown), BATCH):
        x, classes = shown[begin : begin + BATCH], y[begin : begin + BATCH]
        answer = daemon.see(FIRST_ID + begin, x)
        own = answer if answer.version == 0 else daemon.shadow.predictor.run_with(source, x)  # type: ignore[attr-defined]
        right += (answer.logits.argmax(1) == classes).tolist()
        right_source += (own.logits.argmax(1) == classes).tolist()
        daemon.desk.clear()
        for i, label in enumerate(classes.tolist()):
            if begin >= N_BEFORE:
                for client, told in labels_for(begin + i, label):
                    daemon.labels_of(client, [FIRST_ID + begin + i], [told])
        daemon.turn()
        if begin % COMPARED_EVERY == 0:  # what the daemon does every few seconds
            daemon.control.compare_clients()
    share, plain = (100 * float(np.mean(r[N_BEFORE:])) for r in (right, right_source))
    blocks = np.array_split(np.array([right, right_source], float)[:, N_BEFORE:], 10, axis=1)
    return {
        "served": round(share, 2),
        "source": round(plain, 2),
        "over_time": [[round(100 * float(v), 1) for v in block.mean(axis=1)] for block in blocks],
        "labels": {k or "anybody": n for k, (n, _) in daemon.labels.outcomes_by_client(0, 0).items()},
    }


def table(result: Json) -> list[str]:
    """As Markdown."""
    lines = [
        "# Poisoned labels",
        "",
        f"{result['date']}, commit {result['commit']}, `{result['command']}`; ResNet-20 on CIFAR-10, "
        f"{result['runs'][0]['images']:,} images after {N_BEFORE}.",
        "",
        "| traffic | Mallory | known by his key | served, % | source, % | promoted | rolled back | refused because | named |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in result["runs"]:
        why = ", ".join(f"{r['refused'].count(w)}× {w}" for w in sorted(set(r["refused"]))) or "–"
        lines.append(
            f"| {r['traffic'].replace('_', ' ')} | {r['attack']} | {'yes' if r['keys'] else 'no'} | {r['served']:.1f} | "
            f"{r['source']:.1f} | {r['promoted']} | {r['rolled_back']} | {why} | {', '.join(r['named']) or '–'} |"
        )
    worst = min(r["served"] - r["source"] for r in result["runs"] if r["keys"])
    return [
        *lines,
        "",
        f"Known by his key, the served version is at worst {worst:+.1f} points from the source's accuracy "
        f"({'within' if worst >= -TOLERANCE else 'not within'} {TOLERANCE:.0f}).",
    ]


def draw(result: Json, path: Path) -> None:
    """Accuracy over time: served and source, by attack."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(TRAFFIC), len(ATTACKS), figsize=(13, 6), sharey="row", squeeze=False)
    for row, traffic in zip(axes, TRAFFIC, strict=True):
        for ax, attack in zip(row, ATTACKS, strict=True):
            for r in (r for r in result["runs"] if (r["traffic"], r["attack"]) == (traffic, attack)):
                served, source = zip(*r["over_time"], strict=True)
                at = (np.arange(len(served)) + 0.5) * r["images"] / len(served)
                if r["keys"]:
                    ax.plot(at, source, color="0.6", label="source")
                ax.plot(
                    at, served, "-o" if r["keys"] else "--", ms=3, label="known by key" if r["keys"] else "no keys"
                )
            ax.set_title(f"{traffic.replace('_', ' ')}, {attack}", fontsize=9)
            ax.grid(alpha=0.3)
        row[0].set_ylabel("accuracy, %")
    for ax in axes[-1]:
        ax.set_xlabel("images")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    """Run everything and write the report."""
    parser = argparse.ArgumentParser(prog="python -m bench.poisoning", description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--images", type=int, default=3000, help="after the onset")
    arguments = parser.parse_args()
    cases = [(t, a, k) for t in TRAFFIC for a in ATTACKS for k in (True, False)]
    with ProcessPoolExecutor(arguments.processes) as pool:
        waiting = [pool.submit(run, *case, arguments.images) for case in cases]
        runs = []
        for case, each in zip(cases, waiting, strict=True):
            runs.append(each.result())
            print(
                f"{len(runs)} of {len(cases)}: {case} {runs[-1]['served']} {runs[-1]['source']}", file=sys.stderr
            )
    result = {**stamp(" ".join(("python -m bench.poisoning", *sys.argv[1:]))), "runs": runs}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "poisoning.json").write_text(json.dumps(result, indent=1) + "\n")
    text = "\n".join(table(result)) + "\n"
    (RESULTS / "poisoning.md").write_text(text)
    draw(result, RESULTS / "poisoning.png")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
