"""What Ray's launcher and autoscaler make of a configuration, asked of Ray itself and without a cloud.

These are private modules of Ray, whose version is pinned: a new one may move them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
Config = dict[str, Any]


def read(name: str) -> Config:
    """A file of the checkout."""
    config: Config = yaml.safe_load((ROOT / name).read_text())
    return config


def prepared(config: Config) -> Config:
    """As `ray up` fills it in, with Ray's defaults for what was left out, and checks its form."""
    from ray.autoscaler._private import util

    made: Config = util.prepare_config(copy.deepcopy(config))
    util.validate_config(made)
    return made


@contextmanager
def aws(home: Path) -> Iterator[None]:
    """A mock of AWS for this process, with nothing in it. Skips the test where moto is not installed."""
    moto = pytest.importorskip("moto")
    from ray.autoscaler._private.aws import config, utils
    from ray.autoscaler._private.providers import _clear_provider_cache

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "HOME": str(home),  # the key pair goes to ~/.ssh
        }.items():
            patch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL"):
            patch.delenv(name, raising=False)
        # New roles take half a minute to spread over the real AWS.
        patch.setattr(config.time, "sleep", lambda _: None)
        with moto.mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
            for cache in (utils.resource_cache, utils.client_cache):
                cache.cache_clear()
            _clear_provider_cache()
            yield


def bootstrapped(config: Config) -> Config:
    """As it lies on the head: resources from the cloud's list of machines, subnets, key, security group. In `aws`."""
    import boto3
    from ray.autoscaler._private import util
    from ray.autoscaler._private.providers import _NODE_PROVIDERS

    iam = boto3.client("iam", region_name=config["provider"]["region"])
    for name in {kind["node_config"]["IamInstanceProfile"]["Name"] for kind in _kinds(config)}:
        iam.create_instance_profile(InstanceProfileName=name)
    provider = _NODE_PROVIDERS["aws"](config["provider"])
    filled: Config = provider.fillout_available_node_types_resources(
        util.prepare_config(copy.deepcopy(config))
    )
    util.validate_config(filled)
    made: Config = provider.bootstrap_config(filled)
    made.pop("head_node", None)  # as `ray up` does before it writes the file
    return made


def _kinds(config: Config) -> list[Config]:
    return list(config["available_node_types"].values())


def launches(
    config: Config,
    demands: Sequence[Mapping[str, float]] = (),
    groups: Sequence[Sequence[Mapping[str, float]]] = (),
    unavailable: Sequence[str] = (),
) -> tuple[dict[str, int], int]:
    """What the autoscaler would start on an empty cluster.

    Args:
        config: prepared.
        demands: resources of single tasks and actors.
        groups: resources of placement groups, bundle by bundle.
        unavailable: types that the cloud has just refused.

    Returns:
        The number of machines by type, and how many of the demands no type can hold.
    """
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import GangResourceRequest

    read = AutoscalingConfig(copy.deepcopy(config), skip_content_hash=True)
    gone = dict.fromkeys(unavailable, 0.0)
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=read.get_node_type_configs(),
            max_num_nodes=read.get_max_num_nodes(),
            idle_timeout_s=read.get_idle_timeout_s(),
            resource_requests=ResourceRequestUtil.group_by_count(
                [ResourceRequestUtil.make(dict(demand)) for demand in demands]
            ),
            gang_resource_requests=[
                GangResourceRequest(requests=[ResourceRequestUtil.make(dict(bundle)) for bundle in group])
                for group in groups
            ],
            cloud_resource_availabilities=gone,
            recoverable_resource_availabilities=gone,
        )
    )
    started = {one.instance_type: one.count for one in reply.to_launch}
    # No machine is there, so it would start a head too.
    started.pop(config["head_node_type"], None)
    return started, len(reply.infeasible_resource_requests) + len(reply.infeasible_gang_resource_requests)
