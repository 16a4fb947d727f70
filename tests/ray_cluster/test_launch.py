"""cluster.yaml and its variant for Google Cloud, without a cloud: form, defaults, and what they would start."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import yaml

from raysl.errors import UserError
from raysl.ray_cluster import placement as cluster_placement
from raysl.ray_cluster.autoscaler import Capacity
from raysl.ray_cluster.placement import Machines, Placement
from raysl.stream.reader import DataShare
from tests.ray_cluster.autoscaling import ROOT, Config, aws, bootstrapped, launches, prepared, read

CONFIGS = ("cluster.yaml", "deploy/cluster-gcp.yaml")
MACHINES = {"gpu_spot", "gpu_ondemand", "cpu"}


@pytest.fixture(scope="module")
def on_aws(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """cluster.yaml as it would lie on the head."""
    with aws(tmp_path_factory.mktemp("home")):
        return bootstrapped(read("cluster.yaml"))


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_is_left_to_the_defaults_of_ray(name: str) -> None:
    given = read(name)
    made = prepared(given)
    assert made["setup_commands"] == given["setup_commands"]
    assert made["head_start_ray_commands"] == given["head_start_ray_commands"]
    assert made["worker_start_ray_commands"] == given["worker_start_ray_commands"]
    import ray.autoscaler

    defaults = ROOT.joinpath(ray.autoscaler.__path__[0], given["provider"]["type"], "defaults.yaml")
    left_out = yaml.safe_load(defaults.read_text()).keys() - given.keys()
    assert not left_out, "state these: Ray has values of its own for them"


@pytest.mark.parametrize("name", CONFIGS)
def test_the_head_takes_no_work_and_workers_come_and_go(name: str) -> None:
    kinds = prepared(read(name))["available_node_types"]
    head = kinds.pop("head")
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert head["max_workers"] == 0
    # The machines with eight GPUs are expensive: the user switches them on.
    assert kinds.pop("gpu_8", {"max_workers": 0})["max_workers"] == 0
    assert kinds.keys() == MACHINES
    assert [kind["min_workers"] for kind in kinds.values()] == [0, 0, 0]
    assert read(name)["provider"]["cache_stopped_nodes"] is False
    assert all(float(kind["labels"]["usd-per-hour"]) > 0 for kind in (head, *kinds.values()))


@pytest.mark.parametrize("name", CONFIGS)
def test_code_comes_beside_the_package_and_without_the_network(name: str) -> None:
    config = read(name)
    local = {there: here for there, here in config["file_mounts"].items() if not here.startswith("~")}
    assert local == {"~/raysl-src/raysl": "./raysl"}
    commands = " ".join(config["setup_commands"])
    assert not re.search(r"\b(pip|uv|conda|apt|curl|wget|git)\b", commands)
    assert "~/raysl-src >" in commands
    assert "RAY_AUTH_MODE=token" in commands
    assert re.search(r"RAYSL_CACHE=(s3|gs)://", commands)
    assert "~/.ray/auth_token" in config["file_mounts"]


def test_aws_takes_it(on_aws: Config) -> None:
    kinds = on_aws["available_node_types"]
    for kind in kinds.values():
        node = kind["node_config"]
        assert node["IamInstanceProfile"] == {"Name": "raysl-node"}
        assert node["SubnetIds"]
        assert node["SecurityGroupIds"]
        assert node["KeyName"]
    assert kinds["gpu_spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in kinds["gpu_ondemand"]["node_config"]
    assert kinds["gpu_spot"]["resources"].items() >= {"CPU": 8, "GPU": 1}.items()
    assert kinds["head"]["resources"]["CPU"] == 0


def test_a_machine_with_eight_gpus_takes_a_run_of_eight_workers(on_aws: Config) -> None:
    config = copy.deepcopy(on_aws)
    for name, kind in config["available_node_types"].items():
        kind["max_workers"] = int(name == "gpu_8")
    placement, _ = sizes(config, 8)
    assert placement == Placement(1.0, 1, DataShare(1.0, 11.0), 1, 12.0)
    assert launches(config, groups=[[placement.resources()] * 8]) == ({"gpu_8": 1}, 0)


def test_the_driver_of_google_is_one_that_torch_can_use() -> None:
    for kind in read("deploy/cluster-gcp.yaml")["available_node_types"].values():
        image = kind["node_config"]["disks"][0]["initializeParams"]["sourceImage"]
        assert int(image.rpartition("-")[2]) >= 580


def sizes(config: Config, workers: int) -> tuple[Placement, Machines]:
    """The placement of a run on the empty cluster, as raysl computes it on the head."""
    found = Capacity.of(config)
    later, room = found.remaining([])
    machines = Machines(({"CPU": 0.0},), tuple(one.resources for one in later), room)
    return cluster_placement.make_placement(workers, machines), machines


def configured(name: str, on_aws: Config) -> Config:
    return on_aws if name == "cluster.yaml" else prepared(read(name))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("workers", [1, 2, 8])
def test_a_run_is_given_the_machines_that_it_was_placed_on(name: str, workers: int, on_aws: Config) -> None:
    config = configured(name, on_aws)
    placement, _ = sizes(config, workers)
    assert placement == Placement(1.0, 1, DataShare(1.0, 7.0), 1, 8.0)
    started, refused = launches(config, groups=[[placement.resources()] * workers])
    assert (started, refused) == ({"gpu_spot": workers}, 0)


def test_the_runs_of_a_sweep_fill_the_cluster_and_no_more(on_aws: Config) -> None:
    placement, _ = sizes(on_aws, 8)
    started, refused = launches(on_aws, groups=[[placement.resources()]] * 8)
    assert (started, refused) == ({"gpu_spot": 8}, 0)
    with pytest.raises(UserError, match="9 workers need 9 GPUs and the cluster could have 8"):
        sizes(on_aws, 9)


def test_machines_on_demand_stand_in_where_there_are_no_spot_ones(on_aws: Config) -> None:
    gpu = {"CPU": 1, "GPU": 1}
    assert launches(on_aws, [gpu] * 3, unavailable=["gpu_spot"]) == ({"gpu_ondemand": 3}, 0)


def test_work_without_a_gpu_starts_no_machine_with_one(on_aws: Config) -> None:
    assert launches(on_aws, [{"CPU": 1}] * 16) == ({"cpu": 1}, 0)
    _, machines = sizes(on_aws, 1)
    pool = machines.totals()
    assert pool == {"CPU": 16, "GPU": 0}
    # Of features: half of the CPUs, in as many actors as there are CPUs.
    assert launches(on_aws, [{"CPU": 0.5}] * 16) == ({"cpu": 1}, 0)


@pytest.mark.parametrize("demand", [{"GPU": 2}, {"CPU": 17}])
def test_what_no_machine_can_hold_is_refused_and_not_waited_for(
    demand: dict[str, Any], on_aws: Config
) -> None:
    assert launches(on_aws, [demand]) == ({}, 1)
