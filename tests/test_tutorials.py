"""The tutorials run to their end as they stand, and say what they promise."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(name: str, folder: Path) -> str:
    """What a tutorial prints."""
    command = [sys.executable, str(ROOT / "configs" / "tutorials" / name), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_a_fine_tuned_timm_model_is_packaged_and_replayed(tmp_path: Path) -> None:
    """The timm tutorial ends with a bundle that knows its digits and a report in which noise raised the alarm."""
    said = run("timm_model.py", tmp_path)
    accuracy = re.search(r"accuracy (\d+)\.\d %", said)
    noise = re.search(r"noisy-camera +1200 +(\d+)", said)

    assert accuracy is not None
    assert int(accuracy[1]) > 90
    assert noise is not None
    assert int(noise[1]) >= 1
    assert (tmp_path / "replay" / "report.html").exists()


def test_a_module_of_ones_own_is_packaged_and_served(tmp_path: Path) -> None:
    """The module tutorial ends with answers by name, most of them right, and labels that have joined."""
    said = run("any_module.py", tmp_path)
    right = re.search(r"digit \d by version 0; (\d+) % of 64 right", said)

    assert right is not None
    assert int(right[1]) > 80
    assert "['joined', 'joined', 'joined']" in said
    assert "stable, version 0" in said or "drifted, version 0" in said
