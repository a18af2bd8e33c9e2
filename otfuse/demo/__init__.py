"""The demo: sound and picture of a clip, aligned by optimal transport, checked, timed and drawn."""

from __future__ import annotations

from otfuse.demo.cli import main

__all__ = ["main"]
