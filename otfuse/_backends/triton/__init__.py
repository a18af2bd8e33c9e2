"""Triton for CUDA, in reading order: ``backend.py``, ``ops.py``, ``paths.py``, ``attend.py``, ``launch.py``;
launchers have the names of their kernels."""
