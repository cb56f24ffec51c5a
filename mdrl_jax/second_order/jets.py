"""Computes first and second derivatives of each token's log-prob along a direction, without a backward pass.

For a direction v in the space of the point (`decoder_parts.py`) and tokens y that are given (definitions §6),

    logp_t = log π_θ(y_t | y_<t),   u_t = v·∇logp_t,   w_t = vᵀ∇²logp_t v.

`analysis/probe.py` calls `jets` on micro-batches, and `objectives.py` computes the first and second derivative of every
objective from (u, w).

**Method.** Second-order Taylor mode (Griewank and Walther 2008, chapter 13) by two nested `jax.jvp`. Along the line
θ + εv every activation is a curve x(ε) = x + εx₁ + ½ε²x₂ + O(ε³). `push` maps its state (x, x₁, x₂) through one piece
of the decoder, and the state of logp_t itself is (logp_t, u_t, w_t). A linear map with weights W and direction V gives

    (W x,   W x₁ + V x,   W x₂ + 2 V x₁).

**Cost.** These are five different products, W x, W x₁, V x, W x₂ and V x₁. A gradient has three, one forward and two
backward, so the limit is 5/3 = 1.67 gradients. Both jvps are inside the body of the layer scan: around the scan, XLA
could not see that both carry the same tangent x₁, and there would be seven products, 7/3 = 2.33 gradients. No
activations are kept.

**Precision.** In a model that computes in bfloat16, x₁ and x₂ are bfloat16 too. v and log-softmax are float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mdrl_jax.model.packing import Grouped
from mdrl_jax.rl.logprobs import over_chunks
from mdrl_jax.second_order.decoder_parts import DecoderParts

Tree = Any
State = tuple[Any, Any, Any]


def push(function: Callable[[Any, Any], Any], state: State, point: Tree, v: Tree) -> State:
    """Maps the second-order state of a curve x(ε) through a function of x and of the point.

    With f = `function` and y(ε) = f(x + εx₁ + ½ε²x₂, point + εv), the result is y(0), y'(0) and y''(0):

        y₁ = Df[x₁, v],   y₂ = D²f[(x₁, v), (x₁, v)] + Df[x₂, 0].

    The outer jvp repeats products of the inner one. XLA merges them, because they read the same arrays.

    Args:
      function: f, of (x, point).
      state: (x, x₁, x₂), arrays or trees of one shape.
      point: what derivatives are taken with respect to.
      v: the direction, a tree like `point`, with its shapes and dtypes.

    Returns:
      (y, y₁, y₂), each like the result of f.

    Raises:
      TypeError, ValueError: if `v` or a tangent of x differs in structure, shape or dtype from what it belongs to.
    """
    x, x1, x2 = state

    def first(x: Any, x1: Any, point: Tree) -> tuple[Any, Any]:
        return jax.jvp(function, (x, point), (x1, v))

    (y, y1), (_, y2) = jax.jvp(first, (x, x1, point), (x1, x2, v))
    return y, y1, y2


def jets(
    parts: DecoderParts, point: Tree, fixed: Tree, v: Tree, tokens_BT: jax.Array, valid_BT: jax.Array,
    *, start: int, temperature: float, chunk: int = 0, group: int = 1,
) -> State:  # fmt: skip
    """log-probs of all tokens t >= `start`, with their first and second derivatives along `v`.

    Args:
      parts: the pieces of the decoder, from `decoder_parts.whole` or `on_route`. Their attention must be differentiable
        twice, as `attention.plain` and `attention.blockwise` are (definitions §6).
      point: where derivatives are taken: all parameters for `whole`, a `route_slice` for `on_route`.
      fixed: what is constant: () for `whole`, a `route_fixed` for `on_route`.
      v: the direction, a tree like `point`, with its shapes and dtypes.
      tokens_BT: token ids of left-padded rows.
      valid_BT: True at real tokens, False at padding.
      start: the first position t, at least 1.
      temperature: divides the logits; above 0.
      chunk: number of positions whose logits are computed at a time; it need not divide T - start. 0: all positions at
        once.
      group: number of rows, in succession, that have the same first `start` tokens, which are computed once for them.

    Returns:
      (logp, u, w), each [B, T - start], with token `start` in column 0: logp in nats; u = v·∇logp; w = vᵀ∇²logp v,
      without a factor ½. At padding their values have no meaning.

    Raises:
      TypeError, ValueError: if `v` differs from `point` in its structure, a shape or a dtype.
      ValueError: if `start` is below 1, or `group` does not divide the number of rows.
    """
    none = jnp.zeros((0,), jnp.float32)
    rows = Grouped(valid_BT, start, group)
    state = push(lambda _, p: parts.embed(p, fixed, rows.pack(tokens_BT)), (none, none, none), point, v)
    points, fixeds = parts.layers(point, fixed)
    tangents, _ = parts.layers(v, fixed)

    def body(state: State, layer: Any) -> tuple[State, None]:
        p, v, f = layer
        return push(lambda x, p: parts.layer(p, f, x, rows), state, p, v), None

    state, _ = jax.lax.scan(body, state, (points, tangents, fixeds))
    x, x1, x2 = map(rows.predicting, state)

    def head(x: Any, x1: Any, x2: Any, targets_BC: jax.Array) -> State:
        return push(lambda x, p: parts.head(p, fixed, x, targets_BC, temperature), (x, x1, x2), point, v)

    return over_chunks(head, (x, x1, x2, tokens_BT[:, start:]), chunk)
