"""`bench`: what is timed computes the same products as the peers', at the cost that theory allows."""

import dataclasses
import json

import numpy as np
import pytest
from rich.table import Table

from mdrl_jax import tree
from mdrl_jax.bench import curvature, peers
from mdrl_jax.bench.measure import Task
from mdrl_jax.commands import bench
from mdrl_jax.commands.bench import Given
from mdrl_jax.main import main

SMALL = curvature.Sizes(rows=2)  # FLOPs ratios do not depend on the number of rows: these are those of the benchmark


@pytest.fixture(scope="module")
def small() -> curvature.Problem:
    return curvature.problem(SMALL)


@pytest.fixture(scope="module")
def on(small: curvature.Problem) -> curvature.Route:
    return curvature.route(small)


@pytest.fixture(scope="module")
def tasks(small: curvature.Problem, on: curvature.Route) -> dict[str, Task]:
    return {**curvature.whole_tasks(small), **curvature.route_tasks(small, on)}


@pytest.fixture(scope="module")
def costs(tasks: dict[str, Task]) -> dict[str, float]:
    """FLOPs of each task in units of the gradient's."""
    unit = tasks[curvature.GRADIENT].flops
    return {name: task.flops / unit for name, task in tasks.items() if task.flops is not None}


# --- the same mathematics ---------------------------------------------------------------------------------------------


@pytest.mark.slow  # tests/second_order compares these products, tests/parallel/test_fit.py their counts
def test_forward_only_second_order_is_that_of_the_same_loss(small: curvature.Problem, tasks: dict[str, Task]):
    (loss, count), gradient = tasks[curvature.GRADIENT].call()
    first, second = tasks["jets"].call()
    assert float(loss) > 0
    np.testing.assert_allclose(first, tree.vdot(gradient, small.v) / count, rtol=1e-3)
    np.testing.assert_allclose(second, tree.vdot(small.v, tasks[curvature.HV].call()), rtol=1e-3)


@pytest.mark.slow  # most of it is the compilation of random vectors of the benchmark's vocabulary
def test_route_is_a_tenth_of_each_layer():
    sizes = dataclasses.replace(SMALL, layers=2, width=32)
    problem = curvature.problem(sizes)
    width = problem.model.config.d_mlp
    left = np.asarray(curvature.route(problem).fixed["keep_LF"]).sum(axis=1)
    np.testing.assert_array_equal(left, [width - round(0.1 * width)] * 2)


@pytest.mark.slow  # tests/second_order compares these products, tests/parallel/test_fit.py their counts
def test_matfree_computes_our_products(
    small: curvature.Problem, on: curvature.Route, tasks: dict[str, Task], fast_compile: None
):
    pytest.importorskip("matfree")
    theirs, lines = peers.matfree(small, on)
    assert [set(line.over) for line in lines] == [{name} for name in theirs]
    for name, own in {"matfree Hv": curvature.HV, "matfree GGN": curvature.GGN}.items():
        assert relative(theirs[name].call(), peers.flatten(tasks[own].call())[0]) < 1e-3
    values, vectors = theirs["matfree Lanczos"].call()
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(curvature.LANCZOS), atol=1e-4)
    np.testing.assert_allclose(values[::-1][:2], tasks["Lanczos"].call().values[:2], rtol=1e-3)


@pytest.mark.slow  # tests/second_order compares these products, tests/parallel/test_fit.py their counts
@pytest.mark.filterwarnings("ignore")
def test_curvlinops_computes_our_products(small: curvature.Problem, tasks: dict[str, Task]):
    pytest.importorskip("curvlinops")
    names = [name for name, _ in peers.torch_network(small)[0].named_parameters()]
    theirs, _ = peers.curvlinops(small)
    for name, own in {"curvlinops Hv": curvature.HV, "curvlinops GGN": curvature.GGN}.items():
        # Their loss is a mean over tokens, ours over completions.
        found = SMALL.completion * theirs[name].call().numpy()
        assert relative(found, peers.exported(tasks[own].call(), names)) < 1e-3
    gradient = theirs[peers.TORCH_GRADIENT].flops
    assert gradient and theirs["curvlinops Hv"].flops == pytest.approx(3 * gradient, rel=0.05)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))


# --- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # tests/second_order compares these products, tests/parallel/test_fit.py their counts
def test_matrix_products_are_within_the_targets(costs: dict[str, float]):
    measured = [line for line in curvature.LINES if "flops" in line.target]
    assert len(measured) == 4
    for line in measured:
        (name,) = line.over
        assert 0.9 * line.limit < costs[name] <= line.target["flops"], line.what


@pytest.mark.slow  # tests/second_order compares these products, tests/parallel/test_fit.py their counts
def test_a_further_vector_of_a_block_costs_two_gradients(costs: dict[str, float]):
    further = (costs["Hv of a block"] - costs[curvature.HV]) / (curvature.BLOCK - 1)
    assert further == pytest.approx(2.0, rel=0.02)


# --- the command ------------------------------------------------------------------------------------------------------


def test_json_lines_and_a_table(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    asked: list[curvature.Sizes] = []
    named = {name for line in curvature.LINES for name in (*line.over, *line.under)}
    idle = {name: Task(lambda: None, 1.0) for name in named}
    monkeypatch.setattr(curvature, "problem", asked.append)
    monkeypatch.setattr(curvature, "route", lambda given: None)
    monkeypatch.setattr(curvature, "whole_tasks", lambda given: idle)
    monkeypatch.setattr(curvature, "route_tasks", lambda given, on: {})
    monkeypatch.setattr(peers, "installed", lambda *packages: False)
    assert main(["mdrl", "bench", "curvature", "--repeats=2", "--layers=1", "--width=32", "--rows=3"]) == 0
    assert asked == [curvature.Sizes(layers=1, width=32, rows=3)]
    out, err = capfd.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    assert [record["what"] for record in found[:-2]] == [line.what for line in curvature.LINES]
    for record in found[:-2]:
        assert record["bench"] == "curvature" and record["reason"] is None and record["repeats"] == 2
        low, high = record["time_ci95"]
        assert low <= record["time_ratio"] <= high
    assert [record["reason"] for record in found[-2:]] == [
        "matfree is not installed", "torch or curvlinops is not installed"
    ]  # fmt: skip
    for record in found:
        assert record["what"] in err


@pytest.mark.parametrize(
    "argv, named",
    [
        (["speed"], "'speed' is not known; known: step, decode, train, curvature, start"),
        (["curvature", "speed"], "'speed'"),
        (["--names=speed"], "'speed'"),
        (["curvature", "--width=33"], "--width=33"),
        (["curvature", "--repeats=1"], "repeats"),
        (["--steps=1"], "steps"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(argv: list[str], named: str, capsys: pytest.CaptureFixture[str]):
    assert main(["mdrl", "bench", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and named in err


def test_names_and_flags_in_any_order(monkeypatch: pytest.MonkeyPatch):
    ran: list[tuple] = []

    def run(given: Given, repeats: int, say: object) -> tuple[list, Table]:
        ran.append((given.sizes.layers, repeats))
        return [], Table()

    monkeypatch.setattr(bench, "BENCHES", {"curvature": run})
    for argv in (["curvature", "--repeats=3", "--layers=2"], ["--repeats=3", "curvature", "--layers=2"]):
        assert main(["mdrl", "bench", *argv]) == 0
    assert main(["mdrl", "bench", "--names=curvature", "--repeats=3", "--layers=2"]) == 0
    assert main(["mdrl", "bench", "--layers=2", "--repeats=3"]) == 0
    assert ran == [(2, 3)] * 4
