"""`python -m bench.serving.trainer NICE PARENT THREADS [DEVICE [SHARE]]`: what the adapter does, as it does it."""

import sys

import torch
from torch import nn

from bench.resnet20 import resnet20
from tta.adapter.pace import Pace
from tta.process import become_worker


def main() -> None:
    """Fine-tune a ResNet-20 on noise until killed."""
    nice, parent, threads = map(int, sys.argv[1:4])
    become_worker(nice, parent)
    torch.set_num_threads(threads)
    device = sys.argv[4] if len(sys.argv) > 4 else "cpu"
    share = float(sys.argv[5]) if len(sys.argv) > 5 else 1.0
    pace = Pace(share, torch.cuda.synchronize if device != "cpu" else lambda: None)
    model = resnet20().train().to(device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    x, y = torch.randn(64, 3, 32, 32, device=device), torch.arange(64, device=device) % 10
    print("training", flush=True)
    while True:
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pace.step()


if __name__ == "__main__":
    main()
