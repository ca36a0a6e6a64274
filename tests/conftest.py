"""What the tests share: a small trained model, its bundle, and daemons on free ports."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tta.bundle import Bundle, load_bundle
from tta.keys import Credentials
from tta.packaging import Recipe, package
from tta.packaging.digits import IMAGE_SHAPE, KWARGS, SOURCE, digits, train
from tta.scenario import DaemonProcess

torch.set_num_threads(1)  # two that wait for each other are slower than one where cores are busy

DEMO_SETTINGS = {
    "adapt.labels": 96,
    "adapt.retry_labels": 24,
    "adapt.augment": ["crop"],
    "adapt.epochs": 8,
    "monitor.window": 256,
    "gate.probation_s": 1.0,
}
LOG_LINES = 60


@pytest.fixture(scope="session")
def digits_model() -> torch.nn.Module:
    """A small ResNet trained on warped digits."""
    return train(5, 0, lambda step, steps: None)


@pytest.fixture(scope="session")
def bundle_path(digits_model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, packaged, with a graph of half precision beside it."""
    path = tmp_path_factory.mktemp("bundle") / "digits.tta"
    x, y = digits("reference", 2400, seed=1)
    recipe = Recipe("digits", SOURCE, IMAGE_SHAPE, KWARGS, fp16=True)
    package(digits_model, recipe, x, y, [str(i) for i in range(10)], path)
    return path


@pytest.fixture(scope="session")
def bundle(bundle_path: Path) -> Bundle:
    """The same, loaded."""
    return load_bundle(bundle_path)


@pytest.fixture(scope="session")
def stream() -> tuple[np.ndarray, np.ndarray]:
    """400 clean images nobody was trained on, and their classes."""
    return digits("stream", 400, seed=77)


@pytest.fixture
def start_daemon(bundle_path: Path, tmp_path: Path) -> Iterator[Callable[..., DaemonProcess]]:
    """Start daemons that are stopped when the test ends: `start_daemon(**{"server.threads": 1})`."""
    running: list[DaemonProcess] = []

    def start(
        bundle: Path = bundle_path, n_servers: int = 1, credentials: Credentials | None = None, **settings: Any
    ) -> DaemonProcess:
        folder = tmp_path / f"daemon{len(running)}"
        daemon = DaemonProcess(bundle, folder, {**DEMO_SETTINGS, **settings}, n_servers, credentials)
        daemon.start()
        running.append(daemon)
        return daemon

    yield start
    for daemon in running:
        daemon.stop()
        if daemon.process is not None and daemon.process.poll() is None:
            daemon.process.kill()
        log = daemon.log_path.read_text().splitlines()
        print("the daemon's log ends with:", *log[-LOG_LINES:], sep="\n")  # pytest shows it where a test failed


@pytest.fixture(scope="session")
def cuda() -> None:
    """Skip where there is no GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Each device there is."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """CIFAR-10 and the ResNet-20, where `TTA_DATA` points."""
    folder = os.environ.get("TTA_DATA")
    if not folder or not (Path(folder) / "resnet20-cifar10.safetensors").exists():
        pytest.skip("TTA_DATA does not point at the CIFAR-10 data")
    return Path(folder)
