"""One module per sub-command of ``lavcap``."""
