"""`tta replay`: recordings through a daemon of their own."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from tests.conftest import DEMO_SETTINGS
from tta.bundle import Bundle
from tta.errors import InputError
from tta.packaging.digits import corrupt, digits
from tta.scenario.replay import UNKNOWN, read_stream


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`tta replay`."""
    command = [sys.executable, "-m", "tta", "replay", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def write_pictures(folder: Path, x: np.ndarray) -> list[str]:
    """As PNG files, named in order."""
    folder.mkdir(parents=True)
    names = [f"{i:04}.png" for i in range(len(x))]
    for name, image in zip(names, x, strict=True):
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(folder / name)
    return names


def test_a_replay_tells_what_would_have_happened(bundle_path: Path, tmp_path: Path) -> None:
    """Clean pictures, then noise: the alarm and the promotion are in the noise, and the report says so."""
    clean, noise = (digits("stream", n, seed=seed) for n, seed in ((300, 41), (1500, 42)))
    np.savez(tmp_path / "clean.npz", x=clean[0], y=clean[1])
    np.savez(tmp_path / "noise.npz", x=corrupt(noise[0], "noise", 1), y=noise[1])
    out = tmp_path / "out"
    settings = [f"--set={key}={json.dumps(value)}" for key, value in DEMO_SETTINGS.items()]

    result = run(
        *(bundle_path, tmp_path / "clean.npz", tmp_path / "noise.npz", "--out", out, "--rate", 200, "--hold"),
        *("--label-share", 0.3, "--label-delay-s", 0, "--json", *settings),
    )
    found: dict[str, Any] = json.loads(result.stdout)
    page = (out / "report.html").read_text()
    parts, last = found["parts"], found["stretches"][-1]

    assert result.returncode == 0
    assert (found["images"], found["answered"], found["mixed_version_replies"]) == (1800, 1800, 0)
    assert [(p["name"], p["images"]) for p in parts] == [("clean", 300), ("noise", 1500)]
    assert [p["alarms"] for p in parts] == [0, 1]
    assert found["promoted"] >= 1
    assert last["version"] > 0
    assert last["reason"] == "promotion"
    assert last["accuracy_served"] > last["accuracy_source"] + 0.15
    assert sum(s["images"] for s in found["stretches"]) == 1800
    assert "data:image/png;base64," in page
    assert f"<td>{100 * parts[1]['accuracy_served']:.1f} %</td>" in page
    assert "swapped" in page


def test_recordings_are_read_in_their_order(bundle: Bundle, tmp_path: Path) -> None:
    """A list, a flat folder and class folders give the pictures in order, with the classes as far as known."""
    x, y = digits("stream", 6, seed=1)
    names = write_pictures(tmp_path / "flat", x)
    for name, label, image in zip(names, y, x, strict=True):
        (tmp_path / "classes" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(
            tmp_path / "classes" / str(label) / name
        )
    with (tmp_path / "list.csv").open("w", newline="") as file:
        rows = [[f"flat/{name}", *([label] if label % 2 else [])] for name, label in zip(names, y, strict=True)]
        csv.writer(file).writerows(rows)
    manifest = bundle.manifest

    listed = read_stream(tmp_path / "list.csv", manifest)
    flat = read_stream(tmp_path / "flat", manifest)
    by_class = read_stream(tmp_path / "classes", manifest)

    for found, _ in (listed, flat, by_class):
        np.testing.assert_array_equal(found, x)
    assert listed[1].tolist() == [label if label % 2 else UNKNOWN for label in y.tolist()]
    assert set(flat[1].tolist()) == {UNKNOWN}
    assert by_class[1].tolist() == y.tolist()


def test_a_recording_that_cannot_be_read_says_why(bundle: Bundle, bundle_path: Path, tmp_path: Path) -> None:
    """A class the model lacks, an empty list, no recording, a folder that is somebody's: one line, status 2."""
    write_pictures(tmp_path / "pictures", digits("stream", 1, seed=1)[0])
    bad = tmp_path / "bad.csv"
    bad.write_text("pictures/0000.png,zebra\n")
    (tmp_path / "empty.csv").touch()
    mine = tmp_path / "earlier"
    write_pictures(mine / "pictures", digits("stream", 1, seed=1)[0])
    (mine / ".tta-replay").touch()

    with pytest.raises(InputError, match=r"'zebra' is no class of the model: it has 0, 1, 2"):
        read_stream(bad, bundle.manifest)
    with pytest.raises(InputError, match=r"empty.csv is empty: write lines PICTURE,CLASS"):
        read_stream(tmp_path / "empty.csv", bundle.manifest)
    with pytest.raises(InputError, match="is no recording"):
        read_stream(tmp_path / "nothing", bundle.manifest)
    for arguments, message in (
        ((bundle_path, tmp_path / "pictures", "--out", tmp_path), "is not empty and holds no earlier replay"),
        ((bundle_path, mine / "pictures", "--out", mine), "pictures lies in it"),
        ((bundle_path, tmp_path / "pictures", "--out", bad), "is not empty and holds no earlier replay"),
        ((bundle_path, tmp_path / "pictures", "--set", "adapt.lables=9"), "did you mean 'adapt.labels'?"),
    ):
        result = run(*arguments)
        assert result.returncode == 2
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert bad.exists()
    assert (mine / "pictures").exists()


def test_indices_and_names_of_classes_are_told_apart(bundle: Bundle, tmp_path: Path) -> None:
    """Classes of an .npz go by their names where it has some, else by index; names the model lacks are refused."""
    x, _ = digits("stream", 3, seed=1)
    shifted = msgspec.structs.replace(bundle.manifest, classes=[str(i) for i in range(1, 11)])
    np.savez(tmp_path / "plain.npz", x=x, y=[0, 1, 9])
    np.savez(tmp_path / "named.npz", x=x, y=[0, 1, 1], classes=["10", "1"])
    np.savez(tmp_path / "strange.npz", x=x, y=[0, 1, 1], classes=["10", "zebra"])
    np.savez(tmp_path / "more.npz", x=x, y=[0, 1, 10])

    assert read_stream(tmp_path / "plain.npz", shifted)[1].tolist() == [0, 1, 9]
    assert read_stream(tmp_path / "named.npz", shifted)[1].tolist() == [9, 0, 0]
    with pytest.raises(InputError, match="'zebra' is no class"):
        read_stream(tmp_path / "strange.npz", shifted)
    with pytest.raises(InputError, match="class 10, the model has 0 to 9"):
        read_stream(tmp_path / "more.npz", shifted)
