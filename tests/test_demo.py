"""The main job, as the README promises it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path("tta-demo")


@pytest.mark.timeout(400)
def test_the_demo_keeps_its_promises(tmp_path: Path) -> None:
    """`tta demo --json` from nothing: all answered, nothing mixed, cured, the head for the change of meaning."""
    result = subprocess.run(
        [sys.executable, "-m", "tta", "demo", "--json"], capture_output=True, text=True, cwd=tmp_path, timeout=380
    )

    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    phases = {p["name"]: p for p in report["phases"]}
    noise, meaning, again = phases["noise"], phases["1↔7, 3↔8"], phases["noise again"]
    assert (report["lost"], report["mixed_version_replies"], report["promotions_clean"]) == (0, 0, 0)
    assert report["requests"] > 4000
    assert noise["accuracy_source"] < phases["clean"]["accuracy_source"] - 0.2
    assert meaning["block"] == "head"
    assert again["from_library"]
    assert again["labels"] == 0
    assert again["version"] == noise["version"]
    assert max(p["labels"] for p in report["phases"]) <= 200
    assert report["home_recognised"] >= 2
    assert report["failures"] == []
    assert (tmp_path / FOLDER / "timeline.png").stat().st_size > 20_000
