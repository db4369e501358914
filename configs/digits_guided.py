"""A guided student of a digits teacher with labels: classifier-free guidance in one call, for scales from 1 to 4.

No paper has this row; the method is stage one of Meng et al., arXiv:2210.03142. The teacher is trained with labels,
some of which are dropped; stage two is any distillation of the student, here TRACT.

    python -m diffusion_distill.main --mode=train --config=configs/digits_teacher.py --workdir=runs/labelled \
        --config.model.network.num_classes=10 --config.method.label_dropout=0.1
    python -m diffusion_distill.main --mode=distill --config=configs/digits_guided.py --workdir=runs/guided \
        --config.teacher=runs/labelled/teacher
    python -m diffusion_distill.main --mode=distill --config=configs/digits_tract.py --workdir=runs/guided_tract \
        --config.teacher=runs/guided/student
    python -m diffusion_distill.main --mode=sample --config=configs/digits_tract.py --workdir=runs/guided_tract \
        --config.artefact=runs/guided_tract/student_1 --config.sample.guidance=2.0
"""

from diffusion_distill import Guided, Settings
from diffusion_distill.cli.build import config_of


def get_config():
    """The config; the model is the teacher's."""
    return config_of(
        model=None,
        method=Guided(
            scales=(1.0, 4.0),
            length="50K",
            weighting="snr_plus_one",
            learning_rate=3e-3,
            anneal=True,
        ),
        settings=Settings(batch_size=64),
        data={"name": "digits", "split": "train"},
        reference={"name": "digits", "split": "train"},
        count=897,
    )
