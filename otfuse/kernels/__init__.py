"""Device code. The sources live in the repository's top-level ``kernels/`` folder (see its README)."""
