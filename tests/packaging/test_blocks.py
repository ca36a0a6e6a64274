"""Blocks: every tensor in exactly one, for the families people deploy; and what cannot be packaged says so."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from torch import nn

from tta.bundle import Bundle
from tta.errors import BundleError, ConfigError, InputError
from tta.images import read_labelled
from tta.packaging import Recipe, package
from tta.packaging.blocks import partition
from tta.packaging.source import build_model, load_checkpoint
from tta.server.predictor import Predictor

FAMILIES = [
    "resnet18",
    "resnet50",
    "mobilenetv3_small_100",
    "convnext_atto",
    "vit_tiny_patch16_224",
    "efficientnet_b0",
    "densenet121",
    "regnety_002",
    "vgg11_bn",
    "mixer_s32_224",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_is_in_exactly_one_block(name: str) -> None:
    """Parameters and normalisation buffers of a family are partitioned, the classifier alone being the head."""
    model = timm.create_model(name, pretrained=False, num_classes=10).eval()

    blocks = partition(model, (224, 224, 3))

    taken = [t for b in blocks for t in b.tensors]
    own = [n for n, t in model.state_dict().items() if t.is_floating_point()]
    assert sorted(taken) == sorted(own)
    assert 3 <= len(blocks) <= 5
    assert {n.rpartition(".")[0] for n in blocks[-1].tensors} == {
        n for n, m in model.named_modules() if m is model.get_classifier()
    }
    assert all(b.tap for b in blocks[:-1])


def randomised(name: str) -> nn.Module:
    """Random weights with statistics that are not trivial, so that folding them wrongly would show."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=10).eval()
    for key, buffer in model.named_buffers():
        if key.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        if key.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES[:6])
def test_a_family_packages_with_parity(name: str, tmp_path: Path) -> None:
    """The six promised families package by structure: parity holds, and every block can be swapped by name."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (260, 7, 7, 3), np.uint8).repeat(32, 1).repeat(32, 2)
    y = rng.integers(0, 10, 260)
    recipe = Recipe(name, f"timm:{name}", (224, 224, 3), {"num_classes": 10}, arl=1000)

    bundle = package(randomised(name), recipe, x, y, [str(i) for i in range(10)], tmp_path / "b")

    in_blocks = {t for b in bundle.manifest.blocks for t in b.tensors}
    assert in_blocks == {n for n, w in bundle.weights.items() if w.dtype == np.float32}
    predictor = Predictor(bundle, "cpu")
    predictor.activate(predictor.prepare())
    assert predictor.run(x[:2]).features.shape == (2, bundle.manifest.n_features)


def test_taps_are_pooled_in_the_layout_of_convolutions(bundle: Bundle) -> None:
    """No mean over height and width is left as ReduceMean, which would reorder whole activations."""
    graph = onnx.load_from_string(bundle.graph).graph
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in graph.value_info}

    reduced = [ranks.get(n.input[0]) for n in graph.node if n.op_type == "ReduceMean"]
    pooled = [n for n in graph.node if n.op_type == "GlobalAveragePool"]

    assert 4 not in reduced
    assert len(pooled) >= 2 * (len(bundle.manifest.blocks) - 1)


def test_a_small_vit_packages(tmp_path: Path) -> None:
    """A transformer without batch normalisation packages, parity holds, and its features vary."""
    torch.manual_seed(0)
    kwargs = {"num_classes": 4, "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
    model = build_model("timm:vit_tiny_patch16_224", kwargs)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (400, 32, 32, 3), np.uint8)
    recipe = Recipe("vit", "timm:vit_tiny_patch16_224", (32, 32, 3), kwargs, arl=1000)

    bundle = package(model, recipe, x, rng.integers(0, 4, 400), list("abcd"), tmp_path / "vit.tta")

    assert [b.name for b in bundle.manifest.blocks] == ["block1", "block2", "block3", "block4", "head"]
    assert bundle.manifest.parity["max_difference"] < 1e-3


def test_the_cifar_resnet_packages_through_its_factory(data_folder: Path, tmp_path: Path) -> None:
    """The ResNet-20 of the data at hand packages through module:factory and has three stages and a head."""
    model = build_model("bench.resnet20:resnet20", {})
    load_checkpoint(model, data_folder / "resnet20-cifar10.safetensors")
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (400, 32, 32, 3), np.uint8)
    recipe = Recipe("r20", "bench.resnet20:resnet20", (32, 32, 3), arl=1000)

    bundle = package(model, recipe, x, rng.integers(0, 10, 400), list("abcdefghij"), tmp_path / "r.tta")

    assert [(b.name, b.tap) for b in bundle.manifest.blocks] == [
        ("block1", "layer1"),
        ("block2", "layer2"),
        ("block3", "layer3"),
        ("head", ""),
    ]


def test_a_checkpoint_that_does_not_fit_names_its_tensors(tmp_path: Path) -> None:
    """Missing, unexpected and misshapen tensors are counted and named."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    state = model.state_dict()
    state["3.weight"] = torch.zeros(5, 4)
    del state["1.running_var"]
    torch.save(state | {"extra": torch.zeros(1)}, tmp_path / "c.pth")

    with pytest.raises(BundleError) as caught:
        load_checkpoint(model, tmp_path / "c.pth")

    for text in ("1.running_var", "3.weight", "extra"):
        assert text in str(caught.value)


class Evil:
    """Runs code when unpickled."""

    def __reduce__(self) -> tuple:
        return (print, ("pwned",))


def test_a_checkpoint_with_code_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pickle with code in it is refused, and the code does not run."""
    torch.save({"weight": Evil()}, tmp_path / "evil.pth")

    with pytest.raises(BundleError, match="cannot be read"):
        load_checkpoint(nn.Linear(1, 1), tmp_path / "evil.pth")

    assert "pwned" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "text"),
    [("resnet18", "timm:NAME"), ("timm:resnet1800", "no model"), ("nowhere:model", "cannot be imported")],
)
def test_a_source_that_is_not_there_is_named(source: str, text: str) -> None:
    """A model nobody knows is an error that says how to write one."""
    with pytest.raises(ConfigError, match=text):
        build_model(source, {})


def test_an_empty_reference_folder_is_named(tmp_path: Path) -> None:
    """A folder without class folders or pictures says what is expected."""
    with pytest.raises(InputError, match="class folders"):
        read_labelled(tmp_path, (8, 8, 3), "crop")
    (tmp_path / "cat").mkdir()
    with pytest.raises(InputError, match="no pictures"):
        read_labelled(tmp_path, (8, 8, 3), "crop")


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda x, y: (x, np.zeros_like(y)), "one class only"),
        (lambda x, y: (np.full_like(x, 9), y), "blank"),
        (lambda x, y: (x[:90], y[:90]), "too few"),
        (lambda x, y: (x, y + 5), "outside"),
        (lambda x, y: (x[:, :16], y), "expected reference images"),
    ],
)
def test_a_reference_that_cannot_work_is_refused(
    digits_model: nn.Module, tmp_path: Path, spoil, text: str
) -> None:
    """One class, blank, too few, mislabelled or misshapen reference images are refused with the reason."""
    rng = np.random.default_rng(0)
    x, y = spoil(rng.integers(0, 256, (300, 32, 32, 3), np.uint8), rng.integers(0, 10, 300))

    with pytest.raises(InputError, match=text):
        package(
            digits_model,
            Recipe("d", "timm:resnet18", (32, 32, 3), arl=1000),
            x,
            y,
            list("0123456789"),
            tmp_path / "b",
        )
