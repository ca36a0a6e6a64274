"""Bundles: a damaged one is never served."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest

from tta.bundle import Bundle, load_bundle
from tta.errors import BundleError


@pytest.fixture
def unpacked(bundle_path: Path, tmp_path: Path) -> Path:
    """The bundle as a directory."""
    with zipfile.ZipFile(bundle_path) as archive:
        archive.extractall(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_a_directory_and_a_zip_are_the_same_bundle(bundle: Bundle, unpacked: Path) -> None:
    """A bundle unpacked into a directory has the same identity."""
    assert load_bundle(unpacked).sha256 == bundle.sha256


@pytest.mark.parametrize(
    "name", ["model.onnx", "weights.safetensors", "reference.safetensors", "anchor.safetensors"]
)
def test_one_flipped_bit_is_noticed(unpacked: Path, name: str) -> None:
    """A single changed bit in any file is refused with the file's name."""
    data = bytearray((unpacked / name).read_bytes())
    data[len(data) // 2] ^= 1
    (unpacked / name).write_bytes(data)

    with pytest.raises(BundleError, match=name):
        load_bundle(unpacked)


def test_a_truncated_zip_is_refused(bundle_path: Path, tmp_path: Path) -> None:
    """A zip cut short is an error that says to copy it again."""
    short = tmp_path / "short.tta"
    short.write_bytes(bundle_path.read_bytes()[:-2000])

    with pytest.raises(BundleError, match="again"):
        load_bundle(short)


def test_a_missing_file_is_named(unpacked: Path) -> None:
    """A bundle without its weights says so."""
    (unpacked / "weights.safetensors").unlink()

    with pytest.raises(BundleError, match=r"weights\.safetensors"):
        load_bundle(unpacked)


def test_a_bundle_of_another_format_is_refused(unpacked: Path) -> None:
    """A manifest of a later format is not guessed at."""
    manifest = unpacked / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 3', '"format": 99'))

    with pytest.raises(BundleError, match="format 99"):
        load_bundle(unpacked)


def test_a_way_to_resize_that_there_is_not_is_refused(unpacked: Path) -> None:
    """A manifest of a later release, or a damaged one, is told apart from a fault of ours."""
    manifest = json.loads((unpacked / "manifest.json").read_text())
    (unpacked / "manifest.json").write_text(json.dumps({**manifest, "resize": "fold"}))

    with pytest.raises(BundleError, match="resize 'fold' is none of crop, stretch: package again"):
        load_bundle(unpacked)


def test_nothing_there_says_what_to_do(tmp_path: Path) -> None:
    """A path without a bundle points at `tta package`."""
    with pytest.raises(BundleError, match="tta package"):
        load_bundle(tmp_path / "none.tta")
    shutil.rmtree(tmp_path)
