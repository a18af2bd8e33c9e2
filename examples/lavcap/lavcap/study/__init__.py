"""A study on a synthetic task: what optimal transport brings where a caption needs sound and picture together."""
