"""Reads and writes Hugging Face model folders: `config.json` and safetensors to and from the decoder's parameters.

The table `LAYOUTS` gives for each parameter the name of its tensor in the file and the order of its axes there. Reading
goes slice by slice and device by device: a process reads only the parts that its devices hold, and the host never holds
a second full copy. Weights in bfloat16 or float16 become float32 master weights.

A folder may also be a LoRA adapter in the layout of PEFT. It is read as the model that results if the adapter is merged
into its base model (`adapters.py`).
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
from safetensors import SafetensorError
from safetensors.numpy import save_file

from mdrl_jax.errors import UserError
from mdrl_jax.model import adapters, hub, tokens
from mdrl_jax.model.families import ModelConfig, from_hf, to_hf
from mdrl_jax.model.transformer import Decoder, param_shapes
from mdrl_jax.parallel.sharding import param_shardings
from mdrl_jax.records import json_object, regular

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
    "layers/attn_post_norm/scale": Layout("model.layers.{}.post_attention_layernorm.weight", 0),
    "layers/mlp_post_norm/scale": Layout("model.layers.{}.post_feedforward_layernorm.weight", 0),
    "layers/q_norm/scale": Layout(_ATTENTION + "q_norm.weight", 0),
    "layers/k_norm/scale": Layout(_ATTENTION + "k_norm.weight", 0),
    "layers/o/kernel": Layout(_ATTENTION + "o_proj.weight", 2),
    **{f"layers/{x}/kernel": Layout(_ATTENTION + f"{x}_proj.weight", 1) for x in "qkv"},
    **{f"layers/{x}/bias": Layout(_ATTENTION + f"{x}_proj.bias", 0) for x in "qkv"},
    **{f"layers/{x}/kernel": Layout("model.layers.{}.mlp." + f"{x}_proj.weight", 1) for x in ("gate", "up", "down")},
}


# In models that normalise the output of attention, the norm before the MLP has another name.
_BEFORE_MLP = Layout("model.layers.{}.pre_feedforward_layernorm.weight", 0)
# What stands before `embed_tokens.weight` in a file: a causal model, a model without a head, the text part of a model
# of images and text (version 4 of transformers and version 5).
PREFIXES = ("model.", "", "language_model.model.", "model.language_model.")


def _layout(path: tuple[Any, ...], params: Any) -> Layout:
    """The layout of a parameter; `params` is the whole tree."""
    name = path_name(path)
    if name == "layers/mlp_norm/scale" and "attn_post_norm" in params["layers"]:
        return _BEFORE_MLP
    return LAYOUTS[name]


def path_name(path: tuple[Any, ...]) -> str:
    """A path of JAX tree keys as text, e.g. `layers/q/kernel`.

    Args:
      path: the keys of nested dicts, as `jax.tree_util` gives them with a leaf; an empty one gives "".

    Raises:
      AttributeError: if a key is not that of a dict, such as an index of a list.
    """
    return "/".join(str(key.key) for key in path)


def read_config(folder: str | Path, base: str | Path | None = None) -> ModelConfig:
    """Reads `config.json` of a Hugging Face folder on the local disk.

    As in `transformers` 5, a tied model whose weights have an `lm_head` that differs from the embedding is not tied.

    Args:
      folder: a model folder, or a LoRA adapter, whose base model's `config.json` is read.
      base: folder of the model that an adapter belongs to; None: the folder that the adapter itself names.

    Raises:
      UserError: if the folder or file is absent, damaged or no regular file, if `families.from_hf` refuses a field, or
        if an adapter has no base (`adapters.base_of`).
      OSError: if the file cannot be read, for example without permission.
    """
    folder = model_of(folder, base)
    file = folder / "config.json"
    if not file.exists():
        raise UserError(f"{folder} is not a Hugging Face model folder: it has no config.json")
    config = from_hf(json_object(file), str(file))
    weights = [folder / name for name in (_SINGLE, _INDEX)]
    if config.tied and any(file.exists() for file in weights) and _head_differs(folder):
        return dataclasses.replace(config, tied=False)
    return config


def model_of(folder: str | Path, base: str | Path | None = None) -> Path:
    """The folder with `config.json` and the tokenizer: `folder` itself, or the base model of an adapter.

    Raises:
      UserError: if it is no folder, or if an adapter has no base (`adapters.base_of`).
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; a model is the folder with its config.json and *.safetensors")
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist; a model of the hub is named hub:ORGANISATION/MODEL")
    return adapters.base_of(folder, base) if adapters.is_adapter(folder) else folder


def _head_differs(folder: Path) -> bool:
    files = _Files(folder)
    if not {"lm_head.weight", files.name("model.embed_tokens.weight")} <= set(files.handles):
        return False
    head, embedding = (files.slice(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    if list(head.get_shape()) != list(embedding.get_shape()):
        return True
    n, width = head.get_shape()
    rows = max(1, 2**24 // max(1, width))  # 64 MiB of float32 at a time
    parts = [slice(i, min(i + rows, n)) for i in range(0, n, rows)]
    return not all(np.array_equal(np.asarray(head[part]), np.asarray(embedding[part])) for part in parts)


_SINGLE, _INDEX = adapters.WHOLE


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
    from huggingface_hub.errors import LocalEntryNotFoundError

    model, _, revision = name.partition("@")
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    away = hub.away()
    try:
        found = huggingface_hub.snapshot_download(
            model, revision=revision or None, allow_patterns=wanted, local_files_only=bool(away)
        )
    except Exception as e:  # the hub and the network can fail in any way
        reason = hub.said(e)
        if away and isinstance(e, LocalEntryNotFoundError):
            reason = f"{away}; its cache has no copy"
        raise UserError(f"the model hub:{name} cannot be downloaded: {reason}") from e
    return Path(found)


class _Files:
    """The tensors of `model.safetensors`, or else of the files that `model.safetensors.index.json` lists.

    Names are those of a causal model (`LAYOUTS`), also where the file's tensors have another prefix. If `base` is
    given, `folder` is a LoRA adapter, and the tensors are those of the base model with the adapter merged into them.
    """

    def __init__(self, folder: Path, base: Path | None = None):
        self.adapter = None if base is None else adapters.Adapter(folder)
        folder = folder if base is None else base
        index, single = folder / _INDEX, folder / _SINGLE
        self.handles: dict[str, Any] = {}
        try:
            if single.exists():  # as in transformers: an index beside it is left from an earlier, larger model
                files = [single]
            elif index.exists():
                names = sorted(set(json.loads(regular(index).read_text())["weight_map"].values()))
                if outside := [name for name in names if Path(name).name != name or name == ".."]:
                    raise UserError(f"{index} names {outside[0]!r}; it may only name files of its own folder")
                files = [folder / name for name in names]
            else:
                raise UserError(f"{folder} has neither {_SINGLE} nor {_INDEX}")
            for file in files:
                if not file.exists():
                    raise UserError(f"{index} names {file.name}, which is absent")
                handle = adapters.opened(file)
                self.handles.update(dict.fromkeys(handle.keys(), handle))
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OSError) as e:
            raise UserError(f"the weights in {folder} cannot be read: {e}") from e
        self.prefix = next((p for p in PREFIXES if f"{p}embed_tokens.weight" in self.handles), "model.")
        if self.adapter is not None:
            self.adapter.check({self.usual(name) for name in self.handles})

    def name(self, usual: str) -> str:
        """The name in the file of a tensor of `LAYOUTS`."""
        inner = usual.removeprefix("model.")
        return usual if inner == usual else self.prefix + inner

    def usual(self, name: str) -> str:
        """The name in `LAYOUTS` of a tensor of the file."""
        inside = (
            self.prefix and name.startswith(self.prefix) or name.split(".")[0] in ("embed_tokens", "layers", "norm")
        )
        return "model." + name.removeprefix(self.prefix) if inside else name

    def has(self, usual: str) -> bool:
        """Whether there is a tensor of this name of `LAYOUTS`."""
        replaced = self.adapter is not None and self.adapter.replaces(usual)
        return replaced or self.name(usual) in self.handles

    def slice(self, usual: str) -> Any:
        """The tensor of this name of `LAYOUTS`, from which parts can be read."""
        if self.adapter is not None and self.adapter.replaces(usual):
            return self.adapter.saved(usual)
        name = self.name(usual)
        tensor = self.handles[name].get_slice(name)
        return tensor if self.adapter is None else self.adapter.merged(usual, tensor)


def _read(tensor: Any, layout: Layout, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
    """The part `index` of a parameter of `shape` (without the layer axis), read from its tensor in the file."""
    bounds = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
    sizes = [stop - start for start, stop in bounds]

    def merged(axes: range) -> slice:
        # head_dim is never split over devices, so a range of heads is one contiguous range of the merged axis.
        inner = int(np.prod([shape[a] for a in axes[1:]]))
        return slice(bounds[axes[0]][0] * inner, bounds[axes[0]][1] * inner)

    if layout.n_in == 0 and len(shape) == 2 and "{}" in layout.name:  # a bias, or the scale of a norm over all heads
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
    return [int(np.prod(shape))] if "{}" in layout.name else list(shape)


def load(folder: str | Path, model: Decoder, mesh: Mesh, base: str | Path | None = None) -> Any:
    """Loads the parameters of a Hugging Face folder.

    Tensors that the decoder has no parameter for are ignored. If the embedding of a tied model is absent,
    `lm_head.weight` takes its place.

    Args:
      folder: a folder with safetensors: `model.safetensors`, or several files and `model.safetensors.index.json`. If
        both are there, the single file is used. Or a LoRA adapter, which is merged into its base model in float32.
      model: the decoder; its config comes from `read_config(folder, base)`.
      mesh: the mesh over which the parameters are sharded.
      base: folder of the model that an adapter belongs to; None: the folder that the adapter itself names.

    Returns:
      the parameter tree, float32, each leaf in its sharding (`parallel.sharding.param_shardings`).

    Raises:
      UserError: if `folder` does not exist or its files cannot be read; if a tensor is absent, is quantized, has
        another shape than `config.json` says or a number that is not finite; if the mesh does not divide a parameter;
        or if an adapter has no base (`adapters.base_of`), does not fit it, or asks for what is not supported
        (`adapters.Adapter`).
    """
    whole = model_of(folder, base)
    files = _Files(Path(folder), None if whole == Path(folder) else whole)
    if model.config.tied and (adapter := files.adapter) is not None:
        if adapter.changes("lm_head.weight"):
            raise UserError(f"{folder} changes lm_head alone, but in its base model lm_head is the embedding")
        if adapter.changes("model.embed_tokens.weight") and not adapter.fields.get("ensure_weight_tying"):
            raise UserError(
                f"{folder} changes the embedding, but not the unembedding, of a model where the two are one matrix; "
                "supported: adapters that PEFT trained with ensure_weight_tying"
            )
    boxed = param_shapes(model)
    tree = nn.unbox(boxed)

    def leaf(path: tuple[Any, ...], shape: Any, sharding: Any) -> jax.Array:
        layout = _layout(path, tree)
        name = layout.name
        if path_name(path) == "embedding" and not files.has(name) and model.config.tied:
            name = "lm_head.weight"  # some tied models store the shared matrix under this name only
        stacked = "{}" in name
        inner = shape.shape[1:] if stacked else shape.shape
        layers = shape.shape[0] if stacked else 1
        tensors = []
        for layer in range(layers):
            if not files.has(name.format(layer)):
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

        def part(layer: int, index: Any) -> np.ndarray:
            numbers = _read(tensors[layer], layout, inner, index)
            if not np.isfinite(numbers).all():
                n = numbers.size - int(np.isfinite(numbers).sum())
                raise UserError(f"{folder}: {name.format(layer)} has {n} numbers that are NaN or infinite")
            return numbers

        def read(index: Any) -> np.ndarray:
            if not stacked:
                return part(0, index)
            chosen = range(layers)[index[0]]
            sizes = [len(range(*s.indices(n))) for s, n in zip(index[1:], inner, strict=True)]
            out = np.empty((len(chosen), *sizes), np.float32)  # filled in place: np.stack would hold all of it twice
            for i, layer in enumerate(chosen):
                out[i] = part(layer, index[1:])
            return out

        return _placed(shape.shape, sharding, read)

    return jax.tree_util.tree_map_with_path(leaf, tree, param_shardings(mesh, boxed))


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
            return array.reshape(-1) if "{}" in layout.name else array
        n_inputs = int(np.prod(array.shape[: layout.n_in]))
        return np.ascontiguousarray(array.reshape(n_inputs, -1).T)

    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        layout = _layout(path, params)
        layers = range(leaf.shape[0]) if "{}" in layout.name else [None]
        for layer in layers:
            name = layout.name.format(layer)
            tensors[name] = lambda a=leaf, b=layer, c=layout: tensor(a, b, c)
    return tensors


def save(
    folder: str | Path,
    params: Any,
    config: ModelConfig,
    dtype: Any = np.float32,
    source: str | Path | None = None,
    card: str = "",
    eos_ids: tuple[int, ...] = (),
) -> None:
    """Writes `config.json` and safetensors; above 4 GiB the tensors go to several files with an index.

    Everything is written to a hidden folder, `.NAME.partial`, beside `folder`, or inside it if it exists already, as an
    empty folder or a mount point does. A call that fails removes it; the next call removes what a killed one left. At
    the end it is renamed, or its files are moved to `folder`, `config.json` last. So after an interrupted call no
    folder looks like a whole model. All files have the mode that the umask gives.

    Args:
      folder: a folder that does not exist or is empty, or a link to such a folder; its parents are made. Only one
        process may write it.
      params: the parameter tree; each leaf whole within reach of this process (`distributed.gather`).
      config: sizes of the model, which are not compared with `params`.
      dtype: NumPy or JAX dtype of the numbers in the files, which are rounded to it. `load` reads float32, bfloat16 and
        float16 only.
      source: the model folder that the parameters were trained from. Its tokenizer and chat templates are copied, and
        its `config.json` and `generation_config.json` are kept apart from what has to change. None: only what the
        decoder knows is written.
      card: text of the model card, README.md; "": none.
      eos_ids: the ids that end a completion (`tokens.eos_ids`), which `generation_config.json` then names; (): the
        file stays as it is in `source`.

    Raises:
      UserError: if `folder` is a file or a folder that is not empty, if a number is not finite in `dtype`, or if a file
        of `source` is damaged.
      KeyError: if `params` has a leaf that is no parameter of a decoder, or the family is not a key of `FAMILIES`.
      TypeError: if `dtype` is not a dtype.
      OSError: if the disk does not take the files.
    """
    folder = Path(folder).resolve()  # "." has no name
    name = f".{folder.name}.partial"
    check_new(folder, name)
    partial = folder / name if folder.exists() else folder.with_name(name)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_all(partial, params, config, dtype, source, card, eos_ids)
    except Exception:  # so that the folder stays empty, and can be named again
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if not folder.exists():
        partial.rename(folder)
        return
    for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
        file.rename(folder / file.name)
    partial.rmdir()


def _write_all(
    partial: Path,
    params: Any,
    config: ModelConfig,
    dtype: Any,
    source: str | Path | None,
    card: str,
    eos_ids: tuple[int, ...],
) -> None:
    _write_tensors(partial, params, dtype)
    if source is not None:
        tokens.copy(Path(source), partial)
        generation = _generation_config(Path(source), eos_ids)
        if generation:
            (partial / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")
    if card:
        (partial / "README.md").write_text(card, encoding="utf-8")
    (partial / "config.json").write_text(json.dumps(_config_json(config, dtype, source), indent=1) + "\n")
    mode = (partial / "config.json").stat().st_mode
    for file in partial.rglob("*"):
        if file.is_file():
            file.chmod(mode)  # safetensors lets only the owner read its files


def check_new(folder: Path, *allowed: str) -> None:
    """Refuses an output folder that is a file or has files.

    Args:
      folder: the folder that is to be written.
      *allowed: names that it may hold. `lost+found`, which a new file system has, is always allowed.

    Raises:
      UserError: if it is a file or holds anything else.
    """
    if folder.is_file():
        raise UserError(f"{folder} is a file; name a new folder")
    if folder.exists() and any(file.name not in ("lost+found", *allowed) for file in folder.iterdir()):
        raise UserError(f"{folder} exists and is not empty; name a new folder")


def _write_tensors(partial: Path, params: Any, dtype: Any) -> None:
    shards: list[dict[str, np.ndarray]] = [{}]
    size = total = 0
    names: list[list[str]] = [[]]

    def flush(number: int) -> None:
        try:
            save_file(shards[-1], partial / f"shard-{number}", metadata={"format": "pt"})
        except SafetensorError as e:  # such as a full disk
            raise OSError(f"{partial} cannot be written: {e}") from e
        shards[-1] = {}

    for name, make in to_tensors(params).items():
        array = make().astype(dtype)
        if not np.isfinite(array.astype(np.float32)).all():
            raise UserError(f"{name} has numbers that are NaN or, as {jnp.dtype(dtype)}, infinite; nothing is written")
        if names[-1] and size + array.nbytes > SHARD_BYTES:
            flush(len(names))
            names.append([])
            size = 0
        shards[-1][name] = array
        names[-1].append(name)
        size, total = size + array.nbytes, total + array.nbytes
    flush(len(names))
    if len(names) == 1:
        (partial / "shard-1").rename(partial / _SINGLE)
        return
    weight_map = {}
    for i, group in enumerate(names, 1):
        file = f"model-{i:05d}-of-{len(names):05d}.safetensors"
        (partial / f"shard-{i}").rename(partial / file)
        weight_map.update(dict.fromkeys(group, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (partial / _INDEX).write_text(json.dumps(index, indent=1))


def _config_json(config: ModelConfig, dtype: Any, source: str | Path | None) -> dict[str, Any]:
    """`config.json` of a written model: that of the source with the fields changed that no longer hold.

    If the source describes another function, such as a model of images whose text part was trained, only its special
    tokens are kept.
    """
    made = to_hf(config) | {"torch_dtype": str(jnp.dtype(dtype))}
    if source is None:
        return made
    found = json_object(Path(source) / "config.json")
    kept = found if found.get("model_type") == config.family else {}
    kept = kept | {"tie_word_embeddings": config.tied, "architectures": made["architectures"]}
    names = ("dtype", "torch_dtype")  # the name in version 5 of transformers and in version 4
    kept |= {
        name: made["torch_dtype"] for name in names if name in kept or name == "torch_dtype" and names[0] not in kept
    }
    try:
        if from_hf(kept) == config:
            return kept
    except UserError:
        pass
    return made | {name: found[name] for name in SPECIAL if name in found}


SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def _generation_config(source: Path, eos_ids: tuple[int, ...]) -> dict[str, Any]:
    """`generation_config.json` of a written model: that of the source, or its special tokens; with our end tokens."""
    file = source / "generation_config.json"
    if file.exists():
        fields = json_object(file)
    else:
        found = json_object(source / "config.json")
        fields = {name: found[name] for name in SPECIAL if found.get(name) is not None}
    if ends := list(dict.fromkeys(eos_ids)):
        fields["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return fields
