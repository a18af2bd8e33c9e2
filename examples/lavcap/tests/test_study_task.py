"""The synthetic task: drawn as it says, its ceilings by hand and by observers that reach them, its exact scoring."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
import torch
from lavcap.study import task
from lavcap.study.ceilings import OBSERVERS, Ceiling, Part, ceiling, every_part
from lavcap.study.task import BOTH, FLASH, NUM_FRAMES, NUM_PARTS, OBJECTS, SOUND, SOUNDS, Noise, draw_clips
from lavcap.study.words import FIRST_OBJECT, FIRST_SOUND, Scores, caption_ids, caption_text, score

SILENT = Noise(spectrogram=0, picture=0, loudness=0)


def test_a_seed_gives_the_same_clips_and_another_gives_others() -> None:
    first, again, other = draw_clips(8, 3), draw_clips(8, 3), draw_clips(8, 4)
    assert torch.equal(first.spectrogram, again.spectrogram) and torch.equal(first.pictures, again.pictures)
    assert torch.equal(caption_ids(first.script), caption_ids(again.script))
    assert not torch.equal(caption_ids(first.script), caption_ids(other.script))


def test_every_part_is_drawn_and_none_more_often() -> None:
    """Pearson's chi-squared of 40,000 parts: placements, objects, sounds; at most 5 sigma above its mean."""
    script = draw_script_of(20_000)
    for drawn, kinds in ((script.frame, 24), (script.object, 30), (script.sound, 30)):
        counts = torch.tensor(list(Counter(map(tuple, drawn.flatten(0, 1).tolist())).values())).double()
        expected = drawn[..., 0].numel() / kinds
        assert len(counts) == kinds
        assert ((counts - expected) ** 2 / expected).sum() < kinds - 1 + 5 * (2 * (kinds - 1)) ** 0.5


def draw_script_of(count: int) -> task.Script:
    return task.draw_script(count, torch.Generator().manual_seed(0))


def test_what_is_rendered_is_what_the_script_says() -> None:
    """Read back without noise: loud frames are those of BOTH and SOUND, bright objects those of BOTH and FLASH."""
    clips = draw_clips(50, 0, SILENT)
    heard, flashing = task.what_is_when(clips.script)
    loud = clips.spectrogram.unflatten(2, (NUM_FRAMES, -1)).amax((1, 3)) > 0
    assert torch.equal(loud, heard < len(SOUNDS)) and loud.sum() == 50 * NUM_PARTS * 2
    cells = clips.pictures.unflatten(4, (task.GRID[1], -1)).unflatten(3, (task.GRID[0], -1)).amax((2, 4, 6))
    brightest = cells.flatten(2)  # [B, frames, cells]
    bright = brightest > (task.DIM + task.BRIGHT) / 2
    assert torch.equal(bright.any(2), flashing < len(OBJECTS)) and (bright.sum(2) <= 1).all()
    for clip, frame in (flashing < len(OBJECTS)).nonzero().tolist():
        assert bright[clip, frame, clips.script.cell[clip, flashing[clip, frame]]]
    assert torch.allclose(brightest[~bright], torch.tensor(task.DIM))


def test_caption_and_alignment_name_what_is_heard_and_seen_at_one_moment() -> None:
    script = draw_clips(20, 1).script
    heard, flashing = task.what_is_when(script)
    both = (heard < len(SOUNDS)) & (flashing < len(OBJECTS))
    assert (both.sum(1) == NUM_PARTS).all()
    words = caption_ids(script).unflatten(1, (NUM_PARTS, 3))
    assert torch.equal(words[..., 1] - FIRST_OBJECT, flashing[both].unflatten(0, (20, NUM_PARTS)))
    assert torch.equal(words[..., 2] - FIRST_SOUND, heard[both].unflatten(0, (20, NUM_PARTS)))
    first = script.object[0, 0, BOTH], script.sound[0, 0, BOTH]
    assert caption_text(caption_ids(script)[0]).startswith(f"first {OBJECTS[first[0]]} {SOUNDS[first[1]]} then ")


def test_ceilings_are_what_counting_by_hand_gives() -> None:
    """One of two, the rest of six; a third where order rules out one of the four pairs' doubles."""
    expected = {
        "sound alone": (Fraction(1, 12), Fraction(1, 6), Fraction(1, 2)),
        "picture alone": (Fraction(1, 12), Fraction(1, 2), Fraction(1, 6)),
        "both, without times": (Fraction(1, 4), Fraction(1, 2), Fraction(1, 2)),
        "both, each in its own order": (Fraction(1, 3), Fraction(1, 2), Fraction(1, 2)),
        "both, on one clock": (Fraction(1), Fraction(1), Fraction(1)),
    }
    assert len(set(every_part())) == 24 * 30 * 30
    for name, (pair, thing, sound) in expected.items():
        assert ceiling(OBSERVERS[name]) == Ceiling(pair, thing, sound, pair**NUM_PARTS)


def parts_of(script: task.Script) -> list[Part]:
    frame, thing, sound = (one.flatten(0, 1).tolist() for one in (script.frame, script.object, script.sound))
    return [Part(tuple(f), tuple(o), tuple(s)) for f, o, s in zip(frame, thing, sound)]


@pytest.mark.parametrize("name", ["sound alone", "both, each in its own order", "both, on one clock"])
def test_an_observer_with_the_rules_reaches_its_ceiling_on_drawn_clips(name: str) -> None:
    observe = OBSERVERS[name]
    answers: dict[object, Counter[tuple[int, int]]] = {}
    for part in every_part():
        answers.setdefault(observe(part), Counter())[part.object[0], part.sound[0]] += 1
    best = {seen: counts.most_common(1)[0][0] for seen, counts in answers.items()}
    script = draw_script_of(3000)
    said = torch.tensor([best[observe(part)] for part in parts_of(script)]).unflatten(0, (3000, NUM_PARTS))
    written = caption_ids(script).unflatten(1, (NUM_PARTS, 3)).clone()
    written[..., 1], written[..., 2] = FIRST_OBJECT + said[..., 0], FIRST_SOUND + said[..., 1]
    scores, most = score(written.flatten(1), caption_ids(script)), ceiling(observe)
    sigma = (float(most.pair) * (1 - float(most.pair)) / 6000) ** 0.5
    assert scores.pair == pytest.approx(float(most.pair), abs=4 * sigma)
    assert scores.exact == pytest.approx(float(most.exact), abs=4 * sigma + 0.01)


def test_scores_of_captions_by_hand() -> None:
    truth = caption_ids(draw_clips(1, 2).script)
    assert (truth[0, 1:3] != truth[0, 4:6]).all()
    swapped = truth.clone()
    swapped[:, [1, 2, 4, 5]] = truth[:, [4, 5, 1, 2]]
    wrong_object = truth.clone()
    wrong_object[0, 1] = FIRST_OBJECT + (truth[0, 1] - FIRST_OBJECT + 1) % len(OBJECTS)
    assert score(truth, truth) == Scores(1, 1, 1, 1, 1)
    assert score(swapped, truth) == Scores(0, 0, 0, 0, 0)
    assert score(wrong_object, truth) == Scores(0.5, 0.5, 1, 1, 0)
    assert score(torch.cat((wrong_object, truth)), truth.repeat(2, 1)) == Scores(0.75, 0.75, 1, 1, 0.5)
    with pytest.raises(ValueError, match=r"\[B, 6\].*\[1, 5\]"):
        score(truth[:, :5], truth)


def test_three_events_of_a_part_are_at_three_moments() -> None:
    frame = draw_script_of(200).frame
    assert (frame[..., BOTH] != frame[..., FLASH]).all() and (frame[..., BOTH] != frame[..., SOUND]).all()
    assert (frame[..., FLASH] != frame[..., SOUND]).all()
