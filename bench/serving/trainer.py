"""`python -m bench.serving.trainer NICE PARENT THREADS`: what the adapter does all day, as the adapter does it."""

import sys

import torch
from torch import nn

from bench.resnet20 import resnet20
from tta.process import become_worker


def main() -> None:
    """Fine-tune a ResNet-20 on noise until killed."""
    nice, parent, threads = map(int, sys.argv[1:4])
    become_worker(nice, parent)
    torch.set_num_threads(threads)
    model = resnet20().train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    x, y = torch.randn(64, 3, 32, 32), torch.arange(64) % 10
    print("training", flush=True)
    while True:
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
