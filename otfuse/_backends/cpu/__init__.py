"""numba on a CPU, in reading order: ``backend.py``, ``ops.py``, ``launch.py``, ``kernels.py``; ``varlen.py``."""
