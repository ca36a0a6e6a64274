"""Gate and cycle: what is decided, from numbers alone."""

import numpy as np
import pytest

from tta.daemon.asking import rank
from tta.daemon.cycle import TABLE, Action, Cycle, Event, State
from tta.daemon.gate import ClassGuard, Verdict, does_as_well, judge


def correct(n_right: int, n: int) -> list[bool]:
    """Outcomes on n labels."""
    return [True] * n_right + [False] * (n - n_right)


def test_a_clear_gain_is_accepted() -> None:
    """Twenty points on 100 labels pass, with every number in the verdict."""
    verdict = judge(correct(80, 100), correct(60, 100), correct(60, 100), None, 0.05)

    assert verdict.outcome == "accepted"
    assert verdict.p_val == pytest.approx(2**-20)
    assert verdict.fields()["accuracy_candidate"] == 0.8


def test_a_loss_is_rejected() -> None:
    """A candidate worse than the serving version is rejected, never undecided."""
    assert judge(correct(50, 100), correct(60, 100), correct(60, 100), None, 0.05).outcome == "rejected"


def test_four_labels_never_decide() -> None:
    """Winning every one of four labels is undecided, and more labels are asked for."""
    verdict = judge([True] * 4, [False] * 4, [False] * 4, None, 0.05)

    assert verdict.outcome == "undecided"
    assert verdict.labels_needed > 0


def test_better_than_a_bad_version_is_not_enough() -> None:
    """A candidate below the source is rejected even if it beats the serving version."""
    verdict = judge(correct(60, 100), correct(30, 100), correct(70, 100), None, 0.05)

    assert (verdict.outcome, verdict.reason) == ("rejected", "below the source model")


def test_labels_must_beat_what_needs_none() -> None:
    """A candidate below the one made without labels is rejected, but not for what may be chance."""
    verdict = judge(correct(70, 100), correct(40, 100), correct(40, 100), correct(75, 100), 0.05)
    by_chance = [*correct(70, 90), *[False] * 6, *[True] * 4], [*correct(70, 90), *[True] * 6, *[False] * 4]
    close = judge(by_chance[0], correct(40, 100), correct(40, 100), by_chance[1], 0.05)

    assert verdict.reason == "below the candidate made without labels"
    assert close.outcome == "accepted"


def on_two_classes(
    candidate: tuple[int, int], serving: tuple[int, int], called: int, n: int, max_drop: float = 0.2
) -> Verdict:
    """Sixty labels of class 0 and `n` of class 1, of each so many right; what `serving` gets wrong it calls so."""
    classes = [0] * 60 + [1] * n
    right = [[*correct(first, 60), *correct(second, n)] for first, second in (candidate, serving)]
    own, now = (
        [true if r else wrong for true, r in zip(classes, each, strict=True)]
        for each, wrong in zip(right, (2, called), strict=True)
    )
    return judge(right[0], right[1], right[1], None, 0.05, ClassGuard(classes, own, now, max_drop))


def test_a_class_that_falls_is_not_sold_for_the_others() -> None:
    """A candidate that gains overall and loses six of ten images of one class is rejected, and says which."""
    verdict = on_two_classes((50, 4), (20, 10), called=2, n=10)

    assert (verdict.outcome, verdict.worst_class) == ("rejected", 1)
    assert verdict.worst_class_drop == pytest.approx(0.6)
    assert verdict.reason == "class 1 falls by 60 points, false calls counted"
    assert on_two_classes((50, 4), (20, 10), called=2, n=10, max_drop=0.6).outcome == "accepted"


def test_a_network_that_calls_everything_one_class_can_be_cured() -> None:
    """Where the serving version called two thirds of all others class 1, that class may fall by as much."""
    verdict = on_two_classes((50, 4), (20, 10), called=1, n=10)

    assert verdict.outcome == "accepted"
    assert verdict.worst_class is None
    assert (verdict.recall_class, verdict.recall_drop) == (1, pytest.approx(0.6))


def test_a_class_may_fall_by_chance() -> None:
    """Two losses among three images of a class are no evidence: the candidate passes."""
    verdict = on_two_classes((50, 1), (20, 3), called=2, n=3)

    assert (verdict.outcome, verdict.worst_class) == ("accepted", None)


def test_without_labels_nothing_is_decided() -> None:
    """No gate label gives no verdict but a number of labels to get."""
    assert judge([], [], [], None, 0.05).outcome == "undecided"


def test_a_cure_is_recognised_although_few_labels_flattered_it() -> None:
    """A cure right on 80 % that 16 labels saw at 94 % is recognised by 32 more; one right on half is not."""
    assert does_as_well(correct(25, 32), 0.94)
    assert not does_as_well(correct(16, 32), 0.94)
    assert not does_as_well(correct(4, 8), 0.94)
    assert not does_as_well(correct(9, 16), 0.94)
    assert not does_as_well(correct(60, 100), 0.80)
    assert does_as_well(correct(66, 100), 0.80)


def test_the_table_is_the_design() -> None:
    """But for relief, every swap ends in probation; only the gate, recognition or the operator leads there."""
    for (_, event), (after, actions) in TABLE.items():
        if Action.SWAP in actions or Action.RECALL in actions:
            assert after is State.PROBATION
            assert event in (Event.ACCEPTED, Event.KNOWN)
        if after is State.PROBATION:
            assert Action.SWAP in actions or Action.RECALL in actions


def test_home_is_recalled_from_everywhere() -> None:
    """A recognised regime is recalled from every state, and an adaptation under way is cancelled first."""
    for state in State:
        actions = Cycle(state).step(Event.KNOWN)
        assert actions is not None
        assert actions[-1] is Action.RECALL
        assert (Action.CANCEL in actions) == (state is State.ADAPTING)


def test_an_event_out_of_place_changes_nothing() -> None:
    """A verdict that comes after the adaptation was cancelled is ignored."""
    cycle = Cycle(State.STABLE)

    assert cycle.step(Event.ACCEPTED) is None
    assert cycle.state is State.STABLE


def test_every_state_and_event_is_reachable() -> None:
    """The table names every state and every event."""
    assert {s for s, _ in TABLE} == set(State)
    assert {e for _, e in TABLE} == set(Event)


def test_labels_are_asked_for_across_classes_the_sure_as_often_as_the_unsure() -> None:
    """Any first n asked for spread evenly over the predicted classes, and are as uncertain as the rest."""
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(3000, 3)) * rng.uniform(0.1, 5, (3000, 1))).astype(np.float32)

    asked = rank(logits)

    assert sorted(q.row for q in asked) == list(range(3000))
    for n in (3, 30, 300):
        assert np.ptp(np.bincount([q.predicted for q in asked[:n]], minlength=3)) == 0
    first, rest = (np.mean([q.uncertainty for q in part]) for part in (asked[:600], asked[600:]))
    assert abs(first - rest) < 0.05
    assert all(0 <= q.uncertainty <= 1 for q in asked)
    assert rank(logits) == asked
