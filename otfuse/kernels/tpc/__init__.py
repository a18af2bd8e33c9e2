"""TPC-C kernels for Intel Gaudi."""
