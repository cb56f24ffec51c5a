"""Bits of positions: no collision within a tensor, and independent of the sharding."""

import jax
import jax.numpy as jnp
import numpy as np

from mdrl_jax.parallel import hashing
from mdrl_jax.parallel.sharding import MeshConfig, make_mesh, named

LIKE = {"embedding": jnp.zeros((400, 96)), "layers": {"up": {"kernel": jnp.zeros((3, 96, 200))}}}


def test_positions_are_scrambled_without_a_collision_in_a_tensor():
    mixed = jax.jit(hashing.position_bits)(LIKE)
    for tensor in (mixed["embedding"], *mixed["layers"]["up"]["kernel"]):
        assert np.unique(np.asarray(tensor)).size == tensor.size and np.asarray(tensor).max() < 2**31


def test_bits_are_those_of_the_position_on_any_mesh():
    words = hashing.words(jax.random.key(3))
    alone = jax.jit(hashing.position_bits)(LIKE, words)
    mesh = make_mesh(MeshConfig(fsdp=4), jax.devices()[:4])
    split = jax.device_put(LIKE, named(mesh))
    split["embedding"] = jax.device_put(LIKE["embedding"], named(mesh, "batch"))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, alone, jax.jit(hashing.position_bits)(split, words)))


def test_each_bit_is_fair_and_tensors_are_numbered_in_order():
    bits = np.asarray(jax.jit(hashing.position_bits)(LIKE, hashing.words(jax.random.key(0)))["embedding"]).ravel()
    share = (bits[:, None] >> np.arange(hashing.KEY_BITS) & 1).mean(axis=0)
    assert abs(share - 0.5).max() < 4.5 * 0.5 / np.sqrt(bits.size)
    numbers = hashing.tensor_numbers(LIKE)
    assert (numbers["embedding"] == 0).all()
    assert [int(x.min()) for x in numbers["layers"]["up"]["kernel"]] == [1, 2, 3]
