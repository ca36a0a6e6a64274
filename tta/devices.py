"""Which GPUs there are; asked by the daemon, which imports no engine, and by whoever runs a model."""

import glob
import os


def n_gpus() -> int:
    """GPUs that this process may use; CUDA numbers them from 0."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([name for name in chosen.split(",") if name.strip() not in ("", "-1")])
    return len(glob.glob("/dev/nvidia[0-9]*") or glob.glob("/dev/dxg"))


def device_of(device: str, number: int) -> str:
    """The device of one of several servers: GPUs in turn where there are any.

    Args:
        device: "auto", "cpu" or "cuda".
        number: of the server, from 0.
    """
    present = n_gpus()
    return f"{device}:{number % present}" if device != "cpu" and present else device
