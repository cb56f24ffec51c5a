"""A cloud project with one TPU, as `gcloud.py` beside it plays it, and a checkout to copy to its workers."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONFIG = "--config=configs/paper.py"

# Steps, as `step` calls them.
CREATE, QUEUE, DELETE = (f"queued-resources {verb}" for verb in ("create", "describe", "delete"))
START = ["tpu-vm scp", "ssh all install", "ssh all launch"]
COLLECT = "storage rsync"

# What a worker has on its path, beside the system's own.
MACHINE = {
    "hostname": "echo w-$FAKE_WORKER",
    "bwrap": "exit 1",
    "sudo": 'echo "$*" >> "$FAKE_CLOUD/sudo.txt"',
    "mountpoint": '[ -L "$2" ]',
    "gcsfuse": """echo "$*" >> "$FAKE_CLOUD/gcsfuse.txt"
        for at; do :; done; rmdir "$at"; ln -s "$FAKE_CLOUD/bucket" "$at\"""",
    "uv": """echo "$*" >> "$FAKE_CLOUD/uv-$FAKE_WORKER.txt"
        [ "$1" = pip ] || { for at; do :; done; mkdir -p "$at/bin"
        printf '#!/bin/sh\\nexec "%s" "%s" "$@"\\n' PYTHON PROGRAM > "$at/bin/python"; chmod +x "$at/bin/python"; }""",
}


class Cloud:
    """A project with one TPU, two workers and a bucket; and a checkout in a folder with a space in its name."""

    def __init__(self, folder: Path, checkout: Path) -> None:
        self.folder, self.checkout = folder / "cloud", folder / "my code"
        for made in ("machine", "bucket"):
            (self.folder / made).mkdir(parents=True)
        program = {"PYTHON": sys.executable, "PROGRAM": str(HERE / "program.py")}
        for name, text in MACHINE.items():
            text = re.sub("PYTHON|PROGRAM", lambda m: program[m[0]], text)
            self._program(self.folder / "machine" / name, text)
        local = folder / "bin"
        local.mkdir()
        self._program(local / "gcloud", f'exec "{sys.executable}" -I -S "{HERE / "gcloud.py"}" "$@"')
        self.environment = {
            "PATH": f"{local}:{os.environ['PATH']}",
            "HOME": str(folder),
            "FAKE_CLOUD": str(self.folder),
            "MDRL_TPU": "pod",
            "MDRL_ZONE": "us-west4-a",
            "MDRL_ACCELERATOR": "v5litepod-16",
            "MDRL_BUCKET": "bkt",
            "MDRL_POLL": "0.15",
            "MDRL_GRACE": "1",
        }
        shutil.copytree(checkout, self.checkout)
        self.play()
        self.programs({"lines": ["hello"]})

    def _program(self, file: Path, text: str) -> None:
        file.write_text(f"#!/bin/bash\n{text}\n")
        file.chmod(0o755)

    def play(self, **scenario: Any) -> None:
        """What the cloud does, see `gcloud.py`."""
        (self.folder / "scenario.json").write_text(json.dumps(scenario))

    def programs(self, *entries: Any) -> None:
        """What the trained program does at each start, see `program.py`."""
        (self.folder / "programs.json").write_text(json.dumps(entries))

    def __call__(self, script: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.checkout / "tpu_scripts" / script), *arguments]
        environment = self.environment | settings
        return subprocess.run(command, cwd=self.checkout, env=environment, capture_output=True, text=True, timeout=300)

    def up(self, *scripts: str) -> None:
        """Runs scripts that have to succeed."""
        for script in scripts or ("create.sh", "copy.sh", "install.sh"):
            done = self(script, *([CONFIG] if script == "launch.sh" else []))
            assert done.returncode == 0, done.stderr

    @property
    def calls(self) -> list[list[str]]:
        file = self.folder / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def steps(self) -> list[str]:
        """The calls in short, one line for the same one repeated."""
        short = [step(call) for call in self.calls]
        return [s for i, s in enumerate(short) if i == 0 or s != short[i - 1]]

    def starts(self, worker: int = 0) -> list[dict[str, Any]]:
        file = self.folder / f"starts-{worker}.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def worker(self, number: int) -> Path:
        return self.folder / "workers" / str(number) / "mdrl"


def step(call: list[str]) -> str:
    """`queued-resources create`, `ssh all install`, ..."""
    if call[:3] != ["compute", "tpus", "tpu-vm"]:
        return " ".join(call[2:4] if call[0] == "compute" else call[:2])
    if call[3] != "ssh":
        return f"tpu-vm {call[3]}"
    flags = {f.partition("=")[0]: f.partition("=")[2] for f in call if f.startswith("--")}
    return f"ssh {flags['--worker']} {flags['--command'].rpartition('worker.sh ')[2].split()[0]}"


def one_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Standard error has one error, on one line, with these words in it."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("mdrl: error:")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr and "ERROR:" not in done.stderr
    for word in words:
        assert word in errors[0], errors[0]
