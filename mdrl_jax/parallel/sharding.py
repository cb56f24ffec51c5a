"""The mesh and THE table from logical axes to mesh axes: the whole sharding policy is here.

Parameters name their logical axes where they are made (`model/transformer.py`); activations through
`constrain`. Batch rows are split over `data` and `fsdp`; parameters over `fsdp` (their d_model side) and
`tensor` (heads, MLP channels, vocabulary): ZeRO-3 with tensor parallelism, arXiv 1910.02054, 1909.08053.
Where rows are fewer than weights (a decoding step, logits), it is the rows that are gathered over `fsdp`
(`rows`) and the weights that stay where they are: arXiv 2211.05102.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mdrl_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")
RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "rows": "data",
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "vocab_split": ("fsdp", "tensor"),
    "layers": None,
    None: None,
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1: all that remain."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """The `data x fsdp x tensor` mesh over `devices` (default: all).

    Raises:
      UserError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    named = ", ".join(f"{a}={s}" for a, s in zip(MESH_AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise UserError(f"mesh {named}: sizes are positive, and at most one may be -1")
    known = int(np.prod([s for s in sizes if s != -1]))
    sizes = [len(devices) // known if s == -1 else s for s in sizes]
    if int(np.prod(sizes)) != len(devices):
        raise UserError(f"mesh {named} does not match the {len(devices)} devices at hand")
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def spec(*logical: str | None) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes."""
    return PartitionSpec(*(RULES[name] for name in logical))


def named(mesh: Mesh, *logical: str | None) -> NamedSharding:
    """The NamedSharding of an array with these logical axes."""
    return NamedSharding(mesh, spec(*logical))


def stacked(sharding: Any) -> Any:
    """The sharding of an array with one more leading axis, kept whole: many vectors of a parameter's shape."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    return sharding


def replicated(sharding: Any) -> Any:
    """Whole arrays on the devices of `sharding`."""
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Fixes the sharding of an activation by its logical axes; nothing outside a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*logical))


def batch_divisor(mesh: Mesh) -> int:
    """Number of devices that batch rows are split over."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_divides(mesh: Mesh, shapes: Any, shardings: Any) -> None:
    """Refuses, by name, a parameter that the mesh does not divide.

    Raises:
      UserError: naming the parameter, its dimension and the mesh axes.
    """
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        for size, axes in zip(leaf.shape, sharding.spec, strict=False):
            axes = (axes,) if isinstance(axes, str) else axes or ()
            parts = int(np.prod([mesh.shape[a] for a in axes]))
            if size % parts:
                raise UserError(
                    f"parameter {jax.tree_util.keystr(path)} of shape {leaf.shape}: {size} is not "
                    f"divisible by mesh {'*'.join(axes)}={parts}"
                )


def put(tree: Any, mesh: Mesh, *logical: str | None) -> Any:
    """Host arrays to device arrays whose leading axes are sharded as named (default: batch)."""
    names = logical or ("batch",)
    return jax.tree.map(lambda x: jax.device_put(x, named(mesh, *names)), tree)


def param_shardings(mesh: Mesh, boxed_shapes: Any) -> Any:
    """NamedShardings of parameters from their logical axes.

    Raises:
      UserError: where a dimension is not divisible by its mesh axes.
    """
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    shardings = jax.tree.map(lambda box: named(mesh, *box.names), boxed_shapes, is_leaf=is_box)
    check_divides(mesh, nn.unbox(boxed_shapes), shardings)
    return shardings
