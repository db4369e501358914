"""An EDM teacher of scikit-learn's 8x8 digits: minutes on two CPU cores. No paper has this row.

    python -m diffusion_distill.main --mode=train --config=configs/digits_edm_teacher.py --workdir=runs/digits_edm
    python -m diffusion_distill.main --mode=evaluate --config=configs/digits_edm_teacher.py --workdir=runs/digits_edm \
        --config.artefact=runs/digits_edm/teacher
"""

from diffusion_distill import VE, Denoising, EDMInput, Model, Settings, UNet
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
        model=Model(network, (8, 8, 1), VE(20.0), prediction="edm", time_input=EDMInput(sigma_data=0.75)),
        method=Denoising(
            length="75K",
            noise="lognormal",
            weighting="edm",
            learning_rate=3e-3,
            warmup=100,
            anneal=True,
            residual=1e-3,
        ),
        settings=Settings(batch_size=64),
        data={"name": "digits", "split": "train"},
        reference={"name": "digits", "split": "train"},
        solver="heun",
        steps=32,
        count=897,
    )
