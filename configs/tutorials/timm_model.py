"""Bring a timm model with a fine-tuned checkpoint.

    python configs/tutorials/timm_model.py [FOLDER]

You have a timm model that was fine-tuned on your classes, its checkpoint, and some labelled pictures of what is
normal. This makes all three in small (handwritten digits, a minute on one core) and then does with them what you
would do with yours: package, check, and replay a recorded day.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from tta.packaging.digits import corrupt, digits

# test_resnet is timm's smallest ResNet. Arguments that `timm.create_model` needs for your checkpoint go here.
NAME, ARGUMENTS = "test_resnet", '{"num_classes": 10}'
SIZE, MEAN, STD = "32x32", "0.5,0.5,0.5", "0.25,0.25,0.25"  # as in your training


def fine_tune(path: Path) -> None:
    """Stands for your training: leaves a checkpoint as `safetensors`; a .pth without code will do as well."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = timm.create_model(NAME, num_classes=10)
    x, y = digits("train", 4000, seed=1)
    images = (torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    labels = torch.from_numpy(y)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(400):
        chosen = torch.randint(len(images), (64,))
        loss = torch.nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)


def write_reference(folder: Path) -> None:
    """Stands for your validation set: a folder of class folders. Take pictures the model was not trained on."""
    x, y = digits("reference", 2000, seed=2)
    for number, (image, label) in enumerate(zip(x, y, strict=True)):
        path = folder / str(label) / f"{number:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def run(*command: str) -> None:
    """Show a command of tta and run it."""
    print(f"\n$ tta {' '.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", "tta", *command], check=True)


def main() -> None:
    """Every step in turn."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "tta-tutorial-timm")
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, reference, bundle = folder / "checkpoint.safetensors", folder / "reference", folder / "model.tta"
    fine_tune(checkpoint)
    write_reference(reference)

    # 1. Once for each model: the bundle. Warnings at the end are worth reading: an accuracy on the reference that
    #    you do not know from your validation most often means another mean, std or order of classes.
    how = ("--kwargs", ARGUMENTS, "--image-size", SIZE, "--mean", MEAN, "--std", STD)
    run(
        "package",
        f"timm:{NAME}",
        *how,
        "--checkpoint",
        str(checkpoint),
        "--reference",
        str(reference),
        "--out",
        str(bundle),
    )

    # 2. Before a start: does it load, warm up and predict?
    run("check", str(bundle))

    # 3. What would tta have done with a recorded day? Here an hour of normal pictures and one of a noisy camera.
    clean, noisy = digits("stream", 400, seed=3), digits("stream", 1200, seed=4)
    np.savez(folder / "morning.npz", x=clean[0], y=clean[1])
    np.savez(folder / "noisy-camera.npz", x=corrupt(noisy[0], "noise", 1), y=noisy[1])
    recordings = (str(folder / "morning.npz"), str(folder / "noisy-camera.npz"))
    settings = ("--set", "adapt.labels=96", "--set", "adapt.epochs=6", "--set", "monitor.window=256", "--hold")
    run(
        "replay",
        str(bundle),
        *recordings,
        "--out",
        str(folder / "replay"),
        "--rate",
        "200",
        "--label-share",
        "0.3",
        *settings,
    )

    print(
        f"\nOpen {folder / 'replay' / 'report.html'}; then serve it: tta serve {bundle} --state {folder / 'state'}"
    )


if __name__ == "__main__":
    main()
