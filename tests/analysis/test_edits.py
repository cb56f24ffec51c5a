"""Figures of edits against float64 on the host, sharded or not; neuron scores and sign conflicts by their words."""

import json
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh

from mdrl_jax import tree
from mdrl_jax.analysis import edits
from mdrl_jax.parallel.sharding import named
from mdrl_jax.stats.estimate import recorded

L, D, H, K, h, F, V = 3, 16, 4, 2, 6, 24, 40
SHAPES: dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]] = {
    "embedding": ((V, D), ("vocab", "embed")),
    "norm/scale": ((D,), ("embed",)),
    "layers/q/kernel": ((L, D, H, h), (None, "embed", "heads", None)),
    "layers/q/bias": ((L, H, h), (None, "heads", None)),
    "layers/k/kernel": ((L, D, K, h), (None, "embed", "kv_heads", None)),
    "layers/o/kernel": ((L, H, h, D), (None, "heads", None, "embed")),
    "layers/gate/kernel": ((L, D, F), (None, "embed", "mlp")),
    "layers/up/kernel": ((L, D, F), (None, "embed", "mlp")),
    "layers/down/kernel": ((L, F, D), (None, "mlp", "embed")),
}
AS_MATRIX = {"q": (D, H * h), "k": (D, K * h), "o": (H * h, D), "gate": (D, F), "up": (D, F), "down": (F, D)}


def nested(flat: dict[str, Any]) -> Any:
    """{"a/b": x} to {"a": {"b": x}}."""
    out: dict[str, Any] = {}
    for name, x in flat.items():
        *path, last = name.split("/")
        inner = out
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = x
    return out


def two_ends(seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Parameters before and after an edit of mixed sizes, with unmoved entries and entries that were 0."""
    rng = np.random.default_rng(seed)
    before, after = {}, {}
    for name, (shape, _) in SHAPES.items():
        x = (0.02 * rng.normal(size=shape)).astype(np.float32)
        x.reshape(-1)[:4] = 0
        delta = rng.normal(size=shape) * 10 ** rng.uniform(-9, -3, shape) * (rng.random(shape) < 0.7)
        before[name], after[name] = x, (x + delta).astype(np.float32)
    return before, after


def share_counts(before: np.ndarray, after: np.ndarray) -> dict[str, int]:
    """Definitions §3 in words, on float32 values."""
    size = np.abs(after - before)
    relative = (size < np.float32(1e-3) * np.abs(before)) | (size == 0)
    counts = {f"{t:.0e}": int(np.sum(size < np.float32(t))) for t in (1e-7, 1e-6, 1e-5)}
    both = int(np.sum(relative & (size < np.float32(1e-7))))
    return counts | {"relative": int(np.sum(relative)), "both": both, "unchanged": int(np.sum(size == 0))}


def coarse(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


@pytest.fixture(scope="module")
def ends() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    return two_ends()


@pytest.fixture(scope="module")
def figures(ends: tuple[dict[str, np.ndarray], dict[str, np.ndarray]]) -> dict[str, Any]:
    return edits.edit_figures(*(jax.tree.map(jnp.asarray, nested(end)) for end in ends))


def check_shares(found: dict[str, Any], before: list[np.ndarray], after: list[np.ndarray]) -> None:
    n = sum(x.size for x in before)
    assert found["n"] == n
    for cast, change in (("fp32", lambda x: x), ("bf16", coarse)):
        each = [share_counts(change(b), change(a)) for b, a in zip(before, after, strict=True)]
        want = {key: sum(c[key] for c in each) / n for key in each[0]}
        got = {key: r["estimate"] for key, r in (found[cast]["below"] | found[cast]).items() if key != "below"}
        assert got == pytest.approx(want, abs=1e-12), cast
    delta = np.concatenate([(a - b).ravel() for b, a in zip(before, after, strict=True)]).astype(np.float64)
    participation = np.sum(delta**2) ** 2 / (n * np.sum(delta**4))
    theta = math.sqrt(sum(np.sum(x.astype(np.float64) ** 2) for x in before))
    assert found["participation"]["estimate"] == pytest.approx(participation, rel=1e-5)
    assert found["norm"]["estimate"] == pytest.approx(np.linalg.norm(delta), rel=1e-5)
    assert found["relative_norm"]["estimate"] == pytest.approx(np.linalg.norm(delta) / theta, rel=1e-5)


def test_shares_participation_and_norms_are_those_of_the_host(ends, figures) -> None:
    before, after = ends
    check_shares(figures["all"], list(before.values()), list(after.values()))
    for name in before:
        check_shares(figures["kinds"][tree.kind(name)], [before[name]], [after[name]])
    json.dumps(figures, allow_nan=False)


def test_the_bf16_cast_is_not_optimised_away(figures) -> None:
    """bf16 spacing hides small moves: more entries look unmoved than are."""
    shares = [figures["all"][cast]["unchanged"]["estimate"] for cast in ("fp32", "bf16")]
    assert shares[1] > shares[0] + 0.2


def test_histogram_counts_every_entry_once(ends, figures) -> None:
    found = figures["histogram"]
    edges = (10.0 ** np.array(found["log10_edges"])).astype(np.float32)
    for change, counted in ((lambda x: x, found), (coarse, found["bf16"])):
        each = [np.abs(change(a) - change(b)).ravel() for b, a in zip(*(e.values() for e in ends), strict=True)]
        size = np.concatenate(each)
        want = np.bincount(np.searchsorted(edges, size, side="right"), minlength=edges.size + 1)
        assert counted["counts"] == want.tolist()
        assert (sum(counted["counts"]), counted["unchanged"]) == (size.size, np.sum(size == 0))


def test_effective_rank_is_the_entropy_of_singular_values(ends, figures) -> None:
    for kind, shape in AS_MATRIX.items():
        before, after = (end[f"layers/{kind}/kernel"] for end in ends)
        got = figures["kinds"][kind]["layers"]["effective_rank"]
        for layer in range(L):
            p = np.linalg.svd((after - before)[layer].reshape(shape), compute_uv=False) ** 2
            p = p / p.sum()
            assert got[layer] == pytest.approx(np.exp(-np.sum(p * np.log(p))), rel=1e-3)
    assert "effective_rank" in figures["kinds"]["embedding"]
    assert "effective_rank" not in figures["kinds"]["norm"] and "effective_rank" not in figures["kinds"]["q_bias"]


def test_figures_of_known_edits() -> None:
    """An outer product has rank 1 whatever its size; equal moves participate fully; one entry alone 1/n."""
    rng = np.random.default_rng(3)
    outer = np.einsum("ld,lf->ldf", rng.normal(size=(2, D)), rng.normal(size=(2, F)))
    one = np.zeros((2, F, D))
    one[1, 2, 3] = 1.0
    delta = {"gate": 1e-11 * outer, "up": np.full((2, D, F), 1e-12), "down": 1e-15 * one}
    after = {"layers": {k: {"kernel": jnp.asarray(x, jnp.float32)} for k, x in delta.items()}}
    found = edits.edit_figures(tree.zeros_like(after), after)
    kinds = found["kinds"]
    assert kinds["gate"]["effective_rank"]["estimate"] == pytest.approx(1.0, abs=1e-3)
    assert kinds["up"]["participation"]["estimate"] == pytest.approx(1.0, rel=1e-5)
    assert kinds["down"]["participation"]["estimate"] == pytest.approx(1 / (2 * D * F), rel=1e-5)
    assert kinds["down"]["layers"]["effective_rank"][0] is None
    assert kinds["down"]["effective_rank"] == {
        "estimate": pytest.approx(1.0), "ci95": None, "null": None, "n": 1, "unit": "layer"
    }  # fmt: skip
    assert found["all"]["relative_norm"]["reason"] == "the parameters before the edit are 0"
    # No entry moved: nothing to take part, everything sparse.
    still = edits.edit_figures(after, after)["all"]
    assert still["participation"]["reason"] == "no entry changed"
    assert (
        still["scale_free"]["small"]["reason"] == still["scale_free"]["participation"]["reason"] == "no entry changed"
    )
    assert still["fp32"]["both"]["estimate"] == still["bf16"]["unchanged"]["estimate"] == 1.0


def test_entries_that_are_not_finite_are_said() -> None:
    before = {"layers": {"gate": {"kernel": jnp.ones((2, D, F))}, "up": {"kernel": jnp.ones((2, D, F))}}}
    after = jax.tree.map(lambda x: x.at[:, 0, 0].set(math.nan), before)
    found = edits.edit_figures(before, after)
    for figures in (found["all"], *found["kinds"].values()):
        shown = [figures["participation"], figures["norm"], figures["relative_norm"], *figures["scale_free"].values()]
        shown += [figures["effective_rank"]] if "effective_rank" in figures else []
        assert {figure["reason"] for figure in shown} == {"an entry is not finite"}
    json.dumps(found["all"], allow_nan=False)


def test_scale_free_figures_are_of_entries_in_units_of_their_tensor(ends, figures) -> None:
    before, after = ends
    small, fourth, n = 0, 0.0, 0
    for name, b in before.items():
        for tensor in (after[name] - b).astype(np.float64) if tree.is_stacked(name) else [after[name] - b]:
            unit = tensor / math.sqrt(np.mean(tensor.astype(np.float64) ** 2))
            small, fourth, n = small + np.sum(np.abs(unit) < 0.1), fourth + np.sum(unit**4), n + unit.size
    found = figures["all"]["scale_free"]
    assert found["small"]["estimate"] == pytest.approx(small / n, abs=1e-3)
    assert found["participation"]["estimate"] == pytest.approx(n / fourth, rel=1e-4)


def test_a_gaussian_edit_has_the_figures_that_are_its_null() -> None:
    """Its size differs between tensors, and one tensor does not change; neither matters to the scale-free figures."""
    rng = np.random.default_rng(4)
    x = {
        "gate": 0.02 * rng.normal(size=(2, 64, 96)),
        "up": 0.02 * rng.normal(size=(2, 64, 96)),
        "down": np.ones((2, 96, 64)),
    }
    sizes = {"gate": np.array([1e-5, 1e-4])[:, None, None], "up": 1e-3, "down": 0.0}
    after = {k: v + sizes[k] * rng.normal(size=v.shape) for k, v in x.items()}
    both = ({"layers": {k: {"kernel": jnp.asarray(v, jnp.float32)} for k, v in end.items()}} for end in (x, after))
    found = edits.edit_figures(*both)["all"]
    for figure in (found["scale_free"]["small"], found["scale_free"]["participation"], found["bf16"]["unchanged"]):
        assert figure["estimate"] == pytest.approx(figure["null"], rel=0.05)
    assert found["scale_free"]["small"]["null"] == pytest.approx(0.0797, abs=1e-4)
    assert 0.4 < found["bf16"]["unchanged"]["estimate"] < 0.9
    assert found["participation"]["estimate"] < 0.25 < found["scale_free"]["participation"]["estimate"]


def test_intervals_are_over_layers_and_unstacked_counts_have_none(ends, figures) -> None:
    before, after = (end["layers/gate/kernel"] for end in ends)
    per_layer = [share_counts(b, a)["relative"] / b.size for b, a in zip(before, after, strict=True)]
    e = recorded(figures["kinds"]["gate"]["fp32"]["relative"])
    assert e is not None and e.unit == "layer" and e.n == L
    stderr = np.std(per_layer, ddof=1) / math.sqrt(L)  # tensors of one size: the jackknife is the usual error
    assert e.high - e.value == pytest.approx(4.3027 * stderr, rel=1e-4)
    # In all, a layer is left out with all its tensors, the rest of the layers counting for L of them.
    shares = []
    for out in range(L):
        kept, n = 0.0, 0
        for name, b in ends[0].items():
            a, weight, rows = ends[1][name], 1.0, slice(None)
            if tree.is_stacked(name):
                weight, rows = L / (L - 1), [i for i in range(L) if i != out]
            kept, n = kept + weight * share_counts(b[rows], a[rows])["relative"], n + b.size
        shares.append(kept / n)
    e = recorded(figures["all"]["fp32"]["relative"])
    assert e is not None
    stderr = math.sqrt((L - 1) * np.var(shares))
    assert e.high - e.value == pytest.approx(4.3027 * stderr, rel=1e-4)
    embedding = figures["kinds"]["embedding"]["fp32"]["relative"]
    assert (embedding["ci95"], embedding["unit"], embedding["n"]) == (None, "entry", V * D)


def test_sharded_parameters_give_the_same_figures_without_gathers(ends, figures, mesh8: Mesh) -> None:
    put = [nested({name: jax.device_put(x, named(mesh8, *SHAPES[name][1])) for name, x in end.items()}) for end in ends]
    with jax.set_mesh(mesh8):
        found = edits.edit_figures(*put)
        programs = [
            edits._sums_program.lower(*put),
            edits._conflicts_program.lower(*put, 0.2),
        ]
    same_figures(found, figures)
    smallest = min(math.prod(AS_MATRIX[kind]) for kind in ("gate", "q"))
    for program in programs:
        for line in program.compile().as_text().splitlines():
            if re.search(r" all-gather[-\w]*\(", line):
                size = math.prod(int(n) for n in re.search(r"f32\[([\d,]*)\]", line).group(1).split(","))
                assert size <= D * D < smallest, line


def same_figures(a: Any, b: Any) -> None:
    leaves_a, leaves_b = jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)
    for (path, x), y in zip(leaves_a, leaves_b, strict=True):
        assert x == (y if isinstance(y, str) else pytest.approx(y, rel=2e-3, abs=1e-6)), path


def test_neuron_scores_add_the_three_norms(mesh8: Mesh) -> None:
    rng = np.random.default_rng(1)
    delta = {k: rng.normal(size=SHAPES[f"layers/{k}/kernel"][0]).astype(np.float32) for k in ("gate", "up", "down")}
    want = np.sqrt(sum(np.sum(delta[k] ** 2, axis=1) for k in ("gate", "up")) + np.sum(delta["down"] ** 2, axis=2))
    host = {"layers": {k: {"kernel": jnp.asarray(x)} for k, x in delta.items()}}
    np.testing.assert_allclose(edits.neuron_scores(host), want, rtol=1e-5)
    assert want.shape == (L, F)
    names = {k: SHAPES[f"layers/{k}/kernel"][1] for k in delta}
    put = {"layers": {k: {"kernel": jax.device_put(x, named(mesh8, *names[k]))} for k, x in delta.items()}}
    with jax.set_mesh(mesh8):
        np.testing.assert_allclose(edits.neuron_scores(put), want, rtol=1e-5)


def test_sign_conflict_against_sorted_sets() -> None:
    rng = np.random.default_rng(4)
    shapes = {name: SHAPES[name][0] for name in ("embedding", "layers/gate/kernel", "layers/o/kernel")}
    a = {name: (1e-6 * rng.normal(size=s)).astype(np.float32) for name, s in shapes.items()}
    b = {name: (0.5 * a[name] + 1e-6 * rng.normal(size=s)).astype(np.float32) for name, s in shapes.items()}
    found = edits.sign_conflict(*(nested({k: jnp.asarray(x) for k, x in e.items()}) for e in (a, b)))
    shared = conflicts = 0
    for name in shapes:
        rows = L if tree.is_stacked(name) else 1
        own = np.zeros(2, int)
        for x, y in zip(a[name].reshape(rows, -1), b[name].reshape(rows, -1), strict=True):
            k = round(0.2 * x.size)
            sets = set(np.argsort(-np.abs(x))[:k].tolist()) & set(np.argsort(-np.abs(y))[:k].tolist())
            own += len(sets), sum(x[i] * y[i] < 0 for i in sets)
        assert found["kinds"][tree.kind(name)]["shared"] == own[0]
        assert found["kinds"][tree.kind(name)]["estimate"] == pytest.approx(own[1] / own[0])
        shared, conflicts = shared + own[0], conflicts + own[1]
    assert (found["all"]["shared"], found["all"]["estimate"]) == (shared, pytest.approx(conflicts / shared))
    assert found["all"]["estimate"] < 0.3 < found["all"]["chance"] == 0.5
    json.dumps(found, allow_nan=False)


def test_sign_conflict_of_an_edit_with_itself_its_negative_and_nothing() -> None:
    edit = {"layers": {"gate": {"kernel": jnp.asarray(np.random.default_rng(5).normal(size=(2, D, F)), jnp.float32)}}}
    assert edits.sign_conflict(edit, edit)["all"]["estimate"] == 0.0
    assert edits.sign_conflict(edit, tree.scale(-1.0, edit))["all"]["estimate"] == 1.0
    nothing = edits.sign_conflict(edit, tree.zeros_like(edit))["all"]
    assert nothing["estimate"] is None and nothing["reason"]


def test_a_gaussian_edit_is_its_own_null():
    """The nulls of the relative share and of the participation ratio, by drawing what they are the expectation of."""
    rng = np.random.default_rng(3)
    before = {"embedding": rng.normal(size=(400, 50)).astype(np.float32) * 0.1}
    before["layers"] = {"gate": {"kernel": rng.normal(size=(3, 60, 80)).astype(np.float32)}}
    scales = {"embedding": 2e-3, "gate": 2e-3}
    after = {"embedding": before["embedding"] + scales["embedding"] * rng.normal(size=(400, 50)).astype(np.float32)}
    moved = scales["gate"] * rng.normal(size=(3, 60, 80)).astype(np.float32)
    after["layers"] = {"gate": {"kernel": before["layers"]["gate"]["kernel"] + moved}}
    figures = edits.edit_figures(before, after)["all"]
    share, ratio = figures["fp32"]["relative"], figures["participation"]
    assert share["null"] == pytest.approx(share["estimate"], abs=0.01)
    assert ratio["null"] == pytest.approx(1 / 3, abs=0.01) and ratio["estimate"] == pytest.approx(1 / 3, abs=0.02)
