"""Choose the images that BatchNorm computes its statistics over: those of all workers ("sync"), of all views ("joint"),
or of the current batch in evaluation.

BatchNorm (Ioffe and Szegedy, arXiv 1502.03167) normalizes each channel by the mean and the variance over a batch. None
of these adds weights, and "sync" and "joint" do not change the network in eval mode.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from raysl.communication import collective
from raysl.errors import explained


def synchronize(network: nn.Module, device: torch.device) -> None:
    """Make every BatchNorm in a network compute its statistics over the batches of all workers, with gradient.

    Weights and statistics stay the same tensors. On a GPU this is torch's `SyncBatchNorm`. torch has none for the CPU,
    and DistributedDataParallel refuses its class there.
    """
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        return
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm):
                setattr(module, name, _SyncBatchNorm.of(child))


class _SyncBatchNorm(_BatchNorm):
    """BatchNorm over the equal batches of all workers, on any device and backend."""

    @staticmethod
    def of(norm: _BatchNorm) -> _SyncBatchNorm:
        """Return a layer with the weights and statistics of another."""
        made = _SyncBatchNorm(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
        )
        made.weight, made.bias = norm.weight, norm.bias
        made.running_mean, made.running_var = norm.running_mean, norm.running_var
        made.num_batches_tracked = norm.num_batches_tracked
        return made.train(norm.training)

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any number of dimensions, channels second."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or collective.world() == 1:
            return super().forward(input)
        rows_nc = input.movedim(1, -1).flatten(0, -2).float()
        var_c, mean_c = torch.var_mean(rows_nc, dim=0, correction=0)
        # (w, 2, c): batches have equal size, so the variance is the mean variance plus the variance of the means.
        parts = collective.gather_with_gradient(torch.stack([mean_c, var_c])[None])
        mean_c = parts[:, 0].mean(dim=0)
        var_c = parts[:, 1].mean(dim=0) + (parts[:, 0] - mean_c).square().mean(dim=0)
        self._update_running(mean_c.detach(), var_c.detach(), len(rows_nc) * collective.world())
        made_nc = (rows_nc - mean_c) * (var_c + self.eps).rsqrt()
        if self.affine:
            made_nc = made_nc * self.weight + self.bias
        return made_nc.to(input.dtype).view(input.movedim(1, -1).shape).movedim(-1, 1)

    def _update_running(self, mean_c: Tensor, var_c: Tensor, n: int) -> None:
        """Update the running statistics as torch does, with the unbiased variance."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_c, momentum)
        self.running_var.lerp_(var_c * n / max(1, n - 1), momentum)


def use_batch_statistics(network: nn.Module) -> None:
    """Make every BatchNorm use the statistics of the current batch in eval mode, as in training.

    The running statistics are deleted.
    """
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean = module.running_var = None


def trace(network: nn.Module) -> fx.Graph:
    """Return the operations of a network, for `forward_jointly`.

    Raises:
        UserError: the operations depend on values that are known only at run time.
    """
    what = f"The backbone {type(network).__name__} cannot be used with --backbone.norm joint"
    with explained(what, "Use batch.", fx.proxy.TraceError, TypeError):
        return fx.Tracer().trace(network)


def forward_jointly(network: nn.Module, graph: fx.Graph, batches: Sequence[Tensor]) -> list[Tensor]:
    """Run a network on several batches; each BatchNorm computes its statistics over all of them.

    The images of the batches may differ in size. torch.compile does not make it faster.

    Args:
        network: the network, in training mode.
        graph: its operations, from `trace`.
        batches: inputs of the network.
    """
    return list(_JointInterpreter(network, graph=graph, count=len(batches)).run(_Batches(batches)))


@functools.cache
def prepare_compilation() -> None:
    """Make torch.compile leave `forward_jointly` out.

    This imports torch._dynamo, which takes seconds in each process, so only processes that compile call it.
    """
    global forward_jointly
    forward_jointly = torch.compiler.disable(forward_jointly)  # type: ignore[no-untyped-call]


class _Batches(tuple[Any, ...]):
    """The values of one tensor for each of the batches."""


class _JointInterpreter(fx.Interpreter):
    """Run every operation on each batch, and BatchNorm on all batches at once."""

    def __init__(self, network: nn.Module, graph: fx.Graph, count: int) -> None:
        super().__init__(network, graph=graph)
        self.count = count

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, _BatchNorm):
            return _Batches(_batch_norm(module, args[0]))
        return self.call_function(module, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.call_function(lambda x, *rest, **names: getattr(x, target)(*rest, **names), args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return _Batches(target(*_part(args, i), **_part(kwargs, i)) for i in range(self.count))


def _part(value: Any, i: int) -> Any:
    """Return the value of batch i, in nested tuples, lists and dicts."""
    if isinstance(value, _Batches):
        return value[i]
    if isinstance(value, tuple | list):
        return type(value)(_part(item, i) for item in value)
    if isinstance(value, dict):
        return {name: _part(item, i) for name, item in value.items()}
    return value


def _batch_norm(norm: _BatchNorm, parts: Sequence[Tensor]) -> list[Tensor]:
    """Apply a BatchNorm to the pixels of all batches, each as an image of one pixel."""
    pixels = [part.movedim(1, -1) for part in parts]
    rows_nc = torch.cat([p.flatten(0, -2) for p in pixels])
    lone = (1,) * (parts[0].ndim - 2)
    made_nc = norm(rows_nc.view(*rows_nc.shape, *lone)).view(rows_nc.shape)
    made = made_nc.split([p[..., 0].numel() for p in pixels])
    # Copies: the next layer may work in place, which autograd refuses for parts of one tensor.
    return [m.clone().view(p.shape).movedim(-1, 1) for m, p in zip(made, pixels, strict=True)]


# Images whose statistics replace those of training; see `reestimate`.
STATISTICS_IMAGES = 2048


def with_statistics(network: nn.Module) -> list[_BatchNorm]:
    """Return every BatchNorm that keeps running statistics."""
    return [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def reestimate(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the running statistics of every BatchNorm by their mean over batches; the network ends in eval mode.

    A network that was pretrained on patches or on mixed views has running statistics of those. torch's `update_bn`
    does the same with the whole network in training mode, where dropout would draw random numbers.

    Args:
        network: in its evaluation form. A network without BatchNorm reads no batch.
        batches: at least one, of equal size, each as the network takes it.
    """
    network.eval()
    norms = with_statistics(network)
    if not norms:
        return
    momenta = [module.momentum for module in norms]
    for module in norms:
        module.reset_running_stats()
        module.momentum = None
        module.train()
    with torch.no_grad():
        for images_bchw in batches:
            network(images_bchw)
    for module, momentum in zip(norms, momenta, strict=True):
        module.momentum = momentum
        module.eval()
