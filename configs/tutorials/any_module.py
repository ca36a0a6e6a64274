"""Bring any `nn.Module`.

    python configs/tutorials/any_module.py [FOLDER]

You have a network of your own and its weights. It has to take (N, C, H, W) float images and give (N, K) logits,
and a function that you name as `module:function` has to build it. This writes such a module, trains it for a few
seconds, packages it, serves it, and asks it from Python.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from tta import Client
from tta.packaging.digits import corrupt, digits
from tta.scenario import DaemonProcess

# Your code, in a file that Python finds: in the current folder or on PYTHONPATH, here and where `tta serve` runs.
# Serving needs only the bundle; the adapter builds the network again from this function to tune a block of it.
MODULE = '''
"""A small network: its children in order are what tta takes for blocks, the last for the head."""

from torch import nn


def conv(before, after):
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2))


class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem, self.middle, self.late = conv(3, 16), conv(16, 32), conv(32, 64)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        return self.head(self.pool(self.late(self.middle(self.stem(x)))))


def make_net(classes):
    return Net(classes)
'''


def train(folder: Path) -> None:
    """Stands for your training; `torch.save` of a state_dict holds no code, and is read as such."""
    sys.path.insert(0, str(folder))
    from my_network import make_net

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = make_net(10)
    x, y = digits("train", 4000, seed=1)
    images, labels = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(y)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        chosen = torch.randint(len(images), (64,))
        loss = torch.nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save(model.state_dict(), folder / "network.pth")


def run(*command: str) -> None:
    """Show a command of tta and run it."""
    print(f"\n$ tta {' '.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", "tta", *command], check=True)


def main() -> None:
    """Every step in turn."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "tta-tutorial-module").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "my_network.py").write_text(MODULE)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    train(folder)

    # 1. The reference as an .npz instead of a folder: x (N, H, W, C) uint8, y (N,) class indices, classes by name.
    x, y = digits("reference", 2000, seed=2)
    np.savez(folder / "reference.npz", x=x, y=y, classes=[f"digit {i}" for i in range(10)])
    bundle = str(folder / "model.tta")
    what = ("my_network:make_net", "--kwargs", '{"classes": 10}', "--image-size", "32x32")
    weights = ("--checkpoint", str(folder / "network.pth"), "--reference", str(folder / "reference.npz"))
    run("package", *what, *weights, "--out", bundle)

    # 2. Serve it; on a terminal of your own: tta serve model.tta
    daemon = DaemonProcess(Path(bundle), folder / "run", {})
    daemon.start()
    try:
        # 3. Ask it, and tell it the truth later. Nothing but `pip install tta-daemon` is needed for this part.
        x, y = digits("stream", 64, seed=3)
        with Client(daemon.endpoint, daemon.control, timeout_s=30) as client:
            names = client.metadata()["classes"]
            answer = client.predict(x)
            right = float((answer.classes == y).mean())
            print(f"\n{names[answer.classes[0]]} by version {answer.version}; {100 * right:.0f} % of 64 right")
            noisy = client.predict(corrupt(x, "noise", 1))
            right = float((noisy.classes == y).mean())
            outcomes = client.label(noisy.prediction_ids[:3], y[:3].tolist())
            print(f"{100 * right:.0f} % with a noisy camera; labels: {outcomes}")
        run("status", "--control", daemon.control)
    finally:
        daemon.stop()


if __name__ == "__main__":
    main()
