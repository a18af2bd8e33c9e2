"""Optimal-transport fusion layers: batched Sinkhorn and OT attention, exact, differentiable and fast."""

from otfuse import nn
from otfuse._backends.base import BackendError
from otfuse._backends.select import backends
from otfuse._problem import SinkhornAttendOutput, SinkhornOutput
from otfuse.functional import similarity_matrix, sinkhorn, sinkhorn_attend
from otfuse.loss import ot_alignment_loss
from otfuse.varlen import sinkhorn_attend_varlen

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "SinkhornAttendOutput",
    "SinkhornOutput",
    "backends",
    "nn",
    "ot_alignment_loss",
    "similarity_matrix",
    "sinkhorn",
    "sinkhorn_attend",
    "sinkhorn_attend_varlen",
]
