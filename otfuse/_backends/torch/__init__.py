"""Plain PyTorch: ``backend.py``, ``solver.py``, ``implicit.py``."""
