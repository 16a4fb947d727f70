"""Export the backbone of a run for other programs, with a model card (README.md).

torchvision    model.pth, a state dict that loads with strict=True into torchvision's network without its head
timm           pytorch_model.bin and config.json for `timm.create_model("local-dir:FOLDER")`
safetensors    model.safetensors, the same state dict, with method, backbone and step as metadata
onnx           model.onnx, from images of 0 to 255 to features; it includes the normalization

The network of the sounds, of a run of `audio_visual`, is a second file: sound.onnx, sound.safetensors, or sound.pth.
"""

from __future__ import annotations

import logging
import re
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from raysl import console, extraction
from raysl.errors import UserError
from raysl.evaluation.results import check_writable
from raysl.fields import Bounds, CheckedTop
from raysl.ingestion import open_or_ingest
from raysl.model_export import formats
from raysl.model_export.card import model_card
from raysl.run import Run
from raysl.storage import Folder
from raysl.storage.records import write_record

_log = logging.getLogger("raysl.model_export")
CARD = "README.md"
_WEIGHTS = re.compile(r"(model|sound)\.(pth|safetensors|onnx)|pytorch_model\.bin")


@dataclass(frozen=True)
class ExportConfig(CheckedTop):
    """Export the backbone of a run for other programs.

    Args:
        format: format of the weights; "auto" is timm for networks that timm has, and safetensors for others.
        out: folder of the files; default: `export/FORMAT` in the run.
        step: step of the checkpoint to export; None for the newest.
        bn_images: images from which BatchNorm takes its statistics, as probes take those of their train images; a data
            set or a source. "" keeps the statistics of pretraining.
    """

    format: Literal["auto", "torchvision", "timm", "safetensors", "onnx"] = "auto"
    out: str = ""
    step: Annotated[int | None, Bounds(0, 2**63 - 1)] = None
    bn_images: str = ""


def export(run: Run, config: ExportConfig) -> Folder:
    """Write the weights and the model card, and return their folder.

    Raises UserError if the checkpoint does not exist, the format does not support the backbone, a package is missing,
    or the folder holds other weights.
    """
    where = "" if config.step is None else f"/checkpoints/step-{config.step:09d}"
    pretraining = run.config()
    form = formats.usual(pretraining) if config.format == "auto" else config.format
    formats.check(form, pretraining)
    source = extraction.encoder_by_name(f"{run.folder}{where}", pretraining.backbone)
    assert isinstance(source, extraction.Trained)
    out = Folder(config.out) if config.out else run.folder / f"export/{form}"
    check_writable(out, "export")
    images = open_or_ingest(config.bn_images) if config.bn_images else None
    with console.working("Writing the weights ..."):
        side, step = pretraining.view.image_size, source.checkpoint.step
        backbone = (extraction.Reestimated(source, images, side) if images else source).network().eval()
        files = formats.FORMATS[form](backbone, pretraining, step) | formats.sound(source, form)
        if others := sorted(name for name in out.list() if _WEIGHTS.fullmatch(name) and name not in files):
            raise UserError(
                f"The folder {str(out)!r} holds other weights, {others[0]!r}, which would be taken for these. Give "
                "another --out, or delete that file."
            )
        out.delete(CARD)  # It would describe other weights if this program ended now.
        for name, data in files.items():
            out.write(name, data)
        settings = {"backbone": asdict(pretraining.backbone), "image_size": side}
        write_record(out, extraction.SETTINGS, settings)  # For raysl.load.
        if not run.is_finished():
            _log.info("The run is not finished: these are the weights of step %d.", step)
        card = model_card(run, backbone, step, form, images)
        out.write(CARD, card.encode())
    return out
