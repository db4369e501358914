"""Fingerprint: a short text that stands for the images of a source, whatever it is called and wherever it lies.

    images in memory      SHA-256 of the stored values
    a folder or zip       SHA-256 of the encoded files in their order, and of how they are cropped and resized
    a prepared TFDS set   SHA-256 of its files' names, sizes and times, for it may be too large to be read twice
    a source of yours     what its method `fingerprint()` gives, if it has one

Conditions do not count. What is remembered of the images, such as their features, is found by it and by nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from diffusion_distill.base import interrupts
from diffusion_distill.data.lazy import LazySource
from diffusion_distill.data.sources import ArraySource, Source


def fingerprint(source: Source) -> str:
    """The source's fingerprint; empty if nothing but looking at all of its images could tell what they are.

    Raises:
      Interrupted: the program was asked to stop while files were read.
    """
    if isinstance(source, ArraySource):
        about = repr((source.x.dtype.str, source.x.shape, source.value_range)).encode()
        return digest([about, *(sample.tobytes() for sample in source.x)])
    if isinstance(source, LazySource):
        return source.identity() if source.identity else ""
    own = getattr(source, "fingerprint", None)
    return str(own()) if callable(own) else ""


def digest(parts: Iterable[bytes]) -> str:
    """SHA-256 of parts of which each counts with its length, so that their borders matter."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
        interrupts.check()
    return found.hexdigest()
