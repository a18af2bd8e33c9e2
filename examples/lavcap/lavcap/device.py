"""Where a command computes when it is not told."""

from __future__ import annotations

import torch


def default_device() -> str:
    """The accelerator of this machine (``cuda``, ``hpu``, ...), else ``cpu``."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else accelerator.type
