"""The mesh and THE table from logical axes to mesh axes: the whole sharding policy is here.

Parameters name their logical axes where they are made (`model/transformer.py`); activations through
`constrain`. Batch rows are split over `data` and `fsdp`; parameters over `fsdp` (their d_model side) and
`tensor` (heads, MLP channels, vocabulary): ZeRO-3 with tensor parallelism, arXiv 1910.02054, 1909.08053.
Where rows are fewer than weights (a decoding step, logits), it is the rows that are gathered over `fsdp`
(`rows`) and the weights that stay where they are: arXiv 2211.05102.
"""

import contextvars
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mdrl_jax.errors import UserError
from mdrl_jax.section import section

MESH_AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # what batch rows are split over
RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": BATCH,
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


@section
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1: all that remain."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """The `data x fsdp x tensor` mesh over `devices` (default: all).

    Several slices of TPUs are parts of the `data` axis: over the slow network between them (DCN) go only sums of
    gradients, once a micro-batch.

    Raises:
      UserError: if the sizes do not multiply to the number of devices, or `data` is not divisible by the slices.
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
    # What GPUs call slices are hosts, between which any axis may run.
    slices = len({getattr(d, "slice_index", 0) for d in devices if d.platform != "gpu"} or {0})
    auto = (AxisType.Auto,) * len(MESH_AXES)
    # Of a 4 x 4 slice one side is parted for 8 x 2 devices; jax.make_mesh does so on v5e alone.
    if slices == 1:
        placed = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(placed, MESH_AXES, axis_types=auto)
    if sizes[0] % slices:
        raise UserError(f"mesh data={sizes[0]} is not divisible by the {slices} slices: only data runs between slices")
    within = (sizes[0] // slices, *sizes[1:])
    placed = create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=auto)


_apart = contextvars.ContextVar("rows apart", default=False)


def spec(*logical: str | None) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes."""
    return PartitionSpec(*(_axes(name) for name in logical))


def _axes(name: str | None) -> str | tuple[str, ...] | None:
    axes = RULES[name]
    if axes is None or not _apart.get():
        return axes
    left = tuple(a for a in ((axes,) if isinstance(axes, str) else axes) if a not in BATCH)
    return left[0] if len(left) == 1 else left or None


def over_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.vmap` over batch rows, each on the devices of its own: there its weights may be its own as well.

    Within, no logical axis means the mesh axes that rows are split over.
    """

    def alone(*args: Any) -> Any:
        token = _apart.set(True)
        try:
            return function(*args)
        finally:
            _apart.reset(token)

    mesh: Any = jax.sharding.get_abstract_mesh()
    return jax.vmap(alone, spmd_axis_name=None if mesh.empty else BATCH)


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


def over_tensor(sharding: NamedSharding) -> NamedSharding:
    """Where an array lies after a gather over all axes but `tensor`: as one layer's weights do where they are used."""
    kept = [axes if axes == "tensor" else None for axes in sharding.spec]
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Fixes the sharding of an activation by its logical axes; nothing outside a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*logical))


def constrain_rows(x: jax.Array) -> jax.Array:
    """Fixes rows to where batch rows are, and leaves the other axes to the compiler; nothing outside a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH, *free))


def dividing(name: str, size: int) -> str | None:
    """The logical axis, or None where the mesh at hand does not divide a dimension of this size by it."""
    mesh: Any = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or size % divisor(mesh, name) else name


Names = tuple[str | None, ...]


def by_device(function: Callable[..., jax.Array], inputs: tuple[Names, ...], output: Names) -> Callable[..., jax.Array]:
    """`function`, run by each device on its own part of the arrays, which have these logical axes: for kernels.

    Every axis has to divide over the mesh. Outside a mesh it is the function itself.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    specs = tuple(spec(*names) for names in inputs)
    return jax.shard_map(function, in_specs=specs, out_specs=spec(*output), check_vma=False)


def divisor(mesh: Mesh, name: str) -> int:
    """Number of devices that a logical axis is split over."""
    axes = RULES[name] or ()
    return int(np.prod([mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes)]))


def batch_divisor(mesh: Mesh) -> int:
    """Number of devices that batch rows are split over."""
    return divisor(mesh, "batch")


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
    """Host arrays to device arrays whose leading axes are sharded as named (default: batch).

    Every process has the whole of them on its host and moves the part of its own devices.
    """
    sharding = named(mesh, *(logical or ("batch",)))

    def place(x: Any) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(np.shape(x), sharding, lambda index: np.asarray(x)[index])

    return jax.tree.map(place, tree)


def param_shardings(mesh: Mesh, boxed_shapes: Any) -> Any:
    """NamedShardings of parameters from their logical axes.

    Raises:
      UserError: where a dimension is not divisible by its mesh axes.
    """
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    shardings = jax.tree.map(lambda box: named(mesh, *box.names), boxed_shapes, is_leaf=is_box)
    check_divides(mesh, nn.unbox(boxed_shapes), shardings)
    return shardings
