"""What the demo prints: one aligned line for each thing found out."""

from __future__ import annotations

from collections.abc import Sequence

from otfuse.demo.check import Agreement
from otfuse.demo.decode import Clip
from otfuse.demo.recovery import Recovery
from otfuse.demo.shared_space import SharedSpace
from otfuse.demo.timing import Timing


def say(topic: str, text: str) -> None:
    """Print one line, at once, so that a slow step shows where it is."""
    print(f"{topic:<9}{text}", flush=True)


def say_clip(clip: Clip, is_synthetic: bool) -> None:
    made = " (made by this run, events known)" if is_synthetic else ""
    say("clip", f"{clip.path}: {clip.seconds:.2f} s of sound and picture{made}")
    for note in clip.notes:
        say("note", note)


def say_tokens(space: SharedSpace) -> None:
    num_sound, num_pictures, width = len(space.x), len(space.y), space.x.shape[1]
    say(
        "tokens",
        f"{num_sound} of sound (log-mel) x {num_pictures} of picture (colour, edges, change), width {width}",
    )
    say(
        "",
        "shared space: canonical correlation fitted on this clip itself, "
        f"{space.hold_out:.1f} s around each sound token held out",
    )
    num_shifts = len(space.shifted_cosines)
    verdict = "" if space.beats_chance else ": cannot be told from chance"
    say(
        "",
        f"held-out cosine of a sound and its picture {space.held_out_cosine:+.2f}; "
        f"{space.rank} of {num_shifts} fits on shifted pairs reach that{verdict}",
    )


def say_plan(backend: str, device: str, epsilon: float, num_iters: int, marginal_error: float) -> None:
    say(
        "plan",
        f"backend {backend} on {device}, epsilon {epsilon}, {num_iters} rounds, marginal error {marginal_error:.1e}",
    )


def say_recovery(found: Recovery, wrong: Sequence[Recovery]) -> None:
    """The score of the plan, beside those of plans from fits on pairs shifted in time."""
    wrong_found = sum(one.num_found for one in wrong) / len(wrong)
    wrong_share = sum(one.share for one in wrong) / len(wrong)
    say(
        "events",
        f"{found.num_found} of {found.num_heard} heard events send their largest mass to a picture of their "
        f"own kind ({wrong_found:.1f} on average when fitted on {len(wrong)} shifts of the pairs)",
    )
    say(
        "",
        f"{found.share:.0%} of their mass lies on pictures of their kind: uniform plan {found.chance:.0%}, "
        f"shifted fits {wrong_share:.0%}, most that any plan can reach {found.ceiling:.0%}",
    )
    say("", f"the event heard but not shown: {found.unseen_share:.0%}, on pictures of its kind at other times")


def say_agreement(agreements: Sequence[Agreement]) -> None:
    for found in agreements:
        say(
            "POT",
            f"largest difference {found.absolute:.1e}, that is {found.relative:.1e} of the largest entry "
            f"(at most {found.allowed:.0e} by rounding): {found.solver}, {found.rounds} rounds",
        )
    if not all(found.holds for found in agreements):
        say("FAILED", "our plan and POT's differ by more than rounding explains; neither timed nor drawn")


def say_times(timings: Sequence[Timing], conditions: str) -> None:
    for found in timings:
        say(
            "time",
            f"batch {found.batch:>2}: {found.ours * 1e3:.3g} ms; per-item log-domain loop "
            f"{found.loop * 1e3:.3g} ms, {found.loop / found.ours:.0f} times as long",
        )
    say("", conditions)
