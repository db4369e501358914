"""A classifier trained on labelled images, for features in place of pixels.

Pixel distances see grey levels: a digit moved by a pixel is far from itself, a blurred mean of all digits near to
each. What tells classes apart is nearer to what people see, and a classifier of digits or MNIST trains in minutes.
Its distances are its own: compare them only between images measured with the same fingerprint.

    loss = cross-entropy of the logits with (1 - s)·one_hot(label) + s / num_classes     label smoothing s

on images moved by whole pixels, with the step, loop, checkpoints and averages of `training`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_distill.base.arrays import Array
from diffusion_distill.base.errors import finite_number, positive_int
from diffusion_distill.base.files import read_json, user_path
from diffusion_distill.base.lengths import parse_length
from diffusion_distill.base.registry import describe, from_mapping, rebuild
from diffusion_distill.base.seeds import check_seed, key_of
from diffusion_distill.base.typing import Batch, Data, Key, Params
from diffusion_distill.data.pipeline import Batches
from diffusion_distill.data.sources import Source, range_of, to_unit_range
from diffusion_distill.denoisers.adapters import adapt
from diffusion_distill.evaluation.classifier_network import CLASSIFIERS, Classified, Classifier
from diffusion_distill.methods.phases import Phase, check_rate, momentum_for, updates_for
from diffusion_distill.training import checkpoint, loop, params_folder, sharding
from diffusion_distill.training.checkpoint import Checkpoints
from diffusion_distill.training.checksum import fingerprint
from diffusion_distill.training.logs import JsonLines, Logs
from diffusion_distill.training.optimizers import OptimizerSettings, make_optimizer
from diffusion_distill.training.resuming import SameRun, defaults
from diffusion_distill.training.state import create
from diffusion_distill.training.step import make_step
from diffusion_distill.training.workdir import Workdir

#: The file that describes a classifier.
FACTS = "classifier.json"
#: Images a trained classifier looks at together.
BATCH = 256
#: What an image moved away leaves behind: black, the ground of digits and MNIST.
GROUND = -1.0


@dataclass(frozen=True)
class ClassifierSettings:
    """The settings of a classifier's training. The learning rate rises for `warmup` updates, then falls to 0.

    Attributes:
      length: training images, see `base.lengths`.
      batch_size: global, over all devices.
      learning_rate, warmup, weight_decay: of Adam, the decay decoupled.
      residual: sets the momentum of the average that is kept, see `phases.momentum_for`.
      shift: images are moved by up to so many pixels on each axis; black comes in.
      label_smoothing: share of each label spread over all classes, in [0, 1).
      seed: of initialisation, data order and shifts.
      ch, ch_mult, num_res_blocks, norm_groups: of the network, see `Classifier`.
      checkpoint_every, log_every: in updates.

    Raises:
      ValueError: a count that is not positive, a share outside [0, 1), a negative number, an unreadable length.
    """

    length: str | int = "50K"
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup: int = 50
    weight_decay: float = 0.01
    residual: float = 1e-3
    shift: int = 1
    label_smoothing: float = 0.1
    seed: int = 0
    ch: int = 16
    ch_mult: tuple[int, ...] = (1, 2, 4)
    num_res_blocks: int = 1
    norm_groups: int = 8
    checkpoint_every: int = 1000
    log_every: int = 50

    def __post_init__(self) -> None:
        for name in ("batch_size", "checkpoint_every", "log_every"):
            positive_int(name, getattr(self, name))
        for name in ("learning_rate", "warmup", "weight_decay", "shift"):
            finite_number(name, getattr(self, name))
        check_seed(self.seed)
        check_rate("label_smoothing", self.label_smoothing, optional=False)
        self.phase()
        self.network(num_classes=2)

    def network(self, num_classes: int) -> Classifier:
        """The network for so many classes."""
        return Classifier(num_classes, self.ch, self.ch_mult, self.num_res_blocks, self.norm_groups)

    def phase(self) -> Phase:
        """The one phase of the training."""
        [updates] = updates_for(parse_length(self.length), self.batch_size)
        momentum = momentum_for(self.residual, updates)
        return Phase("classifier", updates, self.learning_rate, warmup=self.warmup, anneal=True, momentum=momentum)


@dataclass(frozen=True, eq=False)
class TrainedClassifier:
    """A classifier with parameters.

    Attributes:
      shape: (height, width, channels) of the images it was trained on.
      about: JSON-ready facts: accuracy on held-out images, data, settings.
    """

    network: Classifier
    params: Params
    shape: tuple[int, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """A short text that stands for the parameters."""
        return fingerprint(self.params)

    def features(self, images: np.ndarray, batch_size: int = BATCH, mesh: Mesh | None = None) -> np.ndarray:
        """Features [n, width] float32 of images.

        Args:
          images: [n, *shape], uint8 or floating point in [-1, 1]; floats outside are clipped.
          batch_size: images worked on together, over all devices; it changes nothing but speed and memory.
          mesh: the devices; all by default.

        Raises:
          TypeError: images neither uint8 nor floating point.
          ValueError: no images, another shape, NaN or infinity, or floats that look like grey levels 0..255.
        """
        return np.concatenate([found.features for found in self._classified(images, batch_size, mesh)])

    def logits(self, images: np.ndarray, batch_size: int = BATCH, mesh: Mesh | None = None) -> np.ndarray:
        """Logits [n, num_classes] float32; arguments and errors as `features`."""
        return np.concatenate([found.logits for found in self._classified(images, batch_size, mesh)])

    def accuracy(self, source: Source, batch_size: int = BATCH) -> float:
        """Share of a source's images whose label has the highest logit.

        Raises:
          ValueError: no labels, other classes or images of another shape.
        """
        _check_source("The data", source, self.shape, self.network.num_classes)
        right = 0
        for begin in range(0, len(source), batch_size):
            batch = source.gather(np.arange(begin, min(begin + batch_size, len(source))))
            right += int((self.logits(batch["x"], batch_size).argmax(axis=1) == batch["cond"]).sum())
        return right / len(source)

    def save(self, folder: str | Path) -> Path:
        """Writes FOLDER/params and classifier.json, replacing a classifier there; it is there whole or not at all."""
        facts = {
            "classifier": describe(self.network, CLASSIFIERS),
            "shape": list(self.shape),
            "fingerprint": self.fingerprint,
            "versions": params_folder.VERSIONS,
            "about": dict(self.about),
        }
        return params_folder.write(user_path(folder), self.params, {FACTS: facts})

    @classmethod
    def load(cls, folder: str | Path) -> TrainedClassifier:
        """Reads what `save` wrote.

        Raises:
          FileNotFoundError: the folder is not a classifier's.
          ValueError, TypeError: a part is damaged (the message names the file), or the parameters do not fit the
            network, or have changed since they were written.
        """
        folder = user_path(folder)
        if not (folder / FACTS).is_file():
            raise FileNotFoundError(
                f"{folder} is not a classifier: it has no classifier.json. Give the folder that training one wrote, "
                "WORKDIR/classifier; configs/digits_classifier.py and mnist_classifier.py train one."
            )
        return params_folder.read(folder, [FACTS], lambda: cls._read(folder))

    @classmethod
    def _read(cls, folder: Path) -> TrainedClassifier:
        facts = read_json(folder / FACTS, checkpoint.ADVICE)
        network, shape, checksum, about = _described(folder / FACTS, facts)
        shapes = jax.eval_shape(partial(_init, network, shape), jax.random.key(0))
        return cls(network, params_folder.params_in(folder, shapes, checksum), shape, about)

    def _classified(self, images: np.ndarray, batch_size: int, mesh: Mesh | None) -> Iterator[Classified]:
        """Logits and features of successive batches, on the host. The last one is filled up to the others' size."""
        images = _checked_images(images, self.shape)
        mesh = mesh or sharding.data_mesh()
        batch = -(-min(positive_int("batch_size", batch_size), len(images)) // mesh.size) * mesh.size
        params = sharding.place(self.params, mesh)
        for begin in range(0, len(images), batch):
            here = images[begin : begin + batch]
            full = np.resize(_as_floats(here), (batch, *self.shape))
            found = _apply(self.network, params, jax.device_put(full, sharding.split(mesh)))
            yield jax.tree.map(lambda values: sharding.fetch(values)[: len(here)], found)


def train_classifier(
    source: Source, heldout: Source, settings: ClassifierSettings | None = None, workdir: str | Path | None = None
) -> TrainedClassifier:
    """Trains a classifier and measures it; the average of its parameters is what is kept.

    Args:
      source: labelled images to train on.
      heldout: other labelled images of the same kind, for the accuracy in `about`.
      workdir: where checkpoints, metrics and the folder 'classifier' go; a run found there is resumed. None keeps
        everything in memory.

    Raises:
      ValueError: data without labels or that do not fit each other, a batch that the devices cannot share, or a
        workdir that holds another run or is in use.
      Interrupted: the program was asked to stop; the state is in workdir.
    """
    settings = settings or ClassifierSettings()
    mesh = sharding.data_mesh()
    sharding.check_batch(settings.batch_size, mesh)
    shape = source.shape
    _check_source("The training data", source, shape, _classes(source))
    _check_source("The held-out data", heldout, shape, _classes(source))
    network, phase = settings.network(_classes(source)), settings.phase()
    description = {
        "classifier": describe(network, CLASSIFIERS),
        "settings": dataclasses.asdict(settings),
        "data": _facts(source),
        "heldout": _facts(heldout),
    }
    same = SameRun(
        free=frozenset({"settings.checkpoint_every", "settings.log_every"}),
        lengths=frozenset({"settings.length"}),
        defaults=defaults(classifier=network, settings=settings),
        phases=lambda there: [from_mapping(ClassifierSettings, "settings of the run there", there["settings"]).phase()],
    )
    optimizer = make_optimizer(OptimizerSettings(weight_decay=settings.weight_decay))
    training = _Training(network, settings)
    step = make_step(training.losses, training, None, optimizer, mesh)  # type: ignore[arg-type]  # see _Training
    seed = key_of(settings.seed)
    here, processes = jax.process_index(), jax.process_count()
    with ExitStack() as cleanup:
        home = None
        if workdir is not None:
            home = cleanup.enter_context(closing(Workdir(workdir, description, compare=same))).path
        checkpoints = Checkpoints(home / "checkpoints", about=description) if home else None
        state = sharding.place(create(_init(network, shape, seed), optimizer, averages=()), mesh)
        if checkpoints:
            cleanup.callback(checkpoints.close)
            state = checkpoints.restore(state) if checkpoints.latest is not None else state
        if home:
            params_folder.check_place(home / "classifier", [FACTS])
        log = Logs([JsonLines(home / "metrics.jsonl", keep=int(state.step))] if home and not here else [])
        state = loop.run(
            state,
            step,
            [phase],
            Batches(source, settings.batch_size, settings.seed, False, here, processes),
            optimizer,
            seed,
            mesh,
            momenta={},
            plan=loop.Plan(log_every=settings.log_every, checkpoint_every=settings.checkpoint_every),
            checkpoints=checkpoints,
            log=cleanup.enter_context(closing(log)),
        )
        trained = TrainedClassifier(network, jax.tree.map(jnp.copy, state.averages["eval"].params), shape)
        about = {"accuracy": trained.accuracy(heldout), "updates": int(state.step), **description}
        trained = dataclasses.replace(trained, about=about)
        if home:
            trained.save(home / "classifier")
    return trained


def shifted(images: Data, offsets: Array) -> Data:
    """Images [n, h, w, c] moved down and to the right by whole pixels, offsets [n, 2]; black comes in.

    A product with shifted unit matrices: exact, and spread over devices as the images are.
    """
    height, width = images.shape[1:3]
    down, right = (
        ((jnp.arange(size)[:, None] - jnp.arange(size)[None, :])[None] == offset[:, None, None]).astype(images.dtype)
        for size, offset in zip((height, width), jnp.moveaxis(offsets, 1, 0), strict=True)
    )
    moved = jnp.einsum("nij,njkc->nikc", down, images - GROUND, precision="highest")
    return jnp.einsum("nkl,nilc->nikc", right, moved, precision="highest") + GROUND


@dataclass(frozen=True)
class _Training:
    """The model and method that `training.step` expects: it binds networks to parameters and gives losses per image."""

    network: Classifier
    settings: ClassifierSettings

    @property
    def adapter(self) -> Any:
        """As the step asks it whether the network drops anything."""
        return adapt(self.network)

    def denoiser(self, params: Params, dropout: Key | None = None) -> Any:
        """The network with parameters; it denoises nothing, but this is the name the step calls it by."""
        return partial(self.network.apply, {"params": params})

    def losses(self, networks: Mapping[str, Any], rows: Any, batch: Batch, key: Key) -> Array:
        """Cross-entropies [batch] of the student on shifted images."""
        import optax

        images, most = batch["x"], self.settings.shift
        offsets = jax.random.randint(key, (len(images), 2), -most, most + 1)
        logits = networks["student"](shifted(images, offsets) if most else images).logits
        targets = jax.nn.one_hot(batch["cond"], self.network.num_classes)
        return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, self.settings.label_smoothing))


@partial(jax.jit, static_argnames="network")
def _apply(network: Classifier, params: Params, images: Data) -> Classified:
    return network.apply({"params": params}, images)  # type: ignore[return-value]


def _described(path: Path, facts: Mapping[str, Any]) -> tuple[Classifier, tuple[int, ...], str, Mapping[str, Any]]:
    """The network, shape, checksum and facts of a classifier.json; its errors name the file."""
    missing = [name for name in ("classifier", "shape", "fingerprint", "about") if name not in facts]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}. {checkpoint.ADVICE}")
    shape, about = facts["shape"], facts["about"]
    if not (isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)):
        raise ValueError(f"{path}: 'shape' must be [height, width, channels], got {shape!r}. {checkpoint.ADVICE}")
    if not isinstance(about, dict):
        raise ValueError(f"{path}: 'about' must be an object, got {about!r}. {checkpoint.ADVICE}")
    try:
        network: Classifier = rebuild("classifier", facts["classifier"], CLASSIFIERS)
    except (ValueError, TypeError) as error:
        raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{path}: {error}") from error
    return network, tuple(shape), facts["fingerprint"], about


def _init(network: Classifier, shape: tuple[int, ...], key: Key) -> Params:
    return jax.jit(network.init)(key, jnp.zeros((1, *shape), jnp.float32))["params"]


def _classes(source: Source) -> int:
    """Classes of a source's labels; 0 without."""
    return getattr(source, "num_classes", 0)


def _facts(source: Source) -> dict[str, Any]:
    return {"images": len(source), "shape": list(source.shape), "classes": _classes(source)}


def _check_source(what: str, source: Source, shape: tuple[int, ...], num_classes: int) -> None:
    """Raises ValueError for a source that a classifier of these images and classes cannot be trained or measured on."""
    if not _classes(source):
        raise ValueError(f"{what} have no labels; a classifier needs a class for each image.")
    if tuple(source.shape) != tuple(shape):
        raise ValueError(
            f"{what} have images of shape {tuple(source.shape)}, the classifier is for {tuple(shape)}. "
            "Resize them, or train another classifier."
        )
    if _classes(source) != num_classes:
        raise ValueError(f"{what} have {_classes(source)} classes, the classifier is for {num_classes}.")


def _checked_images(images: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The images; errors as `TrainedClassifier.features`."""
    images = np.asarray(images)
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise TypeError(f"Images have dtype {images.dtype}; need uint8 in 0..255 or floats in [-1, 1].")
    if images.shape[1:] != tuple(shape) or not len(images):
        raise ValueError(
            f"Images have shape {images.shape}, but the classifier was trained on {tuple(shape)}: need "
            f"[n, {', '.join(map(str, shape))}] with n at least 1. Resize them, or train another classifier."
        )
    if images.dtype != np.uint8:
        bad = int((~np.isfinite(images)).any(axis=(1, 2, 3)).sum())
        if bad:
            raise ValueError(
                f"{bad} of {len(images)} images hold NaN or infinity. Find out why before measuring the others."
            )
        least, most = float(images.min()), float(images.max())
        if least >= 0 and most > 2:  # a sampler may leave [-1, 1], but not like this
            raise ValueError(f"Float images run from {least:g} to {most:g}; need [-1, 1]. Pass grey levels as uint8.")
    return images


def _as_floats(images: np.ndarray) -> np.ndarray:
    """float32 in [-1, 1] of checked images."""
    if images.dtype == np.uint8:
        return to_unit_range(images, range_of(images.dtype))
    return np.clip(images, -1, 1).astype(np.float32)
