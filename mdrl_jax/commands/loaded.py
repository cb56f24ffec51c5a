"""A model ready to use outside a run: from a Hugging Face folder, or from a stage of a work folder."""

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
    """Model, parameters on their mesh, tokenizer, and the folder config and tokenizer came from."""

    model: Decoder
    params: Any
    tokenizer: Any
    mesh: Mesh
    folder: Path


def load_folder(path: str) -> Loaded:
    """A Hugging Face folder (or "tiny").

    Raises:
      UserError: if it is absent, damaged or not supported.
    """
    folder = model_folder(path)
    model = Decoder(huggingface.read_config(folder))
    mesh = make_mesh(MeshConfig())
    return Loaded(model, huggingface.load(folder, model, mesh), tokens.load_tokenizer(folder), mesh, folder)


def load_stage(workdir: str, name: str) -> Loaded:
    """The parameters after a stage of a run; "base" is the model it started from.

    Raises:
      UserError: if the folder holds no run, or the stage is not in it or not finished.
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
