"""Model cards: the README.md of an exported folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from diffusion_distill.denoisers.model import Model
from diffusion_distill.version import __version__
from diffusion_distill.weights.matching import Checkpoint
from diffusion_distill.weights.registry import PUBLISHED

WORDS = {"x": "the image", "eps": "the noise", "eps_var": "the noise and its variance", "v": "v"}

DIFFUSERS = """\
```python
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("FOLDER")
images = pipe(batch_size=16, num_inference_steps={steps}{clipped}).images
```
"""
LABELLED = """\
The network takes labels, which `{pipeline}` does not pass on:

```python
import torch
from diffusers import {scheduler}, UNet2DModel

unet = UNet2DModel.from_pretrained("FOLDER", subfolder="unet")
scheduler = {scheduler}.from_pretrained("FOLDER", subfolder="scheduler")
scheduler.set_timesteps({steps})
labels = torch.arange(16) % {classes}
z = scheduler.init_noise_sigma * torch.randn(16, {channels}, {height}, {width})
with torch.no_grad():
    for t in scheduler.timesteps:
        z = scheduler.step(unet(scheduler.scale_model_input(z, t), t, labels).sample, t, z).prev_sample
```
"""
SCHEDULERS = {"DDIMPipeline": "DDIMScheduler", "ConsistencyModelPipeline": "CMStochasticIterativeScheduler"}
PYTORCH = """\
The weights have the names of `guided_diffusion`, ADM's program. With that program installed:

```python
import json

from guided_diffusion.unet import UNetModel
from safetensors.torch import load_file

network = UNetModel(**json.load(open("FOLDER/arguments.json"))["network"])
network.load_state_dict(load_file("FOLDER/model.safetensors"))
```
"""

HUB = """\
With `diffusion_distill[hub]` installed:

```python
import diffusion_distill as dd
from diffusion_distill.api.hub import HubArtefact

images = dd.sample(HubArtefact.from_pretrained("FOLDER").artefact, 16)
```
"""
GUIDED = """
It is guided already: `dd.sample(..., guidance={{"scale": s}})` tells it a scale from {low:g} to {high:g}.
"""


def of_diffusers(found: Checkpoint, pipeline: str) -> str:
    """The card of a folder of diffusers."""
    model, steps = found.model, found.steps or (1 if pipeline == "ConsistencyModelPipeline" else 50)
    height, width, channels = model.shape
    text = LABELLED if model.num_classes > 1 else DIFFUSERS
    clipped = ", use_clipped_model_output=True" if pipeline == "DDIMPipeline" else ""
    how = text.format(
        pipeline=pipeline, scheduler=SCHEDULERS[pipeline], steps=steps, classes=model.num_classes,
        channels=channels, height=height, width=width, clipped=clipped,
    )  # fmt: skip
    if found.steps:
        how += f"\nIt was made for {steps} steps; other numbers give worse images.\n"
    if model.prediction == "eps_var":
        how += (
            "\nThe network's variance is left out: deterministic samplers do not use it, and `DDIMScheduler` does not "
        )
        how += "take it.\n"
    return _card(found, "library_name: diffusers\n", how)


def of_pytorch(found: Checkpoint, schedule: Mapping[str, Any] | None) -> str:
    """The card of a state dict; `schedule` as in its arguments.json."""
    model = found.model
    said = "are described by `schedule` in arguments.json" if schedule else f"are those of `{model.process}`"
    how = f"{PYTORCH}\nThe noise levels {said}. "
    how += f"The network is told the number that `{model.time_input}` gives, and outputs `{model.prediction}`.\n"
    return _card(found, "", how)


def of_hub(found: Checkpoint) -> str:
    """The card of a folder or repository for `api.hub`."""
    scales = found.model.guided
    told = GUIDED.format(low=scales[0], high=scales[1]) if scales else ""
    return _card(found, "library_name: diffusion_distill\n", HUB + told)


def _card(found: Checkpoint, header: str, how: str) -> str:
    origin = "\n".join(f"- {line}" for line in _origin(found.facts)) or "- not recorded"
    return f"""\
---
{header}tags:
- diffusion
---

# {_kind(found)}

{_what(found.model)} Exported by diffusion_distill {__version__}.

## How it was made

{origin}

{_numbers(found.facts)}## Licence

{_licence(found.facts)}

## How to load it

{how}"""


def _kind(found: Checkpoint) -> str:
    return f"A diffusion model distilled to {found.steps} steps" if found.steps else "A diffusion model"


def _what(model: Model) -> str:
    predicts = f"The network predicts {WORDS.get(model.prediction, model.prediction)}."
    if len(model.shape) != 3:
        return f"It makes arrays of shape {model.shape}. {predicts}"
    height, width, channels = model.shape
    size = f"It makes images of {height} x {width} pixels with {channels} channel{'s' * (channels > 1)}"
    labels = f" of {model.num_classes} classes" if model.num_classes > 1 else ""
    return f"{size}{labels}. {predicts}"


def _origin(facts: Mapping[str, Any]) -> Iterator[str]:
    """What a provenance says, one fact after another, and then what it says of the teacher."""
    for name, said in (("method", "method"), ("phase", "phase"), ("updates", "updates")):
        if (value := facts.get(name)) not in (None, {}, ""):
            yield f"{said}: {_short(value)}"
    for name, value in facts.get("imported_from", {}).items():
        if name in ("name", "program", "file", "url", "sha256", "family") and value:
            yield f"imported from, {name}: {value}"
    if isinstance(teacher := facts.get("teacher"), Mapping):
        yield from (f"teacher, {line}" for line in _origin(teacher))


def _numbers(facts: Mapping[str, Any]) -> str:
    """A table of the results, if there are some."""
    if not (rows := facts.get("results")):
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([str(row.get(name, "")) for name in names] for row in rows)]
    return "## Numbers\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n"


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_short(each)}" for name, each in value.items() if each not in (None, {}, "", []))
    return str(value)


def _licence(facts: Mapping[str, Any]) -> str:
    """Where the weights began: the source and licence of a published model, if it was one."""
    while isinstance(facts.get("teacher"), Mapping):
        facts = facts["teacher"]
    imported = facts.get("imported_from", {})
    if (published := PUBLISHED.get(imported.get("name", ""))) is not None:
        return f"It was made from `{published.name}` ({published.dataset}). {published.source}"
    if imported:
        return (
            "It was made from weights of others, whose licence is not recorded here. Find it out before passing it on."
        )
    return "Not stated: whoever trained it decides."
