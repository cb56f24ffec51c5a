"""The command `rollback`: restores a domain without training, on any Hugging Face folders (definitions §9).

    result = model − strength · m ⊙ (after − before)

m is the set of coordinates that the rule scores highest: those where the edit, after − before, most harms the domain
that was at its peak at `keep`. The rules "displacement" and "magnitude" need nothing else. "opposition" needs the model
that `keep` was trained from (`base`). "adding" and "removing" need a config and a domain, because they take gradients
on its training prompts.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from mdrl_jax import runtime
from mdrl_jax.analysis import probe, samples
from mdrl_jax.commands.loaded import load_folder
from mdrl_jax.config import Config
from mdrl_jax.errors import UserError
from mdrl_jax.model import huggingface
from mdrl_jax.parallel.programs import program
from mdrl_jax.parallel.tree_programs import difference
from mdrl_jax.records import regular
from mdrl_jax.recovery.rollback import evidence
from mdrl_jax.recovery.rollback.evidence import NEEDS_DATA, Ends
from mdrl_jax.recovery.rollback.rules import SCORES, taken_back
from mdrl_jax.recovery.rollback.selection import largest, size, support
from mdrl_jax.report.screen.console import Screen
from mdrl_jax.runtime import model_folder

DEFAULT_RULE = "displacement"


def run(
    model: str,
    before: str,
    after: str,
    keep: str,
    out: str,
    fraction: float = 0.001,
    strength: float = 1.0,
    rule: str = DEFAULT_RULE,
    base: str | None = None,
    config: Config | None = None,
    domain: str | None = None,
    output: str = "screen",
) -> None:
    """Writes model − strength · m ⊙ (after − before) to a new folder, in the number format of `model`.

    The folder also gets the tokenizer, `config.json` and `generation_config.json` of `model`. If the weights of `model`
    have several number formats, the result is float32. Every folder but `base` may be a LoRA adapter in the layout of
    PEFT, which is merged into `base`, or else into the model that it names itself.

    Args:
      model: Hugging Face folder of the model to change.
      before: folder of the model before the edit.
      after: folder of the model after the edit.
      keep: folder of the model at the peak of the domain to restore.
      out: the new folder.
      fraction: share of all coordinates of the model that m has, rounded to at least one, above 0 and at most 1. They
        are those with the highest positive scores among the coordinates that the edit changed, or all of these if there
        are fewer. 1 is the whole edit, whatever the rule, and nothing is scored.
      strength: factor on the subtracted edit, above 0; 1 undoes it on m.
      rule: name of the rule that scores coordinates (`recovery.rollback.rules.SCORES`). Its arguments below have to be
        given with any fraction.
      base: folder of the model that `keep` was trained from, for "opposition".
      config: the parsed configuration of the domain and its prompts, for "adding" and "removing". Its model is replaced
        by `model`.
      domain: the domain to restore, for "adding" and "removing".
      output: form of the standard output (`report/screen/console.py`).

    Raises:
      UserError: if `out` is a file or not empty; if a model is missing, damaged or not supported, or the folders hold
        different models; if a number is out of range; if the rule is not known, or needs an argument that is not given;
        if `before` and `after` are equal, or no changed coordinate has a positive score; if `config` and `domain` are
        given and the domain is not in its `scored_domains`; or, for "adding" and "removing", if a scored domain does
        not exist, if `analyze.split` is not "train", if the configuration does not fit model or data, if the sandbox
        for rewards does not work (`runtime.make_pool`), if sampling fails (`samples.draw`), or if the gradient is not
        measurable.
      KeyError: if `output` is no form of output.
      RuntimeError: for "adding" and "removing", if the reward workers do not start.
      ValueError: if a rule that was added to `SCORES` needs the edit that led to `keep`, and `base` is not given.
    """
    _check(out, fraction, strength, rule, base, config, domain)
    places = {"model": model, "before": before, "after": after, "keep": keep} | ({"base": base} if base else {})
    whole = None if base is None else model_folder(base)  # of folders that are LoRA adapters
    architecture = huggingface.read_config(model_folder(model), whole)
    for name, place in places.items():
        if huggingface.read_config(model_folder(place), whole) != architecture:
            raise UserError(
                f"the model in {place} (--{name}) has a different config.json than that in {model} (--model); all "
                "models must have the same sizes"
            )
    started = time.monotonic()
    with Screen(None, output) as screen:
        with screen.steps("rollback", len(places) + 2) as show:
            show(0, "reading --model")
            loaded = load_folder(model, base)
            trees: dict[str, Any] = {"model": loaded.params}
            for name in list(places)[1:]:
                show(len(trees), f"reading --{name}")
                trees[name] = huggingface.load(model_folder(places[name]), loaded.model, loaded.mesh, whole)
            ends = Ends(
                now=trees["model"],
                peak=trees["keep"],
                edit=difference(trees["after"], trees["before"]),
                own_edit=difference(trees["keep"], trees["base"]) if base else None,
            )
            show(len(places), f"scores of {rule}")
            n = sum(x.size for x in jax.tree.leaves(ends.edit))
            mask = changed = support(ends.edit)
            if fraction < 1:
                scores = _scores(rule, ends, str(loaded.folder), config, domain, screen.warn)
                mask = largest(scores, max(1, round(fraction * n)), changed)
            if not size(mask):
                raise UserError(
                    f"rule {rule} finds nothing to take back: no coordinate that --after changed has a score above 0; "
                    "try another --rule"
                )
            made = taken_back(ends.now, ends.edit, mask, np.float32(strength))
            show(len(places) + 1, f"writing {out}")
            huggingface.save(out, made, architecture, _dtype(loaded.folder), loaded.folder)
        removed, whole = (float(jnp.sqrt(_square(ends.edit, m))) for m in (mask, changed))
        screen.print(
            f"{size(mask)} of {n} coordinates (rule: {'all' if fraction == 1 else rule}) at strength {strength:g}, "
            f"with {removed / whole:.1%} of the edit's norm; written to {out}",
            final=True,
        )
        screen.event("done", seconds=time.monotonic() - started, out=out)


def _check(
    out: str, fraction: float, strength: float, rule: str, base: str | None, config: Config | None, domain: str | None
) -> None:
    if not 0 < fraction <= 1:
        raise UserError(f"--fraction={fraction} is not valid; it must be above 0 and at most 1")
    if not float(np.finfo(np.float32).tiny) <= strength <= float(np.finfo(np.float32).max):
        raise UserError(
            f"--strength={strength} is not valid; it must be from 1.2e-38 to 3.4e+38; 1 undoes the edit completely"
        )
    if rule not in SCORES:
        raise UserError(f"--rule={rule} is not known; known: {', '.join(SCORES)}")
    if rule == "opposition" and not base:
        raise UserError("--rule=opposition needs --base, the folder of the model that --keep was trained from")
    if rule in NEEDS_DATA and (config is None or domain is None):
        raise UserError(f"--rule={rule} needs --config and --domain: it takes gradients on the domain's prompts")
    if rule in NEEDS_DATA and config is not None and config.analyze.split != "train":
        raise UserError(
            f"analyze.split={config.analyze.split!r} must be 'train' with --rule={rule}, which makes the model from "
            "these prompts; the other splits are for choosing and scoring it"
        )
    if config is not None and domain is not None and domain not in config.scored_domains:
        raise UserError(f"--domain={domain} is not in the config's scored_domains: {', '.join(config.scored_domains)}")
    huggingface.check_new(Path(out), f".{Path(out).resolve().name}.partial")


def _scores(
    rule: str, ends: Ends, model: str, config: Config | None, domain: str | None, warn: Callable[[str], None]
) -> Any:
    """Scores the coordinates by a rule; a rule that needs gradients samples completions at `keep` or at `model` first.

    Args:
      rule: name of the rule.
      ends: the models' parameters and edits.
      model: folder of the model, for its tokenizer.
      config: configuration of the domain and its prompts; None if the rule needs none.
      domain: the domain to restore; None if the rule needs none.
      warn: shows a warning.

    Returns:
      A tree of scores, shaped and placed as the edit.

    Raises:
      UserError: if the rule's gradient is not measurable.
    """
    if rule not in NEEDS_DATA or config is None or domain is None:
        return evidence.scores(None, rule, ends, _no_sample)[0]
    section = dataclasses.replace(config.model, path=model, adapter="", weights="load")
    config = dataclasses.replace(config, model=section)
    at = {evidence.PEAK: ends.peak, evidence.NOW: ends.now}
    with runtime.make_pool(config.rewards) as pool:
        built = runtime.build(config, pool)
        placed = {k: jax.tree.map(jax.device_put, x, built.shardings) for k, x in at.items()}
        with jax.set_mesh(built.mesh):
            draw = lambda point: samples.draw(built, placed[point], domain)  # noqa: E731
            whole = Ends(placed[evidence.NOW], placed[evidence.PEAK], jax.device_put(ends.edit, built.shardings))
            try:
                scores, record = evidence.scores(probe.build(built, config.train.grpo), rule, whole, draw)
            except ValueError as e:
                raise UserError(f"--rule={rule}: {e}") from e
    if "reason" in record:
        warn(f"{rule}: {record['reason']}")
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), scores, ends.edit)


def _no_sample(point: str) -> samples.Sample:
    raise AssertionError(point)


def _dtype(folder: Path) -> Any:
    """The number format of a folder's weights; float32 if there are several, because it can hold all their values."""
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(str(regular(file)), framework="numpy") as handle:
            found |= {handle.get_slice(name).get_dtype() for name in handle.keys()}  # noqa: SIM118
    names = {"BF16": jnp.bfloat16, "F16": np.float16}
    return names.get(found.pop(), np.float32) if len(found) == 1 else np.float32


_square = program(
    "rollback_square",
    lambda edit, mask: sum(
        jnp.sum(jnp.where(m, jnp.square(d), 0)) for d, m in zip(*map(jax.tree.leaves, (edit, mask)), strict=True)
    ),
)
