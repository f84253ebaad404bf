"""Drawing of masks, boxes, names and scores in colors that color-blind people can distinguish."""

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_dilation, binary_erosion
from torch import Tensor

from maskset import pictures, rle
from maskset.errors import MasksetError
from maskset.instances.masks import Masks
from maskset.pictures import Picture

Color = tuple[int, int, int]
Box = tuple[int, int, int, int]  # x0 y0 x1 y1, pixels of the drawing, inclusive

# Okabe and Ito's colors (Color Universal Design, 2008) without black; colors that are easy to confuse are far apart in the list.
PALETTE: tuple[Color, ...] = (
    (230, 159, 0),  # orange
    (86, 180, 233),  # sky blue
    (204, 121, 167),  # reddish purple
    (240, 228, 66),  # yellow
    (0, 158, 115),  # bluish green
    (213, 94, 0),  # vermillion
    (0, 114, 178),  # blue
)
_FILL = 0.4  # opacity of an object's color in its mask
_TARGET_SIDE = 800  # longer side, pixels: smaller images are enlarged to about this size


def draw_objects(
    image: Picture,
    masks: Masks,
    boxes: Float[Tensor, "T 4"],
    labels: Int[Tensor, "T"],
    captions: list[str],
    num_classes: int,
    scale: int | None = None,
) -> Image.Image:
    """Return the image with masks, boxes and captions drawn on it.

    With two to seven classes, each class has a color and neighboring objects of a class have shades of it. Otherwise
    neighboring objects differ in color. Small objects are drawn over large ones. Captions without room and boxes of very
    small objects are omitted.

    Args:
        image: see `maskset.pictures.read`.
        masks: at the size of the image.
        boxes: x0 y0 x1 y1, pixels of the image.
        labels: class of each object.
        captions: text for each object; may be empty.
        num_classes: number of classes.
        scale: integer factor by which to enlarge the image; None enlarges small images, so that captions do not hide them.

    Raises:
        MasksetError: the image differs in size from the masks.
    """
    picture = Image.fromarray(pictures.read(image).permute(1, 2, 0).numpy())
    height, width = masks.size
    if picture.size != (width, height):
        raise MasksetError(
            f"the image has {picture.width} x {picture.height} pixels, but the masks have {width} x {height}: "
            "give the image that the objects belong to."
        )
    scale = scale or max(1, _TARGET_SIDE // max(picture.size))
    picture = picture.resize((width * scale, height * scale), Image.Resampling.BICUBIC)
    runs, colors = masks.to("cpu").rle(), _colors(labels.cpu(), boxes.cpu(), num_classes)
    corners = [_pixel_box(box, picture.size) for box in (boxes.cpu() * scale).tolist()]
    order = sorted(range(len(runs)), key=lambda i: -rle.area(runs[i]))

    pixels = np.array(picture)
    for i in order:
        x0, y0, x1, y1 = corners[i]
        line = min(round(max(picture.size) / 300), min(x1 - x0, y1 - y0) // 16)  # thin on small objects
        _paint(pixels, runs[i], scale, colors[i], max(1, line))
    picture = Image.fromarray(pixels)
    pen = ImageDraw.Draw(picture, "RGBA")
    for i in order:
        x0, y0, x1, y1 = corners[i]
        if max(x1 - x0, y1 - y0) > max(picture.size) / 16:
            pen.rectangle(corners[i], outline=(*colors[i], 160))
    _write(picture, [(captions[i], corners[i], colors[i]) for i in order if captions[i]])
    return picture


def _pixel_box(box: list[float], size: tuple[int, int]) -> Box:
    """Return the first and last pixels that a box covers in a picture of `size` (width, height)."""
    x0, x1 = (min(max(round(value), 0), size[0]) for value in box[0::2])
    y0, y1 = (min(max(round(value), 0), size[1]) for value in box[1::2])
    return min(x0, size[0] - 1), min(y0, size[1] - 1), max(x0, x1 - 1), max(y0, y1 - 1)


def _colors(labels: Int[Tensor, "T"], boxes: Float[Tensor, "T 4"], num_classes: int) -> list[Color]:
    """Return a color for each object, different from those of its neighbors where possible."""
    low, high = boxes[:, :2] - 2, boxes[:, 2:] + 2
    neighbors = ((low[:, None] < high[None]) & (low[None] < high[:, None])).all(-1).tolist()
    by_class = 1 < num_classes <= len(PALETTE)
    colors: list[Color] = []
    for i, label in enumerate(labels.tolist()):
        candidates = _shades(PALETTE[label]) if by_class else PALETTE
        near = [color for color, is_near in zip(colors, neighbors[i], strict=False) if is_near]
        used = [] if by_class else colors  # spreads the colors evenly
        colors.append(min(candidates, key=lambda color: (near.count(color), used.count(color))))
    return colors


def _shades(color: Color) -> tuple[Color, Color, Color]:
    """Return the color, a lighter shade and a darker shade."""
    red, green, blue = color
    lighter = (red + (255 - red) // 2, green + (255 - green) // 2, blue + (255 - blue) // 2)
    return color, lighter, (red * 2 // 3, green * 2 // 3, blue * 2 // 3)


def _paint(pixels: np.ndarray, counts: rle.Counts, scale: int, color: Color, line: int) -> None:
    """Draw one mask into pixels [h w 3]: a translucent fill, a solid line inside its edge, and a dark rim outside."""
    height, width = pixels.shape[0] // scale, pixels.shape[1] // scale
    x0, y0, x1, y1 = (int(value) for value in rle.box(counts, height))
    x0, y0, x1, y1 = max(x0 - 2, 0), max(y0 - 2, 0), min(x1 + 2, width), min(y1 + 2, height)
    mask = rle.decode([counts], (height, width), columns=torch.arange(x0, x1))[0, y0:y1].numpy()
    if scale > 1:  # with a smooth edge instead of stairs
        soft = Image.fromarray(mask.astype(np.uint8) * 255)
        mask = np.array(soft.resize(((x1 - x0) * scale, (y1 - y0) * scale), Image.Resampling.BICUBIC)) > 127
    window = pixels[y0 * scale : y1 * scale, x0 * scale : x1 * scale]
    inside = np.asarray(binary_erosion(mask, iterations=line, border_value=1), dtype=bool)
    rim = np.asarray(binary_dilation(mask), dtype=bool) & ~mask
    window[inside] = (window[inside] * (1 - _FILL) + np.array(color) * _FILL).astype(np.uint8)
    window[mask & ~inside] = color
    window[rim] //= 2


def _write(picture: Image.Image, labels: list[tuple[str, Box, Color]]) -> None:
    """Write each label on a background of its object's color, where there is room."""
    size = max(11, round(max(picture.size) / 54))
    font, margin = ImageFont.load_default(size), size // 5
    pen = ImageDraw.Draw(picture)
    sizes = [(round(font.getlength(text)) + 2 * margin, size + margin + 1) for text, _, _ in labels]
    plates = label_places(sizes, [box for _, box, _ in labels], picture.size)
    for (text, _, color), plate in zip(labels, plates, strict=True):
        if plate is not None:
            pen.rectangle(plate, fill=color)
            dark = np.dot(color, (0.299, 0.587, 0.114)) < 110
            middle = (plate[1] + plate[3] + 1) / 2
            pen.text((plate[0] + margin, middle), text, "white" if dark else "black", font, anchor="lm")


def label_places(sizes: list[tuple[int, int]], boxes: list[Box], picture: tuple[int, int]) -> list[Box | None]:
    """Return a place for each label beside its box, inside the picture and without overlaps; None where there is no room.

    Args:
        sizes: width and height of each label, in order of importance.
        boxes: the box of each label's object.
        picture: width and height of the picture.
    """
    places: list[Box | None] = []
    for (width, height), (x0, y0, x1, y1) in zip(sizes, boxes, strict=True):
        left, right, above, below = x0, x1 + 1 - width, y0 - height, y1 + 1
        corners = [(left, above), (left, below), (left, y0), (right, above), (right, below), (right, below - height)]
        # The more objects there are, the larger an object must be to get a label: labels must not hide a crowded picture.
        if width > picture[0] or height > picture[1] or width * height * len(sizes) > 30 * (x1 + 1 - x0) * (y1 + 1 - y0):
            corners = []
        corners = [(min(max(x, 0), picture[0] - width), min(max(y, 0), picture[1] - height)) for x, y in corners]
        candidates = [(x, y, x + width - 1, y + height - 1) for x, y in corners]
        free = [place for place in candidates if not any(other and _overlap(place, other) for other in places)]
        places.append(free[0] if free else None)
    return places


def _overlap(a: Box, b: Box) -> bool:
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]
