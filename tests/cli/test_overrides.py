"""Fields of a method from the command line, as its flags are parsed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from absl import flags
from ml_collections import config_flags

from diffusion_distill.cli import build
from diffusion_distill.methods import Tract

CONFIG = """
from diffusion_distill import Settings, Tract
from diffusion_distill.cli.build import config_of

def get_config():
    method = Tract((1024, 32, 1), length="1K", shares=(1, 3))
    return config_of(None, method, Settings(), {"name": "digits"}, {"name": "digits"})
"""
WRITTEN = Tract((1024, 32, 1), length="1K", shares=(1, 3))


def method_from(tmp_path: Path, *arguments: str) -> Any:
    """The method of a config file with overrides."""
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    argv = ["program", f"--config={path}", *(f"--config.method.{argument}" for argument in arguments)]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values, sys_argv=argv)
    values(argv)
    return build.method(values["config"].value)


@pytest.mark.fast
def test_fields_without_a_value_can_be_set(tmp_path: Path) -> None:
    assert method_from(tmp_path) == WRITTEN
    found = method_from(tmp_path, "dropout=0.1", "label_dropout=0", "momentum=0.99")
    assert (found.dropout, found.label_dropout, found.momentum, found.residual) == (0.1, 0.0, 0.99, 1e-3)


@pytest.mark.fast
def test_a_schedule_of_other_phases_says_what_else_to_change(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has 1 phase, .*on the command line --config\.method\.shares='\(\)'"):
        method_from(tmp_path, "schedule=(1024,1)")
    for shares in ("()", "(1,)"):
        assert method_from(tmp_path, "schedule=(1024,1)", f"shares={shares}").schedule == (1024, 1)
