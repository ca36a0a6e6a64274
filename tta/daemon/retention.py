"""How long images stay on the disk: of the bundle that serves, of those before it, and in files set aside."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tta.daemon.deployment import former_folders
from tta.daemon.labels import EXPIRED_AT_A_TIME, LabelBuffer, erase_labels
from tta.daemon.library import expire_images
from tta.errors import UnavailableError

SET_ASIDE = (  # what nothing uses and may hold images
    *("labels.sqlite.damaged-*", ".labels.sqlite.new*", "regimes/*-images.*.damaged-*"),
    *("regimes/.*-images.*.tmp", "regimes.damaged-*/*-images.*"),
)


class Retention:
    """Deletes images. Owned by the daemon's main thread.

    Args:
        root: the state folder.
        labels: of the bundle that serves.
    """

    def __init__(self, root: Path, labels: LabelBuffer) -> None:
        self._root = root
        self._labels = labels

    def erase(self, prediction_ids: Sequence[int]) -> int:
        """Delete the labels of predictions with their images, also those of former bundles; how many.

        Raises:
            UnavailableError: the disk refuses, or somebody reads a file: ask again.
        """
        n = self._labels.delete(prediction_ids)
        return n + self._each_former(lambda path: erase_labels(path, prediction_ids))

    def erase_everything(self) -> tuple[int, int]:
        """Delete every label and image: how many labels, and images of regimes, of the bundle that serves.

        Raises:
            UnavailableError, OSError: the disk refuses: ask again.
        """
        for pattern in ("labels.sqlite*", "regimes/*-images.*"):
            for path in self._former(pattern):
                path.unlink()
        for path in self.set_aside():
            path.unlink()
        return self._labels.delete_all(), expire_images(self._root, float("inf"))

    def expire(self, age_s: float, now_us: int) -> tuple[int, int]:
        """Delete what was stored longer ago; how many labels, `EXPIRED_AT_A_TIME` of a bundle at most, and images.

        Of files that were set aside nobody knows what they hold: they go when they are so old themselves.

        Raises:
            UnavailableError, OSError: the disk refuses.
        """
        before_us = now_us - round(1e6 * age_s)
        n_labels = self._labels.expire(age_s)
        n_images = sum(expire_images(folder, before_us / 1e6) for folder in (self._root, *self._former("")))
        for path in self.set_aside():
            if path.stat().st_mtime < before_us / 1e6:
                path.unlink()
        return n_labels + self._each_former(lambda path: erase_labels(path, (), before_us)), n_images

    def _each_former(self, erase: Callable[[Path], int]) -> int:
        """Do it to the labels of every former bundle, also where one of them fails; how many went.

        Raises:
            UnavailableError: of the last that failed.
        """
        n, failure = 0, None
        for path in self._former("labels.sqlite"):
            try:
                n += erase(path)
            except UnavailableError as error:
                failure = error
        if failure is not None:
            raise failure
        return n

    def set_aside(self) -> list[Path]:
        """Damaged files, and what a crash left, that may hold images."""
        folders = (self._root, *self._former(""))
        return [path for folder in folders for pattern in SET_ASIDE for path in folder.glob(pattern)]

    def _former(self, pattern: str) -> Iterator[Path]:
        for folder in former_folders(self._root):
            yield from list(folder.glob(pattern)) if pattern else [folder]


def is_more(n_labels: int) -> bool:
    """Whether labels that are too old may be left after so many were deleted at once."""
    return n_labels >= EXPIRED_AT_A_TIME
