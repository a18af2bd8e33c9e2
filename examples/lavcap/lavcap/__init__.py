"""LAVCap on otfuse: an audio-visual captioner, from a folder of videos to a score."""

__version__ = "0.1.0"
