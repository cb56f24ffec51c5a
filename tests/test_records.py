"""Records: numbers that JSON does not have, files that are no text, and manifests that cannot be read."""

import errno
import json
import math
import os
from pathlib import Path

import pytest

from mdrl_jax import manifest, records
from mdrl_jax.errors import UserError


def test_a_number_that_is_not_finite_is_null_and_its_place_is_told(tmp_path: Path) -> None:
    value = {"scores": [1.0, math.nan, (2.0, -math.inf)], "deep": {"a": math.inf}, "n": 3, "none": None}
    records.write_json(tmp_path / "a.json", value)
    found = json.loads((tmp_path / "a.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found == {
        **{"scores": [1.0, None, [2.0, None]], "deep": {"a": None}, "n": 3, "none": None},
        "not_finite": ["scores[1]", "scores[2][1]", "deep.a"],
    }
    records.write_json(tmp_path / "b.json", {"scores": [1.0]})
    assert records.read_json(tmp_path / "b.json") == {"scores": [1.0]}
    records.write_jsonl(tmp_path / "c.jsonl", [{"stderr": math.inf}, {"stderr": 0.5}])
    assert (tmp_path / "c.jsonl").read_text() == '{"stderr": null}\n{"stderr": 0.5}\n'


def test_a_file_of_lines_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "\xff\xfe"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl is not text"):
        records.read_jsonl(tmp_path / "a.jsonl")


def test_a_manifest_that_cannot_be_read_is_damage(tmp_path: Path) -> None:
    (tmp_path / manifest.NAME).mkdir()
    with pytest.raises(manifest.Damaged, match=r"manifest\.json cannot be read: Is a directory"):
        manifest.check(tmp_path)


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "scores.json"
    records.write_json(file, 1)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as e:
        records.write_json(file, 2)
    assert e.value.filename == str(file)
    assert list(tmp_path.iterdir()) == [file] and records.read_json(file) == 1
