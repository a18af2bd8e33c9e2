"""Triton's interpreter, which stands in for a GPU where there is none, made fast enough for these tests."""

from __future__ import annotations

import warnings
from types import FunctionType
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patch = interpreter._patch_lang


def _patch_once(function: FunctionType) -> Any:
    """Every call of a device function patches the language anew (Triton 3.9), which takes most of the time."""
    languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
    if languages and not any(tl.core.is_builtin(language.load) for language in languages):
        return interpreter._LangPatchScope()
    return _patch(function)


interpreter._patch_lang = _patch_once


def _launch(self: Any, *args: Any, _call: Any = interpreter.GridExecutor.__call__, **options: Any) -> None:
    """No GPU warns of a NaN, and nothing in a batch but its item is spoilt by one."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)
        _call(self, *args, **options)


interpreter.GridExecutor.__call__ = _launch
