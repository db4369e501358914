"""When a run goes on in its workdir: what may differ from what the workdir was begun with.

A run is the same run if what remains to be done gives the numbers that it would have given. So these may change:

    cadences    how often a run logs, saves, evaluates and shows itself, see `settings.WITHOUT_EFFECT`
    lengths     '64' and '0.0625K' are one length. A longer or shorter length moves the ends of phases: allowed if the
                phases that are finished keep their numbers of updates, and the one under way is not cut below what is
                done. So a run of one phase may always go on for longer, and one of several in its first or last phase;
                where all phases would move, finished ones included, it is refused.
    images      a few less, because damaged ones were removed: from here on they come in another order
    new fields  a field that the description lacks, because an older version wrote it, counts as its default
    teacher     how it was made, as long as it has the same parameters

Everything else is another run. What changes is said, and written into the description.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_distill.base.lengths import parse_length
from diffusion_distill.base.registry import defaults_of
from diffusion_distill.methods.phases import Phase
from diffusion_distill.training.checkpoint import latest_in
from diffusion_distill.training.loop import ends
from diffusion_distill.training.workdir import Change, changes

#: Fields of methods and settings that move the ends of phases.
LENGTHS = ("length", "phase_length", "last_two_longer", "shares")
#: A data set with a smaller share of its images is another data set.
LEAST_SHARE = 0.9


@dataclasses.dataclass(frozen=True)
class SameRun:
    """Decides whether a run may go on with a description; given to `Workdir`.

    Attributes:
      free: names of fields that change no number, with dots: 'settings.log_every'.
      lengths: names of fields that move the ends of phases.
      defaults: what fields count as that a description lacks, nested as the description is.
      phases: description -> its phases.
      ignored: names of whole parts that are not compared.
    """

    free: frozenset[str]
    lengths: frozenset[str]
    defaults: Mapping[str, Any]
    phases: Callable[[Mapping[str, Any]], Sequence[Phase]]
    ignored: frozenset[str] = frozenset()

    def __call__(
        self, folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]
    ) -> tuple[list[str], list[str]]:
        """(what changes, what may not change), each in words."""
        accepted, refused, moved = [], [], []
        for change in changes(_filled(found, self.defaults), wanted):
            if change.name.split(".")[0] in self.ignored:
                continue
            if change.name in self.free:
                accepted.append(f"{change.name} {change.now!r} instead of {change.before!r}")
            elif change.name in self.lengths:
                moved += [] if _same_length(change) else [f"{change.name} {change.now!r} instead of {change.before!r}"]
            elif change.name == "data.images" and _few_removed(change):
                accepted.append(f"{change.now} images instead of {change.before}, in another order from here on")
            else:
                refused.append(change.in_words())
        if moved and not refused:
            done, before, now = latest_in(folder / "checkpoints"), self.phases(found), self.phases(wanted)
            reason = _why_not(done, ends(before), ends(now))
            if reason:
                refused = [f"{change}: {reason}" for change in moved]
            else:
                accepted.append(f"{', '.join(moved)}: {_effect(done, before, now)}")
        return accepted, refused


def defaults(**parts: Any) -> dict[str, Any]:
    """The defaults of a description's parts, JSON-ready; a part is an object, or a mapping of further parts."""
    found = {name: defaults(**part) if isinstance(part, dict) else defaults_of(part) for name, part in parts.items()}
    return json.loads(json.dumps(found, default=dataclasses.asdict))


def _filled(found: Any, known: Mapping[str, Any]) -> Any:
    """A description with the defaults of the fields that it lacks."""
    if not isinstance(found, Mapping):  # a damaged description: the comparison will say so
        return found
    inner = {name: _filled(found.get(name, {}), part) for name, part in known.items() if isinstance(part, Mapping)}
    return {**known, **found, **inner}


def _same_length(change: Change) -> bool:
    """Whether two lengths are one number of samples, written differently."""
    try:
        return parse_length(change.before) == parse_length(change.now)
    except ValueError:  # shares are no length
        return False


def _few_removed(change: Change) -> bool:
    return all(isinstance(count, int) for count in (change.before, change.now)) and (
        LEAST_SHARE * change.before <= change.now < change.before
    )


def _why_not(done: int, before: Sequence[int], now: Sequence[int]) -> str:
    """Why a run with so many updates behind it cannot go on with other ends of phases; "" if it can."""
    shared = next(_first_difference(before, now), len(before))
    if shared < len(before) and done > before[shared]:
        moved = now[shared] if shared < len(now) else 0
        return (
            f"phase {shared + 1} is finished, after update {before[shared]}, and would end after {moved} now. "
            "Give a length that leaves finished phases as they are, or distil the last student on"
        )
    if shared < len(now) and done > now[shared]:
        return f"{done} updates are done already, and phase {shared + 1} would end after {now[shared]}"
    return ""


def _first_difference(before: Sequence[int], now: Sequence[int]) -> Iterator[int]:
    return (k for k, (one, other) in enumerate(zip(before, now, strict=True)) if one != other)


def _effect(done: int, before: Sequence[Phase], now: Sequence[Phase]) -> str:
    """Says in words how moved ends of phases change the rest of a run."""
    words = f"{ends(now)[-1]} updates instead of {ends(before)[-1]}"
    for old, new, end in zip(before, now, ends(now), strict=True):
        if done <= end and (old.updates, old.momentum) != (new.updates, new.momentum):
            if new.momentum != old.momentum:
                words += f"; average momentum of {new.name} {new.momentum:.6g} from here on, {old.momentum:.6g} before"
            if new.anneal:
                words += f"; the learning rate of {new.name} falls to 0 at its new end"
    return words
