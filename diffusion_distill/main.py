"""The command line.

    python -m diffusion_distill.main --mode=train    --config=configs/digits_teacher.py --workdir=runs/teacher
    python -m diffusion_distill.main --mode=distill  --config=configs/digits_tract.py   --workdir=runs/tract
    python -m diffusion_distill.main --mode=compile  --config=configs/digits_teacher.py --workdir=runs/compile
    python -m diffusion_distill.main --mode=sample   --config=configs/digits_tract.py   --workdir=runs/tract
    python -m diffusion_distill.main --mode=evaluate --config=configs/digits_tract.py   --workdir=runs/tract
    python -m diffusion_distill.main --mode=fit      --config=configs/digits_solvers.py --workdir=runs/dode
    python -m diffusion_distill.main --mode=solvers  --config=configs/digits_solvers.py --workdir=runs/solvers
    python -m diffusion_distill.main --mode=similarity  (or trajectories, or lambdas; to look at solvers, as fit)
    python -m diffusion_distill.main --mode=import   --model=cifar_original             --workdir=runs/cifar_original
    python -m diffusion_distill.main --mode=export   --model=runs/tract/student_1       --workdir=runs/exports
    python -m diffusion_distill.main --mode=report   --workdir=runs/tract (a page about it; of several: --model=A,B)
    python -m diffusion_distill.main --mode=status   --workdir=runs/tract (how far its run is; it may be at work)

Every field of a config can be overridden: --config.run.batch_size=64 --config.method.schedule='(1024,8,1)'.
SIGTERM and Ctrl-C save what a run has and end the program; the same command goes on with it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from diffusion_distill.api import EXPORTS
from diffusion_distill.base import interrupts, processes
from diffusion_distill.base.compilation import keep_compiled
from diffusion_distill.base.errors import in_words
from diffusion_distill.base.files import user_path
from diffusion_distill.cli.modes import MODES, WITHOUT_CONFIG, Asked
from diffusion_distill.training.sharding import use_cpu_devices

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True, help_string="A file with get_config().")
_CPU_DEVICES = flags.DEFINE_integer("cpu_devices", 0, "Split the CPU into so many devices; one per core is fastest.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes of a TPU pod or cluster first.")
_MODEL = flags.DEFINE_string(
    "model", "", "import: a published name or a file. export: an artefact's folder. report: A,B,C."
)
_FAMILY = flags.DEFINE_string("family", "", "import: the program that a file is of, a name in weights.FAMILIES.")
_ARGUMENTS = flags.DEFINE_string(
    "arguments", "", 'import: JSON of what a file does not show, such as \'{"image_size": 64, "num_heads": 4}\'.'
)
_FORMAT = flags.DEFINE_enum("format", "safetensors", list(EXPORTS), "export: for which program.")
_TOPOLOGY = flags.DEFINE_string("topology", "", "compile: TPUs such as v5e:4x4, without having them.")
_ALTERNATIVES = flags.DEFINE_bool("alternatives", True, "compile: also with remat, in parts, and the largest batch.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run: checkpoints, metrics, artefacts, results.")


_MODE = flags.DEFINE_enum("mode", None, [*MODES, *WITHOUT_CONFIG], "What to do.")


def main(argv: Sequence[str]) -> None:
    """Runs a mode; errors in what was asked for end the program with their message."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}")
    mode = str(_MODE.value)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.FATAL)  # Orbax reports all it does, and logs errors that it raises as well
    if _CONFIG.value is None and mode not in WITHOUT_CONFIG:
        raise app.UsageError(f"The mode {mode} needs --config=FILE.")
    keep_compiled()
    if _CPU_DEVICES.value:
        use_cpu_devices(_CPU_DEVICES.value)
    if _DISTRIBUTED.value:
        with ExitStack() as together:
            try:
                together.enter_context(processes.joined())  # from here on JAX itself listens for preemption
            except (ValueError, RuntimeError) as error:
                sys.exit(f"--distributed cannot join the other processes: {in_words(error)}")
            run(mode)
    else:
        interrupts.listen()
        run(mode)


def run(mode: str) -> None:
    """Does what the flags ask for; ends the program if that was interrupted or is not possible."""
    try:
        workdir = user_path(str(_WORKDIR.value))
        if mode in MODES:
            extra = {"topology": _TOPOLOGY.value, "alternatives": _ALTERNATIVES.value} if mode == "compile" else {}
            MODES[mode](_CONFIG.value, workdir, **extra)
        else:
            asked = Asked(_MODEL.value, _FAMILY.value, _ARGUMENTS.value, str(_FORMAT.value))
            WITHOUT_CONFIG[mode](_CONFIG.value, workdir, asked)
    except interrupts.Interrupted as request:
        print(f"Stopped by {request}; what was done is saved. The same command goes on from here.", file=sys.stderr)
        sys.exit(interrupts.EXIT_STATUS)
    except (ValueError, TypeError, OSError, ImportError, MemoryError, jax.errors.JaxRuntimeError) as error:
        if flags.FLAGS.only_check_args or flags.FLAGS.pdb:
            raise
        notes = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
        sys.exit(f"{type(error).__name__}: {in_words(error)}{notes}")


def read_flags(argv: Sequence[str]) -> list[str]:
    """Reads the command line as absl does; a config that cannot be read, or has no such field, ends the program."""
    try:
        return flags.FLAGS(list(argv))
    except flags.Error as error:
        sys.exit(f"{error}\nPass --helpshort for the flags.")
    except (KeyError, AttributeError, TypeError, ValueError, OSError, SyntaxError, ImportError) as error:
        said = error.args[0] if isinstance(error, KeyError) and error.args else in_words(error)
        why = f"it has no field {said}" if isinstance(error, KeyError) else f"{type(error).__name__}: {said}"
        sys.exit(f"--config and its fields cannot be read: {why}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir", "mode"])
    app.run(main, flags_parser=read_flags)
