"""`Instances`: the annotated or predicted objects of one image."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt16
from PIL import Image
from torch import Tensor

from maskset import rle
from maskset.errors import MasksetError
from maskset.files import write_json, write_picture
from maskset.instances.drawing import draw_objects
from maskset.instances.masks import Masks, positions
from maskset.pictures import Picture
from maskset.rle import Index
from maskset.tensors import TensorRecord, register


@dataclass(frozen=True)
class Category:
    """A class: its name, and its id in COCO files of the data."""

    name: str
    coco_id: int


@dataclass(frozen=True, eq=False)
class Instances(TensorRecord):
    """The annotated or predicted objects of one image.

    Attributes:
        labels: class of each object, an index into `categories`.
        boxes: x0 y0 x1 y1 in pixels, x1 and y1 exclusive. Predicted boxes lie inside the image.
        masks: at the size of the image.
        scores: confidence in [0, 1], or None for annotations.
        categories: names and COCO ids of the classes.
    """

    labels: Int[Tensor, "T"]
    boxes: Float[Tensor, "T 4"]
    masks: Masks
    scores: Float[Tensor, "T"] | None = None
    categories: tuple[Category, ...] = ()

    def __post_init__(self) -> None:
        lengths = {"labels": len(self.labels), "boxes": len(self.boxes), "masks": len(self.masks)}
        if self.scores is not None:
            lengths["scores"] = len(self.scores)
        if len(set(lengths.values())) > 1:
            raise MasksetError(f"the fields of Instances must have equal lengths, got {lengths}.")

    @classmethod
    def empty(cls, size: tuple[int, int], categories: tuple[Category, ...] = ()) -> "Instances":
        """Return an empty list of objects for an image of `size` (height, width)."""
        return cls(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), Masks([], size), None, categories)

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator["Instances"]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int | Index | Sequence[int]) -> "Instances":
        """Return the selected objects: `detections[detections.scores > 0.5]`, `detections[:10]`, `detections[0]` (one object).

        Raises:
            IndexError: see `positions`.
        """
        selected = torch.tensor(positions(index, len(self)), dtype=torch.int64, device=self.labels.device)
        scores = None if self.scores is None else self.scores[selected]
        return replace(
            self, labels=self.labels[selected], boxes=self.boxes[selected], masks=self.masks[selected.tolist()], scores=scores
        )

    def __repr__(self) -> str:
        counts: dict[str, int] = {}
        for name in self.names:
            counts[name] = counts.get(name, 0) + 1
        listed = ", ".join(f"{count} {name}" for name, count in counts.items())
        return f"Instances({len(self)} in {self.masks.size[0]} x {self.masks.size[1]} pixels{': ' if listed else ''}{listed})"

    @property
    def names(self) -> list[str]:
        """The class name of each object."""
        return [self.categories[label].name if self.categories else f"class {label}" for label in self.labels.tolist()]

    def to_coco(self, image_id: int = 0) -> list[dict[str, Any]]:
        """Return COCO annotations (results, where there are scores) with boxes x y w h and masks as compressed run lengths."""
        size, runs = self.masks.size, self.masks.rle()
        areas, texts, rows = rle.areas(runs).tolist(), rle.to_strings(runs, size), []
        for i, (label, (x0, y0, x1, y1)) in enumerate(zip(self.labels.tolist(), self.boxes.tolist(), strict=True)):
            row: dict[str, Any] = {
                "image_id": image_id,
                "category_id": self.categories[label].coco_id if self.categories else label,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": areas[i],
                "iscrowd": 0,
                "segmentation": {"size": list(size), "counts": texts[i]},
            }
            if self.scores is not None:
                row["score"] = float(self.scores[i])
            rows.append(row)
        return rows

    def to_polygons(self) -> list[list[np.ndarray]]:
        """Return the outlines of each object, see `Masks.polygons`."""
        return self.masks.polygons()

    def to_supervision(self) -> Any:
        """Return `supervision.Detections`.

        Raises:
            ImportError: the package supervision (extra `viz`) is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise ImportError("to_supervision() needs the package supervision: pip install 'maskset[viz]'.") from error
        return supervision.Detections(
            xyxy=self.boxes.cpu().numpy().reshape(-1, 4),
            mask=self.masks.dense().cpu().numpy(),
            confidence=None if self.scores is None else self.scores.cpu().numpy(),
            class_id=self.labels.cpu().numpy(),
            data={"class_name": np.array(self.names, dtype=object).astype(str)},
        )

    def label_image(self) -> UInt16[np.ndarray, "h w"]:
        """Return the number, from 1, of the first object at each pixel; 0 for background.

        Raises:
            MasksetError: there are more than 65535 objects.
        """
        if len(self) > 65535:
            raise MasksetError(f"a label image has 16 bits for at most 65535 objects, got {len(self)}.")
        image = np.zeros(self.masks.size, dtype=np.uint16)
        for number in range(len(self), 0, -1):
            image[self.masks[number - 1].dense()[0].cpu().numpy()] = number
        return image

    def draw(self, image: Picture, scale: int | None = None) -> Image.Image:
        """Return the image with masks, boxes, names and scores drawn in colors that color-blind people can distinguish.

        Args:
            image: see `maskset.pictures.read`.
            scale: integer factor by which to enlarge the image; None enlarges small images, so that labels do not hide them.

        Raises:
            MasksetError: the image differs in size from the masks.
        """
        return draw_objects(image, self.masks, self.boxes, self.labels, self._captions(), len(self.categories), scale)

    def _captions(self) -> list[str]:
        """Return the text for each object: its name, unless there is only one class, and its score."""
        names = [""] * len(self) if len(self.categories) == 1 else self.names
        scores = [""] * len(self) if self.scores is None else [f"{score:.2f}" for score in self.scores.tolist()]
        return [f"{name} {score}".strip() for name, score in zip(names, scores, strict=True)]

    def save(self, path: str | Path, image: Picture | None = None) -> Path:
        """Write the objects to a file and return its path.

        Args:
            path: ends in `.json` for a COCO file with the classes, in `.png` for a label image (see `label_image`), and with
                `image` in `.png` or `.jpg` for a drawing.
            image: the image to draw on; in a COCO file its name.

        Raises:
            MasksetError: the ending is another one, or there are too many objects for a label image.
        """
        path = Path(path)
        ending = path.suffix.lower()
        if ending == ".json":
            name = Path(image).name if isinstance(image, (str, Path)) else ""
            write_json(coco_file([(name, self)], self.categories), path)
        elif image is not None and ending in (".png", ".jpg", ".jpeg"):
            write_picture(self.draw(image), path)
        elif ending == ".png":
            write_picture(Image.fromarray(self.label_image()), path)
        elif ending in (".jpg", ".jpeg"):
            raise MasksetError(f"a drawing needs the image: save({str(path)!r}, image).")
        else:
            raise MasksetError(f"cannot write objects to {path.name!r}: the ending must be .json, .png or .jpg.")
        return path


def coco_file(images: Iterable[tuple[str, Instances]], categories: tuple[Category, ...]) -> dict[str, Any]:
    """Return the content of a COCO file for named images with their objects. Image and annotation ids start at 1."""
    records, annotations = [], []
    for number, (name, instances) in enumerate(images, 1):
        height, width = instances.masks.size
        records.append({"id": number, "file_name": name, "height": height, "width": width})
        annotations += instances.to_coco(number)
    return {
        "images": records,
        "annotations": [{"id": number, **row} for number, row in enumerate(annotations, 1)],
        "categories": [{"id": category.coco_id, "name": category.name} for category in categories],
    }


register(Instances, ["labels", "boxes", "masks", "scores"])
