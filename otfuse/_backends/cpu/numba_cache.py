"""numba's cache on disk, and doing without: no folder, a full disk or a damaged file only cost the time to compile."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import numba
from numba.core.caching import FunctionCache

from otfuse.kernels.constants import SCALING_RANGE

_logger = logging.getLogger("otfuse")
_logged: set[str] = set()


def njit(*, cache: bool, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``numba.njit``, where ``cache=True`` is a wish: numba itself raises where it finds no folder to write to."""

    def decorate(function: Callable[..., Any]) -> Any:
        compiled = numba.njit(**options)(function)
        if cache:
            try:
                compiled._cache = _Cache(function)
            except (RuntimeError, OSError):
                _log_once(
                    "no folder",
                    "numba finds no folder to keep compiled code in, so every process compiles anew, which can take a "
                    "minute; set NUMBA_CACHE_DIR to a folder that can be written",
                )
        return compiled

    return decorate


class _Cache(FunctionCache):
    """A function's part of the cache. A file that cannot be read is as none, and compiling mends it."""

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return *super()._index_key(sig, codegen), *SCALING_RANGE.values()  # compiled in, from another file

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        load = super().load_overload
        try:
            return load(sig, target_context)
        except Exception as error:  # half a pickle raises anything
            if self._fails_again(lambda: load(sig, target_context)):
                self._log(error)
                with contextlib.suppress(OSError):
                    self.flush()
                return None
            raise

    def save_overload(self, sig: Any, data: Any) -> None:
        save = super().save_overload
        try:
            save(sig, data)
        except Exception as error:  # a full disk; or what could not be read, where it cannot be replaced either
            if not self._fails_again(lambda: save(sig, data)):
                raise
            self._log(error)

    @staticmethod
    def _fails_again(attempt: Callable[[], Any]) -> bool:
        """What the cache raises it raises again; what a signal's handler raised meanwhile is the caller's."""
        try:
            attempt()
        except Exception:
            return True
        return False

    def _log(self, error: Exception) -> None:
        _log_once(
            self.cache_path,
            f"numba's cache in {self.cache_path} cannot be used as it is, so code is compiled anew "
            f"({type(error).__name__}: {error}); delete the folder, or set NUMBA_CACHE_DIR to another, if this stays",
        )


def _log_once(about: str, text: str) -> None:
    if about not in _logged:
        _logged.add(about)
        _logger.warning(text)
