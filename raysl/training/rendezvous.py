"""Where the processes of a process group of torch find each other.

torch's own store listens on every interface and asks for no token. On one machine, it listens on loopback instead.
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

# Of this process, which lets it listen for as long as it lives.
_listening: Any = None


def config() -> TorchConfig:
    """How the trainers of Ray Train find each other: on loopback where this machine's Ray is."""
    return _LoopbackConfig() if _is_loopback(ray.util.get_node_ip_address()) else TorchConfig()


def listen(host: str) -> Any:
    """A store that listens at a free port of this machine; of the loopback address alone if that is the host."""
    if not _is_loopback(host):
        return TCPStore(host, 0, is_master=True, wait_for_workers=False)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family, backlog=socket.SOMAXCONN)
    port = listener.getsockname()[1]
    # The store closes it.
    descriptor = listener.detach()
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor)


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host).is_loopback


@dataclass
class _LoopbackConfig(TorchConfig):  # type: ignore[misc]
    """Ray's own, with another backend."""

    @property
    def backend_cls(self) -> type[_LoopbackBackend]:
        return _LoopbackBackend


class _LoopbackBackend(_TorchBackend):  # type: ignore[misc]
    """Ray's own, whose first worker listens on loopback."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Makes the process group of new workers."""
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
    """Runs in the first worker."""
    global _listening
    host = ray.util.get_node_ip_address()
    _listening = listen(host)
    return host, _listening.port


def _join(backend: str, rank: int, world: int, place: tuple[str, int], timeout_s: float) -> None:
    """Runs in every worker."""
    timeout = timedelta(seconds=timeout_s)
    store = _listening if rank == 0 else TCPStore(*place, is_master=False, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
