"""The `score` command: one line out for each line in, and one line of error for a damaged file."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from mdrl_jax.commands.score import run
from mdrl_jax.errors import UserError
from mdrl_jax.rewards.pool import RewardPool


def scored(domain: str, rows: list[Any], path: Path) -> list[dict[str, Any]]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = io.StringIO()
    run(domain, str(path), out, workers=2)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_lines_come_in_order(tmp_path: Path) -> None:
    rows = [{"completion": f"so {i % 3}", "answer": ["1", "one"]} for i in range(12)]
    results = scored("math", rows, tmp_path / "in.jsonl")
    assert results == [{"reward": float(i % 3 == 1), "error": None} for i in range(12)]


@pytest.mark.parametrize(
    ("domain", "row", "reward"),
    [
        ("qa", {"completion": "The \u2028 cat", "answer": "cat"}, 1.0),
        ("qa", {"completion": "The answer is (B).", "answer": "B", "choices": ["cat", "dog"]}, 1.0),
        ("qa", {"completion": "A. cat\nB. dog", "answer": "B", "choices": ["cat", "dog"]}, 0.0),
        ("cw", {"completion": "a, b", "constraints": [{"kind": "punctuation:no_comma"}]}, 0.0),
        ("code", {"completion": "f = abs", "tests": ["assert f(-1) == 1"]}, 1.0),
        ("code", {"completion": "    return x", "prefix": "def f(x):\n", "tests": ["assert f(3) == 3"]}, 1.0),
        ("math", {"completion": "so 4", "answer": 4}, 1.0),
        ("math", {"completion": "so 4", "answer": [3, "4"]}, 1.0),
        ("cw", {"completion": "a b", "constraints": [{"kind": "word_count", "count": 2},
                                                      {"kind": "include", "word": "c"}]}, 0.5),
    ],
)  # fmt: skip
def test_each_domain(domain: str, row: dict[str, Any], reward: float, tmp_path: Path) -> None:
    assert scored(domain, [row], tmp_path / "f") == [{"reward": reward, "error": None}]


def test_a_mark_at_the_start_is_no_text_and_a_number_that_is_none_is_named(tmp_path: Path) -> None:
    file, out = tmp_path / "in.jsonl", io.StringIO()
    file.write_text('\ufeff{"completion": "so \\ud800 4", "answer": 4}\n', encoding="utf-8")
    run("math", str(file), out, workers=1)
    assert json.loads(out.getvalue()) == {"reward": 1.0, "error": None}


GOOD = '{"completion": "4", "answer": "4"}'


@pytest.mark.parametrize(
    ("domain", "text", "message"),
    [
        ("math", f'{GOOD}\n{{"completion": "4", "ans', "line 2"),
        ("math", f"{GOOD}\n\n{GOOD}", "line 2"),
        ("math", f"{GOOD}\n[1]", "line 2"),
        ("math", f'{GOOD}\n{{"answer": "4"}}', 'line 2.*"completion"'),
        ("math", '{"completion": "4"}', 'line 1.*"answer"'),
        ("math", '{"completion": "4", "answer": true}', 'line 1.*"answer"'),
        ("math", f'{GOOD}\n{{"completion": "4", "answer": [1, Infinity]}}', 'line 2: "answer" is missing'),
        ("math", f'{GOOD}\n{{"completion": "4", "answer": NaN}}', 'line 2: "answer" is missing or not a text'),
        ("math", '{"completion": "4", "answer": {"value": 4}}', 'line 1.*"answer"'),
        ("code", '{"completion": "4", "cases": [{"stdin": "1"}]}', 'line 1.*"cases"'),
        ("qa", '{"completion": "4", "answer": []}', 'line 1.*"answer"'),
        ("qa", '{"completion": "B", "answer": "B", "choices": "AB"}', 'line 1.*"choices"'),
        ("code", GOOD, 'line 1.*"tests"'),
        ("cw", '{"completion": "4", "constraints": [{"word": "x"}]}', "line 1: the constraint null"),
        ("cw", '{"completion": "a", "constraints": [{"kind": "rhyme"}]}', "line 1.*rhyme.*no_repeats"),
        ("cw", '{"completion": "a", "constraints": [{"kind": "word_count"}]}', "takes count; given: no parameters"),
        ("cw", '{"completion": "a", "constraints": [{"kind": "word_count", "count": NaN}]}', "line 1.*given: nan"),
    ],
)
def test_a_damaged_line_is_named_and_the_others_go_on(
    domain: str, text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "in.jsonl", io.StringIO()
    path.write_text(text)
    assert run(domain, str(path), out, workers=1) == 1
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert len(lines) == text.count("\n") + 1
    bad = [line for line in lines if line["reward"] is None]
    assert len(bad) == 1 and re.search(message, bad[0]["error"])
    assert all(line == {"reward": 1.0, "error": None} for line in lines if line not in bad)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(path) in said and bad[0]["error"] in said


def test_an_unknown_domain_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="poetry.*math, code, qa, cw"):
        run("poetry", str(tmp_path / "f"), io.StringIO())


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("absent", "binary", "."):
        with pytest.raises(UserError, match="input"):
            run("math", str(tmp_path / name), io.StringIO())


def test_an_empty_file_gives_no_lines(tmp_path: Path) -> None:
    assert scored("math", [], tmp_path / "in.jsonl") == []


def test_results_are_printed_before_the_pool_closes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A program may leave so much behind that closing takes long.
    out, seen = io.StringIO(), []
    close = RewardPool.close
    monkeypatch.setattr(RewardPool, "close", lambda pool: (seen.append(out.getvalue()), close(pool)))
    path = tmp_path / "in.jsonl"
    path.write_text(GOOD)
    run("math", str(path), out, workers=1)
    assert seen == [out.getvalue()] and seen[0]
