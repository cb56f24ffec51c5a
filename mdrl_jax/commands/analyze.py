"""`analyze`: the interference analysis of anybody's checkpoints, Hugging Face folders in the order of training."""

import dataclasses
import time
from pathlib import Path

import jax

from mdrl_jax import runtime
from mdrl_jax.analysis import interference
from mdrl_jax.analysis.sequence import BASE, Checkpoints, Trained
from mdrl_jax.config import Config
from mdrl_jax.errors import UserError
from mdrl_jax.model import huggingface
from mdrl_jax.report.screen import analysis, terminal
from mdrl_jax.report.screen.console import Screen
from mdrl_jax.workfolder import WorkFolder

SOLO = "solo-"


def run(base: str, stages: list[str], config: Config, workdir: str, output: str = "screen") -> None:
    """Writes `workdir`/analysis and claims.json, and shows the findings.

    `stages` are "domain:FOLDER" in the order of training; "solo-domain:FOLDER" was trained from the base alone.
    `output` as in `report/screen/console.py`.

    Raises:
      UserError: for a stage that is not of that form, or a folder whose model is not the base's.
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
            raise UserError(f"--stage={stage} is not understood; it is DOMAIN:FOLDER, DOMAIN one of {known}")
        if name in folders:
            raise UserError(f"--stage names {name} twice")
        folders[name] = Path(place)
        start = BASE if name != domain or not trained else trained[-1].name
        (solos if name != domain else trained).append(Trained(name, domain, start))
    architecture = huggingface.read_config(folders[BASE])
    for name, folder in folders.items():
        if huggingface.read_config(folder) != architecture:
            raise UserError(f"the model in {folder} ({name}) has another config.json than the base in {folders[BASE]}")
    section = dataclasses.replace(config.model, path=base, weights="load")
    config = dataclasses.replace(config, model=section)
    with runtime.make_pool(config.rewards) as pool:
        built = runtime.build(config, pool)
        checkpoints = Checkpoints(
            tuple(trained), tuple(solos), lambda name: huggingface.load(folders[name], built.model, built.mesh)
        )
        interference.check(built, checkpoints)
        folder = WorkFolder(Path(workdir))
        folder.open(config)
        with Screen(folder.root / "log.txt", output) as screen, jax.set_mesh(built.mesh):
            sources = {name: str(place) for name, place in folders.items()}
            found = interference.run(built, checkpoints, folder.root, config.train.grpo, screen.steps, sources)
            screen.print(analysis.summary(found), final=True)
            screen.event("claims", claims=found["claims"])
            seconds = time.monotonic() - started
            screen.print(terminal.places(folder.root, seconds), final=True)
            screen.event("done", seconds=seconds, workdir=str(folder.root))
