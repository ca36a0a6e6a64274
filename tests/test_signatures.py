"""Signed bundles and versions: what nobody vouches for is not served."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save
from typer.testing import CliRunner

from tests.daemon.test_memory import delta
from tests.rebundle import rebundle
from tests.traffic import Traffic, status
from tests.waiting import until
from tta.bundle import check_signed, load_bundle, sign_bundle, source_is_importable
from tta.commands import app
from tta.config import load_config
from tta.daemon.deployment import former_folder
from tta.daemon.store import Store, sign_version
from tta.errors import BundleError, ConfigError, DeltaError
from tta.packaging.digits import corrupt, digits
from tta.scenario import DaemonProcess
from tta.signatures import SIGNATURES, SigningKey, signer_of, signers_of_versions, write_signing_key
from tta.versions import hash_of, load_version


@pytest.fixture
def key(tmp_path: Path) -> SigningKey:
    """A key, whose PEM file is `alice.pem`."""
    return SigningKey(write_signing_key(tmp_path, "alice")[1])


@pytest.fixture
def other(tmp_path: Path) -> SigningKey:
    """Another's."""
    return SigningKey(write_signing_key(tmp_path, "mallory")[1])


@pytest.fixture(params=["file", "folder"])
def own_bundle(request: pytest.FixtureRequest, bundle_path: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, as a `.tta` file and unpacked."""
    if request.param == "file":
        return Path(shutil.copy(bundle_path, tmp_path / "own.tta"))
    with zipfile.ZipFile(bundle_path) as archive:
        archive.extractall(tmp_path / "own")
    return tmp_path / "own"


def forge(folder: Path) -> None:
    """Change a version's weights and write their hash into its manifest, as somebody without the key would."""
    weights = save({name: array + 1 for name, array in load_file(folder / "delta.safetensors").items()})
    (folder / "delta.safetensors").write_bytes(weights)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"]["delta.safetensors"] = hash_of(weights)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_signed_bundle_keeps_its_identity_and_names_its_signers(
    own_bundle: Path, key: SigningKey, other: SigningKey
) -> None:
    """Two may sign one bundle, each is found, and its sha256 stays what it was."""
    before = load_bundle(own_bundle).sha256
    sign_bundle(own_bundle, key)
    sign_bundle(own_bundle, other)
    sign_bundle(own_bundle, key)

    signed = load_bundle(own_bundle)
    assert signed.sha256 == before
    assert check_signed(signed, {"alice": key.public}) == "alice"
    assert check_signed(signed, {"mallory": other.public}) == "mallory"


def test_a_bundle_that_nobody_trusted_has_signed_is_refused(
    own_bundle: Path, key: SigningKey, other: SigningKey
) -> None:
    """No signature, another's, and one for another manifest are refused with the names of who may."""
    trusted = {"alice": key.public}
    with pytest.raises(BundleError, match="alice"):
        check_signed(load_bundle(own_bundle), trusted)
    sign_bundle(own_bundle, other)
    with pytest.raises(BundleError, match="alice"):
        check_signed(load_bundle(own_bundle), trusted)
    line = key.sign("bundle", hash_of(b"another manifest"))
    assert signer_of("bundle", load_bundle(own_bundle).sha256, line.encode(), trusted) is None


def test_a_versions_signature_is_none_of_a_bundle(key: SigningKey) -> None:
    """The same hash signed as a version does not vouch for a bundle."""
    lines = key.sign("version", "ab" * 32).encode()

    assert signer_of("version", "ab" * 32, lines, {"alice": key.public}) == "alice"
    assert signer_of("bundle", "ab" * 32, lines, {"alice": key.public}) is None


@pytest.mark.parametrize("lines", [b"", b"\xff\xfe", b"AAAA\n", b"=\n" * 100, b"a" * 100_000])
def test_what_is_no_signature_vouches_for_nothing(lines: bytes, key: SigningKey) -> None:
    """Damaged signature files are no error and no signature."""
    assert signer_of("bundle", "ab" * 32, lines, {"alice": key.public}) is None


def test_openssl_agrees(tmp_path: Path, key: SigningKey) -> None:
    """A signature verifies with the public PEM file and OpenSSL alone."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl")
    (tmp_path / "message").write_bytes(b"tta bundle " + b"ab" * 32 + b"\n")
    (tmp_path / "signature").write_bytes(base64.b64decode(key.sign("bundle", "ab" * 32)))

    subprocess.run(
        [
            *("openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "alice.pub.pem"),
            *("-rawin", "-in", "message", "-sigfile", "signature"),
        ],
        cwd=tmp_path,
        check=True,
    )


def test_versions_are_signed_when_written_and_when_amended(tmp_path: Path, key: SigningKey) -> None:
    """A version verifies at every moment: new, amended, after a crash between its two files."""
    signers = {"alice": key.public}
    store = Store(tmp_path, "hash", key, signers)
    version = store.write(*delta(), "head", "source", 0.0, {}, {})
    assert store.problem(version) == ""

    store.amend(version, verdict={"outcome": "accepted"})
    assert store.problem(version) == ""
    assert store.newest() == version

    folder = store.folder(version)
    assert folder is not None
    sign_version(folder, b"the manifest that was to be written next", key)
    assert store.problem(version) == ""


def test_an_unsigned_version_is_refused_and_amending_does_not_make_it_sound(
    tmp_path: Path, key: SigningKey, other: SigningKey
) -> None:
    """Versions unsigned, signed by another, or changed since are not served, whatever is written beside."""
    signers = signers_of_versions(None, key)
    for strange in (None, other):
        version = Store(tmp_path, "hash", strange).write(*delta(), "head", "source", 0.0, {}, {})
        store = Store(tmp_path, "hash", key, signers)
        assert "signed" in store.problem(version)
        assert store.verified(version) == 0
        store.amend(version, verdict={"outcome": "accepted"})
        assert store.newest() == 0

    version = store.write(*delta(), "head", "source", 0.0, {}, {"outcome": "accepted"})
    folder = store.folder(version)
    assert folder is not None
    forge(folder)
    load_version(folder)  # its hashes are right
    with pytest.raises(DeltaError, match="signed"):
        load_version(folder, signers)
    store.amend(version, report={})
    assert store.verified(version) == 0


def test_a_state_folder_is_signed_for_a_daemon_with_another_key(
    tmp_path: Path, key: SigningKey, other: SigningKey
) -> None:
    """`tta sign STATE` vouches for what verifies, names what does not, and fails if there is any."""
    state = tmp_path / "state"
    store = Store(state, "hash", other)
    sound, damaged = (store.write(*delta(), "head", "source", 0.0, {}, {"outcome": "accepted"}) for _ in range(2))
    (state / "versions" / f"{damaged:06d}" / "delta.safetensors").write_bytes(b"short")

    result = CliRunner().invoke(app, ["sign", str(state), "--with", str(tmp_path / "alice.pem"), "--json"])
    found = json.loads(result.stdout)

    assert result.exit_code == 1
    assert [Path(path).name for path in found["signed"]] == [f"{sound:06d}"]
    assert [Path(path).name for path in found["refused"]] == [f"{damaged:06d}"]
    trusting = Store(state, "hash", key, {"alice": key.public})
    assert (trusting.problem(sound), trusting.newest()) == ("", sound)


def test_versions_of_bundles_that_served_before_are_signed_too(
    tmp_path: Path, key: SigningKey, other: SigningKey
) -> None:
    """`tta sign STATE` vouches for what comes back with a former bundle as well."""
    versions = [
        Store(state, "hash", other).write(*delta(), "head", "source", 0.0, {}, {"outcome": "accepted"})
        for state in (tmp_path, former_folder(tmp_path, "ab" * 32))
    ]

    result = CliRunner().invoke(app, ["sign", str(tmp_path), "--with", str(tmp_path / "alice.pem"), "--json"])

    assert len(json.loads(result.stdout)["signed"]) == 2
    back = Store(former_folder(tmp_path, "ab" * 32), "hash", key, {"alice": key.public})
    assert back.problem(versions[1]) == ""


def test_a_version_in_another_s_place_is_refused(tmp_path: Path, key: SigningKey) -> None:
    """Files of one version, signatures and all, do not serve under the number of another."""
    signers = signers_of_versions(None, key)
    store = Store(tmp_path, "hash", key, signers)
    accepted, candidate = (store.write(*delta(), "head", "source", 0.0, {}, {}) for _ in range(2))
    place, other = store.folder(accepted), store.folder(candidate)
    assert place is not None
    assert other is not None
    for path in other.iterdir():
        shutil.copy(path, place / path.name)

    assert "is version 2" in store.problem(accepted)
    assert store.problem(candidate) == ""


def test_odd_names_among_the_versions_are_left_alone(tmp_path: Path) -> None:
    """Somebody's copy of a version is neither served nor counted nor deleted."""
    store = Store(tmp_path, "hash")
    version = store.write(*delta(), "head", "source", 0.0, {}, {"outcome": "accepted"})
    folder = store.folder(version)
    assert folder is not None
    shutil.copytree(folder, folder.with_name("000001.bak"))

    assert store.numbers() == [0, version]
    assert store.newest() == version
    assert store.retire(set(), keep=0) == []
    assert store.write(*delta(), "head", "source", 0.0, {}, {}) == 2
    assert folder.with_name("000001.bak").is_dir()


def test_a_bundle_with_versions_in_it_is_signed_as_a_bundle(
    bundle_path: Path, tmp_path: Path, key: SigningKey
) -> None:
    """`tta sign` never takes a folder that is a bundle for a state folder: nothing planted in it is signed."""
    with zipfile.ZipFile(bundle_path) as archive:
        archive.extractall(tmp_path / "model")
    planted = Store(tmp_path / "model", load_bundle(bundle_path).sha256)
    version = planted.write(*delta(), "head", "source", 0.0, {}, {"outcome": "accepted"})
    (tmp_path / "model" / "state.json").unlink(missing_ok=True)

    CliRunner().invoke(app, ["sign", str(tmp_path / "model"), "--with", str(tmp_path / "alice.pem")])

    assert check_signed(load_bundle(tmp_path / "model"), {"alice": key.public}) == "alice"
    assert "signed" in Store(tmp_path / "model", "any", key, {"alice": key.public}).problem(version)


def test_asking_for_a_model_s_module_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a source can be imported is found out without importing it, packages of dotted names included."""
    package = tmp_path / "evil"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('it was run')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    assert source_is_importable("evil.net:make")
    assert not source_is_importable("nowhere_to_be_found.net:make")


def test_a_key_to_sign_with_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    """`tta keygen --signing` writes the secret half with mode 600 and never over another."""
    arguments = ["keygen", "alice", "--signing", "--folder", str(tmp_path / "keys"), "--json"]
    made = json.loads(CliRunner().invoke(app, arguments).stdout)

    assert SigningKey(Path(made["secret"])).public == made["key"]
    assert os.stat(made["secret"]).st_mode & 0o777 == 0o600
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, ConfigError)
    assert SigningKey(Path(made["secret"])).public == made["key"]


@pytest.mark.parametrize("content", [b"", b"no key", None])
def test_what_is_no_signing_key_is_an_error_with_its_file(content: bytes | None, tmp_path: Path) -> None:
    """A missing or damaged PEM file is named."""
    path = tmp_path / "bad.pem"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(ConfigError, match=r"bad\.pem"):
        SigningKey(path)


def test_settings_that_would_serve_unsigned_versions_are_refused(key: SigningKey, tmp_path: Path) -> None:
    """Signers without a signing key, and a signer that is no key, are errors that name the setting."""
    with pytest.raises(ConfigError, match="signing_key"):
        load_config(None, {"security.signers": {"alice": key.public}})
    with pytest.raises(ConfigError, match=r"signers\.bob"):
        load_config(
            None, {"security.signers": {"bob": "short"}, "security.signing_key": str(tmp_path / "alice.pem")}
        )


def test_check_says_who_has_signed(bundle_path: Path, tmp_path: Path, key: SigningKey) -> None:
    """`tta check` refuses an unsigned bundle with what to do, and names the signer of a signed one."""
    own = Path(shutil.copy(bundle_path, tmp_path / "own.tta"))
    config = tmp_path / "tta.yaml"
    config.write_text(f"security: {{signers: {{alice: '{key.public}'}}, signing_key: {tmp_path / 'alice.pem'}}}\n")
    command = ["check", str(own), "--config", str(config), "--json"]

    assert isinstance(CliRunner().invoke(app, command).exception, BundleError)
    CliRunner().invoke(app, ["sign", str(own), "--with", str(tmp_path / "alice.pem")])
    assert json.loads(CliRunner().invoke(app, command).stdout)["signed_by"] == "alice"


def test_a_daemon_serves_what_is_signed_and_nothing_forged(
    start_daemon: Callable[..., DaemonProcess], bundle_path: Path, tmp_path: Path, key: SigningKey
) -> None:
    """A daemon with keys cures a shift with versions of its own; one changed on disk is not served."""
    own = Path(shutil.copy(bundle_path, tmp_path / "own.tta"))
    sign_bundle(own, key)
    x, y = digits("stream", 1200, seed=11)
    trust = {"security.signers": {"alice": key.public}, "security.signing_key": str(tmp_path / "alice.pem")}
    daemon = start_daemon(own, **trust)
    traffic = Traffic(daemon, x, y)
    traffic.start()
    try:
        until(lambda: traffic.answered > 100, "clean traffic")
        traffic.show(corrupt(x, "noise", 1), y)
        cured = until(
            lambda: (s := status(daemon)) and s["state"] == "stable" and s["version"] > 0 and s, "the cure", 120
        )
        folder = daemon.folder / "state" / "versions" / f"{cured['version']:06d}"
        assert len((folder / SIGNATURES).read_text().split()) >= 1
        assert daemon.process is not None
        daemon.process.kill()
        daemon.process.wait()
        os.kill(cured["processes"]["server"]["pid"], signal.SIGKILL)
        forge(folder)
        daemon.start()
        answered = traffic.answered
        until(lambda: traffic.answered > answered + 50, "answers by another version")
        assert status(daemon)["version"] != cured["version"]
    finally:
        traffic.stop()

    lost = [line for line in daemon.log_path.read_text().splitlines() if "version_lost" in line]
    assert len(lost) == 1
    assert "is signed neither" in lost[0]


def test_a_bundle_replaced_under_a_daemon_is_not_taken_for_the_one_it_started_with(
    start_daemon: Callable[..., DaemonProcess], bundle_path: Path, tmp_path: Path
) -> None:
    """A server starts again from the copy, whatever lies in the bundle's place; a changed copy is refused."""
    own = Path(shutil.copy(bundle_path, tmp_path / "own.tta"))
    daemon = start_daemon(own)
    other = rebundle(bundle_path, tmp_path / "other.tta", name="others")
    shutil.copy(other, own)
    first = status(daemon)["processes"]["server"]["pid"]
    os.kill(first, signal.SIGKILL)
    until(lambda: (p := status(daemon)["processes"]["server"])["ready"] and p["pid"] != first, "a server", 60)

    (copy,) = (daemon.folder / "state" / "bundles").iterdir()
    copy.rename(tmp_path / "aside.tta")
    shutil.copy(other, copy)
    os.kill(status(daemon)["processes"]["server"]["pid"], signal.SIGKILL)
    until(lambda: "is another bundle" in daemon.log_path.read_text(), "the refusal", 60)
    os.replace(tmp_path / "aside.tta", copy)
    until(lambda: status(daemon)["processes"]["server"]["ready"], "a server", 60)
