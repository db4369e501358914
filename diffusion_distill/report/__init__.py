"""Reports: pictures of samples, curves of losses, lines and heat maps of numbers, tables of results, and pages of
all of them."""

from diffusion_distill.report.curves import loss_plot
from diffusion_distill.report.heatmaps import heat_maps
from diffusion_distill.report.lines import Line, Panel, line_plot
from diffusion_distill.report.page import (
    Beside,
    Chart,
    Commands,
    Folded,
    Heading,
    Picture,
    Table,
    Text,
    write_page,
)
from diffusion_distill.report.pictures import image_grid, to_uint8
from diffusion_distill.report.tables import format_table

__all__ = [
    "Beside",
    "Chart",
    "Commands",
    "Folded",
    "Heading",
    "Line",
    "Panel",
    "Picture",
    "Table",
    "Text",
    "format_table",
    "heat_maps",
    "image_grid",
    "line_plot",
    "loss_plot",
    "to_uint8",
    "write_page",
]
