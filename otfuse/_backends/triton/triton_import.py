"""Why Triton does not import here: found out once, by importing it, when this module is imported."""

from __future__ import annotations

import importlib


def _find_out() -> list[str]:
    try:
        importlib.import_module("triton")
    except Exception as error:  # whatever a broken installation raises
        return [f"import triton raises {type(error).__name__}: {error} (reinstall torch and triton)"]
    return []


UNAVAILABLE = _find_out()
