"""The layers that the networks share, one file per concept.

Images are [batch, height, width, channels]; an embedding of the time is [batch, emb_ch] float32. Parameters are
float32 and have the names and shapes of the progressive distillation program (Salimans & Ho, arXiv:2202.00512), which
published weights rely on. The field `dtype` is what convolutions and matrix products are computed in.
"""

from diffusion_distill.networks.layers.attention import Attention, attend, fused_fits, plain_attention
from diffusion_distill.networks.layers.convolution import Conv, FusedConv, convolution
from diffusion_distill.networks.layers.features import FourierFeatures, fourier_features, sinusoidal_features
from diffusion_distill.networks.layers.initial import INIT_RULES, Role, initial
from diffusion_distill.networks.layers.norm import GroupNorm, NormSettings, group_norm, group_norm_swish, norm_groups
from diffusion_distill.networks.layers.recompute import remat
from diffusion_distill.networks.layers.resampling import (
    RESAMPLE,
    Resample,
    Resampling,
    downsample,
    filter_down,
    filter_of,
    filter_up,
    upsample,
)
from diffusion_distill.networks.layers.residual import ResidualBlock, residual_stream
from diffusion_distill.networks.layers.scale import ScaleEmbedding

__all__ = [
    "INIT_RULES",
    "RESAMPLE",
    "Attention",
    "Conv",
    "FourierFeatures",
    "FusedConv",
    "GroupNorm",
    "NormSettings",
    "Resample",
    "Resampling",
    "ResidualBlock",
    "Role",
    "ScaleEmbedding",
    "attend",
    "convolution",
    "downsample",
    "filter_down",
    "filter_of",
    "filter_up",
    "fourier_features",
    "fused_fits",
    "group_norm",
    "group_norm_swish",
    "initial",
    "norm_groups",
    "plain_attention",
    "remat",
    "residual_stream",
    "sinusoidal_features",
    "upsample",
]
