"""A cloud for the end-to-end test: moto answers the API of AWS, and every instance that it launches becomes a machine.

Command: cloud.py ADDRESS PORT REGION, inside the rig's network. Prints a line for every machine that comes or goes.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import boto3
import moto.core.serialize as serialize
import moto.ec2.responses.instances as instances
from moto.server import ThreadedMotoServer

MACHINE = str(Path(__file__).with_name("machine.sh"))


def main(address: str, port: str, region: str) -> None:
    """Runs until it is killed."""
    # The policy that `ray up` attaches to a role.
    os.environ["MOTO_IAM_LOAD_MANAGED_POLICIES"] = "true"
    as_aws_does()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    ThreadedMotoServer(ip_address=address, port=int(port), verbose=False).start()
    endpoint = f"http://{address}:{port}"
    ec2 = boto3.client("ec2", region_name=region, endpoint_url=endpoint)
    started = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - started:7.1f} s  {line}", flush=True)

    say(f"the API answers at {endpoint}")
    up: dict[str, str] = {}
    while True:
        wanted = {
            one["InstanceId"]: one
            for group in ec2.describe_instances()["Reservations"]
            for one in group["Instances"]
            if one["State"]["Name"] in ("pending", "running")
        }
        for name in up.keys() - wanted.keys():
            subprocess.run([MACHINE, "down", name], check=True)
            say(f"gone      {up.pop(name)}")
        for name in wanted.keys() - up.keys():
            _start(ec2, wanted[name], endpoint, region)
            kind = next(
                (tag["Value"] for tag in wanted[name]["Tags"] if tag["Key"] == "ray-user-node-type"), ""
            )
            market = wanted[name].get("InstanceLifecycle", "on demand")
            up[name] = f"{name}  {kind}  {wanted[name]['InstanceType']}  {market}"
            say(f"started   {up[name]}")
        time.sleep(1)


def _start(ec2: Any, instance: dict[str, Any], endpoint: str, region: str) -> None:
    """A machine at the addresses that moto gave the instance, open to the key that it names."""
    pairs = ec2.describe_key_pairs(IncludePublicKey=True)["KeyPairs"]
    keys = Path(os.environ["RIG"]) / f"{instance['InstanceId']}.keys"
    keys.write_text(
        "\n".join(pair["PublicKey"] for pair in pairs if pair["KeyName"] == instance.get("KeyName"))
    )
    profile = [
        f"AWS_ENDPOINT_URL={endpoint}",
        f"AWS_DEFAULT_REGION={region}",
        "AWS_EC2_METADATA_DISABLED=true",
        # Bodies in chunks, with a checksum behind them, came to lie in moto as they were sent, once in some hundred.
        "AWS_REQUEST_CHECKSUM_CALCULATION=when_required",
    ]
    # What a real machine asks its metadata service for, and gets only with an instance profile.
    if "IamInstanceProfile" in instance:
        profile += ["AWS_ACCESS_KEY_ID=profile", "AWS_SECRET_ACCESS_KEY=profile"]
    environment = {**os.environ, "RIG_KEYS": str(keys), "RIG_ENV": f"export {' '.join(profile)}"}
    addresses = [instance["PrivateIpAddress"], instance.get("PublicIpAddress", "")]
    subprocess.run([MACHINE, "up", instance["InstanceId"], *addresses], env=environment, check=True)


def as_aws_does() -> None:
    """Correct two answers of moto that differ from those of AWS."""
    get = instances.InstanceResponse._get_param
    body = serialize.S3Serializer._serialize_body

    def most(self: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        # Ray asks for one machine at least and n at most; moto launches the least.
        given = get(self, "MaxCount", *args, **kwargs) if name == "MinCount" else None
        return given or get(self, name, *args, **kwargs)

    def named(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        # Arrow takes another name at the root of this answer for an error.
        wrong = "CompleteMultipartUploadResponse"
        if wrong in params:
            params = {"CompleteMultipartUploadResult": params[wrong]}
        return body(self, params, *args, **kwargs)

    instances.InstanceResponse._get_param = most
    serialize.S3Serializer._serialize_body = named


if __name__ == "__main__":
    main(*sys.argv[1:])
