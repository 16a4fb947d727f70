"""cluster.yaml as users use it: up, a sweep that is submitted and loses a machine, a job, down.

The machines are namespaces behind a mock of AWS (see rig/). What this cannot show: images and drivers of real machines,
permissions and quotas, GPUs (a machine has one for Ray alone), and the speed of networks. `make cluster-e2e` runs it
and prints the transcript.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RIG = Path(__file__).with_name("rig")
API, PORT, REGION = "10.77.0.1", "5000", "us-west-2"
ENDPOINT = f"http://{API}:{PORT}"
BUCKET = "raysl-experiments"
SWEEP = f"experiments/sweep_pirl.py --local --runs s3://{BUCKET}/runs --out s3://{BUCKET}/out"
PROGRAMS = ("sshd", "ssh", "rsync", "ip", "unshare", "nsenter", "screen", "sudo", "setsid")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def unable() -> str:
    """Why this machine cannot play a cloud; "" when it can."""
    if os.geteuid() != 0:
        return "not root"
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    missing += [name for name in ("boto3", "moto", "flask") if util.find_spec(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    tried = subprocess.run(["unshare", "--mount", "--pid", "--net", "--fork", "true"], capture_output=True)
    return "no namespaces may be made here" if tried.returncode else ""


class Cloud:
    """The pretended cloud, and a laptop that has the checkout."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.started = time.monotonic()
        aws = {"AWS_ACCESS_KEY_ID": "laptop", "AWS_SECRET_ACCESS_KEY": "laptop", "AWS_DEFAULT_REGION": REGION}
        self.environment = {**os.environ, **aws, "RIG": str(state), "RIG_VENV": sys.prefix}
        self.api: subprocess.Popen[bytes] | None = None

    def say(self, line: str) -> None:
        """A line of the transcript."""
        print(f"[{time.monotonic() - self.started:5.0f} s] {line}", flush=True)

    def machine(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """machine.sh."""
        command = [str(RIG / "machine.sh"), *arguments]
        return subprocess.run(command, env=self.environment, check=True, text=True, **options)

    def start(self) -> None:
        """The network, the API, the laptop, and what a user makes by hand: bucket, instance profile, token."""
        self.machine("network-up")
        log = (self.state / "cloud.log").open("wb")
        cloud = [*_in_network(), sys.executable, "-u", str(RIG / "cloud.py"), API, PORT, REGION]
        self.api = subprocess.Popen(cloud, env=self.environment, stdout=log, stderr=subprocess.STDOUT)
        _wait(lambda: b"answers" in (self.state / "cloud.log").read_bytes(), 60)
        self.machine("up", "laptop", "10.77.0.2")
        self.machine("in", "laptop", "ip", "route", "add", "54.0.0.0/8", "dev", "eth0")
        checkout = subprocess.run(
            ["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True
        ).stdout
        unpack = [
            str(RIG / "machine.sh"),
            "in",
            "laptop",
            "bash",
            "-c",
            "mkdir /srv/raysl; tar -C /srv/raysl -x",
        ]
        subprocess.run(unpack, env=self.environment, input=checkout, check=True)
        self.aws(
            f"boto3.client('s3').create_bucket(Bucket={BUCKET!r}, "
            f"CreateBucketConfiguration=dict(LocationConstraint={REGION!r})); "
            "boto3.client('iam').create_instance_profile(InstanceProfileName='raysl-node')"
        )
        self.laptop("ray get-auth-token --generate > token.txt", "token.log")

    def stop(self) -> None:
        """Everything that `start` and the cluster have made."""
        if self.api is not None:
            self.api.kill()
        for home in (self.state / "machines").iterdir():
            self.machine("down", home.name)
        self.machine("network-down")

    def aws(self, code: str) -> str:
        """What a piece of Python prints, with boto3 bound to the API."""
        environment = {**self.environment, "AWS_ENDPOINT_URL": ENDPOINT}
        command = [*_in_network(), sys.executable, "-c", f"import boto3; {code}"]
        return subprocess.run(command, env=environment, check=True, text=True, capture_output=True).stdout

    def laptop(self, command: str, log: str) -> int:
        """Runs a command in the checkout on the laptop; its exit code. What it prints goes to a file."""
        settings = {
            "HOME": "/root",
            "TERM": "dumb",
            "PATH": f"{sys.prefix}/bin:/usr/bin:/bin:/usr/sbin",
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "AWS_ENDPOINT_URL": ENDPOINT,
            **{name: self.environment[name] for name in self.environment if name.startswith("AWS_")},
        }
        words = ["env", "-i", *(f"{name}={value}" for name, value in settings.items())]
        with (self.state / log).open("w") as output:
            enter = [
                str(RIG / "machine.sh"),
                "in",
                "laptop",
                *words,
                "bash",
                "-c",
                f"cd /srv/raysl || exit\n{command}",
            ]
            done = subprocess.run(enter, env=self.environment, stdout=output, stderr=subprocess.STDOUT)
        return done.returncode

    def printed(self, log: str) -> str:
        """What a command has printed so far."""
        place = self.state / log
        return place.read_text(errors="replace") if place.exists() else ""

    def workers(self) -> dict[str, str]:
        """The instances that are workers and run: whether each is "spot" or "on-demand"."""
        found = self.aws(
            "running = dict(Name='instance-state-name', Values=['running']); "
            "worker = dict(Name='tag:ray-node-type', Values=['worker']); "
            "groups = boto3.client('ec2').describe_instances(Filters=[running, worker])['Reservations']; "
            "all = [i for group in groups for i in group['Instances']]; "
            "print(*[i['InstanceId'] + '=' + i.get('InstanceLifecycle', 'on-demand') for i in all])"
        )
        return dict(one.split("=") for one in found.split())

    def files(self, prefix: str) -> list[str]:
        """Names of the objects in the bucket."""
        found = self.aws(
            f"r = boto3.client('s3').list_objects_v2(Bucket={BUCKET!r}, Prefix={prefix!r}); "
            "print(*[o['Key'] for o in r.get('Contents', [])])"
        )
        return found.split()


def _named(workers: dict[str, str]) -> str:
    return ", ".join(f"{name} ({market})" for name, market in workers.items())


def _in_network() -> list[str]:
    return ["nsenter", "--net=/run/netns/raysl-rig"]


def _wait(ready: Any, seconds: float) -> bool:
    """Whether it became true in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if ready():
            return True
        time.sleep(0.5)
    return False


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    if why := unable():
        pytest.skip(f"this machine cannot play a cloud: {why}")
    made = Cloud(tmp_path)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def test_the_file_that_users_use(cloud: Cloud) -> None:
    code = cloud.laptop("ray up -y cluster.yaml --no-config-cache", "up.log")
    cloud.say(f"ray up: exit code {code}")
    assert code == 0, cloud.printed("up.log")[-3000:]

    code = cloud.laptop("ray submit cluster.yaml experiments/sweep_pirl.py -- --figure no", "wrong.log")
    cloud.say(f"ray submit with a flag that does not exist: exit code {code}")
    assert code == 1

    submitted = f"ray submit cluster.yaml {SWEEP.replace(' ', ' -- ', 1)}"
    codes: list[int] = []
    submit = threading.Thread(target=lambda: codes.append(cloud.laptop(submitted, "sweep.log")))
    submit.start()
    assert _wait(lambda: "step " in cloud.printed("sweep.log") or codes, 900)
    cloud.say(f"the first steps of the sweep; workers: {_named(cloud.workers())}")
    _wait(lambda: codes or any("/manifest-" in name for name in cloud.files("runs/all/")), 900)
    assert not codes, cloud.printed("sweep.log")[-5000:]
    lost = next(name for name, market in cloud.workers().items() if market == "spot")
    cloud.aws(f"boto3.client('ec2').terminate_instances(InstanceIds=[{lost!r}])")
    before = set(cloud.workers())
    cloud.say(f"a checkpoint is there, and the cloud takes {lost} back")
    if _wait(lambda: codes or cloud.workers().keys() - before, 300) and not codes:
        cloud.say(f"a machine is started in its place; workers: {_named(cloud.workers())}")
    submit.join()
    cloud.say(f"ray submit: exit code {codes[0]}")
    assert codes == [0], cloud.printed("sweep.log")[-5000:]
    assert {"out/rows.jsonl", "out/index.html"} <= set(cloud.files("out/"))

    again = cloud.laptop(submitted, "again.log")
    cloud.say(f"the same command again, with nothing left to do: exit code {again}")
    assert again == 0, cloud.printed("again.log")[-3000:]

    code = cloud.laptop(
        "ray dashboard cluster.yaml > dashboard.log 2>&1 & "
        "for i in $(seq 60); do sleep 1; curl -s -o /dev/null 127.0.0.1:8265 && break; done; "
        f"ray job submit --address http://127.0.0.1:8265 --working-dir . -- python {SWEEP}; code=$?; "
        "kill %1; exit $code",
        "job.log",
    )
    cloud.say(f"ray job submit of the same: exit code {code}")
    assert code == 0, cloud.printed("job.log")[-3000:]

    code = cloud.laptop("ray exec cluster.yaml 'python -m raysl doctor --cluster --workers 2'", "doctor.log")
    cloud.say(f"raysl doctor --cluster: exit code {code}")
    assert code == 0, cloud.printed("doctor.log")[-3000:]

    code = cloud.laptop("ray down -y cluster.yaml", "down.log")
    cloud.say(f"ray down: exit code {code}")
    assert code == 0
    assert _wait(lambda: not cloud.workers(), 60)
    print((cloud.state / "cloud.log").read_text())
