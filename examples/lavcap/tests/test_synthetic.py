"""Clips that are made here: what their captions say is seen and heard in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lavcap.data.captions import read_captions
from lavcap.data.decode import DecodedClip, decode_clip

EXAMPLE = Path(__file__).parents[1]


def test_a_clip_holds_what_its_captions_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    synthetic = __import__("synthetic")
    captions = read_captions(synthetic.write_clips(tmp_path, 1))
    assert captions["disc-square_0"][1] == "a disc hums low, followed by a square beeps high" and len(captions) == 1
    clip = decode_clip(tmp_path / "disc-square_0.mp4", 224)
    assert isinstance(clip, DecodedClip) and len(clip.pictures) == 20
    for second, hertz, blue in ((2.2, 300, False), (7.2, 1300, True)):  # a disc is orange, a square blue
        piece = clip.waveform[int((second - 0.1) * 16000) :][:3200]
        assert abs(np.abs(np.fft.rfft(piece)).argmax() * 5 - hertz) <= 10
        picture = clip.pictures[round(2 * second)].astype(int)
        coloured = np.abs(picture[..., 0] - picture[..., 2]) > 100
        assert coloured.sum() > 1000 and (picture[coloured][:, 2] > picture[coloured][:, 0]).mean().round() == blue
