"""A class-conditional teacher of MNIST 28x28: minutes on a GPU, an evening on two CPU cores.

No paper has this row, and we have not run it at this length.

    python -m diffusion_distill.main --mode=train --config=configs/mnist_teacher.py --workdir=runs/mnist_teacher

Data: TFDS 'mnist', or an .npz with images and labels: --config=configs/mnist_teacher.py:mnist.npz
"""

from diffusion_distill import Denoising, Model, Settings, UNet
from diffusion_distill.cli.build import config_of, images


def get_config(path: str = ""):
    """The config; `path` is an .npz, a folder or a zip in place of TFDS."""
    network = UNet(
        ch=32,
        emb_ch=128,
        out_ch=1,
        ch_mult=(1, 2, 2),
        num_res_blocks=1,
        attn_resolutions=(7,),
        num_heads=1,
        resblock_resample=True,
        num_classes=10,
    )
    return config_of(
        model=Model(network, shape=(28, 28, 1), prediction="v"),
        method=Denoising(
            length="2M", weighting="snr_plus_one", learning_rate=1e-3, warmup=500, anneal=True, residual=1e-3
        ),
        settings=Settings(batch_size=128, evaluate_every="200K"),
        data=images("mnist", path),
        reference=images("mnist", path),
        count=2000,
    )
