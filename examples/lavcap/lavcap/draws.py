"""Which of several prompts or captions a clip gets at a step: random to look at, the same whenever it is asked.

No generator has a state here, so the choice does not depend on the clip's place in a batch, on the number of
processes, or on whether the run was interrupted.
"""

from __future__ import annotations

import hashlib


def draw(count: int, seed: int, step: int, key: str) -> int:
    """A whole number from 0 to ``count - 1``, uniform over steps and keys.

    Raises:
        ValueError: there is nothing to draw from.
    """
    if count < 1:
        raise ValueError(f"nothing to draw from for {key!r}: the count is {count}")
    digest = hashlib.blake2b(f"{seed} {step} {key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % count
