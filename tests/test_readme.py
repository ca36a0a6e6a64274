"""The README tells the truth: its commands run, its blocks are the code's."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tta import protocol
from tta.packaging.digits import write_pictures

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)([^\n]*)\n(.*?)^```", README, re.M | re.S)
SKIPPED = (
    "python3 -m venv",
    "pip install",
)  # the demo has a test of its own; installing is how this test came to run


@pytest.fixture
def workplace(bundle_path: Path, tmp_path: Path) -> Iterator[dict]:
    """A folder with the demo's bundle, in which background processes are ended afterwards."""
    (tmp_path / "tta-demo").mkdir()
    shutil.copy(bundle_path, tmp_path / "tta-demo" / "digits.tta")
    write_pictures(tmp_path / "tta-demo" / "pictures", 20)
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}"}
    yield {"cwd": tmp_path, "env": environment}
    state = tmp_path / "my-state" / "lock"
    if state.exists():
        found = subprocess.run(["pgrep", "-f", "tta serve tta-demo"], capture_output=True, text=True).stdout
        for pid in map(int, found.split()):
            if Path(f"/proc/{pid}/cwd").resolve() == tmp_path:
                os.kill(pid, signal.SIGTERM)


def test_the_blocks_run_in_order(workplace: dict) -> None:
    """Every shell and Python block of the README runs, in order, in one folder, with the default ports."""
    ran = []
    for language, flags, text in BLOCKS:
        if language not in ("sh", "python") or "ignore" in flags or text.startswith(SKIPPED):
            continue
        shell = ["bash", "-euo", "pipefail", "-c"] if language == "sh" else [sys.executable, "-c"]
        # A file, not a pipe: the daemon started in the background would hold a pipe open.
        with (workplace["cwd"] / "out.txt").open("w+") as out:
            status = subprocess.run([*shell, text], stdout=out, stderr=out, timeout=120, **workplace).returncode
            out.seek(0)
            printed = out.read()
        assert status == 0, f"{text}\n{printed}"
        ran.append((language, printed))

    assert [language for language, _ in ran] == ["sh", "python", "sh"]
    assert "joined" in ran[1][1]
    assert "stable, version 0" in ran[2][1]


def test_the_protocol_is_the_module_s() -> None:
    """The protocol block is the docstring of tta/protocol.py."""
    assert protocol.__doc__ is not None
    block = re.search(r"<!-- protocol -->\n```text\n(.*?)```", README, re.S)

    assert block is not None
    assert block[1].strip() == protocol.__doc__.partition("\n\n")[2].strip()


def test_every_command_is_in_the_table() -> None:
    """The README's table names every command there is."""
    from tta.commands import app

    names = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    rows = [line for line in README.splitlines() if line.startswith("| `tta")]
    listed = set(re.findall(r"`tta (\w+)`", "\n".join(row.split("|")[1] for row in rows)))

    assert listed == names


def test_the_results_are_the_script_s() -> None:
    """The CIFAR-10 table in the README is the one the script wrote."""
    table = (ROOT / "bench" / "results" / "cifar_loop.md").read_text().split("\n\n", 1)[1].strip()

    assert table in README


def test_the_drift_table_is_the_script_s() -> None:
    """The monitor's table in the README is the summary that bench.drift wrote."""
    assert (ROOT / "bench" / "results" / "drift_summary.md").read_text().strip() in README


def test_the_adaptation_table_is_the_script_s() -> None:
    """The table of methods in the README is the summary that bench.adaptation wrote."""
    assert (ROOT / "bench" / "results" / "adaptation_summary.md").read_text().strip() in README


def test_the_stream_table_is_the_script_s() -> None:
    """The table of the changing stream in the README is the summary that bench.stream wrote."""
    assert (ROOT / "bench" / "results" / "stream_summary.md").read_text().strip() in README


def test_every_link_points_at_a_file() -> None:
    """Relative links and pictures exist."""
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)

    assert len(targets) >= 4
    assert all((ROOT / t).exists() for t in targets)
