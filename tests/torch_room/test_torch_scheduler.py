"""Our scheduler beside those of the library diffusers, in real pipelines, and beside our engine.

diffusers is asked in this Python, or in the one that the variable PEER_PYTHON names.
"""

from __future__ import annotations

import numpy as np
import pytest
from peers import answers_of

#: How far results may be apart, relative to the largest number, where it is not 1e-5: of half precision in 20 steps.
TOLERANCES = {"half/ddim": 0.02, "half/ipndm": 0.02}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What diffusers computes with its schedulers and with ours; see `peer_schedulers`."""
    return answers_of("peer_schedulers.py", "diffusers", tmp_path_factory.mktemp("diffusers"))


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        *(("ddim", 20), ("dpm_solver++", 2), ("euler", 8), ("edm", 3), ("flow", 7), ("engine", 138), ("pipeline", 10)),
        *(("half", 2), ("changed", 1), ("back", 1), ("add_noise", 1), ("scale_noise", 1)),
    ],
)
def test_our_scheduler_gives_what_theirs_or_the_engine_gives(
    answers: dict[str, np.ndarray], kind: str, count: int
) -> None:
    names = {name.rpartition("/")[0] for name in answers if name.split("/")[0] == kind}
    assert len(names) == count
    for name in names:
        ours, theirs = answers[f"{name}/ours"], answers[f"{name}/theirs"]
        tolerance = TOLERANCES.get(name, 1e-5) * np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance, err_msg=name)


def test_what_cannot_be_computed_is_refused(answers: dict[str, np.ndarray]) -> None:
    names = {name.rpartition("/")[0] for name in answers if name.startswith("refused/")}
    assert len(names) == 41
    for name in names:
        assert str(answers[f"{name}/theirs"]) in str(answers[f"{name}/ours"])


def test_options_of_spacing_that_are_not_read_are_warned_of(answers: dict[str, np.ndarray]) -> None:
    names = {name.rpartition("/")[0] for name in answers if name.startswith("warned/")}
    assert len(names) == 18
    for name in names:
        assert answers[f"{name}/ours"].tolist() == answers[f"{name}/theirs"].tolist(), name
