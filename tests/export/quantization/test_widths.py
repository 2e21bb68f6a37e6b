"""Which weights get more bits: the budget is kept, costs decide, and more of it costs nobody bits."""

from __future__ import annotations

import numpy as np
import pytest

from export.quantization.widths import Weights, choose_widths, neighbours, width_of_ends

WIDTHS = (4, 5, 6, 8)


def random_groups(seed: int) -> dict[str, Weights]:
    generator = np.random.default_rng(seed)
    return {
        f"group {index}": Weights(int(generator.integers(1, 50)) * 100, float(generator.exponential()))
        for index in range(20)
    }


@pytest.mark.parametrize(
    ("mean", "expected"),
    [(4, (4,)), (4.75, (4, 5)), (5, (5,)), (5.5, (5, 6)), (6, (6,)), (7, (6, 8)), (8, (8,))],
)
def test_a_mean_is_made_of_the_widths_next_to_it(mean: float, expected: tuple[int, ...]) -> None:
    assert neighbours(mean, WIDTHS) == expected


def test_widths_of_other_providers_are_further_apart() -> None:
    assert neighbours(4.75, (4, 8)) == (4, 8)
    assert neighbours(8.0, (8,)) == (8,)


@pytest.mark.parametrize(
    ("mean", "widths", "expected"),
    [
        (4.0, WIDTHS, 6),
        (4.75, WIDTHS, 6),
        (6.0, WIDTHS, 6),
        (6.25, WIDTHS, 8),
        (8.0, WIDTHS, 8),
        (4.0, (4, 8), 8),
        (4.75, (4, 5), 5),  # the widest that there is
        (8.0, (8,), 8),
    ],
)
def test_the_ends_have_six_bits_or_as_many_as_the_layers(mean: float, widths: tuple[int, ...], expected: int) -> None:
    assert width_of_ends(mean, widths) == expected


@pytest.mark.parametrize("widths", [WIDTHS, (4, 8)])
@pytest.mark.parametrize("mean", [4.0, 4.25, 4.75, 5.0, 5.5, 6.5, 8.0])
def test_the_budget_is_kept_and_nearly_spent(mean: float, widths: tuple[int, ...]) -> None:
    groups = random_groups(0)
    found = choose_widths(groups, mean, widths)
    total = sum(group.size for group in groups.values())
    spent = sum(found[name] * group.size for name, group in groups.items())
    assert found.keys() == groups.keys()
    assert set(found.values()) <= set(neighbours(mean, widths))
    left = mean * total - spent
    assert left >= 0
    steps = neighbours(mean, widths)
    narrow = [group.size for name, group in groups.items() if found[name] < steps[-1]]
    assert all(left < size * (steps[-1] - steps[0]) for size in narrow)  # nothing else would fit


def test_more_bits_take_none_from_groups_of_one_size() -> None:
    groups = {name: Weights(100, group.cost) for name, group in random_groups(1).items()}
    before = dict.fromkeys(groups, 0)
    for mean in np.linspace(4, 8, 33):
        found = choose_widths(groups, float(mean), WIDTHS)
        assert all(found[name] >= before[name] for name in groups)
        before = found


def test_the_wider_ones_are_those_whose_numbers_cost_most() -> None:
    groups = {"dear": Weights(100, 3.0), "large": Weights(300, 4.0), "cheap": Weights(100, 0.1)}
    assert choose_widths(groups, 4.2, WIDTHS) == {"dear": 5, "large": 4, "cheap": 4}
    # What does not fit is passed over.
    assert choose_widths(groups, 4.5, WIDTHS) == {"dear": 5, "large": 4, "cheap": 5}
