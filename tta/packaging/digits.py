"""A source model to try tta with: real handwritten digits (scikit-learn's), enlarged and slightly warped.

The 1,797 digits are split by writer's sample into train, reference and stream; every image shown later is a fresh
seeded affine warp of one of its split's digits, so there are as many as needed and none is seen twice.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import kornia.augmentation as ka
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn

from tta.packaging.source import build_model

IMAGE_SHAPE = (32, 32, 3)
SOURCE = "timm:resnet18"
KWARGS: dict[str, Any] = {
    "num_classes": 10,
    "layers": (1, 1, 1, 1),
    "channels": (16, 32, 48, 64),
    "stem_type": "deep",
    "stem_width": 8,
}
SPLITS = {"train": (0, 900), "reference": (900, 1300), "stream": (1300, 1797)}

Array = npt.NDArray[Any]


def digits(split: str, n: int, seed: int) -> tuple[Array, Array]:
    """Warped digits of one split.

    Args:
        split: "train", "reference" or "stream"; no digit is in two.
        n: number of images.
        seed: of choice and warp.

    Returns:
        x (n, 32, 32, 3) uint8 and y (n,) int64.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    start, end = SPLITS[split]
    chosen = order[start:end][np.random.default_rng(seed).integers(0, end - start, n)]
    small = torch.from_numpy(data.images[chosen]).float()[:, None] / 16
    large = nn.functional.interpolate(small, size=(28, 28), mode="bilinear", align_corners=False)
    large = nn.functional.pad(large, (2, 2, 2, 2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        warp = ka.RandomAffine(degrees=10.0, translate=(0.06, 0.06), scale=(0.9, 1.1), p=1.0)
        warped = warp(large)
        grey = (warped * 0.8 + 0.1 + 0.02 * torch.randn_like(warped)).clamp(0, 1)
    x = (grey * 255).round().to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
    return x.contiguous().numpy(), data.target[chosen].astype(np.int64)


def write_pictures(folder: Path, n: int) -> None:
    """Write a few stream images as PNG files, one folder a class, to try commands with."""
    x, y = digits("stream", n, seed=1)
    for i in range(n):
        path = folder / str(y[i]) / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[i]).save(path)


def corrupt(x: Array, corruption: str, seed: int) -> Array:
    """Shift images at the input level with kornia.

    Args:
        x: (N, H, W, C) uint8.
        corruption: "noise" (Gaussian, 0.35 of the range) or "blur" (Gaussian, 2.2 pixels).
        seed: of the noise.
    """
    images = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255
    transform: nn.Module
    if corruption == "noise":
        transform = ka.RandomGaussianNoise(mean=0.0, std=0.35, p=1.0)
    else:
        transform = ka.RandomGaussianBlur((13, 13), (2.2, 2.2), p=1.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shifted = transform(images).clamp(0, 1)
    result: Array = (shifted * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return result


def train(
    epochs: int,
    seed: int,
    progress: Callable[[int, int], None],
    source: str = SOURCE,
    kwargs: dict[str, Any] = KWARGS,
    learning_rate: float = 4e-3,
) -> nn.Module:
    """Train a model on warped digits; by default the source model of the demo.

    Args:
        epochs: passes over 4,000 images, freshly warped each time.
        seed: of weights and data.
        progress: told (step, steps).
        source: architecture, as `tta package --model` takes it.
        kwargs: it is built with.
        learning_rate: highest.
    """
    torch.manual_seed(seed)
    model = build_model(source, kwargs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-2)
    n, batch = 4000, 64
    steps = epochs * (n // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=steps)
    step = 0
    model.train()
    for epoch in range(epochs):
        x, y = digits("train", n, seed=1000 + epoch)
        images, labels = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(y)
        for start in range(0, n - batch + 1, batch):
            loss = nn.functional.cross_entropy(model(images[start : start + batch]), labels[start : start + batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            step += 1
            progress(step, steps)
    return model.eval()
