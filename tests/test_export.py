"""`tta export`: PyTorch computes from the file what the daemon serves."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save
from typer.testing import CliRunner

from tta.bundle import Bundle
from tta.commands import app
from tta.daemon.store import Store
from tta.errors import ConfigError, DeltaError, NotFoundError
from tta.images import read_labelled
from tta.packaging.digits import KWARGS, SOURCE, digits
from tta.packaging.source import build_model, load_checkpoint
from tta.scenario import DaemonProcess
from tta.server.predictor import Predictor


@pytest.fixture
def state(bundle: Bundle, tmp_path: Path) -> Path:
    """A state folder with one version, whose first block is not the source's."""
    rng = np.random.default_rng(0)
    names = bundle.manifest.blocks[0].tensors
    delta = {n: (bundle.weights[n] + 0.05 * rng.random(bundle.weights[n].shape)).astype(np.float32) for n in names}
    x = bundle.anchor["x"][:4]
    model = build_model(SOURCE, KWARGS)
    weights = {**bundle.weights, **delta}
    model.load_state_dict({n: torch.from_numpy(np.array(a)) for n, a in weights.items()}, strict=False)
    probe = save({"x": x, "logits": logits_of(model, x, bundle)})
    root = tmp_path / "state"
    Store(root, bundle.sha256).write(save(delta), probe, "block1", "source", 0.0, {}, {"outcome": "accepted"})
    return root


def logits_of(model: torch.nn.Module, x: np.ndarray, bundle: Bundle) -> np.ndarray:
    """(N, K) float32 of uint8 images, as PyTorch computes them."""
    m = bundle.manifest
    images = (torch.from_numpy(x).float() / 255 - torch.tensor(m.mean)) / torch.tensor(m.std)
    with torch.no_grad():
        found: np.ndarray = model(images.permute(0, 3, 1, 2)).numpy()
    return found


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("version", [0, 1])
def test_pytorch_computes_what_is_served(
    bundle: Bundle, bundle_path: Path, state: Path, tmp_path: Path, version: int, suffix: str
) -> None:
    """A model with the exported weights gives the logits of the version's own session."""
    out = tmp_path / f"exported{suffix}"
    command = ["export", str(bundle_path), str(version), "--state", str(state), "--out", str(out), "--json"]
    told = json.loads(CliRunner().invoke(app, command).stdout)
    model = build_model(SOURCE, KWARGS)
    load_checkpoint(model, out)
    x, _ = digits("stream", 20, seed=3)
    predictor = Predictor(bundle, "cpu", 1)
    session = predictor.prepare(state / "versions" / "000001" if version else None)

    assert told["changed"] == (len(bundle.manifest.blocks[0].tensors) if version else 0)
    np.testing.assert_allclose(logits_of(model, x, bundle), predictor.run_with(session, x).logits, atol=1e-3)


@pytest.mark.parametrize(
    ("version", "out", "error", "says"),
    [
        ("7", "x.pth", NotFoundError, "there are 0, 1"),
        ("1", "x.onnx", ConfigError, "safetensors"),
        ("1", "none/x.pth", ConfigError, "cannot be written"),
        ("1", "none/x.safetensors", ConfigError, "cannot be written"),
    ],
)
def test_what_cannot_be_exported_is_named(
    bundle_path: Path, state: Path, tmp_path: Path, version: str, out: str, error: type[Exception], says: str
) -> None:
    """A version that is not there, another kind of file, and a folder that is not there are errors that say so."""
    command = ["export", str(bundle_path), version, "--state", str(state), "--out", str(tmp_path / out)]
    found = CliRunner().invoke(app, command).exception

    assert isinstance(found, error)
    assert says in str(found)


def test_a_damaged_version_is_not_exported(bundle_path: Path, state: Path, tmp_path: Path) -> None:
    """Weights that do not have their checksum are not written as if they had."""
    path = state / "versions" / "000001" / "delta.safetensors"
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    command = ["export", str(bundle_path), "1", "--state", str(state), "--out", str(tmp_path / "x.pth")]

    assert isinstance(CliRunner().invoke(app, command).exception, DeltaError)
    assert not (tmp_path / "x.pth").exists()


def test_labelled_images_are_there_to_train_on(
    start_daemon: Callable[..., DaemonProcess], bundle_path: Path, tmp_path: Path
) -> None:
    """With --labels the images whose class was named come with their classes, while the daemon runs."""
    daemon = start_daemon(mode="off")
    x, y = digits("stream", 30, seed=8)
    with daemon.client() as client:
        ids = client.predict(x).prediction_ids
        client.label(ids[:20], y[:20].tolist())
        client.label(ids[20:], correct=[True] * 10)
    out = tmp_path / "labels.npz"
    state = str(daemon.folder / "state")
    command = ["export", str(bundle_path), "--labels", "--state", state, "--out", str(out), "--json"]

    told = json.loads(CliRunner().invoke(app, command).stdout)
    found, classes, names = read_labelled(out, (32, 32, 3), "crop")

    np.testing.assert_array_equal(found, x[:20])
    assert classes.tolist() == y[:20].tolist()
    assert names == [str(i) for i in range(10)]
    assert told["images"] == 20
    assert sum(told["classes"].values()) == 20


def test_export_wants_a_version_or_labels(bundle_path: Path, tmp_path: Path) -> None:
    """Neither, both, another suffix, a folder without labels: each one clear error."""
    base = ["export", str(bundle_path), "--out"]
    for arguments, message in (
        ([str(tmp_path / "a.npz")], "name a version, or --labels"),
        ([str(tmp_path / "a.npz"), "--labels", "1"], "name a version, or --labels"),
        ([str(tmp_path / "a.pth"), "--labels"], "are written as .npz"),
        ([str(tmp_path / "a.npz"), "--labels", "--state", str(tmp_path)], "labels.sqlite cannot be read"),
    ):
        failed = CliRunner().invoke(app, [*base, *arguments])
        assert isinstance(failed.exception, ConfigError)
        assert message in str(failed.exception)
    assert list(tmp_path.glob("*.npz")) == []


def test_labels_of_another_bundle_are_not_exported(bundle: Bundle, bundle_path: Path, tmp_path: Path) -> None:
    """Labels are indices of one bundle's classes: a state folder of another is refused."""
    store = Store(tmp_path / "state", "0" * 64)
    store.save_state({})
    command = [
        "export",
        str(bundle_path),
        "--labels",
        "--state",
        str(store.root),
        "--out",
        str(tmp_path / "a.npz"),
    ]

    failed = CliRunner().invoke(app, command)

    assert isinstance(failed.exception, ConfigError)
    assert f"belongs to another bundle (000000000000…) than {bundle_path} ({bundle.sha256[:12]}…)" in str(
        failed.exception
    )
