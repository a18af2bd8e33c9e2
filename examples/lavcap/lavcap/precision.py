"""Where autocast must not reach, and how transformers is told a dtype."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
import transformers
from packaging.version import Version


def loaded_as(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The option of ``from_pretrained`` for a dtype: transformers 4.56 renamed it, Gaudi's Trainer wants an older."""
    renamed = Version(transformers.__version__) >= Version("4.56")
    return {"dtype" if renamed else "torch_dtype": dtype}


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off for what runs on ``device``; nothing where there is no autocast (the meta device)."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
