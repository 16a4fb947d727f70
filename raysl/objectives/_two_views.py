"""Compare the projections of two views of an image: the part that Barlow Twins, VICReg and BYOL share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor, nn

from raysl.backbone.network import encode_views
from raysl.fields import Bounds, Checked
from raysl.objectives import Base, Setup
from raysl.objectives._heads import mlp


@dataclass(frozen=True)
class TwoViewsConfig(Checked):
    """Color recipes of two views.

    Args:
        recipe_a: color recipe of the first view; empty for --view.recipe.
        recipe_b: color recipe of the second view; empty for --view.recipe.
    """

    recipe_a: str = ""
    recipe_b: str = ""


@dataclass(frozen=True)
class ProjectedConfig(TwoViewsConfig):
    """Hyperparameters of a wide projector.

    Args:
        dim: D, size of the embeddings (paper: 8,192).
        hidden: width of the two hidden layers of the projector (paper: 8,192).
    """

    dim: Annotated[int, Bounds(1, 65_536)] = 512
    hidden: Annotated[int, Bounds(1, 65_536)] = 512


class TwoViews(Base):
    """Base of an objective with the views "a", which the method's transform may change, and "b"."""

    def __init__(self, config: Any, setup: Setup) -> None:
        super().__init__(config, setup)
        self.views = {"a": setup.pretext or setup.identity, "b": setup.identity}
        self.recipes = {view: name for view, name in (("a", config.recipe_a), ("b", config.recipe_b)) if name}


class Projected(TwoViews):
    """Base of an objective with one projector for both views."""

    def __init__(self, config: Any, setup: Setup) -> None:
        super().__init__(config, setup)
        self.projector = mlp(setup.width, config.hidden, config.dim, layers=3)

    def forward(self, backbone: nn.Module, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute embeddings (b, d) of both views."""
        features = encode_views(backbone, [views["a"], views["b"]])
        a_bd, b_bd = (self.projector(f.mean(dim=1)).float() for f in features)
        return {"a": a_bd, "b": b_bd}
