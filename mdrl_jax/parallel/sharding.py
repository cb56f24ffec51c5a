"""Makes the mesh, and maps logical axes of arrays to mesh axes: the table `RULES` is the whole sharding policy.

A logical axis is the meaning of an array's axis, such as "embed". Parameters name theirs where they are made
(`model/transformer.py`), activations in calls of `constrain`.

Batch rows are split over the mesh axes `data` and `fsdp`. Parameters are split over `fsdp` (their d_model axis) and
`tensor` (heads, MLP channels, vocabulary). This is ZeRO-3 with tensor parallelism (arXiv 1910.02054, 1909.08053): a
layer's weights are gathered over `fsdp` where they are used. Where activations are smaller than weights (a decoding
step, logits), the activations are gathered over `fsdp` instead (logical axis "rows") and the weights stay in place
(arXiv 2211.05102).
"""

import contextvars
import os
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
BATCH = ("data", "fsdp")  # the mesh axes that batch rows are split over
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
    """Number of devices along each mesh axis; one of them may be -1, which takes all devices that remain.

    Attributes:
      data: copies of the parameters, each of which takes a part of the batch.
      fsdp: parts of the batch within a copy, and of the d_model axis of parameters.
      tensor: parts of the heads, MLP channels and vocabulary.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """The `data x fsdp x tensor` mesh over devices, with the axis names `MESH_AXES` and axes of type Auto.

    If the devices are several TPU slices, the slices are consecutive parts of the `data` axis. Then only sums of
    gradients cross the slow network between slices (DCN), once per micro-batch.

    Args:
      config: number of devices along each axis.
      devices: the devices, one or more, all of which are used; None: all devices of the program.

    Raises:
      UserError: if JAX finds no devices, if a size is neither positive nor -1, if two are -1, if the sizes do not
        multiply to the number of devices, or if `data` is not divisible by the slices.
      ValueError: if the slices have different numbers of devices.
      AssertionError: if the devices of a TPU slice do not form a complete box, or are cores and not chips.
    """
    devices = _present() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    named = ", ".join(f"{a}={s}" for a, s in zip(MESH_AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise UserError(f"mesh {named}: sizes are positive, and at most one may be -1")
    known = int(np.prod([s for s in sizes if s != -1]))
    sizes = [len(devices) // known if s == -1 else s for s in sizes]
    if int(np.prod(sizes)) != len(devices):
        raise UserError(f"mesh {named} does not match the {len(devices)} devices at hand")
    # A slice_index of GPUs numbers hosts, not slices, and any mesh axis may cross hosts.
    slices = len({getattr(d, "slice_index", 0) for d in devices if d.platform != "gpu"} or {0})
    auto = (AxisType.Auto,) * len(MESH_AXES)
    # A mesh of 8 x 2 on a slice of 4 x 4 splits one side of the slice between two mesh axes. jax.make_mesh allows that
    # on v5e only, so it is not used.
    if slices == 1:
        placed = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(placed, MESH_AXES, axis_types=auto)
    if sizes[0] % slices:
        raise UserError(f"mesh data={sizes[0]} is not divisible by the {slices} slices: only data runs between slices")
    within = (sizes[0] // slices, *sizes[1:])
    placed = create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=auto)


def _present() -> list[Any]:
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as e:  # JAX asserts that a platform of JAX_PLATFORMS has a device
        asked = os.environ.get("JAX_PLATFORMS", "")
        reason = f" ({' '.join(str(e).split())})" if str(e) else ""
        raise UserError(f"JAX_PLATFORMS={asked!r} asks for devices that JAX does not find here{reason}") from e


_apart = contextvars.ContextVar("rows apart", default=False)


def spec(*logical: str | None) -> PartitionSpec:
    """The PartitionSpec of an array.

    Inside a function of `over_rows`, no axis is split over `data` or `fsdp`.

    Args:
      *logical: for each axis of the array its logical axis, a key of `RULES`; None: not split. Further axes are not
        split.

    Raises:
      KeyError: if a name is not in `RULES`.
    """
    return PartitionSpec(*(_axes(name) for name in logical))


def _axes(name: str | None) -> str | tuple[str, ...] | None:
    axes = RULES[name]
    if axes is None or not _apart.get():
        return axes
    left = tuple(a for a in ((axes,) if isinstance(axes, str) else axes) if a not in BATCH)
    return left[0] if len(left) == 1 else left or None


def over_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.vmap` over batch rows; each row is computed on the devices that hold it.

    Each row may therefore have its own copy of the weights, for example for per-row gradients. Inside `function`
    logical axes do not map to `data` and `fsdp`, because the vmapped axis is split over them; `constrain_rows` cannot
    be used there. The mesh is the one in which `over_rows` is called; outside a mesh this is `jax.vmap` alone.

    Args:
      function: a function of the arrays of one row, or of trees of them.

    Returns:
      the function of all rows: every argument, and every result, gets a leading axis of rows. It takes positional
      arguments only, and raises ValueError if they differ in the number of rows.
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
    """The NamedSharding of an array on a mesh.

    Inside a function of `over_rows`, no axis is split over `data` or `fsdp`.

    Args:
      mesh: the mesh.
      *logical: for each axis of the array its logical axis, a key of `RULES`; None: not split. Further axes are not
        split.

    Raises:
      KeyError: if a name is not in `RULES`.
      Exception: JAX's `DuplicateSpecError`, if two axes are split over the same mesh axis, such as "batch" and "embed".
    """
    return NamedSharding(mesh, spec(*logical))


def stacked(sharding: Any) -> Any:
    """The sharding of a stack of arrays that each have `sharding`; the new leading axis is not split.

    A sharding that is no NamedSharding is returned as it is.
    """
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    return sharding


def replicated(sharding: Any) -> Any:
    """The sharding in which every device of `sharding` holds the whole array.

    A sharding that is no NamedSharding is returned as it is.
    """
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding


def over_tensor(sharding: NamedSharding) -> NamedSharding:
    """The sharding after a gather over all mesh axes but `tensor`, which a layer's weights have where they are used.

    An axis that is split over `tensor` alone stays split; every other axis is whole, also one that is split over `fsdp`
    and `tensor` together.
    """
    kept = [axes if axes == "tensor" else None for axes in sharding.spec]
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Fixes the sharding of an activation by its logical axes; outside a mesh it returns x unchanged.

    Outside a mesh the names are not checked. Inside a function of `over_rows`, no axis is split over `data` or `fsdp`.

    Args:
      x: the activation.
      *logical: for each axis of x its logical axis, a key of `RULES`; None: not split. Further axes are not split.

    Raises:
      KeyError: in a mesh, if a name is not in `RULES`.
      ValueError: in a mesh, if there are more names than axes, or, outside `jax.jit`, if the mesh does not divide a
        split axis evenly.
      Exception: JAX's `DuplicateSpecError`, if two axes are split over the same mesh axis, such as "batch" and "embed".
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*logical))


def constrain_rows(x: jax.Array) -> jax.Array:
    """Splits the first axis like batch rows and leaves the sharding of the other axes to the compiler.

    Outside a mesh it returns x unchanged.

    Raises:
      ValueError: in a mesh, if x has no axis, inside a function of `over_rows`, or, outside `jax.jit`, if x has one
        axis and the mesh does not divide it evenly.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH, *free))


def dividing(name: str, size: int) -> str | None:
    """The logical axis `name` if the current mesh can split a dimension of this size along it evenly, otherwise None.

    Outside a mesh it is None. It is `name` also if the mesh does not split this logical axis at all.

    Raises:
      KeyError: in a mesh, if the name is not in `RULES`.
    """
    mesh: Any = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or size % divisor(mesh, name) else name


Names = tuple[str | None, ...]


def by_device(function: Callable[..., jax.Array], inputs: tuple[Names, ...], output: Names) -> Callable[..., jax.Array]:
    """`function`, run by each device on its own part of the arrays; for kernels that XLA cannot partition itself.

    Outside a mesh it returns the function itself. The mesh is the one in which `by_device` is called; it must divide
    every split axis evenly. Inside a function of `over_rows`, no axis is split over `data` or `fsdp`.

    Args:
      function: a function of arrays that treats the split axes independently.
      inputs: for each argument the logical axis of each of its axes, a key of `RULES`; None: not split.
      output: the same for the result.

    Returns:
      the function of the whole arrays. In a mesh it raises ValueError if the mesh does not divide a split axis evenly,
      and JAX's `DuplicateSpecError` if two axes of one array are split over the same mesh axis.

    Raises:
      KeyError: in a mesh, if a name is not in `RULES`.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    specs = tuple(spec(*names) for names in inputs)
    return jax.shard_map(function, in_specs=specs, out_specs=spec(*output), check_vma=False)


def divisor(mesh: Mesh, name: str) -> int:
    """Number of parts into which the mesh splits a logical axis, a key of `RULES`; 1 if it does not split it.

    Raises:
      KeyError: if the name is not in `RULES`.
    """
    axes = RULES[name] or ()
    return int(np.prod([mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes)]))


def batch_divisor(mesh: Mesh) -> int:
    """Number of parts into which the mesh splits batch rows."""
    return divisor(mesh, "batch")


def check_divides(mesh: Mesh, shapes: Any, shardings: Any) -> None:
    """Refuses a parameter that the mesh cannot split evenly.

    Args:
      mesh: the mesh.
      shapes: tree of arrays or `jax.ShapeDtypeStruct`s, one for each parameter.
      shardings: tree of their `NamedSharding`s.

    Raises:
      UserError: if a dimension is not divisible by its mesh axes; the message names the first such parameter, the
        dimension and the mesh axes.
      ValueError: if the trees have different numbers of leaves.
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
    """Moves a tree of host arrays to the devices.

    Every process holds the whole arrays on its host and moves the parts of its own devices. Arrays of 64 bits become
    32 bits, unless JAX's 64-bit mode is on.

    Args:
      tree: a tree of arrays on the host, equal on every process.
      mesh: the mesh. It must divide every split axis evenly.
      *logical: logical axes of the leading axes of every array, keys of `RULES`; without any: "batch". The other axes
        are not split.

    Returns:
      the tree with device arrays.

    Raises:
      KeyError: if a name is not in `RULES`.
      ValueError: if the mesh does not divide a split axis evenly, or if an array has fewer axes than there are names,
        such as a scalar.
      Exception: JAX's `DuplicateSpecError`, if two axes are split over the same mesh axis, such as "batch" and "embed".
    """
    sharding = named(mesh, *(logical or ("batch",)))

    def place(x: Any) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(np.shape(x), sharding, lambda index: np.asarray(x)[index])

    return jax.tree.map(place, tree)


def param_shardings(mesh: Mesh, boxed_shapes: Any) -> Any:
    """NamedShardings of parameters from their logical axes.

    Args:
      mesh: the mesh.
      boxed_shapes: shapes with logical axes, from `model.transformer.param_shapes`.

    Returns:
      a tree with one NamedSharding for each parameter, in the structure of the unboxed parameters.

    Raises:
      UserError: if a dimension is not divisible by its mesh axes.
      KeyError: if a logical axis is not in `RULES`.
      AttributeError: if a leaf has no box with logical axes.
    """
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    shardings = jax.tree.map(lambda box: named(mesh, *box.names), boxed_shapes, is_leaf=is_box)
    check_divides(mesh, nn.unbox(boxed_shapes), shardings)
    return shardings
