"""The model's own count of operations: what computing a function once takes, no more (2 a weight and token).

Attention is counted by the pairs of tokens that see each other: of a causal sequence of T tokens T(T + 1) / 2. What a
compiled program executes beyond it is recomputed, or computed and masked.
"""

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
    c = config
    attention = 4.0 * c.n_heads * c.head_dim * pairs
    return c.n_layers * (2.0 * layer_weights(c) * tokens + attention) + 2.0 * c.vocab_size * c.d_model * scored


def sequences(config: ModelConfig, rows: int, length: int, scored: int) -> float:
    """A forward pass of `rows` whole sequences, with logits at `scored` places of each."""
    return rows * forward(config, length, length * (length + 1) / 2, scored)


def sampled(config: ModelConfig, prompts: int, group: int, prompt_length: int, completion_length: int) -> float:
    """Reading prompts and sampling `group` completions of each, all of the longest: every token is computed once."""
    read = sequences(config, prompts, prompt_length, 1)
    steps = completion_length - 1
    pairs = steps * prompt_length + steps * (steps + 1) / 2
    return read + prompts * group * forward(config, steps, pairs, steps)


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
