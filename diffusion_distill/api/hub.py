"""Artefacts as folders and repositories of the Hugging Face Hub, by its library's own `ModelHubMixin`.

    from diffusion_distill.api.hub import HubArtefact

    HubArtefact(artefact).save_pretrained("FOLDER")            or .push_to_hub("NAME/REPOSITORY")
    artefact = HubArtefact.from_pretrained("FOLDER").artefact  or "NAME/REPOSITORY"

A folder has model.safetensors, as `api.export_weights` writes it, config.json with the same description of the model
for readers, and a model card. Nothing in it is a pickle. This module needs the extra [hub]; the package does not import
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, hf_hub_download  # type: ignore[import-not-found]

from diffusion_distill.api.exchange import exported, read_exported
from diffusion_distill.base.whole import write_json
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.weights import card
from diffusion_distill.weights.matching import Checkpoint

TENSORS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


class HubArtefact(ModelHubMixin):
    """An artefact with `save_pretrained`, `from_pretrained` and `push_to_hub`.

    Attributes:
      artefact: what is saved, or was loaded.
      results: rows of an evaluation, {name: value}, for the model card.
    """

    def __init__(self, artefact: Artefact, results: Sequence[Mapping[str, Any]] = ()):
        self.artefact, self.results = artefact, results

    def __new__(cls, *args: Any, **kwargs: Any) -> HubArtefact:
        """The mixin's own makes a config of the arguments, parameters and all; here `_save_pretrained` writes it."""
        return object.__new__(cls)

    def _save_pretrained(self, save_directory: Path) -> None:
        artefact = self.artefact
        exported(artefact, save_directory / TENSORS)
        facts = {**artefact.provenance, "results": list(self.results)}
        found = Checkpoint(artefact.model, artefact.params, artefact.steps, facts=facts, grid=artefact.grid)
        write_json(save_directory / CONFIG, {"model": artefact.model.to_dict(), "steps": artefact.steps})
        (save_directory / CARD).write_text(card.of_hub(found), encoding="utf-8")

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **where: Any) -> HubArtefact:
        """Reads a folder, or downloads the file of a repository; `where` is `hf_hub_download`'s.

        Raises:
          WeightsError: the file is not what it should be.
          FileNotFoundError: the folder has no such file.
        """
        folder = Path(model_id)
        path = folder / TENSORS if folder.is_dir() else Path(hf_hub_download(model_id, TENSORS, **where))
        return cls(read_exported(path))
