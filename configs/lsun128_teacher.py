"""BTD's teachers of LSUN bedroom and church 128x128: arXiv:2202.00512, released configurations.

    paper      FID of these teachers sampled with many steps: unknown here
    training   batch 2048, Adam 3e-4 after 1000 updates of warm-up, average 0.9999, dropout 0.1, predicts x and eps
    length     unknown (the configurations do not say); 1G images (524 thousand updates) is our choice
    cost       unknown; 139.6M parameters
    weights    published: --mode=import --model=bedroom_original (church_original) spares this run

    python -m diffusion_distill.main --mode=train --config=configs/lsun128_teacher.py:church --workdir=runs/church

Data: TFDS 'lsun/bedroom' or 'lsun/church_outdoor', or a folder or zip with train/IMAGE after a comma:
--config=configs/lsun128_teacher.py:church,church.zip
"""

from diffusion_distill import Denoising, OptimizerSettings, Settings
from diffusion_distill.base.errors import choose
from diffusion_distill.cli.build import config_of, images
from diffusion_distill.weights import PUBLISHED

#: The sets' names in TensorFlow Datasets.
DATASETS = {"bedroom": "lsun/bedroom", "church": "lsun/church_outdoor"}


def get_config(run: str = "bedroom"):
    """The config of 'bedroom' or 'church', with a folder or zip with train/IMAGE after a comma."""
    subset, _, path = run.partition(",")
    data = images(choose("LSUN set", subset, DATASETS), path, size=128, resample="bilinear")
    return config_of(
        model=PUBLISHED[f"{subset}_original"].model.with_network(dropout=0.1),
        method=Denoising(length="1G", learning_rate=3e-4, warmup=1000, momentum=0.9999, averaging="plain"),
        settings=Settings(
            batch_size=2048,
            flip=True,
            checkpoint_every=2000,
            evaluate_every="20M",
            optimizer=OptimizerSettings(grad_clip=1.0, clip_scope="shard"),
        ),
        data=data,
        reference=data,
        steps=1024,
        count=50_000,
    )
