"""Which weights get more bits: the budget is kept, costs decide, and more of it costs nobody bits."""

from __future__ import annotations

import numpy as np
import pytest

from export.quantization.widths import Weights, choose_widths, left_of_cost, neighbours

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


def test_the_cost_goes_with_the_square_of_the_step() -> None:
    assert left_of_cost(4) == 1
    assert left_of_cost(5) == pytest.approx((15 / 31) ** 2)
    assert left_of_cost(8, 5) == pytest.approx((31 / 255) ** 2)


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


def test_groups_that_are_not_counted_get_bits_that_save_more_than_the_others_do() -> None:
    layers = {"layer": Weights(1000, 1.0)}

    def head(cost: float, mean: float = 4.75) -> int:
        return choose_widths(layers | {"head": Weights(1000, cost, counted=False)}, mean, WIDTHS)["head"]

    assert [head(cost) for cost in (0.0, 0.5, 1.1, 5.0, 100.0)] == [4, 4, 5, 6, 8]
    assert head(0.0, 8.0) == 8  # there is nothing to compare with
    assert choose_widths(layers | {"head": Weights(1000, 9.0, counted=False)}, 4.5, (4, 8)) == {"layer": 4, "head": 8}
