"""Let the processes of a torch process group find each other without opening a port to other machines.

torch's own store listens on every interface without a token. With all workers on one machine, it listens on loopback.
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend
from torch.distributed import TCPStore  # type: ignore[attr-defined]

# The store of this process; it listens as long as the process lives.
_listening: Any = None


def config(timeout_s: int) -> TorchConfig:
    """Return the rendezvous for Ray Train: on loopback if this machine's Ray is on loopback."""
    kind = _LoopbackConfig if _is_loopback(ray.util.get_node_ip_address()) else TorchConfig
    return kind(timeout_s=timeout_s)


def listen(host: str) -> Any:
    """Return a store that listens on a free port of `host`; on loopback only if `host` is a loopback address."""
    if not _is_loopback(host):
        return TCPStore(host, 0, is_master=True, wait_for_workers=False)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family, backlog=socket.SOMAXCONN)
    port = listener.getsockname()[1]
    # The store closes the detached socket.
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host).is_loopback


@dataclass
class _LoopbackConfig(TorchConfig):  # type: ignore[misc]
    """Ray's configuration with another backend."""

    @property
    def backend_cls(self) -> type[_LoopbackBackend]:
        return _LoopbackBackend


class _LoopbackBackend(_TorchBackend):  # type: ignore[misc]
    """Ray's backend, except that the first worker listens on loopback."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Create the process group of new workers."""
        backend = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) > 0 else "gloo"
        worker_group.execute(_set_torch_distributed_env_vars)
        place = worker_group.execute_single(0, _listen)
        world = len(worker_group)
        joining = [
            worker_group.execute_single_async(
                rank, _join, backend, rank, world, place, backend_config.timeout_s
            )
            for rank in range(world)
        ]
        ray.get(joining)


def _listen() -> tuple[str, int]:
    """Start the store, in the first worker."""
    global _listening
    host = ray.util.get_node_ip_address()
    _listening = listen(host)
    return host, _listening.port


def _join(backend: str, rank: int, world: int, place: tuple[str, int], timeout_s: float) -> None:
    """Join the process group, in every worker."""
    timeout = timedelta(seconds=timeout_s)
    store = _listening if rank == 0 else TCPStore(*place, is_master=False, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
