"""The predictor: new weights are really served, and bad ones never."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from tta.bundle import Bundle, check_delta
from tta.devices import device_of, n_gpus
from tta.errors import BundleError, DeltaError, DeviceError
from tta.server.predictor import Predictor


def write_version(
    folder: Path, bundle: Bundle, delta: dict, probe_x: np.ndarray, logits: np.ndarray, number: int = 1
) -> Path:
    """A version's folder as the store writes it."""
    folder.mkdir()
    save_file({k: np.ascontiguousarray(v) for k, v in delta.items()}, folder / "delta.safetensors")
    save_file({"x": probe_x, "logits": logits.astype(np.float32)}, folder / "probe.safetensors")
    sha = {
        n: hashlib.sha256((folder / n).read_bytes()).hexdigest()
        for n in ("delta.safetensors", "probe.safetensors")
    }
    manifest = {
        "version": number,
        "bundle_sha256": bundle.sha256,
        "block": "block1",
        "start": "source",
        "created_s": 0.0,
        "sha256": sha,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def changed(bundle: Bundle, model: torch.nn.Module, block: str, x: np.ndarray) -> tuple[dict, np.ndarray]:
    """A random delta of one block and what torch computes with it."""
    rng = np.random.default_rng(0)
    delta = {
        n: (bundle.weights[n] * (1 + 0.2 * rng.random(bundle.weights[n].shape))).astype(np.float32)
        for n in bundle.manifest.block(block).tensors
    }
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.load_state_dict({n: torch.from_numpy(v) for n, v in delta.items()}, strict=False)
    try:
        with torch.inference_mode():
            logits = model(torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255).numpy()
    finally:
        model.load_state_dict(before)
    return delta, logits


@pytest.mark.parametrize("block", ["block1", "block3", "head"])
def test_a_version_computes_what_torch_computes(
    bundle: Bundle, digits_model: torch.nn.Module, stream: tuple, tmp_path: Path, device: str, block: str
) -> None:
    """After a swap the served logits are torch's with the new weights, for early, late and last blocks."""
    x = stream[0][:24]
    delta, logits = changed(bundle, digits_model, block, x)
    predictor = Predictor(bundle, device, max_batch_size=16)
    predictor.activate(predictor.prepare())
    old = predictor.run(x).logits

    predictor.activate(predictor.prepare(write_version(tmp_path / "v", bundle, delta, x, logits)))
    new = predictor.run(x)

    tolerance = 1e-3 if device == "cpu" else 1e-2
    assert new.version == 1
    assert np.abs(new.logits - logits).max() < tolerance * np.abs(logits).max()
    assert np.abs(new.logits - old).max() > 10 * np.abs(new.logits - logits).max()


def test_rows_do_not_depend_on_the_batch(bundle: Bundle, stream: tuple) -> None:
    """An image has bit-identical logits alone and in a batch."""
    predictor = Predictor(bundle, "cpu")
    predictor.activate(predictor.prepare())
    x = stream[0][:9]

    together = predictor.run(x).logits

    assert all(np.array_equal(predictor.run(x[i : i + 1]).logits[0], together[i]) for i in range(9))


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda d: {**d, "nobody.weight": np.zeros(3, np.float32)}, "nobody.weight"),
        (lambda d: {n: v[..., None] for n, v in d.items()}, "delta's"),
        (lambda d: {n: v.astype(np.float64) for n, v in d.items()}, "float64"),
        (lambda d: {n: np.full_like(v, np.nan) for n, v in d.items()}, "NaN"),
    ],
)
def test_a_delta_that_does_not_fit_is_refused(bundle: Bundle, spoil, text: str) -> None:
    """Unknown names, other shapes or dtypes and NaN are refused before a session is built."""
    good = {n: bundle.weights[n].copy() for n in bundle.manifest.block("head").tensors}

    with pytest.raises(DeltaError, match=text):
        check_delta(bundle, spoil(good))


def test_a_version_that_computes_something_else_is_refused(
    bundle: Bundle, digits_model: torch.nn.Module, stream: tuple, tmp_path: Path
) -> None:
    """A version whose probe logits differ from the adapter's record never becomes current."""
    x = stream[0][:16]
    delta, logits = changed(bundle, digits_model, "head", x)
    predictor = Predictor(bundle, "cpu")

    with pytest.raises(DeltaError, match="differs from the adapter"):
        predictor.prepare(write_version(tmp_path / "v", bundle, delta, x, logits + 0.5))


def test_a_changed_file_is_refused(
    bundle: Bundle, digits_model: torch.nn.Module, stream: tuple, tmp_path: Path
) -> None:
    """A delta that does not match its manifest's checksum is refused by name."""
    x = stream[0][:16]
    delta, logits = changed(bundle, digits_model, "head", x)
    folder = write_version(tmp_path / "v", bundle, delta, x, logits)
    data = bytearray((folder / "delta.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "delta.safetensors").write_bytes(data)

    with pytest.raises(DeltaError, match=r"delta\.safetensors"):
        Predictor(bundle, "cpu").prepare(folder)


def test_half_precision_serves_the_same_classes_and_new_weights(
    bundle: Bundle, digits_model: torch.nn.Module, stream: tuple, tmp_path: Path, device: str
) -> None:
    """In fp16 source and version answer as in fp32; a version is checked against the adapter's float32 logits."""
    x = stream[0][:24]
    delta, logits = changed(bundle, digits_model, "block2", x)
    folder = write_version(tmp_path / "v", bundle, delta, x, logits)
    whole, half = (Predictor(bundle, device, precision=p) for p in ("fp32", "fp16"))

    for predictor in (whole, half):
        predictor.activate(predictor.prepare())
    before = [p.run(x) for p in (whole, half)]
    half.activate(half.prepare(folder))
    after = half.run(x)

    assert (before[0].logits.argmax(1) == before[1].logits.argmax(1)).mean() >= 0.95
    assert np.abs(before[0].features - before[1].features).max() < 0.1 * np.abs(before[0].features).max()
    assert 0 < np.abs(before[0].logits - before[1].logits).max() < 0.05 * np.abs(before[0].logits).max()
    assert np.abs(after.logits - logits).max() < 0.05 * np.abs(logits).max()


def test_half_precision_needs_such_a_graph(bundle: Bundle) -> None:
    """A bundle packaged without --fp16 refuses precision: fp16 and says how to get it."""
    with pytest.raises(BundleError, match="package with --fp16"):
        Predictor(replace(bundle, graph_fp16=None), "cpu", precision="fp16")


def test_a_batch_does_not_change_the_one_before(bundle: Bundle, stream: tuple) -> None:
    """Results stay what they were while later batches of the same size are computed, as the frontend needs."""
    predictor = Predictor(bundle, "cpu")
    predictor.activate(predictor.prepare())
    first = predictor.run(stream[0][:8])
    kept = first.logits.copy(), first.features.copy()

    predictor.run(stream[0][8:16])

    assert np.array_equal(first.logits, kept[0])
    assert np.array_equal(first.features, kept[1])


def test_servers_take_the_gpus_in_turn() -> None:
    """With two GPUs three servers run on first, second and first; without one on what was asked for."""
    assert [device_of("auto", number, 2) for number in range(3)] == ["auto:0", "auto:1", "auto:0"]
    assert [device_of(kind, 1, 2) for kind in ("cuda", "cpu")] == ["cuda:1", "cpu"]
    assert [device_of(kind, 1, 0) for kind in ("auto", "cuda", "cpu")] == ["auto", "cuda", "cpu"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_variable_makes_no_gpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA_VISIBLE_DEVICES set on a machine without a GPU leaves device: auto on the CPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")

    assert n_gpus() == 0
    assert Predictor(bundle, "auto").device == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_a_clear_error(bundle: Bundle) -> None:
    """Asking for CUDA where there is none says so and what to set instead."""
    with pytest.raises(DeviceError, match="device: auto or cpu"):
        Predictor(bundle, "cuda")


def test_nothing_is_reported_to_anybody(bundle_path: Path, tmp_path: Path) -> None:
    """A process that serves leaves no trace of onnxruntime's telemetry, which keeps its state in the cache."""
    code = (
        "from pathlib import Path; from tta.bundle import load_bundle\n"
        "from tta.server.predictor import Predictor\n"
        f"Predictor(load_bundle(Path({str(bundle_path)!r})), 'cpu', 1).prepare(None)"
    )
    silenced = ("CI", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")  # it is silent by itself where the first is set
    environment = {k: v for k, v in os.environ.items() if k not in silenced}
    environment["HOME"] = str(tmp_path)

    subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=True)

    assert not list(tmp_path.rglob("*onnxruntime*"))
