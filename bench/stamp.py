"""When, from which commit, by which command and of which code a result was measured."""

import hashlib
import subprocess
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]


def stamp(command: str) -> dict[str, str]:
    """The first fields of every result: date, commit, command."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {"date": datetime.now(UTC).date().isoformat(), "commit": commit, "command": command}


def code_hash(*paths: str) -> str:
    """Of files and folders of the project."""
    digest = hashlib.sha256()
    for path in paths:
        found = ROOT / path
        for file in sorted(found.rglob("*.py")) if found.is_dir() else [found]:
            digest.update(file.read_bytes())
    return digest.hexdigest()
