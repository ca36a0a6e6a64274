"""The state machine of an adaptation: one table of (state, event) → (state, actions). No I/O.

    stable      watching; regime r is served by version v
    drifted     a shift was found; labels are awaited, the adapter starts
    adapting    the adapter works on a candidate, or the gate on its verdict
    probation   a version was swapped in and is compared with the one before

An event that the table does not name in a state changes nothing.
"""

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """Where the cycle is."""

    STABLE = "stable"
    DRIFTED = "drifted"
    ADAPTING = "adapting"
    PROBATION = "probation"


class Event(StrEnum):
    """What can happen."""

    ALARM = "alarm"  # charts or labelled errors over their bound
    ACTIONABLE = "actionable"  # the shift is large enough and is thought to cost accuracy
    NOTICE = "notice"  # it is not: worth knowing, no reason to act
    KNOWN = "known"  # a regime of the library is recognised, home among them
    QUIET = "quiet"  # the present regime is recognised again
    MOVED_ON = "moved_on"  # the traffic has left the present shift for one that nobody knows
    HARMLESS = "harmless"  # no accuracy was lost, as labels or the model's confidence say
    RELIEVED = "relieved"  # a version made without labels may serve until labels decide
    SETTLED = "settled"  # such a version has served for long and no labels come
    ENOUGH_LABELS = "enough_labels"
    ACCEPTED = "accepted"
    PROPOSED = "proposed"  # accepted, but the operator must approve
    NOT_ACCEPTED = "not_accepted"  # rejected, undecided, or the adapter failed
    CONFIRMED = "confirmed"  # live labels or time
    DISAGREED = "disagreed"  # live labels prefer the previous version
    SWAP_FAILED = "swap_failed"  # the server refused the version
    OPERATOR = "operator"  # rollback or reset by hand


class Action(StrEnum):
    """What the daemon is to do, in this order."""

    START_ADAPTER = "start_adapter"  # its imports hide behind waiting for labels
    ADAPT = "adapt"
    CANCEL = "cancel"
    SWAP = "swap"
    RELIEVE = "relieve"  # swap without leaving the case
    RECALL = "recall"
    ROLL_BACK = "roll_back"
    REMEMBER = "remember"
    ACCEPT_REGIME = "accept_regime"
    WATCH = "watch"  # charts anew against the regime now served
    AWAIT_LABELS = "await_labels"


S, E, A = State, Event, Action

TABLE: dict[tuple[State, Event], tuple[State, tuple[Action, ...]]] = {
    (S.STABLE, E.ALARM): (S.DRIFTED, ()),
    (S.STABLE, E.KNOWN): (S.PROBATION, (A.RECALL,)),
    (S.STABLE, E.OPERATOR): (S.STABLE, (A.WATCH,)),
    (S.DRIFTED, E.ACTIONABLE): (S.DRIFTED, (A.START_ADAPTER,)),
    (S.DRIFTED, E.NOTICE): (S.DRIFTED, ()),
    (S.DRIFTED, E.KNOWN): (S.PROBATION, (A.RECALL,)),
    (S.DRIFTED, E.QUIET): (S.STABLE, (A.WATCH,)),
    (S.DRIFTED, E.HARMLESS): (S.STABLE, (A.ACCEPT_REGIME, A.WATCH)),
    (S.DRIFTED, E.MOVED_ON): (S.DRIFTED, ()),
    (S.ADAPTING, E.MOVED_ON): (S.DRIFTED, (A.CANCEL,)),
    (S.DRIFTED, E.RELIEVED): (S.DRIFTED, (A.RELIEVE,)),
    (S.DRIFTED, E.DISAGREED): (S.DRIFTED, (A.AWAIT_LABELS, A.ROLL_BACK)),  # labels speak against relief
    (S.DRIFTED, E.SETTLED): (S.STABLE, (A.ACCEPT_REGIME, A.WATCH)),
    (S.DRIFTED, E.CONFIRMED): (S.STABLE, (A.ACCEPT_REGIME, A.WATCH)),  # feedback speaks for relief
    (S.DRIFTED, E.ENOUGH_LABELS): (S.ADAPTING, (A.ADAPT,)),
    (S.DRIFTED, E.ACCEPTED): (S.PROBATION, (A.SWAP,)),  # a proposal the operator approves
    (S.DRIFTED, E.OPERATOR): (S.STABLE, (A.WATCH,)),
    (S.DRIFTED, E.SWAP_FAILED): (S.DRIFTED, (A.AWAIT_LABELS,)),  # not even the source could be served
    (S.ADAPTING, E.KNOWN): (S.PROBATION, (A.CANCEL, A.RECALL)),
    (S.ADAPTING, E.QUIET): (S.STABLE, (A.CANCEL, A.WATCH)),
    (S.ADAPTING, E.ACCEPTED): (S.PROBATION, (A.SWAP,)),
    (S.ADAPTING, E.PROPOSED): (S.DRIFTED, ()),
    (S.ADAPTING, E.NOT_ACCEPTED): (S.DRIFTED, (A.AWAIT_LABELS,)),
    (S.ADAPTING, E.OPERATOR): (S.STABLE, (A.CANCEL, A.WATCH)),
    (S.PROBATION, E.KNOWN): (S.PROBATION, (A.RECALL,)),
    (S.PROBATION, E.CONFIRMED): (S.STABLE, (A.REMEMBER, A.WATCH)),
    (S.PROBATION, E.DISAGREED): (S.DRIFTED, (A.AWAIT_LABELS, A.ROLL_BACK)),
    (S.PROBATION, E.SWAP_FAILED): (S.DRIFTED, (A.AWAIT_LABELS,)),
    (S.PROBATION, E.OPERATOR): (S.STABLE, (A.WATCH,)),
}


@dataclass
class Cycle:
    """The present state."""

    state: State = State.STABLE

    def step(self, event: Event) -> tuple[Action, ...] | None:
        """Take an event.

        Returns:
            The actions to carry out, in order; None if the event means nothing in this state.
        """
        found = TABLE.get((self.state, event))
        if found is None:
            return None
        self.state = found[0]
        return found[1]
