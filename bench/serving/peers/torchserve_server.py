"""The model behind TorchServe: this script lays out its model store and becomes the server. Needs Java 17."""

import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()


@cache
def model() -> Any:
    """In the worker, once."""
    from session import Model

    return Model()


def handle(data: list[dict[str, bytes]] | None, context: object) -> list[bytes] | None:
    """A batch; bytes in, bytes out."""
    if data is None:  # how it says: load
        return None
    return model().run_requests([bytes(request["body"]) for request in data])


def main() -> None:
    """One worker; the ports after the one for predictions are for what else it offers."""
    from session import MAX_BATCH, MAX_WAIT_S, PORT

    folder = Path(os.environ["SERVING_FOLDER"])
    model_folder = folder / "store" / "model"
    (model_folder / "MAR-INF").mkdir(parents=True)
    (model_folder / HERE.name).write_bytes(HERE.read_bytes())
    described = {"modelName": "model", "handler": f"{HERE.name}:handle", "modelVersion": "1.0"}
    manifest = {"createdOn": "", "runtime": "python", "model": described, "archiverVersion": "0.12.0"}
    (model_folder / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest))
    limits = {
        "defaultVersion": True,
        "marName": "model",
        "minWorkers": 1,
        "maxWorkers": 1,
        "batchSize": MAX_BATCH,
        "maxBatchDelay": max(1, round(1000 * MAX_WAIT_S)),
        "responseTimeout": 60,
    }
    settings = {
        "inference_address": f"http://127.0.0.1:{PORT}",
        "management_address": f"http://127.0.0.1:{PORT + 1}",
        "metrics_address": f"http://127.0.0.1:{PORT + 2}",
        "grpc_inference_port": PORT + 3,
        "grpc_management_port": PORT + 4,
        "model_store": folder / "store",
        "load_models": "model",
        "models": json.dumps({"model": {"1.0": limits}}),
        "job_queue_size": 1024,
        "disable_system_metrics": "true",
    }
    config = folder / "config.properties"
    config.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
    os.environ.update(PYTHONPATH=str(HERE.parent), LOG_LOCATION=str(folder), METRICS_LOCATION=str(folder))
    os.chdir(folder)
    start = ["--start", "--foreground", "--disable-token-auth", "--ts-config", str(config)]
    server = Path(sys.executable).parent / "torchserve"
    os.environ["PATH"] = f"{server.parent}:{os.environ['PATH']}"
    os.execv(server, [str(server), *start])


if __name__ == "__main__":
    main()
