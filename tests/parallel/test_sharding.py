"""The mesh, the table, and the shardings that follow from it."""

import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from mdrl_jax.errors import UserError
from mdrl_jax.model.transformer import Decoder, param_shapes
from mdrl_jax.parallel.sharding import (
    MESH_AXES,
    RULES,
    MeshConfig,
    batch_divisor,
    check_divides,
    make_mesh,
    named,
    param_shardings,
    put,
    spec,
)

ATTENTION = {
    "q": P(None, "fsdp", "tensor", None),
    "k": P(None, "fsdp", "tensor", None),
    "v": P(None, "fsdp", "tensor", None),
    "o": P(None, "tensor", None, "fsdp"),
}
MLP = {"gate": P(None, "fsdp", "tensor"), "up": P(None, "fsdp", "tensor"), "down": P(None, "tensor", "fsdp")}


def by_path(tree):
    is_leaf = lambda x: isinstance(x, P)  # noqa: E731
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def expected(config):
    """The spec of every parameter of a family, written out."""
    specs = {"embedding": P("tensor", "fsdp"), "norm/scale": P("fsdp")}
    specs |= {f"layers/{name}/kernel": s for name, s in (ATTENTION | MLP).items()}
    specs |= {f"layers/{name}_norm/scale": P(None, "fsdp") for name in ("attn", "mlp")}
    if not config.tied:
        specs["unembedding"] = P("fsdp", "tensor")
    if config.qkv_bias:
        specs |= {f"layers/{name}/bias": P(None, "tensor", None) for name in "qkv"}
    if config.qk_norm:
        specs |= {f"layers/{name}_norm/scale": P(None, None) for name in "qk"}
    return specs


class OfSlice:
    """A device that says of which slice it is."""

    def __init__(self, device, slice_index):
        self.device, self.slice_index = device, slice_index

    def __getattr__(self, name):
        return getattr(self.device, name)


def test_only_data_runs_between_slices(monkeypatch):
    """Devices of two slices that come mixed: each slice is one half of the data axis."""
    devices = [OfSlice(d, i % 2) for i, d in enumerate(jax.devices())]
    monkeypatch.setattr("mdrl_jax.parallel.sharding.Mesh", lambda array, *_, **__: array)
    array = make_mesh(MeshConfig(4, 1, 2), devices)
    assert array.shape == (4, 1, 2) and len({d.id for d in array.flat}) == 8
    assert [{d.slice_index for d in array[i].flat} for i in range(4)] == [{0}, {0}, {1}, {1}]
    with pytest.raises(UserError, match="data=1 is not divisible by the 2 slices"):
        make_mesh(MeshConfig(1, 4, 2), devices)


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v6 lite"])
@pytest.mark.parametrize("sizes", [(1, 8, 2), (2, 2, 4), (1, 16, 1), (8, 1, 2)])
def test_a_side_of_a_slice_may_be_parted(kind, sizes, monkeypatch):
    """4 x 4 chips as 8 x 2: neighbours along `tensor` are neighbours in the slice."""
    places = [(x, y, 0) for y in range(4) for x in range(4)]
    devices = [
        SimpleNamespace(platform="tpu", device_kind=kind, coords=at, core_on_chip=0, id=i, process_index=i // 4)
        for i, at in enumerate(places)
    ]
    monkeypatch.setattr("mdrl_jax.parallel.sharding.Mesh", lambda array, *_, **__: array)
    array = make_mesh(MeshConfig(*sizes), devices)
    assert array.shape == sizes and len({d.id for d in array.flat}) == 16
    if sizes[2] == 2:
        for one, other in array.reshape(-1, 2):
            assert sum(min(abs(a - b), 4 - abs(a - b)) for a, b in zip(one.coords, other.coords, strict=True)) == 1


def test_the_table_is_small_and_names_mesh_axes_only():
    assert len(RULES) <= 10
    for axes in RULES.values():
        assert set((axes,) if isinstance(axes, str) else axes or ()) <= set(MESH_AXES)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (2, 2, 2)),
        (MeshConfig(data=1, fsdp=-1, tensor=2), (1, 4, 2)),
        (MeshConfig(data=2, fsdp=1, tensor=-1), (2, 1, 4)),
    ],
)
def test_mesh_sizes(config, sizes):
    mesh = make_mesh(config)
    assert tuple(mesh.shape.items()) == tuple(zip(MESH_AXES, sizes, strict=True))
    assert mesh.size == 8
    assert batch_divisor(mesh) == sizes[0] * sizes[1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=-1, fsdp=-1), "at most one may be -1"),
        (MeshConfig(data=0), "sizes are positive"),
        (MeshConfig(data=-2), "sizes are positive"),
        (MeshConfig(data=3), "mesh data=3, fsdp=1, tensor=1 does not match the 8 devices"),
        (MeshConfig(data=-1, fsdp=3), "does not match the 8 devices"),
        (MeshConfig(data=-1, fsdp=16), "does not match the 8 devices"),
    ],
)
def test_mesh_refusals(config, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make_mesh(config)


def test_param_shardings_of_each_family(tiny, mesh8):
    specs = jax.tree.map(lambda s: s.spec, param_shardings(mesh8, param_shapes(Decoder(tiny.config))))
    assert by_path(specs) == expected(tiny.config)


def test_every_parameter_names_axes_of_the_table_and_no_mesh_axis_twice(tiny):
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    boxes = jax.tree.leaves(param_shapes(Decoder(tiny.config)), is_leaf=is_box)
    assert boxes and all(map(is_box, boxes))
    for box in boxes:
        assert len(box.names) == len(box.value.shape), box
        assert set(box.names) <= set(RULES), box
        used = [a for axes in spec(*box.names) if axes for a in ((axes,) if isinstance(axes, str) else axes)]
        assert len(used) == len(set(used)), box


def test_a_mesh_that_does_not_divide_a_parameter_is_refused_in_one_line(tiny_models):
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=4))
    with pytest.raises(UserError) as refusal:
        param_shardings(mesh, param_shapes(Decoder(tiny_models["llama"].config)))
    message = str(refusal.value)
    assert "\n" not in message
    assert message == (
        "parameter ['layers']['k']['kernel'] of shape (2, 32, 2, 8): 2 is not divisible by mesh tensor=4"
    )


def test_check_divides_multiplies_axes_of_one_dimension(mesh8):
    shapes = {"x": jax.ShapeDtypeStruct((6, 3), np.float32)}
    check_divides(mesh8, shapes, {"x": named(mesh8, "rows", None)})
    with pytest.raises(UserError, match=re.escape("6 is not divisible by mesh data*fsdp=4")):
        check_divides(mesh8, shapes, {"x": named(mesh8, "batch", None)})


def test_put_splits_rows_over_data_and_fsdp(mesh8):
    x = np.arange(24, dtype=np.float32).reshape(8, 3)
    (on_devices,) = put((x,), mesh8)
    np.testing.assert_array_equal(on_devices, x)
    assert on_devices.sharding.spec == P(("data", "fsdp"))
    assert {shard.data.shape for shard in on_devices.addressable_shards} == {(2, 3)}
    micro = put(x[None], mesh8, None, "batch")
    assert {shard.data.shape for shard in micro.addressable_shards} == {(1, 2, 3)}
