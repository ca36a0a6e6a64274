"""When, from which commit and by which command a result was measured."""

import subprocess
from datetime import UTC, datetime


def stamp(command: str) -> dict[str, str]:
    """The first fields of every result: date, commit, command."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {"date": datetime.now(UTC).date().isoformat(), "commit": commit, "command": command}
