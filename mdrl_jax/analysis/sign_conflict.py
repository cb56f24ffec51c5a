"""The TIES sign conflict of two edits (definitions §3, arXiv 2306.01708).

Among the entries that are in the top 20 % by |δ| of both edits, it is the share with opposite signs. `interference.py`
calls it for each pair of domains; `edits.py` has the figures of a single edit.

The top sets are found by counting (`parallel/counting.py`), so that a sharded tensor is never sorted or gathered.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdrl_jax import tree
from mdrl_jax.analysis.edits import Sums, by_tensor, over_layers
from mdrl_jax.parallel import counting, distributed
from mdrl_jax.parallel.programs import program
from mdrl_jax.stats.estimate import missing


def _conflicts(share: float, kind: str, a: jax.Array, b: jax.Array) -> dict[str, jax.Array]:
    """Of one tensor: the number of entries in both top sets, and how many of them have opposite signs."""
    k = counting.split(max(1, round(share * a.size)))
    in_a, in_b = (counting.highest(x, k) & (x != 0) for x in (a, b))
    shared = in_a & in_b
    return {"shared": jnp.sum(shared), "conflicts": jnp.sum(shared & ((a > 0) != (b > 0)))}


_conflicts_program = program(
    "sign_conflict",
    lambda a, b, share: by_tensor(lambda *tensors: _conflicts(share, *tensors), a, b),
    static_argnums=2,
)


def sign_conflict(edit_a: Any, edit_b: Any, share: float = 0.2) -> dict[str, Any]:
    """The share of entries with opposite signs, among those in the top `share` by |δ| of both edits.

    A top set is taken in each tensor. All entries as large as the smallest one of the set are in it; unchanged entries
    never are. Intervals are a jackknife over layers.

    Args:
      edit_a, edit_b: two trees δ with the same structure.
      share: the size of a top set, as a share of the tensor.

    Returns:
      {"all": record, "kinds": {kind: record}}. Each record adds "chance", which is ½, and "shared", the number of
      entries in both top sets. It has no estimate if there are none, and no interval if there are
      none without one of the layers (`over_layers`).
    """
    counted = distributed.gather(_conflicts_program(edit_a, edit_b, share))
    sums = {name: {k: np.asarray(v, float) for k, v in counts.items()} for name, counts in counted.items()}

    def record(part: dict[str, Sums]) -> dict[str, Any]:
        shared = int(sum(s["shared"].sum() for s in part.values()))
        if not shared:
            reason = "no coordinate is in both top sets"
            return missing(reason, "layer") | {"chance": 0.5, "shared": 0}
        return over_layers(part, lambda s: s("conflicts") / s("shared"), "shared") | {"chance": 0.5, "shared": shared}

    return {"all": record(sums), "kinds": {tree.kind(name): record({name: s}) for name, s in sums.items()}}
