"""Reading CED's published weights: the original checkpoints and those of the Hugging Face hub.

Both name the same tensors. The hub's ``mispeech/ced-*`` put ``encoder.`` before all but the tagging head, call the
batch norm ``init_bn`` (``init_bn.1`` in the original) and leave out the front end's constants.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lavcap.audio.ced import CED, NUM_CLASSES
from lavcap.audio.front_ends import CEDLogMel

WINDOW = "front_end.0.spectrogram.window"
MEL_SCALE = "front_end.0.mel_scale.fb"


def load_ced(encoder: CED, path: str | Path) -> None:
    """Put the weights of the file ``path`` (safetensors, or a ``torch.save`` of tensors) into ``encoder``.

    The position embedding along time is interpolated where the encoder's is longer.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not CED's weights, or another size's; every missing, unexpected and misshapen one is named.
    """
    encoder.load_state_dict(ced_state_dict(_read(Path(path)), encoder, str(path)), assign=False)


def ced_state_dict(weights: dict[str, Tensor], encoder: CED, source: str) -> dict[str, Tensor]:
    """``weights``, under either naming, as a state dict of ``encoder``; checked."""
    given = {_original_name(name): tensor for name, tensor in weights.items()}
    wanted = original_shapes(encoder)
    optional = {WINDOW, MEL_SCALE} if any(name.startswith("encoder.") for name in weights) else set()
    problems = [f"missing: {name} {list(wanted[name])}" for name in wanted if name not in given.keys() | optional]
    problems += [f"unexpected: {name} {list(given[name].shape)}" for name in given if name not in wanted]
    for name in given.keys() & wanted.keys():
        shape, expected = tuple(given[name].shape), wanted[name]
        if shape != expected and not (name == "time_pos_embed" and _stretches(shape, expected)):
            problems.append(f"shape: {name} is {list(shape)}, needs {list(expected)}")
    if problems:
        shown = "\n  ".join(problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else []))
        raise ValueError(f"{source} does not hold the weights of this CED (width {encoder.width}):\n  {shown}")
    _check_front_end(given, source)
    return _split(given, encoder)


def original_shapes(encoder: CED) -> dict[str, tuple[int, ...]]:
    """Name and shape of every entry of an original checkpoint of this size (161 for base)."""
    return {name: tuple(tensor.shape) for name, tensor in _fused(encoder.state_dict(), encoder.width).items()}


def original_state_dict(encoder: CED) -> dict[str, Tensor]:
    """The encoder's weights under the original names; the tagging head, which it does not have, is zero."""
    return _fused(encoder.state_dict(), encoder.width)


def _fused(state: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    front_end = CEDLogMel()
    fused = {WINDOW: front_end.window, MEL_SCALE: front_end.mel_scale}
    for name, tensor in state.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            parts = [state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            fused[name.replace(".q_proj.", ".qkv.")] = torch.cat(parts)
        else:
            fused[name.replace("init_bn.", "init_bn.1.")] = tensor
    like = state["norm.weight"]
    head = {"0.weight": (width,), "0.bias": (width,), "1.weight": (NUM_CLASSES, width), "1.bias": (NUM_CLASSES,)}
    return fused | {f"outputlayer.{name}": like.new_zeros(shape) for name, shape in head.items()}


def _split(given: dict[str, Tensor], encoder: CED) -> dict[str, Tensor]:
    """Checked original entries as our state dict: queries, keys and values apart, head and front end left out."""
    state = {}
    for name, tensor in given.items():
        if ".qkv." in name:
            for part, third in zip("qkv", tensor.chunk(3)):
                state[name.replace(".qkv.", f".{part}_proj.")] = third
        elif not name.startswith(("front_end.", "outputlayer.")):
            state[name.replace("init_bn.1.", "init_bn.")] = tensor
    size = encoder.time_pos_embed.shape[3]
    if state["time_pos_embed"].shape[3] < size:
        state["time_pos_embed"] = torch.nn.functional.interpolate(
            state["time_pos_embed"].float(), size=(1, size), mode="bilinear", align_corners=False
        )
    return state


def _original_name(name: str) -> str:
    name = name.removeprefix("encoder.")
    return name.replace("init_bn.", "init_bn.1.") if name.startswith("init_bn.") and "init_bn.1." not in name else name


def _stretches(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return len(shape) == 4 and shape[:3] == expected[:3] and shape[3] <= expected[3]


def _check_front_end(given: dict[str, Tensor], source: str) -> None:
    """The constants of the checkpoint's own front end must be the ones that ours computes with."""
    ours = CEDLogMel()
    for name, tensor in ((WINDOW, ours.window), (MEL_SCALE, ours.mel_scale)):
        if name in given and not torch.allclose(given[name].float(), tensor, atol=1e-4):
            raise ValueError(f"{source}: {name} is not that of CED's front end (16 kHz, FFT 512, 64 mels to 8 kHz)")


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no CED weights at {path}; examples/lavcap/README.md says where to download them")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    weights = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(weights, dict) and isinstance(weights.get("model"), dict):
        weights = weights["model"]
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path} does not hold a dictionary of tensors")
    return weights
