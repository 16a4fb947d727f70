"""Build the model of a run, the backbone with the heads of its method, and the stream of the views that it needs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raysl import checkpoint, pretext
from raysl.augment import recipe
from raysl.augment.own_augmentation import OwnAugmentation
from raysl.backbone import network
from raysl.backbone.external_weights import load_weights_into
from raysl.backbone.network import BackboneConfig
from raysl.config import Pretraining, methods
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.objectives import Alternates, Describes, Objective, Setup, ViewRecipes
from raysl.pretext import Geometry
from raysl.rng import ImageRng, key
from raysl.storage import Folder
from raysl.stream.plan import num_steps
from raysl.stream.reader import DataShare, Stream
from raysl.stream.views import View


@dataclass(frozen=True)
class DatasetInfo:
    """The properties of a data set that a model depends on. It may have no labels and an unknown fingerprint."""

    num_images: int
    num_classes: int = 0
    fingerprint: str = ""

    @staticmethod
    def of(dataset: DataSet) -> DatasetInfo:
        """Read the values of a data set."""
        return DatasetInfo(dataset.num_images, len(dataset.manifest.classes), dataset.manifest.fingerprint)


class Model(nn.Module):
    """The backbone and the objective of a run, as one module for DistributedDataParallel.

    Its weights follow from the seed of the run: building it seeds torch's global generator.

    Raises:
        UserError: the method, the backbone and the data do not fit together.
    """

    def __init__(self, config: Pretraining, data: DatasetInfo) -> None:
        super().__init__()
        self.config = config
        torch.manual_seed(key(config.seed, "weights") >> 1)
        self.backbone = network.build(config.backbone)
        weights = config.backbone.weights
        self.starting_weights = (
            load_weights_into(self.backbone, weights, config.backbone.name) if weights else ""
        )
        method = methods.parse(config.method)
        _, objective_type = methods.load_objective(method.objective)
        view = config.view
        geometry = Geometry(view.image_size, view.min_scale, objective_type.predicts, config.seed)
        self.tasks = {spec: pretext.build(spec, config.parts, geometry) for spec in method.tasks}
        setup = Setup(
            pretext=next(iter(self.tasks.values())) if len(self.tasks) == 1 else None,
            identity=pretext.build("identity", {}, geometry),
            width=self.backbone.width,
            num_images=data.num_images,
            num_classes=data.num_classes,
            seed=config.seed,
            num_steps=num_steps(data.num_images, config.batch_size, config.epochs),
            batch_size=config.batch_size,
            backbone=self.backbone,
            tasks=self.tasks,
            fingerprint=data.fingerprint,
        )
        self.objective: Objective = objective_type(config.parts[method.objective], setup)

    @staticmethod
    def of(config: Pretraining, dataset: DataSet) -> Model:
        """Return the model of a run on a data set. Raises UserError when the two do not fit together."""
        model = Model(config, DatasetInfo.of(dataset))
        check_columns(model.views(), dataset, config.method)
        return model

    def forward(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs of the objective for uint8 views (b, p, c, h, w)."""
        return self.objective.forward(self.backbone, views)

    def views(self) -> dict[str, View]:
        """Return the views of every image, by name."""
        own_recipes = self.objective.recipes if isinstance(self.objective, ViewRecipes) else {}
        recipes = {name: own_recipes.get(name, self.config.view.recipe) for name in self.objective.views}
        return {
            name: View(
                transform, OwnAugmentation(recipes[name]) if ":" in recipes[name] else recipe(recipes[name])
            )
            for name, transform in self.objective.views.items()
        }

    def check(self, backbone: BackboneConfig | None = None) -> None:
        """Raise UserError when the backbone does not take the images of a view, or a recipe or a label does not exist.

        Args:
            backbone: the backbone to check; by default that of the model.
        """
        config, workers = self.config, self.config.worker_counts()[-1]
        alone = config.batch_size == workers and not (config.backbone.norm == "sync" and workers > 1)
        # Targets are checked on CPUs only: where a GPU makes the views, a few are checked here.
        some = 64 if config.stream.decode == "gpu" or config.stream.place == "trainer" else 1
        for view in self.views().values():
            if view.of_clips is not None and self.config.stream.decode == "gpu":
                raise UserError(
                    f"--stream.decode gpu is for images, and {self.config.method!r} learns from clips. Leave it out."
                )
            if view.of_clips is not None and "frames" not in view.columns:
                continue  # sound has its own network
            side = view.source.size
            images_bchw = torch.zeros(some, 3, side, side, dtype=torch.uint8)
            some_rng = ImageRng(0, np.zeros(some, np.int64), np.arange(some))
            made = view.pretext.transform(images_bchw, some_rng)
            pretext.check_target(view.pretext, made.target)
            _, crops, *_, crop_size = made.crops_bpchw.shape
            flag = "--view.image-size" if crop_size == config.view.image_size else _size_flag(view.pretext)
            network.check_size(backbone or config.backbone, crop_size, flag)
            if alone and not _has_statistics(backbone or config.backbone, crops, crop_size):
                raise self._alone(f"the backbone reduces a view of {crop_size} pixels to one, so that")
        if alone and any(isinstance(module, nn.BatchNorm1d) for module in self.modules()):
            raise self._alone(f"{config.method!r} has BatchNorm after the backbone:")

    def _alone(self, why: str) -> UserError:
        """Return the error for BatchNorm that would see one value at a time."""
        size = self.config.batch_size
        return UserError(
            f"--batch-size is {size}, one image for each worker, and {why} BatchNorm has a single value to normalize. "
            f"Give --batch-size {2 * size} or more."
        )

    def schedule(self) -> Callable[[int], Collection[str]] | None:
        """Return the function from a step to the names of its views; None where every step takes all views."""
        return self.objective.schedule() if isinstance(self.objective, Alternates) else None

    def stream(
        self,
        dataset: DataSet,
        share: DataShare | None = None,
        rank: int = 0,
        world: int = 1,
        device: torch.device = torch.device("cpu"),
    ) -> Stream:
        """Return the stream of one training worker."""
        return Stream(
            dataset=dataset,
            plan=self.config.plan(dataset),
            views=self.views(),
            config=self.config.stream,
            share=share or DataShare(),
            rank=rank,
            world=world,
            device=device,
            schedule=self.schedule(),
        )

    def describe(self) -> dict[str, Any]:
        """Return the facts that the method adds to the run's metadata, as JSON."""
        described = {spec: transform.describe() for spec, transform in self.tasks.items()}
        facts = next(iter(described.values())) if len(described) == 1 else dict(described)
        if isinstance(self.objective, Describes):
            facts |= self.objective.describe()
        own = [view.recipe for view in self.views().values() if isinstance(view.recipe, OwnAugmentation)]
        if own:
            facts["augmentation"] = own[0].describe()
        if isinstance(chance := getattr(self.objective, "chance", None), int | float):
            facts["chance"] = chance
        if self.starting_weights:
            facts["starting_weights"] = self.starting_weights
        return facts


def model_config(config: Pretraining, checkpoints: Folder) -> Pretraining:
    """Return the configuration to build the model by: a run with a checkpoint needs no file of starting weights."""
    resumes = bool(config.backbone.weights) and checkpoint.newest_step(checkpoints) > 0
    return config.without_starting_weights() if resumes else config


def check_columns(views: Mapping[str, View], dataset: DataSet, method: str) -> None:
    """Raise UserError when a view needs clips, or their sound, and the data set has none."""
    needed = {column for view in views.values() if view.of_clips is not None for column in view.columns}
    clips = dataset.manifest.clips
    if needed - set(clips.get("columns", ())):
        raise UserError(
            f"The method {method!r} learns from clips and the data set {dataset.name!r} holds images. Ingest a "
            "folder of videos, or give --data clips:500."
        )
    if "sound" in needed and clips.get("with_sound") == 0:
        raise UserError(
            f"The method {method!r} learns from sound and no clip of {dataset.name!r} has any. Ingest videos "
            "with an audio track, or give --data clips:500."
        )


def _size_flag(transform: pretext.Pretext) -> str:
    """Return the flag of the side of a transform's crops or patches, or that of ordinary views if it has none."""
    module = sys.modules[type(transform).__module__]
    known = getattr(getattr(module, "Config", None), "__dataclass_fields__", {})
    field = next((name for name in ("size", "patch_size") if name in known), None)
    part = module.__name__.rpartition(".")[2]
    return f"--{part}.{field}".replace("_", "-") if field else "--view.image-size"


def _has_statistics(config: BackboneConfig, crops: int, side: int) -> bool:
    """Return False if BatchNorm would get one value per channel in training on some crops of one image.

    Args:
        side: side of a crop in pixels.
    """
    if config.norm == "joint":  # joint BatchNorm sees the crops of all views
        return True
    body = network.skeleton(config).train()
    images_bchw = torch.zeros(crops, 3, side, side, dtype=torch.uint8, device=body.mean.device)
    with suppress(AssertionError, RuntimeError), torch.no_grad():  # Other errors have been judged before.
        try:
            body(images_bchw)
        except ValueError as error:
            return "more than 1 value per channel" not in str(error)
    return True
