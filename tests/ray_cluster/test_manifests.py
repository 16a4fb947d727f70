"""The manifests for Kubernetes: their form, and what the autoscaler makes of them.

A cluster drops fields that it does not know without a word, so their names are checked against KubeRay's (1.5.1).
"""

from __future__ import annotations

import copy
from typing import Any

import pytest

from raysl.ray_cluster import autoscaler
from raysl.ray_cluster import placement as cluster_placement
from raysl.ray_cluster.autoscaler import Capacity
from raysl.ray_cluster.placement import Machines, Placement
from raysl.stream.reader import DataShare
from tests.ray_cluster.autoscaling import Config, launches, read

MANIFESTS = ("deploy/rayjob.yaml", "deploy/raycluster.yaml")
# Fields of the custom resources of KubeRay 1.5.1, which 1.6 and 1.7 still have; 1.5.0 has no authOptions.
JOB = set(
    "activeDeadlineSeconds backoffLimit clusterSelector deletionStrategy entrypoint entrypointNumCpus "
    "entrypointNumGpus entrypointResources jobId managedBy metadata rayClusterSpec runtimeEnvYAML "
    "shutdownAfterJobFinishes submissionMode submitterConfig submitterPodTemplate suspend "
    "ttlSecondsAfterFinished".split()
)
CLUSTER = set(
    "authOptions autoscalerOptions enableInTreeAutoscaling gcsFaultToleranceOptions headGroupSpec "
    "headServiceAnnotations managedBy rayVersion suspend workerGroupSpecs".split()
)
AUTOSCALER = set(
    "env envFrom idleTimeoutSeconds image imagePullPolicy resources securityContext upscalingMode version "
    "volumeMounts".split()
)
HEAD = set("enableIngress headService labels rayStartParams resources serviceType template".split())
WORKERS = set(
    "groupName idleTimeoutSeconds labels maxReplicas minReplicas numOfHosts rayStartParams replicas resources "
    "scaleStrategy suspend template".split()
)
POD = set("affinity containers restartPolicy serviceAccountName tolerations volumes".split())
CONTAINER = set("env image name resources volumeMounts".split())


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
    assert found["autoscalerOptions"]["version"] in ("v1", "v2")
    assert found["autoscalerOptions"]["upscalingMode"] in ("Default", "Aggressive", "Conservative")
    assert found["headGroupSpec"].keys() <= HEAD
    assert all(group.keys() <= WORKERS for group in found["workerGroupSpecs"])
    for group in (found["headGroupSpec"], *found["workerGroupSpecs"]):
        # Kubernetes refuses other types: these are texts.
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert group["template"]["spec"].keys() <= POD
        for container in group["template"]["spec"]["containers"]:
            assert container.keys() <= CONTAINER
            assert all(isinstance(one["value"], str) for one in container["env"])


def test_spot_machines_are_preferred_and_not_required() -> None:
    for group in spec("deploy/rayjob.yaml")["workerGroupSpecs"]:
        for kind in group["template"]["spec"].get("affinity", {}).values():
            assert kind.keys() == {"preferredDuringSchedulingIgnoredDuringExecution"}


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
    later, room = Capacity.of(config).remaining([])
    machines = Machines(({"CPU": 0.0},), tuple(one.resources for one in later), room)
    placement = cluster_placement.make_placement(4, machines)
    assert placement == Placement(1.0, 1, DataShare(1.0, 6.0), 1, 7.0)
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
    found = autoscaler.capacity()
    assert found is not None
    assert {one.name: one.most for one in found.types} == {"cpu": 4, "gpu": 8}
    assert set(asked) == {"rayclusters/raysl"}
