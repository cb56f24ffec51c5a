"""The operations that a function of the model needs if everything is computed once: the model's own count.

A multiplication and an addition are two operations, so a weight costs 2 operations for each token. Attention is counted
over pairs of tokens that see each other: T(T + 1) / 2 pairs in a causal sequence of T tokens. If a compiled program
executes more than this count, the excess is work that it recomputes, or computes and then masks.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

from mdrl_jax.model.attention import SPLASH_BACKWARD, SPLASH_BLOCK
from mdrl_jax.model.families import ModelConfig
from mdrl_jax.parallel.hlo_text import Computation, Instruction, arrays

# Matrix products that a kernel computes for a block of queries and a block of keys. Forward: scores and output.
# Backward: scores, dv, dp, dk and dq.
KERNELS = {"fwd": 2, "dkv": 5}
# What is computed of a token -> its cost in forward passes over the weights. A gradient, also one that is not trained
# with, costs three; the (u, w) jets of definitions §6 cost five.
FORWARDS = {"read": 1, "sampled": 1, "forward": 1, "gradient": 3, "trained": 3, "jets": 5}
_KERNEL = re.compile(r"splash_mha_(fwd|dkv)")


def layer_weights(config: ModelConfig) -> int:
    """Number of weights of one layer that take part in matrix products: its kernels, without biases and norms.

    It is D · (2h(H + K) + 3F).
    """
    c = config
    return c.d_model * (c.head_dim * 2 * (c.n_heads + c.n_kv_heads) + 3 * c.d_mlp)


def matrix_weights(config: ModelConfig) -> int:
    """Number of weights that every token is multiplied with: the kernels of all layers and the unembedding.

    It is L · `layer_weights` + V · D. Norms and biases are left out, and so is the embedding, which is only looked up
    (a tied one counts as the unembedding).
    """
    return config.n_layers * layer_weights(config) + config.vocab_size * config.d_model


def of_tokens(config: ModelConfig, tokens: Mapping[str, float]) -> float:
    """Operations of given numbers of tokens with all weights; attention between tokens is left out [chosen].

    Args:
      config: sizes of the model.
      tokens: what is computed, a key of `FORWARDS` -> the number of tokens.

    Returns:
      floating-point operations: 2 for each of the `matrix_weights`, each token and each of the forward passes that
      `FORWARDS` gives for it; 0 without tokens.

    Raises:
      KeyError: if a key is not in `FORWARDS`.
    """
    return 2.0 * matrix_weights(config) * sum(FORWARDS[kind] * n for kind, n in tokens.items())


def forward(config: ModelConfig, tokens: float, pairs: float, scored: float) -> float:
    """Operations of a forward pass over all sequences together.

    Args:
      config: sizes of the model.
      tokens: number of tokens that pass through the layers.
      pairs: number of pairs (query token, key token) that attention lets see each other, in one layer and head.
      scored: number of tokens whose logits are computed.

    Returns:
      floating-point operations, 2 (L · `layer_weights` · tokens + V · D · scored + 2 L · H · h · pairs).
    """
    return _products(config, tokens, pairs, scored).forward


@dataclasses.dataclass(frozen=True)
class Products:
    """Operations of the two kinds of products in a forward pass, from which the cost of derivatives follows.

    The derivative of a product along a direction has one term, of the cost of the product, for each factor that
    changes:

    | product | value | 1st derivative | 2nd derivative |
    |---|---|---|---|
    | W x, both change | W x | W′x + W x′ | 2 W′x′ + W x″ (W changes linearly) |
    | W x, W fixed | W x | W x′ | W x″ |
    | q·k, or attention weights times values | q·k | q′k + q k′ | q″k + 2 q′k′ + q k″ |

    In a backward pass a product costs two products, one for each factor; it costs one if its weights are not
    differentiated.

    Attributes:
      weights: operations of all tokens with all weights that they meet, logits included.
      attention: operations of queries with keys for the pairs that see each other. The product of attention weights
        with values costs as much again.
    """

    weights: float
    attention: float

    @property
    def forward(self) -> float:
        """Operations of the function alone: weights, queries with keys, and attention weights with values."""
        return self.weights + 2 * self.attention

    @property
    def gradient(self) -> float:
        """Operations of the function and its gradient in all weights."""
        return 3 * self.forward

    @property
    def jets(self) -> float:
        """Operations of the function and its first and second derivatives along a direction of all weights.

        These are the (u, w) jets of definitions §6: 1 + 2 + 2 products with weights and, for each of the two attention
        products, 1 + 2 + 3.
        """
        return 5 * self.weights + 12 * self.attention

    def route_jets(self, directions: int, narrow: float) -> float:
        """Operations of the function once, and of its first and second derivatives along directions of a route.

        A route is a subset of MLP neurons (definitions §5); all other weights are fixed.

        Args:
          directions: number of directions.
          narrow: operations of all tokens with the weights of the route, in one forward pass.
        """
        each = 2 * self.weights + 10 * self.attention + 2 * narrow
        return self.forward + directions * each

    def route_hessian(self, vectors: int, narrow: float) -> float:
        """Operations of products of the Hessian on a route with vectors, forward mode over reverse mode.

        Forward and backward pass are computed once, without the gradient in the route's weights, which is not needed;
        each vector adds their derivatives along it. A route is a subset of MLP neurons (definitions §5); all other
        weights are fixed.

        Args:
          vectors: number of vectors.
          narrow: operations of all tokens with the weights of the route, in one forward pass.
        """
        each = 2 * self.weights + 12 * self.attention + 4 * narrow
        return 2 * self.weights + 6 * self.attention + vectors * each


def sequences(config: ModelConfig, rows: int, length: int, scored: int) -> Products:
    """The products of a forward pass over whole causal sequences, with T(T + 1) / 2 pairs in a sequence of T tokens.

    Layers whose attention slides count as the others: the decoder computes the scores outside the window, too.

    Args:
      config: sizes of the model.
      rows: number of sequences.
      length: tokens of each sequence.
      scored: number of positions of each sequence whose logits are computed, 0 to `length`.

    Returns:
      the operations of one forward pass over all `rows` sequences; its properties give those of derivatives.
    """
    return _products(config, rows * length, rows * length * (length + 1) / 2, rows * scored)


def groups(config: ModelConfig, prompts: int, group: int, prompt_length: int, completion_length: int) -> Products:
    """The products of a forward pass over prompts and their completions, with each prompt computed once.

    Args:
      config: sizes of the model.
      prompts: number of prompts.
      group: completions of each prompt.
      prompt_length: tokens of a prompt.
      completion_length: tokens of a completion; the logits of each of them are computed.

    Returns:
      the operations of one forward pass; its properties give those of derivatives.
    """
    rows, length = prompts * group, completion_length
    pairs = prompts * prompt_length * (prompt_length + 1) / 2 + rows * length * (prompt_length + (length + 1) / 2)
    return _products(config, prompts * prompt_length + rows * length, pairs, rows * length)


def sampled(config: ModelConfig, prompts: int, group: int, prompt_length: int, completion_length: int) -> float:
    """Operations of reading prompts and sampling completions of the full length, with every token computed once.

    Args:
      config: sizes of the model.
      prompts: number of prompts.
      group: completions of each prompt.
      prompt_length: tokens of a prompt; the prompt is read once for its whole group.
      completion_length: tokens of a completion, 1 or more. The logits of its first token come from the prompt's pass,
        and its last token is never read, so `completion_length` − 1 tokens pass through the layers.

    Returns:
      floating-point operations.
    """
    read = sequences(config, prompts, prompt_length, 1).forward
    steps = completion_length - 1
    pairs = steps * prompt_length + steps * (steps + 1) / 2
    return read + prompts * group * forward(config, steps, pairs, steps)


def _products(config: ModelConfig, tokens: float, pairs: float, scored: float) -> Products:
    c = config
    weights = c.n_layers * layer_weights(c) * tokens + c.vocab_size * c.d_model * scored
    return Products(2.0 * weights, 2.0 * c.n_layers * c.n_heads * c.head_dim * pairs)


def kernel_flops(instruction: Instruction, computation: Computation) -> float:
    """Operations of a splash-attention kernel, which the compiler cannot count; 0 for any other instruction.

    They are those of all blocks that the kernel visits in one run, so masked pairs in these blocks count too. If there
    are fewer queries than keys, the queries are taken to end where the keys end; padding can make it a block less.

    Args:
      instruction: an instruction of a compiled program.
      computation: the computation that contains it, with the instruction's operands.

    Returns:
      floating-point operations on one device.
    """
    found = _KERNEL.search(instruction.name)
    if found is None or instruction.opcode != "custom-call":
        return 0.0
    # The result is a tuple. Its array of most dimensions is the output [..., H, Q, h] of fwd, or the partial dq
    # [..., key blocks, H, Q, h] of dkv; scratch arrays, which come first, have fewer dimensions.
    out = max((dims for _, dims in arrays(instruction.shape)), key=len)
    queries, head_dim = out[-2:]
    given = [dims for o in instruction.operands if o in computation for _, dims in arrays(computation[o].shape)]
    length = max(dims[-2] for dims in [*given, out] if len(dims) > 2 and dims[-1] == head_dim)
    forward_pass = found[1] == "fwd"
    keys = min(SPLASH_BLOCK if forward_pass else SPLASH_BACKWARD, length)
    heads = math.prod(out[:-2]) // (1 if forward_pass else length // keys)
    pairs = visited_pairs(queries, length, min(SPLASH_BLOCK, queries), keys)
    return KERNELS[found[1]] * 2.0 * heads * head_dim * pairs


def visited_pairs(n_queries: int, length: int, queries: int, keys: int) -> int:
    """Number of (query, key) pairs of one head in all blocks that hold at least one pair of the causal mask.

    A block is `queries` x `keys` pairs, all of which count, also the masked ones.

    Args:
      n_queries: number of queries, a multiple of `queries`; they are those of the last tokens.
      length: tokens of a sequence, a multiple of `keys`, and `n_queries` or more.
      queries: queries of a block, 1 or more.
      keys: keys of a block, 1 or more.

    Returns:
      the number of pairs: (blocks with a pair of the mask) · `queries` · `keys`.
    """
    blocks = sum((first + queries - 1) // keys + 1 for first in range(length - n_queries, length, queries))
    return blocks * queries * keys
