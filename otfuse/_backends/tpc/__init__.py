"""TPC-C for Intel Gaudi, in reading order: ``backend.py``, ``ops.py``, ``library.py``, ``emulator.py``."""
