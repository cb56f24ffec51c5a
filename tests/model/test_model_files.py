"""Model folders of strangers: files that are no regular files, code of their own, names that leave the folder."""

import json
import os
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from mdrl_jax.commands.rollback import _dtype
from mdrl_jax.config import EMBEDDED_MODEL
from mdrl_jax.errors import UserError
from mdrl_jax.model import huggingface, tokens
from mdrl_jax.model.transformer import Decoder
from mdrl_jax.parallel.sharding import MeshConfig, make_mesh
from mdrl_jax.records import regular
from mdrl_jax.runtime import model_folder


@pytest.fixture
def folder(shared: Path, tmp_path: Path) -> Path:
    made = tmp_path / "model"
    shutil.copytree(shared / "models" / "tinystories-656k", made)
    return made


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    """Ends a test that waits for a writer, which would otherwise never come."""

    def late(*_: object) -> None:
        raise TimeoutError("the file was opened")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def load(folder: Path) -> None:
    model = Decoder(huggingface.read_config(folder))
    tokens.load_tokenizer(folder)
    huggingface.load(folder, model, make_mesh(MeshConfig(), jax.devices()[:1]))
    _dtype(folder)


def test_only_regular_files_and_links_to_them_are_opened(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    (tmp_path / "link").symlink_to(file)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link to a pipe").symlink_to(tmp_path / "pipe")
    (tmp_path / "link to nothing").symlink_to(tmp_path / "absent")
    for good in ("file", "link", "absent", "link to nothing"):
        assert regular(tmp_path / good) == tmp_path / good
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket"))
        bad = {"pipe": "a named pipe", "link to a pipe": "a named pipe", "socket": "a socket", "": "a folder"}
        for name, kind in bad.items():
            with pytest.raises(UserError, match=f"is {kind}; it must be a regular file"):
                regular(tmp_path / name)
    with pytest.raises(UserError, match="is a device"):
        regular("/dev/zero")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("target", ["pipe", "/dev/zero"])
def test_a_pipe_or_a_device_in_a_model_folder_is_named(folder: Path, name: str, target: str) -> None:
    load(folder)
    (folder / name).unlink()
    if target == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to(target)
    with pytest.raises(UserError, match=f"{name} is a .*; it must be a regular file"):
        load(folder)


@pytest.mark.parametrize("name", ["shard.safetensors", "model.safetensors.index.json"])
def test_a_pipe_among_several_files_is_named(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / "shard.safetensors")
    index = {"weight_map": {"lm_head.weight": "shard.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=f"{name} is a named pipe"):
        load(folder)


@pytest.mark.parametrize("name", ["../other.safetensors", "/tmp/other.safetensors", "a/b.safetensors", ".."])
def test_an_index_names_only_files_of_its_folder(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(UserError, match="only name files of its own folder"):
        load(folder)


def test_code_in_a_tokenizer_folder_never_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran, file = tmp_path / "ran", folder / "tokenizer_config.json"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    fields = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what transformers asks a person if it may ask
    with pytest.raises(UserError, match="own Python code, which is never run") as e:
        tokens.load_tokenizer(folder)
    assert not ran.exists() and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("tokenizer", {}),
        ("tokenizer", {"version": 5}),
        ("tokenizer", {"model": {"type": "BPE", "vocab": 3, "merges": []}}),
        ("tokenizer", [1]),
        ("tokenizer_config", [1]),
        ("tokenizer_config", {"tokenizer_class": 5}),
        ("tokenizer_config", {"added_tokens_decoder": 5}),
    ],
)
def test_a_tokenizer_of_another_structure_is_refused(folder: Path, name: str, fields: object) -> None:
    file = folder / f"{name}.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | fields if isinstance(fields, dict) and fields else fields))
    with pytest.raises(UserError, match=rf"^{re.escape(str(folder))} has no tokenizer that can be read: .") as e:
        tokens.load_tokenizer(folder)
    assert "\n" not in str(e.value)


def test_a_model_of_the_hub_is_read_from_its_cache_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The code of `huggingface_hub` on a cache folder in its layout, as a download leaves it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface.downloaded.cache_clear()
    known, commit = tmp_path / "models--someone--tiny", "0123456789" * 4
    snapshot = known / "snapshots" / commit
    shutil.copytree(EMBEDDED_MODEL, snapshot)
    (known / "refs").mkdir()
    (known / "refs" / "main").write_text(commit)
    for path in ("hub:someone/tiny", "hub:someone/tiny@main"):
        assert model_folder(path) == snapshot
    assert huggingface.read_config(model_folder("hub:someone/tiny")) == huggingface.read_config(EMBEDDED_MODEL)
    for wrong in ("hub:someone/other", "hub:", "hub:a/b/c"):
        with pytest.raises(UserError, match=f"the model {wrong} cannot be downloaded") as caught:
            model_folder(wrong)
        assert "\n" not in str(caught.value)
    huggingface.downloaded.cache_clear()
