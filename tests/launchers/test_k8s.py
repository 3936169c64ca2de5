"""The Kubernetes manifests, held against the API's schema, and the script of a pod, run as two machines of a run."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from patience import PATIENCE_S
from ranks import free_port
from tiny import ROOT, environment, pretrain, recipe, write_data, write_recipe

from m3i_large.metrics import read_metrics
from m3i_large.run import read_exit

K8S = ROOT / "launchers/k8s"
# Fields of a JobSet (v1alpha2) as its custom resource definition names them; what is inside `template` is a Job's.
SPEC = {"replicatedJobs", "failurePolicy", "network", "successPolicy", "startupPolicy", "suspend", "coordinator"}
REPLICATED = {"name", "replicas", "template", "dependsOn"}
STEPS = 60
TRAIN = {"steps": STEPS, "checkpoint_every": 20, "picture_every": 0}
ACTIONS = {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}


def jobs(jobset: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The Jobs that the controller would create, by the names in the JobSet."""
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(jobset["spec"]) <= SPEC
    made = {}
    for replicated in jobset["spec"]["replicatedJobs"]:
        assert set(replicated) <= REPLICATED
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": replicated["name"]}}
        made[replicated["name"]] = job | {"spec": replicated["template"]["spec"]}
    return made


@pytest.fixture(params=["pretrain.yaml", "index.yaml"])
def jobset(request: pytest.FixtureRequest) -> dict[str, Any]:
    return yaml.safe_load((K8S / request.param).read_text(encoding="utf-8"))


def test_jobs_are_valid_and_have_no_privileges(jobset: dict[str, Any]) -> None:
    values = yaml.safe_load((K8S / "kustomization.yaml").read_text(encoding="utf-8"))["configMapGenerator"][0][
        "literals"
    ]
    known = {value.partition("=")[0] for value in values} | {"JOB_COMPLETION_INDEX"}
    for job in jobs(jobset).values():
        kubernetes_validate.validate(job, "1.37", strict=True)
        pod = job["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["automountServiceAccountToken"] is False
        (container,) = pod["containers"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        used = set(re.findall(r"\$\((\w+)\)", " ".join([*container["command"], *container.get("args", [])])))
        assert used <= known
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_the_schema_refuses_what_is_wrong() -> None:
    (job,) = jobs(yaml.safe_load((K8S / "pretrain.yaml").read_text(encoding="utf-8"))).values()
    job["spec"]["template"]["spec"]["gracePeriod"] = 3
    with pytest.raises(kubernetes_validate.ValidationError, match="gracePeriod"):
        kubernetes_validate.validate(job, "1.37", strict=True)


def test_a_mistake_ends_the_set_and_all_else_restarts_it() -> None:
    spec = yaml.safe_load((K8S / "pretrain.yaml").read_text(encoding="utf-8"))["spec"]
    (job,) = (r["template"]["spec"] for r in spec["replicatedJobs"])
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2] and job["backoffLimit"] == 0
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet" and rule["action"] in ACTIONS
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"] and spec["failurePolicy"]["maxRestarts"] > 0
    name = yaml.safe_load((K8S / "pretrain.yaml").read_text(encoding="utf-8"))["metadata"]["name"]
    variables = {v["name"]: v.get("value") for v in job["template"]["spec"]["containers"][0]["env"]}
    replicated = spec["replicatedJobs"][0]["name"]
    assert variables["MASTER_ADDR"] == f"{name}-{replicated}-0-0.{name}"  # JobSet: set-job-index-pod.subdomain


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl")
def test_the_kustomization_puts_the_values_where_they_belong(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    path = tmp_path / "k8s/kustomization.yaml"
    text = path.read_text(encoding="utf-8")
    for old, new in (("NUM_NODES=4", "NUM_NODES=16"), ("GPUS_PER_NODE=8", "GPUS_PER_NODE=4"), ("PARTS=32", "PARTS=7")):
        assert old in text
        text = text.replace(old, new)
    path.write_text(text.replace("resources: [pretrain.yaml]", "resources: [pretrain.yaml, index.yaml]"))
    done = subprocess.run(["kubectl", "kustomize", tmp_path / "k8s"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    documents = {d["metadata"]["name"]: d for d in yaml.safe_load_all(done.stdout)}
    assert documents["m3i-values"]["data"]["RECIPE"] == "m3i_internimage_h_442m"
    pretrain, index = jobs(documents["m3i"]), jobs(documents["m3i-index"])
    for job in (*pretrain.values(), *index.values()):
        kubernetes_validate.validate(job, "1.37", strict=True)
        container = job["spec"]["template"]["spec"]["containers"][0]
        assert container["image"] == "registry.example.org/m3i-large:0.1.0"
        assert container["envFrom"] == [{"configMapRef": {"name": "m3i-values"}}]
    spec = pretrain["node"]["spec"]
    limits = spec["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (spec["completions"], spec["parallelism"], limits["nvidia.com/gpu"]) == (16, 16, 4)
    assert (index["part"]["spec"]["completions"], index["part"]["spec"]["parallelism"]) == (7, 7)


class Pods:
    """Two machines of a run, each the script of a pod with one rank."""

    def __init__(self, tmp_path: Path) -> None:
        self.out = tmp_path / "run"
        self.recipe = write_recipe(tmp_path / "tiny.yaml", recipe(write_data(tmp_path / "data"), **TRAIN))
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *overrides: str) -> list[subprocess.Popen[str]]:
        shared = environment() | {"NUM_NODES": "2", "GPUS_PER_NODE": "1", "OUT": str(self.out)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        command = ["bash", "launchers/k8s/worker.sh", "--ds", "ds_configs/zero3.json", "--recipe", str(self.recipe)]
        self.started = [
            subprocess.Popen(
                [*command, *overrides],
                env=shared | {"JOB_COMPLETION_INDEX": str(index)},
                cwd=ROOT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for index in range(2)
        ]
        return self.started

    def end(self) -> list[int]:
        texts = [pod.communicate(timeout=PATIENCE_S)[0] for pod in self.started]
        self.text = "\n".join(texts)
        return [pod.returncode for pod in self.started]

    def kill(self) -> None:
        """Also ranks that outlived their script; a container's end would end them."""
        for pod in self.started:
            with suppress(ProcessLookupError):
                os.killpg(pod.pid, signal.SIGKILL)


@pytest.fixture
def pods(tmp_path: Path) -> Iterator[Pods]:
    pods = Pods(tmp_path)
    yield pods
    pods.kill()


@pytest.mark.slow
def test_a_preempted_pod_ends_the_run_in_order_and_the_next_start_finishes_it(pods: Pods, tmp_path: Path) -> None:
    first, _ = pods.start()
    deadline = time.monotonic() + PATIENCE_S
    while len(read_metrics(pods.out)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)  # one pod's alone, as when its machine is drained
    assert pods.end() == [75, 75], pods.text
    outcome = read_exit(pods.out)
    assert outcome["outcome"] == "interrupted" and 3 <= outcome["step"] < STEPS
    pods.start()
    assert pods.end() == [0, 0], pods.text
    assert read_exit(pods.out)["outcome"] == "finished"
    whole = tmp_path / "whole"
    assert pretrain("--recipe", pods.recipe, "--out", whole, ranks=2).returncode == 0
    assert [row["loss"] for row in read_metrics(pods.out)] == [row["loss"] for row in read_metrics(whole)]


@pytest.mark.slow
def test_a_mistake_is_status_2_and_a_lost_launcher_no_success(pods: Pods) -> None:
    pods.start("train.stepz=3")
    assert pods.end() == [2, 2] and "train.stepz" in pods.text
    first, second = pods.start("train.steps=100000")
    while not read_metrics(pods.out):
        assert first.poll() is None and second.poll() is None
        time.sleep(0.05)
    for pid in descendants(first.pid):
        if b"deepspeed.launcher.launch" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    assert first.wait(timeout=PATIENCE_S) == 1  # the deepspeed command itself says 0


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children] + [found for child in children for found in descendants(int(child))]
