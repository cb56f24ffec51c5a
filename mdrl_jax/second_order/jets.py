"""Second derivatives of log-probs along a direction, for every token, without a backward pass (definitions §6).

For a tangent direction v and tokens y fixed in advance,

    logp_t,   u_t = v·∇log π(y_t | y_<t),   w_t = vᵀ∇²log π(y_t | y_<t) v

by nested forward mode. The second-order state (x, x₁, x₂) of ε ↦ x(θ + εv) is pushed through one layer at a time,
both jvps inside the body of the layer scan: 1.67 gradients' matrix products at best, against 2.34 for a jvp of a jvp
around the scan, and no activations are kept. Every objective's first and second derivative is arithmetic on (u, w):
`objectives.py`. In a model that computes in bfloat16 the tangents of activations are bfloat16 too; those of parameters,
and all sums, are float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mdrl_jax.rl.logprobs import over_chunks
from mdrl_jax.second_order.decoder_parts import DecoderParts

Tree = Any
State = tuple[Any, Any, Any]


def push(function: Callable[[Any, Any], Any], state: State, point: Tree, v: Tree) -> State:
    """(y, y₁, y₂) of y(ε) = function(x(ε), point + εv), where x(ε) = x + εx₁ + ½ε²x₂.

    The second jvp repeats products of the first; XLA merges them because they read the same arrays.
    """
    x, x1, x2 = state

    def first(x: Any, x1: Any, point: Tree) -> tuple[Any, Any]:
        return jax.jvp(function, (x, point), (x1, v))

    (y, y1), (_, y2) = jax.jvp(first, (x, x1, point), (x1, x2, v))
    return y, y1, y2


def jets(
    stack: DecoderParts, point: Tree, fixed: Tree, v: Tree, tokens_BT: jax.Array, valid_BT: jax.Array,
    *, start: int, temperature: float, chunk: int = 0,
) -> State:  # fmt: skip
    """(logp, u, w), each [B, T - start], along `v`, a tree like `point`; the policy is at `temperature`."""
    none = jnp.zeros((0,), jnp.float32)
    state = push(lambda _, p: stack.embed(p, fixed, tokens_BT), (none, none, none), point, v)
    points, fixeds = stack.layers(point, fixed)
    tangents, _ = stack.layers(v, fixed)

    def body(state: State, layer: Any) -> tuple[State, None]:
        p, v, f = layer
        return push(lambda x, p: stack.layer(p, f, x, valid_BT), state, p, v), None

    state, _ = jax.lax.scan(body, state, (points, tangents, fixeds))
    x, x1, x2 = (s[:, start - 1 : -1] for s in state)

    def head(x: Any, x1: Any, x2: Any, targets_BC: jax.Array) -> State:
        return push(lambda x, p: stack.head(p, fixed, x, targets_BC, temperature), (x, x1, x2), point, v)

    return over_chunks(head, (x, x1, x2, tokens_BT[:, start:]), chunk)
