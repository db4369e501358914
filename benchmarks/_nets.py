"""The networks of the benchmarks, by name: settings of a U-Net, shape of an image, batch size."""

from __future__ import annotations

from typing import Any


def _cifar(ch: int) -> dict[str, Any]:
    """A U-Net for 32x32 images, narrower than the published one."""
    return dict(
        ch=ch,
        emb_ch=4 * ch,
        out_ch=3,
        ch_mult=(1, 1, 1),
        num_res_blocks=3,
        attn_resolutions=(8, 16),
        num_heads=1,
        resblock_resample=True,
    )


NETS: dict[str, tuple[dict[str, Any], tuple[int, int, int], int]] = {
    "demo": (
        dict(
            ch=32,
            emb_ch=64,
            out_ch=1,
            ch_mult=(1, 1),
            num_res_blocks=1,
            attn_resolutions=(),
            num_heads=1,
            resblock_resample=True,
        ),
        (8, 8, 1),
        64,
    ),
    "cifar64": (_cifar(64), (32, 32, 3), 8),
    "cifar128": (_cifar(128), (32, 32, 3), 8),
}
