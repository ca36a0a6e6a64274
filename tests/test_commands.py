"""The commands, as a user types them, against a real daemon."""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests.traffic import status
from tests.waiting import until
from tta.commands import app
from tta.packaging.digits import KWARGS, digits
from tta.scenario import DaemonProcess


def tta(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    return subprocess.run(
        [sys.executable, "-m", "tta", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
    )


def answer(*arguments: object) -> object:
    """Run a command with --json and parse what it printed."""
    result = tta(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture
def daemon(start_daemon: Callable[..., DaemonProcess]) -> DaemonProcess:
    """A running daemon."""
    return start_daemon()


def test_package_check_and_look(digits_model: torch.nn.Module, tmp_path: Path) -> None:
    """`tta package` from a checkpoint and an .npz makes a bundle that `tta check` loads and warms."""
    torch.save({"state_dict": digits_model.state_dict()}, tmp_path / "model.pth")
    x, y = digits("reference", 800, seed=5)
    np.savez(tmp_path / "reference.npz", x=x, y=y)

    made = answer(
        "package", "timm:resnet18", "--kwargs", json.dumps(KWARGS), "--checkpoint", tmp_path / "model.pth",
        "--reference", tmp_path / "reference.npz", "--image-size", "32x32", "--mean", "0,0,0", "--std", "1,1,1",
        "--arl", 5000, "--out", tmp_path / "model.tta",
    )  # fmt: skip
    checked = answer("check", tmp_path / "model.tta")

    assert [b["name"] for b in made["blocks"]] == ["block1", "block2", "block3", "block4", "head"]
    assert made["reference_accuracy"] > 0.9
    assert not any("reference images" in w for w in made["warnings"])  # 800 will do for an arl of 5,000
    assert made["diagnosis"]["right"] > 0.8
    assert checked["anchor_accuracy"] > 0.9


def test_a_user_s_session(daemon: DaemonProcess, tmp_path: Path) -> None:
    """Predict pictures from a folder, label them, ask, look at status and versions, pause and resume."""
    x, y = digits("stream", 20, seed=6)
    for i in range(20):
        folder = tmp_path / str(y[i])
        folder.mkdir(exist_ok=True)
        Image.fromarray(x[i]).resize((64, 64)).save(folder / f"{i:02d}.png")

    predicted = answer("predict", tmp_path, "--endpoint", daemon.endpoint)
    pairs = [f"{p['prediction_id']}={Path(p['file']).parent.name}" for p in predicted[:12]]
    labelled = answer("label", *pairs, "--control", daemon.control)
    judged = answer("label", f"{predicted[12]['prediction_id']}=correct", "--control", daemon.control)
    asked = answer("ask", "-n", 5, "--control", daemon.control)
    status = answer("status", "--control", daemon.control)
    shown = tta("status", "--control", daemon.control)

    assert len(predicted) == 20
    assert {p["version"] for p in predicted} == {0}
    assert np.mean([p["class"] == Path(p["file"]).parent.name for p in predicted]) > 0.8
    assert set(labelled.values()) | set(judged.values()) == {"joined"}
    assert len(asked) == 5
    assert not {a["prediction_id"] for a in asked} & {p["prediction_id"] for p in predicted[:13]}
    assert status["labels_buffered"] == 13
    assert status["samples"] == 20
    assert "stable, version 0" in shown.stdout
    assert answer("pause", "--control", daemon.control) == {"paused": True}
    assert answer("status", "--control", daemon.control)["paused"] is True
    assert answer("resume", "--control", daemon.control) == {"paused": False}
    assert [v["version"] for v in answer("versions", "--control", daemon.control)] == [0]


def test_labels_nobody_can_place(daemon: DaemonProcess) -> None:
    """An unknown prediction is reported and fails the command; a class that is not there is refused."""
    unknown = tta("label", "1234=3", "--control", daemon.control)
    no_class = tta("label", "1234=eleven", "--control", daemon.control)
    out_of_range = tta("label", "1234=10", "--control", daemon.control)

    assert (unknown.returncode, unknown.stdout.strip()) == (1, "1234: unknown")
    assert no_class.returncode == 2
    assert "'eleven' is no class" in no_class.stderr
    assert out_of_range.returncode == 2
    assert "label 10 is not a class" in out_of_range.stderr


def test_operations_out_of_place(daemon: DaemonProcess) -> None:
    """Rollback without a version before, approve without a proposal, accept without a shift are refused."""
    for arguments, text in (
        (("rollback",), "nothing to roll back to"),
        (("rollback", "7"), "no version 7"),
        (("approve",), "no candidate"),
        (("accept",), "no shift to accept"),
        (("adapt",), "at least 16 are needed"),
    ):
        result = tta(*arguments, "--control", daemon.control)
        assert result.returncode == 2, arguments
        assert text in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("serve", "nothing.tta"), "nothing.tta"),
        (("serve", "--set", "server.treads=2"), "did you mean 'server.threads'"),
        (("serve", "--set", "server.threads=0"), "server.threads = 0"),
        (("serve", "--set", "oops"), "KEY=VALUE"),
        (("check", "nothing.tta"), "tta package"),
        (("package", "timm:nope", "--reference", ".", "--out", "x"), "no model 'nope'"),
        (("package", "resnet18", "--reference", ".", "--out", "x"), "timm:NAME"),
        (("package", "timm:resnet18", "--kwargs", "{", "--reference", ".", "--out", "x"), "not JSON"),
        (("predict", "nowhere", "--endpoint", "tcp://127.0.0.1:9"), "does not exist"),
        (("serve", "--set", "adapt.learning_rates=[0.1"), "not YAML"),
        (("serve", "--set", "server.endpoint=127.0.0.1:5555"), "server.endpoint"),
        (("serve", "--set", "labels.capacity=20"), "twice adapt.labels"),
        (("package", "timm:resnet18", "--kwargs", "[4]", "--reference", ".", "--out", "x"), "JSON object"),
        (("package", "json:loads", "--reference", ".", "--out", "x"), "raised TypeError"),
        (("status", "--control", "127.0.0.1:5556"), "tcp://HOST:PORT"),
        (("status", "--control", "tcp://127.0.0.1:9", "--timeout-s", "0.2"), "is tta serving?"),
    ],
)
def test_bad_input_gives_one_line_and_status_2(arguments: tuple[str, ...], text: str, tmp_path: Path) -> None:
    """Each kind of bad input on the command line is one clear line on standard error and exit status 2."""
    result = tta(*arguments, cwd=tmp_path)

    assert result.returncode == 2
    assert text in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


AWAY = ("--control", "tcp://127.0.0.1:9", "--timeout-s", "0.2")  # where nobody listens
BAD = {  # of every command that takes arguments of its own
    "ask": AWAY,
    "bench": ("--endpoint", "tcp://127.0.0.1:9", "--timeout-s", "0.2"),
    "check": ("nothing.tta",),
    "demo": ("--folder", "/dev/null/demo"),
    "deploy": ("new.tta", *AWAY),
    "erase": (),
    "export": ("nothing.tta", "--out", "x.safetensors"),
    "keygen": ("../name", "--folder", "keys"),
    "label": ("1=1", *AWAY),
    "package": ("timm:nope", "--reference", ".", "--out", "x"),
    "predict": ("nowhere.png",),
    "replay": ("nothing.tta", "nothing.npz"),
    "rollback": ("7", *AWAY),
    "serve": ("nothing.tta",),
    "sign": ("nothing.tta", "--with", "nothing.pem"),
    **dict.fromkeys(("accept", "adapt", "approve", "pause", "reset", "resume", "status", "versions"), AWAY),
    "top": ("--json", *AWAY),
}


@pytest.mark.parametrize("command", sorted(BAD))
def test_every_command_says_what_is_wrong_with_its_input(command: str, tmp_path: Path) -> None:
    """Bad input on each command is one clear line on standard error and a status that is not zero."""
    result = tta(command, *BAD[command], cwd=tmp_path)

    assert result.returncode not in (0, None)
    assert result.stderr.splitlines()[-1].startswith("tta: ")
    assert "Traceback" not in result.stderr


def test_no_command_is_left_out() -> None:
    """The table of bad inputs has every command there is."""
    assert set(BAD) == {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}


def test_a_port_in_use_stops_the_start(daemon: DaemonProcess, bundle_path: Path, tmp_path: Path) -> None:
    """A daemon whose port is taken ends with status 2, names the setting, and leaves no process behind."""
    for key, value in (
        ("server.endpoint", daemon.endpoint),
        ("daemon.control", daemon.control),
        ("daemon.http", daemon.http),
    ):
        other = DaemonProcess(bundle_path, tmp_path / key, {key: value})
        result = subprocess.run(other.argv, capture_output=True, text=True, timeout=120)
        assert result.returncode == 2, key
        assert value.removeprefix("tcp://").partition(":")[2] in result.stderr.splitlines()[-1]
    with daemon.client() as client:
        assert client.ready()


def test_a_changed_bundle_is_not_served(bundle_path: Path, tmp_path: Path) -> None:
    """A bundle whose checksum is wrong stops `tta serve` with the file's name."""
    with zipfile.ZipFile(bundle_path) as archive:
        archive.extractall(tmp_path / "b")
    with (tmp_path / "b" / "weights.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")

    result = tta("serve", tmp_path / "b", "--state", tmp_path / "s")

    assert result.returncode == 2
    assert "weights.safetensors" in result.stderr


def test_a_narrow_terminal_cuts_nothing_off() -> None:
    """On 40 columns a table's long last column goes on in the next lines, and every other is whole."""
    code = (
        "from tta.commands.output import print_table; print_table(['version', 'gate'], [[123456, 'word ' * 30]])"
    )

    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "COLUMNS": "40"}
    )

    assert "version" in result.stdout
    assert "123456" in result.stdout
    assert result.stdout.count("word") == 30


def test_a_block_the_model_lacks_is_not_tuned(bundle_path: Path, tmp_path: Path) -> None:
    """A selection that is no block of the model stops `tta serve` before it listens, and lists the model's."""
    settings = tmp_path / "c.yaml"
    settings.write_text(f"state: {tmp_path / 'state'}\nadapt: {{selection: layer9}}\n")

    result = tta("serve", bundle_path, "--config", settings)

    assert result.returncode == 2
    assert "adapt.selection = 'layer9'" in result.stderr
    assert "block1, block2" in result.stderr


def test_http_shows_metrics_and_health(daemon: DaemonProcess) -> None:
    """/metrics parses, counts what was sent and weighs processes; /livez and /readyz say ok; else: not found."""
    x, _ = digits("stream", 30, seed=8)
    with daemon.client() as client:
        for i in range(30):
            client.predict(x[i])

    def fetch(path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{daemon.http}{path}", timeout=10) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    until(lambda: "tta_images_total 30.0" in fetch("/metrics")[1], "the server's counters", 10)
    families = {f.name: f for f in text_string_to_metric_families(fetch("/metrics")[1])}

    assert sum(s.value for s in families["tta_requests"].samples if s.labels.get("code") == "ok") == 30
    assert {s.labels["block"] for s in families["tta_drift_statistic"].samples} == {
        "block1", "block2", "block3", "block4", "head",
    }  # fmt: skip
    memory = {s.labels["process"]: s.value for s in families["tta_process_memory_bytes"].samples}
    resident = Path(f"/proc/{status(daemon)['processes']['server']['pid']}/status").read_text()
    kilobytes = next(int(line.split()[1]) for line in resident.splitlines() if line.startswith("VmRSS"))
    assert memory["server"] == pytest.approx(1024 * kilobytes, rel=0.2)
    assert memory["daemon"] > 0
    assert memory["shadow"] > 0
    assert memory["adapter"] == 0  # there is none
    assert all(name.startswith("tta_") for name in families)
    assert fetch("/livez") == (200, "ok\n")
    assert fetch("/readyz") == (200, "ok\n")
    assert fetch("/admin")[0] == 404
