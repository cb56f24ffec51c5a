"""Loads a model for use outside a run, from a Hugging Face folder or from a stage in a work folder."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flax import linen as nn
from jax.sharding import Mesh

from mdrl_jax import config as config_module
from mdrl_jax.checkpoints import abstract, load_params
from mdrl_jax.config import Config
from mdrl_jax.domains.registry import DOMAINS
from mdrl_jax.errors import UserError
from mdrl_jax.model import adapters, huggingface, tokens
from mdrl_jax.model.families import ModelConfig
from mdrl_jax.model.transformer import Decoder, param_shapes
from mdrl_jax.parallel.sharding import MeshConfig, make_mesh, param_shardings
from mdrl_jax.runtime import model_folder
from mdrl_jax.stage import resolve_stages
from mdrl_jax.workfolder import WorkFolder


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model that is ready to use.

    Attributes:
      model: the decoder.
      params: its parameters, on the devices of `mesh`.
      tokenizer: its tokenizer; None if its folder has none.
      mesh: all devices, on the axis `data`.
      folder: the Hugging Face folder that config.json and the tokenizer come from.
    """

    model: Decoder
    params: Any
    tokenizer: Any
    mesh: Mesh
    folder: Path

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end a completion, as `tokens.eos_ids` returns them.

        Returns:
          the ids; the last one ends a turn of a chat, if the tokenizer has a chat template.

        Raises:
          UserError: if there are none, or as in `tokens.eos_ids`.
        """
        return tokens.eos_ids(self.tokenizer, self.folder, self.model.config.vocab_size)


def check_base(model: str | None, base: str | None) -> None:
    """Refuses a base model beside a model that is no adapter.

    Raises:
      UserError: if `base` is given and `model` is not the folder of a LoRA adapter.
    """
    if base is None:
        return
    if model is None:
        raise UserError(f"--base={base} is for a --model that is a LoRA adapter; leave --base out")
    if not adapters.is_adapter(model_folder(model)):
        raise UserError(f"--base={base} is for LoRA adapters, and --model={model} is none; leave --base out")


def path_and_adapter(model: str, base: str | None) -> tuple[str, str]:
    """The fields `path` and `adapter` of a config's section `model` for a model that may be a LoRA adapter.

    Args:
      model: folder of the model or of the adapter, or as in `runtime.model_folder`.
      base: folder of an adapter's base model; None: the folder that the adapter itself names.

    Raises:
      UserError: if the model is no folder, or an adapter has no base model (`huggingface.model_of`).
    """
    folder = model_folder(model)
    whole = huggingface.model_of(folder, None if base is None else model_folder(base))
    return (model, "") if whole == folder else (str(whole), model)


def load_folder(path: str, base: str | None = None) -> Loaded:
    """Loads a model from a Hugging Face folder.

    Args:
      path: the folder; "tiny" is the base model of the package. It may be a LoRA adapter in the layout of PEFT, which
        is merged into its base model.
      base: folder of an adapter's base model; None: the folder that the adapter itself names.

    Returns:
      The model with the parameters of the folder, in float32. Each device holds all of them.

    Raises:
      UserError: if the folder or its weights are missing or damaged, its tokenizer is damaged, its model is not
        supported, or an adapter has no base model (`adapters.base_of`).
    """
    folder, whole = model_folder(path), None if base is None else model_folder(base)
    sizes = huggingface.read_config(folder, whole)
    load = lambda model, mesh: huggingface.load(folder, model, mesh, whole)  # noqa: E731
    return _loaded(sizes, load, huggingface.model_of(folder, whole))


def _loaded(sizes: ModelConfig, load: Callable[[Decoder, Mesh], Any], folder: Path) -> Loaded:
    tokenizer = tokens.load_tokenizer(folder) if tokens.has_tokenizer(folder) else None
    model, mesh = Decoder(sizes), make_mesh(MeshConfig())
    return Loaded(model, load(model, mesh), tokenizer, mesh, folder)


def load_stage(workdir: str, name: str) -> Loaded:
    """Loads the parameters of the last checkpoint of a stage of a run: those at its end if the stage is finished.

    Args:
      workdir: work folder of the run.
      name: name of the stage; "base" is the model folder of the run (`model.path`). Its weights are read even if the
        run started from random ones (`model.weights`).

    Returns:
      The model with these parameters, in float32. Each device holds all of them. The tokenizer is that of `model.path`.

    Raises:
      UserError: if the folder holds no run, or one whose config this version cannot read; if the run has no such stage,
        or no checkpoint of it, as of a stage that only makes records; if its last checkpoint is damaged; or if the
        model folder of the run cannot be read.
      ValueError: if the checkpoint has other shapes than the model folder's config.json, which was changed since.
    """
    work = WorkFolder(Path(workdir))
    config: Config = config_module.parse(work.recorded())
    if name == "base":
        return load_folder(
            config.model.adapter or config.model.path, config.model.path if config.model.adapter else None
        )
    stages = {stage.name: stage for stage in resolve_stages(config, tuple(DOMAINS))}
    if name not in stages:
        raise UserError(f"{workdir} has no stage {name!r}; it has base, {', '.join(stages)}")
    folder = huggingface.model_of(model_folder(config.model.path))

    def load(model: Decoder, mesh: Mesh) -> Any:
        boxed = param_shapes(model)
        return load_params(work.checkpoints(stages[name]), abstract(nn.unbox(boxed), param_shardings(mesh, boxed)))

    return _loaded(huggingface.read_config(folder), load, folder)
