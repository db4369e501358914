"""Pictures: labelled rows of images in one PNG.

One row per sampler or student, drawn from the same noise, shows at a glance what numbers of small image sets
cannot. Small images are enlarged smoothly, as eyes read them; with a scale their pixels are repeated instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffusion_distill.base.files import user_path
from diffusion_distill.data.quantise import quantise

MARGIN = 16  # around the picture and between labels and images, in pixels of the PNG
ROW_GAP = 8
COLUMN_GAP = 4
FONT_SIZE = 15
TITLE_SIZE = 18
LEAST_CELL = 64  # images are enlarged to at least this height unless a scale is given
BACKGROUND = (255, 255, 255)
INK = (30, 30, 30)


def to_uint8(images: ArrayLike) -> NDArray[np.uint8]:
    """Converts images in [-1, 1] to 8 bits: 127.5 (x + 1), clipped to 0..255 and rounded, halves to even.

    Raises:
      TypeError: images that are neither floats nor uint8; uint8 is returned unchanged.
      ValueError: NaN in the images.
    """
    return quantise(np.asarray(images), "round_half_even")


def drawable(shape: Sequence[int], data_range: tuple[float, float] | None = (-1.0, 1.0)) -> bool:
    """Whether samples of a shape are pictures: (height, width, 1 or 3), with a range that says what is black."""
    return len(shape) == 3 and shape[-1] in (1, 3) and data_range is not None


def image_grid(
    rows: Mapping[str, ArrayLike],
    path: str | Path,
    columns: int = 16,
    scale: int | None = None,
    title: str = "",
) -> Path:
    """Writes a PNG with one row of images per entry and the entry's label at its left.

    Args:
      rows: label -> images [n, height, width, 1 or 3], floats in [-1, 1] or uint8, all of one height and
        width. A label may have several lines, or be empty.
      path: the PNG; its folder must exist.
      columns: the most images to show of each entry; the first ones are taken.
      scale: how often each pixel is repeated along both axes, for a picture whose pixels are the images'; None enlarges
        small images smoothly (bicubic).
      title: a line above the rows.

    Returns:
      The path.

    Raises:
      ValueError: no rows, an empty row, rows of different shapes, NaN, or sizes below 1.
      TypeError: images that are neither floats nor uint8.
      ImportError: Pillow or matplotlib (for its font) is not installed.
    """
    if columns < 1 or (scale is not None and scale < 1):
        raise ValueError(f"columns is {columns} and scale {scale}; both must be at least 1.")
    images = {str(label): _as_rgb(str(label), row)[:columns] for label, row in rows.items()}
    shapes = {label: row.shape[1:3] for label, row in images.items()}
    if not shapes:
        raise ValueError("There are no rows. Pass at least one entry {label: images}.")
    if len(set(shapes.values())) > 1:
        raise ValueError(f"Rows have different (height, width): {shapes}. Resize them, or write several pictures.")
    enlarged = {label: _repeated(row, scale) if scale else _smooth(row) for label, row in images.items()}
    strips = {label: _strip(row) for label, row in enlarged.items()}
    path = user_path(path)
    _write(strips, title, path)
    return path


def tile(images: ArrayLike, columns: int = 8) -> NDArray[np.uint8]:
    """Images [n, height, width, 1 or 3] in rows of `columns` as one picture, uint8 [height', width', 3]."""
    images = _as_rgb("", images)
    missing = -len(images) % columns
    images = np.pad(images, ((0, missing), (1, 1), (1, 1), (0, 0)), constant_values=BACKGROUND[0])
    _, height, width, _ = images.shape
    rows = images.reshape(-1, columns, height, width, 3).swapaxes(1, 2)
    return rows.reshape(-1, columns * width, 3)


def _as_rgb(label: str, images: ArrayLike) -> NDArray[np.uint8]:
    """uint8 [n, height, width, 3]."""
    images = to_uint8(images)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"Row {label!r} has shape {images.shape}; need [n, height, width, 1 or 3] with n >= 1.")
    return np.broadcast_to(images, (*images.shape[:3], 3))


def _repeated(images: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    """Images [n, height, width, 3] whose pixels are squares of `scale` pixels."""
    return images.repeat(scale, axis=1).repeat(scale, axis=2)


def _smooth(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images [n, height, width, 3], small ones enlarged by a whole factor to at least `LEAST_CELL`."""
    from PIL import Image

    height, width = images.shape[1:3]
    factor = -(-LEAST_CELL // height)
    size = width * factor, height * factor
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in images])


def _strip(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images [n, height, width, 3] side by side with a gap between them: [height, width', 3]."""
    gap = np.full((images.shape[1], COLUMN_GAP, 3), BACKGROUND, np.uint8)
    pieces = [piece for image in images for piece in (image, gap)]
    return np.concatenate(pieces[:-1], axis=1)


def _write(strips: Mapping[str, NDArray[np.uint8]], title: str, path: Path) -> None:
    """Writes the title, the labels and the strips [height, width, 3] on one canvas."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    # Pillow's own font lacks the arrow of "1024→32→1"; matplotlib brings one that has it.
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    font, title_font = ImageFont.truetype(file, FONT_SIZE), ImageFont.truetype(file, TITLE_SIZE)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = {label: ruler.multiline_textbbox((0, 0), label, font=font) for label in strips}
    title_box = ruler.multiline_textbbox((0, 0), title, font=title_font)

    label_width = int(max(box[2] for box in boxes.values()))
    left = MARGIN + (label_width + MARGIN if label_width else 0)
    top = MARGIN + (int(title_box[3]) + MARGIN if title else 0)
    heights = [max(len(strip), int(boxes[label][3] - boxes[label][1])) for label, strip in strips.items()]
    right = max(left + max(strip.shape[1] for strip in strips.values()), MARGIN + int(title_box[2]))
    size = (right + MARGIN, top + sum(heights) + ROW_GAP * (len(strips) - 1) + MARGIN)

    canvas = Image.new("RGB", size, BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    pen.multiline_text((MARGIN, MARGIN), title, INK, title_font)
    for (label, strip), height in zip(strips.items(), heights, strict=True):
        _, text_top, text_right, text_bottom = boxes[label]
        text_at = (MARGIN + label_width - text_right, top + (height - text_bottom - text_top) / 2)
        pen.multiline_text(text_at, label, INK, font, align="right")
        canvas.paste(Image.fromarray(strip), (left, top + (height - len(strip)) // 2))
        top += height + ROW_GAP
    grey = all((strip == strip[..., :1]).all() for strip in strips.values())
    (canvas.convert("L") if grey else canvas).save(path, format="PNG", optimize=True)
