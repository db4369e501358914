"""A teacher of scikit-learn's 8x8 digits: minutes on two CPU cores, seconds on an accelerator.

No paper has this row; it is the smallest complete run.

    python -m diffusion_distill.main --mode=train --config=configs/digits_teacher.py --workdir=runs/digits_teacher
    python -m diffusion_distill.main --mode=evaluate --config=configs/digits_teacher.py --workdir=runs/digits_teacher \
        --config.artefact=runs/digits_teacher/teacher
"""

from diffusion_distill import Denoising, Model, Settings, UNet
from diffusion_distill.cli.build import config_of


def get_config():
    """The config; every field can be overridden on the command line."""
    network = UNet(
        ch=32,
        emb_ch=64,
        out_ch=1,
        ch_mult=(1, 1),
        num_res_blocks=1,
        attn_resolutions=(),
        num_heads=1,
        resblock_resample=True,
    )
    return config_of(
        model=Model(network, shape=(8, 8, 1), prediction="v"),
        method=Denoising(
            length="75K",
            weighting="snr_plus_one",
            learning_rate=3e-3,
            warmup=100,
            anneal=True,
            residual=1e-3,
        ),
        settings=Settings(batch_size=64),
        data={"name": "digits", "split": "train"},
        reference={"name": "digits", "split": "train"},
        count=897,
    )
