"""Folders as people have them: chat models, odd checkpoints, LoRA adapters; what they become when written."""

import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from mdrl_jax.commands import evaluate, export, generate, push
from mdrl_jax.commands.loaded import load_folder
from mdrl_jax.config import default, parse
from mdrl_jax.domains import vocabulary
from mdrl_jax.domains.chat import render
from mdrl_jax.errors import UserError
from mdrl_jax.main import main
from mdrl_jax.model import huggingface, tokens
from mdrl_jax.model.transformer import Decoder
from mdrl_jax.parallel.sharding import MeshConfig, make_mesh
from mdrl_jax.report.screen import terminal
from mdrl_jax.report.tables import harness, matrix
from mdrl_jax.workfolder import WorkFolder

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("fast_compile")

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TARGET = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random chat model of two small layers, written by torch, with a tokenizer of words and a chat template."""
    torch = pytest.importorskip("torch", reason="the models are made by torch")
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = vocabulary.make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "rope_theta": 500.0},
        **{"eos_token_id": 5, "bos_token_id": 4, "pad_token_id": 3, "tie_word_embeddings": True},
    )
    model = transformers.LlamaForCausalLM(config)
    model.generation_config.eos_token_id, model.generation_config.temperature = [5, 6], 0.5
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(chat: Path, tmp_path: Path) -> Path:
    """A copy of `chat` that a test may change."""
    return Path(shutil.copytree(chat, tmp_path / "model"))


def params(folder: Path, base: Path | None = None) -> Any:
    model = Decoder(huggingface.read_config(folder, base))
    return jax.device_get(huggingface.load(folder, model, make_mesh(MeshConfig(), jax.devices()[:1]), base))


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def same(a: Any, b: Any) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    status = main(["mdrl", *flags])
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1), err
    return err


def test_a_prompt_is_the_users_message_of_the_chat_template(chat: Path, tmp_path: Path) -> None:
    """By `apply_chat_template`; a file of turns likewise; `raw` and models without a template get the bare text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat)
    turns = [{"role": r, "content": c} for r, c in (("user", "add 1"), ("assistant", "2"), ("user", "plus 3"))]

    def theirs(messages: list[dict[str, str]]) -> list[int]:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    def ours(prompt: str | None = None, system: str | None = None, file: str | None = None, raw: bool = False):
        return generate._tokenized(tokenizer, generate._conversation(prompt, system, file), raw)

    assert ours("add 1") == theirs(turns[:1])
    assert ours("add 1", "terse") == theirs([{"role": "system", "content": "terse"}, *turns[:1]])
    assert ours("add 1", raw=True) == tokenizer("add 1").input_ids != theirs(turns[:1])
    (tmp_path / "turns.json").write_text(json.dumps(turns))
    (tmp_path / "turns.jsonl").write_text("\ufeff" + "\n".join(map(json.dumps, turns)))
    for name in ("turns.json", "turns.jsonl"):
        assert ours(file=str(tmp_path / name)) == theirs(turns)
    tokenizer.chat_template = None
    assert ours("add 1") == tokenizer("add 1").input_ids
    with pytest.raises(UserError, match="no chat template"):
        ours("add 1", "terse")
    tokenizer.chat_template = {"tool_use": TEMPLATE, "rag": TEMPLATE}
    with pytest.raises(UserError, match="tool_use, rag"):
        render(tokenizer, turns)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt=a", "--messages=b"], "--messages"),
        (["--messages=absent"], "absent"),
        (["--messages=LAST"], "the last one must be the user's"),
        (["--messages=FORM"], "a JSON list of"),
        (["--messages=ROLE"], "has the role 'wizard'; known: system,"),
        (["--prompt=a\udcffb"], "the user's message is no Unicode text: '\\udcff' at character 1"),
        (["--prompt=a", "--system=\ud800"], "the system's message is no Unicode text"),
        (["--prompt_ids=1", "--system=a"], "--system needs"),
        (["--prompt=a", "--raw", "--system=a"], "--raw takes"),
        (["--prompt_ids=1,100000"], "100000"),
        (["--prompt_ids=1", "--base=DIR"], "--base=DIR is for LoRA adapters"),
    ],
)
def test_a_wrong_prompt_ends_in_one_line(flags, words, chat, tmp_path, capsys) -> None:
    (tmp_path / "LAST").write_text('[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]')
    (tmp_path / "FORM").write_text('{"role": "user"}')
    (tmp_path / "ROLE").write_text('{"role": "wizard", "content": "a"}')
    flags = [re.sub("=(LAST|FORM|ROLE)$", rf"={tmp_path}/\1", flag) for flag in flags]
    assert words in refused(capsys, "generate", f"--model={chat}", *flags)


def test_without_a_tokenizer_ids_go_in_and_out(folder: Path, capsys) -> None:
    for file in folder.glob("*token*"):
        file.unlink()
    assert main(["mdrl", "generate", f"--model={folder}", "--prompt_ids=7,8", "--max_new_tokens=3", "--top_k=1"]) == 0
    ids = [int(i) for i in capsys.readouterr().out.split()]
    assert len(ids) == 3 or ids[-1] in (5, 6)
    assert "has no tokenizer, which text needs; give token ids by --prompt_ids" in refused(
        capsys, "generate", f"--model={folder}", "--prompt=add 1"
    )


def test_the_end_of_sequence_is_that_of_all_files(folder: Path) -> None:
    tokenizer = tokens.load_tokenizer(folder)
    end = tokenizer.eos_token_id
    assert tokens.eos_ids(tokenizer, folder) == (end, 5, 6, end)
    assert tokens.eos_ids(None, folder) == (5, 6)
    edit(folder / "generation_config.json", eos_token_id=240)
    with pytest.raises(UserError, match=r"generation_config.json is id 240, which can never be drawn.*240 rows"):
        tokens.eos_ids(tokenizer, folder, 240)
    edit(folder / "generation_config.json", eos_token_id="<end>")
    with pytest.raises(UserError, match="eos_token_id='<end>' is not valid"):
        tokens.eos_ids(tokenizer, folder)
    with pytest.raises(UserError, match="completions could never end"):
        tokens.eos_ids(None, None)


def test_odd_checkpoints_are_read_as_transformers_reads_them(folder: Path, chat: Path) -> None:
    """Weights without the prefix; an index left beside one file; a head of its own in a model that should be tied."""
    truth = params(chat)
    rewrite(folder, lambda t: {name.removeprefix("model."): x for name, x in t.items()})
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "absent.safetensors"}}')
    assert same(params(folder), truth)
    tables = load_file(chat / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(folder, lambda t: t | {"lm_head.weight": tables.copy()})
    assert huggingface.read_config(folder).tied  # an equal head is the embedding
    rewrite(folder, lambda t: t | {"lm_head.weight": 2 * tables})
    assert not huggingface.read_config(folder).tied
    found = params(folder)
    np.testing.assert_array_equal(found.pop("unembedding"), 2 * tables.T)
    assert same(found, truth)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    np.testing.assert_array_equal(theirs.lm_head.weight.detach().numpy(), 2 * tables)


def test_numbers_that_are_not_finite_are_refused_by_name(folder: Path) -> None:
    def spoil(tensors):
        tensors[TARGET][0, 1] = np.nan
        return tensors

    rewrite(folder, spoil)
    with pytest.raises(UserError, match=f"{TARGET} has 1 numbers that are NaN or infinite"):
        params(folder)


def test_weights_without_permission_are_not_called_absent(chat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = open

    def denied(file: Any, *args: Any, **kwargs: Any) -> Any:
        if str(file).endswith(".safetensors"):
            raise PermissionError(13, "Permission denied", str(file))
        return real(file, *args, **kwargs)

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(UserError, match="weights in .* cannot be read: .*Permission denied"):
        params(chat)


def adapter(folder: Path, base: Path, head: float | None = None, **fields: Any) -> dict[str, np.ndarray]:
    """Writes an adapter of rank 2 on a query projection and the embedding; the merged tensors, by its definition.

    With `use_rslora` the names are those of an adapter on a model of images and text. With `head` the change of the
    embedding is written once more, times `head`, as that of the unembedding.
    """
    whole, rng = load_file(base / "model.safetensors"), np.random.default_rng(0)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": str(base)}
    config |= {"ensure_weight_tying": True} | fields
    scale, before = config["lora_alpha"] / (2**0.5 if config.get("use_rslora") else 2), "base_model.model."
    table, norm = "model.embed_tokens", "model.norm.weight"
    rows, width = whole[f"{table}.weight"].shape
    a, b = (rng.normal(size=s).astype(np.float32) for s in ((2, width), (16, 2)))
    embed_a, embed_b = (rng.normal(size=s).astype(np.float32) for s in ((2, rows), (width, 2)))
    q = TARGET.removesuffix(".weight")
    tensors = {f"{q}.lora_A.weight": a, f"{q}.lora_B.weight": b, norm: 3 * whole[norm]}
    tensors |= {f"{table}.lora_embedding_A": embed_a, f"{table}.lora_embedding_B": embed_b}
    if head is not None:
        tensors |= {"lm_head.lora_A.weight": head * embed_b.T, "lm_head.lora_B.weight": embed_a.T}
    folder.mkdir()
    if config.get("use_rslora"):
        tensors = {name.replace("model.", "model.language_model."): x for name, x in tensors.items()}
    save_file(
        {before + name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps(config))
    changed = {TARGET: scale * b @ a, f"{table}.weight": scale * (embed_b @ embed_a).T}
    return whole | {norm: 3 * whole[norm]} | {name: whole[name] + x for name, x in changed.items()}


@pytest.mark.parametrize(("rslora", "head"), [(False, None), (True, None), (False, 1.0)])
def test_a_lora_adapter_is_read_as_the_merged_model(
    chat: Path, folder: Path, tmp_path: Path, rslora: bool, head: float | None
) -> None:
    merged = adapter(tmp_path / "adapter", chat, head, use_rslora=rslora)
    rewrite(folder, lambda _: merged)
    truth = params(folder)
    for found in (params(tmp_path / "adapter"), params(tmp_path / "adapter", chat)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, truth)
    assert not same(truth, params(chat))
    assert load_folder(str(tmp_path / "adapter")).folder == chat


def test_patterns_of_an_adapter_are_of_the_names_in_its_file(chat: Path, tmp_path: Path) -> None:
    q = TARGET.removesuffix(".weight").replace("model.", "model.language_model.")
    whole = {"use_rslora": True, "r": 2, "lora_alpha": 6}
    odd = {
        "r": 4,
        "rank_pattern": {q: 2, "embed_tokens": 2},
        "lora_alpha": 1,
        "alpha_pattern": {q: 6, "embed_tokens": 6},
    }
    adapter(tmp_path / "plain", chat, **whole)
    adapter(tmp_path / "odd", chat, **whole)
    fields = json.loads((tmp_path / "odd" / "adapter_config.json").read_text())
    (tmp_path / "odd" / "adapter_config.json").write_text(json.dumps(fields | odd))
    assert same(params(tmp_path / "odd"), params(tmp_path / "plain"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"use_dora": True}, "use_dora=True"),
        ({"ensure_weight_tying": False}, "changes the embedding, but not the unembedding"),
        ({"head": 2.0}, "changes lm_head.weight, which its base model does not have"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights='pissa_niter_16'"),
        ({"alpha_pattern": {"q_proj": "6"}}, "alpha_pattern 'q_proj' is '6'; it must be a number"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern is .*; it must map modules to numbers"),
        ({"rank_pattern": {"q_proj(": 2}}, r"rank_pattern 'q_proj\(' is no regular expression"),
        ({"r": 4}, "gives model.*weight the rank 4, but its matrices have 2"),
        ({"r": 4, "rank_pattern": {"q_proj": 2}}, "gives model.embed_tokens.weight the rank 4"),
        ({"base_model_name_or_path": "some/model"}, "'some/model' is no folder here; give .* --base=DIR"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused(fields, words, chat, tmp_path) -> None:
    adapter(tmp_path / "adapter", chat, **fields)
    with pytest.raises(UserError, match=words):
        params(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "has no tensors, so the LoRA adapter changes nothing"),
        (
            {"lora_A": np.zeros(0, np.float32)},
            r"has the shape \[0\]; it must be a matrix .*; with DeepSpeed ZeRO-3, gather",
        ),
        ({"lora_A": np.ones(16, np.float32)}, r"has the shape \[16\]"),
        ({"lora_A": np.ones((2, 16), np.int8)}, "has the dtype I8; save it as a float"),
    ],
)
def test_adapter_tensors_that_cannot_be_meant_are_refused(tensors, words, chat, tmp_path) -> None:
    adapter(tmp_path / "adapter", chat)
    stem = f"base_model.model.{TARGET.removesuffix('.weight')}"
    whole = {f"{stem}.lora_B.weight": np.ones((16, 2), np.float32)} if tensors else {}
    whole |= {f"{stem}.{name}.weight": x for name, x in tensors.items()}
    save_file(whole, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(UserError, match=words):
        params(tmp_path / "adapter")


def test_an_adapter_may_lie_beside_the_config_of_its_base(chat: Path, tmp_path: Path) -> None:
    """Some trainers leave it there; a folder with the weights of a whole model is no adapter."""
    adapter(tmp_path / "adapter", chat)
    truth = params(tmp_path / "adapter")
    shutil.copy(chat / "config.json", tmp_path / "adapter")
    assert same(params(tmp_path / "adapter"), truth) and not same(truth, params(chat))
    shutil.copy(chat / "model.safetensors", tmp_path / "adapter")
    assert same(params(tmp_path / "adapter"), params(chat))


def test_a_change_of_lm_head_alone_is_refused_where_the_base_stores_it_beside_the_embedding(
    chat: Path, folder: Path, tmp_path: Path
) -> None:
    whole = load_file(chat / "model.safetensors")
    rewrite(folder, lambda _: whole | {"lm_head.weight": whole["model.embed_tokens.weight"]})
    adapter(tmp_path / "adapter", folder)
    rows, width = whole["model.embed_tokens.weight"].shape
    pair = {"lora_A": np.ones((2, width), np.float32), "lora_B": np.ones((rows, 2), np.float32)}
    save_file(
        {f"base_model.model.lm_head.{name}.weight": x for name, x in pair.items()},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    with pytest.raises(UserError, match="changes lm_head alone"):
        params(tmp_path / "adapter")


def test_an_adapter_of_another_model_is_refused(chat: Path, folder: Path, tmp_path: Path) -> None:
    adapter(tmp_path / "adapter", chat)
    rewrite(folder, lambda t: {name: x for name, x in t.items() if name != TARGET})
    with pytest.raises(UserError, match=f"changes {TARGET}, which its base model does not have"):
        params(tmp_path / "adapter", folder)


def test_what_is_written_has_all_that_the_source_had(chat: Path, tmp_path: Path, monkeypatch) -> None:
    """Special tokens, generation settings, chat template; modes of the umask; torch gives the same logits."""
    work = WorkFolder(tmp_path / "run")
    c = default()
    c.model.path, c.stages, c.scored_domains = str(chat), ("math",), ("math",)
    work.open(parse(c))
    rows = [
        {"stage": s, "domain": "math", "score": 12.5, "stderr": e, "n_prompts": 3, "k": 2}
        for s, e in (("base", None), ("math", 1.0))
    ]
    (work.root / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "out" / "lost+found").mkdir(parents=True)  # as a new file system has it
    before = os.umask(0o027)
    try:
        export.run(str(work.root), "base", str(tmp_path / "out"))
    finally:
        os.umask(before)
    out = tmp_path / "out"
    assert {oct(f.stat().st_mode & 0o777) for f in out.iterdir() if f.is_file()} == {"0o640"}
    old, new = (json.loads((d / "config.json").read_text()) for d in (chat, out))
    assert new == old | {"dtype": "float32"}
    end = tokens.load_tokenizer(chat).eos_token_id
    generation = json.loads((chat / "generation_config.json").read_text())
    assert json.loads((out / "generation_config.json").read_text()) == generation | {"eos_token_id": [end, 5, 6]}
    assert tokens.load_tokenizer(out).chat_template == TEMPLATE
    ours, theirs = (transformers.AutoModelForCausalLM.from_pretrained(d) for d in (out, chat))
    torch = pytest.importorskip("torch")
    ids = torch.arange(6)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=0)
    assert ours.generation_config.eos_token_id == [end, 5, 6]
    card = (out / "README.md").read_text()
    assert "| base | 12.5 |" in card and f"mdrl export --workdir={work.root} --stage=base" in card
    assert f"\n`{chat}`\n" in card and card.startswith("---\nlibrary_name: transformers\n")
    for field, value, words in (
        ("adapter", "lora", f"`{chat}` with the LoRA adapter `lora`"),
        ("weights", "random", f"random weights in the sizes of `{chat}`"),
    ):
        recorded = json.loads((work.root / "config.json").read_text())
        recorded["config"]["model"][field] = value
        (work.root / "config.json").write_text(json.dumps(recorded))
        assert words in export.card(work, "base", "mdrl export")


def test_a_disk_that_is_full_leaves_nothing_behind(chat: Path, tmp_path: Path, monkeypatch) -> None:
    def write(*_: Any) -> None:
        raise OSError(28, "No space left on device", "tokenizer.json")

    monkeypatch.setattr(tokens, "copy", write)
    loaded = load_folder(str(chat))
    for out in (tmp_path / "new", tmp_path / "mounted"):
        (tmp_path / "mounted").mkdir(exist_ok=True)
        with pytest.raises(OSError, match="No space left"):
            huggingface.save(out, loaded.params, loaded.model.config, source=chat)
        assert [p.name for p in tmp_path.rglob("*")] == ["mounted"]


RESULTS = {  # in the form of lm-evaluation-harness 0.4.13
    "results": {
        "capitals": {"alias": "capitals", "acc,none": 0.75, "acc_stderr,none": 0.25, "acc_norm,none": 1.0},
        "wikitext": {"alias": "wikitext", "word_perplexity,none": 0.5, "word_perplexity_stderr,none": "N/A"},
        "gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": "N/A"},
    },
    "higher_is_better": {"capitals": {"acc": True}, "wikitext": {"word_perplexity": False}},
    "n-samples": {"capitals": {"original": 4, "effective": 4}},
}


def test_results_of_the_harness_stand_beside_ours(tmp_path: Path) -> None:
    file = tmp_path / "out" / "model" / "results_2026.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(RESULTS))
    found = harness.read(tmp_path / "out")
    assert found == harness.read(file)
    assert [(row["domain"], row["metric"], row["score"], row["stderr"], row["n_prompts"]) for row in found] == [
        ("capitals", "acc,none", 75.0, 25.0, 4),
        ("gsm8k", "exact_match,strict-match", 50.0, float("inf"), 0),
    ]
    ours = matrix.build([{"stage": "model", "index": 0, "rewards": {"math": [[1.0], [0.0]]}}])
    console = Console(file=io.StringIO(), width=100)
    console.print(terminal.score_table(ours, found))
    lines = console.file.getvalue().splitlines()  # type: ignore
    assert lines[2].split() == ["after", "stage", "math", "mean", "capitals", "gsm8k"]
    assert lines[4].split()[-3:] == ["75.0", "±25.0", "50.0"]
    file.write_text(json.dumps(RESULTS | {"higher_is_better": None, "n-samples": []}))
    assert [row["n_prompts"] for row in harness.read(file)] == [0, 0, 0]
    odd = json.loads(json.dumps(RESULTS))
    odd["n-samples"]["capitals"]["effective"] = "ten"
    odd["results"]["capitals"]["acc_stderr,none"] = float("nan")
    file.write_text(json.dumps(odd))
    assert (harness.read(file)[0]["stderr"], harness.read(file)[0]["n_prompts"]) == (float("inf"), 0)
    for text in ("[]", "{", '{"results": {}}', '{"results": {"a": {"ppl,none": 9.0}}}'):
        file.write_text(text)
        with pytest.raises(UserError, match=str(file)):
            harness.read(file)
    file.unlink()
    with pytest.raises(UserError, match="no results_"):
        harness.read(tmp_path)


def test_push_lists_first_and_then_sends_the_folder(chat: Path, folder: Path, capsys) -> None:
    for name in (".cache/huggingface/refs", "sub/.hidden", "lost+found/x"):  # as `hf download` and file systems leave
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("")

    class Api:
        def __init__(self):
            self.calls: list[tuple[str, Any, Any]] = []

        def create_repo(self, *args: Any, **kwargs: Any) -> None:
            self.calls.append(("create_repo", args, kwargs))

        def upload_folder(self, *args: Any, **kwargs: Any) -> None:
            self.calls.append(("upload_folder", args, kwargs))

    api = Api()
    push.run(str(folder), "me/model", dry_run=True, api=api)
    listed = capsys.readouterr().out
    names = {file.name for file in chat.iterdir()}
    assert (
        not api.calls
        and "nothing was sent" in listed
        and names == {line.split()[0] for line in listed.splitlines()[1:]}
    )
    push.run(str(chat), "me/model", private=True, api=api)
    assert [name for name, _, _ in api.calls] == ["create_repo", "upload_folder"]
    assert api.calls[0][2] == {"private": True, "exist_ok": True}
    assert api.calls[1][2]["folder_path"] == chat and api.calls[1][2]["repo_id"] == "me/model"
    for model, repo, words in (
        (chat, "model", "OWNER/NAME"),
        (chat, "a/b c", "a/b c"),
        (chat / "no", "a/b", "not exist"),
    ):
        with pytest.raises(UserError, match=words):
            push.run(str(model), repo, dry_run=True)


def test_a_dry_run_names_every_domain_that_is_wrong(chat: Path, tmp_path: Path, capsys) -> None:
    c = default()
    c.scored_domains, c.stages = ("math", "qa", "cw"), ("math",)
    c.domains.n_test, c.domains.n_validation = 4, 4
    c.rollout.prompt_buckets = (64,)
    rows = [{"question": f"add {i}", "answer": i} for i in range(40)]
    (tmp_path / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"prompt": "{question}", "check": {"answer": "answer"}, "reward": "math"}
    c.domains.math.update({**source, "files": (str(tmp_path / "math.jsonl"),)})
    c.domains.qa.update({**source, "files": ("hub:misspelled",), "test_files": ("absent.jsonl",)})
    words = "domains.qa: 'hub:misspelled' names no hub data set.*; domains.qa: no file 'absent.jsonl'"
    with pytest.raises(UserError, match=words) as e:
        evaluate.dry_run(str(chat), parse(c))
    out = capsys.readouterr().out
    assert "math: 40 prompts in 40 rows" in out and "<user> add " in out and "its check: {'answer': " in out
    assert "cw: procedural" in out and "domain cw" not in str(e.value)
    lines = tmp_path / "math.jsonl"
    lines.write_text(lines.read_text() + '{"question": "add 3"}\n')
    c.scored_domains = ("math",)
    evaluate.dry_run(str(chat), parse(c), "json")
    said = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert "math: 40 prompts in 41 rows" in said[0] and f"skipped a bad row, {lines}:41: no field 'answer'" in said[0]
    adapter(tmp_path / "adapter", chat)
    evaluate.dry_run(str(tmp_path / "adapter"), parse(c), base=str(chat))
    assert "<user> add " in capsys.readouterr().out
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(chat / "config.json", bare)
    evaluate.dry_run(str(bare), parse(c))
    out = capsys.readouterr().out
    assert "has no tokenizer" in out and "skipped a bad row" in out and "math: train" in out and "<user>" not in out
    for model, base, words in (
        (str(chat), str(chat), "is for LoRA adapters"),
        (str(tmp_path / "absent"), None, "does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            evaluate.dry_run(model, parse(c), base=base)
    c.domains.math.reward = "nowhere:f"
    with pytest.raises(UserError, match="reward 'nowhere:f' cannot be imported"):
        evaluate.dry_run(str(chat), parse(c))
