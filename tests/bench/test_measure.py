"""Ratios of figures by hand, and the order in which tasks run."""

import numpy as np
import pytest

from mdrl_jax.bench import measure
from mdrl_jax.bench.measure import Line, Task, records, rounds


def nothing() -> None:
    pass


def test_each_round_runs_each_task_once_and_begins_with_another():
    ran: list[str] = []
    tasks = {name: Task(lambda name=name: ran.append(name)) for name in "abc"}
    seconds = rounds(tasks, 4, lambda text: None)
    by_round = ["".join(ran[i : i + 3]) for i in range(0, len(ran), 3)]
    assert len(by_round) == 1 + 4  # the first calls are not timed
    assert all(sorted(order) == ["a", "b", "c"] for order in by_round)
    assert {order[0] for order in by_round[1:]} == {"a", "b", "c"}
    assert all(x.shape == (4,) and np.all(x > 0) for x in seconds.values())


def test_seconds_are_those_of_the_task(monkeypatch: pytest.MonkeyPatch):
    """On a clock that only the tasks move forward: 2 s and 5 s a call, ten times that for the first call."""
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def taking(duration: float) -> Task:
        calls: list[int] = []

        def call() -> None:
            now[0] += duration * (1 if calls else 10)
            calls.append(1)

        return Task(call)

    seconds = rounds({"short": taking(2), "long": taking(5)}, 3, lambda text: None)
    np.testing.assert_array_equal(seconds["short"], [2, 2, 2])
    np.testing.assert_array_equal(seconds["long"], [5, 5, 5])


TASKS = {
    "unit": Task(nothing, flops=10.0, bytes=100.0),
    "one": Task(nothing, flops=27.0, bytes=150.0),
    "block": Task(nothing, flops=87.0, bytes=330.0),
    "host": Task(nothing),
}
SECONDS = {"unit": [1.0, 1.0, 1.0], "one": [3.0, 3.0, 3.0], "block": [9.0, 9.0, 9.0], "host": [34.0, 34.0, 34.0]}


def record(line: Line, seconds: dict[str, list[float]] = SECONDS):
    (found,) = records("b", [line], TASKS, {name: np.array(s) for name, s in seconds.items()})
    return found


def test_figures_in_units_of_another_task():
    line = Line("product", {"one": 1}, {"unit": 1}, limit=8 / 3, target={"flops": 2.8})
    assert record(line) == {
        "bench": "b", "what": "product", "flops_ratio": 2.7, "time_ratio": 3.0, "time_ci95": [3.0, 3.0],
        "memory_ratio": 1.5, "limit": 8 / 3, "target": {"flops": 2.8}, "seconds": 3.0, "flops": 27.0, "bytes": 150.0,
        "repeats": 3, "reason": None,
    }  # fmt: skip


def test_each_further_vector_of_a_block_is_the_difference():
    found = record(Line("further", {"block": 1 / 3, "one": -1 / 3}, {"unit": 1}))
    figures = [found[f"{key}_ratio"] for key in ("flops", "time", "memory")]
    np.testing.assert_allclose(figures, [(87 - 27) / 30, (9 - 3) / 3, (330 - 150) / 300])


def test_repeated_products_take_their_time_but_not_their_memory():
    found = record(Line("solver", {"block": 1}, {"one": 3}))
    figures = [found[f"{key}_ratio"] for key in ("flops", "time", "memory")]
    np.testing.assert_allclose(figures, [87 / (3 * 27), 9 / (3 * 3), 330 / 150])


def test_what_is_not_known_is_null():
    found = record(Line("host loop", {"host": 1}, {"one": 10}))
    assert (found["flops_ratio"], found["memory_ratio"]) == (None, None)
    assert found["time_ratio"] == pytest.approx(34 / 30)


def test_a_line_without_a_measurement_says_why():
    found = record(Line("peer", reason="peer is not installed"))
    assert found["reason"] == "peer is not installed"
    assert {found[key] for key in ("flops_ratio", "time_ratio", "memory_ratio", "seconds", "repeats")} == {None}


def test_ratio_is_of_medians_and_drift_common_to_both_cancels():
    drift = np.array([1.0, 1.1, 1.3, 0.9, 4.0])
    found = record(Line("x", {"one": 1}, {"unit": 1}), {**SECONDS, "unit": list(drift), "one": list(2 * drift)})
    assert found["time_ratio"] == pytest.approx(2) and found["time_ci95"] == pytest.approx([2, 2])
    one_slow = [3.0, 3.0, 3.0, 3.0, 60.0]
    found = record(Line("x", {"one": 1}, {"unit": 1}), {**SECONDS, "unit": [1.0] * 5, "one": one_slow})
    assert found["time_ratio"] == 3.0 and found["time_ci95"][1] > 3.0
