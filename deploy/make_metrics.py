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
    rows = []
    manifest: Any = _Model
    metrics = Metrics(manifest)
    own = {id(c): c for c in metrics.registry._names_to_collectors.values()}.values()
    for collector in own:
        labels = ", ".join(f"`{name}`" for name in getattr(collector, "_labelnames", ()))
        for family in collector.collect():
            given = labels or ", ".join(
                f"`{name}`" for name in sorted({k for s in family.samples for k in s.labels} - {"le"})
            )
            name = family.name + ("_total" if family.type == "counter" else "")
            rows.append(f"| `{name}` | {family.type} | {given} | {family.documentation} |")
    return HEAD + "\n".join(sorted(rows)) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("metrics.md").write_text(document())
