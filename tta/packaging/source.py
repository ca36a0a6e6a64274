"""Load the source model: `timm:NAME` or `module:factory`, with a checkpoint."""

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tta.errors import BundleError, ConfigError


def build_model(source: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Make the network, without weights.

    Args:
        source: "timm:NAME", or "module:factory" where calling `factory(**kwargs)` gives an `nn.Module`.
        kwargs: for the factory.

    Raises:
        ConfigError: there is no such model, or the factory does not give a module.
    """
    kind, _, name = source.partition(":")
    if not name:
        raise ConfigError(f"source {source!r}: write timm:NAME or module:factory")
    if kind == "timm":
        import timm

        if not timm.is_model(name):
            near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5])
            raise ConfigError(f"timm has no model {name!r}" + (f": did you mean one of {near}?" if near else ""))
        try:
            model: nn.Module = timm.create_model(name, pretrained=False, **kwargs)
        except Exception as error:  # timm raises many types for arguments it cannot use
            raise ConfigError(f"{source} does not take {dict(kwargs)}: {error}") from error
        return model.eval()
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(kind), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"source {source!r} cannot be imported ({error}): run where {kind}.py is, or set PYTHONPATH"
        ) from error
    try:
        model = factory(**kwargs)
    except Exception as error:  # somebody else's code: whatever it raises, the user must see it is theirs
        raise ConfigError(f"{source}(**{dict(kwargs)}) raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{source} gave {type(model).__name__}, not a torch.nn.Module")
    return model.eval()


def timm_preprocessing(model: nn.Module) -> dict[str, Any]:
    """What timm says of a model's input: "input_size" (C, H, W), "mean" and "std"."""
    from timm.data import resolve_model_data_config

    config: dict[str, Any] = resolve_model_data_config(model)
    return config


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load trained weights; every parameter and normalisation buffer must be there and fit.

    Args:
        model: changed in place.
        path: `.safetensors`, or `.pth`/`.pt` with a state_dict, perhaps under "state_dict" or "model".

    Raises:
        BundleError: unreadable, or tensors missing, unexpected or of another shape; the message names them.
    """
    state = _read_state(path)
    state = {name.removeprefix("module."): value for name, value in state.items()}
    own = model.state_dict()
    needed = {n for n in own if not n.endswith("num_batches_tracked")}
    missing = sorted(needed - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    wrong = sorted(n for n in needed & state.keys() if state[n].shape != own[n].shape)
    if missing or unexpected or wrong:
        parts = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
            if names
        ]
        raise BundleError(
            f"checkpoint {path} does not fit the model: {'; '.join(parts)}: check SOURCE and --kwargs"
        )
    model.load_state_dict(state, strict=False)


def save_checkpoint(weights: Mapping[str, npt.NDArray[Any]], path: Path) -> None:
    """Write a state_dict as PyTorch does.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        torch.save({name: torch.from_numpy(np.array(array)) for name, array in weights.items()}, path)
    except RuntimeError as error:  # torch's own writer
        raise OSError(str(error)) from error


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        # weights_only: a checkpoint must not run code.
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many types for a bad file
        reason = str(error).partition("\n")[0][:160]
        raise BundleError(
            f"checkpoint {path} cannot be read ({type(error).__name__}: {reason}): "
            "save the state_dict as .safetensors"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
        raise BundleError(f"checkpoint {path} holds no state_dict")
    return loaded
