"""Reads and writes Hugging Face model folders: `config.json` and safetensors to and from the decoder's parameters.

The table `LAYOUTS` gives for each parameter the name of its tensor in the file and the order of its axes there. Reading
goes slice by slice and device by device: a process reads only the parts that its devices hold, and the host never holds
a second full copy. Weights in bfloat16 or float16 become float32 master weights.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mdrl_jax.errors import UserError
from mdrl_jax.model.families import ModelConfig, from_hf, to_hf
from mdrl_jax.model.transformer import Decoder, param_shapes
from mdrl_jax.parallel.sharding import param_shardings
from mdrl_jax.records import regular

SHARD_BYTES = 4 * 2**30
READABLE = ("F32", "BF16", "F16")  # other types (integers, float8) hold quantized weights, useless without their scales


@dataclasses.dataclass(frozen=True)
class Layout:
    """The tensor in the file that holds a parameter, and how its axes map to the parameter's.

    A file holds a matrix as [out, in], with heads and head_dim merged into one axis. The decoder's kernels are
    [in..., out...] with separate axes.

    Attributes:
      name: name of the tensor; {} stands for the number of the layer.
      n_in: number of input axes of the decoder's kernel; 0 for vectors and the embedding, which are not transposed.
    """

    name: str
    n_in: int


_ATTENTION = "model.layers.{}.self_attn."
LAYOUTS: dict[str, Layout] = {
    "embedding": Layout("model.embed_tokens.weight", 0),
    "unembedding": Layout("lm_head.weight", 1),
    "norm/scale": Layout("model.norm.weight", 0),
    "layers/attn_norm/scale": Layout("model.layers.{}.input_layernorm.weight", 0),
    "layers/mlp_norm/scale": Layout("model.layers.{}.post_attention_layernorm.weight", 0),
    "layers/q_norm/scale": Layout(_ATTENTION + "q_norm.weight", 0),
    "layers/k_norm/scale": Layout(_ATTENTION + "k_norm.weight", 0),
    "layers/o/kernel": Layout(_ATTENTION + "o_proj.weight", 2),
    **{f"layers/{x}/kernel": Layout(_ATTENTION + f"{x}_proj.weight", 1) for x in "qkv"},
    **{f"layers/{x}/bias": Layout(_ATTENTION + f"{x}_proj.bias", 0) for x in "qkv"},
    **{f"layers/{x}/kernel": Layout("model.layers.{}.mlp." + f"{x}_proj.weight", 1) for x in ("gate", "up", "down")},
}


def path_name(path: tuple[Any, ...]) -> str:
    """A path of JAX tree keys as text, e.g. `layers/q/kernel`.

    Args:
      path: the keys of nested dicts, as `jax.tree_util` gives them with a leaf; an empty one gives "".

    Raises:
      AttributeError: if a key is not that of a dict, such as an index of a list.
    """
    return "/".join(str(key.key) for key in path)


def read_config(folder: str | Path) -> ModelConfig:
    """Reads `config.json` of a Hugging Face folder on the local disk.

    Raises:
      UserError: if the folder or file is absent, damaged or no regular file, or if `families.from_hf` refuses a field.
      OSError: if the file cannot be read, for example without permission.
    """
    file = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise UserError(f"model folder {folder} does not exist; a model of the hub is named hub:ORGANISATION/MODEL")
    if not file.exists():
        raise UserError(f"{folder} is not a Hugging Face model folder: it has no config.json")
    try:
        fields = json.loads(regular(file).read_text())
    except ValueError as e:
        raise UserError(f"{file} is not valid JSON ({e})") from e
    if not isinstance(fields, dict):
        raise UserError(f"{file} is not a JSON object")
    return from_hf(fields, str(file))


@functools.cache
def downloaded(name: str) -> Path:
    """The folder of a model of the Hugging Face hub, in the cache of `huggingface_hub`; it is downloaded if need be.

    Only the config, the tokenizer and the safetensors are taken. Where the hub cannot be reached, the newest copy in
    the cache is used.

    Args:
      name: "ORGANISATION/MODEL", perhaps with "@" and a revision.

    Raises:
      UserError: if the hub has no such model, or it is neither in the cache nor can be downloaded.
    """
    import huggingface_hub

    model, _, revision = name.partition("@")
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(huggingface_hub.snapshot_download(model, revision=revision or None, allow_patterns=wanted))
    except Exception as e:  # the hub and the network can fail in any way
        reason = " ".join((str(e).splitlines() or [""])[0].split())
        raise UserError(f"the model hub:{name} cannot be downloaded ({type(e).__name__}: {reason})") from e


class _Files:
    """The tensors of `model.safetensors`, or of the files that `model.safetensors.index.json` lists."""

    def __init__(self, folder: Path):
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        self.handles: dict[str, Any] = {}
        try:
            if index.exists():
                names = sorted(set(json.loads(regular(index).read_text())["weight_map"].values()))
                if outside := [name for name in names if Path(name).name != name or name == ".."]:
                    raise UserError(f"{index} names {outside[0]!r}; it may only name files of its own folder")
                files = [folder / name for name in names]
            elif single.exists():
                files = [single]
            else:
                raise UserError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")
            for file in files:
                if not file.exists():
                    raise UserError(f"{index} names {file.name}, which is absent")
                handle = safe_open(str(regular(file)), framework="numpy")
                self.handles.update(dict.fromkeys(handle.keys(), handle))
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OSError) as e:
            raise UserError(f"the weights in {folder} cannot be read: {e}") from e

    def slice(self, name: str) -> Any:
        return self.handles[name].get_slice(name)


def _read(tensor: Any, layout: Layout, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
    """The part `index` of a parameter of `shape` (without the layer axis), read from its tensor in the file."""
    bounds = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
    sizes = [stop - start for start, stop in bounds]

    def merged(axes: range) -> slice:
        # head_dim is never split over devices, so a range of heads is one contiguous range of the merged axis.
        inner = int(np.prod([shape[a] for a in axes[1:]]))
        return slice(bounds[axes[0]][0] * inner, bounds[axes[0]][1] * inner)

    if layout.n_in == 0 and len(shape) == 2 and layout.name.endswith("bias"):
        part = tensor[merged(range(2))]
        return np.asarray(part).astype(np.float32).reshape(sizes)
    if layout.n_in == 0:
        part = tensor[tuple(slice(*b) for b in bounds)]
        return np.asarray(part).astype(np.float32)
    inputs, outputs = range(layout.n_in), range(layout.n_in, len(shape))
    part = np.asarray(tensor[merged(outputs), merged(inputs)]).astype(np.float32)
    return np.ascontiguousarray(part.T).reshape(sizes)


def _file_shape(layout: Layout, shape: tuple[int, ...]) -> list[int]:
    """The shape that the file must have for a parameter of `shape` (without the layer axis)."""
    if layout.n_in:
        return [int(np.prod(shape[layout.n_in :])), int(np.prod(shape[: layout.n_in]))]
    return [int(np.prod(shape))] if layout.name.endswith("bias") else list(shape)


def load(folder: str | Path, model: Decoder, mesh: Mesh) -> Any:
    """Loads the parameters of a Hugging Face folder.

    Tensors that the decoder has no parameter for are ignored. If the embedding of a tied model is absent,
    `lm_head.weight` takes its place.

    Args:
      folder: a folder with safetensors: `model.safetensors`, or several files and `model.safetensors.index.json`. If
        both are there, the index is used.
      model: the decoder; its config comes from `read_config(folder)`.
      mesh: the mesh over which the parameters are sharded.

    Returns:
      the parameter tree, float32, each leaf in its sharding (`parallel.sharding.param_shardings`).

    Raises:
      UserError: if the files cannot be read, if a tensor is absent, is quantized or has another shape than
        `config.json` says, or if the mesh does not divide a parameter.
    """
    files = _Files(Path(folder))
    boxed = param_shapes(model)

    def leaf(path: tuple[Any, ...], shape: Any, sharding: Any) -> jax.Array:
        layout = LAYOUTS[path_name(path)]
        name = layout.name
        if path_name(path) == "embedding" and name not in files.handles and model.config.tied:
            name = "lm_head.weight"  # some tied models store the shared matrix under this name only
        stacked = "{}" in name
        inner = shape.shape[1:] if stacked else shape.shape
        layers = shape.shape[0] if stacked else 1
        tensors = []
        for layer in range(layers):
            if name.format(layer) not in files.handles:
                raise UserError(f"{folder} has no tensor {name.format(layer)}")
            tensor = files.slice(name.format(layer))
            found, wanted = list(tensor.get_shape()), _file_shape(layout, inner)
            if found != wanted:
                raise UserError(f"{folder}: {name.format(layer)} has shape {found}; config.json's sizes give {wanted}")
            if tensor.get_dtype() not in READABLE:
                raise UserError(
                    f"{folder}: {name.format(layer)} has dtype {tensor.get_dtype()}; supported: {', '.join(READABLE)}"
                )
            tensors.append(tensor)

        def read(index: Any) -> np.ndarray:
            if not stacked:
                return _read(tensors[0], layout, inner, index)
            chosen = tensors[index[0]]
            sizes = [len(range(*s.indices(n))) for s, n in zip(index[1:], inner, strict=True)]
            out = np.empty((len(chosen), *sizes), np.float32)  # filled in place: np.stack would hold all of it twice
            for i, tensor in enumerate(chosen):
                out[i] = _read(tensor, layout, inner, index[1:])
            return out

        return _placed(shape.shape, sharding, read)

    return jax.tree_util.tree_map_with_path(leaf, nn.unbox(boxed), param_shardings(mesh, boxed))


def _placed(shape: tuple[int, ...], sharding: Any, read: Callable[[Any], np.ndarray]) -> jax.Array:
    """An array made of the parts that this process's devices hold.

    `read` is called once for each different part. The part is moved to its devices before the next is read, so the host
    holds one part at a time.
    """
    devices: dict[Any, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        key = tuple(s.indices(n) for s, n in zip(index, shape, strict=True))
        devices.setdefault(key, []).append((device, index))
    placed = []
    for same in devices.values():
        part = read(same[0][1])
        placed += [jax.device_put(part, device).block_until_ready() for device, _ in same]
    return jax.make_array_from_single_device_arrays(shape, sharding, placed)


def random_params(model: Decoder, mesh: Mesh, seed: int) -> Any:
    """Randomly initialised parameters, created in their shardings: each device holds only its own parts.

    Embedding, unembedding and kernels are normal with mean 0 and standard deviation 0.02, biases 0, and scales of
    norms 1. The values do not depend on the mesh.

    Args:
      model: the decoder.
      mesh: the mesh over which the parameters are sharded.
      seed: seed of the initialisation, -2^63 <= seed < 2^63. Only its lowest 32 bits count,
        unless JAX's 64-bit mode is on.

    Returns:
      the parameter tree, float32.

    Raises:
      UserError: if the mesh does not divide a parameter.
      OverflowError: if the seed is outside these bounds.
      TypeError: if the seed is not an integer.
    """
    boxed = param_shapes(model)
    tokens = jnp.zeros((1, 1), jnp.int32)

    def init(key: jax.Array) -> Any:
        return nn.unbox(model.init(key, tokens, tokens == 0)["params"])

    return jax.jit(init, out_shardings=param_shardings(mesh, boxed))(jax.random.key(seed))


def to_tensors(params: Any) -> dict[str, Callable[[], np.ndarray]]:
    """The tensors of the Hugging Face layout, made one at a time.

    Args:
      params: the parameter tree of a decoder, without boxes; each leaf whole within reach of this process.

    Returns:
      tensor name -> a function that makes the tensor on the host, in the leaf's dtype. Nothing is copied until it is
      called. A tied model has no `lm_head.weight`. Projections are [out, in], biases [out], with heads and head_dim as
      one axis; `lm_head.weight` is [V, D]. The order is that of the tree, and the layers of a stacked parameter follow
      each other.

    Raises:
      KeyError: if a path is not in `LAYOUTS`.
      AttributeError: if a tree key is not that of a dict.
    """
    tensors: dict[str, Callable[[], np.ndarray]] = {}

    def tensor(leaf: jax.Array, layer: int | None, layout: Layout) -> np.ndarray:
        array = np.asarray(leaf if layer is None else leaf[layer])
        if layout.n_in == 0:
            return array.reshape(-1) if layout.name.endswith("bias") else array
        n_inputs = int(np.prod(array.shape[: layout.n_in]))
        return np.ascontiguousarray(array.reshape(n_inputs, -1).T)

    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        layout = LAYOUTS[path_name(path)]
        layers = range(leaf.shape[0]) if "{}" in layout.name else [None]
        for layer in layers:
            name = layout.name.format(layer)
            tensors[name] = lambda a=leaf, b=layer, c=layout: tensor(a, b, c)
    return tensors


def save(folder: str | Path, params: Any, config: ModelConfig, dtype: Any = np.float32) -> None:
    """Writes `config.json` and safetensors; above 4 GiB the tensors go to several files with an index.

    Everything is written to a hidden folder beside `folder`, `.NAME.partial`; a failed call leaves it, and the next one
    removes it. At the end it is renamed. If `folder` exists, its files are moved there instead, `config.json` last. So
    after an interrupted call no folder looks like a whole model.

    Args:
      folder: a folder that does not exist or is empty, or a link to such a folder; its parents are made. Only one
        process may write it.
      params: the parameter tree; each leaf whole within reach of this process (`distributed.gather`).
      config: sizes of the model, which are not compared with `params`.
      dtype: NumPy or JAX dtype of the numbers in the files. Numbers are rounded to it, and those above its range become
        infinite. `load` reads float32, bfloat16 and float16 only.

    Raises:
      UserError: if `folder` is a file or a folder that is not empty.
      KeyError: if `params` has a leaf that is no parameter of a decoder, or the family is not a key of `FAMILIES`.
      TypeError: if `dtype` is not a dtype.
      OSError: if the disk does not take the files.
    """
    folder = Path(folder).resolve()  # "." has no name
    if folder.is_file():
        raise UserError(f"{folder} is a file; name a new folder")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is not empty; name a new folder")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shards: list[dict[str, np.ndarray]] = [{}]
    size = total = 0
    names: list[list[str]] = [[]]

    def flush(number: int) -> None:
        save_file(shards[-1], partial / f"shard-{number}", metadata={"format": "pt"})
        shards[-1] = {}

    for name, make in to_tensors(params).items():
        array = make().astype(dtype)
        if names[-1] and size + array.nbytes > SHARD_BYTES:
            flush(len(names))
            names.append([])
            size = 0
        shards[-1][name] = array
        names[-1].append(name)
        size, total = size + array.nbytes, total + array.nbytes
    flush(len(names))
    if len(names) == 1:
        (partial / "shard-1").rename(partial / "model.safetensors")
    else:
        weight_map = {}
        for i, group in enumerate(names, 1):
            file = f"model-{i:05d}-of-{len(names):05d}.safetensors"
            (partial / f"shard-{i}").rename(partial / file)
            weight_map.update(dict.fromkeys(group, file))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    written = {**to_hf(config), "torch_dtype": str(jnp.dtype(dtype))}
    (partial / "config.json").write_text(json.dumps(written, indent=1) + "\n")
    if not folder.exists():
        partial.rename(folder)
        return
    for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
        file.rename(folder / file.name)
    partial.rmdir()
