"""One space for sound and picture: canonical correlation fitted on the clip, each sound token held out.

Cosines between unrelated descriptors mean nothing, so the pairs that the clip offers (this sound came with
that picture) teach which sounds go with which pictures. Both sides are whitened in a few principal
components; there, canonical correlation analysis is the singular value decomposition of the cross-covariance
`C = U S V'`, and

    y_j = z_j          x_i = C_i' z_i,    so that    <x_i, y_j> = sum_k S_k <U_k, z_i> <V_k, z_j>

is the sum of the products of canonical coordinates, each weighted by its correlation. `C_i` is fitted without
the pairs within `HOLD_OUT` seconds of sound token `i`: no token has seen its own answer, and what the
alignment shows was learned elsewhere in the clip. (The whitening looks at each side alone, never at the
pairs.) The price: within a scene that changes slowly a sound leans towards pictures further away than
`HOLD_OUT`; there, read which scene it is, not which picture.

Source: Hotelling 1936; whitened form as in Hardoon et al. 2004, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

NUM_COMPONENTS = 6
RIDGE = 0.1  # of the largest variance, added to each: small components are not blown up to full size
HOLD_OUT = 1.0  # seconds on either side of a sound token that its own fit does not see
NUM_SHIFTS = 39  # fits on shifted pairs that the real one is compared with


@dataclass(frozen=True)
class SharedSpace:
    """Tokens of both sides in one space, and how far they can be trusted."""

    x: torch.Tensor  # [N, K] sound tokens
    y: torch.Tensor  # [M, K] picture tokens
    partner: np.ndarray  # [N] the picture shown while sound token i was heard
    hold_out: float  # seconds on either side that a token's own fit did not see
    held_out_cosine: float  # mean cosine of a sound token and the picture shown with it
    shifted_cosines: np.ndarray  # the same, refitted and measured with the pairs shifted in time

    @property
    def rank(self) -> int:
        """How many of the shifted fits do at least as well as the true one."""
        return int((self.shifted_cosines >= self.held_out_cosine).sum())

    @property
    def beats_chance(self) -> bool:
        """Whether one in twenty shifted fits, the true one counted among them, does as well at most."""
        return (self.rank + 1) / (len(self.shifted_cosines) + 1) <= 0.05


def share(
    sound: torch.Tensor,
    pictures: torch.Tensor,
    sound_times: np.ndarray,
    picture_times: np.ndarray,
    shift: int = 0,
) -> SharedSpace:
    """Bring sound [N, Dx] and pictures [M, Dy] into one space; times are the tokens' middles, in seconds.

    With a `shift` the pairs are wrong by so many sound tokens: what is then found is found by chance.
    """
    x, y = whiten(sound), whiten(pictures)
    partner = np.roll(np.abs(sound_times[:, None] - picture_times[None, :]).argmin(1), shift)
    duration = float(sound_times[-1] + sound_times[0])
    hold_out = min(HOLD_OUT, duration / 6.0)
    kept = np.abs(sound_times[:, None] - sound_times[None, :]) > hold_out  # [N, N]: token, pair
    num_tokens = len(sound_times)
    mapped = cross_map(x, y[partner], kept)
    nearest = int(np.ceil(2.0 * hold_out / duration * num_tokens))
    shifts = np.unique(np.linspace(nearest, num_tokens - nearest, NUM_SHIFTS).round().astype(int))
    wrong_partners = [y[np.roll(partner, wrong)] for wrong in shifts]
    return SharedSpace(
        x=mapped.float(),
        y=y.float(),
        partner=partner,
        hold_out=hold_out,
        held_out_cosine=mean_cosine(mapped, y[partner]),
        shifted_cosines=np.array([mean_cosine(cross_map(x, wrong, kept), wrong) for wrong in wrong_partners]),
    )


def whiten(tokens: torch.Tensor, num_components: int = NUM_COMPONENTS, ridge: float = RIDGE) -> torch.Tensor:
    """Centred principal components of variance `v / (v + ridge max v)`: [T, at most num_components]."""
    centred = tokens.double() - tokens.double().mean(0)
    left, scale, _ = torch.linalg.svd(centred, full_matrices=False)
    num = min(num_components, len(tokens) - 1, tokens.shape[1])
    variance = scale[:num].square() / len(tokens)
    gain = (variance / (variance + ridge * variance[0]).clamp_min(1e-12)).sqrt()
    return left[:, :num] * len(tokens) ** 0.5 * gain


def cross_map(x: torch.Tensor, y: torch.Tensor, kept: np.ndarray) -> torch.Tensor:
    """Row i is `C_i' (x_i - mean_i)`, with mean and cross-covariance over the pairs `kept[i]`: [N, Ky]."""
    weight = torch.from_numpy(kept).to(x.dtype)
    weight = weight / weight.sum(1, keepdim=True).clamp_min(1.0)  # [N, P]
    mean_x, mean_y = weight @ x, weight @ y
    products = (x[:, :, None] * y[:, None, :]).flatten(1)  # [P, Kx * Ky]
    covariance = (weight @ products).view(-1, x.shape[1], y.shape[1]) - mean_x[:, :, None] * mean_y[:, None, :]
    return ((x - mean_x)[:, None, :] @ covariance)[:, 0]


def mean_cosine(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(x, y, dim=1).mean())
