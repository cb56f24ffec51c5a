"""What the benchmarks `step`, `decode` and `train` compute, and the model for it on both sides."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mdrl_jax.errors import UserError
from mdrl_jax.model import huggingface
from mdrl_jax.model.transformer import Decoder
from mdrl_jax.parallel.sharding import MeshConfig, make_mesh


@dataclasses.dataclass(frozen=True)
class Work:
    """A batch of completions.

    Attributes:
      model: Hugging Face folder of the model.
      prompts: number of prompts.
      group: completions of each prompt.
      length: tokens of each completion.
      prompt: tokens of each prompt.
    """

    model: Path
    prompts: int = 4
    group: int = 16
    length: int = 64
    prompt: int = 32

    @property
    def rows(self) -> int:
        """Number of completions."""
        return self.prompts * self.group

    def ids(self, rows: int, length: int, vocab: int) -> np.ndarray:
        """Draws token ids uniformly, with a fixed seed: equal arguments give equal ids.

        Args:
          rows: number of rows.
          length: tokens of each row.
          vocab: size of the vocabulary.

        Returns:
          the ids, int32 [rows, length], from 0 to vocab - 1.
        """
        return np.random.default_rng(0).integers(0, vocab, (rows, length), np.int32)

    def __str__(self) -> str:
        return f"{self.prompts} x {self.group} completions of {self.length} tokens, prompts of {self.prompt}"


def loaded(folder: Path) -> tuple[Decoder, Any]:
    """Reads a model from its folder.

    Args:
      folder: the folder, in Hugging Face layout.

    Returns:
      the decoder, and its float32 parameters on the first JAX device.

    Raises:
      UserError: if the folder is not that of a model, or its weights do not fit.
    """
    model = Decoder(huggingface.read_config(folder))
    return model, huggingface.load(folder, model, make_mesh(MeshConfig(), jax.devices()[:1]))


def torch_model(folder: Path) -> Any:
    """The model of a folder as a `transformers` model on the CPU, in float32, with attention by SDPA.

    Raises:
      UserError: if `transformers` cannot import the model's class, for example beside a torchvision that does not match
        torch.
    """
    auto, torch = importlib.import_module("transformers"), importlib.import_module("torch")
    importlib.import_module("transformers.utils.logging").disable_progress_bar()
    try:
        model = auto.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    except ImportError as e:
        raise UserError(
            f"transformers cannot import the model of {folder}: {e}; packages beside torch, such as torchvision, must "
            "match its version and build, or be uninstalled"
        ) from e
    return model.eval()
