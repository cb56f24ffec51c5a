"""Plays `python -m mdrl_jax.main` on a worker: what it does at its n-th start there is the n-th of `programs.json`.

An entry has "lines" to print, "seconds" to last, "status" to end with, and "deaf", with which SIGTERM does nothing
(otherwise it ends with status 143). After its first line it waits for the file "after" and for so many "looks" at its
output. An entry may be a list, with one for each worker. The last one holds for ever.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

cloud, worker = Path(os.environ["FAKE_CLOUD"]), int(os.environ["FAKE_WORKER"])
assert sys.argv[1:3] == ["-m", "mdrl_jax.main"]
starts = cloud / f"starts-{worker}.jsonl"
number = len(starts.read_text().splitlines()) if starts.exists() else 0
entries = json.loads((cloud / "programs.json").read_text())
entry = entries[min(number, len(entries) - 1)]
entry = entry[worker] if isinstance(entry, list) else entry
signal.signal(signal.SIGTERM, signal.SIG_IGN if entry.get("deaf") else lambda *_: sys.exit(143))
start = {"arguments": sys.argv[3:], "folder": os.getcwd(), "environment": dict(os.environ)}
with starts.open("a") as file:
    file.write(json.dumps(start) + "\n")
workdir = Path(sys.argv[3].removeprefix("--workdir="))
workdir.mkdir(parents=True, exist_ok=True)
(workdir / "config.json").write_text("{}")
lines = entry.get("lines", [])
for line in lines[:1]:
    print(line)
(Path.home() / "mdrl" / "run" / "begun").touch()  # from here on a test can rely on it
while (cloud / "calls.jsonl").read_text().count("worker.sh since") < entry.get("looks", 0):
    time.sleep(0.05)
while "after" in entry and not (cloud / entry["after"]).exists():
    time.sleep(0.05)
time.sleep(entry.get("seconds", 0))
for line in lines[1:]:
    print(line)
sys.exit(entry.get("status", 0))
