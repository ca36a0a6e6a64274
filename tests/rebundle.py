"""A bundle that differs from another in its manifest, or in a file."""

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any


def rebundle(source: Path, target: Path, files: dict[str, bytes] | None = None, **fields: Any) -> Path:
    """Write a bundle like another but for some contents, whose hashes are right, and fields of its manifest."""
    with zipfile.ZipFile(source) as archive:
        contents = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    contents.update(files or {})
    manifest = json.loads(contents.pop("manifest.json")) | fields
    manifest["sha256"] = {n: hashlib.sha256(contents[n]).hexdigest() for n in manifest["sha256"]}
    manifest.pop("preprocessing_sha256", None)
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in {**contents, "manifest.json": json.dumps(manifest).encode()}.items():
            archive.writestr(name, data)
    return target
