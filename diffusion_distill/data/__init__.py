"""Data: sources of samples from many places, and the deterministic stream of batches drawn from them."""

from collections.abc import Callable, Mapping

from diffusion_distill.data.dataset import from_dataset
from diffusion_distill.data.digits import digits
from diffusion_distill.data.fingerprint import fingerprint
from diffusion_distill.data.images import folder
from diffusion_distill.data.lazy import LazySource
from diffusion_distill.data.npz import npz
from diffusion_distill.data.pipeline import Batches
from diffusion_distill.data.prefetch import prefetch
from diffusion_distill.data.sources import ArraySource, Source, from_arrays
from diffusion_distill.data.stream import Stream, from_batches
from diffusion_distill.data.tfds import tfds

SOURCES: Mapping[str, Callable[..., Source]] = {"digits": digits, "npz": npz, "folder": folder, "tfds": tfds}

__all__ = [
    "SOURCES",
    "ArraySource",
    "Batches",
    "LazySource",
    "Source",
    "Stream",
    "digits",
    "fingerprint",
    "folder",
    "from_arrays",
    "from_batches",
    "from_dataset",
    "npz",
    "prefetch",
    "tfds",
]
