"""What is known of the present shift and its treatment; the part of the daemon's mind that survives a restart."""

from dataclasses import dataclass, fields
from typing import Any

from tta.daemon.library import HOME
from tta.versions import SOURCE

NEW = -1  # number of a regime that has none yet


@dataclass
class Case:
    """Everything about the present regime and shift that must survive a restart.

    Attributes:
        serving: version in service.
        previous: version before it, for rollback.
        regime: number of the regime the traffic is taken to be in.
        previous_regime: the one before.
        onset: sequence number at which the present shift began.
        cause: what raised the alarm: "charts", "labels", "operator", or "" without a shift.
        wanted: labels since the onset before the next adaptation.
        forced: the operator wants an adaptation whatever the errors say.
        kind: of the present shift, once diagnosed.
        proposal: accepted version that waits for approval; 0 for none.
        accuracy: of the newest version on the gate's labels.
        gate_labels: how many those were.
        since: sequence number at which the serving version came into service.
        paused: nothing may be changed.
        swap_to: version the server has been asked to serve and has not confirmed; None if there is none.
        swap_regime: regime that version is for.
        swap_reason: "promotion", "relief", "recall" or "rollback".
        target: number of the recalled regime that is on probation; -1 for a new one.
        actionable: whether the present shift is a reason to act; None while that is not known.
        found_s: Unix time at which the present shift was found.
        keys: sources the present shift concerns; empty for all.
        accepted: the operator has taken the present shift for normal.
        proven: version that served before one made without labels took its place; None if none has.
        relief: images the last version made without labels was made from.
        feedback: answers called right or wrong that it was made from.
        attributed: place in the stream before which all traffic has been told to be of some regime.
        looks: how often the present shift's labels have been put to a test; each look spends half of the
            alpha that is left, so that all together spend no more than `gate.alpha`.
    """

    serving: int = SOURCE
    previous: int = SOURCE
    regime: int = HOME
    previous_regime: int = HOME
    onset: int = 0
    cause: str = ""
    wanted: int = 0
    forced: bool = False
    kind: str = ""
    proposal: int = 0
    accuracy: float = 0.0
    gate_labels: int = 0
    since: int = 0
    paused: bool = False
    swap_to: int | None = None
    swap_regime: int = HOME
    swap_reason: str = ""
    target: int = NEW
    accepted: bool = False
    attributed: int = 0
    looks: int = 0
    proven: int | None = None
    relief: int = 0
    feedback: int = 0
    actionable: bool | None = None
    found_s: float = 0.0
    keys: tuple[str, ...] = ()

    @classmethod
    def load(cls, saved: dict[str, Any]) -> "Case":
        """From `state.json`; unknown fields are left out."""
        names = {f.name for f in fields(cls)}
        known = {k: v for k, v in saved.items() if k in names}
        for name in ("proven", "swap_to"):  # as earlier releases wrote it
            known[name] = None if known.get(name) == -1 else known.get(name)
        return cls(**{**known, "keys": tuple(known.get("keys", ()))})
