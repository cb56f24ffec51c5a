"""`export`: a stage of a run as a Hugging Face folder that torch `transformers` loads."""

from mdrl_jax.commands.loaded import load_stage
from mdrl_jax.model import huggingface


def run(workdir: str, stage: str, out: str) -> None:
    """Writes config.json, safetensors in float32 and the tokenizer to the new folder `out`."""
    loaded = load_stage(workdir, stage)
    huggingface.save(out, loaded.params, loaded.model.config)
    loaded.tokenizer.save_pretrained(out)
    print(f"stage {stage} of {workdir} written to {out}")
