"""The model of the benchmarks that need no data: a small ResNet on digits, trained once."""

from pathlib import Path

from bench.cifar import CACHE
from tta.packaging import Recipe, package
from tta.packaging.digits import IMAGE_SHAPE, KWARGS, SOURCE, digits, train


def digits_bundle() -> Path:
    """A small ResNet trained on warped digits, made at the first call."""
    path = CACHE / "digits.tta"
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        x, y = digits("reference", 2400, seed=1)
        recipe = Recipe("digits", SOURCE, IMAGE_SHAPE, KWARGS)
        package(train(5, 0, lambda step, steps: None), recipe, x, y, [str(i) for i in range(10)], path)
    return path
