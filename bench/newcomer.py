"""How long it takes from a clone to a daemon that answers, and to the demo's picture: `python -m bench.newcomer`.

Clones this repository, makes a fresh virtual environment and runs the README's two commands. What `pip` takes depends
on where its packages come from; nothing is cached by us.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.stamp import ROOT, publish, stamp

LOOK_S = 0.1
LIMIT_S = 1800.0


def commands() -> list[str]:
    """The README's first two lines of shell."""
    found = re.search(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found is not None
    return found[1].strip().splitlines()


def run(folder: Path) -> dict[str, Any]:
    """Seconds from the start of the clone to each step."""
    began = time.monotonic()
    clone = folder / "tta"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    steps = {"cloned": time.monotonic() - began}
    install, _, demo = commands()[1].partition(" && ")
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def shell(line: str, **more: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(["bash", "-ec", line], cwd=clone, env=env, text=True, **more)

    assert shell(f"{commands()[0]}; {install} -q").wait(LIMIT_S) == 0
    steps["installed"] = time.monotonic() - began
    process = shell(f". .venv/bin/activate; {demo} --json", stdout=subprocess.PIPE)
    log = clone / "tta-demo" / "run" / "daemon.log"
    while process.poll() is None and not (log.exists() and "daemon_ready" in log.read_text()):
        time.sleep(LOOK_S)
    steps["a daemon answers"] = time.monotonic() - began
    report, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0
    steps["the demo's picture"] = time.monotonic() - began
    assert list((clone / "tta-demo").glob("*.png"))
    return {
        "seconds": {k: round(v, 1) for k, v in steps.items()},
        "demo_requests": json.loads(report).get("requests"),
    }


def main() -> int:
    """Measure and write."""
    with tempfile.TemporaryDirectory(prefix="tta-newcomer-") as folder:
        found = {**stamp("python -m bench.newcomer"), "cores": os.cpu_count(), **run(Path(folder))}
    lines = [
        "# From a clone to a picture",
        "",
        f"{found['date']}, commit {found['commit']}, `{found['command']}`, {found['cores']} cores; seconds from the clone.",
        "",
        *("| step | s |", "| --- | --- |"),
        *(f"| {step} | {seconds} |" for step, seconds in found["seconds"].items()),
    ]
    publish("newcomer", found, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
