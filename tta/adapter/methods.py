"""What can be tuned: one block, which is surgery, and everything that the paper compares it with.

Source: Lee et al., Surgical Fine-Tuning, ICLR 2023, section 3 and table 4. Every method is a list of `Plan`s, one
a learning rate, so that all are fitted, chosen and judged alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from tta.adapter.surgery import Plan
from tta.adapter.views import Cut
from tta.config import METHODS
from tta.errors import AdaptationError

L1 = 3e-4  # weight of the distance from the source
# Of the blocks' rates, for methods that move everything at once: they want lower ones.
WHOLE = 0.3
BESIDE_HEAD = 0.1  # where the head has a rate of its own


@dataclass(frozen=True)
class Anatomy:
    """The blocks of a network.

    Attributes:
        tensors: block name to state_dict names, in the order of depth; the head last.
        taps: block name to the module its output leaves by; "" for the head.
        head_module: name of the classifier.
    """

    tensors: Mapping[str, tuple[str, ...]]
    taps: Mapping[str, str]
    head_module: str

    @property
    def head(self) -> str:
        """Name of the last block."""
        return list(self.tensors)[-1]

    def cut_before(self, block: str) -> Cut | None:
        """Where the network may be cut if only this block changes; None for the first."""
        if block == self.head and self.head_module:
            return Cut(self.head_module, before=True)
        before = {after: self.taps[name] for name, after in pairwise(self.tensors)}
        return Cut(before[block]) if before.get(block) else None


@dataclass(frozen=True)
class Rates:
    """Learning rates to try.

    Attributes:
        body: of blocks before the head; a share of them of methods that move everything.
        head: of the head, which wants 10 to 100 times more.
    """

    body: tuple[float, ...]
    head: tuple[float, ...]


def block_plans(anatomy: Anatomy, block: str, rates: Rates, fit: Plan) -> list[Plan]:
    """Tune one block.

    Args:
        anatomy: of the network.
        block: its name.
        rates: to try.
        fit: epochs, batch size, seed and the like.

    Raises:
        AdaptationError: there is no such block.
    """
    if block not in anatomy.tensors:
        raise AdaptationError(f"block {block!r} is not in the model: it has {', '.join(anatomy.tensors)}")
    parts = (anatomy.tensors[block],)
    tried = rates.head if block == anatomy.head else rates.body
    return [replace(fit, name=block, parts=parts, learning_rate=rate) for rate in tried]


def method_plans(anatomy: Anatomy, method: str, rates: Rates, fit: Plan) -> list[Plan]:
    """One of `tta.config.METHODS`; "all-rates" moves everything, the head at its own highest rate.

    Raises:
        AdaptationError: an unknown method.
    """
    plan = replace(fit, name=method, parts=tuple(anatomy.tensors.values()))
    share = WHOLE
    match method:
        case "all":
            pass
        case "all-rates":
            plan, share = replace(plan, head_learning_rate=max(rates.head)), BESIDE_HEAD
        case "l1":
            plan = replace(plan, l1=L1)
        case "first-to-last" | "last-to-first":
            plan = replace(plan, rule=method)
        case "auto-rgn" | "auto-snr":
            plan, share = replace(plan, rule=method), 1.0
        case _:
            raise AdaptationError(f"method {method!r} is not known: write one of {', '.join(METHODS)}")
    return [replace(plan, learning_rate=rate * share) for rate in rates.body]


def every_block(anatomy: Anatomy, order: Sequence[str], rates: Rates, fit: Plan) -> list[Plan]:
    """Each block at each of its rates, in this order."""
    return [plan for block in order for plan in block_plans(anatomy, block, rates, fit)]
