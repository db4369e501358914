"""The U-Net and the TRACT update in PyTorch, as a person would write them there: the peer of `steps.py`.

    pip install torch        (the extra [bench])

The network is `diffusion_distill.UNet` with unconditional residual blocks that resample (the settings in `_nets`),
in PyTorch's channels-last memory layout, which is its faster one. `load` copies parameters of ours, so that both
compute the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch  # type: ignore[import-not-found]
import torch.nn.functional as F  # type: ignore[import-not-found]
from torch import Tensor, nn  # type: ignore[import-not-found]


class ResidualBlock(nn.Module):
    """norm, swish, [resample], conv; FiLM norm, swish, conv; plus the shortcut."""

    def __init__(self, inputs: int, features: int, emb_ch: int, resample: str = "none"):
        super().__init__()
        self.resample = resample
        self.norm1 = nn.GroupNorm(32, inputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, features, 3, padding=1)
        self.temb_proj = nn.Linear(emb_ch, 2 * features)
        self.norm2 = nn.GroupNorm(32, features, eps=1e-6)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, features, 1) if inputs != features else nn.Identity()

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2) if self.resample == "up" else x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(self._resampled(F.silu(self.norm1(x))))
        scale, shift = self.temb_proj(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.nin_shortcut(self._resampled(x)) + h


class Attention(nn.Module):
    """x + projection(attention(norm(x))) with one head."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q, self.k, self.v = (nn.Linear(channels, channels) for _ in range(3))
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        h = self.norm(x).permute(0, 2, 3, 1).reshape(batch, 1, height * width, channels)
        h = self.proj_out(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h)))
        return x + h.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


class UNet(nn.Module):
    """Images [batch, channels, height, width] and times [batch] -> images."""

    def __init__(
        self,
        channels: int,
        ch: int,
        emb_ch: int,
        out_ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        size: int,
        num_heads: int = 1,
        resblock_resample: bool = True,
    ):
        super().__init__()
        if num_heads != 1 or not resblock_resample:
            raise ValueError("This network has one head, and blocks that resample.")
        self.dense0, self.dense1 = nn.Linear(ch, emb_ch), nn.Linear(emb_ch, emb_ch)
        self.conv_in = nn.Conv2d(channels, ch, 3, padding=1)
        self.blocks = nn.ModuleDict()
        self.path: list[tuple[str, str]] = []  # what happens to h, in order: (operation, block)
        self.ch, width, kept = ch, ch, [ch]

        def block(name: str, features: int, resample: str = "none") -> None:
            nonlocal width
            self.blocks[name.replace(".", "-")] = ResidualBlock(width, features, emb_ch, resample)
            self.path.append(("residual", name))
            width = features

        def attention(name: str, always: bool = False) -> None:
            if always or size in attn_resolutions:
                self.blocks[name.replace(".", "-")] = Attention(width)
                self.path.append(("attention", name))

        def keep() -> None:
            kept.append(width)
            self.path.append(("keep", ""))

        for level, mult in enumerate(ch_mult):
            for k in range(num_res_blocks):
                block(f"down_{level}.block_{k}", ch * mult)
                attention(f"down_{level}.attn_{k}")
                keep()
            if level < len(ch_mult) - 1:
                block(f"down_{level}.downsample", width, "down")
                size //= 2
                keep()
        block("mid.block_1", width)
        attention("mid.attn_1", always=True)
        block("mid.block_2", width)
        for level, mult in reversed(list(enumerate(ch_mult))):
            for k in range(num_res_blocks + 1):
                self.path.append(("join", ""))
                width += kept.pop()
                block(f"up_{level}.block_{k}", ch * mult)
                attention(f"up_{level}.attn_{k}")
            if level > 0:
                block(f"up_{level}.upsample", width, "up")
                size *= 2
        self.norm_out = nn.GroupNorm(32, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, out_ch, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        half = self.ch // 2
        frequencies = torch.exp(torch.arange(half, device=x.device) * (-math.log(10_000.0) / (half - 1)))
        angles = time[:, None] * frequencies
        emb = F.silu(self.dense0(torch.cat([angles.sin(), angles.cos()], dim=1).to(x.dtype)))
        emb = F.silu(self.dense1(emb))
        h = self.conv_in(x)
        kept = [h]
        for operation, name in self.path:
            if operation == "keep":
                kept.append(h)
            elif operation == "join":
                h = torch.cat([h, kept.pop()], dim=1)
            elif operation == "residual":
                h = self.blocks[name.replace(".", "-")](h, emb)
            else:
                h = self.blocks[name.replace(".", "-")](h)
        return self.conv_out(F.silu(self.norm_out(h)))

    def load(self, params: Mapping[str, Any]) -> UNet:
        """Takes the parameters of a `diffusion_distill.UNet` of the same settings."""
        own = {name.replace(".", "-"): value for name, value in params.items()}
        for name, module in self.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear, nn.GroupNorm)):
                parts = name.removeprefix("blocks.").split(".")
                values = own
                for part in parts:
                    values = values[part]
                _copy(module, {key: np.asarray(value) for key, value in values.items()})
        return self


def _copy(module: nn.Module, values: Mapping[str, np.ndarray]) -> None:
    """Fills a layer of PyTorch with a layer of ours."""
    weight = values.get("scale", values.get("kernel"))
    assert weight is not None
    if isinstance(module, nn.Conv2d):
        weight = weight.reshape(module.kernel_size + weight.shape[-2:]).transpose(3, 2, 0, 1)
    elif isinstance(module, nn.Linear):  # q, k, v are [in, heads, width], proj_out [heads, width, out]
        weight = weight.reshape(module.in_features, module.out_features).T
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(np.ascontiguousarray(weight)))  # type: ignore[arg-type]
        module.bias.copy_(torch.from_numpy(np.array(values["bias"].reshape(-1))))  # type: ignore[arg-type]


class Tract:
    """A TRACT update of a network that predicts v: gradient clipping, Adam, and the two averages.

    Args:
      make: builds the network, with a student's initial parameters.
      rows: the arrays [rows] of a phase: time, alpha and sigma of t and of m, r, d, and the weights of both estimates.
      compiled: whether the networks go through torch.compile.
      dtype: what autocast computes convolutions and products in; None for float32.
    """

    def __init__(
        self,
        make: Callable[[], UNet],
        rows: Mapping[str, np.ndarray],
        *,
        compiled: bool = False,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
    ):
        place = {"device": device, "memory_format": torch.channels_last}
        self.student, self.teacher, self.self_teacher, self.average = (make().to(**place) for _ in range(4))
        for frozen in (self.teacher, self.self_teacher, self.average):
            frozen.requires_grad_(False)
        self.rows = {name: torch.tensor(value, dtype=torch.float32, device=device) for name, value in rows.items()}
        self.optimizer = torch.optim.Adam(self.student.parameters(), lr=1e-4, fused=True)
        networks = (self.student, self.teacher, self.self_teacher)
        self._calls = [torch.compile(net) for net in networks] if compiled else list(networks)
        self._cast = lambda: torch.autocast(device, dtype, enabled=dtype is not None)
        self.device = device

    def __call__(self, x: Tensor) -> Tensor:
        """One update on images [batch, channels, height, width]; returns the loss."""
        count = len(self.rows["r"])
        index = torch.randint(count, (len(x),), device=self.device)
        at = {name: value[index][:, None, None, None] for name, value in self.rows.items()}
        time_t, time_m = self.rows["time_t"][index], self.rows["time_m"][index]
        student, teacher, self_teacher = self._calls
        z = at["alpha_t"] * x + at["sigma_t"] * torch.randn_like(x)
        with torch.no_grad(), self._cast():
            first = (at["alpha_t"] * z - at["sigma_t"] * teacher(z, time_t).float()).clamp(-1, 1)
            z_m = at["r"] * z + at["d"] * first
            second = (at["alpha_m"] * z_m - at["sigma_m"] * self_teacher(z_m, time_m).float()).clamp(-1, 1)
            target = at["first"] * first + at["second"] * second
        with self._cast():
            v = student(z, time_t).float()
        error = at["alpha_t"] * z - at["sigma_t"] * v - target
        weight = (at["alpha_t"] / at["sigma_t"]).square().clamp(min=1)
        loss = (weight * error.square()).sum(dim=(1, 2, 3)).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for average, weight_of in ((self.self_teacher, 0.5), (self.average, 1e-3)):
                torch._foreach_lerp_(list(average.parameters()), list(self.student.parameters()), weight_of)
        return loss.detach()
