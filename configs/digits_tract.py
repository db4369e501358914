"""TRACT 1024→32→1 of the digits teacher (configs/digits_teacher.py).

    python -m diffusion_distill.main --mode=distill --config=configs/digits_tract.py --workdir=runs/digits_tract \
        --config.teacher=runs/digits_teacher/teacher
    python -m diffusion_distill.main --mode=evaluate --config=configs/digits_tract.py --workdir=runs/digits_tract \
        --config.artefact=runs/digits_tract/student_1
"""

from diffusion_distill import Settings, Tract
from diffusion_distill.cli.build import config_of


def get_config():
    """The config; the model is the teacher's."""
    return config_of(
        model=None,
        method=Tract(
            (1024, 32, 1),
            length="70K",
            shares=(1, 3),
            weighting="snr_plus_one",
            learning_rate=3e-3,
            anneal=True,
            clip="none",
        ),
        settings=Settings(batch_size=64),
        data={"name": "digits", "split": "train"},
        reference={"name": "digits", "split": "train"},
        count=897,
    )
