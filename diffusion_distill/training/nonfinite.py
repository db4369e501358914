"""Updates that are not finite: a step skips them, and a run in which nothing else is left stops.

A skipped update changes nothing but the counts (`training.step`), so the state before a row of them can be had at any
time from the state after it: `state.last_good`. That is what is saved while the row lasts, under its own number: the
last good checkpoint is never pushed out by copies of itself, and a run that is started again with mended data repeats
the updates that were skipped last.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from diffusion_distill.methods.phases import Phase


class NonFinite(ValueError):
    """A run was stopped because its updates have not been finite for too long."""


def check(metrics: dict[str, Any], done: int, begin: int, phase: Phase, limit: int, saved: bool) -> None:
    """Looks at the metrics of the last updates, up to number `done`, of a phase that began after update number `begin`.

    Args:
      limit: so many updates in a row may be skipped, less one.
      saved: whether the run has a workdir.

    Raises:
      NonFinite: the last `limit` updates were skipped, or every update of a phase that ends here.
    """
    last = {name: np.ravel(jax.device_get(values))[-1] for name, values in metrics.items()}
    row = int(last["nonfinite"])
    if row < limit and row < phase.updates:
        return
    first = done - row + 1
    kept = f"The state after update {first - 1} is saved: the same command goes on from there."
    if not saved:
        kept = "Nothing is saved, because the run has no workdir."
    elif first == 1:
        kept = "There is no good state before them: the same command begins anew."
    raise NonFinite(
        f"No update since number {first} was finite: {row} in a row in the phase {phase.name!r}, the last one with "
        f"loss {float(last['loss']):g} and gradient norm {float(last['grad_norm']):g}. They were skipped. {kept} "
        "Look for NaN and infinite values in the data, and in the teacher if there is one. If it is none of them, "
        f"lower the learning rate ({phase.rate(done - 1 - begin):g} here), which makes another run, in another "
        f"workdir. nonfinite_limit is {limit}."
    )
