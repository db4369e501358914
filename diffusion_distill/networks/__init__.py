"""Networks: Flax modules that know images, a number per image (the time) and labels, nothing of diffusion."""

from diffusion_distill.networks.unet import UNet

NETWORKS = {"unet": UNet}

__all__ = ["NETWORKS", "UNet"]
