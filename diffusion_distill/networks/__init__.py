"""Networks: Flax modules that know images, a number per image (the time) and labels, nothing of diffusion."""

from diffusion_distill.networks.dit import DiT
from diffusion_distill.networks.song_unet import SongUNet
from diffusion_distill.networks.unet import ADM, UNet

NETWORKS = {"unet": UNet, "song_unet": SongUNet, "dit": DiT}

__all__ = ["ADM", "NETWORKS", "DiT", "SongUNet", "UNet"]
