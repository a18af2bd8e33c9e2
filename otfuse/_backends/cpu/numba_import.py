"""Why numba cannot compile here: found out once, by importing it, when this module is imported.

An import runs as it is while ``torch.compile`` traces, so that the first call of a process may be a traced one.
"""

from __future__ import annotations


def _find_out() -> list[str]:
    try:
        import numba
    except ModuleNotFoundError as error:
        if error.name == "numba":
            return ["numba is not installed (pip install 'otfuse[cpu]')"]
        return [_broken(error)]
    except Exception as error:  # its libraries, its NumPy: whatever it meets
        return [_broken(error)]
    if numba.config.DISABLE_JIT:
        return ["numba is told to compile nothing (unset NUMBA_DISABLE_JIT)"]
    return []


def _broken(error: Exception) -> str:
    return f"numba is installed and does not import ({type(error).__name__}: {error})"


UNAVAILABLE = _find_out()
