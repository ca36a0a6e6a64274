"""The two laws of the folders, held by reading the imports."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "tta"
HEAVY = {"torch", "timm", "kornia", "onnx", "onnxscript", "onnx_ir"}
MAY_BE_HEAVY = ("adapter/", "packaging/")
MAY_OPEN_SOCKETS = {
    "auth.py",
    "commands/page.py",
    "connection.py",
    "keys.py",
    "client.py",
    "daemon/daemon.py",
    "daemon/http.py",
    "daemon/links.py",
    "daemon/servers.py",
    "daemon/standby.py",
    "daemon/webhook.py",
    "scenario/load.py",
    "scenario/process.py",
    "server/__main__.py",
    "server/frontend.py",
    "server/outbox.py",
    "shadow/__main__.py",
    "adapter/worker.py",
}
SOCKETS = {"zmq", "socket", "http", "urllib"}
PURE = [
    "monitor/",
    "daemon/asking.py",
    "daemon/gate.py",
    "daemon/cycle.py",
    *(f"adapter/{name}.py" for name in ("criteria", "memo", "methods", "patient", "race", "relief")),
    *(f"adapter/{name}.py" for name in ("starts", "surgery", "views")),
]
IO = SOCKETS | {"os", "pathlib", "subprocess", "sqlite3", "shutil", "tempfile", "io"}


def modules() -> dict[str, set[str]]:
    """Path within the package to the top-level names each file imports, wherever in the file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add((node.module or "").partition(".")[0])
        found[str(path.relative_to(PACKAGE))] = names
    return found


def test_only_adapter_and_packaging_import_torch() -> None:
    """No file outside adapter/ and packaging/ imports torch, timm, kornia or onnx, not even inside a function."""
    assert {
        path: sorted(names & HEAVY)
        for path, names in modules().items()
        if names & HEAVY and not path.startswith(MAY_BE_HEAVY)
    } == {}


def test_only_named_files_open_sockets() -> None:
    """Only the files listed here import zmq, socket or http."""
    assert {path for path, names in modules().items() if names & SOCKETS} == MAY_OPEN_SOCKETS


def test_what_decides_does_no_io() -> None:
    """Monitor, gate, cycle and surgery import nothing that reads, writes or sends."""
    for path, names in modules().items():
        if path.startswith(tuple(PURE)):
            assert not names & IO, path


def test_nothing_imports_a_process_from_another() -> None:
    """Server, shadow and adapter know nothing of the daemon."""
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] in ("server", "shadow", "adapter", "monitor", "packaging"):
            assert "tta.daemon" not in path.read_text(), path


def loaded_by(statement: str) -> set[str]:
    """Top-level modules a fresh interpreter has after a statement."""
    code = f"import sys\n{statement}\nprint(*{{m.partition('.')[0] for m in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return set(result.stdout.split())


def test_the_client_is_light() -> None:
    """Importing tta and its command line loads neither torch, onnxruntime nor anything of an extra."""
    loaded = loaded_by("import tta, tta.commands")

    assert not loaded & (
        HEAVY | {"onnxruntime", "pydantic", "prometheus_client", "structlog", "safetensors", "sklearn"}
    )


def test_the_server_is_light() -> None:
    """The hot process loads neither torch, pydantic, an HTTP server nor metrics."""
    loaded = loaded_by("import tta.server.__main__")

    assert not loaded & (HEAVY | {"pydantic", "prometheus_client", "typer"})


def test_the_daemon_has_no_torch_and_no_session() -> None:
    """The daemon loads neither torch nor onnxruntime."""
    assert not loaded_by("import tta.daemon.daemon") & (HEAVY | {"onnxruntime"})


def test_imports_do_nothing() -> None:
    """Importing every module without an entry point starts no thread."""
    names = [
        "tta." + str(p.relative_to(PACKAGE)).removesuffix(".py").replace("/", ".")
        for p in PACKAGE.rglob("*.py")
        if p.name not in ("__init__.py", "__main__.py") and "packaging" not in p.parts and "adapter" not in p.parts
    ]
    code = f"import threading, {', '.join(names)}\nprint(threading.active_count())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert result.stdout.strip() == "1"
