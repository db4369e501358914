"""Folders of the Hugging Face Hub: what is saved comes back, by the Hub's own library. Nothing is uploaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import chex
import numpy as np
import pytest

from diffusion_distill import api
from diffusion_distill.base.errors import WeightsError
from diffusion_distill.training.artefact import Artefact

huggingface_hub = pytest.importorskip("huggingface_hub")

from diffusion_distill.api.hub import HubArtefact  # noqa: E402  # needs huggingface_hub


def test_an_artefact_comes_back_from_its_folder(teacher: Artefact, tmp_path: Path) -> None:
    HubArtefact(teacher, [{"fid": 3.17}]).save_pretrained(tmp_path / "saved")
    assert set(os.listdir(tmp_path / "saved")) == {"README.md", "config.json", "model.safetensors"}
    found = HubArtefact.from_pretrained(tmp_path / "saved").artefact
    chex.assert_trees_all_equal(found.params, teacher.params)
    assert (found.model, found.steps) == (teacher.model, teacher.steps)
    assert found.provenance == json.loads(json.dumps(dict(teacher.provenance)))
    np.testing.assert_array_equal(api.sample(found, 2, steps=2), api.sample(teacher, 2, steps=2))
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model"] == teacher.model.to_dict()
    card = huggingface_hub.ModelCard.load(tmp_path / "saved" / "README.md")
    assert card.data.library_name == "diffusion_distill"
    assert "| 3.17 |" in card.text


def test_what_is_pushed_is_the_same_folder(teacher: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's library uploads a folder; here it is asked instead what would be uploaded."""
    pushed: dict[str, list[str]] = {}

    def upload(self: Any, *, repo_id: str, folder_path: str, **rest: Any) -> None:
        pushed[repo_id] = sorted(os.listdir(folder_path))

    made = type("Made", (), {"repo_id": "me/digits"})
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, *args, **rest: made)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    HubArtefact(teacher).push_to_hub("me/digits")
    assert pushed == {"me/digits": ["README.md", "config.json", "model.safetensors"]}


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        HubArtefact.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04pickled")
    with pytest.raises(WeightsError):
        HubArtefact.from_pretrained(tmp_path)
