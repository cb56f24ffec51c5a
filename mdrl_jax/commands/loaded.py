"""Loads a model for use outside a run, from a Hugging Face folder or from a stage in a work folder."""

import dataclasses
from pathlib import Path
from typing import Any

from flax import linen as nn
from jax.sharding import Mesh

from mdrl_jax import config as config_module
from mdrl_jax.checkpoints import abstract, load_params
from mdrl_jax.config import Config
from mdrl_jax.domains.registry import DOMAINS
from mdrl_jax.errors import UserError
from mdrl_jax.model import huggingface, tokens
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
      tokenizer: its tokenizer.
      mesh: all devices, on the axis `data`.
      folder: the Hugging Face folder that config.json and the tokenizer come from.
    """

    model: Decoder
    params: Any
    tokenizer: Any
    mesh: Mesh
    folder: Path


def load_folder(path: str) -> Loaded:
    """Loads a model from a Hugging Face folder.

    Args:
      path: the folder; "tiny" is the base model of the package.

    Returns:
      The model with the parameters of the folder, in float32. Each device holds all of them.

    Raises:
      UserError: if the folder, its weights or its tokenizer are missing or damaged, or its model is not supported.
    """
    folder = model_folder(path)
    model = Decoder(huggingface.read_config(folder))
    mesh = make_mesh(MeshConfig())
    return Loaded(model, huggingface.load(folder, model, mesh), tokens.load_tokenizer(folder), mesh, folder)


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
        return load_folder(config.model.path)
    stages = {stage.name: stage for stage in resolve_stages(config, tuple(DOMAINS))}
    if name not in stages:
        raise UserError(f"{workdir} has no stage {name!r}; it has base, {', '.join(stages)}")
    folder = model_folder(config.model.path)
    model = Decoder(huggingface.read_config(folder))
    mesh = make_mesh(MeshConfig())
    boxed = param_shapes(model)
    params = load_params(work.checkpoints(stages[name]), abstract(nn.unbox(boxed), param_shardings(mesh, boxed)))
    return Loaded(model, params, tokens.load_tokenizer(folder), mesh, folder)
