"""The core's own tests once more, by kernels in the emulator's other variant.

Nobody has looked whether the machine's multiply-add rounds once or twice, what its max and min make of a NaN, or what
becomes of a float outside int32. So the kernels have to be right both ways (kernels/tpc/emulator/emulator.h).
"""

from __future__ import annotations

import pytest
from test_accuracy import (  # noqa: F401
    test_costs_of_very_different_size,
    test_gradients_of_tokens,
    test_the_switch_from_scalings_to_absorption_does_not_show,
    test_weights_of_very_different_size,
)
from test_gradients import (  # noqa: F401
    inputs,
    test_gradients_stay_finite_at_small_epsilon,
    test_implicit_attention_by_finite_differences,
    test_items_without_mass_get_zero_and_nan_stays_in_its_item,
    test_padding_of_a_cost_gets_exactly_zero,
    test_unrolled_attention,
)
from test_isolation import (  # noqa: F401
    batch,
    test_item_alone_in_a_batch_and_at_another_place,
    test_item_without_mass_returns_its_tokens,
    test_nan_and_inf_stay_in_their_item_and_fill_it,
    test_negative_weight_makes_its_item_nan,
    test_what_padding_holds_changes_nothing,
)
from test_properties import (  # noqa: F401
    test_attended_tokens_are_the_plan_times_tokens,
    test_known_answers,
    test_marginals_at_every_dtype,
    test_plain_tensors_of_weights_and_masks,
    test_tol_stops_each_item_at_its_own_round,
)

from otfuse._backends.tpc import emulator


@pytest.fixture(scope="module", params=["tpc"])
def backend(request):
    if emulator.COMPILER is None:
        pytest.skip(f"no C++ compiler: {emulator.HOW_TO_GET_ONE}")
    with emulator.variant():
        yield request.param
