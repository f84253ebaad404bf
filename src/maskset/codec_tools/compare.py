"""Compare how well mask codecs reconstruct the masks of a data set, before any network is trained (`maskset codecs compare`)."""

import io
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from maskset.codec_tools.fit import FITTABLE, sample_crops
from maskset.data import open_data
from maskset.data.dataset import Dataset
from maskset.errors import ConfigError
from maskset.evaluation.average_precision import compute_metrics
from maskset.evaluation.overlaps import Overlaps, overlaps
from maskset.files import atomic_write
from maskset.instances import Instances, Masks
from maskset.masks.codecs import MaskCodec
from maskset.masks.codecs.autoencoder import AutoencoderCodec
from maskset.masks.codecs.dct import DctCodec
from maskset.masks.codecs.fittable import MAX_MASKS, FittableCodec
from maskset.masks.codecs.flatten import FlattenCodec
from maskset.masks.codecs.logit_pca import LogitPcaCodec
from maskset.masks.paint import binarize, paste, paste_soft
from maskset.masks.targets import crop
from maskset.progress import track

FOOTNOTE = """\
Upper bounds: each annotated mask is cropped to its annotated box, encoded, decoded and pasted back, with score 1 and no limit on
detections. PCA, logit-pca and sparse codecs were fitted to {fit_split}. The ranking of trained networks differs, because a short
code is easier to predict (SOLQ, Table 3a: DCT, PCA, flatten, sparse; ISTR, Table 1a, logit-pca: 60 numbers, 80, 40).
Took {seconds:.0f} s."""
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, math.inf)}  # areas in COCO's evaluation, pixels


@dataclass(frozen=True)
class CodecSpec:
    """A mask codec by kind, size and length.

    Attributes:
        kind: see `maskset.masks.codecs`.
        size: side S of the box-local mask, pixels.
        length: D, how many numbers describe one mask.
    """

    kind: Literal["dct", "pca", "sparse", "flatten", "logit-pca", "autoencoder"]
    size: int
    length: int

    def __str__(self) -> str:
        return f"{self.kind} {self.size} x {self.size}"


# Table 3a of SOLQ (the paper states the sizes of DCT and flatten, and 256 numbers; PCA with 60 at 28 x 28 is that of the official
# code) and Table 1a of ISTR.
PAPER_CODECS = (
    CodecSpec("dct", 128, 256),
    CodecSpec("flatten", 28, 784),
    CodecSpec("pca", 28, 256),
    CodecSpec("pca", 28, 60),
    CodecSpec("sparse", 28, 256),
    CodecSpec("logit-pca", 28, 40),
    CodecSpec("logit-pca", 28, 60),
    CodecSpec("logit-pca", 28, 80),
)


@dataclass(frozen=True, kw_only=True)
class CodecScore:
    """How well a codec reconstructs the masks of a data set; NaN where there is no object of that size.

    Attributes:
        data: name of the data set.
        codec: the codec.
        objects: number of objects.
        iou: mean IoU of a mask and its reconstruction; `iou_small` and so on by COCO's sizes of the annotated area.
        mask_ap: COCO's mask AP of the reconstructions as detections of score 1; `mask_ap_small` and so on by size.
    """

    data: str
    codec: CodecSpec
    objects: int
    iou: float
    iou_small: float
    iou_medium: float
    iou_large: float
    mask_ap: float
    mask_ap_small: float
    mask_ap_medium: float
    mask_ap_large: float


@dataclass(frozen=True, kw_only=True)
class CodecComparison:
    """How well mask codecs reconstruct the masks of data sets; `print` shows a table.

    Attributes:
        scores: one element for each data set and codec.
        split: the part of the data that was measured.
        fit_split: the part of the data that codecs were fitted to.
        skipped: a line for each codec that could not be fitted to a data set, with the reason.
        seconds: duration.
    """

    scores: tuple[CodecScore, ...]
    split: str
    fit_split: str
    skipped: tuple[str, ...] = ()
    seconds: float

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"Reconstruction of the annotated masks ({self.split})")
        for name in ("data", "objects", "codec", "numbers"):
            table.add_column(name, justify="right" if name in ("objects", "numbers") else "left")
        for name in ("IoU", "small", "medium", "large", "mask AP", "small", "medium", "large"):
            table.add_column(name, justify="right")
        for i, score in enumerate(self.scores):
            first = i == 0 or self.scores[i - 1].data != score.data
            names = [score.data, f"{score.objects:,}"] if first else ["", ""]
            last = i + 1 == len(self.scores) or self.scores[i + 1].data != score.data
            numbers = [f"{value:.3f}".replace("nan", "-") for value in list(asdict(score).values())[3:]]
            table.add_row(*names, str(score.codec), str(score.codec.length), *numbers, end_section=last)
        console = Console(file=io.StringIO(), width=124)
        console.print(table)
        assert isinstance(console.file, io.StringIO)
        notes = "".join(f"Skipped: {line}\n" for line in self.skipped)
        return console.file.getvalue() + notes + FOOTNOTE.format(fit_split=self.fit_split, seconds=self.seconds)

    def save(self, path: str | Path) -> Path:
        """Write the comparison as JSON, with null instead of NaN, and return the path."""
        rows = [
            {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in asdict(score).items()}
            for score in self.scores
        ]
        with atomic_write(Path(path)) as part:
            part.write_text(json.dumps({**asdict(self), "scores": rows}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return Path(path)


def compare_codecs(
    data: str | Path | Sequence[str | Path],
    *,
    codecs: Sequence[CodecSpec] = PAPER_CODECS,
    split: str = "val",
    fit_split: str = "train",
    max_masks: int = MAX_MASKS,
    skip_broken: bool = False,
    progress: bool = True,
) -> CodecComparison:
    """Return how well codecs reconstruct the annotated masks of data sets: an upper bound for any network that uses them.

    Masks are processed as in SOLQ: cropped to the annotated box (as a target), encoded, decoded, thresholded at the middle of
    their range, and pasted into the box (as a prediction). Those of logit-pca and the autoencoder are processed as in ISTR:
    pasted as probabilities, then thresholded.

    Args:
        data: one data set or several, each as `maskset.data.open_data` takes it. A single JSON file has no splits: codecs are
            then fitted to the masks that they are measured on.
        codecs: which codecs. One with more numbers than there are masks to fit it to is skipped, with a note.
        split: the part of the data to measure on.
        fit_split: the part that codecs are fitted to, for each data set separately.
        max_masks: number of masks to fit to; if the data has more, images are drawn at random, always the same ones.
        skip_broken: skip images and annotations that `open_data` would refuse.
        progress: whether to show progress bars on stderr.

    Raises:
        ConfigError: a size or length is not allowed for the codec.
        maskset.errors.DataError: the data cannot be read.
    """
    start, scores, skipped = time.monotonic(), [], []
    for path in [data] if isinstance(data, (str, Path)) else data:
        name = Path(path).name
        dataset = open_data(path, split, skip_broken=skip_broken)  # first, so that a wrong path fails immediately
        built = {spec: _build(spec) for spec in codecs}
        for size in sorted({codec.size for codec in built.values() if isinstance(codec, FittableCodec)}):
            source = open_data(path, fit_split, skip_broken=skip_broken)
            masks = torch.cat(list(sample_crops(source, size, max_masks, f"reading {path} {fit_split}", progress)))
            for spec, codec in list(built.items()):
                if isinstance(codec, FittableCodec) and codec.size == size:
                    try:
                        codec.fit(masks, max_masks)
                    except ConfigError as error:  # too few masks
                        skipped.append(f"{spec} on {name}: {error}")
                        del built[spec]
        scores += _scores(name, dataset, built, progress)
    seconds = time.monotonic() - start
    return CodecComparison(scores=tuple(scores), split=split, fit_split=fit_split, skipped=tuple(skipped), seconds=seconds)


def _build(spec: CodecSpec) -> MaskCodec:
    if spec.kind == "flatten":
        return FlattenCodec(spec.size)
    if spec.kind == "dct":
        return DctCodec(spec.size, spec.length)
    return FITTABLE[spec.kind](spec.size, spec.length).eval()  # batch norm must not adapt to the masks that are measured


@torch.no_grad()
def _scores(name: str, data: Dataset, codecs: Mapping[CodecSpec, MaskCodec], progress: bool) -> Iterator[CodecScore]:
    """Yield the score of each codec on all objects of a data set."""
    ious: dict[CodecSpec, list[Tensor]] = {spec: [] for spec in codecs}
    compared: dict[CodecSpec, list[Overlaps]] = {spec: [] for spec in codecs}
    areas = torch.cat([data.areas(index) for index in range(len(data))])
    for index in track(range(len(data)), len(data), f"reconstructing {name}") if progress else range(len(data)):
        targets = data.targets(index)
        masks = Masks(targets.masks.rle(), targets.masks.size)  # polygons are rasterized once, not for every codec
        for spec, codec in codecs.items():
            reconstructions = reconstruct(codec, masks, targets.boxes)
            ious[spec].append(_mask_iou(masks, reconstructions))
            scores = torch.ones(len(targets))
            detections = Instances(targets.labels, targets.boxes, reconstructions, scores, data.categories)
            compared[spec].append(overlaps(data, index, detections))
    max_detections = max(1, int(data.counts().max()))
    for spec in codecs:
        iou, metrics = torch.cat(ious[spec]), compute_metrics(compared[spec], data.categories, max_detections)
        yield CodecScore(
            data=name,
            codec=spec,
            objects=len(iou),
            iou=_mean(iou),
            **{f"iou_{size}": _mean(iou[(areas >= low) & (areas < high)]) for size, (low, high) in SIZES.items()},
            mask_ap=metrics.mask_ap,
            mask_ap_small=metrics.mask_ap_small,
            mask_ap_medium=metrics.mask_ap_medium,
            mask_ap_large=metrics.mask_ap_large,
        )


def reconstruct(codec: MaskCodec, masks: Masks, boxes: Float[Tensor, "T 4"]) -> Masks:
    """Return the masks of an image after encoding and decoding inside their boxes (x0 y0 x1 y1, pixels)."""
    fields = codec.decode(codec.encode(crop(masks, boxes, codec.size).float()))
    if isinstance(codec, (LogitPcaCodec, AutoencoderCodec)):  # ISTR pastes probabilities, SOLQ binary masks
        return paste_soft(fields, boxes, masks.size, 0.5 if isinstance(codec, LogitPcaCodec) else 0.45)
    return paste(binarize(fields), boxes, masks.size)


def _mask_iou(a: Masks, b: Masks) -> Float[Tensor, "T"]:
    """Return the IoU of masks at the same position of two lists; NaN if both are empty."""
    ious = [torch.zeros(0)]
    for mask_a, mask_b in zip(a, b, strict=True):  # one pair at a time: hundreds of large dense masks would not fit in memory
        pixels_a, pixels_b = mask_a.dense(), mask_b.dense()
        ious.append((pixels_a & pixels_b).sum()[None] / (pixels_a | pixels_b).sum())
    return torch.cat(ious)


def _mean(values: Float[Tensor, "n"]) -> float:
    return float(values.nanmean())
