"""The command `export`: writes the parameters of a stage as a Hugging Face folder that `transformers` can load."""

from mdrl_jax.commands.loaded import load_stage
from mdrl_jax.model import huggingface


def run(workdir: str, stage: str, out: str) -> None:
    """Writes config.json, the weights (safetensors, float32) and the tokenizer to a new folder, and prints a line.

    Args:
      workdir: work folder of a run.
      stage: name of a stage, or "base" for the model that the run started from. Of a stage that is not finished, the
        last checkpoint is exported (`loaded.load_stage`).
      out: the new folder, which does not exist or is empty; its parents are made.

    Raises:
      UserError: if the stage cannot be read (`loaded.load_stage`), or `out` is a file or a folder that is not empty.
      ValueError: as in `loaded.load_stage`.
    """
    loaded = load_stage(workdir, stage)
    huggingface.save(out, loaded.params, loaded.model.config)
    loaded.tokenizer.save_pretrained(out)
    print(f"stage {stage} of {workdir} written to {out}")
