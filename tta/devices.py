"""Which GPUs there are; asked by the daemon, which imports no engine, and by whoever runs a model."""

import glob
import os


def n_gpus() -> int:
    """GPUs that this process may use; CUDA numbers them from 0."""
    present = len(glob.glob("/dev/nvidia[0-9]*") or glob.glob("/dev/dxg"))
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return present
    names = [name.strip() for name in chosen.split(",")]
    stop = next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))
    return min(present, stop)  # the variable is set on machines without a GPU too


def device_of(device: str, number: int, present: int) -> str:
    """The device of one of several servers: GPUs in turn where there are any.

    Args:
        device: "auto", "cpu" or "cuda".
        number: of the server, from 0.
        present: GPUs there are; see `n_gpus`.
    """
    return f"{device}:{number % present}" if device != "cpu" and present else device
