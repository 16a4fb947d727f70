"""Backbones: networks from uint8 images to features, by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from raysl import plugins
from raysl.backbone import norm as norms
from raysl.backbone.small import SmallBackbone
from raysl.errors import UserError, package, unknown
from raysl.fields import Bounds, Checked
from raysl.storage import Folder

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
TIMM = "timm/"

_PUBLISHED_SIZE = 224
_PATCHES = (8, 14, 16, 32)  # sides of the patches of transformers; other networks halve images five times


@dataclass(frozen=True)
class BackboneConfig(Checked):
    """Configuration of the backbone.

    Args:
        name: "small" (for two CPU cores and small images); a torchvision classifier such as "resnet50"; "timm/NAME" for
            a network of timm; or "MODULE:FUNCTION" or "FILE.py:FUNCTION" for a function that returns an `nn.Module`
            from normalized images (b, 3, s, s) to features (b, width). The classification layer is removed.
        stem: "standard" keeps the 7x7 stride-2 convolution and the max-pool; "small" replaces them by a 3x3
            convolution, for images of 64 pixels or less. Only for ResNets.
        norm: "batch" is BatchNorm as in the papers: each worker computes the statistics of its own images, separately
            for each view (patches, whole images). "joint" computes them over all views together, "sync" for each view
            over the images of all workers, also in the projection heads. "group" is GroupNorm, which normalizes each
            image by itself, so that gradients do not depend on the number of workers.
        patch_size: side of a patch of a vision transformer of timm in pixels; 0 for the size in its name.
        weights: file of weights that training starts from, in a format that `raysl probe` reads; a path or a URI. Also
            a finished run (its last checkpoint), RUN/checkpoints/step-NNN, or a folder of `raysl export`. Where a
            command has no training, as `raysl probe`, the encoder "random" has these weights, and they have no effect
            on a weights file.
    """

    name: str = "small"
    stem: Literal["standard", "small"] = "standard"
    norm: Literal["batch", "joint", "sync", "group"] = "batch"
    patch_size: Annotated[int, Bounds(0, 512)] = 0
    weights: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        module, colon, function = self.name.rpartition(":")
        if self.weights and "://" not in self.weights:
            object.__setattr__(self, "weights", Folder(self.weights).uri)
        if colon:  # workers have another working directory
            object.__setattr__(self, "name", f"{plugins.remembered(module)}:{function}")

    def modules(self) -> list[str]:
        """Return the module or file of the user's code that builds the backbone, if there is any."""
        return [self.name.rpartition(":")[0]] if ":" in self.name else []


def config_of(factory: Callable[[], nn.Module]) -> BackboneConfig:
    """Return the configuration of a backbone that a function or class of the user builds.

    Workers, probes and exports build the backbone again, so they must be able to import the factory.

    Raises:
        UserError: it is an instance of a module, or is defined in a script, a notebook or another function.
    """
    if not isinstance(factory, nn.Module) and (name := plugins.importable_name(factory)):
        return BackboneConfig(name)
    raise UserError(
        f"The backbone {getattr(factory, '__qualname__', '') or type(factory).__name__!r} cannot be built again by "
        "workers and probes. Give the function or class that builds it, and define it at the top level of a module "
        "that can be imported."
    )


class Backbone(nn.Module):
    """A network from uint8 images to features. The constants of the normalization are saved with it.

    Args:
        body: the network alone, under its own names, so that its state dict can be loaded elsewhere.
        joint: compute the statistics of BatchNorm over several batches together; see `forward_jointly`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, body: nn.Module, width: int, joint: bool = False) -> None:
        super().__init__()
        self.body = body
        self.width = width
        self.graph = norms.trace(body) if joint else None
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1) * 255)

    def forward(self, images_bchw: Tensor) -> Tensor:
        """Compute features of a batch.

        Args:
            images_bchw: uint8, or float in the range 0 to 255.

        Returns:
            float (b, width), pooled over the image.
        """
        features: Tensor = self.body(self.normalized(images_bchw))
        return features.flatten(1)

    def forward_jointly(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Compute features of several batches with images of any sizes.

        With norm "joint", BatchNorm computes its statistics over all of them; otherwise they pass one after the other.
        """
        if self.graph is None or not self.training:
            return [self(images_bchw) for images_bchw in batches]
        made = norms.forward_jointly(self.body, self.graph, [self.normalized(images) for images in batches])
        return [features.flatten(1) for features in made]

    def maps(self, images_bchw: Tensor) -> Tensor:
        """Compute the spatial map before pooling, or the patch tokens of a transformer: float (b, d, h, w).

        Raises:
            UserError: the backbone has no such map.
        """
        images_bchw = self.normalized(images_bchw)
        if hasattr(self.body, "forward_features"):
            features: Any = self.body.forward_features
            return as_map(features(images_bchw))
        children = dict(self.body.named_children())
        name = next((name for name in ("avgpool", "features", "encoder") if name in children), None)
        if name is None:
            raise UserError(
                f"The backbone {type(self.body).__name__} has no spatial map. Use a ResNet, a ConvNeXt or a ViT."
            )
        kept: list[Tensor] = []
        if name == "avgpool":
            hook = children[name].register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
        else:
            hook = children[name].register_forward_hook(lambda _, inputs, output: kept.append(output))
        try:
            self.body(images_bchw)
        finally:
            hook.remove()
        return as_map(kept[0])

    def normalized(self, images_bchw: Tensor) -> Tensor:
        """Return the images as the body takes them."""
        return (images_bchw.to(self.mean.dtype) - self.mean) / self.std


def as_map(output: Tensor) -> Tensor:
    """Return (b, d, h, w) from a map in either layout, or from tokens, of which the first may be no patches."""
    if output.ndim == 4:
        channels_last = output.shape[1] == output.shape[2] != output.shape[3]
        return output.movedim(-1, 1) if channels_last else output
    side = math.isqrt(output.shape[1])
    patches_btd = output[:, output.shape[1] - side * side :]
    return patches_btd.transpose(1, 2).reshape(len(output), -1, side, side)


def encode(backbone: nn.Module, views_bpchw: Tensor) -> Tensor:
    """Compute features of every crop in one pass: (b, p, width).

    Nine passes over a jigsaw would give each slot its own batch statistics, which reveal the position, and update the
    running statistics nine times.
    """
    b, p = views_bpchw.shape[:2]
    features: Tensor = backbone(views_bpchw.flatten(0, 1))
    return features.view(b, p, -1)


def encode_views(backbone: nn.Module, views: Sequence[Tensor]) -> list[Tensor]:
    """Compute features of every crop of several views, in their order or jointly; see `BackboneConfig.norm`.

    Args:
        views: uint8 (b, p, c, h, w) each; p, h and w may differ.

    Returns:
        float (b, p, width) each.
    """
    if not isinstance(backbone, Backbone):
        return [encode(backbone, view_bpchw) for view_bpchw in views]
    made = backbone.forward_jointly([view_bpchw.flatten(0, 1) for view_bpchw in views])
    return [features.view(*view.shape[:2], -1) for features, view in zip(made, views, strict=True)]


def encode_maps(backbone: Backbone, views_bpchw: Tensor) -> Tensor:
    """Compute the spatial map, or the patch tokens, of every crop: (b, p, d, h, w). See `Backbone.maps`."""
    maps = backbone.maps(views_bpchw.flatten(0, 1))
    return maps.view(*views_bpchw.shape[:2], *maps.shape[1:])


def build(config: BackboneConfig) -> Backbone:
    """Build a backbone with weights from torch's global generator.

    Raises:
        UserError: the name does not exist, or has no such stem or norm.
    """
    norm = (
        (lambda channels: nn.GroupNorm(channels // 8, channels)) if config.norm == "group" else nn.BatchNorm2d
    )
    joint = config.norm == "joint"
    if config.name == "small":
        return Backbone(SmallBackbone(norm), SmallBackbone.width, joint)
    if ":" in config.name or config.name.startswith(TIMM):
        if config.stem != "standard" or config.norm == "group":
            raise UserError(
                f"The backbone {config.name!r} keeps its own stem and norm. Use --backbone.stem standard and "
                "--backbone.norm batch, sync or joint."
            )
        return _own(config.name, joint) if ":" in config.name else _timm(config, joint)
    if config.name not in names():
        raise unknown("backbone", config.name, names())
    network = _classifier(config, norm)
    width = _remove_head(network)
    if config.stem == "small":
        conv: Any = network.conv1
        network.conv1 = nn.Conv2d(3, conv.out_channels, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    return Backbone(network, width, joint)


def names() -> list[str]:
    """Return "small" and the names of torchvision's classifiers without auxiliary outputs."""
    from torchvision import models

    auxiliary = ("googlenet", "inception_v3")
    return ["small", *(name for name in models.list_models(models) if name not in auxiliary)]


def check_size(config: BackboneConfig, image_size: int, flag: str = "--image-size") -> None:
    """Raise UserError when a backbone does not take images of a size in pixels."""
    if config.name != "small" and (error := _size_error(config, image_size)):
        reason, sizes = error
        raise UserError(
            f"The backbone {config.name!r} does not take images of {image_size} pixels ({reason}). Give {flag} "
            f"{sizes}, or another --backbone.name."
        )


@lru_cache
def _size_error(config: BackboneConfig, image_size: int) -> tuple[str, str] | None:
    """Return why a backbone does not take a size, and the nearest that it takes "or" its own; None if it takes it."""
    body = skeleton(config).eval()
    own_size = getattr(body.body, "pretrained_cfg", {}).get("input_size", (3, _PUBLISHED_SIZE))[-1]
    reason = _failure(body, image_size)
    # A network that fails at its own size too may need its weights, so it is not judged here.
    if not reason or _failure(body, own_size):
        return None
    near = [max(n, n * round(image_size / n)) for n in _PATCHES]
    near = [size for size in sorted(near, key=lambda n: abs(n - image_size)) if not _failure(body, size)][:1]
    return reason, " or ".join(map(str, dict.fromkeys((*near, own_size))))


def _failure(body: Backbone, image_size: int) -> str:
    """Return the error of a forward pass; empty when it works."""
    images_bchw = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device=body.mean.device)
    try:
        with torch.inference_mode():
            body(images_bchw)
    except (AssertionError, RuntimeError, ValueError) as error:
        return " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return ""


def skeleton(config: BackboneConfig) -> Backbone:
    """Build a backbone without weights where possible."""
    # For "meta", torch imports its compiler, which takes longer than to make the weights of the small one.
    if config.name != "small":
        with suppress(RuntimeError), torch.device("meta"):
            return build(config)
    # Some networks compute widths or rates by tensors, such as RegNets.
    with torch.random.fork_rng(devices=[]):
        return build(config)


def _classifier(config: BackboneConfig, norm: Callable[[int], nn.Module]) -> nn.Module:
    """Build a torchvision classifier. Raise UserError when it has no such stem or norm."""
    from torchvision import models

    options = {"norm_layer": norm} if config.norm == "group" else {}
    try:
        network: nn.Module = models.get_model(config.name, weights=None, **options)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"The backbone {config.name!r} cannot be built with norm {config.norm!r}: {error}. Use --backbone.norm "
            "batch."
        ) from error
    if config.stem == "small" and not (hasattr(network, "conv1") and hasattr(network, "maxpool")):
        raise UserError(
            f"The backbone {config.name!r} has no stem that can be replaced; only ResNets have. Use --backbone.stem "
            "standard."
        )
    return network


def _timm(config: BackboneConfig, joint: bool) -> Backbone:
    made = timm_backbone(config.name.removeprefix(TIMM), config.patch_size)
    made.graph = norms.trace(made.body) if joint else None
    return made


def timm_backbone(name: str, patch_size: int = 0) -> Backbone:
    """Build a backbone of timm that normalizes images as its published weights expect.

    Args:
        name: name in timm, or NAME.TAG: weights with another tag may expect another normalization, as those
            of "vit_small_patch16_224" and "vit_small_patch16_224.dino".
        patch_size: side of a patch of a vision transformer in pixels; 0 for the size in its name.

    Raises:
        UserError: timm is not installed, or has no such network.
    """
    timm = package("timm", f"The backbone {TIMM + name!r}", "export")
    known = timm.list_models(pretrained="." in name)  # With tags, or without.
    if name not in known:
        raise unknown("backbone of timm", name, known)
    body = _timm_body(name, {"patch_size": patch_size} if patch_size else {})
    # If the head begins with layers of its own, `num_features` is the width of its input.
    made = Backbone(body, int(getattr(body, "head_hidden_size", body.num_features)))
    for buffer, constants in ((made.mean, "mean"), (made.std, "std")):
        buffer.copy_(torch.tensor(body.pretrained_cfg[constants]).view(1, 3, 1, 1) * 255)
    return made


def _timm_body(name: str, options: dict[str, int]) -> Any:
    """Build a network of timm; a vision transformer takes images of any size that its patches divide."""
    import timm

    try:
        return timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True, **options)
    except TypeError:
        try:
            return timm.create_model(name, pretrained=False, num_classes=0, **options)
        except TypeError as error:
            raise UserError(
                f"--backbone.patch-size is {options.get('patch_size')} and the backbone {TIMM + name!r} has no "
                "patches. Use 0, or a vision transformer."
            ) from error


def _own(name: str, joint: bool) -> Backbone:
    """Build a backbone of the user, from "MODULE:FUNCTION" or "FILE.py:FUNCTION"."""
    function = plugins.function(name, "backbone")
    try:
        body = function()
    except TypeError as error:
        if error.__traceback__ and error.__traceback__.tb_next:  # raised inside of the function
            raise
        raise UserError(
            f"The backbone {name!r} must need no arguments: {error}. Give them defaults."
        ) from error
    if not isinstance(body, nn.Module):
        raise UserError(f"The backbone {name!r} returns {type(body).__name__} and no torch.nn.Module.")
    return Backbone(body, _width(body, name), joint)


def _width(body: nn.Module, name: str) -> int:
    """Return the number of features of a network of the user, by a forward pass if it does not say."""
    known = getattr(body, "width", getattr(body, "num_features", None))
    if isinstance(known, int):
        return known
    reason, was_training = "", body.training
    for size in (32, 64, _PUBLISHED_SIZE):
        try:
            with torch.no_grad():
                output: Tensor = body.eval()(torch.zeros(2, 3, size, size))
            return output.flatten(1).shape[1]
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = str(error)
        finally:
            body.train(was_training)
    raise UserError(
        f"The backbone {name!r} does not compute features of images of 32, 64 or 224 pixels: {reason}. Give it an "
        "attribute `width`, the number of its features."
    )


def _remove_head(network: nn.Module) -> int:
    """Replace the last linear layer, the classifier, by the identity. Return the width of its input."""
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UserError(
            "This backbone has no linear classifier at its end, so its features have no known width."
        )
    parent, _, child = linear[-1].rpartition(".")
    holder: Any = network.get_submodule(parent)
    head: nn.Linear = network.get_submodule(linear[-1])  # type: ignore[assignment]
    setattr(holder, child, nn.Identity())
    return head.in_features
