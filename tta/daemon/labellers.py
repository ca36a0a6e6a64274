"""Who labels, how far one of them is believed, and who contradicts the others. No I/O.

Labels move weights, so whoever may label may try to move them where they should not go. Of the labels that an
operation uses, one client gave at most a share; at the gate a candidate must hold without any one client's labels
(`gate.without_each`); and a client whose labels disagree with the others' is named. All of it rests on names that
keys have proved (`tta.auth`): where nobody is asked for a key, all labels are taken for one client's.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from tta.auth import Clients
from tta.monitor.accuracy import PairedTest, more_errors_p_value

P_VALUE = 0.001  # that two error rates so different are chance; asked again and again, hence so small
DIFFERENCE = 0.15  # of the error rates, under which it is no matter
MIN_LABELS = 24  # of a client, and of the others, under which nothing can be said


@dataclass(frozen=True)
class Labellers:
    """Who may label at present.

    Attributes:
        share: of the labels used that one client may have given, in (0, 1].
        names: clients whose labels are used: those that may label now; None: nobody is asked for a key.
        limited: those among them that do not decide alone: who are no admins, if they are several and the share is
            under 1. One alone cannot be held against others.
        admins: those that are; their labels stand against any other's.
    """

    share: float = 1.0
    names: frozenset[str] | None = None
    limited: frozenset[str] = frozenset()
    admins: frozenset[str] = frozenset()

    @staticmethod
    def listed(clients: Clients | None, share: float) -> "Labellers":
        """As the list of clients has it now."""
        if clients is None:
            return Labellers()
        roles = clients.roles()
        admins = frozenset(name for name, has in roles.items() if "admin" in has)
        limited = frozenset(name for name, has in roles.items() if "label" in has) - admins
        alone = len(limited) == 1 or share == 1
        return Labellers(share, admins | limited, frozenset() if alone else limited, admins)

    def are_used(self, client: str) -> bool:
        """Whether labels of a client are used; "" is for those of nobody in particular, or of two that agree."""
        return client == "" or self.names is None or client in self.names

    def used(self, counts: Mapping[str, int], limit: int = -1) -> dict[str, int]:
        """How many labels of each client are used.

        Clients that may not label any more are not believed; labels from before keys were asked for, "", are. Of n
        that may, each may give an n-th.

        Args:
            counts: how many labels each client gave.
            limit: at most so many in all, from everybody in proportion; -1 for all.
        """
        used = {c: n for c, n in counts.items() if self.are_used(c)}
        if self.limited:
            share = max(self.share, 1 / len(self.limited))
            most = max((n for c, n in used.items() if c in self.limited), default=0)
            while True:  # fewer of one are fewer in all, of which a share is fewer again
                capped = {c: min(n, most) if c in self.limited else n for c, n in used.items()}
                fair = int(share * sum(capped.values()) + 1e-9)
                if fair >= most:
                    break
                most = fair
            used = capped
        total = sum(used.values())
        if 0 <= limit < total:
            used = {c: n * limit // total for c, n in used.items()}
        return used


class PairedTests:
    """Is the previous version better than the new one, by all labels or by those of all but one client?

    One client's labels cannot hide what the others' show. Nor do they decide alone: besides a test that disagrees
    it takes two clients whose own labels are for the previous version, or one that is not limited.

    Args:
        alpha: chance that any of the tests disagrees while the new version is no worse.
        limited: clients that are left out in turn; where there are none all labels are one client's.
    """

    def __init__(self, alpha: float, limited: frozenset[str]) -> None:
        self._limited = limited
        self.all = PairedTest(alpha / (1 + len(limited)))
        self._without = {client: PairedTest(self.all.alpha) for client in limited}
        self._lead: Counter[str] = Counter()  # by client: labels for the previous version less those for the new
        self._tested = set[tuple[str | None, bytes]]()  # who is left out, and image
        self._led = set[tuple[str, bytes]]()  # client and image

    def update(self, client: str, image: bytes, new_correct: bool, previous_correct: bool) -> None:
        """Take one label of a client for an image, by its hash.

        An image that comes again (a camera that hangs) is no new evidence: each test, and each client's lead,
        counts it once, with the label that came first.
        """
        for left_out, test in ((None, self.all), *self._without.items()):
            if left_out != client and (left_out, image) not in self._tested:
                self._tested.add((left_out, image))
                test.update(new_correct, previous_correct)
        if (client, image) not in self._led:
            self._led.add((client, image))
            self._lead[client] += previous_correct - new_correct

    @property
    def disagrees(self) -> bool:
        """Whether labels have shown the previous version to be better."""
        accusers = {client for client, lead in self._lead.items() if lead > 0}
        enough = len(accusers) > 1 or not accusers <= self._limited
        return enough and any(test.disagrees for test in (self.all, *self._without.values()))


@dataclass(frozen=True)
class Disagreement:
    """A client whose labels call the serving version wrong more, or less, often than the others' do.

    Either its labels are wrong, or its pictures are unlike the others'.

    Attributes:
        labels: of the client, and `errors` of the serving version by them.
        others: labels of all others, and `others_errors` by them.
        p_val: that so large a difference is chance.
    """

    client: str
    labels: int
    errors: int
    others: int
    others_errors: int
    p_val: float


def disagreeing(outcomes: Mapping[str, tuple[int, int]]) -> list[Disagreement]:
    """Who contradicts the others most, if anybody does; of two clients both, for nobody can say which is right.

    Args:
        outcomes: by client: labels, and how many of them call the serving version wrong.
    """
    n_all, wrong_all = (sum(pair[i] for pair in outcomes.values()) for i in (0, 1))
    found = []
    for client, (n, wrong) in outcomes.items():
        others, others_wrong = n_all - n, wrong_all - wrong
        if not client:  # nobody in particular
            continue
        if min(n, others) < MIN_LABELS or abs(wrong / n - others_wrong / others) < DIFFERENCE:
            continue
        more = more_errors_p_value(wrong, n, others_wrong, others)
        less = more_errors_p_value(others_wrong, others, wrong, n)
        p_val = min(1.0, 2 * len(outcomes) * min(more, less))
        if p_val <= P_VALUE:
            found.append(Disagreement(client, n, wrong, others, others_wrong, p_val))
    least = min((d.p_val for d in found), default=0.0)
    return [d for d in found if d.p_val <= least * (1 + 1e-9)]
