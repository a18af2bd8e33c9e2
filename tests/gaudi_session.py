"""A plugin for pytest: every test of the session on a stand-in for a Gaudi.

    python -m pytest -p gaudi_session --device hpu tests/test_properties.py -k tpc      (with tests/ on PYTHONPATH)

What can be tried of the contract tests without the machine: whether they keep their tensors on one device, and whether
the kernels are reached from there. The stand-in has no autocast, and no ``tolist``.
"""

from __future__ import annotations

import ctypes
import sys
import types
from collections.abc import Iterator

import pytest
import torch
from gaudi_libraries import libraries, plugin

ctypes.CDLL(str(plugin()))  # before torch asks what devices there are
for _name in ("habana_frameworks", "habana_frameworks.torch"):
    sys.modules[_name] = types.ModuleType(_name)


@pytest.fixture(scope="session", autouse=True)
def _gaudi() -> Iterator[None]:
    from gaudi_device import stand_in_gaudi

    with pytest.MonkeyPatch.context() as patch, stand_in_gaudi(patch):
        torch.ops.load_library(str(libraries()[1]))
        yield
