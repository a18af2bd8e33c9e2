"""The backends: a folder each, what they have in common (``base.py``), and the choice between them (``select.py``)."""
