"""The edit of SFT at the score of RL: from the stages of a run to `analysis/edits.json` and the verdict of C1."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdrl_jax.analysis import assembly, edits
from mdrl_jax.analysis.interference import Analysis
from mdrl_jax.analysis.sequence import BASE, Checkpoints, Supervised, Trained
from mdrl_jax.config import parse
from mdrl_jax.errors import UserError
from mdrl_jax.stage import resolve_stages
from mdrl_jax.stages.analyze import sequence
from mdrl_jax.stats.estimate import missing
from tests.analysis.test_edits import nested, two_ends

pytestmark = pytest.mark.usefixtures("fast_compile")
# The RL edit has few large entries, and the SFT edit is Gaussian.
BEFORE, _ = two_ends()


def moved(seed: int, power: float) -> dict[str, np.ndarray]:
    """Parameters after an edit whose entries are powers of Gaussian ones: the higher, the sparser."""
    rng, found = np.random.default_rng(seed), {}
    for name, x in BEFORE.items():
        step = rng.normal(size=x.shape)
        found[name] = (x + 1e-3 * np.sign(step) * np.abs(step) ** power).astype(np.float32)
    return found


ENDS = {BASE: BEFORE, "solo-math": moved(1, 3.0), "sft-math": moved(2, 1.0), "math": moved(3, 3.0)}


def looks(reached: bool) -> dict[str, Any]:
    """A record of looks as `stages/target.py` writes it."""
    rows = [
        {"step": n, "score": {"estimate": s}, "difference": {"estimate": s - 64.0}} for n, s in ((4, 50.0), (8, 65.0))
    ]
    words = "reached: 65.0 of 64.0 points after 8 steps"
    return {
        "settings": {"learning_rate": 2e-5}, "steps": rows, "reached": reached,
        "stopped": words if reached else f"not {words}",
    }  # fmt: skip


def analysed(supervised: Supervised, reached: bool = True, solo: bool = True) -> dict[str, Any]:
    """The record of Math's edit in the unit `edits`."""
    solos = (Trained("solo-math", "math", BASE),) if solo else ()
    stages = (Trained("math", "math", BASE),)
    asked: list[str] = []

    def read(name: str) -> dict[str, Any]:
        asked.append(name)
        return looks(reached)

    checkpoints = Checkpoints(
        stages, solos, lambda name: jax.tree.map(jnp.asarray, nested(ENDS[name])), (supervised,), read
    )
    analysis: Any = Analysis.__new__(Analysis)
    difference = lambda a, b: jax.tree.map(jnp.subtract, a, b)  # noqa: E731
    analysis.checkpoints, analysis.params = checkpoints, checkpoints.params
    analysis.probe = SimpleNamespace(difference=difference)
    found = analysis.edits(lambda text: None)["domains"]["math"]
    assert set(asked) <= {"sft-math"}
    return found


def test_the_edit_of_sft_stands_beside_that_of_rl():
    found = analysed(Supervised("sft-math", "math", BASE, "solo-math"))
    sft = found["sft"]
    assert sft["stage"] == "sft-math" and found["stage"] == "solo-math"
    assert sft["matched"] == {
        "target": "solo-math", "learning_rate": 2e-5, "step": 8, "score": {"estimate": 65.0},
        "difference": {"estimate": 1.0},
    }  # fmt: skip
    own = edits.edit_figures(*(jax.tree.map(jnp.asarray, nested(ENDS[n])) for n in (BASE, "sft-math")))
    assert sft["all"] == own["all"]
    # By hand: the share of entries below a tenth of the root mean square of their tensor's edit.
    small = []
    for name, x in BEFORE.items():
        stacked = ENDS["sft-math"][name] - x
        for delta in stacked if name.startswith("layers") else [stacked]:
            small += (np.abs(delta) < 0.1 * np.sqrt(np.mean(delta.astype(float) ** 2))).ravel().tolist()
    assert sft["all"]["scale_free"]["small"]["estimate"] == pytest.approx(np.mean(small), abs=1e-3)
    record = judged(found)
    assert parts(record)["sparser than SFT"] == "supported"
    assert "SFT of 8 steps of learning rate 2e-05: " in record["parts"][0]["words"]
    flipped = judged({**found, "all": found["sft"]["all"], "sft": {**found["sft"], "all": found["all"]}})
    assert parts(flipped)["sparser than SFT"] == "contradicted"


def judged(found: dict[str, Any]) -> dict[str, Any]:
    """C1 by this edit alone, through the code that reads `analysis/edits.json`."""
    content = {
        "edits": {"domains": {"math": found}, "pairs": [], "again": [], "mean_jaccard": missing("one domain")},
        "damage": {"pairs": [], "transfers": []},
        "solo_effects": {"pairs": [], "agreement": missing("one domain")},
        "subspace": {"pairs": []},
    } | {name: {} for name in ("peak_gradients", "gradients", "routes")}
    return assembly.verdicts(content, [{"domain": "math", "name": "math"}], None)[0]


def parts(record: dict[str, Any]) -> dict[str, str]:
    return {part["part"]: part["verdict"] for part in record["parts"]}


REFUSED = [
    (Supervised("sft-math", "math", "cw", "solo-math"), True, "sft-math starts from cw, not from base"),
    (Supervised("sft-math", "math", BASE, ""), True, "sft-math does not have the target solo-math"),
    (Supervised("sft-math", "math", BASE, "math"), True, "sft-math does not have the target solo-math"),
    (
        Supervised("sft-math", "math", BASE, "solo-math"),
        False,
        "sft-math: score of solo-math not reached: 65.0 of 64.0 points after 8 steps",
    ),
]


@pytest.mark.parametrize("supervised, reached, reason", REFUSED, ids=["start", "none", "other", "not reached"])
def test_an_sft_that_cannot_be_compared_says_why(supervised: Supervised, reached: bool, reason: str):
    found = analysed(supervised, reached)
    assert found["sft"]["reason"] == reason and "all" not in found["sft"] and ("matched" in found["sft"]) != reached
    record = judged(found)
    assert parts(record)["sparser than SFT"] == "undecided" and reason in record["parts"][1]["words"]
    assert "SFT: not measured" in record["parts"][0]["words"]


def test_without_a_solo_stage_the_target_is_the_stage_of_the_sequence():
    assert "all" in analysed(Supervised("sft-math", "math", BASE, "math"), solo=False)["sft"]
    assert "sft" not in analysed(Supervised("sft-qa", "qa", BASE, "math"))


def test_a_run_hands_over_its_supervised_stages_of_one_domain():
    overrides = {"sft-math": {"target": "math", "start": "base"}}
    stages = ("sft", "math", "sft-math", "qa", "sft-qa", "solo-math", "cw", "analyze")
    made = resolve_stages(parse({"stages": stages, "stage_overrides": overrides}), ("code", "math", "qa", "cw"))
    found = sequence(made[:-1], lambda name: name, lambda name: {"of": name})
    assert found.supervised == (Supervised("sft-math", "math", "base", "math"), Supervised("sft-qa", "qa", "qa", ""))
    assert [s.name for s in found.stages] == ["math", "qa", "cw"] and [s.name for s in found.solos] == ["solo-math"]
    assert found.looks("sft-math") == {"of": "sft-math"} and found.params("sft-qa") == "sft-qa"
    assert found.origin == "sft" and {s.start for s in found.solos} == {"sft"}
    # The edit of cw is that of RL alone: it starts at the end of the supervised stage before it.
    assert [s.start for s in found.stages] == ["sft", "math", "sft-qa"]
    assert found.points == ("sft", "math", "qa", "sft-qa", "cw")


def test_a_stage_of_the_sequence_that_is_trained_again_is_no_edit_from_the_start():
    changes = {"stages": ("math", "qa", "again-qa", "again-math"), "stage_overrides": {"again-qa": {"start": "math"}}}
    found = sequence(resolve_stages(parse(changes), ("code", "math", "qa", "cw")), lambda name: name)
    assert [s.name for s in found.stages] == ["math", "qa"] and [s.name for s in found.solos] == ["again-math"]


def test_a_warm_up_of_one_domain_is_no_comparison_and_its_solos_start_at_its_end():
    made = resolve_stages(parse({"stages": ("sft-math", "math", "analyze")}), ("code", "math", "qa", "cw"))
    found = sequence(made[:-1], lambda name: name)
    assert (found.origin, found.supervised, found.stages[0].start) == ("sft-math", (), "sft-math")
    changes = {"stages": ("sft-math", "solo-math", "math"), "stage_overrides": {"solo-math": {"start": "base"}}}
    stages = resolve_stages(parse(changes), ("code", "math", "qa", "cw"))
    with pytest.raises(UserError, match="stage solo-math starts from 'base', but the sequence from 'sft-math'"):
        sequence(stages, lambda name: name)
