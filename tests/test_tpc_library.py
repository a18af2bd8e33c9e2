"""How the built Gaudi libraries are found, and what is said where they cannot be used."""

from __future__ import annotations

import os
import sys
import types

import pytest
import torch

import otfuse
from otfuse import info
from otfuse._backends import base
from otfuse._backends.tpc import emulator as _tpc_emulator
from otfuse._backends.tpc import library as _tpc_library


@pytest.fixture
def built(monkeypatch, tmp_path):
    """Libraries that are there, Habana's kernels, and no GC_KERNEL_PATH; where ours are."""
    for name in (_tpc_library.GLUE_LIBRARY, _tpc_library.OP_LIBRARY, "libtpc_kernels.so"):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.setattr(_tpc_library, "folder", lambda: tmp_path)
    monkeypatch.setattr(_tpc_library, "HABANA_KERNELS", str(tmp_path / "libtpc_kernels.so"))
    monkeypatch.setattr(_tpc_library, "_too_late", False)
    monkeypatch.setenv("GC_KERNEL_PATH", "")
    return tmp_path


def give_hpu(monkeypatch, *, available=True, initialized=False):
    hpu = types.SimpleNamespace(is_available=lambda: available, is_initialized=lambda: initialized)
    monkeypatch.setattr(torch, "hpu", hpu, raising=False)
    monkeypatch.setitem(base._installed, "habana_frameworks", True)
    monkeypatch.setitem(sys.modules, "habana_frameworks", types.ModuleType("habana_frameworks"))


def path():
    return os.environ["GC_KERNEL_PATH"]


class TestKernelPath:
    def test_habanas_own_stays_beside_ours(self, built):
        _tpc_library.prepare()
        assert path() == f"{built / _tpc_library.GLUE_LIBRARY}:{built / 'libtpc_kernels.so'}"
        assert _tpc_library.kernel_path_reasons() == []

    def test_what_the_user_set_is_kept(self, built, monkeypatch):
        monkeypatch.setenv("GC_KERNEL_PATH", "/a/liba.so:/b/libb.so")
        _tpc_library.prepare()
        _tpc_library.prepare()
        assert path() == f"{built / _tpc_library.GLUE_LIBRARY}:/a/liba.so:/b/libb.so"

    def test_without_habanas_own_nothing_is_set_and_it_is_said(self, built):
        (built / "libtpc_kernels.so").unlink()
        _tpc_library.prepare()
        assert path() == ""
        (reason,) = _tpc_library.kernel_path_reasons()
        assert "libtpc_kernels.so is not there; set GC_KERNEL_PATH=" in reason

    def test_after_the_gaudi_was_opened_it_is_too_late(self, built, monkeypatch):
        give_hpu(monkeypatch, initialized=True)
        _tpc_library.prepare()
        (reason,) = _tpc_library.unavailable()
        assert reason.startswith("the Gaudi was in use before otfuse was imported")
        assert reason.endswith(f"start with GC_KERNEL_PATH={path()}")

    def test_without_the_libraries_nothing_is_touched(self, built):
        (built / _tpc_library.GLUE_LIBRARY).unlink()
        _tpc_library.prepare()
        assert path() == "" and _tpc_library.kernel_path_reasons() == []


class TestReasons:
    def test_none(self, built, monkeypatch):
        give_hpu(monkeypatch)
        _tpc_library.prepare()
        assert _tpc_library.unavailable() == []

    def test_not_built(self, built, monkeypatch):
        give_hpu(monkeypatch)
        for name in (_tpc_library.GLUE_LIBRARY, _tpc_library.OP_LIBRARY):
            (built / name).unlink()
        (reason,) = _tpc_library.unavailable()
        assert reason.startswith("not built: libotfuse_tpc_kernels.so, libotfuse_hpu.so (OTFUSE_BUILD_TPC=1 ")

    def test_no_gaudi(self, built, monkeypatch):
        give_hpu(monkeypatch, available=False)
        _tpc_library.prepare()
        assert _tpc_library.unavailable() == ["habana_frameworks finds no Gaudi"]

    def test_habanas_pytorch_not_imported(self, built, monkeypatch):
        give_hpu(monkeypatch)
        monkeypatch.delattr(torch, "hpu")
        _tpc_library.prepare()
        assert _tpc_library.unavailable() == ["torch has no device 'hpu' yet (import habana_frameworks.torch)"]

    def test_habanas_pytorch_not_installed(self, built, monkeypatch):
        monkeypatch.setitem(base._installed, "habana_frameworks", False)
        _tpc_library.prepare()
        assert _tpc_library.unavailable() == [
            "habana_frameworks is not installed (it comes with Intel's Gaudi containers)"
        ]

    def test_loading_names_them_all(self, built, monkeypatch):
        monkeypatch.setitem(base._installed, "habana_frameworks", False)
        (built / _tpc_library.OP_LIBRARY).unlink()
        _tpc_library.prepare()
        with pytest.raises(otfuse.BackendError, match=r"not built: libotfuse_hpu\.so .*; habana_frameworks is not"):
            _tpc_library.load()


class TestInfo:
    def test_reasons_and_the_variable_are_printed(self, built, monkeypatch, capsys):
        (built / "libtpc_kernels.so").unlink()
        _tpc_library.prepare()
        info.main([])
        said = capsys.readouterr().out
        assert "libtpc_kernels.so is not there; set GC_KERNEL_PATH=" in said
        assert "GC_KERNEL_PATH: not set" in said
        monkeypatch.setenv("GC_KERNEL_PATH", "/x.so")
        info.main([])
        assert "GC_KERNEL_PATH: /x.so" in capsys.readouterr().out

    @pytest.mark.parametrize("compiler, said", [("/usr/bin/g++", "usable, with /usr/bin/g++"), (None, "not usable: ")])
    def test_the_emulator(self, monkeypatch, capsys, compiler, said):
        monkeypatch.setattr(_tpc_emulator, "COMPILER", compiler)
        info.main([])
        assert f'tpc on CPU tensors (emulated, by backend="tpc" alone): {said}' in capsys.readouterr().out

    def test_a_gaudi_among_the_devices(self, monkeypatch):
        give_hpu(monkeypatch)
        monkeypatch.setattr(torch.hpu, "device_count", lambda: 2, raising=False)
        monkeypatch.setattr(torch.hpu, "get_device_name", lambda i: "GAUDI2", raising=False)
        assert info.gather()["devices"][-2:] == ["hpu:0 GAUDI2", "hpu:1 GAUDI2"]
