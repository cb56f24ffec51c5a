"""A comparison of circuits on the embedded model: its pairs, resume, laws of its figures, the page's section."""

import re
from pathlib import Path
from typing import Any

import jax
import pytest

from mdrl_jax import runtime
from mdrl_jax.analysis.circuits import pairs, study
from mdrl_jax.claims.circuits import c8
from mdrl_jax.commands import analyze
from mdrl_jax.config import parse
from mdrl_jax.errors import UserError
from mdrl_jax.parallel.sharding import make_mesh
from mdrl_jax.records import write_json
from mdrl_jax.report.figures import circuits as shown
from mdrl_jax.report.folder import Records
from tests.analysis.test_interference import edited
from tests.odd_pool import OddPool

SIZES = {"blocks": 4, "block": 4, "steps": 12, "seeds": 1, "penalties": (0.03, 0.1), "random_sets": 2}


def built(monkeypatch: pytest.MonkeyPatch, **circuits: Any) -> runtime.Runtime:
    monkeypatch.setattr(pairs, "TRIED", 3)
    monkeypatch.setattr(runtime, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
    fields = {
        "scored_domains": ("qa",),
        "stages": ("qa",),
        "rollout": {"prompt_buckets": (4,), "completion_buckets": (8,)},
        "domains": {"n_test": 8, "n_validation": 8},
        "evaluate": {"batch": 8},
        "recover": {"prompts": 8},
        "analyze": {"prompts": 8, "batch": 2, "group_size": 2, "path_prompts": 2},
        "circuits": SIZES | circuits,
    }
    pool: Any = OddPool()
    return runtime.build(parse(fields), pool)


class Bar:
    """A progress bar that shows nothing."""

    def __init__(self, label: str, total: int):
        self.total = total

    def __enter__(self) -> Any:
        return lambda done, text: None

    def __exit__(self, *error: object) -> None:
        pass


@pytest.mark.slow
def test_no_edit_keeps_the_whole_circuit_and_a_large_edit_costs(monkeypatch, tmp_path: Path):
    made = built(monkeypatch)
    base = made.base_params()
    models = {"base": base, "qa": edited(base, 1, 0.0), "sft-qa": edited(base, 1, 0.3)}
    kinds = {"qa": study.RL, "sft-qa": study.SFT}
    compared = study.Compared("qa", "base", kinds, models.__getitem__)
    with jax.set_mesh(made.mesh):
        study.check(made, "qa")
        record = study.run(made, compared, tmp_path, Bar)
        # Resume: everything is read, no parameters are.
        again = study.Compared("qa", "base", kinds, lambda name: pytest.fail(name))
        assert study.run(made, again, tmp_path, Bar) == record
        other = built(monkeypatch, steps=13)
        with pytest.raises(UserError, match="was made with circuits"):
            study.run(other, again, tmp_path, Bar)
    of_base, near, far = (record["models"][name] for name in models)
    assert record["pairs"]["pairs"] == 16 and set(record["pairs"]["kinds"]) == {"entity", "task"}
    assert 0 < of_base["size"] < of_base["heads"] == 32
    assert near["overlap"]["shared"] == near["overlap"]["base"] == of_base["size"]
    assert near["transfer"]["estimate"] == pytest.approx(of_base["faithfulness"]["estimate"])
    assert near["kl"]["estimate"] == pytest.approx(0.0, abs=1e-5) and far["kl"]["estimate"] != 0
    assert len(near["necessity"]) == 32 and sum(near["histogram"]) == 4 * 2 * 32
    assert [p["penalty"] for p in near["path"]] == [0.03, 0.1] and near["path"][0]["size"] >= near["path"][1]["size"]
    (comparison,) = record["comparisons"]
    assert (comparison["rl"], comparison["sft"]) == ("qa", "sft-qa")
    (row,) = c8([record])["rows"]
    assert row["verdict"] in ("supported", "undecided", "contradicted")

    write_json(tmp_path / "analysis" / "circuits-qa.json", record)
    found = Records(tmp_path)
    heads, table, differences = shown.circuits(found)
    assert len(heads.rows) == 3 * 32 and [row[0] for row in table.rows] == ["base", "qa (RL)", "sft-qa (SFT)"]
    assert differences.rows[0][0] == "qa − sft-qa"
    for figure in (heads, *shown.masks(found)):
        figure.chart.to_dict()


def test_pairs_of_a_users_file_are_aligned_and_what_is_wrong_is_named(monkeypatch, tmp_path: Path):
    file = tmp_path / "own.jsonl"
    line = '{"base": "tom age =", "source": "ada age =", "base_reply": "7", "source_reply": "9"}\n'
    longer = '{"base": "tom age =", "source": "ada =", "base_reply": "7", "source_reply": "9"}\n'
    file.write_text(16 * line + longer)
    made = built(monkeypatch, pairs_file=str(file))
    pairs.check(made, "qa")
    found = pairs.candidates(made, "qa")
    assert found.kinds == ("own",) * 16 and sum(found.left_out.values()) == 1
    rows = found.rows
    words = made.tokenizer.convert_ids_to_tokens
    assert words(rows.base_N2T[0, 0][rows.valid_N2T[0, 0]]) == ["tom", "age", "=", "9"]
    assert words(rows.source_N2T[0, 1][rows.valid_N2T[0, 1]]) == ["ada", "age", "=", "7"]
    equal_T = (rows.base_N2T == rows.source_N2T).all(axis=(0, 1))
    assert equal_T[: rows.same].all() and not equal_T[rows.same]
    for text, told in (
        (15 * line, "15 counterfactual pairs are too few; circuits.block=4 needs at least 16"),
        (line.replace("tom", "nobody"), "does not know a word of the pair 'nobody age ='"),
        (line.replace('"9"', '"7"'), "line 1: base_reply and source_reply are equal"),
        (line + '{"base": "tom age ="}\n', "line 2: source, base_reply, source_reply is missing"),
        (line + "3\n", "line 2: 3 is no JSON object"),
        ("", "has no pairs"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=told):
            pairs.check(made, "qa")
    file.unlink()
    with pytest.raises(UserError, match="is not a file"):
        pairs.check(made, "qa")


def test_pairs_that_differ_too_early_are_left_out_and_counted(monkeypatch, tmp_path: Path):
    file = tmp_path / "own.jsonl"
    early = '{"base": "tom age =", "source": "ada age =", "base_reply": "7", "source_reply": "9"}\n'
    late = '{"base": "age tom =", "source": "age ada =", "base_reply": "7", "source_reply": "9"}\n'
    file.write_text(5 * early + 16 * late)
    for most, left_out in ((0, {}), (3, {}), (2, {"with more than 2 tokens from the first different one on": 5})):
        found = pairs.candidates(built(monkeypatch, pairs_file=str(file), differing=most), "qa")
        assert found.left_out == left_out and len(found.kinds) == 21 - sum(left_out.values())
        assert found.rows.same == (1 if left_out else 0)  # the tokens that are run once for all masks


def test_the_command_names_a_stage_that_it_cannot_compare(tmp_path: Path):
    parsed = parse({"scored_domains": ("qa", "math"), "stages": ("qa",)})
    for stages, told in (
        (["qa"], "--stage=qa is not understood"),
        (["solo-qa:tiny"], "it must be DOMAIN:FOLDER or sft-DOMAIN:FOLDER, with DOMAIN one of qa, math"),
        (["qa:tiny", "qa:tiny"], "names qa twice"),
        (["qa:tiny", "sft-math:tiny"], "is of math, but the first one of qa"),
    ):
        with pytest.raises(UserError, match=re.escape(told)):
            analyze.circuits("tiny", stages, parsed, str(tmp_path / "work"))
    assert not (tmp_path / "work").exists()
