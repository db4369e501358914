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
from diffusion_distill.base.whole import write_json
from diffusion_distill.solvers.registry import DEFAULT_SOLVER
from diffusion_distill.torch.fitting import Asked, fit
from diffusion_distill.torch.levels import choose_levels

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; what is wrong with its arguments is said in a line."""
    asked = _parser().parse_args(arguments)
    try:
        _work(asked)
    except (ValueError, OSError) as error:
        raise SystemExit(f"dd-fit-diffusers: {in_words(error)}") from error


def _work(asked: argparse.Namespace) -> None:
    call = _call(asked)
    pipeline = DiffusionPipeline.from_pretrained(asked.pipeline, torch_dtype=DTYPES[asked.dtype])
    pipeline = pipeline.to(asked.device)
    if "prompt" in call and "prompt" not in inspect.signature(pipeline.__call__).parameters:
        raise ValueError(f"{type(pipeline).__name__} takes no prompts: leave --prompts out, and say more in --call.")
    if asked.levels:
        write_json(Path(asked.out), choose_levels(pipeline, asked.steps, candidates=asked.candidates, **call)._asdict())
    else:
        how = {"solver": asked.solver, "scale": asked.scale, "teacher_solver": asked.teacher_solver}
        fit(pipeline, asked.steps, **how, **call).save(asked.out)


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
        lines = [line for line in Path(asked.prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
        call["prompt"] = lines[: positive_int("--images", asked.images)]
        if not lines:
            raise ValueError(f"{asked.prompts} has no prompts: write one a line.")
    return call


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dd-fit-diffusers", description=__doc__, formatter_class=_Form)
    parser.add_argument("pipeline", help="a folder that save_pretrained wrote, or a name on the hub")
    parser.add_argument("--steps", type=int, default=10, help="of the solver")
    parser.add_argument("--solver", default=DEFAULT_SOLVER, help="perhaps with options: 'deis order=2'")
    parser.add_argument("--scale", type=int, default=Asked.scale, help="the teacher's steps per row")
    parser.add_argument("--teacher_solver", default=Asked.teacher_solver, help="by default DDIM or the solver itself")
    parser.add_argument("--levels", action="store_true", help="choose levels instead of fitting lambdas")
    parser.add_argument("--candidates", type=int, default=50, help="among which levels are chosen")
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
