"""The command `evaluate`: scores the model in any Hugging Face folder on the domains of a config."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax

from mdrl_jax import records, runtime
from mdrl_jax.commands.loaded import check_base, path_and_adapter
from mdrl_jax.config import Config
from mdrl_jax.domains.chat import chat_text
from mdrl_jax.domains.datasets import SPLITS
from mdrl_jax.domains.prompts import notes, tokenize
from mdrl_jax.domains.registry import make_domains
from mdrl_jax.errors import UserError
from mdrl_jax.evaluate import evaluate, fingerprints, text_rows
from mdrl_jax.model import huggingface, tokens
from mdrl_jax.progress import printable
from mdrl_jax.report.screen import terminal
from mdrl_jax.report.screen.console import Screen
from mdrl_jax.report.tables import answers, harness, matrix
from mdrl_jax.report.tables.scores import score_rows
from mdrl_jax.rewards import base as rewards

EVALUATION, SCORES, COMPLETIONS = "evaluation.json", "scores.jsonl", "completions.jsonl.gz"  # in the folder --out


def run(
    model: str,
    config: Config,
    output: str = "screen",
    out: str = "",
    before: str = "",
    base: str | None = None,
    tasks: str | None = None,
) -> None:
    """Scores a model and prints tables of the scores and of pass@k, in points, with standard errors over prompts.

    Every scored domain is scored on all prompts of `evaluate.split`, with `evaluate.samples` completions of each. The
    notes about data and attention are printed before.

    Args:
      model: Hugging Face folder of the model, or "tiny" (`runtime.model_folder`).
      config: the parsed configuration with the domains and the section `evaluate`. Its model is replaced by `model`.
      output: form of the standard output: "screen", "quiet" or "json" (`report/screen/console.py`).
      out: folder to which the rewards of all prompts, the scores and all completions are written; "": none.
      before: a folder that an earlier call wrote as `out`; a further table then shows which answers to the same prompts
        were lost and gained since (definitions §2). "": none.
      base: folder of the base model if `model` is a LoRA adapter; None: the folder that the adapter itself names.
      tasks: results of lm-evaluation-harness on the same model, a file or a folder (`tables.harness.read`), which are
        shown beside the scores; None: none.

    Raises:
      UserError: if `out` is a file or a folder that is not empty; if `before` holds no evaluation, or one with other
        prompts, samples or sampling keys; if `tasks` cannot be read (`tables.harness.read`); or if `base` is given, but
        `model` is no adapter.
      UserError: if the model or its tokenizer is missing, damaged or not supported; if a domain does not exist, or its
        data cannot be read or are too few; if the mesh does not match the devices, or does not divide the batch or a
        parameter; if prompt and completion together may be longer than the model allows; if `rollout.cache_gib` is too
        small (`runtime.build`); if the sandbox for rewards does not work (`runtime.make_pool`); if too many rewards
        fail; or if the model's logits are not finite (`evaluate.evaluate`).
      KeyError: if `output` is no form of output.
      RuntimeError: if the reward workers do not start.
      HostLost: if another process does not come within the time-out.
      Stopped: after SIGTERM or Ctrl-C; no score is printed.
    """
    if out and (Path(out).is_file() or (Path(out).is_dir() and any(Path(out).iterdir()))):
        raise UserError(f"--out={out} exists and is not an empty folder; name a new one")
    if before and not (Path(before) / EVALUATION).is_file():
        raise UserError(
            f"--before={before} has no {EVALUATION}; it takes a folder that `evaluate --out` wrote for the other model"
        )
    started = time.monotonic()
    earlier = records.read_json(Path(before) / EVALUATION) if before else None
    beside = harness.read(tasks) if tasks else []
    check_base(model, base)
    path, adapter = path_and_adapter(model, base)
    section = dataclasses.replace(config.model, path=path, adapter=adapter, weights="load")
    config = dataclasses.replace(config, model=section)
    with runtime.make_pool(config.rewards) as pool, Screen(None, output) as screen:
        built = runtime.build(config, pool)
        for note in built.notes:
            screen.print(note)
        head = {"stage": model, "index": 1, "seed": config.seed, "k": config.evaluate.samples, "step": 0}
        head |= {"sampling": dataclasses.asdict(config.evaluate.sampling), "prompts": fingerprints(built)}
        if earlier is not None:
            _check_same(earlier, head, before)
        if out:
            Path(out).mkdir(parents=True, exist_ok=True)  # before the scoring, so that nothing is lost if it fails
        with jax.set_mesh(built.mesh):
            result = evaluate(built, built.base_params(), "scores", screen.steps)
        record = head | result.record()
        scores = matrix.build([record])
        tables = [terminal.score_table(scores, beside, trained=False), terminal.pass_table(scores, trained=False)]
        if earlier is not None:
            both = matrix.build(
                [earlier | {"stage": "before", "index": 0}, record | {"stage": "now", "start": "before"}]
            )
            tables.append(terminal.answer_table(answers.all_changes(both)))
        for table in tables:
            if table is not None:
                screen.print(table, final=True)
        for task in beside:
            screen.print(f"{task['domain']}: {task['metric']} of {task['n_prompts']} prompts, by lm-evaluation-harness")
        screen.event("scores", rows=[*score_rows(record), *({"stage": model, **task} for task in beside)])
        if out:
            records.write_zipped(Path(out) / COMPLETIONS, text_rows(built, result))
            records.write_jsonl(Path(out) / SCORES, score_rows(record))
            records.write_json(Path(out) / EVALUATION, record)
            screen.print(f"rewards, scores and all completions: {out}", final=True)
        screen.event("done", seconds=time.monotonic() - started, model=model)


def _check_same(earlier: Any, now: dict[str, Any], folder: str) -> None:
    """Refuses an earlier evaluation whose answers cannot be paired with those of this one."""
    for field in ("seed", "k", "sampling", "prompts"):
        known = earlier.get(field) if isinstance(earlier, dict) else None
        if known != now[field]:
            different = f"{field}={known!r}, now {now[field]!r}" if field != "prompts" else "other prompts"
            raise UserError(
                f"--before={folder} has an evaluation with {different}; transitions need the same prompts and sampling "
                "keys: score both models with one config"
            )


def dry_run(model: str, config: Config, output: str = "screen", base: str | None = None) -> None:
    """Looks up every data set of a config, and prints its counts, its bad rows and one prompt; nothing is scored.

    Each domain is looked up, also if an earlier one fails, so that one call names everything that is wrong.

    Args:
      model: Hugging Face folder whose tokenizer and chat template render the prompt; of a LoRA adapter, those of its
        base model. Without a tokenizer there, the prompts are shown as they are, and their lengths are not checked.
      config: the parsed configuration.
      output: form of the standard output, as in `run`.
      base: folder of the base model if `model` is a LoRA adapter; None: the folder that the adapter itself names.

    Raises:
      UserError: if the model is no folder, its `config.json` or tokenizer is damaged or not supported, or it is an
        adapter without a base; if `base` is given and `model` is no adapter; if a domain, its data, its prompts or its
        reward are not valid: the message gives a reason for each domain.
      KeyError: if `output` is no form of output.
      OSError: if a file of JSON lines or csv cannot be read to its end.
    """
    check_base(model, base)
    folder = runtime.model_folder(path_and_adapter(model, base)[0])
    tokenizer = tokens.load_tokenizer(folder) if tokens.has_tokenizer(folder) else None
    vocab_size = huggingface.read_config(folder).vocab_size if (folder / "config.json").exists() else None
    limit = config.rollout.prompt_buckets[-1]
    wrong = []
    with Screen(None, output) as screen:
        if tokenizer is None:
            screen.print(
                f"{folder} has no tokenizer: prompts are shown without a chat template, and their lengths are not "
                "checked",
                final=True,
            )
        for name in dict.fromkeys(config.scored_domains):
            try:
                domain = make_domains((name,), config.domains)[name]
                rewards.resolve(domain.reward)
                sets = {}
                if tokenizer is not None:
                    sets = {split: tokenize(domain, split, tokenizer, limit, vocab_size) for split in SPLITS}
                lines = notes(domain, sets)
                if not (lines and sets):
                    counts = ", ".join(f"{split} {len(getattr(domain, split))}" for split in SPLITS)
                    lines = [*lines, f"{name}: {counts}" if domain.data else f"{name}: procedural, {counts}"]
                screen.print("\n".join(lines), final=True)
                if not domain.test:
                    raise UserError(f"domain {name} has no test prompts")
                text, length, check = domain.test[0].prompt, "", domain.test[0].check
                if sets:
                    first, ids, data = sets["test"].problems[0], sets["test"].tokens[0], domain.data
                    text, length, check = first.prompt, f" ({len(ids)} tokens)", first.check
                    text = chat_text(tokenizer, text, data.system, data.thinking) if data else text
                shown = (
                    f"first test prompt{length}: {printable(text)}\nits check: {printable(str(dict(check))[:400])}\n"
                )
                screen.print(shown, final=True)
            except UserError as e:
                wrong.append(str(e))
    if wrong:
        raise UserError("; ".join(wrong))
