"""The command `export`: writes the parameters of a stage as a Hugging Face folder that `transformers` can load."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mdrl_jax
from mdrl_jax import config as config_module
from mdrl_jax import records
from mdrl_jax.commands.loaded import load_stage
from mdrl_jax.domains.registry import DOMAINS
from mdrl_jax.model import huggingface
from mdrl_jax.stage import resolve_stages
from mdrl_jax.workfolder import WorkFolder


def run(workdir: str, stage: str, out: str) -> None:
    """Writes a stage of a run to a new folder, and prints a line.

    The folder has the weights (safetensors, float32) and a model card. Everything else is that of the folder that the
    run started from: tokenizer, chat template, `config.json` and `generation_config.json`, which names all tokens that
    ended completions in the run.

    Args:
      workdir: work folder of a run.
      stage: name of a stage, or "base" for the model that the run started from. Of a stage that is not finished, the
        last checkpoint is exported (`loaded.load_stage`).
      out: the new folder, which does not exist or is empty, as a mount point is; its parents are made.

    Raises:
      UserError: if the stage cannot be read (`loaded.load_stage`), or `out` is a file or a folder that is not empty.
      ValueError: as in `loaded.load_stage`.
      OSError: if the disk does not take the files.
    """
    huggingface.check_new(Path(out), f".{Path(out).resolve().name}.partial")
    loaded = load_stage(workdir, stage)
    command = f"mdrl export --workdir={shlex.quote(workdir)} --stage={stage} --out={shlex.quote(out)}"
    made = card(WorkFolder(Path(workdir)), stage, command)
    huggingface.save(out, loaded.params, loaded.model.config, source=loaded.folder, card=made, eos_ids=loaded.eos_ids)
    print(f"stage {stage} of {workdir} written to {out}")


def card(work: WorkFolder, stage: str, command: str) -> str:
    """The model card of a stage: what was trained, from what, its scores and the command that wrote it.

    Args:
      work: work folder of the run.
      stage: name of a stage of the run, or "base".
      command: the command that wrote the model.

    Returns:
      README.md in the form of the Hugging Face hub: metadata as YAML, then Markdown.

    Raises:
      UserError: if a record of the work folder is missing or damaged.
    """
    config = config_module.parse(work.recorded())
    resolved = {s.name: s for s in resolve_stages(config, tuple(DOMAINS))}
    steps, at = [], stage
    while at in resolved:
        made = resolved[at]
        steps.append(f"{made.name} ({made.kind} on {', '.join(made.domains)})")
        at = made.start
    base = f"`{config.model.path}`"
    if config.model.weights == "random":
        base = f"random weights in the sizes of {base}"
    elif config.model.adapter:
        base += f" with the LoRA adapter `{config.model.adapter}`"
    trained = " → ".join([base, *steps[::-1]])
    rows = [row for row in records.read_jsonl(work.root / "scores.jsonl") if row["stage"] in ("base", stage)]
    sources = {
        name: source.preset or ", ".join(source.files)
        for name, source in config.domains.sources.items()
        if name in config.scored_domains
    }
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- mdrl-jax", "---", ""]
    lines += [f"# Stage {stage} of {work.root.resolve().name}", ""]
    lines += [f"Trained by `mdrl_jax` {mdrl_jax.__version__}:", "", trained, ""]
    data = [f"{name}: {sources.get(name, 'procedural problems of the package')}" for name in config.scored_domains]
    lines += ["Data of the domains:", "", *(f"- {line}" for line in data), ""]
    return "\n".join([*lines, *_table(rows), "Written by", "", "```", command, "```", ""])


def _cell(row: Mapping[str, Any]) -> str:
    """The score in points, with its standard error, which a single prompt does not have."""
    error = "" if row["stderr"] is None else f" ± {row['stderr']:.1f}"
    return f"{row['score']:.1f}{error}"


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return ["The run has no scores of this stage.", ""]
    stages, domains = (list(dict.fromkeys(row[key] for row in rows)) for key in ("stage", "domain"))
    cells = {(row["stage"], row["domain"]): _cell(row) for row in rows}
    n = ", ".join(f"{row['n_prompts']} of {row['domain']}" for row in rows if row["stage"] == stages[0])
    samples = rows[0]["k"]
    return [
        f"Scores (100 × mean reward ± standard error) on held-out prompts ({n}), {samples} samples of each:",
        "",
        "| | " + " | ".join(domains) + " |",
        "|---" * (len(domains) + 1) + "|",
        *(f"| {s} | " + " | ".join(cells.get((s, d), "–") for d in domains) + " |" for s in stages),
        "",
    ]
