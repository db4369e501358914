"""The networks of the benchmarks, by name: settings of a U-Net, shape of an image, batch size."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from diffusion_distill import Model, UNet
from diffusion_distill.weights import PUBLISHED

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
#: The settings that the networks differ in; PyTorch's has the same (`_torch_peer.UNet`).
SETTINGS = (
    "ch",
    "emb_ch",
    "out_ch",
    "ch_mult",
    "num_res_blocks",
    "attn_resolutions",
    "num_heads",
    "resblock_resample",
)

Net = tuple[dict[str, Any], tuple[int, int, int], int]


def _demo() -> Net:
    """That of the demo."""
    config: Any = runpy.run_path(str(CONFIGS / "digits_teacher.py"))["get_config"]()
    return _of(Model.from_dict(config.model.to_dict()), config.run.batch_size)


def _cifar(ch: int) -> Net:
    """BTD's and TRACT's of CIFAR-10, narrower than the published one."""
    return _of(PUBLISHED["cifar_original"].model.with_network(ch=ch, emb_ch=4 * ch), 8)


def _of(model: Model, batch: int) -> Net:
    height, width, channels = model.shape
    return {name: getattr(model.network, name) for name in SETTINGS}, (height, width, channels), batch


NETS: dict[str, Net] = {"demo": _demo(), "cifar64": _cifar(64), "cifar128": _cifar(128)}


def model_of(name: str) -> Model:
    """The network called `name` as a model that predicts v."""
    settings, image, _ = NETS[name]
    return Model(UNet(**settings), image, prediction="v")
