#!/usr/bin/env python3
"""Plays `gcloud` for one TPU: records its calls, keeps states, fails in the known ways, runs ssh's commands here.

Everything lies in the folder `$FAKE_CLOUD`: `scenario.json` says what happens, `calls.jsonl` has the arguments of each
call, `workers/N` is the home folder of worker N, `bucket` the bucket, `machine` the programs of a worker. Keys of a
scenario, all optional:

  workers      how many there are (default 2)
  create       outcomes of creating, in order: "ok" or a key of `ERRORS` (default: always "ok")
  queued       for each TPU created, the states that describing its queued resource gives, the last one for ever; a
               state may be "FAILED message" (default ACTIVE)
  ssh          what happens at the n-th ssh, by n as text, or at every ssh with a verb of `worker.sh`, by the verb: a
               key of `ERRORS`; "refused"; "cut": the connection is lost after the command ran; "preempted": the TPU
               is; "suspended": it is, and its queued resource says so
  unreachable  workers that never answer
  rsync        what happens when the bucket is read: a key of `ERRORS`

Texts, exit statuses and the way in which several workers are reported follow the source of Google Cloud SDK 528.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

CLOUD = Path(os.environ["FAKE_CLOUD"])
ERRORS = {
    "quota": "RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPreemptibleLitepodPerProjectPerRegionForTPUAPI' has been exceeded."
    " Limit: 0 in region us-west4.",
    "capacity": 'There is no more capacity in the zone "us-west4-a"; you can try in another zone where Cloud TPU Nodes '
    "are offered (see https://cloud.google.com/tpu/docs/regions)",
    "exists": "ALREADY_EXISTS: Resource 'projects/p/locations/us-west4-a/queuedResources/pod' already exists",
    "zone": "PERMISSION_DENIED: Permission denied on 'locations/us-west4-a' (or it may not exist).",
    "permission": "PERMISSION_DENIED: Permission 'tpu.nodes.create' denied on 'projects/p/locations/us-west4-a'",
    "api": "PERMISSION_DENIED: Cloud TPU API has not been used in project 1 before or it is disabled.",
    "accelerator": "INVALID_ARGUMENT: Invalid accelerator type.",
    "runtime": "INVALID_ARGUMENT: Runtime version not found.",
    "login": "You do not currently have an active account selected.\nPlease run:\n\n  $ gcloud auth login",
    "agent": 'SSH Key is not present in the SSH agent. Please run "ssh-add KEY" to add it, and try again.',
    "project": "The required property [project] is not currently set.",
    "unavailable": "UNAVAILABLE: The service is currently unavailable.",
}


class State:
    """What is remembered between calls, beside the home folders."""

    def __init__(self) -> None:
        self.scenario = json.loads((CLOUD / "scenario.json").read_text())
        self.file = CLOUD / "state.json"
        fresh = {"created": 0, "described": 0, "ssh": 0, "there": False, "node": "READY", "queue": None}
        self.values: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else fresh

    def save(self) -> None:
        self.file.write_text(json.dumps(self.values))

    def count(self, name: str) -> int:
        self.values[name] += 1
        return self.values[name]


def fail(command: list[str], message: str, status: int = 1) -> NoReturn:
    print(f"ERROR: (gcloud.{'.'.join(command)}) {message}", file=sys.stderr)
    sys.exit(status)


def verb_of(command: str) -> str:
    return command.rpartition("worker.sh ")[2].split()[0]


def home(worker: int) -> Path:
    return CLOUD / "workers" / str(worker)


def boot(workers: int) -> None:
    for worker in range(workers):
        (home(worker) / "mdrl" / "bin").mkdir(parents=True)
        shutil.copy(CLOUD / "machine" / "uv", home(worker) / "mdrl" / "bin" / "uv")


def vanish() -> None:
    """All machines are gone, with what ran on them."""
    for leader in CLOUD.glob("workers/*/mdrl/run-*/leader"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(leader.read_text()), signal.SIGKILL)
    shutil.rmtree(CLOUD / "workers", ignore_errors=True)


def queued_resources(verb: str, flags: list[str], state: State) -> None:
    command = ["compute", "tpus", "queued-resources", verb]
    allowed = {
        "create": ["node-id", "accelerator-type", "runtime-version", "network", "service-account"],
        "describe": ["format"],
        "delete": [],
    }[verb]
    switches = {"create": ["spot", "reserved"], "describe": [], "delete": ["force", "quiet"]}[verb]
    values, names = parse(command, flags, allowed, switches)
    if verb == "create":
        outcomes = state.scenario.get("create", [])
        number = state.count("created")
        outcome = outcomes[number - 1] if number <= len(outcomes) else "ok"
        if outcome != "ok":
            fail(command, ERRORS[outcome])
        state.values.update(there=True, described=0, node="READY", queue=None)
        boot(state.scenario.get("workers", 2))
    elif not state.values["there"]:
        fail(command, f"NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/{names[0]}' was not found")
    elif verb == "describe":
        assert values.format == "value(state.state,state.failedData.error.message)"
        lists = state.scenario.get("queued", [])
        states = lists[state.values["created"] - 1] if state.values["created"] <= len(lists) else ["ACTIVE"]
        told = states[min(state.count("described"), len(states)) - 1]
        name, _, message = (state.values["queue"] or told).partition(" ")
        print(f"{name}\t{message}")
    else:
        assert values.force and values.quiet, "it would ask, or refuse while machines exist"
        vanish()
        state.values["there"] = False


def tpu_vm(verb: str, flags: list[str], state: State) -> None:
    command = ["compute", "tpus", "tpu-vm", verb]
    allowed = {"describe": ["format"], "ssh": ["worker", "command", "ssh-flag"], "scp": ["worker", "scp-flag"]}[verb]
    switches = {"describe": [], "ssh": ["internal-ip"], "scp": ["internal-ip", "recurse"]}[verb]
    values, names = parse(command, flags, allowed, switches)
    if verb == "ssh":
        table, number = state.scenario.get("ssh", {}), str(state.count("ssh"))
        happens = table.get(number) or table.get(verb_of(values.command), "ok")
        if happens in ("preempted", "suspended"):
            vanish()
            state.values.update(node="PREEMPTED", queue="SUSPENDED" if happens == "suspended" else None)
    if not state.values["there"]:
        fail(command, f"NOT_FOUND: Resource 'projects/p/locations/z/nodes/{names[0]}' was not found")
    workers = state.scenario.get("workers", 2)
    if verb == "describe":
        print({"value(state)": state.values["node"], "value(networkEndpoints.len())": workers}[values.format])
        return
    if state.values["node"] != "READY":
        fail(command, f'This TPU has terminal state "{state.values["node"]}", so it cannot be used anymore.')
    chosen = list(range(workers)) if values.worker == "all" else [int(values.worker)]
    state.save()
    if verb == "scp":
        copy(names, chosen)
    elif happens in ERRORS:
        fail(command, ERRORS[happens])
    else:
        ssh(values.command, chosen, state.scenario.get("unreachable", []), happens)


def copy(names: list[str], workers: list[int]) -> None:
    source, target = names
    if target.partition(":")[1]:
        assert target == "pod:", "only the home folder is there for sure"
        for worker in workers:
            shutil.copytree(source, home(worker) / Path(source).name, dirs_exist_ok=True)
    else:
        path = source.partition(":")[2]
        shutil.copytree(home(workers[0]) / path, Path(target) / Path(path).name, dirs_exist_ok=True)


def begun(worker: int) -> None:
    """Waits until the program that was launched has printed its first line and heeds signals."""
    ends = time.time() + 60
    while not (home(worker) / "mdrl" / "run" / "begun").exists() and time.time() < ends:
        time.sleep(0.02)


def hang_up(session: int) -> None:
    """What an ended connection does to what is still in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, signal.SIGHUP)


def ssh(command: str, workers: list[int], unreachable: list[int], happens: str) -> None:
    statuses = []
    print(f"Using ssh batch size of 1. Attempting to SSH into 1 nodes with a total of {len(workers)} workers.",
          file=sys.stderr)  # fmt: skip
    for worker in workers:
        print(f"SSH: Attempting to connect to worker {worker}...", file=sys.stderr)
        status = 255
        if happens != "refused" and worker not in unreachable:
            # Nothing of the caller's environment reaches a worker.
            path = f"{CLOUD / 'machine'}:/usr/bin:/bin"
            there = {"HOME": str(home(worker)), "PATH": path, "FAKE_CLOUD": str(CLOUD), "FAKE_WORKER": str(worker)}
            shell = subprocess.Popen(["bash", "-c", command], cwd=home(worker), env=there, start_new_session=True)
            status = shell.wait()
            hang_up(shell.pid)
            if status == 0 and verb_of(command) == "launch":
                begun(worker)
        status = 255 if happens == "cut" else status
        if status == 255:
            print("Retrying: SSH command error: [/usr/bin/ssh] exited with return code [255].", file=sys.stderr)
        elif status and len(workers) > 1:
            told = f"##### Command execution on worker {worker} failed with exit status {status}. Continuing."
            print(told, file=sys.stderr)
        statuses.append(status)
    if len(workers) == 1 and statuses == [255]:
        fail(["compute", "tpus", "tpu-vm", "ssh"], "[/usr/bin/ssh] exited with return code [255].", 255)
    sys.exit(next((s for s in statuses if s), 0))


def storage(verb: str, flags: list[str], state: State) -> None:
    command = ["storage", verb]
    values, (source, target) = parse(command, flags, [], ["recursive"])
    assert verb == "rsync" and values.recursive
    if "rsync" in state.scenario:
        fail(command, ERRORS[state.scenario["rsync"]])
    if not (CLOUD / "bucket" / source.removeprefix("gs://bkt/")).is_dir():
        fail(command, f"Did not find existing container at: {source}")
    assert Path(target).is_dir()
    shutil.copytree(CLOUD / "bucket" / source.removeprefix("gs://bkt/"), target, dirs_exist_ok=True)


class Strict(argparse.ArgumentParser):
    """Fails as gcloud does."""

    command: list[str]

    def error(self, message: str) -> NoReturn:
        fail(self.command, message, 2)


def parse(
    command: list[str], flags: list[str], allowed: list[str], switches: list[str]
) -> tuple[argparse.Namespace, list[str]]:
    parser = Strict(allow_abbrev=False)
    parser.command = command
    for name in [*allowed, *([] if command[0] == "storage" else ["zone"]), "project"]:
        parser.add_argument(f"--{name}", required=name in ("zone", "accelerator-type", "runtime-version", "node-id"))
    for name in switches:
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("names", nargs="+")
    values = parser.parse_args(flags)
    return values, values.names


def main(arguments: list[str]) -> None:
    with (CLOUD / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    state = State()
    play = {"queued-resources": queued_resources, "tpu-vm": tpu_vm}
    try:
        if arguments[:1] == ["storage"]:
            storage(arguments[1], arguments[2:], state)
        else:
            assert arguments[:2] == ["compute", "tpus"], arguments
            play[arguments[2]](arguments[3], arguments[4:], state)
    finally:
        state.save()


if __name__ == "__main__":
    main(sys.argv[1:])
