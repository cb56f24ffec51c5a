"""A decoder whose circuit is known, because its weights are written by hand.

Prompts are "slot 0, slot 1, slot 2, flag, =", and the right answer names the values of all of them: there is a token
for each combination. Its logit is a sum over slots, so log π is a sum over slots too. Each slot that a pass has from
the source prompt raises it by the same amount, whatever the others do.

| head (layer, head) | does | needed |
|---|---|---|
| 0, 0; 1, 2; 2, 0 | copy slot 0, slot 1 and slot 2 to "=" | yes |
| 0, 1; 1, 0; 2, 3 | copy a slot, ten times as strongly, to a place that nothing reads | no |
| 0, 3 and 2, 2 | copy the flag, each strongly enough | only with `redundant`: one of the two |
| others | nothing | no |
"""

import itertools
from typing import Any

import jax
import numpy as np

from mdrl_jax.analysis.circuits.masks import PairRows
from mdrl_jax.model.families import ModelConfig
from mdrl_jax.model.transformer import Decoder, param_shapes

VALUES, SLOTS = 4, 4
EQUALS = SLOTS * VALUES
ANSWERS = {v: EQUALS + 1 + i for i, v in enumerate(itertools.product(range(4), range(4), range(4), range(2)))}
FLAG, AT, OUT, JUNK, CONST, WIDTH = 16, 20, 21, 37, 41, 44
STRENGTH, OF_FLAG, MATCH, LARGE = 8.0, 12.0, 8.0, 1000.0
NEEDED = {(0, 0), (1, 2), (2, 0)}
ACTIVE = {(0, 1): 0, (1, 0): 2, (2, 3): 1}  # head -> the slot that it copies to a place that nothing reads
PAIR = {(0, 3), (2, 2)}

CONFIG = ModelConfig(
    family="llama",
    vocab_size=EQUALS + 1 + len(ANSWERS),
    n_layers=3,
    d_model=WIDTH,
    d_mlp=4,
    n_heads=4,
    n_kv_heads=4,
    head_dim=4,
    pre_norm=False,
    tied=False,
    no_rope=(True,),
)
MODEL = Decoder(CONFIG)


def params(redundant: bool) -> Any:
    """The weights."""
    tree = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), jax.eval_shape(_init))
    embedding, layers = tree["embedding"], tree["layers"]
    embedding[:, CONST] = LARGE
    for slot, value in itertools.product(range(SLOTS), range(VALUES)):
        embedding[slot * VALUES + value, [slot * VALUES + value, FLAG + slot]] = 1.0
    embedding[EQUALS, AT] = 1.0
    tree["norm"]["scale"][:] = LARGE / np.sqrt(WIDTH)

    def copy(head: tuple[int, int], query: int, key: int, read: int, write: int, strength: float) -> None:
        layer, h = head
        layers["q"]["kernel"][layer, query, h, 0] = MATCH
        layers["k"]["kernel"][layer, key, h, 0] = MATCH
        for value in range(VALUES):
            layers["v"]["kernel"][layer, read + value, h, value] = 1.0
            layers["o"]["kernel"][layer, h, value, write + value] = strength

    copy((0, 0), AT, FLAG, 0, OUT, STRENGTH)
    copy((1, 2), AT, FLAG + 1, VALUES, OUT + VALUES, STRENGTH)
    copy((2, 0), AT, FLAG + 2, 2 * VALUES, OUT + 2 * VALUES, STRENGTH)
    for head, slot in ACTIVE.items():
        copy(head, AT, FLAG + slot, slot * VALUES, JUNK, 10 * STRENGTH)
    for head in PAIR if redundant else ():
        copy(head, AT, FLAG + 3, 3 * VALUES, OUT + 3 * VALUES, OF_FLAG)
    unembedding = tree["unembedding"]
    unembedding[CONST, : EQUALS + 1] = -40 / LARGE
    for (a, b, c, flag), token in ANSWERS.items():
        for slot, value in enumerate((a, b, c)):
            unembedding[OUT + slot * VALUES + value, token] = 1.0
        if flag:
            unembedding[OUT + 3 * VALUES + 1, token] = 1.0
        else:
            unembedding[CONST, token] = OF_FLAG / 3 / LARGE
    return tree


def _init() -> Any:
    from flax import linen as nn

    return nn.unbox(param_shapes(MODEL))


def pairs(n: int, redundant: bool, seed: int = 0) -> PairRows:
    """Pairs of prompts that differ in every slot, and in the flag with `redundant`."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, VALUES, (n, 3))
    source = (base + rng.integers(1, VALUES, (n, 3))) % VALUES
    flags = [np.zeros((n, 1), int), np.full((n, 1), int(redundant))]

    def tokens(values: np.ndarray, flag: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        slots = np.concatenate([values, flag], axis=1)
        answer = [ANSWERS[tuple(row)] for row in slots.tolist()]
        prompt = np.concatenate([slots + VALUES * np.arange(SLOTS), np.full((n, 1), EQUALS)], axis=1)
        return prompt, np.array(answer)[:, None]

    (x, own), (other_x, other) = tokens(base, flags[0]), tokens(source, flags[1])
    rows = [
        np.stack([np.concatenate([p, reply], axis=1) for reply in (other, own)], axis=1).astype(np.int32)
        for p in (x, other_x)
    ]
    return PairRows(*rows, np.ones(rows[0].shape, bool), np.ones((n, 2, 1), np.float32))


def on(heads: Any) -> np.ndarray:
    """A set of heads as a mask."""
    mask = np.zeros((CONFIG.n_layers, CONFIG.n_heads), np.float32)
    for head in heads:
        mask[head] = 1.0
    return mask
