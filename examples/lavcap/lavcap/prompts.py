"""The instruction prompts of Table V, and several wordings of the first for training."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from lavcap.config import PromptSet


class Slot(Enum):
    """What stands between two pieces of a prompt's text."""

    FUSED = "fused"  # sound and picture, one sequence
    AUDIO = "audio"
    VISUAL = "visual"


class Prompt(NamedTuple):
    """``text[0] slots[0] text[1] ... text[-1]``; the caption follows."""

    text: tuple[str, ...]
    slots: tuple[Slot, ...]


def _about_sound(request: str) -> Prompt:
    return Prompt(("USER: <Audio>", f"</Audio> {request}\nASSISTANT:"), (Slot.FUSED,))


PROMPT_I = _about_sound("Please describe the audio.")
PROMPT_II = Prompt(("USER: <Content>", "</Content> Please describe the content.\nASSISTANT:"), (Slot.FUSED,))
PROMPT_III = Prompt(
    ("USER: <Audio>", "</Audio><Visual>", "</Visual> Please describe the audio and visual elements.\nASSISTANT:"),
    (Slot.AUDIO, Slot.VISUAL),
)

# The first is Table V's; the others are our own wordings (the public code trains on eight of its own).
WORDINGS = (
    PROMPT_I,
    _about_sound("What can be heard here?"),
    _about_sound("Write one sentence about what this clip sounds like."),
    _about_sound("Caption the sounds of this recording."),
    _about_sound("Tell me which sounds occur, and in which order."),
    _about_sound("Summarise what a listener would hear."),
    _about_sound("Which sound events does this clip contain?"),
    _about_sound("Put the sound of this scene into words."),
)


def training_prompts(prompts: PromptSet) -> tuple[Prompt, ...]:
    """Those that training draws from, one for each clip and step."""
    return WORDINGS if prompts is PromptSet.MULTI else (test_prompt(prompts),)


def test_prompt(prompts: PromptSet) -> Prompt:
    """The one that captions are asked for with."""
    return {PromptSet.II: PROMPT_II, PromptSet.III: PROMPT_III}.get(prompts, PROMPT_I)


test_prompt.__test__ = False  # type: ignore[attr-defined]  # by its name pytest would take it for a test
