"""CIFAR-10 and the ResNet-20 of `TTA_DATA`, and the corruptions the benchmarks use."""

import os
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tta.bundle import Bundle, load_bundle
from tta.errors import BundleError
from tta.images import read_labelled

SHAPE = (32, 32, 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CACHE = Path(__file__).parent / ".cache"

Array = npt.NDArray[Any]


def data_folder() -> Path:
    """Where `TTA_DATA` points, or exit saying what is missing."""
    folder = os.environ.get("TTA_DATA")
    if not folder or not (Path(folder) / "resnet20-cifar10.safetensors").exists():
        sys.exit("set TTA_DATA to a folder with cifar10-test.tar.xz and resnet20-cifar10.safetensors")
    return Path(folder)


def images(split: str) -> tuple[Array, Array, list[str]]:
    """Images (N, 32, 32, 3) uint8, classes (N,), names, of "train" or "test", in a fixed random order; cached."""
    cached = CACHE / f"cifar10-{split}.npz"
    if not cached.exists():
        CACHE.mkdir(exist_ok=True)
        with tarfile.open(data_folder() / f"cifar10-{split}.tar.xz") as archive:
            archive.extractall(CACHE, filter="data")
        x, y, classes = read_labelled(CACHE / split, SHAPE, "crop")
        order = np.random.default_rng(0).permutation(len(x))
        np.savez(cached, x=x[order], y=y[order], classes=classes)
    data = np.load(cached)
    return data["x"], data["y"], [str(c) for c in data["classes"]]


def gaussian_noise(x: Array, seed: int) -> Array:
    """CIFAR-10-C gaussian_noise, severity 5: sigma 0.10, then uint8 truncation."""
    noise = np.random.default_rng(seed).normal(scale=0.10, size=x.shape)
    return (np.clip(x / 255 + noise, 0, 1) * 255).astype(np.uint8)


def contrast(x: Array, seed: int = 0) -> Array:
    """CIFAR-10-C contrast, severity 5: c 0.15 about each image's channel means, then uint8 truncation."""
    scaled = x / 255
    mean = scaled.mean(axis=(1, 2), keepdims=True)
    return (np.clip((scaled - mean) * 0.15 + mean, 0, 1) * 255).astype(np.uint8)


def resnet20_bundle(x: Array, y: Array, classes: list[str]) -> tuple[Path, Bundle]:
    """The packaged ResNet-20 with these reference images; packaged once."""
    path = CACHE / "resnet20.tta"
    try:
        return path, load_bundle(path)
    except BundleError:
        pass
    from tta.packaging import Recipe, package
    from tta.packaging.source import build_model, load_checkpoint

    source = "bench.resnet20:resnet20"
    model = build_model(source, {})
    load_checkpoint(model, data_folder() / "resnet20-cifar10.safetensors")
    recipe = Recipe("resnet20-cifar10", source, SHAPE, {}, MEAN, STD)
    return path, package(model, recipe, x, y, classes, path)
