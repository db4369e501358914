"""What a guided student is told: the scale of guidance beside the condition of its teacher, as one tree.

    {"guidance": scale, "cond": cond}       scale float [batch], 1 for no guidance; cond as the teacher takes it

A network of one's own that is to be a guided student is called with this tree as its condition. The library's networks
read it in `networks`, `denoisers.conditions` makes it in training, and `denoisers.guidance.AtScale` in sampling.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusion_distill.base.arrays import Array
from diffusion_distill.base.typing import Cond


def told(scale: Array, cond: Cond) -> dict[str, Any]:
    """The tree of a batch of scales [batch] and conditions."""
    return {"guidance": scale, "cond": cond}


def parts(cond: Cond) -> tuple[Array | None, Cond]:
    """(scale, cond) of such a tree; (None, cond) of any other condition."""
    if isinstance(cond, Mapping) and set(cond) == {"guidance", "cond"}:
        return cond["guidance"], cond["cond"]
    return None, cond
