"""Published models by name: what network, trained on what, for how many steps, and where the file is.

Progressive distillation (Salimans & Ho, arXiv:2202.00512): for each of four data sets the teacher
(`cifar_original`) and the students of 64, 32, 16, 8, 4, 2 and 1 steps (`cifar_8`). Hyper-parameters are those
of the released configs. A student has its teacher's network; dropout, which has no parameters, is 0 here.
No shape of a parameter is written down: they follow from the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from diffusion_distill.diffusion.preconditioning import LogsnrInput
from diffusion_distill.diffusion.schedules import Cosine
from diffusion_distill.model import Model
from diffusion_distill.networks import UNet
from diffusion_distill.weights import progressive


@dataclass(frozen=True)
class Published:
    """A published file of weights.

    Attributes:
      name: its name here.
      model: everything but the parameters.
      steps: the sampling steps a student was made for; 0 for a teacher.
      dataset: what it was trained on.
      url: where it is.
      source: paper, publisher and licence.
      format: a name in `READERS`.
      size, sha256: of the file, in bytes and hexadecimal; None where nobody has published them.
    """

    name: str
    model: Model
    steps: int
    dataset: str
    url: str
    source: str
    format: str = "progressive"
    size: int | None = None
    sha256: str | None = None


#: format -> function(path, model) that reads such a file.
READERS: dict[str, Callable[..., progressive.Checkpoint]] = {"progressive": progressive.read}

BUCKET = "https://storage.googleapis.com/gresearch/diffusion-distillation/"
SOURCE = (
    "Salimans & Ho, Progressive Distillation for Fast Sampling of Diffusion Models, arXiv:2202.00512. Released by "
    "Google with its research code; no licence of the files themselves is known to us: check before passing them on."
)
STUDENT_STEPS = (64, 32, 16, 8, 4, 2, 1)


def _model(image_shape: tuple[int, int, int], prediction: str, **network: object) -> Model:
    """What the four models share; 'both' doubles the output channels."""
    out_ch = image_shape[-1] * (2 if prediction == "both" else 1)
    unet = UNet(out_ch=out_ch, num_res_blocks=3, resblock_resample=True, dropout=0.0, **network)  # type: ignore[arg-type]
    return Model(unet, image_shape, Cosine(-20.0, 20.0), prediction, LogsnrInput("inv_cos"))


def _lsun() -> Model:
    return _model(
        (128, 128, 3), "both",
        ch=64, emb_ch=768, ch_mult=(1, 2, 4, 6, 8), attn_resolutions=(8, 16, 32), head_dim=64,
    )  # fmt: skip


#: family -> (data set, model)
FAMILIES = {
    "cifar": (
        "CIFAR-10",
        _model((32, 32, 3), "x", ch=256, emb_ch=1024, ch_mult=(1, 1, 1), attn_resolutions=(8, 16), num_heads=1),
    ),
    "imagenet": (
        "ImageNet 64x64",
        _model(
            (64, 64, 3), "both", num_classes=1000,
            ch=192, emb_ch=768, ch_mult=(1, 2, 3, 4), attn_resolutions=(8, 16, 32), head_dim=64,
        ),
    ),
    "bedroom": ("LSUN bedroom 128x128", _lsun()),
    "church": ("LSUN church 128x128", _lsun()),
}  # fmt: skip


def _published() -> dict[str, Published]:
    entries = {}
    for family, (dataset, model) in FAMILIES.items():
        for ending, steps in {"original": 0, **{str(steps): steps for steps in STUDENT_STEPS}}.items():
            name = f"{family}_{ending}"
            entries[name] = Published(name, model, steps, dataset, BUCKET + name, SOURCE)
    return entries


PUBLISHED: dict[str, Published] = _published()
