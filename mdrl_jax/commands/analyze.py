"""The command `analyze`: the interference analysis, or circuits, of any Hugging Face folders."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path

import jax

from mdrl_jax import records, runtime
from mdrl_jax.analysis import interference
from mdrl_jax.analysis.circuits import study
from mdrl_jax.analysis.sequence import BASE, Checkpoints, Trained
from mdrl_jax.claims.circuits import c8
from mdrl_jax.config import Config
from mdrl_jax.errors import UserError
from mdrl_jax.model import huggingface
from mdrl_jax.report import page
from mdrl_jax.report.screen import analysis, terminal
from mdrl_jax.report.screen.console import Screen
from mdrl_jax.workfolder import WorkFolder

SOLO, SFT = "solo-", "sft-"


def run(base: str, stages: list[str], config: Config, workdir: str, output: str = "screen") -> None:
    """Analyses a sequence of checkpoints, writes `workdir`/analysis, claims.json and the page, and shows the results.

    It also writes `workdir`/config.json and adds to `workdir`/log.txt. An analysis that was interrupted continues with
    the first unit that is not finished (`interference.run`).

    Args:
      base: Hugging Face folder that the first stage was trained from, or "tiny" (`runtime.model_folder`).
      stages: "DOMAIN:FOLDER" of each stage in the order of training, FOLDER being the model at its end, from which the
        next stage was trained; "solo-DOMAIN:FOLDER" is a stage that was trained from `base` directly. No stage may
        occur twice. A folder may be a LoRA adapter in the layout of PEFT, which is merged into `base`.
      config: the parsed configuration with the domains, their data and the settings of the analysis. Its model is
        replaced by `base`; its stages are not used.
      workdir: the work folder; a new one, or one of the same configuration.
      output: form of the standard output: "screen", "quiet" or "json" (`report/screen/console.py`).

    Raises:
      UserError: if a stage has another form, its domain is not in `scored_domains`, or it occurs twice; if a scored
        domain does not exist; if no stage but solo stages is given; if a model or the tokenizer in `base` is missing,
        damaged or not supported, or a config.json differs from that in `base`; if data, prompts or mesh do not suit the
        analysis, or `rollout.cache_gib` is too small (`runtime.build`); if the work folder belongs to another
        configuration, holds another analysis or has other files but no config.json; if the sandbox for rewards does not
        work (`runtime.make_pool`); or if sampling or a Lanczos search fails (`interference.run`).
      KeyError: if `output` is no form of output.
      ValueError: if a second-order term of a conflict subspace is not finite, or the file of a sample is damaged.
      RuntimeError: if the reward workers do not start.
      HostLost: if another process does not come within the time-out.
      Stopped: after SIGTERM or Ctrl-C; finished units are saved.
    """
    started = time.monotonic()
    folders = {BASE: runtime.model_folder(base)}
    trained: list[Trained] = []
    solos: list[Trained] = []
    for stage in stages:
        name, colon, place = stage.partition(":")
        domain = name.removeprefix(SOLO)
        if not colon or not place or domain not in config.scored_domains:
            known = ", ".join(config.scored_domains)
            raise UserError(f"--stage={stage} is not understood; it must be DOMAIN:FOLDER, with DOMAIN one of {known}")
        if name in folders:
            raise UserError(f"--stage names {name} twice; each stage may be given once")
        folders[name] = runtime.model_folder(place)
        start = BASE if name != domain or not trained else trained[-1].name
        (solos if name != domain else trained).append(Trained(name, domain, start))
    config = _with_base(config, base, folders)
    with runtime.make_pool(config.rewards) as pool:
        built = runtime.build(config, pool)
        checkpoints = Checkpoints(
            tuple(trained),
            tuple(solos),
            lambda name: huggingface.load(folders[name], built.model, built.mesh, folders[BASE]),
        )
        interference.check(built, checkpoints)
        folder = WorkFolder(Path(workdir))
        folder.open(config)
        with Screen(folder.root / "log.txt", output) as screen, jax.set_mesh(built.mesh):
            sources = {name: str(place) for name, place in folders.items()}
            found = interference.run(built, checkpoints, folder.root, config.train.grpo, screen.steps, sources)
            screen.print(analysis.summary(found), final=True)
            screen.event("claims", claims=found["claims"])
            page.write(folder.root)
            seconds = time.monotonic() - started
            screen.print(terminal.places(folder.root, seconds), final=True)
            screen.event("done", seconds=seconds, workdir=str(folder.root))


def circuits(base: str, stages: list[str], config: Config, workdir: str, output: str = "screen") -> None:
    """Compares the circuits of a base model and of models trained from it; writes `workdir`/analysis/circuits-D.json.

    It also writes `workdir`/config.json, claims.json with C8 and the page, and adds to `workdir`/log.txt. A comparison
    that was interrupted goes on with the first part that is not finished (`study.run`).

    Args:
      base: Hugging Face folder that all other models were trained from, or "tiny".
      stages: "DOMAIN:FOLDER" of a model that RL trained on the domain, and "sft-DOMAIN:FOLDER" of one that supervised
        training did, all of one domain. A label after @ tells several models of a kind apart, as in "qa@slow:FOLDER".
      config: the parsed configuration with the domain, its data and `circuits`. Its model is replaced by `base`.
      workdir: the work folder; a new one, or one of the same configuration.
      output: form of the standard output, as in `run`.

    Raises:
      UserError: if a stage has another form, names another domain than the first one, or occurs twice; if the sizes of
        the models differ; and as in `study.check` and `study.run`, `runtime.build` and `WorkFolder.open`.
      RuntimeError: if the reward workers do not start.
      HostLost: if another process does not come within the time-out.
      Stopped: after SIGTERM or Ctrl-C; finished parts are saved.
    """
    started = time.monotonic()
    folders, kinds, domain = {BASE: runtime.model_folder(base)}, {}, ""
    for stage in stages:
        name, colon, place = stage.partition(":")
        own = name.partition("@")[0].removeprefix(SFT)
        if not colon or not place or own not in config.scored_domains:
            known = ", ".join(config.scored_domains)
            raise UserError(
                f"--stage={stage} is not understood; with --circuits it must be DOMAIN:FOLDER or sft-DOMAIN:FOLDER, "
                f"with DOMAIN one of {known}"
            )
        if name in folders:
            raise UserError(f"--stage names {name} twice; tell them apart by a label, such as {name}@2")
        if domain and own != domain:
            raise UserError(f"--stage={stage} is of {own}, but the first one of {domain}; circuits compare one domain")
        domain, folders[name] = own, runtime.model_folder(place)
        kinds[name] = study.SFT if name.startswith(SFT) else study.RL
    config = _with_base(config, base, folders)
    with runtime.make_pool(config.rewards) as pool:
        built = runtime.build(config, pool)
        study.check(built, domain)
        folder = WorkFolder(Path(workdir))
        folder.open(config)
        with Screen(folder.root / "log.txt", output) as screen, jax.set_mesh(built.mesh):
            sources = {name: str(place) for name, place in folders.items()}
            load = lambda name: huggingface.load(folders[name], built.model, built.mesh, folders[BASE])  # noqa: E731
            compared = study.Compared(domain, BASE, kinds, load, sources)
            record = study.run(built, compared, folder.root, screen.steps)
            records.write_json(folder.root / "analysis" / f"circuits-{domain}.json", record)
            judged = [c8([record])]
            records.write_json(folder.root / "claims.json", judged)
            screen.print("\n".join(study.summary(record)), final=True)
            screen.print(analysis.verdict_table(judged), final=True)
            screen.event("claims", claims=judged)
            page.write(folder.root)
            seconds = time.monotonic() - started
            screen.print(terminal.places(folder.root, seconds), final=True)
            screen.event("done", seconds=seconds, workdir=str(folder.root))


def _with_base(config: Config, base: str, folders: Mapping[str, Path]) -> Config:
    """The configuration with `base` as its model; UserError if the models differ in their sizes."""
    architecture = huggingface.read_config(folders[BASE])
    for name, folder in folders.items():
        if huggingface.read_config(folder, folders[BASE]) != architecture:
            raise UserError(
                f"the model in {folder} ({name}) has a different config.json than the base in {folders[BASE]}; all "
                "models must have the same sizes"
            )
    section = dataclasses.replace(config.model, path=base, adapter="", weights="load")
    return dataclasses.replace(config, model=section)
