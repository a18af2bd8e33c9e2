"""Scores of captions: pycocoevalcap's scorers one by one, their uncertainty, and the table beside the paper's."""
