"""The pages of documentation are those that the code makes."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from PIL import Image

from raysl import pretext
from raysl.cli.flags import parse_pretraining
from raysl.config import methods
from raysl.reporting import method_pages
from raysl.storage import Folder
from tests.data import make_dataset

FOLDER = Path(__file__).parents[2] / "docs" / "methods"
AGAIN = "make the pages again: .venv/bin/raysl methods --pages docs/methods"


# A new file changes the lists of partners on other pages too. Its author makes the pages again; until then they are not
# compared.
NEW = [name for name in method_pages.names() if not (FOLDER / f"{name}.md").exists()]
compared = pytest.mark.skipif(bool(NEW), reason=f"no pages of {', '.join(NEW)}; {AGAIN}")


@compared
@pytest.mark.parametrize("name", method_pages.names())
def test_the_committed_page_is_what_the_code_says(name: str) -> None:
    file = FOLDER / f"{name}.md"
    assert file.exists(), AGAIN
    assert file.read_text() == method_pages.page(name), AGAIN


@compared
@pytest.mark.parametrize("name", method_pages.names())
def test_a_page_has_a_picture_of_a_modest_size(name: str) -> None:
    file = FOLDER / f"{name}.png"
    assert file.exists(), AGAIN
    assert file.stat().st_size < 150_000
    assert min(Image.open(file).size) > 400


@compared
def test_the_index_lists_all_and_there_are_no_others() -> None:
    assert (FOLDER / "README.md").read_text() == method_pages.index(), AGAIN
    kept = {f"{name}.{kind}" for name in method_pages.names() for kind in ("md", "png")}
    assert {file.name for file in FOLDER.iterdir()} == kept | {"README.md", f"{method_pages.PROBES}.md"}, (
        AGAIN
    )
    assert f"({method_pages.PROBES}.md)" in method_pages.index()


def test_a_page_says_what_its_part_is_and_does() -> None:
    page = method_pages.page("jigsaw")
    assert page.startswith("# jigsaw\n\nJigsaw: shuffle tiles of the image")
    assert "--method predict-jigsaw\n" in page
    assert "| `--jigsaw.num-permutations` | `None` | size of the permutation set." in page
    assert "`pirl-jigsaw`" in page
    assert "`npid-jigsaw`" not in page
    assert "| npid | yes | none |\n" in method_pages.index()
    assert "| cpc | no | patch_grid |\n" in method_pages.index()
    assert "- `--recipe pirl-r50-800ep`: PIRL with a jigsaw" in page
    assert "`--pirl.lam`" in method_pages.page("pirl")
    assert "| `--frame-order.task` | `verify` |" in method_pages.page("frame_order")
    # From the Config that this one is made from.
    assert (
        "| `--pirl.temperature` | `0.07` or [chosen by raysl](../design.md#defaults-that-raysl-chooses) | softmax "
        "temperature tau, > 0; scores are divided by it. |" in method_pages.page("pirl")
    )


@pytest.mark.parametrize("name", [*methods.objective_names(), *pretext.names()])
def test_the_command_of_a_page_can_be_typed(name: str) -> None:
    command = method_pages.page(name).partition("```\n")[2].partition("\n```")[0]
    verb, *words = shlex.split(command)[1:]
    if verb == "clusterfit":
        words = ["--method", "clusterfit", *words[4:]]  # less --teacher and --k, which are not of the student
    config = parse_pretraining(words, "raysl pretrain")
    assert name in methods.parse(config.method).config_types()
    assert name != "distill" or config.parts["distill"].teacher


def test_pages_are_written_with_pictures(tmp_path: Path) -> None:
    place = Folder(str(tmp_path / "new"))
    method_pages.write_part(place, "rotation", make_dataset(tmp_path / "set", 20, side=32))
    assert {file.name for file in (tmp_path / "new").iterdir()} == {"rotation.md", "rotation.png"}
    assert (tmp_path / "new" / "rotation.md").read_text() == method_pages.page("rotation")
    assert Image.open(tmp_path / "new" / "rotation.png").size[0] > 400
