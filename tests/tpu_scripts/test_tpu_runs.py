"""Runs on the workers, which are folders here: started, followed, stopped, lost and started again."""

import re
import shlex
import time

import pytest
from cloud import COLLECT, CONFIG, CREATE, DELETE, QUEUE, START, Cloud, one_line, step


def test_a_run_that_is_preempted_ends_as_if_it_had_not_been_and_as_the_dry_run_said(cloud: Cloud) -> None:
    arguments = ["--config=configs/it's mine.py", "--config.model.path=/a b/$c"]
    dry = cloud("run.sh", "--dry-run", *arguments)
    assert dry.returncode == 0 and dry.stderr == "" and not cloud.calls and not (cloud.folder / "workers").exists()
    cloud.play(queued=[["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]], ssh={"4": "preempted"})
    cloud.programs({"lines": ["one"], "seconds": 30}, {"lines": ["two", "three"]})
    done = cloud("run.sh", *arguments)
    assert done.returncode == 0, done.stderr
    looks, installed = [QUEUE, "tpu-vm describe"], ["w-0: installed", "w-1: installed"]
    first, second = [CREATE, QUEUE, *START, "ssh 0 since"], [CREATE, QUEUE, *START, "ssh 0 since"]
    assert cloud.steps == [*first, *looks, DELETE, *second, COLLECT, DELETE]
    assert done.stdout.splitlines() == [*installed, "one", *installed, "two", "three"]
    assert [len(cloud.starts(w)) for w in (0, 1)] == [2, 2]
    assert (cloud.checkout / "runs" / "pod" / "config.json").exists()
    assert not (cloud.folder / "workers").exists()

    printed = [shlex.split(line, comments=True) for line in dry.stdout.splitlines()]
    assert [words[:2] for words in printed if words and words[0] != "gcloud"] == [["bash", "-c"]]  # packs the checkout

    def comparable(calls: list[list[str]]) -> list[list[str]]:
        calls = [[re.sub(r"launch \S+|since \d+", lambda m: m[0].split()[0], w) for w in c] for c in calls]
        return [c for i, c in enumerate(calls) if i == 0 or c != calls[i - 1]]

    assert comparable([words[1:] for words in printed if words and words[0] == "gcloud"]) == comparable(cloud.calls)


def test_arguments_arrive_as_they_were_given(cloud: Cloud) -> None:
    cloud.up()
    arguments = ["--config=configs/my own.py", "--config.model.path=/it's/a  b", '--config.x="$HOME"; exit', "--y=*"]
    assert cloud("launch.sh", *arguments).returncode == 0
    cloud.up("follow.sh")
    for worker in (0, 1):
        (start,) = cloud.starts(worker)
        workdir = cloud.worker(worker) / "bucket" / "pod"
        assert start["arguments"] == [f"--workdir={workdir}", *arguments]


@pytest.mark.parametrize("status", [0, 250])
def test_the_exit_status_comes_back_and_the_log_is_followed(cloud: Cloud, status: int) -> None:
    cloud.up()
    lines = [f"step {i}" for i in range(6)]
    cloud.programs({"lines": lines, "looks": 2, "status": status})
    cloud.up("launch.sh")
    done = cloud("follow.sh")
    assert done.returncode == status and done.stdout.splitlines() == lines
    looks = [c[-1].split()[-1] for c in cloud.calls if step(c) == "ssh 0 since"]
    assert looks[:2] == ["0", "7"]  # bytes: the first line was shown while the run waited
    if status == 250:  # worker 1 may end a little later
        assert done.stderr.splitlines()[0] == "mdrl: w-0 250" and "mdrl: w-1 " in done.stderr
    kept, ends = cloud.folder / "bucket" / "pod" / "launches", time.time() + 10
    while len(list(kept.iterdir())) < 2 and time.time() < ends:
        time.sleep(0.05)
    assert [log.read_text().splitlines() for log in kept.iterdir()] == [lines, lines]


def test_what_another_worker_finds_wrong_is_not_tried_again(cloud: Cloud) -> None:
    cloud.up()
    cloud.programs([{"status": 1, "after": "workers/1/mdrl/run/status"}, {"status": 2}])
    cloud.up("launch.sh")
    assert cloud("resume.sh", CONFIG).returncode == 2
    assert len(cloud.starts()) == 1


def test_a_lost_connection_neither_ends_the_run_nor_starts_it_twice(cloud: Cloud) -> None:
    cloud.play(ssh={"2": "cut", "4": "cut", "5": "refused"})
    cloud.programs({"lines": ["one", "two"], "looks": 3, "status": 7})
    cloud.up()
    cloud.up("launch.sh")  # its first ssh starts the run and is lost
    done = cloud("follow.sh")
    assert done.returncode == 7 and done.stdout.splitlines() == ["one", "two"]
    assert [len(cloud.starts(w)) for w in (0, 1)] == [1, 1]
    assert "trying again" in done.stderr


def test_a_second_launch_is_refused_while_the_first_runs(cloud: Cloud) -> None:
    cloud.up()
    cloud.programs({"seconds": 30})
    cloud.up("launch.sh")
    for script, *arguments in (("launch.sh", CONFIG), ("install.sh",)):
        done = cloud(script, *arguments)
        assert done.returncode == 2 and "a run is going on; tpu_scripts/stop.sh ends it" in done.stdout + done.stderr
        one_line(done, "status 2 on worker 0 1; ")
    assert cloud("status.sh").stdout.splitlines() == ["pod READY", "w-0 running", "w-1 running"]


def test_a_worker_that_does_not_answer_is_named(cloud: Cloud) -> None:
    cloud.play(workers=4, unreachable=[3])
    cloud.up("create.sh", "copy.sh")
    before = len(cloud.calls)
    done = cloud("install.sh")
    assert done.returncode == 75
    one_line(done, "installing on pod: worker 3 of pod cannot be reached", "3 tries")
    probes = [c for c in cloud.calls[before:] if "--command=true" in c]
    assert [c[-2] for c in probes] == [f"--worker={i}" for i in range(4)]
    assert [step(c) for c in cloud.calls[before : before + 4]] == ["ssh all install"] * 3 + ["tpu-vm describe"]


def test_a_command_that_fails_on_one_worker_is_named_and_not_repeated(cloud: Cloud) -> None:
    cloud.up("create.sh", "copy.sh")
    uv = cloud.worker(1) / "bin" / "uv"
    uv.write_text("#!/bin/bash\necho no space left; exit 7\n")
    done = cloud("install.sh")
    assert done.returncode == 7 and "no space left" in done.stdout
    one_line(done, "installing on pod: status 7 on worker 1; its output is above")
    assert cloud.steps[-1] == "ssh all install" and len(cloud.calls) == 4


@pytest.mark.parametrize(("error", "words"), [("agent", ["ssh-add"]), ("permission", ["roles/tpu.admin"])])
def test_ssh_that_is_refused_for_good(cloud: Cloud, error: str, words: list[str]) -> None:
    cloud.play(ssh={"1": error})
    cloud.up("create.sh", "copy.sh")
    done = cloud("install.sh")
    assert done.returncode == 2
    one_line(done, "installing on pod", *words)


def test_stopping_saves_and_the_same_launch_goes_on(cloud: Cloud) -> None:
    cloud.up()
    cloud.programs({"seconds": 30}, {})
    cloud.up("launch.sh")
    cloud.up("stop.sh")
    assert cloud("follow.sh").returncode == 143
    assert cloud("resume.sh", CONFIG).returncode == 0
    assert [len(cloud.starts(w)) for w in (0, 1)] == [2, 2] and DELETE not in cloud.steps


def test_what_does_not_heed_the_signal_is_killed(cloud: Cloud) -> None:
    cloud.up()
    cloud.programs({"seconds": 30, "deaf": True})
    cloud.up("launch.sh")
    cloud.up("stop.sh")
    done = cloud("follow.sh")
    assert done.returncode == 75
    one_line(done, "ended without a status")
    assert cloud("status.sh").stdout.splitlines() == ["pod READY", "w-0 lost", "w-1 lost"]


@pytest.mark.parametrize("status", [143, 1])
def test_a_run_that_stopped_or_crashed_starts_again_on_the_same_tpu(cloud: Cloud, status: int) -> None:
    cloud.up()
    cloud.programs({"status": status}, {"lines": ["done"]})
    cloud.up("launch.sh")
    before = len(cloud.steps)
    done = cloud("resume.sh", CONFIG)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "done"
    ended = [
        "ssh 0 since",
        *(["ssh all state"] if status == 1 else []),
        QUEUE,
        "tpu-vm describe",
        "ssh all stop",
        *START,
    ]
    assert cloud.steps[before:] == [*ended, "ssh 0 since"]


@pytest.mark.parametrize("lost", ["preempted", "suspended"])
def test_a_lost_tpu_is_created_again_and_gets_the_program_it_had(cloud: Cloud, lost: str) -> None:
    cloud.play(workers=1, ssh={"3": lost})
    cloud.programs({"seconds": 30}, {})
    cloud.up()
    cloud.up("launch.sh")
    (cloud.checkout / "kept.txt").write_text("edited meanwhile")
    assert cloud("resume.sh", CONFIG).returncode == 0
    looks = [QUEUE] if lost == "suspended" else [QUEUE, "tpu-vm describe"]
    assert cloud.steps[5:] == ["ssh 0 since", *looks, DELETE, CREATE, QUEUE, *START, "ssh 0 since"]
    assert len(cloud.starts()) == 2
    assert (cloud.worker(0) / "code" / "kept.txt").read_text() == "1"
    deletion = next(c for c in cloud.calls if step(c) == DELETE)
    assert deletion[4:] == ["pod", "--zone=us-west4-a", "--force", "--quiet"]


def test_a_worker_that_is_lost_costs_the_tpu(cloud: Cloud) -> None:
    cloud.up()
    cloud.programs({"status": 1}, {})
    cloud.up("launch.sh")
    cloud.play(ssh={"stop": "refused"})
    assert cloud("resume.sh", CONFIG, MDRL_TRIES="2").returncode == 0
    assert cloud.steps[-7:] == [DELETE, CREATE, QUEUE, *START, "ssh 0 since"]


def test_a_run_with_status_2_is_never_started_again(cloud: Cloud) -> None:
    cloud.programs({"lines": ["mdrl: error: config.seed"], "status": 2})
    done = cloud("run.sh", CONFIG)
    assert done.returncode == 2 and "mdrl: error: config.seed" in done.stdout
    assert [len(cloud.starts(w)) for w in (0, 1)] == [1, 1]
    assert cloud.steps == [CREATE, QUEUE, *START, "ssh 0 since", COLLECT, DELETE]


def test_restarts_are_counted(cloud: Cloud) -> None:
    cloud.play(workers=1)
    cloud.up()
    cloud.programs({"status": 9})
    cloud.up("launch.sh")
    done = cloud("resume.sh", CONFIG, MDRL_RESTARTS="2")
    assert done.returncode == 9 and len(cloud.starts()) == 3
    one_line(done, "status 9 after 2 restarts", "MDRL_RESTARTS")


def test_no_capacity_after_a_preemption_is_waited_for(cloud: Cloud) -> None:
    cloud.play(workers=1, ssh={"3": "preempted"}, create=["ok", "capacity"], queued=[["ACTIVE"], [], ["FAILED x"]])
    cloud.programs({"seconds": 30}, {})
    cloud.up()
    cloud.up("launch.sh")
    assert cloud("resume.sh", CONFIG).returncode == 0
    assert [s for s in cloud.steps if s == CREATE] == [CREATE] * 4 and len(cloud.starts()) == 2


def test_a_tpu_is_kept_while_its_work_folder_is_not_collected(cloud: Cloud) -> None:
    cloud.play(workers=1, rsync="permission")
    done = cloud("run.sh", CONFIG)
    assert done.returncode == 2 and cloud.steps[-2:] == ["ssh 0 since", COLLECT]
    one_line(done, "collecting mdrl/bucket/pod")
    assert "pod is kept, and costs" in done.stderr


def test_a_work_folder_outside_the_bucket_comes_from_worker_0(cloud: Cloud) -> None:
    cloud.environment |= {"MDRL_BUCKET": "", "MDRL_WORKDIR": "work/one", "MDRL_KEEP": "1"}
    assert cloud("run.sh", CONFIG).returncode == 0
    assert cloud.steps[-1] == "tpu-vm scp" and (cloud.checkout / "runs" / "one" / "config.json").exists()
    how = ["--zone=us-west4-a", "--scp-flag=-oServerAliveInterval=15"]
    assert cloud.calls[-1][4:] == ["pod:work/one", "runs", *how, "--worker=0", "--recurse"]
