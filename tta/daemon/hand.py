"""The operator's hand: what he may do to a daemon that otherwise decides by itself."""

from collections.abc import Callable, Sequence
from typing import Any

from tta.daemon.case import NEW
from tta.daemon.cycle import Event, State
from tta.daemon.labels import RETRY_S
from tta.daemon.retention import Retention
from tta.daemon.treatment import Treatment
from tta.errors import PreconditionError, UnavailableError

MIN_ADAPT_LABELS = 16


class Hand:
    """Commands that change what the treatment does. Owned by the daemon's main thread."""

    def __init__(self, treatment: Treatment) -> None:
        self._treatment = treatment

    def serve(self, version: int, reason: str, then: Callable[[dict[str, Any]], None]) -> None:
        """Serve a version by hand (rollback, reset); the cycle starts anew from stable.

        The version that is left stays in the store, but no regime recalls it any more.

        Args:
            version: to serve.
            reason: "rollback" or "reset".
            then: gets the server's reply, with "error" if it refused.

        Raises:
            NotFoundError: there is no such version.
            PreconditionError: it was never accepted.
        """
        treatment = self._treatment
        self._refuse_while_swapping()
        folder = treatment.store.folder(version)
        if not treatment.store.accepted(version):
            raise PreconditionError(f"version {version} was not accepted by the gate")

        def done(reply: dict[str, Any]) -> None:
            if "error" in reply:
                treatment.metrics.swaps.labels(reason, "refused").inc()
            else:
                treatment.metrics.swaps.labels(reason, "ok").inc()
                treatment.begin_anew(version, reason)
            then(reply)

        treatment.give_up_adapting(f"{reason} by the operator")
        treatment.servers.swap(version, folder, done)

    def erase(self, prediction_ids: Sequence[int], everything: bool) -> dict[str, int]:
        """Delete labels with their images: of these predictions, or all, and then every other stored image too.

        Returns:
            How many "labels" and "images" of regimes went, and how many "set_aside" files may hold more.

        Raises:
            UnavailableError: the disk refuses; what is still there goes when it is asked again.
        """
        treatment = self._treatment
        treatment.give_up_adapting("images erased by the operator")
        treatment.operation.cancel()  # they lie in the request of relief too
        retention = Retention(treatment.config.state, treatment.labels)
        n_images = 0
        try:
            if everything:
                treatment.ledger.clear()
                n_labels, n_images = retention.erase_everything()
            else:
                treatment.ledger.forget(prediction_ids)
                n_labels = retention.erase(prediction_ids)
        except OSError as error:
            raise UnavailableError(f"not all could be deleted: {error}", RETRY_S) from error
        treatment.record("erased", labels=n_labels, images=n_images)
        return {"labels": n_labels, "images": n_images, "set_aside": len(retention.set_aside())}

    def pause(self) -> None:
        """Decide nothing until `resume`; an adaptation under way is cancelled and starts again after it."""
        self._treatment.case.paused = True
        self._treatment.give_up_adapting("paused by the operator")
        self._treatment.record("paused")
        self._treatment.save()

    def resume(self) -> None:
        """Decide again after `pause`."""
        self._treatment.case.paused = False
        self._treatment.record("resumed")
        self._treatment.save()

    def approve(self) -> int:
        """Promote the proposal.

        Returns:
            Its version.

        Raises:
            PreconditionError: there is none.
        """
        case = self._treatment.case
        version = case.proposal
        if not version or self._treatment.cycle.state is not State.DRIFTED:
            raise PreconditionError("no candidate waits for approval")
        self._refuse_while_swapping()
        case.target = NEW
        self._treatment.happen(Event.ACCEPTED, candidate=version, approved=True)
        return version

    def accept(self) -> int:
        """Take the present shift for normal: what serves goes on, and is compared with the shift from now on.

        Returns:
            Number of the new regime.

        Raises:
            PreconditionError: there is no shift, or too little has been seen of it to know it again.
        """
        state, case, watch = self._treatment.cycle.state, self._treatment.case, self._treatment.watch
        if state is not State.DRIFTED:
            raise PreconditionError(f"there is no shift to accept: the cycle is {state}")
        self._refuse_while_swapping()
        if case.cause != "labels" and not watch.knows_shift():
            raise PreconditionError(
                f"only {watch.n_since()} samples of the shift have been seen: try again a little later"
            )
        case.accepted = True
        case.kind = case.kind or ("output" if case.cause == "labels" else "")
        self._treatment.happen(Event.HARMLESS, by="operator", kind=case.kind)
        return case.regime

    def adapt_now(self) -> int:
        """Adapt with the labels there are.

        Returns:
            How many labels that is.

        Raises:
            PreconditionError: paused or off, too few labels, a proposal waits, or an adaptation is under way.
        """
        treatment, case = self._treatment, self._treatment.case
        if not treatment.acting:
            raise PreconditionError("paused, or mode: off: nothing may be changed (see `tta resume`)")
        if case.proposal:
            raise PreconditionError(f"version {case.proposal} waits already: `tta approve` or `tta reset`")
        self._refuse_while_swapping()
        state = treatment.cycle.state
        if state not in (State.STABLE, State.DRIFTED):
            raise PreconditionError(f"the cycle is in {state}: wait until it is stable or drifted")
        onset = case.onset if state is State.DRIFTED else case.since
        have = treatment.labels.count(onset)
        if have < MIN_ADAPT_LABELS:
            raise PreconditionError(
                f"{have} labels with images since sequence {onset}: at least {MIN_ADAPT_LABELS} are needed"
            )
        if state is State.STABLE:
            treatment.open_by_hand(onset)
        case.wanted, case.forced = have, True
        treatment.save()
        return have

    def _refuse_while_swapping(self) -> None:
        if self._treatment.swapping:
            raise PreconditionError("a swap is under way: try again in a moment")
