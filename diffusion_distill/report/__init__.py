"""Reports: pictures of samples, curves of losses, tables of results."""

from diffusion_distill.report.curves import loss_plot
from diffusion_distill.report.pictures import image_grid, to_uint8
from diffusion_distill.report.tables import format_table, markdown_table

__all__ = ["format_table", "image_grid", "loss_plot", "markdown_table", "to_uint8"]
