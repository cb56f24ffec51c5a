"""The command `distill`: on-policy distillation from any Hugging Face folders (definitions §10).

The student samples completions of each teacher's domain and is pulled to this teacher token by token, as by a stage
`distill-math` of a run, or `distill-all` with several teachers. It ends by the rule of a refresh, and the step with the
best validation scores is written.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from mdrl_jax import config as config_module
from mdrl_jax import records, runtime
from mdrl_jax.commands.loaded import path_and_adapter
from mdrl_jax.config import Config, TrainSection, stage_config
from mdrl_jax.domains.registry import DOMAINS
from mdrl_jax.errors import UserError
from mdrl_jax.model import huggingface
from mdrl_jax.parallel import preemption
from mdrl_jax.report.screen import terminal
from mdrl_jax.report.screen.console import Screen
from mdrl_jax.stage import Stage, resolve_stages
from mdrl_jax.stages import grpo
from mdrl_jax.stages.train import Trainer, costs
from mdrl_jax.workfolder import WorkFolder

STUDENT = "student"


def run(
    student: str,
    teachers: Sequence[str],
    config: Any,
    out: str,
    workdir: str = "",
    output: str = "screen",
    base: str | None = None,
) -> None:
    """Distils the teachers into the student, and writes the result to a new folder in float32.

    The folder also gets the tokenizer, `config.json` and `generation_config.json` of the student. The record of the
    steps (`recovery/STAGE.json`), the cost, the last checkpoint and TensorBoard events are in the work folder. A
    command that was interrupted trains again from its start when it is called again, and does not score again what it
    has scored.

    Args:
      student: Hugging Face folder of the student, or "tiny" (`runtime.model_folder`). It may be a LoRA adapter, which
        is merged; tokenizer and `config.json` are then those of its base model.
      teachers: "DOMAIN:FOLDER" for each domain to win back, FOLDER being its teacher; at least one, each domain once.
      config: the configuration with the domains, their data and the section `train`, as a config file gives it
        (`config.default`), not parsed. The settings of the stage are those of `train`, changed by the entry of
        `stage_overrides` for `distill-DOMAIN`, or for `distill-all` with several teachers. Its model is replaced by
        `student`, and its stages by this one; the object itself is changed.
      out: the new folder.
      workdir: the work folder, new or of an interrupted call; "": `out` with "-run" at its end.
      output: form of the standard output: "screen", "quiet" or "json" (`report/screen/console.py`).
      base: folder of the base model of a student or teachers that are LoRA adapters; None: the folders that they name
        themselves.

    Raises:
      UserError: if `out` is a file or not empty; if a teacher has another form, or its domain is named twice or not in
        `scored_domains`; if the settings name a teacher, or a stage to start from; if a model or the tokenizer is
        missing, damaged or not supported, or a teacher has another config.json than the student; if the configuration
        is not valid or does not fit model, data and devices; if the work folder belongs to another configuration or has
        other teachers; if the sandbox for rewards does not work; if too many rewards fail; or if the student's
        logits are not finite.
      KeyError: if `output` is no form of output.
      RuntimeError: if the reward workers do not start.
      OSError: if the disk does not take the files.
      Stopped: after SIGTERM or Ctrl-C; the scores so far are saved.
    """
    started = time.monotonic()
    huggingface.check_new(Path(out), f".{Path(out).resolve().name}.partial")
    folders = _folders(teachers)
    name = f"distill-{next(iter(folders))}" if len(folders) == 1 else "distill-all"
    whole = None if base is None else runtime.model_folder(base)
    path, adapter = path_and_adapter(student, base)
    parsed, stages = _stages(config, path, adapter, tuple(folders), name)
    source = runtime.model_folder(path)  # of an adapter, its base model
    architecture = huggingface.read_config(source)
    for domain, place in folders.items():
        if huggingface.read_config(runtime.model_folder(place), whole) != architecture:
            raise UserError(
                f"the model in {place} (--teacher={domain}) has a different config.json than that in {student} "
                "(--student); all models must have the same sizes"
            )
    root = Path(workdir or f"{out.rstrip('/')}-run")
    with runtime.make_pool(parsed.rewards) as pool:
        built = runtime.build(parsed, pool)
        grpo.check_divides(built, stages[-1])
        folder = WorkFolder(root)
        folder.open(parsed)
        folder.open_data(built.data())
        _same_teachers(root / "teachers.json", {d: str(Path(f).resolve()) for d, f in folders.items()})

        def params_after(stage: str) -> Any:
            if stage == STUDENT:
                return built.base_params()
            return huggingface.load(runtime.model_folder(folders[stage]), built.model, built.mesh, whole)

        with preemption.watch(), Screen(root / "log.txt", output) as screen, jax.set_mesh(built.mesh):
            for note in built.notes:
                screen.print(note)
            trainer = Trainer(built, folder, stages, screen, params_after, lambda domain: [])
            params, spent = trainer.train(stages[-1])
            record = records.read_json(root / "recovery" / f"{name}.json")
            records.write_json(folder.costs(stages[-1]), costs(built, stages[-1], record["steps"][-1]["step"], spent))
            huggingface.save(out, params, built.model.config, source=source, eos_ids=built.rollouts.eos_ids)
            screen.print(_summary(record, out), final=True)
            seconds = time.monotonic() - started
            screen.print(terminal.places(root, seconds), final=True)
            screen.event("done", seconds=seconds, out=out, workdir=str(root))


def _folders(teachers: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for teacher in teachers:
        domain, colon, place = teacher.partition(":")
        if not (domain and colon and place):
            raise UserError(f"--teacher={teacher} is not understood; it must be DOMAIN:FOLDER, e.g. math:models/math")
        if domain in found:
            raise UserError(f"--teacher names {domain} twice; each domain has one teacher")
        found[domain] = place
    if not found:
        raise UserError("--teacher is missing; name a domain and the folder of its teacher, such as math:models/math")
    return found


def _stages(
    config: Any, student: str, adapter: str, domains: tuple[str, ...], name: str
) -> tuple[Config, tuple[Stage, ...]]:
    """The configuration of this stage alone, and its stages: one for each teacher, the student, and the distillation.

    A stage of a teacher stands for the training that led to it. It lies on the way to the student, so it is its
    domain's peak.
    """
    overrides = config.stage_overrides.get(name, {})
    config.stages, config.stage_overrides = (*domains, name), {name: overrides}
    config.model.path, config.model.adapter, config.model.weights = student, adapter, "load"
    for domain in domains:
        if domain not in config.scored_domains:
            known = ", ".join(config.scored_domains)
            raise UserError(f"--teacher names {domain}, which is not in the config's scored_domains: {known}")
    parsed = config_module.parse(config)
    own = stage_config(parsed, name)
    for field, value in (("start", own.start), ("distill.teacher", own.distill.teacher)):
        if value:
            raise UserError(f"{field}={value!r} has no meaning here: --student and --teacher name the models")
    *taught, distilled = resolve_stages(parsed, tuple(DOMAINS))
    at = Stage(STUDENT, distilled.index, "merge", (), taught[-1].name, TrainSection())
    distilled = dataclasses.replace(distilled, index=at.index + 1, start=STUDENT, reference=STUDENT)
    return parsed, (*taught, at, distilled)


def _same_teachers(file: Path, folders: dict[str, str]) -> None:
    if not file.exists():
        records.write_json(file, folders)
    elif (before := records.read_json(file)) != folders:
        raise UserError(f"{file} has other teachers ({before}); name another --workdir")


def _summary(record: dict[str, Any], out: str) -> str:
    rows = {row["step"]: row for row in record["steps"]}
    start, kept = rows[0], rows[record["chosen"]]
    scores = ", ".join(
        f"{d} {start['scores'][d]['estimate']:.1f} → {kept['scores'][d]['estimate']:.1f}" for d in kept["scores"]
    )
    return f"validation scores from step 0 to step {record['chosen']}, which is written to {out}: {scores}"
