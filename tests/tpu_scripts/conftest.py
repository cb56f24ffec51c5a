"""The fixture of all tests of the scripts."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cloud import ROOT, Cloud


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One commit of the scripts and three other files, one of them in a folder that git ignores."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "tpu_scripts", folder / "tpu_scripts")
    (folder / "runs").mkdir()
    for name, text in {".gitignore": "runs/\n", "kept.txt": "1", "deleted.txt": "1", "runs/big": "1"}.items():
        (folder / name).write_text(text)
    git = {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    git |= {f"GIT_{who}_DATE": "2026-01-02T03:04:05Z" for who in ("AUTHOR", "COMMITTER")}
    commit = "git init -q --template= && git add -A && git commit -qm x"
    subprocess.run(["bash", "-c", commit], cwd=folder, env=os.environ | git, check=True)
    return folder


@pytest.fixture
def cloud(tmp_path: Path, checkout: Path) -> Iterator[Cloud]:
    made = Cloud(tmp_path, checkout)
    yield made
    for leader in made.folder.glob("workers/*/mdrl/run-*/leader"):
        subprocess.run(["pkill", "-KILL", "-g", leader.read_text().strip(), "-f", str(made.folder)])
