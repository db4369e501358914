"""BTD 1024→512→...→1 of the digits teacher (configs/digits_teacher.py), with as many images as digits_tract.py:
12 x 5973 in ten phases, the last two of which are double.

    python -m diffusion_distill.main --mode=distill --config=configs/digits_btd.py --workdir=runs/digits_btd \
        --config.teacher=runs/digits_teacher/teacher
    python -m diffusion_distill.main --mode=evaluate --config=configs/digits_btd.py --workdir=runs/digits_btd \
        --config.artefact=runs/digits_btd/student_1
"""

from diffusion_distill import Progressive, Settings
from diffusion_distill.cli.build import config_of


def get_config():
    """The config; the model is the teacher's."""
    return config_of(
        model=None,
        method=Progressive(1024, 1, phase_length="5973", weighting="snr_plus_one", learning_rate=1e-3),
        settings=Settings(batch_size=64),
        data={"name": "digits", "split": "train"},
        reference={"name": "digits", "split": "train"},
        count=897,
    )
