"""Domains from data files: places and lines of rows, splits that stay, streaming, bad rows, exact positions."""

import csv
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mdrl_jax.analysis import samples
from mdrl_jax.config import default, parse
from mdrl_jax.domains import datasets, files
from mdrl_jax.domains.base import Domain, DomainsConfig, Problem, SourceConfig
from mdrl_jax.domains.prompts import groups_apart, notes, tokenize, visit_order
from mdrl_jax.domains.registry import make_domains
from mdrl_jax.domains.vocabulary import make_tokenizer
from mdrl_jax.errors import UserError
from mdrl_jax.model import hub, huggingface

ROWS = [{"question": f"what is {i} plus\n{i}, then?", "answer": str(2 * i)} for i in range(200)]
ALL = DomainsConfig(n_train=1000, n_validation=1000, n_test=1000)


def source(*paths: Path | str, **changes: Any) -> SourceConfig:
    """Questions and answers of some files."""
    return SourceConfig(
        **{
            "files": tuple(map(str, paths)),
            "prompt": "Q: {question} {{A}}:",
            "check": {"answer": "answer"},
            "reward": "qa",
        }
        | changes
    )


def write(path: Path, rows: list[Any]) -> Path:
    """Rows in the file's own format; a text among JSON lines is written as it is."""
    if path.suffix == ".jsonl":
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps({"version": "1", "data": rows}))
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerow(["question", "answer"])
            writer.writerows([r["question"], r["answer"]] for r in rows)
    else:
        from datasets import Dataset

        table = Dataset.from_list(rows)
        if path.suffix == ".parquet":
            table.to_parquet(path)
        else:
            table.save_to_disk(path.parent / "saved")
            next((path.parent / "saved").glob("*.arrow")).rename(path)
    return path


def everything(domain: Domain) -> dict[str, str]:
    """The split of each prompt; a prompt in two splits is an error."""
    found: dict[str, str] = {}
    for split in datasets.SPLITS:
        for problem in getattr(domain, split):
            assert problem.prompt not in found
            found[problem.prompt] = split
    return found


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("suffix", files.KINDS)
@pytest.mark.filterwarnings("ignore")
def test_every_format_gives_the_same_problems(tmp_path: Path, suffix: str):
    if suffix == ".ndjson":
        path = write(tmp_path / "a.jsonl", ROWS).rename(tmp_path / "a.ndjson")
    else:
        path = write(tmp_path / f"a{suffix}", ROWS)
    domain = datasets.make("qa", source(path), ALL)
    wanted = {f"Q: {r['question']} {{A}}:": r["answer"] for r in ROWS}
    problems = [*domain.train, *domain.validation, *domain.test]
    assert {p.prompt: p.check["answer"] for p in problems} == wanted
    assert len(problems) == len(ROWS)
    reference = datasets.make("qa", source(write(tmp_path / "b.jsonl", ROWS)), ALL)
    assert tuple(domain.train) == tuple(reference.train)


def test_json_lines_named_json_and_a_csv_without_header(tmp_path: Path):
    lines = write(tmp_path / "a.jsonl", ROWS).rename(tmp_path / "a.json")
    bare = tmp_path / "b.csv"
    bare.write_text("".join(f'"what is {i} plus\n{i}, then?",{2 * i}\n' for i in range(200)))
    one = datasets.make("qa", source(lines), ALL)
    other = datasets.make("qa", source(bare, columns=("question", "answer")), ALL)
    assert everything(one) == everything(other)


def test_added_rows_move_no_others(tmp_path: Path):
    before = everything(datasets.make("qa", source(write(tmp_path / "a.jsonl", ROWS[:150])), ALL))
    after = everything(datasets.make("qa", source(write(tmp_path / "b.jsonl", ROWS[::-1])), ALL))
    assert len(before) == 150 and len(after) == 200
    assert {p: after[p] for p in before} == before
    shares = [sum(s == split for s in after.values()) / 200 for split in datasets.SPLITS]
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.06)
    other = everything(datasets.make("qa", source(tmp_path / "a.jsonl"), DomainsConfig(seed=1, n_train=1000)))
    assert other != before


def test_a_prompt_is_in_one_split_even_where_files_repeat_it(tmp_path: Path):
    train = write(tmp_path / "train.jsonl", ROWS[:100] + ROWS[:7])
    held = write(tmp_path / "held.jsonl", ROWS[90:120])
    test = write(tmp_path / "test.jsonl", ROWS[110:130])
    made = source(train, validation_files=(str(held),), test_files=(str(test),))
    domain = datasets.make("qa", made, ALL)
    found = everything(domain)
    for i, row in enumerate(ROWS[:130]):
        wanted = "test" if i >= 110 else "validation" if i >= 90 else "train"
        assert found[f"Q: {row['question']} {{A}}:"] == wanted
    assert domain.data and domain.data.record["repeated"] == 7 + 10 + 10


def test_a_row_may_name_its_split_and_make_many_prompts_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine.py").write_text(
        "def ask(row):\n"
        "    n = int(row['answer']) // 2\n"
        "    split = 'test' if n < 10 else 'left out' if n < 20 else ''\n"
        "    return [] if n % 2 else [dict(row, question=f'{n} {k}', split=split) for k in 'ab']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = write(tmp_path / "a.jsonl", ROWS[:40])
    domain = datasets.make("qa", source(path, fields="mine:ask", validation_share=0.0, test_share=0.0), ALL)
    found = everything(domain)
    assert found == {
        f"Q: {n} {k} {{A}}:": "test" if n < 10 else "train" for n in (*range(0, 10, 2), *range(20, 40, 2)) for k in "ab"
    }  # noqa: E501
    assert domain.data and domain.data.record["elsewhere"] == 10


BAD: list[tuple[Any, str]] = [
    ("{not json", "invalid JSON"),
    ({"answer": "1"}, "no field 'question'"),
    ({"question": "what?"}, "no field 'answer'"),
    ({"question": None, "answer": "1"}, "no field 'question'"),
    ({"question": ["what?"], "answer": "1"}, "field 'question' is of type list, not text"),
    ({"question": "what?", "answer": {"a": 1}}, "field 'answer' is of the wrong type"),
    ({"question": "what?", "answer": []}, "field 'answer' is empty"),
    ([1, 2], "list, where an object with fields is expected"),
    ({"question": "half \ud83d of a pair", "answer": "1"}, "the prompt has a lone surrogate"),
]


@pytest.mark.parametrize("bad, why", BAD, ids=[why for _, why in BAD])
def test_a_bad_row_is_named_by_file_and_line_and_skipped(tmp_path: Path, bad: Any, why: str):
    path = write(tmp_path / "a.jsonl", [*ROWS[:60], "", bad, *ROWS[60:]])
    domain = datasets.make("qa", source(path, max_bad_rows=1), ALL)
    assert len(everything(domain)) == 200
    assert domain.data
    (named,) = domain.data.record["bad"]
    assert named.startswith(f"{path}:62: ") and why in named
    with pytest.raises(
        UserError, match=r"domains\.qa: more than max_bad_rows=0 bad rows; the first is .*a\.jsonl:62"
    ) as e:  # noqa: E501
        datasets.make("qa", source(path, max_bad_rows=0), ALL)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("reward", "check", "good", "bad", "why"),
    [
        ("cw", {"constraints": "wanted"}, {"wanted": [{"kind": "word_count", "count": 3}]},
         {"wanted": [{"kind": "word_count", "count": float("nan")}]}, "takes as count a whole number"),
        ("mdrl_jax.rewards.writing:all_loose", {"constraints": "wanted"}, {"wanted": [{"kind": "plain"}]},
         {"wanted": [{"kind": "plainly"}]}, '"plainly" is not known'),
        ("cw", {"instruction_id_list": "ids", "kwargs": "kwargs"}, {"ids": ["punctuation:no_comma"], "kwargs": [None]},
         {"ids": ["punctuation:no_comma"], "kwargs": [{"words": 3}]}, "takes no parameters; given: words"),
        ("cw", {"instruction_id_list": "ids", "kwargs": "kwargs"}, {"ids": ["punctuation:no_comma"], "kwargs": [None]},
         {"ids": ["punctuation:no_comma"], "kwargs": []}, "1 instruction ids and 0 kwargs"),
        ("mine:own", {"constraints": "wanted"}, {"wanted": [{"kind": "plainly"}]}, {"wanted": ["plainly"]},
         "of the wrong type"),
        ("mine:own", {"cases": "wanted"}, {"wanted": [{"input": 1}]}, {"wanted": [1]}, "of the wrong type"),
        ("code", {"cases": "wanted"}, {"wanted": [{"stdin": "1", "stdout": "2"}]}, {"wanted": [{"stdin": "1"}]},
         "a case must be"),
    ],
)  # fmt: skip
def test_a_row_whose_reply_could_not_be_judged_is_bad(
    tmp_path: Path, reward: str, check: dict[str, str], good: dict[str, Any], bad: dict[str, Any], why: str
):
    rows = [{"question": f"q{i}"} | (bad if i == 5 else good) for i in range(20)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = SourceConfig(files=(str(path),), prompt="{question}", check=check, reward=reward)
    domain = datasets.make("cw", made, ALL)
    assert domain.data and len(everything(domain)) == 19
    (named,) = domain.data.record["bad"]
    assert named.startswith(f"{path}:6: ") and why in named


def test_bad_rows_of_a_csv_file_have_the_lines_of_the_file(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text('question,answer\n"two\nlines",1\nonly one value\n"good",2\n')
    domain = datasets.make("qa", source(path), ALL)
    assert domain.data
    assert domain.data.record["bad"] == [f"{path}:4: 1 values for the 2 columns question, answer"]
    assert set(everything(domain)) == {"Q: two\nlines {A}:", "Q: good {A}:"}


def test_a_quote_that_is_never_closed_costs_one_row(tmp_path: Path):
    """To the end of the file, and up to the next quoted value; a long value is read; places are lines of the file."""
    path = tmp_path / "A.CSV"
    rows = [f"question {i},{i}" for i in range(1000)]
    rows[10], rows[500], rows[700], rows[990] = '"open,1', f"{'long ' * 40_000},1", '"quoted",3', '"open again,1'
    path.write_text("question,answer\n" + "\n".join(rows) + "\n")
    domain = datasets.make("qa", source(path), ALL)
    assert domain.data and [bad.partition(" ")[0] for bad in domain.data.record["bad"]] == [
        f"{path}:12:",
        f"{path}:992:",
    ]
    prompts = list(everything(domain))
    assert len(prompts) == 998 and sum(map(len, prompts)) > 200_000


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"question": "a", "answer": NaN}', "no finite number"),
        ('{"question": NaN, "answer": "1"}', "field 'question' is no finite number"),
        ('{"question": "a", "answer": [1, Infinity]}', "no finite number"),
        ('{"question": "a", "answer": "\\ud800"}', "the check is no text"),
        ('{"question": "a", "answer": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    ],
)
def test_a_value_that_is_none_is_named(tmp_path: Path, line: str, why: str):
    path = tmp_path / "set [1]" / "rows [1].JSONL"  # brackets are no pattern if a folder or a file has this name
    path.parent.mkdir()
    good = [json.dumps({"question": f"q{i}", "answer": i}) for i in range(20)]
    path.write_text("\n".join(["\ufeff" + good[0], line, *good[1:]]))
    domain = datasets.make("qa", source(path if "NaN" in line else path.with_name("*.JSONL")), ALL)
    assert domain.data and domain.data.record["bad_rows"] == 1 and len(everything(domain)) == 20
    assert domain.data.record["bad"][0].startswith(f"{path}:2: ") and why in domain.data.record["bad"][0]


def test_the_first_prompts_of_a_split_have_every_stratum_in_proportion(tmp_path: Path):
    kinds = ["hard"] * 20 + ["easy"] * 60 + ["rare"] * 3
    rows = [{"question": f"{kind} {i}", "answer": i, "kind": kind} for i, kind in enumerate(kinds)]
    path = write(tmp_path / "a.jsonl", rows)
    domain = datasets.make("qa", source(path, stratify_by="kind", test_share=0.0, validation_share=0.0), ALL)
    order = [p.prompt.split()[1] for p in domain.train]
    assert len(order) == 83
    for n in (4, 8, 40, 83):
        for kind in set(kinds):
            assert abs(order[:n].count(kind) - n * kinds.count(kind) / 83) <= 1
    numbers = [p.prompt.split()[2] for p in domain.train if " easy " in p.prompt]
    assert numbers != sorted(numbers)  # within a stratum the order is that of the hash


def articles(path: Path, texts: int, each: int, start: int = 0) -> Path:
    """A file in SQuAD's layout: an article with one passage for every text, with `each` questions about it."""
    passages = [
        {
            "context": f"passage {t}",
            "qas": [{"question": f"question {q} of {t}?", "answers": [{"text": str(q)}]} for q in range(each)],
        }
        for t in range(start, start + texts)
    ]
    return write(path, [{"title": p["context"], "paragraphs": [p]} for p in passages])


def passages(problems: Any) -> list[str]:
    """The passage of each prompt."""
    return [p.prompt.split("\n")[0] for p in problems]


def test_questions_about_one_text_are_in_one_split_and_known_as_a_group(tmp_path: Path):
    made = SourceConfig(preset="squad", files=(str(articles(tmp_path / "squad.json", 240, 5)),))
    domain = datasets.make("qa", made, ALL)
    sets = {split: set(passages(getattr(domain, split))) for split in datasets.SPLITS}
    assert len(everything(domain)) == 1200 and sum(map(len, sets.values())) == 240
    assert len(set.union(*sets.values())) == 240
    np.testing.assert_allclose([len(sets[s]) / 240 for s in datasets.SPLITS], [0.8, 0.1, 0.1], atol=0.06)
    assert domain.data and domain.data.record["groups"] == 240
    # Prompts are sorted by their own keys: the first ones are not all about the same few texts.
    assert len(set(passages(domain.train[:40]))) > 30
    few = tokenize(datasets.make("qa", made, DomainsConfig(n_test=50)), "test", make_tokenizer(), 100)
    assert few.groups is not None and few.groups.shape == (50,)
    texts = passages(few.problems)
    same = [[a == b for b in texts] for a in texts]
    np.testing.assert_array_equal(same, few.groups[:, None] == few.groups[None])
    streamed = SourceConfig(preset="squad", files=made.files, streaming=True)
    held, lazy = (tokenize(datasets.make("qa", s, ALL), "train", make_tokenizer(), 100) for s in (made, streamed))
    np.testing.assert_array_equal(held.groups, lazy.groups)
    assert held.groups is not None and len(set(held.groups)) == len(sets["train"])
    assert "240 groups, 0 prompts left out because their group is in another split" in notes(domain, {"test": few})[0]


def test_the_first_rows_are_of_different_groups_in_the_order_of_the_visit(tmp_path: Path):
    made = SourceConfig(preset="squad", files=(str(articles(tmp_path / "squad.json", 40, 6)),))
    prompts = tokenize(datasets.make("qa", made, ALL), "train", make_tokenizer(), 100)
    order, groups = visit_order(0, "analyze", "qa", len(prompts), 0, len(prompts)), prompts.groups
    assert groups is not None and prompts.n_independent == len(prompts) // 6 > 25
    rows = groups_apart(order, groups)
    assert sorted(rows) == sorted(order)
    for k in range(6):  # the k-th question about every text, in the order of the visit
        some = rows[k * prompts.n_independent : (k + 1) * prompts.n_independent]
        assert len(set(groups[some])) == prompts.n_independent
        wanted = [r for i, r in enumerate(order) if np.count_nonzero(groups[order[:i]] == groups[r]) == k]
        assert some.tolist() == wanted
    assert groups_apart(order, None) is order


def test_samples_of_the_analysis_are_of_different_groups(tmp_path: Path):
    made = SourceConfig(preset="squad", files=(str(articles(tmp_path / "squad.json", 40, 6)),))
    prompts = tokenize(datasets.make("qa", made, ALL), "train", make_tokenizer(), 100)
    config = parse({"analyze": {"prompts": 24, "batch": 4, "path_prompts": 4}, "mesh": {"data": 1}})
    asked: list[np.ndarray] = []

    class Asked(Exception):
        pass

    def sample(params: Any, sets: Any, *rest: Any) -> Any:
        asked.append(sets[0][1])
        raise Asked

    runtime: Any = SimpleNamespace(
        config=config,
        prompts={("qa", "train"): prompts},
        rollouts=SimpleNamespace(sample=sample),
        mesh=SimpleNamespace(shape={"data": 1, "fsdp": 1, "tensor": 1}),
    )
    for first in (0, 4):
        with pytest.raises(Asked):
            samples.draw(runtime, None, "qa", 24, first)
    assert prompts.groups is not None and [len(set(prompts.groups[rows])) for rows in asked] == [24, 24]
    np.testing.assert_array_equal(asked[0][4:], asked[1][:-4])
    samples.check(runtime, ["qa"])
    more = parse({"analyze": {"prompts": 64, "batch": 4, "path_prompts": 4}})
    with pytest.raises(UserError, match=rf"analyze.prompts=64, but qa has {prompts.n_independent} train groups"):
        samples.check(SimpleNamespace(**vars(runtime) | {"config": more}), ["qa"])  # pyright: ignore[reportArgumentType]


def test_a_group_in_several_files_stays_in_test_then_in_validation(tmp_path: Path):
    train = articles(tmp_path / "train.json", 10, 3)
    held = articles(tmp_path / "held.json", 4, 4, start=6)  # texts 6 to 9 again, with one more question each
    test = articles(tmp_path / "test.json", 3, 2, start=8)  # texts 8 and 9 again, with two questions each
    made = SourceConfig(
        preset="squad",
        files=(str(train),),
        validation_files=(str(held),),
        test_files=(str(test),),
        validation_share=0.0,
    )
    domain = datasets.make("qa", made, ALL)
    found = {split: sorted(passages(getattr(domain, split))) for split in datasets.SPLITS}
    assert found["test"] == [f"passage {t}" for t in (10, 10, 8, 8, 9, 9)]
    assert found["validation"] == [f"passage {t}" for t in (6, 6, 6, 6, 7, 7, 7, 7)]
    assert found["train"] == [f"passage {t}" for t in range(6) for _ in range(3)]
    assert domain.data
    record = domain.data.record
    # Of texts 8 and 9 the splits before `test` drop questions 2 and 3 for the group alone, the others as repeats.
    assert (record["groups"], record["group_in_other_split"]) == (11, 2 * 1 + 2 * 2)
    assert record["prompts"] == record["repeated"] + record["group_in_other_split"] + 6 + 8 + 18


def test_a_group_may_be_a_template_and_a_wrong_one_is_said(tmp_path: Path):
    rows = [{"question": str(i), "answer": "1", "book": i % 3, "page": i % 5} for i in range(60)]
    path = write(tmp_path / "a.jsonl", rows)
    made = datasets.make("qa", source(path, prompt="{question}", group_by="{book}/{page}"), ALL)
    groups = {int(p.prompt): p.group for split in datasets.SPLITS for p in getattr(made, split)}
    assert all((groups[i] == groups[j]) == (i % 15 == j % 15) for i in range(60) for j in range(60))
    plain = datasets.make("qa", source(path, prompt="{question}"), ALL)
    assert plain.data and "groups" not in plain.data.record
    assert tokenize(plain, "train", make_tokenizer(), 100).groups is None
    with pytest.raises(UserError, match=r"domains\.qa\.group_by: \{the book\} is no field"):
        datasets.make("qa", source(path, group_by="the book"), ALL)
    with pytest.raises(UserError, match="no field 'shelf'"):
        datasets.make("qa", source(path, group_by="shelf"), ALL)


WRONG: list[tuple[Callable[[Path], SourceConfig], str]] = [
    (lambda p: source(p / "none*.jsonl"), r"domains\.qa: no file .*none\*\.jsonl"),
    (lambda p: source(p / "a.txt"), r"a\.txt is of no known kind"),
    (
        lambda p: source(p / "a.jsonl", prompt="{question.upper}"),
        r"domains\.qa\.prompt: \{question\.upper\} is no field",
    ),
    (lambda p: source(p / "a.jsonl", prompt="{question"), r"domains\.qa\.prompt=.* is no template"),
    (lambda p: source(p / "a.jsonl", fields="gsm9k"), r"domains\.qa\.fields='gsm9k' is not known; known: gsm8k"),
    (lambda p: source(p / "a.jsonl", fields="no_such:f"), r"domains\.qa\.fields='no_such:f' cannot be imported"),
    (lambda p: source("hub:name"), r"'hub:name' names no hub data set"),
    (lambda p: source(p / "a.json"), r"a\.json holds no list of rows"),
    (lambda p: source(p / "a.csv"), r"a\.csv cannot be read: two columns are named 'answer'"),
]


@pytest.mark.parametrize("make, told", WRONG, ids=[told for _, told in WRONG])
def test_what_cannot_be_read_is_one_line(tmp_path: Path, make: Callable[[Path], SourceConfig], told: str):
    write(tmp_path / "a.jsonl", ROWS[:20])
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.csv").write_text("question,answer,answer\nq,1,2\n")
    (tmp_path / "a.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match=told) as caught:
        datasets.make("qa", make(tmp_path), ALL)
    assert "\n" not in str(caught.value)


def test_a_split_of_the_hub_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch):
    import datasets as library

    asked = []

    def load(name: str, subset: str | None, split: str) -> Any:
        asked.append((name, subset, split))
        return library.Dataset.from_list(ROWS[:100] if split == "train" else ROWS[100:])

    monkeypatch.setattr(library, "load_dataset", load)
    monkeypatch.setattr(hub, "away", lambda: "")
    made = source("hub:someone/set:main:train", test_files=("hub:someone/set:dev",), validation_share=0.0)
    domain = datasets.make("qa", made, ALL)
    assert asked == [("someone/set", "main", "train"), ("someone/set", None, "dev")]
    assert (len(domain.train), len(domain.validation), len(domain.test)) == (100, 0, 100)


def test_a_hub_that_is_silent_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The libraries alone would try six times, and wait 10 s each time. A server here accepts and never answers."""
    import datasets as library
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "PATIENCE", 0.3)
    with socket.create_server(("localhost", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://localhost:{server.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(UserError, match=r"hub:someone/silent cannot be downloaded: http://localhost:\d+ does not"):
            huggingface.downloaded("someone/silent")
        with pytest.raises(UserError, match=r"math: hub:a/b:train cannot be read: http://localhost:\d+ does not"):
            files.open_hub("hub:a/b:train", "math")
        assert time.monotonic() - start < 10 and library.config.HF_HUB_OFFLINE


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".json"])
def test_streaming_equals_in_memory(tmp_path: Path, suffix: str):
    path, tokenizer = write(tmp_path / f"a{suffix}", ROWS), make_tokenizer()
    config = DomainsConfig(n_train=100)
    held, streamed = (
        tokenize(datasets.make("qa", source(path, streaming=lazy), config), "train", tokenizer, 100)
        for lazy in (False, True)
    )
    order = visit_order(0, "qa", "qa", 100, 0, 250)
    assert isinstance(held.problems, tuple) and isinstance(streamed.problems, datasets.Lazily)
    assert [held.tokens[i] for i in order] == [streamed.tokens[i] for i in order]
    assert [held.problems[i] for i in order] == [streamed.problems[i] for i in order]
    assert held.record == streamed.record and len(streamed) == 100


def test_an_interrupted_stream_goes_on_where_it_was(tmp_path: Path):
    """A second process, which builds everything anew, visits what the first would have."""
    path, tokenizer = write(tmp_path / "a.jsonl", ROWS), make_tokenizer()

    def visit(first: int, last: int) -> list[Problem]:
        domain = datasets.make("qa", source(path, streaming=True), DomainsConfig(n_train=50))
        prompts = tokenize(domain, "train", tokenizer, 100)
        return [
            prompts.problems[i]
            for step in range(first, last)
            for i in visit_order(0, "qa", "qa", len(prompts), step * 16, 16)
        ]

    assert visit(0, 3) + visit(3, 10) == visit(0, 10)
    assert len({p.prompt for p in visit(0, 4)}) == 50  # 64 visits: all of them, the first ones again


def test_a_file_that_changes_under_a_stream_is_said(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", ROWS)
    domain = datasets.make("qa", source(path, streaming=True), ALL)
    path.write_text("{}\n")
    with pytest.raises(UserError, match="a data file was changed"):
        domain.train[5]


def test_a_csv_row_that_is_no_text_any_more_is_said(tmp_path: Path):
    path = write(tmp_path / "a.csv", ROWS[:50])
    domain = datasets.make("qa", source(path, streaming=True), ALL)
    path.write_bytes(b"question,answer\n" + b'\xff",\n' * 4000)
    with pytest.raises(UserError, match="a data file was changed"):
        domain.train[5]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_file_that_cannot_be_opened_is_said(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / f"a{suffix}", ROWS[:5])

    def refuse(self: Path, *args: Any, **named: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    table = files.open_table(path, ("question", "answer"))
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=rf"a\{suffix} cannot be read: Permission denied"):
        list(table.scan())


@pytest.mark.parametrize("module", ["builtins", "datasets.exceptions"])
def test_an_error_without_a_message_is_said_by_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str):
    import datasets as library

    silent = type("Silent", (ValueError if module == "builtins" else Exception,), {"__module__": module})

    def load(*args: Any, **named: Any) -> Any:
        raise silent

    monkeypatch.setattr(library, "load_dataset", load)
    with pytest.raises(UserError, match=r"a\.parquet cannot be read: Silent$"):
        files.open_table(tmp_path / "a.parquet", ())


def test_a_contest_without_a_task_is_a_bad_row(tmp_path: Path):
    cases = {"inputs": ["1"], "outputs": ["2"]}
    rows = [{"question": f"task {i}", "input_output": cases} for i in range(5)]
    path = write(tmp_path / "a.jsonl", [*rows, {"question": "", "input_output": cases}])
    domain = datasets.make("code", SourceConfig(preset="apps", files=(str(path),), max_bad_rows=1), ALL)
    assert len(everything(domain)) == 5
    assert domain.data and "a.jsonl:6: wrong field: no task in any of question" in domain.data.record["bad"][0]


def test_an_unknown_domain_is_named_with_the_known_ones():
    with pytest.raises(UserError, match="scored_domains names 'law', which is not a domain; known: code, math, qa, cw"):
        make_domains(("math", "law"), ALL)


def test_long_prompts_are_left_out_and_counted(tmp_path: Path):
    rows = [{"question": " ".join(["x"] * n), "answer": "1"} for n in range(1, 101)]
    path, tokenizer = write(tmp_path / "a.jsonl", rows), make_tokenizer()
    made = source(path, prompt="{question}", validation_share=0.0, test_share=0.0)
    domain = datasets.make("qa", made, ALL)
    limit = 40  # of them two are the plain template's words
    prompts = tokenize(domain, "train", tokenizer, limit)
    assert prompts.record["prompts"] == limit - 2 and prompts.record["too_long"] == 100 - (limit - 2)
    assert max(map(len, prompts.tokens)) == limit
    assert "train 38 (62 too long)" in notes(domain, {"train": prompts})[0]
    few = tokenize(datasets.make("qa", made, DomainsConfig(n_train=10)), "train", tokenizer, limit)
    assert few.tokens == prompts.tokens[:10]
    with pytest.raises(UserError, match="all of 100 train prompts are longer than the 2 tokens"):
        tokenize(domain, "train", tokenizer, 2)


def test_the_fingerprint_sees_prompts_and_checks(tmp_path: Path):
    tokenizer = make_tokenizer()

    def fingerprint(name: str, rows: list[Any]) -> str:
        domain = datasets.make("qa", source(write(tmp_path / name, rows)), ALL)
        return tokenize(domain, "train", tokenizer, 100).record["fingerprint"]

    changed = [dict(r, answer="7") if i == 50 else r for i, r in enumerate(ROWS)]
    assert fingerprint("a.jsonl", ROWS) == fingerprint("b.jsonl", ROWS[::-1])
    assert fingerprint("a.jsonl", ROWS) != fingerprint("c.jsonl", changed)


def test_the_config_puts_a_data_set_in_a_domains_place(tmp_path: Path):
    c: Any = default()
    c.domains.qa.files = (str(write(tmp_path / "a.jsonl", ROWS)),)
    c.domains.qa.prompt, c.domains.qa.reward = "{question}", "qa"
    c.domains.qa.check = {"answer": "answer"}
    c.domains.separator = "</think>"
    config = parse(c)
    made = make_domains(("qa", "math"), config.domains)
    assert made["qa"].train[0].check.keys() == {"answer", "separator"}
    plain = parse(default())
    assert made["math"] == make_domains(("math",), plain.domains)["math"]
    assert made["math"].data is None and made["qa"].data is not None
