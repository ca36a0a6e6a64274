"""What a state folder does when another bundle takes its place: on real files, a crash at every step included."""

import shutil
from pathlib import Path

import pytest

from tests.rebundle import rebundle
from tta.bundle import bundle_sha256, interface_changes, load_bundle
from tta.daemon.deployment import FORMER, HASH_CHARS, RECORD, Deployment, of_a_model
from tta.daemon.files import read_json, write_json
from tta.errors import ConfigError

ITEMS = ("labels.sqlite", "labels.sqlite-wal", "library.json", "regimes", "state.json", "versions")


@pytest.fixture
def other(bundle_path: Path, tmp_path: Path) -> Path:
    """The same model under another name: another bundle."""
    return rebundle(bundle_path, tmp_path / "other.tta", name="other")


def fill(folder: Path, sha256: str) -> None:
    """What a daemon leaves in a state folder, as far as moving it goes; every file says whose it is."""
    (folder / "versions" / "000001").mkdir(parents=True)
    (folder / "regimes").mkdir()
    (folder / "lock").touch()
    for path in (
        *(folder / "labels.sqlite", folder / "labels.sqlite-wal", folder / "library.json"),
        *(folder / "regimes" / "000000.safetensors", folder / "versions" / "000001" / "manifest.json"),
    ):
        path.write_text(sha256)
    write_json(folder / "state.json", {"bundle_sha256": sha256})


def owners(folder: Path) -> set[str]:
    """Whose files lie there, of those that belong to a model."""
    files = [f for found in of_a_model(folder) for f in (found, *found.rglob("*")) if f.is_file()]
    texts = [f.read_text() for f in files if f.name != "state.json"]
    return {*texts, read_json(folder / "state.json")["bundle_sha256"]}


def named(folder: Path) -> set[str]:
    """The model's files and folders there."""
    return {p.name for p in folder.iterdir()} & set(ITEMS)


def test_a_bundle_that_serves_again_finds_what_it_had(bundle_path: Path, other: Path, tmp_path: Path) -> None:
    """Labels, versions and regimes of a bundle are put aside when another is deployed and come back with it."""
    root = tmp_path / "state"
    first, second = bundle_sha256(bundle_path), bundle_sha256(other)
    fill(root, first)
    aside = [root / FORMER / sha[:HASH_CHARS] for sha in (first, second)]

    Deployment(root).claim(second, bundle_path, deploy=True)
    assert named(root) == set()
    assert owners(aside[0]) == {first}
    fill(root, second)
    Deployment(root).claim(first, bundle_path, deploy=True)

    assert named(root) == set(ITEMS)
    assert owners(aside[1]) == {second}
    assert owners(root) == {first}


@pytest.mark.parametrize("step", ["out", "in"])
@pytest.mark.parametrize("moved", range(len(ITEMS) + 1))
def test_a_crash_while_a_model_makes_way_loses_nothing(
    bundle_path: Path, other: Path, tmp_path: Path, step: str, moved: int
) -> None:
    """Wherever a crash leaves the move, the next start finishes it, and each bundle has its own files."""
    root = tmp_path / "state"
    first, second = bundle_sha256(bundle_path), bundle_sha256(other)
    aside, back = (root / FORMER / sha[:HASH_CHARS] for sha in (first, second))
    fill(back, second)  # it has served before
    (back / "lock").unlink()
    fill(root, first)
    record = {"bundle": second, "instead_of": first, "out": first, "step": step}
    if step == "in":
        aside.mkdir()
        for name in ITEMS:
            (root / name).rename(aside / name)
    source, target = (root, aside) if step == "out" else (back, root)
    target.mkdir(exist_ok=True)
    for name in ITEMS[:moved]:
        (source / name).rename(target / name)
    write_json(root / RECORD, record)

    Deployment(root).claim(second, bundle_path, deploy=False)

    assert owners(aside) == {first}
    assert not back.exists()
    assert owners(root) == {second}
    assert named(root) == set(ITEMS)


def test_what_was_deployed_serves_over_a_restart(bundle_path: Path, other: Path, tmp_path: Path) -> None:
    """The copy serves while the configuration names the former bundle or none, and not against a third."""
    root = tmp_path / "state"
    fill(root, bundle_sha256(bundle_path))
    deployment = Deployment(root)
    copy = deployment.keep(other, bundle_sha256(other))
    deployment.claim(bundle_sha256(other), bundle_path, deploy=True)
    fill(root, bundle_sha256(other))

    assert deployment.bundle_in_force(bundle_path) == copy
    assert deployment.bundle_in_force(tmp_path / "gone.tta") == copy
    assert load_bundle(copy).manifest.name == "other"
    assert deployment.bundle_in_force(other) == other
    assert deployment.bundle_in_force(bundle_path, deploy=True) == copy  # as when it was deployed: no way back
    third = rebundle(bundle_path, tmp_path / "third.tta", name="third")
    with pytest.raises(ConfigError, match="neither the bundle deployed last"):
        deployment.bundle_in_force(third)
    assert deployment.bundle_in_force(third, deploy=True) == third

    deployment.claim(bundle_sha256(other), other, deploy=False)
    deployment.settle(bundle_sha256(other), other, 2)  # the configuration has caught up
    assert copy.exists()
    assert not (root / RECORD).exists()
    with pytest.raises(ConfigError, match=r"belongs to another bundle .* start with --deploy"):
        deployment.claim(bundle_sha256(bundle_path), bundle_path, deploy=False)


def test_a_damaged_record_keeps_nothing_down(bundle_path: Path, other: Path, tmp_path: Path) -> None:
    """Without a record the state says whose it is, and the copy of that bundle serves."""
    root = tmp_path / "state"
    first, second = bundle_sha256(bundle_path), bundle_sha256(other)
    fill(root, first)
    deployment = Deployment(root)
    copy = deployment.keep(other, second)
    deployment.claim(second, bundle_path, deploy=True)
    fill(root, second)
    (root / RECORD).write_bytes(b"\0" * 100)

    assert deployment.bundle_in_force(bundle_path) == copy
    deployment.claim(second, bundle_path, deploy=False)
    assert len(deployment.damaged) == 1
    assert list(root.glob(f"{RECORD}.damaged-*"))
    assert owners(root) == {second}


def test_a_bundle_that_never_began_gives_the_folder_back(bundle_path: Path, other: Path, tmp_path: Path) -> None:
    """Where the new bundle's daemon failed before it wrote anything, the former finds everything it had."""
    root = tmp_path / "state"
    first, second = bundle_sha256(bundle_path), bundle_sha256(other)
    fill(root, first)
    deployment = Deployment(root)
    deployment.claim(second, bundle_path, deploy=True)
    (root / "versions").mkdir()

    deployment.claim(first, bundle_path, deploy=True)
    deployment.discard(second)

    assert not (root / FORMER / second[:HASH_CHARS]).exists()
    assert named(root) == set(ITEMS)
    deployment.settle(first, bundle_path, 2)
    assert owners(root) == {first}


def test_an_empty_folder_takes_back_what_was_put_aside(bundle_path: Path, other: Path, tmp_path: Path) -> None:
    """Also without a record, and with files in the way, which are set aside and not overwritten."""
    root = tmp_path / "state"
    first, second = bundle_sha256(bundle_path), bundle_sha256(other)
    fill(root, first)
    deployment = Deployment(root)
    deployment.claim(second, other, deploy=True)
    deployment.settle(second, other, 2)
    assert not (root / RECORD).exists()
    (root / "versions").mkdir()
    (root / "labels.sqlite").write_text(second)

    deployment.claim(first, bundle_path, deploy=True)

    assert (root / "labels.sqlite").read_text() == first
    assert (root / "versions" / "000001" / "manifest.json").read_text() == first
    assert [p.read_text() for p in root.glob("labels.sqlite.damaged-*")] == [second]


def test_a_bundle_that_is_a_folder_is_copied_whole(bundle_path: Path, tmp_path: Path) -> None:
    """A copy is the same bundle; one that is there already is not made again; a half-made one is replaced."""
    root = tmp_path / "state"
    root.mkdir()
    folder = tmp_path / "folder"
    shutil.unpack_archive(bundle_path, folder, "zip")
    deployment = Deployment(root)
    sha256 = bundle_sha256(folder)
    copy = deployment.keep(folder, sha256)
    assert load_bundle(copy).sha256 == sha256

    before = (copy / "manifest.json").stat().st_mtime_ns
    assert deployment.keep(folder, sha256) == copy
    assert (copy / "manifest.json").stat().st_mtime_ns == before
    for broken in ("manifest.json", "weights.safetensors"):
        (copy / broken).write_bytes(b"\0" * 100)
        assert load_bundle(deployment.keep(folder, sha256)).sha256 == sha256


def test_only_the_last_former_bundles_are_kept(bundle_path: Path, tmp_path: Path) -> None:
    """Beyond those that served last state and copies go; what serves stays, and so do strangers' files."""
    root = tmp_path / "state"
    paths = [rebundle(bundle_path, tmp_path / f"{n}.tta", name=f"model{n}") for n in range(4)]
    deployment = Deployment(root)
    root.mkdir()
    (root / "notes.txt").write_text("the operator's")
    copy = bundle_path
    for path in paths:
        copy = deployment.keep(path, bundle_sha256(path))
        deployment.claim(bundle_sha256(path), bundle_path, deploy=True)
        fill(root, bundle_sha256(path))

    gone = deployment.settle(bundle_sha256(paths[-1]), bundle_path, 2)

    assert gone == [bundle_sha256(paths[0])[:HASH_CHARS]]
    kept = {p.name for p in (root / FORMER).iterdir()}
    assert kept == {bundle_sha256(p)[:HASH_CHARS] for p in paths[1:3]}
    assert [p.name for p in (root / "bundles").iterdir()] == [copy.name]
    assert (root / "notes.txt").read_text() == "the operator's"


def test_clients_are_told_what_changes_for_them(bundle_path: Path, tmp_path: Path) -> None:
    """Another name changes nothing for clients; other classes, their order, and another recipe do."""
    old = load_bundle(bundle_path).manifest
    swapped = [old.classes[1], old.classes[0], *old.classes[2:]]

    def changes(**fields: object) -> list[str]:
        return interface_changes(old, load_bundle(rebundle(bundle_path, tmp_path / "new.tta", **fields)).manifest)

    assert changes(name="other") == []
    assert changes(classes=[*old.classes[:9], "ten"]) == ["10 classes, without 9 and with ten"]
    assert changes(classes=swapped) == ["10 classes, in another order"]
    (recipe,) = changes(resize="stretch" if old.resize == "crop" else "crop")
    assert recipe.startswith("preprocessing is ")
