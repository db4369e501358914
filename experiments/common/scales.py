"""The scales at which experiments run: teachers, data, lengths of training, and how samples are measured.

    paper    as in configs/: Google's VP teachers and NVIDIA's EDM teachers, CIFAR-10, ImageNet 64, LSUN 128
    gpu      CIFAR-10 with a quarter of the parameters and a twelfth of the images: about a day of one H100 for an item
    cpu      digits of 8x8 pixels, and about a 2000th of the images: minutes for a cell on two cores

BTD's Figure 4 has LSUN and, at the scale cpu, MNIST at 14x14 beside the others' data.

Lengths and momenta are written as the papers write them, and `Scale.length` and `Scale.momentum` bring them to a scale:
a tenth of the images is a tenth of the updates, and an average keeps the same weight on the parameters at its start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import diffusion_distill as dd
from diffusion_distill.api.classifier import ClassifierSettings
from diffusion_distill.base.lengths import parse_length
from diffusion_distill.cli.build import images
from diffusion_distill.evaluation.measuring import EvaluationSettings

#: Images in a batch of the papers.
PUBLISHED_BATCH = 256


@dataclass(frozen=True)
class Teacher:
    """A teacher: a published one, or one that is trained here.

    Attributes:
      solver, steps: how it is sampled at its best.
      published: its name in `weights.PUBLISHED`; empty for one that is trained.
      model, method, settings: of one that is trained.
      images: its data set, as `cli.build.images` takes it: name in TensorFlow Datasets (or 'digits'), size, ...
      distilling: fields of distillations from it.
      running: fields of the settings of distillations from it that differ from the scale's.
    """

    solver: str
    steps: int
    published: str = ""
    model: dd.Model | None = None
    method: dd.Denoising | None = None
    settings: dd.Settings = field(default_factory=dd.Settings)
    images: Mapping[str, Any] = field(default_factory=lambda: {"dataset": "cifar10"})
    distilling: Mapping[str, Any] = field(default_factory=dict)
    running: Mapping[str, Any] = field(default_factory=dict)

    @property
    def described(self) -> dd.Model:
        """The model, also of a published teacher that is not here."""
        model = self.model or dd.weights.PUBLISHED[self.published].model
        assert model is not None
        return model

    @property
    def data(self) -> str:
        """The data set and its size, for titles."""
        return f"{self.images['dataset']} {'x'.join(map(str, self.described.shape[:2]))}"


@dataclass(frozen=True)
class Scale:
    """A scale.

    Attributes:
      title: what the tables say of it.
      teachers: by name: 'vp' predicts x or v on cosine levels, 'labelled' is one of classes that can be guided, 'edm'
        has EDM's levels, 'eps' predicts the noise of DDPM's 1000 times.
      source: the images of a teacher, of the split 'train' or 'test', from a path in place of TensorFlow Datasets.
      share: of the papers' training images.
      settings: of distillations, but for what a teacher needs otherwise; see `running`.
      evaluation: how samples are measured.
      judge: how the classifier is trained whose features are compared; None for InceptionV3, as in the papers.
      data: commands that fetch what a scale needs and does not make.
      least: updates of a training at least.
      trial: whether it is a trial, see `trial`.
    """

    name: str
    title: str
    teachers: Mapping[str, Teacher]
    source: Callable[[Teacher, str, str], dd.data.Source]
    share: float
    settings: dd.Settings
    evaluation: EvaluationSettings
    judge: ClassifierSettings | None = None
    data: tuple[str, ...] = ()
    least: int = 1
    trial: bool = False

    @property
    def folder(self) -> str:
        """The name of its folders; a trial's are its own."""
        return f"{self.name}_trial" if self.trial else self.name

    def tried(self) -> Scale:
        """The same with some ten updates of each training and 16 samples, all in batches of 8.

        It shows that data, trainings and evaluation work. A published teacher is one that has been trained as little.
        """
        short = {name: _tried(teacher) for name, teacher in self.teachers.items()}
        how = EvaluationSettings(count=16, repetitions=1, batch_size=_TRIED)
        judge = self.judge and replace(self.judge, length=10 * self.judge.batch_size)
        settings = replace(self.settings, batch_size=_TRIED)
        parts = {"teachers": short, "settings": settings, "evaluation": how, "judge": judge}
        return replace(self, share=0.0, least=10, trial=True, **parts)

    def running(self, teacher: str, seed: int = 0) -> dd.Settings:
        """The settings of a distillation from a teacher."""
        return replace(self.settings, seed=seed, **self.teachers[teacher].running)

    def length(self, published: str) -> int:
        """Training images at this scale of a published number such as '96M': whole batches, at least `least`."""
        batch = self.settings.batch_size
        return max(self.least, round(parse_length(published) * self.share / batch)) * batch

    def momentum(self, published: float, length: str) -> float:
        """The momentum that keeps as much of an average's start after a training as the published one does.

        Args:
          published: for batches of 256.
          length: the training's, published.
        """
        updates = parse_length(length) / PUBLISHED_BATCH
        return published ** (updates / (self.length(length) / self.settings.batch_size))

    def tract(self, teacher: str, schedule: tuple[int, ...], length: str, **fields: Any) -> dd.Tract:
        """TRACT from a teacher of this scale, with what is published for its kind."""
        made = dd.Tract.edm if teacher.startswith("edm") else dd.Tract
        return made(schedule, length=self.length(length), **{**self.teachers[teacher].distilling, **fields})

    def btd(self, teacher: str, start: int, length: str, **fields: Any) -> dd.Progressive:
        """BTD from a teacher of this scale to one step; `length` is of all phases, the last two longer by default."""
        longer = fields.get("last_two_longer", dd.Progressive.last_two_longer)
        shares = start.bit_length() - 3 + 2 * longer
        one = max(1, round(self.length(length) / shares / self.settings.batch_size)) * self.settings.batch_size
        rule = {k: v for k, v in self.teachers[teacher].distilling.items() if k not in ("clip", "anneal")}
        if teacher.startswith("edm"):
            rule = {"teacher_solver": "heun", "weighting": "edm", **rule}
        return dd.Progressive(start, 1, phase_length=one, **{**rule, **fields})


_TRIED = 8


def _tried(teacher: Teacher) -> Teacher:
    """A teacher of two updates."""
    method = replace(teacher.method or dd.Denoising(), length=2 * _TRIED)
    running = {**teacher.running, "batch_size": _TRIED}
    settings = replace(teacher.settings, batch_size=_TRIED)
    parts = {"model": teacher.described, "method": method, "settings": settings, "running": running}
    return replace(teacher, published="", **parts)


# ---------------------------------------------------------------- digits, on a CPU

_DIGITS = dd.UNet(
    ch=16,
    emb_ch=64,
    out_ch=1,
    ch_mult=(1, 2),
    num_res_blocks=1,
    attn_resolutions=(),
    num_heads=1,
    resblock_resample=True,
    norm_groups=16,
)
_BATCH = 64
_PREPARE = "tfds build --file_format=array_record"
_TRAINED: dict[str, Any] = {"learning_rate": 3e-3, "warmup": 100, "anneal": True, "residual": 1e-3}
_TEACHER_IMAGES = 6000 * _BATCH
_ONCE = dd.Settings(_BATCH, checkpoint_every=1000, log_every=500)


def _source(teacher: Teacher, split: str = "train", path: str = "") -> dd.data.Source:
    """The images at `path` (a folder, a zip, or .npz files of both splits with a comma between), or else of TFDS."""
    if teacher.images["dataset"] == "digits":
        return dd.data.digits("train" if split == "train" else "heldout")
    train, _, test = path.partition(",")
    told = images(**teacher.images, split=split, path=train if split == "train" else test or train)
    return dd.data.SOURCES[told.pop("name")](**told)


CPU = Scale(
    name="cpu",
    title="digits of 8x8 pixels, a U-Net of width 16",
    teachers={
        "vp": Teacher(
            "ddim",
            1024,
            model=dd.Model(_DIGITS, (8, 8, 1), prediction="v"),
            method=dd.Denoising(_TEACHER_IMAGES, weighting="snr_plus_one", **_TRAINED),
            settings=_ONCE,
            images={"dataset": "digits"},
            distilling={"weighting": "snr_plus_one", "learning_rate": 3e-3, "anneal": True, "clip": "none"},
        ),
        "vp_mnist": Teacher(
            "ddim",
            1024,
            model=dd.Model(_DIGITS, (14, 14, 1), prediction="v"),
            method=dd.Denoising(_TEACHER_IMAGES // 4, weighting="snr_plus_one", **_TRAINED),
            settings=_ONCE,
            images={"dataset": "mnist", "size": 14},
            distilling={"weighting": "snr_plus_one", "learning_rate": 3e-3, "anneal": True, "clip": "none"},
        ),
        "labelled": Teacher(
            "ddim",
            1024,
            model=dd.Model(_DIGITS.clone(num_classes=10), (8, 8, 1), prediction="v"),
            method=dd.Denoising(_TEACHER_IMAGES, weighting="snr_plus_one", label_dropout=0.1, **_TRAINED),
            settings=_ONCE,
            images={"dataset": "digits"},
            distilling={"weighting": "snr_plus_one", "learning_rate": 3e-3, "anneal": True, "clip": "none"},
        ),
        "edm": Teacher(
            "heun",
            32,
            model=dd.Model(_DIGITS, (8, 8, 1), dd.VE(20.0), "edm", dd.EDMInput(sigma_data=0.75)),
            method=dd.Denoising(_TEACHER_IMAGES, noise="lognormal", weighting="edm", **_TRAINED),
            settings=_ONCE,
            images={"dataset": "digits"},
            distilling={"learning_rate": 3e-3, "anneal": True, "clip": "none"},
        ),
        "eps": Teacher(
            "ddim",
            1000,
            model=dd.Model(
                _DIGITS, (8, 8, 1), dd.LinearBetaDiscrete(1000), "eps", time_input=dd.TimeOfProcess(1000, -1)
            ),
            method=dd.Denoising(_TEACHER_IMAGES, steps=1000, weighting="snr", **{**_TRAINED, "learning_rate": 2e-3}),
            settings=_ONCE,
            images={"dataset": "digits"},
        ),
    },
    source=_source,
    share=1 / 2048,
    settings=dd.Settings(_BATCH, checkpoint_every=2000, log_every=500),
    evaluation=EvaluationSettings(count=1794, repetitions=1, batch_size=300, kept=1794),
    judge=ClassifierSettings(1500 * _BATCH, batch_size=_BATCH, seed=0),
    data=(f"{_PREPARE} mnist (for the teacher 'vp_mnist')",),
)

# ---------------------------------------------------------------- CIFAR-10 on one GPU

_SMALL: dict[str, Any] = {"ch": 128, "emb_ch": 512, "dropout": 0.1, "dtype": "bfloat16"}
_LONG = dd.Settings(PUBLISHED_BATCH, flip=True, checkpoint_every=2000)
_GRADIENTS = dd.OptimizerSettings(grad_clip=1.0, clip_eps=1e-6)
_INCEPTION = (
    "python -m diffusion_distill.main --mode=import --model=inception-pytorch-fid --workdir=runs/experiments/inception"
)
_NOT_CLIPPED: dict[str, Any] = {"optimizer": dd.OptimizerSettings(grad_clip=0.0)}


def _cifar(published: str, **fields: Any) -> dd.Model:
    model = dd.weights.PUBLISHED[published].model
    assert model is not None
    return replace(model.with_network(**_SMALL), **fields)


_GPU_TRAINING: dict[str, Any] = {
    "length": "20M",
    "learning_rate": 4e-4,
    "warmup": 1000,
    "anneal": True,
    "residual": 1e-3,
}
GPU = Scale(
    name="gpu",
    title="CIFAR-10, a network of 15M parameters in bfloat16",
    teachers={
        "vp": Teacher(
            "ddim",
            1024,
            model=_cifar("cifar_original"),
            method=dd.Denoising(**_GPU_TRAINING),
            settings=_LONG,
            distilling={"learning_rate": 2e-4},
        ),
        "labelled": Teacher(
            "ddim",
            1024,
            model=_cifar("cifar_original").with_network(num_classes=10),
            method=dd.Denoising(label_dropout=0.1, **_GPU_TRAINING),
            settings=_LONG,
            distilling={"learning_rate": 2e-4},
        ),
        "edm": Teacher(
            "heun",
            40,
            model=_cifar("cifar_original", process=dd.VE(), prediction="edm", time_input=dd.EDMInput()),
            method=dd.Denoising(noise="lognormal", weighting="edm", **_GPU_TRAINING),
            settings=_LONG,
            running=_NOT_CLIPPED,
        ),
        "eps": Teacher(
            "ddim",
            1000,
            model=_cifar(
                "cifar_original",
                process=dd.LinearBetaDiscrete(1000),
                prediction="eps",
                time_input=dd.TimeOfProcess(1000, -1),
            ),
            method=dd.Denoising(steps=1000, weighting="snr", **_GPU_TRAINING),
            settings=_LONG,
        ),
    },
    source=_source,
    share=1 / 12,
    settings=replace(_LONG, optimizer=_GRADIENTS),
    evaluation=EvaluationSettings(count=10_000, repetitions=1, batch_size=1000),
    data=(_INCEPTION, f"{_PREPARE} cifar10"),
)

# ---------------------------------------------------------------- the papers'

_IMAGENET = {"dataset": "imagenet2012", "size": 64}
_OF_EDM: dict[str, Any] = {"batch_size": 512, **_NOT_CLIPPED}
_OF_CLASSES: Any = dd.weights.PUBLISHED["imagenet_original"].model


def _lsun(name: str, dataset: str) -> Teacher:
    """A teacher of LSUN 128x128, as in configs/lsun128_btd.py."""
    images = {"dataset": dataset, "size": 128, "resample": "bilinear"}
    rule = {"distilling": {"learning_rate": 1e-4}, "running": {"batch_size": 2048}}
    return Teacher("ddim", 1024, f"{name}_original", images=images, **rule)


PAPER = Scale(
    name="paper",
    title="the published teachers",
    teachers={
        "vp": Teacher("ddim", 1024, "cifar_original", distilling={"learning_rate": 2e-4}),
        "labelled": Teacher(  # the published one has no null label
            "ddim",
            1024,
            model=_OF_CLASSES,
            method=dd.Denoising("1G", learning_rate=3e-4, label_dropout=0.1),
            settings=dd.Settings(2048, flip=True, checkpoint_every=2000, optimizer=_GRADIENTS),
            images=_IMAGENET,
            distilling={"learning_rate": 2e-4},
        ),
        "edm": Teacher("heun", 40, "edm-cifar10-32x32-uncond-ve", running=_OF_EDM),
        "eps": Teacher("ddim", 1000, "ddpm-cifar10"),
        "vp_imagenet64": Teacher(
            "ddim", 1024, "imagenet_original", images=_IMAGENET, distilling={"learning_rate": 2e-4}
        ),
        "edm_imagenet64": Teacher(
            "heun",
            128,
            "edm-imagenet-64x64-cond-adm",
            images=_IMAGENET,
            distilling={"warmup": 2**22 // 512},
            running=_OF_EDM,
        ),
        "vp_bedroom": _lsun("bedroom", "lsun/bedroom"),
        "vp_church": _lsun("church", "lsun/church_outdoor"),
    },
    source=_source,
    share=1.0,
    settings=dd.Settings(PUBLISHED_BATCH, flip=True, checkpoint_every=5000, optimizer=_GRADIENTS),
    evaluation=EvaluationSettings(count=50_000, repetitions=3, batch_size=1000),
    data=(*GPU.data, *(f"{_PREPARE} {name}" for name in ("imagenet2012", "lsun/bedroom", "lsun/church_outdoor"))),
)

SCALES: dict[str, Scale] = {scale.name: scale for scale in (PAPER, GPU, CPU)}
