"""The model's own count of operations: what computing a function once takes, no more (2 a weight and token).

Attention is counted by the pairs of tokens that see each other: of a causal sequence of T tokens T(T + 1) / 2. What a
compiled program executes beyond it is recomputed, or computed and masked.
"""

import dataclasses
import math
import re

from mdrl_jax.model.attention import SPLASH_BACKWARD, SPLASH_BLOCK
from mdrl_jax.model.families import ModelConfig
from mdrl_jax.parallel.hlo_text import Computation, Instruction, arrays

# Products of a block of queries with a block of keys in each kernel: scores and output; scores, dv, dp, dk and dq.
KERNELS = {"fwd": 2, "dkv": 5}
_KERNEL = re.compile(r"splash_mha_(fwd|dkv)")


def layer_weights(config: ModelConfig) -> int:
    """Weights of one layer that every token is multiplied with."""
    c = config
    return c.d_model * (c.head_dim * 2 * (c.n_heads + c.n_kv_heads) + 3 * c.d_mlp)


def forward(config: ModelConfig, tokens: float, pairs: float, scored: float) -> float:
    """A forward pass of `tokens`, of which `pairs` see each other, with logits at `scored` of them."""
    return _products(config, tokens, pairs, scored).forward


@dataclasses.dataclass(frozen=True)
class Products:
    """Operations of one product of each kind, and of what derivatives are made of them.

    The derivative of a product has a term for each factor that changes: of Wx two, of Wx with fixed W one, and of
    scores q·k and of their product with v, whatever changes, two; the second derivative of these has three. Backward, a
    product is two, one where its weights are not differentiated.

    Attributes:
      weights: tokens with every weight that they meet, logits included.
      attention: queries with keys, or scores with values, of pairs that see each other: a forward pass has both.
    """

    weights: float
    attention: float

    @property
    def forward(self) -> float:
        """The function alone."""
        return self.weights + 2 * self.attention

    @property
    def gradient(self) -> float:
        """With its gradient."""
        return 3 * self.forward

    @property
    def jets(self) -> float:
        """With first and second derivatives along a direction of all weights (definitions §6)."""
        return 5 * self.weights + 12 * self.attention

    def route_jets(self, directions: int, narrow: float) -> float:
        """The same along directions of a route, tokens with whose weights are `narrow` operations."""
        each = 2 * self.weights + 10 * self.attention + 2 * narrow
        return self.forward + directions * each

    def route_hessian(self, vectors: int, narrow: float) -> float:
        """Products of the Hessian on a route with vectors."""
        each = 2 * self.weights + 12 * self.attention + 4 * narrow
        return 2 * self.weights + 6 * self.attention + vectors * each


def sequences(config: ModelConfig, rows: int, length: int, scored: int) -> Products:
    """Products of `rows` whole sequences, with logits at `scored` places of each."""
    return _products(config, rows * length, rows * length * (length + 1) / 2, rows * scored)


def sampled(config: ModelConfig, prompts: int, group: int, prompt_length: int, completion_length: int) -> float:
    """Reading prompts and sampling `group` completions of each, all of the longest: every token is computed once."""
    read = sequences(config, prompts, prompt_length, 1).forward
    steps = completion_length - 1
    pairs = steps * prompt_length + steps * (steps + 1) / 2
    return read + prompts * group * forward(config, steps, pairs, steps)


def _products(config: ModelConfig, tokens: float, pairs: float, scored: float) -> Products:
    c = config
    weights = c.n_layers * layer_weights(c) * tokens + c.vocab_size * c.d_model * scored
    return Products(2.0 * weights, 2.0 * c.n_layers * c.n_heads * c.head_dim * pairs)


def kernel_flops(instruction: Instruction, computation: Computation) -> float:
    """Operations of a splash-attention kernel, which the compiler cannot count: those of the blocks it visits."""
    found = _KERNEL.search(instruction.name)
    if found is None or instruction.opcode != "custom-call":
        return 0.0
    # After scratch, of fewer dimensions, fwd gives the output [..., H, T, h], dkv a dq [..., key blocks, H, T, h].
    out = max((dims for _, dims in arrays(instruction.shape)), key=len)
    length, head_dim = out[-2:]
    forward_pass = found[1] == "fwd"
    keys = min(SPLASH_BLOCK if forward_pass else SPLASH_BACKWARD, length)
    heads = math.prod(out[:-2]) // (1 if forward_pass else length // keys)
    return KERNELS[found[1]] * 2.0 * heads * head_dim * visited_pairs(length, min(SPLASH_BLOCK, length), keys)


def visited_pairs(length: int, queries: int, keys: int) -> int:
    """Pairs in the blocks of queries and keys that hold at least one pair of a causal mask."""
    blocks = sum((first + queries - 1) // keys + 1 for first in range(0, length, queries))
    return blocks * queries * keys
