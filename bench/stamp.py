"""When, from which commit, by which command and of which code a result was measured, and where it is kept."""

import ast
import hashlib
import json
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


def stamp(command: str) -> dict[str, str]:
    """The first fields of every result: date, commit, command."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {"date": datetime.now(UTC).date().isoformat(), "commit": commit, "command": command}


def publish(name: str, result: dict[str, Any], lines: Sequence[str], as_json: bool = False) -> None:
    """Write `results/NAME.json` and, of the lines, `results/NAME.md`; print one of them."""
    text = json.dumps(result, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    print(text if as_json else "\n".join(lines))


def code_hash(*paths: str) -> str:
    """Of what files and folders of the project do: neither comments nor docstrings nor layout count."""
    digest = hashlib.sha256()
    for path in paths:
        found = ROOT / path
        for file in sorted(found.rglob("*.py")) if found.is_dir() else [found]:
            digest.update(ast.unparse(_without_docstrings(ast.parse(file.read_text()))).encode())
    return digest.hexdigest()


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                del node.body[0]
    return tree
