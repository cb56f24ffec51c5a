"""LoRA adapters in the layout of PEFT, merged into the tensors of their base model while these are read.

An adapter changes a matrix W [out, in] of the base model to W + s B A (arXiv 2106.09685), with A [r, in], B [out, r]
and s = alpha / r, or alpha / √r if `use_rslora` is set. The sum is computed in float32, for the part that is read. An
adapter folder has `adapter_config.json` and `adapter_model.safetensors`.
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from mdrl_jax.errors import UserError
from mdrl_jax.records import json_object, regular

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WHOLE = ("model.safetensors", "model.safetensors.index.json")  # the weights of a whole model
_BEFORE = "base_model.model."
_PAIR = re.compile(r"(.*)\.lora_(?:embedding_)?([AB])(?:\.weight)?")
_TEXT_PART = re.compile(r"^(model\.language_model|language_model\.model)\.")  # of a model of images and text
# Fields of adapter_config.json that ask for another function, with the values that ask for none.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "use_qalora": (False, None),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "use_bdlora": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    # The other starts, such as "pissa" and "olora", also change the base model that the adapter belongs to.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
}


def is_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter and no whole model: it has `adapter_config.json`, but no weights of a whole model.

    Some trainers leave the base model's `config.json` beside the adapter.
    """
    return (folder / CONFIG).exists() and not any((folder / name).exists() for name in WHOLE)


def base_of(folder: Path, base: str | Path | None) -> Path:
    """The folder of an adapter's base model.

    Args:
      folder: the adapter.
      base: the base model if it is known; None: the folder that the adapter's `base_model_name_or_path` names.

    Raises:
      UserError: if no base is known, it is no folder on this disk, or it is an adapter itself; or if the adapter's
        `adapter_config.json` is no JSON object.
      OSError: if that file cannot be read.
    """
    named = base if base is not None else json_object(folder / CONFIG).get("base_model_name_or_path")
    if not named or not Path(str(named)).is_dir():
        which = f"its base model {str(named)!r} is no folder here" if named else "it names no base model"
        raise UserError(f"{folder} is a LoRA adapter, and {which}; give the folder of its base model by --base=DIR")
    if is_adapter(Path(str(named))):
        raise UserError(f"the base model {named} of the LoRA adapter {folder} is an adapter itself; give a whole model")
    return Path(str(named))


def opened(file: Path) -> Any:
    """The open tensors of a file of safetensors.

    Raises:
      UserError: if it is no regular file.
      OSError: if it cannot be opened.
      SafetensorError: if it is damaged.
    """
    with open(regular(file), "rb"):  # safetensors would say of a file without permission that it does not exist
        return safe_open(str(file), framework="numpy")


class Adapter:
    """The tensors of an adapter.

    Args:
      folder: the adapter's folder.

    Raises:
      UserError: if the adapter is no LoRA, asks for something that is not supported (`_NEUTRAL`), has a field of the
        wrong form, cannot be read, has no tensors, or has one of an unknown kind, a wrong shape or no float dtype; the
        message names the field or the tensor.
    """

    def __init__(self, folder: Path):
        self.folder, self.fields = folder, json_object(folder / CONFIG)
        if self.fields.get("peft_type") != "LORA":
            raise UserError(f"{folder}: peft_type={self.fields.get('peft_type')!r} is not supported; supported: LORA")
        for field, neutral in _NEUTRAL.items():
            if (value := self.fields.get(field)) not in neutral:
                raise UserError(f"{folder}: {field}={value!r} of the LoRA adapter is not supported; merge it with PEFT")
        self._check_numbers()
        file = folder / WEIGHTS
        if not file.exists():
            raise UserError(f"{folder} has no {WEIGHTS}")
        try:
            self._handle = opened(file)
            names = list(self._handle.keys())
        except (SafetensorError, OSError) as e:
            raise UserError(f"the weights in {folder} cannot be read: {e}") from e
        if not names:
            raise UserError(f"{folder / WEIGHTS} has no tensors, so the LoRA adapter changes nothing; save it again")
        self._pairs: dict[str, dict[str, str]] = {}  # tensor of the base -> {"A": name in this file, "B": name}
        self._saved: dict[str, str] = {}  # tensor of the base that the adapter holds as a whole -> name in this file
        for name in names:
            inner = _TEXT_PART.sub("model.", name.removeprefix(_BEFORE))
            if found := _PAIR.fullmatch(inner):
                self._check_matrix(name)
                self._pairs.setdefault(f"{found[1]}.weight", {})[found[2]] = name
            elif inner.endswith(".weight") and "lora_" not in inner:
                self._saved[inner] = name
            else:
                raise UserError(f"{folder}: tensor {name} of the LoRA adapter is not supported; merge it with PEFT")
        for target, pair in self._pairs.items():
            if set(pair) != {"A", "B"}:
                raise UserError(f"{folder}: the LoRA adapter has only one of the two matrices of {target}")
        if self.fields.get("ensure_weight_tying"):
            self._tie()

    def _check_numbers(self) -> None:
        """Refuses a rank or an α that is no number, and a pattern of modules that is no regular expression."""
        numbers = {"r": self.fields.get("r", 8), "lora_alpha": self.fields.get("lora_alpha", 8)}
        for field in ("rank_pattern", "alpha_pattern"):
            by_module = self.fields.get(field) or {}
            if not isinstance(by_module, dict):
                raise UserError(f"{self.folder / CONFIG}: {field} is {by_module!r}; it must map modules to numbers")
            for pattern, value in by_module.items():
                numbers[f"{field} {pattern!r}"] = value
                try:
                    re.compile(pattern)
                except re.error as e:
                    raise UserError(f"{self.folder / CONFIG}: {field} {pattern!r} is no regular expression: {e}") from e
        for field, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not -1e9 < value < 1e9:
                raise UserError(f"{self.folder / CONFIG}: {field} is {value!r}; it must be a number")

    def _check_matrix(self, name: str) -> None:
        part = self._handle.get_slice(name)
        shape, dtype = list(part.get_shape()), part.get_dtype()
        if 0 in shape or len(shape) != 2:
            hint = "; with DeepSpeed ZeRO-3, gather the weights before they are saved" if 0 in shape else ""
            raise UserError(
                f"{self.folder}: tensor {name} of the LoRA adapter has the shape {shape}; it must be a matrix that is "
                f"not empty{hint}"
            )
        if not dtype.startswith(("F", "BF")):
            raise UserError(
                f"{self.folder}: tensor {name} of the LoRA adapter has the dtype {dtype}; save it as a float"
            )

    def _tie(self) -> None:
        """Leaves out the change of the unembedding if it is that of the embedding, written once more."""
        table, head = "model.embed_tokens.weight", "lm_head.weight"

        def matrix(name: str) -> np.ndarray:
            return np.asarray(self._handle.get_tensor(name)).astype(np.float32)

        if {table, head} <= self._pairs.keys():
            of_table, of_head = self._pairs[table], self._pairs[head]
            if all(np.array_equal(matrix(of_table[x]).T, matrix(of_head[y])) for x, y in ("AB", "BA")):
                del self._pairs[head]
        if {table, head} <= self._saved.keys() and np.array_equal(
            matrix(self._saved[table]), matrix(self._saved[head])
        ):
            del self._saved[head]

    def check(self, names: set[str]) -> None:
        """Refuses an adapter that changes tensors which the base model does not have.

        Args:
          names: names of the base model's tensors.

        Raises:
          UserError: with the first such tensor.
        """
        if unknown := sorted((self._pairs.keys() | self._saved.keys()) - names):
            raise UserError(f"{self.folder} changes {unknown[0]}, which its base model does not have")

    def replaces(self, name: str) -> bool:
        """Whether the adapter holds the whole tensor `name` (`modules_to_save`)."""
        return name in self._saved

    def changes(self, name: str) -> bool:
        """Whether the adapter adds to the tensor `name` of the base model, or holds it as a whole."""
        return name in self._pairs or self.replaces(name)

    def saved(self, name: str) -> Any:
        """The whole tensor `name` of the adapter, from which parts can be read; KeyError unless `replaces(name)`."""
        return self._handle.get_slice(self._saved[name])

    def merged(self, name: str, tensor: Any) -> Any:
        """A tensor of the base model with the adapter's change added, or itself if the adapter does not change it.

        Args:
          name: name of the tensor.
          tensor: the base model's tensor, from which parts can be read.

        Returns:
          a tensor from which parts can be read. A part of a changed tensor is computed when it is read, in float32.

        Raises:
          UserError: if the shapes of adapter and base do not fit, or the rank is not that of the adapter's config.
        """
        if name not in self._pairs:
            return tensor
        a, b = (np.asarray(self._handle.get_tensor(self._pairs[name][x])).astype(np.float32) for x in "AB")
        shape = list(tensor.get_shape())
        if "lora_embedding" in self._pairs[name]["A"]:  # A embeds tokens, so that it belongs to the transposed table
            a, b = b.T, a.T
        if a.shape[0] != b.shape[1] or [b.shape[0], a.shape[1]] != shape:
            raise UserError(f"{self.folder}: matrices {list(b.shape)}, {list(a.shape)} do not fit {name} {shape}")
        rank, module = a.shape[0], _PAIR.fullmatch(self._pairs[name]["A"].removeprefix(_BEFORE))
        assert module is not None
        if (said := self._number("rank_pattern", "r", module[1])) != rank:
            raise UserError(f"{self.folder}: {CONFIG} gives {name} the rank {said:g}, but its matrices have {rank}")
        alpha = self._number("alpha_pattern", "lora_alpha", module[1])
        return _Merged(tensor, a, b * np.float32(alpha / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)))

    def _number(self, patterns: str, default: str, module: str) -> float:
        """Returns the number of the first pattern that fits the module's name in the adapter, or else the default."""
        for pattern, value in (self.fields.get(patterns) or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return value
        return self.fields.get(default, 8)


class _Merged:
    """W + B A, computed for the part that is read, in float32; B has the factor s in it."""

    def __init__(self, tensor: Any, a: np.ndarray, b: np.ndarray):
        self.tensor, self.a, self.b = tensor, a, b

    def get_shape(self) -> list[int]:
        return list(self.tensor.get_shape())

    def get_dtype(self) -> str:
        return self.tensor.get_dtype()

    def __getitem__(self, index: Any) -> np.ndarray:
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        part = np.asarray(self.tensor[rows, columns]).astype(np.float32)
        return part + self.b[rows] @ self.a[:, columns]
