"""The manifests for Kubernetes: their form, and what the autoscaler makes of them.

A cluster drops fields that it does not know without a word, so their names are checked against KubeRay's (1.5).
"""

from __future__ import annotations

import copy
from typing import Any

import pytest

from raysl.ray_cluster import autoscaler
from raysl.ray_cluster import placement as cluster_placement
from raysl.ray_cluster.autoscaler import Growth
from raysl.ray_cluster.placement import Machines, Placement
from raysl.stream.reader import DataShare
from tests.ray_cluster.autoscaling import Config, launches, read

MANIFESTS = ("deploy/rayjob.yaml", "deploy/raycluster.yaml")
JOB = {
    *(
        "entrypoint",
        "shutdownAfterJobFinishes",
        "ttlSecondsAfterFinished",
        "activeDeadlineSeconds",
        "backoffLimit",
    ),
    *(
        "rayClusterSpec",
        "clusterSelector",
        "runtimeEnvYAML",
        "submissionMode",
        "submitterPodTemplate",
        "jobId",
    ),
    *("metadata", "submitterConfig", "managedBy", "deletionStrategy", "suspend", "entrypointNumCpus"),
}
CLUSTER = {
    *("rayVersion", "enableInTreeAutoscaling", "authOptions", "autoscalerOptions", "headGroupSpec"),
    *("workerGroupSpecs", "gcsFaultToleranceOptions", "headServiceAnnotations", "managedBy", "suspend"),
}
AUTOSCALER = {
    *(
        "version",
        "idleTimeoutSeconds",
        "upscalingMode",
        "resources",
        "image",
        "imagePullPolicy",
        "env",
        "envFrom",
    ),
    *("volumeMounts", "securityContext"),
}
HEAD = {"rayStartParams", "template", "serviceType", "headService", "enableIngress", "resources", "labels"}
WORKERS = {
    *(
        "groupName",
        "replicas",
        "minReplicas",
        "maxReplicas",
        "idleTimeoutSeconds",
        "numOfHosts",
        "rayStartParams",
    ),
    *("template", "resources", "labels", "scaleStrategy", "suspend"),
}


def spec(name: str) -> Config:
    """Of the cluster in a manifest."""
    whole: Config = read(name)["spec"]
    found: Config = whole.get("rayClusterSpec", whole)
    return found


def autoscaling(name: str) -> Config:
    """As the autoscaler beside the head reads it."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    made: Config = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "raysl", "namespace": "default"}, "spec": copy.deepcopy(spec(name))}
    )
    return made


def test_kuberay_knows_every_field() -> None:
    job = read("deploy/rayjob.yaml")
    assert (job["apiVersion"], job["kind"], job["spec"].keys() - JOB) == ("ray.io/v1", "RayJob", set())
    assert read("deploy/raycluster.yaml")["kind"] == "RayCluster"
    found = spec("deploy/rayjob.yaml")
    assert found.keys() <= CLUSTER
    assert found["autoscalerOptions"].keys() <= AUTOSCALER
    assert found["headGroupSpec"].keys() <= HEAD
    assert all(group.keys() <= WORKERS for group in found["workerGroupSpecs"])


def test_both_manifests_describe_the_same_cluster() -> None:
    assert spec("deploy/rayjob.yaml") == spec("deploy/raycluster.yaml")


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_are_what_ray_needs(name: str) -> None:
    found = spec(name)
    assert found["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert found["authOptions"] == {"mode": "token"}
    for group in (found["headGroupSpec"], *found["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        # Autoscaler v2 replaces pods itself.
        assert pod["restartPolicy"] == "Never"
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {one["name"] for one in container["env"]} >= {"RAYSL_CACHE"}
    for group in found["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == 0
        assert group["template"]["spec"]["volumes"][0]["emptyDir"]["medium"] == "Memory"


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_run_starts_the_pods_that_it_was_placed_on(name: str) -> None:
    config = autoscaling(name)
    later, room = Growth.of(config).beyond([])
    machines = Machines(({"CPU": 0.0},), tuple(one.resources for one in later), room)
    placement = cluster_placement.place(4, machines)
    assert placement == Placement(1.0, 1, DataShare(1.0, 6.0), 1)
    assert launches(config, groups=[[placement.resources()] * 4]) == ({"gpu": 4}, 0)
    assert launches(config, [{"CPU": 1}] * 15) == ({"cpu": 1}, 0)
    assert launches(config, [{"GPU": 2}]) == ({}, 1)


def test_the_driver_in_a_head_pod_reads_the_cluster_that_it_is_part_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    from ray.autoscaler._private.kuberay import node_provider

    asked: list[str] = []

    def get(_: object, path: str) -> Config:
        asked.append(path)
        return {"metadata": {"name": "raysl", "namespace": "team"}, "spec": spec("deploy/raycluster.yaml")}

    (tmp_path / "namespace").write_text("team\n")
    monkeypatch.setattr(autoscaler, "_NAMESPACE", tmp_path / "namespace")
    monkeypatch.setattr(autoscaler, "LAUNCHED", tmp_path / "none.yaml")
    monkeypatch.setenv("RAY_CLUSTER_NAME", "raysl")
    monkeypatch.setattr(node_provider.KubernetesHttpApiClient, "get", get)
    found = autoscaler.growth()
    assert found is not None
    assert {one.name: one.most for one in found.types} == {"cpu": 4, "gpu": 8}
    assert set(asked) == {"rayclusters/raysl"}
