"""Write metrics.md, the reference of all metrics: `python deploy/make_metrics.py`. A test holds it so."""

from pathlib import Path
from typing import Any

from tta.daemon.metrics import Metrics

HEAD = """# Metrics

What `/metrics` of the daemon exports, written by `make_metrics.py` from the code. Seconds, bytes, shares from 0
to 1; counters go on rising when a server is restarted, not when the daemon is.

| metric | type | labels | |
| --- | --- | --- | --- |
"""


class _Model:
    """All that the metrics want to know of a model."""

    name, source, blocks = "model", "timm:model", ()


def document() -> str:
    """The page."""
    manifest: Any = _Model
    metrics = Metrics(manifest)
    # Metrics that have no sample yet know their labels, those that the server counts have samples.
    known = {each._name: set(each._labelnames) for each in vars(metrics).values() if hasattr(each, "_labelnames")}
    rows = []
    for family in metrics.registry.collect():
        labels = known.get(family.name, {name for sample in family.samples for name in sample.labels} - {"le"})
        name = family.name + ("_total" if family.type == "counter" else "")
        shown = ", ".join(f"`{label}`" for label in sorted(labels))
        rows.append(f"| `{name}` | {family.type} | {shown} | {family.documentation} |")
    return HEAD + "\n".join(sorted(rows)) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("metrics.md").write_text(document())
