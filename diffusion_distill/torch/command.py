"""The command dd-fit-diffusers: fits a solver to a pipeline, or chooses levels, and writes a small JSON file.

    dd-fit-diffusers FOLDER --steps=10 --prompts=prompts.txt --out=solver.json
    dd-fit-diffusers FOLDER --steps=10 --prompts=prompts.txt --levels --out=levels.json

FOLDER is a pipeline that diffusers has saved, or its name on the hub. The first prompts, as many as --images, make one
batch; pipelines without prompts take --call, JSON of what they are called with, such as '{"batch_size": 100}'.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from diffusers import DiffusionPipeline  # pyright: ignore[reportMissingImports]

from diffusion_distill.base.errors import in_words, positive_int
from diffusion_distill.base.files import EDITED, user_path, writable
from diffusion_distill.base.whole import write_json
from diffusion_distill.solvers.registry import DEFAULT_SOLVER
from diffusion_distill.torch.fitting import Asked, fit
from diffusion_distill.torch.levels import CANDIDATES, choose_levels

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; what is wrong with its arguments is said in a line."""
    asked = _parser().parse_args(arguments)
    try:
        _work(asked)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise SystemExit(f"dd-fit-diffusers: {in_words(error)}") from error
    except KeyboardInterrupt:
        raise SystemExit("dd-fit-diffusers: stopped; nothing was written.") from None


def _work(asked: argparse.Namespace) -> None:
    call, out = _call(asked), user_path(asked.out)
    writable(out.parent, out.name)
    pipeline = DiffusionPipeline.from_pretrained(asked.pipeline, dtype=DTYPES[asked.dtype])
    pipeline = pipeline.to(asked.device)
    if "prompt" in call and "prompt" not in inspect.signature(pipeline.__call__).parameters:
        raise ValueError(f"{type(pipeline).__name__} takes no prompts: leave --prompts out, and say more in --call.")
    if asked.levels:
        write_json(out, choose_levels(pipeline, asked.steps, candidates=asked.candidates, **call)._asdict())
    else:
        how = {"solver": asked.solver, "scale": asked.scale, "teacher_solver": asked.teacher_solver}
        fit(pipeline, asked.steps, **how, **call).save(out)


def _call(asked: argparse.Namespace) -> dict[str, Any]:
    """What the pipeline is called with."""
    try:
        call = json.loads(asked.call)
    except ValueError as error:
        raise ValueError(f"--call={asked.call} is no JSON: {error}.") from error
    if not isinstance(call, dict):
        raise ValueError(f"--call={asked.call} must be a JSON object, such as '{{\"batch_size\": 100}}'.")
    call["generator"] = torch.Generator(asked.device).manual_seed(asked.seed)
    if asked.prompts:
        call["prompt"] = _prompts(user_path(asked.prompts))[: positive_int("--images", asked.images)]
    return call


def _prompts(place: Path) -> list[str]:
    """The lines of a file that are not empty."""
    try:
        lines = [line for line in place.read_text(encoding=EDITED).splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} must be text in UTF-8, but {error}.") from error
    if not lines:
        raise ValueError(f"{place} has no prompts: write one a line.")
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dd-fit-diffusers", description=__doc__, formatter_class=_Form)
    parser.add_argument("pipeline", help="a folder that save_pretrained wrote, or a name on the hub")
    parser.add_argument("--steps", type=int, default=10, help="of the solver")
    parser.add_argument("--solver", default=DEFAULT_SOLVER, help="perhaps with options: 'deis order=2'")
    parser.add_argument("--scale", type=int, default=Asked.scale, help="the teacher's steps per row")
    parser.add_argument("--teacher_solver", default=Asked.teacher_solver, help="by default DDIM or the solver itself")
    parser.add_argument("--levels", action="store_true", help="choose levels instead of fitting lambdas")
    parser.add_argument("--candidates", type=int, default=CANDIDATES, help="among which levels are chosen")
    parser.add_argument("--prompts", default="", help="a file with one prompt a line")
    parser.add_argument("--images", type=int, default=16, help="prompts that are used")
    parser.add_argument("--call", default="{}", help="JSON of further arguments of the pipeline")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of the networks")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the networks")
    parser.add_argument("--out", required=True, help="the JSON file that is written")
    return parser


class _Form(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the description and shows defaults."""


if __name__ == "__main__":
    main()
