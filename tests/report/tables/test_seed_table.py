"""The table over seeds against Student's t and Fieller by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdrl_jax import config
from mdrl_jax.commands import seeds as command
from mdrl_jax.errors import UserError
from mdrl_jax.records import write_json
from mdrl_jax.report.tables import matrix as mx
from mdrl_jax.report.tables import seeds
from mdrl_jax.stats import estimate
from mdrl_jax.workfolder import resolved

OFFSETS_P = np.linspace(-5, 5, 12)
OTHER_P = np.random.default_rng(0).permutation(OFFSETS_P)


def run(seed: int, before: float, after: float, peak: float = 80.0) -> list[dict[str, Any]]:
    table = {
        "base": (20.0, 20.0),
        "math": (peak, 22.0),
        "cw": (before, 90.0),
        "refresh-math": (after, 88.0),
    }
    records = []
    for i, (stage, points) in enumerate(table.items()):
        # The offsets differ between stages, so that paired errors do not vanish.
        values = [p + OFFSETS_P + 0.1 * i * OTHER_P for p in points]
        rewards = {d: (v[:, None] / 100).tolist() for d, v in zip(("math", "cw"), values, strict=True)}
        head = {"stage": stage, "index": i, "seed": seed}
        records.append({**head, "rewards": rewards, "accuracy": rewards})
    return records


RUNS = [run(0, 60.0, 78.0), run(1, 62.0, 76.0), run(2, 58.0, 79.0)]


def lines(runs: list[list[dict[str, Any]]]) -> dict[str, seeds.Line]:
    return {x.name: x for x in seeds.summarise([mx.build(r) for r in runs]).lines}


def test_figures_are_student_over_seed_values() -> None:
    found = lines(RUNS)
    fall = found["fall math"]
    assert fall.per_seed == pytest.approx((20, 18, 22))
    assert fall.estimate is not None
    half = 4.3027 * 2 / np.sqrt(3)
    assert (fall.estimate.low, fall.estimate.high) == pytest.approx((20 - half, 20 + half), rel=1e-4)
    assert found["lift math"].per_seed == pytest.approx((60, 60, 60))
    assert found["BWT"].per_seed == pytest.approx((-20, -18, -22))
    assert found["FWT"].per_seed == pytest.approx((2, 2, 2))
    assert found["forgetting"].per_seed == pytest.approx((20, 18, 22))
    assert found["collateral refresh-math"].per_seed == pytest.approx((2, 2, 2))


def test_scores_are_means_over_seeds() -> None:
    table = seeds.summarise([mx.build(r) for r in RUNS])
    e = table.scores["refresh-math", "math"].estimate
    assert e is not None
    assert (e.value, e.n) == (pytest.approx((78 + 76 + 79) / 3), 3)


def test_fraction_is_the_ratio_of_seed_means() -> None:
    line = lines(RUNS)["fraction refresh-math"]
    assert line.per_seed == pytest.approx((18 / 20, 14 / 18, 21 / 22))
    gain, loss = np.array([18.0, 14.0, 21.0]), np.array([20.0, 18.0, 22.0])
    expected = estimate.ratio_of_means(gain, loss)
    assert line.estimate is not None and expected is not None
    assert line.estimate.value == pytest.approx(gain.sum() / loss.sum())
    assert (line.estimate.low, line.estimate.high) == pytest.approx((expected.low, expected.high))


def test_a_seed_without_loss_counts_in_the_mean_but_has_no_fraction() -> None:
    line = lines([*RUNS, run(3, 80.0, 81.0)])["fraction refresh-math"]
    assert line.per_seed[3] is None and line.per_seed[0] is not None
    # Losses 20, 18, 22 and 0: mean 15 and t(3) · 5.07 = 16.1, so the interval includes 0.
    assert line.estimate is None and "loss +15.00" in line.reason


def test_one_seed_has_values_and_no_intervals() -> None:
    table = seeds.summarise([mx.build(RUNS[0])])
    fall = next(x for x in table.lines if x.name == "fall math")
    assert fall.estimate is not None and not np.isfinite(fall.estimate.high)
    assert "inf" not in table.text()
    json.dumps(table.record(), allow_nan=False)


def test_from_eight_seeds_on_prompts_are_drawn_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeds, "N_REPLICATES", 40)
    # Equal seeds on equal prompts: only the prompts move the scores, while Student's t would say no error at all.
    line = seeds.summarise([mx.build(run(s, 60.0, 78.0)) for s in range(8)]).scores["base", "math"]
    assert line.estimate is not None
    expected = 2 * 1.96 * OFFSETS_P.std() / np.sqrt(12)
    assert line.estimate.high - line.estimate.low == pytest.approx(expected, rel=0.3)


def test_seeds_may_differ_in_stages() -> None:
    found = lines([RUNS[0], RUNS[1][:3]])
    assert found["gain refresh-math"].per_seed == (pytest.approx(18), None)
    gain, fall = found["gain refresh-math"].estimate, found["fall math"].estimate
    assert gain is not None and (gain.value, gain.n) == (pytest.approx(18), 1)
    assert fall is not None and fall.n == 2


def test_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [tmp_path / f"seed{i}" for i in range(3)]
    for folder, records in zip(folders, RUNS, strict=True):
        for r in records:
            write_json(folder / f"evaluations/{r['index']:02d}-{r['stage']}.json", r)
    command.run([str(f) for f in folders], tmp_path / "seeds.json")
    printed = capsys.readouterr().out
    assert "fall math" in printed and "20.00" in printed and "seeds 0, 1, 2" in printed
    assert '"' not in printed and max(map(len, printed.splitlines())) <= 100
    written = json.loads((tmp_path / "seeds.json").read_text())
    fall = next(q for q in written["quantities"] if q["name"] == "fall math")
    assert fall["estimate"] == pytest.approx(20) and fall["n"] == 3
    with pytest.raises(UserError, match="same seed"):
        command.run([str(folders[0]), str(folders[0])])
    with pytest.raises(UserError, match="at least one"):
        command.run([])


def test_a_run_that_has_not_come_as_far_is_refused(tmp_path: Path) -> None:
    """Its θ_T would be another stage than that of the other runs."""
    folders = [tmp_path / f"seed{i}" for i in range(3)]
    for folder, records in zip(folders, RUNS, strict=True):
        for r in records[:2] if folder is folders[1] else records:
            write_json(folder / f"evaluations/{r['index']:02d}-{r['stage']}.json", r)
    with pytest.raises(UserError, match="seed1 has no scores of stage cw, which .*seed0 has; finish this run"):
        seeds.summarise_seeds([str(f) for f in folders])
    assert len(seeds.summarise_seeds([str(f) for f in folders if f is not folders[1]]).seeds) == 2


def test_runs_of_different_experiments_are_refused(tmp_path: Path) -> None:
    def folder(seed: int, **fields: Any) -> str:
        c = config.default()
        c.seed, c.stages = seed, ("math", "cw", "refresh-math")
        c.model.path = f"/models/of/{seed}/tiny"
        for name, value in fields.items():
            section, _, field = name.partition("__")
            setattr(getattr(c, section), field, value)
        root = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        for r in RUNS[seed]:
            write_json(root / f"evaluations/{r['index']:02d}-{r['stage']}.json", r)
        write_json(root / "config.json", {"config": resolved(config.parse(c))})
        return str(root)

    first = folder(0)
    # Other seeds, folders and fields that change no result are one experiment.
    assert len(seeds.summarise_seeds([first, folder(1, rewards__workers=7)]).seeds) == 2
    other = folder(2, train__learning_rate=0.5, domains__seed=9)
    with pytest.raises(UserError, match=r"different experiments: domains.seed=0 and 9, train.learning_rate=.* and 0.5"):
        seeds.summarise_seeds([first, other])
    with pytest.raises(UserError, match="model.path"):
        seeds.summarise_seeds([first, folder(1, model__path="/models/of/0/small")])
