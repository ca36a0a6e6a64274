"""How far one client is believed: shares of the labels, contested labels, who disagrees."""

import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from tests.daemon.test_memory import ID, labelled
from tta.auth import Clients
from tta.config import GateConfig
from tta.daemon.gate import carried_by, compare_rates, judge, without_each
from tta.daemon.labellers import Labellers, PairedTests, disagreeing
from tta.daemon.labels import LabelBuffer, Labelled
from tta.daemon.rehearsals import Hearing, gains, verdict_of

THREE = Labellers(0.5, frozenset("abco"), frozenset("abc"), frozenset("o"))  # o is an admin
ALL = replace(THREE, share=1.0)


def of(client: str, *numbers: int, label: int = 1) -> list[Labelled]:
    """Labels that a client gives."""
    return [replace(labelled(i, label), client=client) for i in numbers]


def buffer_of(path: Path, labellers: Labellers) -> LabelBuffer:
    """A buffer whose labels are believed so far."""
    return LabelBuffer(path, 5000, 0.6, (4, 4, 3), lambda: labellers)


COUNTS = st.dictionaries(st.sampled_from(["", *"abcox"]), st.integers(0, 500), max_size=6)


@given(counts=COUNTS, share=st.floats(0.05, 1.0), limit=st.integers(-1, 400))
def test_nobody_gives_more_than_the_share(counts: Mapping[str, int], share: float, limit: int) -> None:
    """Whatever came from whom, each limited client gives at most its share of what is used, a stranger nothing."""
    labellers = replace(THREE, share=share)
    used = labellers.used(counts, limit)
    total = sum(used.values())

    assert all(0 <= n <= counts[client] for client, n in used.items())
    assert "x" not in used
    assert limit < 0 or total <= limit
    for client in labellers.limited & used.keys():
        # A limit on all is shared out in whole labels: less than one of each client is lost.
        assert used[client] <= max(share, 1 / 3) * (total + len(counts)) + 1e-6
    if limit < 0:
        assert all(used[client] == counts[client] for client in ("", "o") if client in counts)


@pytest.mark.parametrize(
    ("counts", "used"),
    [
        ({"a": 100, "b": 100}, {"a": 100, "b": 100}),
        ({"a": 300, "b": 60, "c": 40}, {"a": 100, "b": 60, "c": 40}),
        ({"a": 300}, {"a": 0}),
        ({"a": 300, "o": 50}, {"a": 50, "o": 50}),
    ],
)
def test_as_many_are_used_as_the_share_allows(counts: Mapping[str, int], used: Mapping[str, int]) -> None:
    """Of two equals everything is used, of a flood as much as all others gave, of one alone nothing."""
    assert THREE.used(counts) == used


def listed(path: Path, people: Mapping[str, list[str]], share: float = 0.5) -> Labellers:
    """As a list of clients on disk has it."""
    entries = {name: {"key": zmq.curve_keypair()[0].decode(), "roles": roles} for name, roles in people.items()}
    path.write_text(json.dumps(entries))  # JSON is YAML
    return Labellers.listed(Clients(path), share)


def images(n: int) -> Iterator[bytes]:
    """Hashes of different images."""
    return (i.to_bytes(16, "little") for i in range(n))


def test_one_who_alone_may_label_decides(tmp_path: Path) -> None:
    """Nobody is limited where no keys are asked for, one client only may label, or the share is everything."""
    alone = listed(tmp_path / "one.yaml", {"a": ["label"], "cam": ["predict"], "o": ["admin"]})
    trusted = listed(tmp_path / "all.yaml", {"a": ["label"], "b": ["label"]}, share=1.0)
    right, wrong = [True] * 40, [False] * 40
    first = judge(right, wrong, wrong, None, 0.05)

    for labellers in (alone, trusted, Labellers()):
        assert labellers.used({"a": 300}) == {"a": 300}
        assert without_each(first, right, wrong, wrong, ["a"] * 40, labellers.limited).outcome == "accepted"
        tests = PairedTests(0.05, labellers.limited)
        for image in images(20):
            tests.update("a", image, new_correct=False, previous_correct=True)
        assert tests.disagrees
    assert alone.used({"cam": 5, "gone": 5, "o": 5}) == {"o": 5}


def test_whose_role_is_taken_away_is_not_believed(tmp_path: Path) -> None:
    """Of a client that may not label any more no label is used, rather than all."""
    before = listed(tmp_path / "l.yaml", {"a": ["label"], "b": ["label"], "c": ["label"]})
    after = listed(tmp_path / "l.yaml", {"a": ["predict"], "b": ["label"], "c": ["label"]})
    counts = {"a": 1000, "b": 50, "c": 50}

    assert before.used(counts) == {"a": 100, "b": 50, "c": 50}
    assert after.used(counts) == {"b": 50, "c": 50}


def test_a_flood_is_counted_and_selected_no_further_than_its_share(tmp_path: Path) -> None:
    """Count, both sides of the split and outcomes hold as many labels of a flood as of all others, its newest."""
    buffer = buffer_of(tmp_path / "l.sqlite", THREE)
    buffer.add(of("b", *range(100)))
    buffer.add(of("a", *range(1000, 2000), label=2))

    for fit in (True, False):
        rows = buffer.select(0, fit)
        flood = [r for r in rows if r.client == "a"]
        assert len(flood) == len(rows) - len(flood) > 0
        assert min(r.sequence for r in flood) > 1800
    assert buffer.count(0) == 200
    assert buffer.given(0) == 1100
    assert buffer.outcomes(0, version=0) == (200, 100)
    buffer.close()


def test_labels_of_a_client_off_the_list_are_not_used(tmp_path: Path) -> None:
    """Taking a client off the list takes its labels out of everything; putting it back brings them back."""
    path = tmp_path / "l.sqlite"
    buffer = buffer_of(path, ALL)
    buffer.add(of("a", *range(40)))
    buffer.add(of("b", *range(40, 80)))
    buffer.close()

    without = buffer_of(path, replace(ALL, names=frozenset("bco"), limited=frozenset("bc")))
    assert {r.client for fit in (True, False) for r in without.select(0, fit)} == {"b"}
    assert without.count(0) == 40
    without.close()
    again = buffer_of(path, ALL)
    assert again.count(0) == 80
    again.close()


def used(buffer: LabelBuffer) -> dict[int, tuple[int | None, str]]:
    """By place in the stream: the label that is used, and whose it is."""
    return {r.sequence: (r.label, r.client) for fit in (True, False) for r in buffer.select(0, fit)}


def test_what_two_clients_label_differently_is_used_by_nobody(tmp_path: Path) -> None:
    """A contested label is kept and not used until an admin settles it, which nobody undoes."""
    buffer = buffer_of(tmp_path / "l.sqlite", ALL)
    buffer.add(of("a", 2, 3, label=1))

    other = buffer.add(of("b", 2, label=2))
    insists = buffer.add(of("a", 2, label=1))

    assert other.contested == insists.contested == {ID + 2}
    assert used(buffer) == {3: (1, "a")}
    assert buffer.outcomes(0, version=0)[0] == 1
    assert buffer.contests() == {"a": 1, "b": 1}

    buffer.add(of("o", 2, label=2))
    assert buffer.add(of("a", 2, label=1)).contested == {ID + 2}
    assert used(buffer) == {2: (2, "o"), 3: (1, "a")}
    buffer.close()


def test_what_two_clients_agree_on_is_no_longer_one_s(tmp_path: Path) -> None:
    """An agreed label counts without limit, and its first giver can contest it, not change it."""
    buffer = buffer_of(tmp_path / "l.sqlite", THREE)
    buffer.add(of("a", *range(40)))
    assert buffer.count(0) == 0  # one client's only
    assert buffer.add(of("b", *range(40))).contested == set()
    assert buffer.count(0) == 40
    assert buffer.outcomes(0, version=0) == (40, 0)

    changed = buffer.add(of("a", 7, label=2))

    assert changed.contested == {ID + 7}
    assert 7 not in used(buffer)
    buffer.close()


def test_who_is_off_the_list_contests_nothing(tmp_path: Path) -> None:
    """Labels of a removed client are replaced by others', and what it contested is used when it is sent again."""
    path = tmp_path / "l.sqlite"
    buffer = buffer_of(path, ALL)
    buffer.add(of("a", 1, 2, label=2))
    buffer.add(of("b", 3, label=1))
    buffer.add(of("a", 3, label=2))
    buffer.close()

    without = buffer_of(path, replace(ALL, names=frozenset("bco"), limited=frozenset("bc")))
    added = without.add([*of("b", 1, label=1), *of("b", 3, label=1)])

    assert added.contested == set()
    assert used(without) == {1: (1, "b"), 3: (1, "b")}
    without.close()


def test_a_flood_pushes_out_its_own_labels_first(tmp_path: Path) -> None:
    """Beyond the capacity those go that are the oldest of whoever has most."""
    buffer = LabelBuffer(tmp_path / "l.sqlite", 200, 0.6, (4, 4, 3), lambda: THREE)
    buffer.add(of("b", *range(90)))
    for begin in range(1000, 2000, 100):
        buffer.add(of("a", *range(begin, begin + 100)))

    assert len(buffer) == 200
    given = buffer.outcomes_by_client(0, version=0)
    assert (given["a"][0], given["b"][0]) == (110, 90)
    assert buffer.outcomes_by_client(1890, version=0)["a"][0] == 110
    buffer.close()


@pytest.mark.parametrize(
    ("first", "second", "contested"),
    [
        ((1, True), (2, False), True),  # called right, then another class named
        ((1, True), (1, False), False),
        ((None, True), (1, False), True),  # called wrong, then the predicted class named
        ((None, True), (2, False), False),
        ((2, False), (None, True), False),
        ((None, True), (None, True), False),
        ((None, True), (1, True), True),  # called wrong, then right
    ],
)
def test_feedback_can_contradict_a_class(
    tmp_path: Path, first: tuple[int | None, bool], second: tuple[int | None, bool], contested: bool
) -> None:
    """Right and wrong are compared with the class another names; a named class that agrees replaces them."""
    buffer = buffer_of(tmp_path / "l.sqlite", ALL)
    for client, (label, feedback) in (("a", first), ("b", second)):
        row = replace(labelled(7, label), client=client, feedback=feedback)  # predicted: class 1
        added = buffer.add([row])

    assert bool(added.contested) == contested
    named = buffer.select(0, True) + buffer.select(0, False)
    wanted = [] if contested or (first[1] and second[1]) else [1 if first == (1, True) else 2]
    assert [r.label for r in named] == wanted
    buffer.close()


def test_labels_of_an_earlier_release_are_taken_over(tmp_path: Path) -> None:
    """A file without clients, contests and feedback keeps its labels."""
    path = tmp_path / "l.sqlite"
    db = sqlite3.connect(path)
    db.execute(
        "CREATE TABLE labels (prediction_id INTEGER PRIMARY KEY, sequence INTEGER NOT NULL, "
        "version INTEGER NOT NULL, label INTEGER, predicted INTEGER NOT NULL, fit INTEGER NOT NULL, "
        "asked INTEGER NOT NULL, x BLOB)"
    )
    x = np.zeros((4, 4, 3), np.uint8).tobytes()
    db.executemany(
        "INSERT INTO labels VALUES (?,?,0,?,1,?,0,?)", [(ID + i, i, 1 if i else None, i % 2, x) for i in range(9)]
    )
    db.commit()
    db.close()

    buffer = buffer_of(path, ALL)

    assert buffer.count(0) == 8
    assert buffer.n_feedback(0) == 1
    assert {r.client for r in buffer.select(0, True)} == {""}
    buffer.close()


def test_a_candidate_must_hold_without_any_one_client() -> None:
    """What one client's labels alone make look better is not accepted, and names it; what all see is."""
    clients = ["a"] * 50 + ["b"] * 50
    serving = [False] * 50 + [True] * 40 + [False] * 10
    poisoned = [True] * 50 + [True] * 30 + [False] * 20  # the others lose ten of fifty
    hidden = [True] * 50 + [True] * 41 + [False] * 9  # the others gain one of fifty: may be chance
    honest = [True] * 50 + [True] * 45 + [False] * 5
    both = frozenset("ab")

    def verdict(candidate: list[bool]) -> tuple[str, str]:
        first = judge(candidate, serving, serving, None, 0.05)
        assert first.outcome == "accepted"
        found = without_each(first, candidate, serving, serving, clients, both)
        return found.outcome, found.reason

    assert verdict(poisoned) == (
        "rejected",
        "by the labels of all but client 'a': no better than the serving version",
    )
    assert verdict(hidden) == ("undecided", "by the labels of all but client 'a': better, but it may be chance")
    assert verdict(honest) == ("accepted", "better than the serving version")
    first = judge(poisoned, serving, serving, None, 0.05)
    assert without_each(first, poisoned, serving, serving, clients, frozenset()) == first
    assert carried_by(poisoned, (serving,), clients, both) == "a"
    assert carried_by(honest, (serving,), clients, both) is None


def test_one_client_can_neither_keep_nor_condemn_a_version() -> None:
    """Two clients' labels roll back what a third praises; a third's alone, however many, roll back nothing."""
    tests = PairedTests(0.05, frozenset("abc"))
    pictures = images(360)
    for i in range(60):
        tests.update("c", next(pictures), new_correct=True, previous_correct=False)
        tests.update("ab"[i % 2], next(pictures), new_correct=i % 5 != 0, previous_correct=True)
    assert not tests.all.disagrees
    assert tests.disagrees

    good = PairedTests(0.05, frozenset("abc"))
    for i in range(60):
        good.update("ab"[i % 2], next(pictures), new_correct=True, previous_correct=i % 3 != 0)
        for _ in range(3):
            good.update("c", next(pictures), new_correct=False, previous_correct=True)
    assert good.all.disagrees
    assert not good.disagrees


def test_an_image_that_comes_again_condemns_no_version() -> None:
    """A hundred labels of one image count as one in probation; twenty of different images roll back."""
    tests = PairedTests(0.05, frozenset())
    stuck, *others = images(21)
    for _ in range(100):
        tests.update("a", stuck, new_correct=False, previous_correct=True)
    assert tests.all.n_labels == 1
    assert not tests.disagrees
    for image in others:
        tests.update("a", image, new_correct=False, previous_correct=True)
    assert tests.disagrees


def test_nobody_hides_an_image_by_labelling_it_first() -> None:
    """Sixty images that one client praises first and two others then condemn roll back, and so do two clients'."""
    first, alone = PairedTests(0.05, frozenset("abc")), PairedTests(0.05, frozenset("ab"))
    for image in images(60):
        for client in "cab":
            first.update(client, image, client == "c", client != "c")
        for client in "ab":
            alone.update(client, image, new_correct=False, previous_correct=True)

    assert not first.all.disagrees
    assert first.disagrees
    assert alone.disagrees


def test_the_one_who_contradicts_the_others_is_named() -> None:
    """Of five clients the one that calls right answers wrong is named, and nobody where they differ by chance."""
    rng = np.random.default_rng(0)
    honest = {name: (80, int(rng.binomial(80, 0.12))) for name in "abcd"}

    assert disagreeing(honest) == []
    assert [d.client for d in disagreeing({**honest, "e": (60, 30)})] == ["e"]
    assert [d.client for d in disagreeing({"a": (60, 6), "e": (60, 30)})] == ["a", "e"]
    assert disagreeing({"a": (600, 60), "e": (10, 9)}) == []
    assert [d.client for d in disagreeing({"": (60, 6), "e": (60, 30)})] == ["e"]


def test_nobody_is_named_by_chance() -> None:
    """Over 2,000 comparisons of six clients that err alike, at most a few name somebody."""
    rng = np.random.default_rng(1)
    named = 0
    for _ in range(2000):
        named += bool(disagreeing({c: (n, int(rng.binomial(n, 0.2))) for c in "abcdef" for n in (40,)}))

    assert named <= 6


def test_feedback_of_one_client_alone_neither_condemns_nor_confirms() -> None:
    """What three clients call wrong more often is worse; what only one calls so, however often, is not."""
    three = [((40, 20), (40, 4))] * 3  # without each of them, the others see the same
    p_worse, p_better = compare_rates((60, 30), (60, 6), three)
    assert p_worse < 1e-4 < p_better
    p_worse, p_better = compare_rates((60, 6), (60, 30), [(old, new) for new, old in three])
    assert p_better < 1e-4 < p_worse

    flooded = [((40, 4), (40, 4)), ((400, 300), (400, 40)), ((400, 300), (400, 40))]
    assert compare_rates((440, 304), (440, 44), flooded) == (1.0, 1.0)
    assert compare_rates((440, 44), (440, 304), [(old, new) for new, old in flooded]) == (1.0, 1.0)
    assert compare_rates((440, 304), (440, 44), [])[0] < 1e-9


def heard(of_a: tuple[int, int], of_b: tuple[int, int]) -> Hearing:
    """Twenty labels of each client; of the present version and of the candidate so many are right."""
    serving, candidate = ([int(i >= n) for n in pair for i in range(20)] for pair in zip(of_a, of_b, strict=True))
    return Hearing([0] * 40, candidate, serving, serving, ["a"] * 20 + ["b"] * 20, chosen=False)


def test_no_client_replaces_versions_in_a_rehearsal_alone() -> None:
    """Candidates that both clients see gain serve; those only one sees gain do not, with or without proof."""
    honest, poisoned = heard((8, 16), (8, 16)), heard((0, 20), (16, 8))
    both = frozenset("ab")
    config = GateConfig()

    for proof in (True, False):
        assert verdict_of([honest, honest], both, config, proof)[1]
        assert not verdict_of([poisoned, poisoned], both, config, proof)[1]
        assert verdict_of([poisoned, poisoned], frozenset(), config, proof)[1]
    assert gains(honest, both, 1.0)
    assert not gains(poisoned, both, 1.0)
    assert gains(poisoned, frozenset(), 1.0)


def test_no_rehearsal_costs_a_class() -> None:
    """Candidates that are right more often, but on one class far less, do not serve, with or without proof."""
    serving = [3] * 20 + [5] * 40
    candidate = [5] * 12 + [3] * 8 + [4] * 40
    classes = [3] * 20 + [4] * 40
    hearing = Hearing(classes, candidate, serving, serving, ["a"] * 60, chosen=False)
    config = GateConfig()

    for proof in (True, False):
        verdict, serves = verdict_of([hearing], frozenset(), config, proof)
        assert (serves, verdict.outcome, verdict.worst_class) == (False, "rejected", 3)
        assert verdict_of([hearing], frozenset(), config.model_copy(update={"max_class_drop": 1.0}), proof)[1]
    assert not gains(hearing, frozenset(), config.max_class_drop)
    assert gains(hearing, frozenset(), 1.0)
