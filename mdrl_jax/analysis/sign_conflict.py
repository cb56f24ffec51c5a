"""TIES sign conflict of two edits: where both move most, do they move opposite ways (definitions §3, arXiv 2306.01708).

Thresholds are found by counting, so that a sharded tensor is never sorted or gathered.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdrl_jax import tree
from mdrl_jax.analysis.edits import Sums, by_tensor, over_layers, unmeasured
from mdrl_jax.parallel import distributed
from mdrl_jax.parallel.programs import program


def _threshold(size: jax.Array, k: int) -> jax.Array:
    """The k-th largest entry: bisection of counts over the bits of a float, whose order is that of their integers."""
    bits = jax.lax.bitcast_convert_type(size.astype(jnp.float32), jnp.int32)

    def halve(_: Any, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends  # at least k entries reach `low`, fewer reach `high`
        middle = low + (high - low) // 2
        enough = jnp.sum(bits >= middle) >= k
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, _ = jax.lax.fori_loop(0, 32, halve, (jnp.int32(0), jnp.max(bits) + 1))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def _conflicts(share: float, kind: str, a: jax.Array, b: jax.Array) -> dict[str, jax.Array]:
    k = max(1, round(share * a.size))
    in_a, in_b = ((jnp.abs(x) >= _threshold(jnp.abs(x), k)) & (x != 0) for x in (a, b))
    shared = in_a & in_b
    return {"shared": jnp.sum(shared), "conflicts": jnp.sum(shared & ((a > 0) != (b > 0)))}


_conflicts_program = program(
    "sign_conflict",
    lambda a, b, share: by_tensor(lambda *tensors: _conflicts(share, *tensors), a, b),
    static_argnums=2,
)


def sign_conflict(edit_a: Any, edit_b: Any, share: float = 0.2) -> dict[str, Any]:
    """TIES (arXiv 2306.01708): share of coordinates in the top `share` by |δ| of both edits whose signs differ.

    {"all": record, "kinds": {kind: record}}, each beside its chance value ½ and "shared", the number of such
    coordinates. Top sets are of each tensor; entries tied at the threshold are all in, unchanged ones never.
    Intervals are by jackknife over layers.
    """
    counted = distributed.gather(_conflicts_program(edit_a, edit_b, share))
    sums = {name: {k: np.asarray(v, float) for k, v in counts.items()} for name, counts in counted.items()}

    def record(part: dict[str, Sums]) -> dict[str, Any]:
        shared = int(sum(s["shared"].sum() for s in part.values()))
        if not shared:
            reason = "no coordinate is in both top sets"
            return unmeasured(reason) | {"chance": 0.5, "shared": 0}
        return over_layers(part, lambda s: s("conflicts") / s("shared"), "shared") | {"chance": 0.5, "shared": shared}

    return {"all": record(sums), "kinds": {tree.kind(name): record({name: s}) for name, s in sums.items()}}
