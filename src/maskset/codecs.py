"""Mask codes on real masks: learn one from a data set, and compare what is lost by each before any network is trained."""

import io
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from maskset.checkpoint import write_tensors
from maskset.data import open_data
from maskset.data.dataset import Dataset
from maskset.errors import ConfigError
from maskset.evaluation.average_precision import measured
from maskset.evaluation.overlaps import Overlaps, overlaps
from maskset.files import atomic_write, check_new
from maskset.instances import Instances, Masks
from maskset.masks.codecs import MaskCodec
from maskset.masks.codecs import files as codec_files
from maskset.masks.codecs.autoencoder import AutoencoderCodec
from maskset.masks.codecs.dct import DctCodec
from maskset.masks.codecs.files import LearntCodec
from maskset.masks.codecs.flatten import FlattenCodec
from maskset.masks.codecs.logit_pca import LogitPcaCodec
from maskset.masks.codecs.pca import PcaCodec
from maskset.masks.codecs.sparse import SparseCodec
from maskset.masks.paint import binarise, paste, paste_soft
from maskset.masks.targets import crop
from maskset.progress import track

FOOTNOTE = """\
Upper bounds: each annotated mask is cropped to its annotated box, coded, decoded and pasted back; the results have score 1,
and none is cut off. PCA, logit-pca and sparse codes were learnt from {learnt_from}. Networks trained with these codes rank
otherwise (SOLQ, Table 3a: DCT, PCA, flatten, sparse; ISTR, Table 1a, logit-pca: 60 numbers, 80, 40), since a short code is
easier to predict. Took {seconds:.0f} s."""
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, math.inf)}  # areas of COCO's evaluation, pixels


@dataclass(frozen=True)
class Code:
    """A mask code by name.

    Attributes:
        kind: see `maskset.masks`.
        size: side S of the box-local mask, pixels.
        length: D, how many numbers describe one mask.
    """

    kind: Literal["dct", "pca", "sparse", "flatten", "logit-pca", "autoencoder"]
    size: int
    length: int

    def __str__(self) -> str:
        return f"{self.kind} {self.size} x {self.size}"


# Table 3a of SOLQ: it gives the sizes of DCT and flatten, and 256 numbers; PCA with 60 at 28 x 28 is in the official code.
# Table 1a of ISTR.
PAPER_CODES = (
    Code("dct", 128, 256),
    Code("flatten", 28, 784),
    Code("pca", 28, 256),
    Code("pca", 28, 60),
    Code("sparse", 28, 256),
    Code("logit-pca", 28, 40),
    Code("logit-pca", 28, 60),
    Code("logit-pca", 28, 80),
)
_LEARNT: dict[str, tuple[Callable[..., LearntCodec], int, int]] = {  # with size and length if nothing is said
    "pca": (PcaCodec, 28, 60),
    "sparse": (SparseCodec, 28, 256),
    "logit-pca": (LogitPcaCodec, 28, 60),
    "autoencoder": (AutoencoderCodec, 112, 256),
}


@dataclass(frozen=True, kw_only=True)
class CodeScore:
    """What a code leaves of the masks of a data set; NaN where there is no object of the size.

    Attributes:
        data: the data set.
        code: the code.
        objects: how many were measured.
        iou: mean IoU of a mask and its reconstruction; `iou_small` and so on by COCO's sizes of the annotated area.
        mask_ap: COCO's mask AP of the reconstructions as results of score 1; `mask_ap_small` and so on by size.
    """

    data: str
    code: Code
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
class Comparison:
    """What mask codes leave of the masks of data sets; `print` shows a table.

    Attributes:
        scores: one element for each data set and code.
        split: the part of the data that was measured; `learnt_from` the part that PCA and sparse codes were learnt from.
        left_out: a line for each code that could not be learnt from a data set, which says why.
        seconds: how long it took.
    """

    scores: tuple[CodeScore, ...]
    split: str
    learnt_from: str
    left_out: tuple[str, ...] = ()
    seconds: float

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"What mask codes leave of the annotated masks ({self.split})")
        for name in ("data", "objects", "code", "numbers"):
            table.add_column(name, justify="right" if name in ("objects", "numbers") else "left")
        for name in ("IoU", "small", "medium", "large", "mask AP", "small", "medium", "large"):
            table.add_column(name, justify="right")
        for i, score in enumerate(self.scores):
            first = i == 0 or self.scores[i - 1].data != score.data
            names = [score.data, f"{score.objects:,}"] if first else ["", ""]
            last = i + 1 == len(self.scores) or self.scores[i + 1].data != score.data
            numbers = [f"{value:.3f}".replace("nan", "-") for value in list(asdict(score).values())[3:]]
            table.add_row(*names, str(score.code), str(score.code.length), *numbers, end_section=last)
        console = Console(file=io.StringIO(), width=124)
        console.print(table)
        assert isinstance(console.file, io.StringIO)
        notes = "".join(f"Left out: {line}\n" for line in self.left_out)
        return console.file.getvalue() + notes + FOOTNOTE.format(learnt_from=self.learnt_from, seconds=self.seconds)

    def save(self, path: str | Path) -> Path:
        """Write everything as JSON, with null for what could not be measured, and return the path."""
        rows = [
            {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in asdict(score).items()}
            for score in self.scores
        ]
        with atomic_write(Path(path)) as part:
            part.write_text(json.dumps({**asdict(self), "scores": rows}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return Path(path)


def fit(
    kind: str,
    data: str | Path,
    out: str | Path,
    *,
    size: int | None = None,
    length: int | None = None,
    beta: float | None = None,
    steps: int | None = None,
    split: str = "train",
    most_masks: int = codec_files.MOST_MASKS,
    skip_broken: bool = False,
    progress: bool = True,
) -> LearntCodec:
    """Return a code learnt from the masks of a data set, and write it as a file that `maskset.masks.codecs.files.load` reads.

    Args:
        kind: pca, sparse, logit-pca or autoencoder.
        data: what `maskset.data.open_data` takes.
        out: the .safetensors file.
        size: side S of the box-local mask, pixels; None: 28, for an autoencoder 112.
        length: D, how many numbers describe one mask; None: 60, for sparse and autoencoder 256.
        beta: sparse: see `SparseCodec`.
        steps: autoencoder: how many batches of 64 masks it learns from; None: 3000, which takes hours on a CPU.
        split: which part of the data.
        most_masks: how many masks count; where the data has more, images are taken at random.
        skip_broken: leave out what `open_data` finds broken.
        progress: whether to show how far it is on stderr.

    Raises:
        ConfigError: `kind` cannot be learnt, the data has too few masks, or `out` is there already or cannot be written.
        maskset.errors.DataError: the data cannot be read.
    """
    if kind not in _LEARNT:
        raise ConfigError(f"a code of kind {kind!r} has nothing to learn; {', '.join(_LEARNT)} do.")
    if beta is not None and kind != "sparse":
        raise ConfigError("only a sparse code has a beta.")
    if steps is not None and kind != "autoencoder":
        raise ConfigError("only an autoencoder has steps.")
    if steps is not None and steps < 1:
        raise ConfigError(f"an autoencoder needs at least 1 step, got {steps}.")
    if most_masks < 1:
        raise ConfigError(f"most_masks must be at least 1, got {most_masks}.")
    make, usual_size, usual_length = _LEARNT[kind]
    numbers = (usual_size if size is None else size, usual_length if length is None else length)
    codec = make(*numbers, *([] if beta is None else [beta]))
    out = Path(out)
    check_new(out, ".safetensors")
    masks = _crops(open_data(data, split, skip_broken=skip_broken), codec.size, most_masks, f"reading {data} {split}", progress)
    if isinstance(codec, AutoencoderCodec):
        codec.eval().fit(masks, most_masks, steps, progress=progress)
    else:
        codec.fit(masks, most_masks)
    source = f"{Path(data).absolute().name} {split}"
    metadata = {
        "format": codec_files.FORMAT,
        "kind": kind,
        "size": str(codec.size),
        "length": str(codec.length),
        "source": source,
    }
    if isinstance(codec, SparseCodec):
        metadata["beta"] = f"{float(codec.beta):.6g}"
    write_tensors(codec.state_dict(), out, metadata)
    return codec


def compare(
    data: Sequence[str | Path],
    *,
    codes: Sequence[Code] = PAPER_CODES,
    split: str = "val",
    learn_from: str = "train",
    most_masks: int = codec_files.MOST_MASKS,
    skip_broken: bool = False,
    progress: bool = True,
) -> Comparison:
    """Return how well codes reconstruct the annotated masks of data sets: an upper bound of what a network can reach with them.

    Masks go the way that they go in SOLQ: cropped to the annotated box (as a target), coded, decoded, set where they exceed
    the middle of their range, pasted into the box (as a result). Those of logit-pca go the way of ISTR: pasted as
    probabilities, set where these reach 0.5.

    Args:
        data: each one something that `maskset.data.open_data` takes. A single JSON file has no parts: PCA and sparse codes
            are then learnt from the masks that they are measured on.
        codes: which codes. One that has more numbers than there are masks to learn it from is left out, with a note.
        split: the part of the data that is measured.
        learn_from: the part that PCA and sparse codes are learnt from, for each data set anew.
        most_masks: how many masks they are learnt from; where the data has more, images are taken at random.
        skip_broken: leave out what `open_data` finds broken.
        progress: whether to show how far it is on stderr.

    Raises:
        ConfigError: a size or length is not one that the code can have.
        maskset.errors.DataError: the data cannot be read.
    """
    start, scores, left_out = time.monotonic(), [], []
    for one in data:
        measured = open_data(one, split, skip_broken=skip_broken)  # a mistake in the path is told at once
        codecs = {code: _codec(code) for code in codes}
        for size in sorted({codec.size for codec in codecs.values() if isinstance(codec, LearntCodec)}):
            source = open_data(one, learn_from, skip_broken=skip_broken)
            masks = torch.cat(list(_crops(source, size, most_masks, f"reading {one} {learn_from}", progress)))
            for code, codec in list(codecs.items()):
                if isinstance(codec, LearntCodec) and codec.size == size:
                    try:
                        codec.fit(masks, most_masks)
                    except ConfigError as error:  # too few masks
                        left_out.append(f"{code} on {Path(one).name}: {error}")
                        del codecs[code]
        scores += _scores(Path(one).name, measured, list(codecs), list(codecs.values()), progress)
    seconds = time.monotonic() - start
    return Comparison(scores=tuple(scores), split=split, learnt_from=learn_from, left_out=tuple(left_out), seconds=seconds)


def _codec(code: Code) -> MaskCodec:
    if code.kind == "flatten":
        return FlattenCodec(code.size)
    if code.kind == "autoencoder":
        return AutoencoderCodec(code.size, code.length).eval()  # its batch norms would learn from what is measured
    return DctCodec(code.size, code.length) if code.kind == "dct" else _LEARNT[code.kind][0](code.size, code.length)


def _crops(data: Dataset, size: int, most: int, what: str, progress: bool) -> Iterator[Bool[Tensor, "T S S"]]:
    """Yield masks inside their annotated boxes, of images in a random order that is always the same, until there are enough."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    found = 0
    for index in track(order, len(order), what) if progress else order:
        objects = data.objects(index)
        yield crop(objects.masks, objects.boxes, size)
        found += len(objects)
        if found >= most:
            return


@torch.no_grad()
def _scores(name: str, data: Dataset, codes: Sequence[Code], codecs: Sequence[MaskCodec], progress: bool) -> Iterator[CodeScore]:
    """Yield the score of each code on all objects of a data set."""
    ious: list[list[Tensor]] = [[] for _ in codes]
    compared: list[list[Overlaps]] = [[] for _ in codes]
    areas = torch.cat([data.areas(index) for index in range(len(data))])
    for index in track(range(len(data)), len(data), f"coding {name}") if progress else range(len(data)):
        objects = data.objects(index)
        truth = Masks(objects.masks.rle(), objects.masks.size)  # polygons are drawn once, not for every code
        for i, codec in enumerate(codecs):
            masks = reconstructed(codec, truth, objects.boxes)
            ious[i].append(_overlaps(truth, masks))
            found = Instances(objects.labels, objects.boxes, masks, torch.ones(len(objects)), data.categories)
            compared[i].append(overlaps(data, index, found))
    most = max(1, int(data.counts().max()))
    for code, parts, images in zip(codes, ious, compared, strict=True):
        iou, metrics = torch.cat(parts), measured(images, data.categories, most)
        yield CodeScore(
            data=name,
            code=code,
            objects=len(iou),
            iou=_mean(iou),
            **{f"iou_{size}": _mean(iou[(areas >= least) & (areas < end)]) for size, (least, end) in SIZES.items()},
            mask_ap=metrics.mask_ap,
            mask_ap_small=metrics.mask_ap_small,
            mask_ap_medium=metrics.mask_ap_medium,
            mask_ap_large=metrics.mask_ap_large,
        )


def reconstructed(codec: MaskCodec, masks: Masks, boxes: Float[Tensor, "T 4"]) -> Masks:
    """Return what is left of the masks of an image after they were coded and decoded inside their boxes."""
    fields = codec.decode(codec.encode(crop(masks, boxes, codec.size).float()))
    if isinstance(codec, (LogitPcaCodec, AutoencoderCodec)):  # ISTR pastes probabilities, SOLQ what is cut already
        return paste_soft(fields, boxes, masks.size, 0.5 if isinstance(codec, LogitPcaCodec) else 0.45)
    return paste(binarise(fields), boxes, masks.size)


def _overlaps(masks: Masks, others: Masks) -> Float[Tensor, "T"]:
    """Return the IoU of each mask with the other of the same position; NaN if neither has a pixel."""
    ious = [torch.zeros(0)]
    for one, other in zip(masks, others, strict=True):  # one at a time: hundreds of large images would not fit
        a, b = one.dense(), other.dense()
        ious.append((a & b).sum()[None] / (a | b).sum())
    return torch.cat(ious)


def _mean(values: Float[Tensor, "n"]) -> float:
    return float(values.nanmean())
