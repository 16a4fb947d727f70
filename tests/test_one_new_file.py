"""A transform, an objective and a probe are one new file each: the contract tests of a copy with them are green."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

TRANSFORM = '''"""Mirror: flip the image upside down or not; the label says which.

A transform of the test suite; no published number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from raysl.augment import SourceCrop
from raysl.fields import Bounds, Checked
from raysl.pretext import Geometry, Transformed
from raysl.rng import ImageRng


@dataclass(frozen=True)
class Config(Checked):
    """Hyperparameters of the mirror.

    Args:
        share: share of flipped images, in 0..1.
    """

    share: Annotated[float, Bounds(0, 1)] = 0.5


class Mirror:
    """The image, flipped by chance."""

    num_crops = 1
    num_labels = 2
    color: Literal["crops", "source", "none"] = "crops"

    def __init__(self, config: Config, geometry: Geometry) -> None:
        self.share = config.share
        self.source = SourceCrop(geometry.image_size, geometry.min_scale)

    def transform(self, images_bchw: Tensor, image_rng: ImageRng) -> Transformed:
        """Flip some of the images."""
        flipped_b = image_rng.chance("flip", self.share).to(images_bchw.device)
        crops = torch.where(flipped_b[:, None, None, None], images_bchw.flip(2), images_bchw)
        return Transformed(crops[:, None], flipped_b.long())

    def describe(self) -> dict[str, Any]:
        """Return no facts."""
        return {}
'''

OBJECTIVE = '''"""Agree: make the features of two views equal. It collapses; an objective of the test suite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor, nn

from raysl.backbone.network import encode_views
from raysl.contrastive.bank import MemoryBank
from raysl.fields import Bounds, Checked
from raysl.objectives import Loss, Setup
from raysl.stream.reader import Batch


@dataclass(frozen=True)
class Config(Checked):
    """Hyperparameters of agreement.

    Args:
        dim: D, size of the embeddings.
    """

    dim: Annotated[int, Bounds(1, 1024)] = 8


class Agree(nn.Module):
    """A head for two views."""

    predicts = False
    bank_dim = 0

    def __init__(self, config: Config, setup: Setup) -> None:
        super().__init__()
        self.views = {"a": setup.pretext or setup.identity, "b": setup.identity}
        self.head = nn.Linear(setup.width, config.dim)

    def forward(self, backbone: nn.Module, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute embeddings (b, d) of both views."""
        a, b = (self.head(f.mean(dim=1)) for f in encode_views(backbone, [views["a"], views["b"]]))
        return {"a": a, "b": b}

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch, bank: MemoryBank | None) -> Loss:
        """Compute the mean squared difference."""
        return Loss((outputs["a"] - outputs["b"]).square().mean() + outputs["a"].square().mean(), {})
'''

PROBE = '''"""Norms: the mean length of the features. A probe of the test suite."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from numpy.typing import NDArray
from raysl.fields import Bounds
from raysl.probes import Row, Settings, check_features


@dataclass(frozen=True)
class Config(Settings):
    """Protocol of the mean length.

    Args:
        power: exponent of the length.
    """

    version: ClassVar[int] = 1
    power: Annotated[int, Bounds(1, 4)] = 1


class Norms:
    """The mean length, in units of the square root of the number of features."""

    primary_metric = "length"
    dims = 0

    def __init__(self, config: Config) -> None:
        self.config = config

    def measure(self, features_nd: NDArray[np.float32]) -> Iterator[Row]:
        """Yield the mean length."""
        check_features(features_nd, "test")
        lengths_n = np.linalg.norm(features_nd.astype(np.float64), axis=1) / features_nd.shape[1] ** 0.5
        yield Row("length", float((lengths_n**self.config.power).mean()))
'''

FILES = {"pretext/mirror.py": TRANSFORM, "objectives/agree.py": OBJECTIVE, "probes/norms.py": PROBE}
# The tests that walk over all transforms, objectives and probes.
CONTRACTS = (
    "tests/test_pretext_contract.py",
    "tests/test_objective_contract.py",
    "tests/test_pretext_in_use.py",
    "tests/stream/test_views.py",
    "tests/reporting",
    "tests/probes/test_contract.py",
    "tests/config/test_config.py",
    "tests/config/test_methods.py",
    "tests/test_repo_rules.py",
)


@pytest.mark.slow
def test_the_suite_of_a_copy_with_new_files_is_green(tmp_path: Path) -> None:
    for name in ("raysl", "tests", "docs", "results"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "pyproject.toml", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "experiments").mkdir()
    for name, text in FILES.items():
        (tmp_path / "raysl" / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not slow and not ray", *CONTRACTS],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert (
        "mirror"
        in subprocess.run(
            [
                sys.executable,
                "-c",
                "from raysl import pretext; from raysl.config import methods; "
                "print(pretext.names(), methods.objective_names())",
            ],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
