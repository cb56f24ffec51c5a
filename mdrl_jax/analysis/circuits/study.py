"""Compares the circuits of a base model and of models trained from it: what broke, and did RL keep more than SFT? (§11)

The entry is `run`; the stage `circuits-D` and the command `analyze --circuits` call it after `check`. The work is cut
into parts, which are written to `analysis/parts/` and read again by a run that was stopped:

| part | content |
|---|---|
| `circuits-D-pairs` | which counterfactual pairs the base model answers |
| `circuits-D-search-MODEL` | masks and circuits of every block and λ, faithfulness, attribution, scores |
| `circuits-D-kl` | KL(π₀ ‖ π) of every model on the domain's prompts |
| `circuits-D-effects-MODEL` | what random circuits, the rest of the model, base's circuit and each head do |
| `circuits-D-edits-MODEL` | with `circuits.vulnerability`: the damage of each head's edit to the other scored domains |

The callers write the record to `analysis/circuits-D.json`. It has the figures (`figures.py`) and the comparisons that
`claims/circuits.py` judges.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mdrl_jax import records
from mdrl_jax.analysis import samples
from mdrl_jax.analysis.circuits import figures, masks, pairs, vulnerability
from mdrl_jax.analysis.circuits.masks import MaskedPasses, PairRows, Search
from mdrl_jax.analysis.circuits.pairs import FEWEST_BLOCKS, Pairs
from mdrl_jax.analysis.probe import build as build_probe
from mdrl_jax.config import CircuitsSection
from mdrl_jax.errors import UserError
from mdrl_jax.evaluate import validation_groups, validation_rewards
from mdrl_jax.parallel import distributed
from mdrl_jax.parallel.sharding import put
from mdrl_jax.runtime import Runtime
from mdrl_jax.stats.estimate import Record, clustered, figure_text, paired_difference, score
from mdrl_jax.stats.tests import rank_agreement

RL, SFT = "RL", "SFT"
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Compared:
    """The models that are compared.

    Attributes:
      domain: the domain that all of them but base were trained on.
      base: the name of the model that they were trained from.
      trained: name of each other model -> `RL` or `SFT`.
      params: (name of a model) -> its parameters.
      sources: name of each model -> its folder, if they do not come from the run; part of the settings.
    """

    domain: str
    base: str
    trained: dict[str, str]
    params: Callable[[str], Any]
    sources: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """All models, base first."""
        return [self.base, *self.trained]


def check(runtime: Runtime, domain: str) -> None:
    """Refuses, before anything runs, what cannot be compared.

    Raises:
      UserError: as in `samples.check` and `pairs.check`.
    """
    wanted = runtime.config.scored_domains if runtime.config.circuits.vulnerability else (domain,)
    samples.check(runtime, wanted, f"circuits of {domain}: ")
    pairs.check(runtime, domain)


def run(runtime: Runtime, compared: Compared, folder: Path, track: Callable[[str, int], Any]) -> Record:
    """Starts or resumes the comparison; writes its parts to `folder`/analysis/parts.

    Args:
      runtime: the model, prompts, rewards and configuration.
      compared: the models.
      folder: the work folder.
      track: `track(label, total)` is a context manager for a progress bar; it gives a function (done, text) -> None.

    Returns:
      the record of the file `analysis/circuits-D.json`, which the caller writes: "domain", "base", "pairs", "penalty",
      "faithful" (whether every circuit is at this λ), "models": {name: figures}, "comparisons".

    Raises:
      UserError: if parts with other settings lie in the folder, if the base model answers too few pairs, or if sampling
        fails (`samples.draw`, `validation_rewards`).
      RuntimeError: if reward workers do not start.
      The errors of `compared.params`.
    """
    study = Study(runtime, compared, folder)
    names = compared.names
    with track(f"circuits of {compared.domain}", 3 * len(names) + 1) as show:
        count = itertools.count()

        def at(text: str) -> Progress:
            done = next(count)
            return lambda more: show(done, f"{text}{more}")

        chosen = study.pairs(at("pairs"))
        searched = {name: study.search(name, chosen, at(f"{name}: masks")) for name in names}
        kl = study.kl(at("KL"))
        penalty, faithful = study.penalty(searched)
        effects = {name: study.effects(name, chosen, searched, penalty, at(f"{name}: heads")) for name in names}
        edits = {name: study.edits(name, at(f"{name}: edits")) for name in compared.trained}
    record = study.record(chosen, searched, effects, kl, penalty, faithful)
    for name, found in edits.items():
        record["models"][name]["vulnerability"] = found
    return record


def how(section: CircuitsSection) -> Search:
    """The search that a configuration asks for."""
    return Search(section.steps, section.learning_rate, section.at_once, section.loss)


@dataclasses.dataclass(eq=False)
class Study:
    """One comparison: its programs, its parts and their figures."""

    runtime: Runtime
    compared: Compared
    folder: Path

    def __post_init__(self) -> None:
        self.params = functools.lru_cache(maxsize=1)(self.compared.params)
        temperature = self.runtime.config.rollout.sampling.temperature
        model: Any = self.runtime.model
        self.programs = masks.build(model, temperature, how(self.runtime.config.circuits))

    def settings(self) -> dict[str, Any]:
        """The settings that a part is written with; a part with other settings is refused."""
        c = self.runtime.config
        return {
            "seed": c.seed,
            "circuits": records.as_read(dataclasses.asdict(c.circuits)),
            "split": c.analyze.split,
            "scored": [c.recover.prompts, c.recover.samples],
            "temperature": c.rollout.sampling.temperature,
            "models": self.compared.names,
            "sources": self.compared.sources,
        }

    def part(self, name: str, make: Callable[[], Any], progress: Progress) -> Any:
        """The content of a part; it is made and written at the first call, and read from its file afterwards."""
        file = self.folder / "analysis" / "parts" / f"circuits-{self.compared.domain}-{name}.json"
        settings = self.settings()
        if file.exists():
            kept = records.read_json(file)
            for field, now in settings.items():
                if kept["settings"].get(field) != now:
                    raise UserError(
                        f"{file} was made with {field}={kept['settings'].get(field)!r}, now {now!r}; remove "
                        f"{file.parent}/circuits-{self.compared.domain}-*.json to start over, or undo the change"
                    )
            return kept["made"]
        progress("")
        records.write_json(file, {"settings": settings, "made": make()})
        return records.read_json(file)["made"]

    def _put(self, rows: PairRows) -> PairRows:
        return put(rows, self.runtime.mesh)

    def _log_probs(self, params: Any, blocks: list[PairRows], masks_MKLH: np.ndarray) -> np.ndarray:
        """log π of both replies [K, M, n, 2] of M blocks of n pairs, with K masks of each block."""
        made = [self._passes(params, b).log_probs(mask_KLH) for b, mask_KLH in zip(blocks, masks_MKLH, strict=True)]
        return np.stack(made, axis=1).astype(np.float64)

    def _passes(self, params: Any, block: PairRows) -> MaskedPasses:
        return MaskedPasses(self.programs, params, self._put(block))

    @property
    def shape(self) -> tuple[int, int]:
        """(L, H)."""
        config = self.runtime.model.config
        return config.n_layers, config.n_heads

    def pairs(self, progress: Progress) -> Pairs:
        """The pairs that the base model answers, at least `FEWEST_BLOCKS` blocks of them."""
        c, found = self.runtime.config.circuits, pairs.candidates(self.runtime, self.compared.domain)

        def margins() -> list[list[float]]:
            none = np.zeros((len(found.kinds) // c.block, 1, *self.shape))
            out = []
            for of in (lambda rows: rows, pairs.swapped):
                logp = self._log_probs(self.params(self.compared.base), [of(b) for b in found.blocks(c.block)], none)
                out.append((logp[0, :, :, 0] - logp[0, :, :, 1]).ravel().tolist())
            return out

        margin_2N = np.array(self.part("pairs", margins, progress))
        used = found.take(np.arange(margin_2N.shape[1]))
        chosen = pairs.answered(used, margin_2N, c.blocks * c.block)
        if len(chosen.kinds) < FEWEST_BLOCKS * c.block:
            raise UserError(
                f"circuits of {self.compared.domain}: the base model answers both prompts of only "
                f"{len(chosen.kinds)} of {len(used.kinds)} pairs; {FEWEST_BLOCKS * c.block} are needed: lower "
                "circuits.block, or give pairs that it answers with circuits.pairs_file"
            )
        return chosen

    def blocks(self, chosen: Pairs) -> list[PairRows]:
        """The pairs in blocks."""
        return chosen.blocks(self.runtime.config.circuits.block)

    def search(self, name: str, chosen: Pairs, progress: Progress) -> dict[str, Any]:
        """The part `circuits-D-search-MODEL`.

        Returns:
          {"m": masks [Λ, M, R, L, H], "ends": the circuits to which they settle, 0 or 1, "loss": of these, with the
          price of the heads [Λ, M, R], "log_probs": of all heads, no head, and of the circuit of the block before, at
          each λ [2 + Λ, M, n, 2], "attribution": [L, H], "rewards": of the validation prompts [P, k]}.
        """
        c, blocks = self.runtime.config.circuits, self.blocks(chosen)

        def make() -> dict[str, Any]:
            params = self.params(name)
            start = masks.start_logits(c.seeds, *self.shape, first_seed=self.runtime.config.seed)
            logits = np.tile(start, (len(c.penalties), 1, 1))
            penalty = np.repeat(np.array(c.penalties, np.float32), len(start))
            of_blocks, scores = [], []
            for i, block in enumerate(blocks):
                progress(f", block {i + 1} of {len(blocks)}")
                rows = self._put(block)
                m = np.asarray(distributed.gather(self.programs.search(params, rows, logits, penalty)))
                ends, loss = self.programs.settle(params, rows, m > 0.5, penalty, c.tried)
                of_blocks.append({"m": m, "ends": ends.astype(int), "loss": loss})
                scores.append(distributed.gather(self.programs.attribution(params, rows)))

            def by_penalty(field: str) -> list[Any]:
                x = np.stack([found[field] for found in of_blocks])
                return x.reshape(len(blocks), len(c.penalties), len(start), *x.shape[2:]).swapaxes(0, 1).tolist()

            made = {field: by_penalty(field) for field in ("m", "ends", "loss")}
            judged = [figures.of_previous(circuits(made, at)) for at in range(len(c.penalties))]
            tried = np.stack([np.ones_like(judged[0]), np.zeros_like(judged[0]), *judged], axis=1)
            logp = self._log_probs(params, blocks, tried)
            domain = self.compared.domain
            return made | {
                "log_probs": logp.tolist(),
                "attribution": np.mean(scores, axis=0).tolist(),
                "rewards": validation_rewards(self.runtime, params, [domain])[domain].tolist(),
            }

        return self.part(f"search-{name}", make, progress)

    def kl(self, progress: Progress) -> dict[str, list[float]]:
        """KL(π₀ ‖ π) of each trained model, by prompt: the mean of log π₀ − log π over completions of π₀, in nats."""

        def make() -> dict[str, list[float]]:
            probe = build_probe(self.runtime, self.runtime.config.train.grpo)
            base = self.params(self.compared.base)
            sample = samples.draw(self.runtime, base, self.compared.domain)
            before_PGT = probe.log_probs(base, sample)
            del base
            return {
                name: (before_PGT - probe.log_probs(self.params(name), sample)).sum(axis=2).mean(axis=1).tolist()
                for name in self.compared.trained
            }

        return self.part("kl", make, progress)

    def penalty(self, searched: dict[str, Any]) -> tuple[int, bool]:
        """The index of λ, and whether every model's circuit is faithful there.

        It is the largest λ at which the circuit of every model has a faithfulness of at least `circuits.faithful`: one
        λ for all models, so that a head has the same price in each [chosen]. Without one it is the smallest λ.
        """
        c = self.runtime.config.circuits
        by_price = sorted(range(len(c.penalties)), key=lambda i: -c.penalties[i])

        def value(made: Any, at: int) -> float:
            return self.faithfulness(made, at)["estimate"] or 0.0

        for at in by_price:
            if all(value(made, at) >= c.faithful for made in searched.values()):
                return at, True
        return by_price[-1], False

    def faithfulness(self, made: Any, at: int, null: Any = None) -> Record:
        """F(C) / F(M) of the circuits at one λ, each on the pairs of the next block."""
        margin_KMN = _margins(made["log_probs"])
        return figures.share(margin_KMN[2 + at], margin_KMN[0], "F with all heads", null)

    def effects(
        self, name: str, chosen: Pairs, searched: dict[str, Any], at: int, progress: Progress
    ) -> dict[str, Any]:
        """The part `circuits-D-effects-MODEL`.

        Returns:
          {"log_probs": of the heads outside the circuit, base's circuit, `circuits.random_sets` random circuits of the
          size of the model's own, and as many of the size of base's [2 + 2 · sets, M, n, 2]; "single": of all heads but
          one, then of one head alone, in the first `circuits.single_blocks` blocks [2 · L · H, M, n, 2]}.
        """
        c, blocks = self.runtime.config.circuits, self.blocks(chosen)

        def make() -> dict[str, Any]:
            rng, n_heads = np.random.default_rng([self.runtime.config.seed, at]), int(np.prod(self.shape))
            own, base = (circuits(searched[x], at) for x in (name, self.compared.base))
            sizes = [round(float(x.sum(axis=(1, 2)).mean())) for x in (own, base)]
            drawn = [rng.permutation(n_heads) < k for k in sizes for _ in range(c.random_sets)]
            shared = np.stack(drawn).reshape(-1, *self.shape)
            tried = [
                np.concatenate([[~kept, of_base], shared])
                for kept, of_base in zip(figures.of_previous(own), figures.of_previous(base), strict=True)
            ]
            params, whole, none = self.params(name), np.ones(self.shape), np.zeros(self.shape)
            log_probs, single = [], []
            for block, sets in zip(blocks, tried, strict=True):
                passes = self._passes(params, block)
                log_probs.append(passes.log_probs(sets))
                if len(single) < c.single_blocks:
                    both = [passes.changes(mask)(np.arange(n_heads)) for mask in (whole, none)]
                    single.append(np.concatenate(both))
            return {
                field: np.stack(found, axis=1).astype(np.float64).tolist()
                for field, found in (("log_probs", log_probs), ("single", single))
            }

        return self.part(f"effects-{name}", make, progress)

    def edits(self, name: str, progress: Progress) -> dict[str, Record]:
        """The part `circuits-D-edits-MODEL`: `vulnerability.measure` by domain; {} unless it is wanted."""
        others = [d for d in self.runtime.config.scored_domains if d != self.compared.domain]
        if not self.runtime.config.circuits.vulnerability:
            return {}

        def make() -> dict[str, Record]:
            probe = build_probe(self.runtime, self.runtime.config.train.grpo)
            base, end, found = self.compared.params(self.compared.base), self.compared.params(name), {}
            for domain in others:
                sample = samples.draw(self.runtime, base, domain)
                tell = lambda text, domain=domain: progress(f", {domain}, {text}")  # noqa: E731
                found[domain] = vulnerability.measure(probe, base, end, sample, tell)
            return found

        return self.part(f"edits-{name}", make, progress)

    def record(
        self, chosen: Pairs, searched: dict[str, Any], effects: dict[str, Any], kl: Any, at: int, faithful: bool
    ) -> Record:
        """The content of `analysis/circuits-D.json`."""
        c, base = self.runtime.config.circuits, self.compared.base
        models = {name: self._model(name, searched, effects, kl, at) for name in self.compared.names}
        kinds = self.compared.trained
        couples = [(r, s) for r in kinds if kinds[r] == RL for s in kinds if kinds[s] == SFT]
        return {
            "domain": self.compared.domain,
            "base": base,
            "pairs": pairs.counts(chosen, c.block),
            "penalty": c.penalties[at],
            "faithful": faithful,
            "models": models,
            "comparisons": [self._comparison(*couple, searched, effects, at, faithful) for couple in couples],
        }

    def _model(self, name: str, searched: Any, effects: Any, kl: Any, at: int) -> Record:
        c, base, made, did = self.runtime.config.circuits, self.compared.base, searched[name], effects[name]
        own, searches = circuits(made, at), [search_record(made, i) for i in range(len(c.penalties))]
        margin_KMN, more_KMN = _margins(made["log_probs"]), _margins(did["log_probs"])
        whole_MN, none_MN = margin_KMN[0], margin_KMN[1]
        random_own, random_base = np.split(more_KMN[2:], 2)
        reply_KN, single_HN = _reply(made["log_probs"])[:2], _reply(did["single"])
        few = single_HN.shape[1]
        all_but, alone = np.split(single_HN, 2)
        heads = figures.head_effects(all_but, alone, reply_KN[0][:few], reply_KN[1][:few])
        null = figures.random_null(random_own, whole_MN)
        rise = float((reply_KN[0] - reply_KN[1])[:few].mean())
        groups = validation_groups(self.runtime).get(self.compared.domain)
        out = {
            "kind": self.compared.trained.get(name, "base"),
            **searches[at],
            "whole": clustered(whole_MN.mean(axis=1), "nats").record(0.0),
            "faithfulness": self.faithfulness(made, at, null),
            "path": [
                {"penalty": p, "size": found["size"], "open_share": found["open_share"], **self.faithfulness(made, i)}
                for i, (p, found) in enumerate(zip(c.penalties, searches, strict=True))
            ],
            "completeness": figures.share(more_KMN[0] - none_MN, whole_MN - none_MN, "the rise of F by all heads", 0.0),
            **heads,
            "hidden": figures.hidden(own.mean(axis=0) > 0.5, heads["sufficiency"], rise),
            "attribution": made["attribution"],
            "attribution_rank": rank_agreement(
                np.ravel(made["attribution"]), np.array(made["m"][at]).mean(axis=(0, 1)).ravel()
            ),
            "ceiling": figures.ceiling(own),
            "score": score(made["rewards"], groups).record(),
        }
        if name == base:
            return out
        of_base = circuits(searched[base], at)
        null = figures.random_null(random_base, whole_MN)
        return out | {
            "overlap": figures.overlap(of_base, own),
            "beyond_chance": figures.mean_over_blocks(figures.by_block(of_base, own)),
            "transfer": figures.share(more_KMN[1], whole_MN, "F with all heads", null),
            "kl": clustered(kl[name], "nats").record(0.0),
        }

    def _comparison(self, rl: str, sft: str, searched: Any, effects: Any, at: int, faithful: bool) -> Record:
        c, base = self.runtime.config.circuits, self.compared.base
        own = {name: circuits(searched[name], at) for name in (base, rl, sft)}
        rewards = {name: searched[name]["rewards"] for name in (rl, sft)}
        groups = validation_groups(self.runtime).get(self.compared.domain)
        apart = paired_difference(rewards[rl], rewards[sft], groups).in_points()
        doubts = []
        if abs(apart.value) > c.match:
            doubts.append(f"the scores of {rl} and {sft} differ by {apart.value:+.1f} points, more than {c.match:g}")
        if not faithful:
            doubts.append(f"at no λ is every circuit faithful ({c.faithful:g} or more)")
        opened = [name for name in own if not search_record(searched[name], at)["converged"]]
        if opened:
            doubts.append(f"not converged: the circuits of {', '.join(opened)} depend on where the search starts")
        inside = {
            name: (_margins(effects[name]["log_probs"])[1], _margins(searched[name]["log_probs"])[0])
            for name in (rl, sft)
        }
        beyond = figures.by_block(own[base], own[rl]) - figures.by_block(own[base], own[sft])
        return {
            "rl": rl,
            "sft": sft,
            "score": apart.record(0.0),
            "overlap": figures.mean_over_blocks(beyond),
            "transfer": figures.transfer_difference(inside[rl], inside[sft]),
            "vulnerable": figures.vulnerable(own[sft].mean(axis=0), own[rl].mean(axis=0)),
            "doubts": doubts,
        }


def circuits(searched: Any, at: int) -> np.ndarray:
    """The circuit of every block [M, L, H] at one λ, from the part of a search."""
    return figures.best(np.array(searched["ends"][at], bool), np.array(searched["loss"][at]))


def search_record(searched: Any, at: int) -> Record:
    """`figures.search_record` of the part of a search at one λ."""
    m, loss = (np.array(searched[field][at]) for field in ("m", "loss"))
    return figures.search_record(m, np.array(searched["ends"][at], bool), loss)


def _margins(log_probs: Any) -> np.ndarray:
    """Margins [K, M, n] of log-probs [K, M, n, 2]."""
    logp = np.asarray(log_probs, float)
    return logp[..., 0] - logp[..., 1]


def _reply(log_probs: Any) -> np.ndarray:
    """log π of the source's reply [K, N] of log-probs [K, M, n, 2]."""
    logp = np.asarray(log_probs, float)
    return logp[..., 0].reshape(logp.shape[0], -1)


def summary(record: Record) -> list[str]:
    """A line for each model and for each comparison of a record of `study.run`."""
    lines = []
    for name, model in record["models"].items():
        text = f"{name}: circuits of {model['size']:.3g} of {model['heads']} heads, faithfulness "
        text += _text(model["faithfulness"])
        if overlap := model.get("overlap"):
            text += f"; keeps {overlap['shared']:.3g} of base's {overlap['base']:.3g} (by chance "
            text += f"{overlap['null']['mean']:.1f}); base's circuit in it: {_text(model['transfer'])}"
        if not model["converged"]:
            text += f"; not converged: the starts disagree on {100 * model['open_share']:.0f} % of the heads"
        lines.append(text)
    for c in record["comparisons"]:
        doubts = f" ({'; '.join(c['doubts'])})" if c["doubts"] else ""
        lines.append(
            f"{c['rl']} minus {c['sft']}: overlap beyond chance {_text(c['overlap'])}, faithfulness of base's circuit "
            f"{_text(c['transfer'])}{doubts}"
        )
    return lines


def _text(figure: Record) -> str:
    if figure["estimate"] is None:
        return figure["reason"]
    return figure_text(figure["estimate"], figure["ci95"], ".2f")
