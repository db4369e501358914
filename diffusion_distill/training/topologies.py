"""TPUs that need not be there: their compiler, in libtpu, runs on any Linux machine and is told the chips."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from jax.experimental import topologies

#: What libtpu would else ask the machines of a cloud for, or warn of.
SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",  # no question to the machines of a cloud, which has TPUs
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # and no warnings that it did not answer
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile at once
}


def devices_of(topology: str) -> Sequence[Any]:
    """Descriptions of TPUs, for which programs can be compiled but not run.

    Args:
      topology: kind and arrangement of the chips, such as v5e:2x4, v5p:2x2x1 or v6e:4x4.

    Raises:
      ImportError: there is no libtpu.
      ValueError: libtpu does not know the chips.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import libtpu  # noqa: F401  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError(
            "Compiling for TPUs that are not there needs their compiler, libtpu: "
            "pip install 'diffusion_distill[tpu-compile]'."
        ) from error
    try:
        return topologies.get_topology_desc(topology, "tpu").devices
    except Exception as error:  # of several kinds, by version
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"libtpu knows no TPUs {topology!r}; such names are v5e:2x4 and v6e:4x4. {reason}") from error
