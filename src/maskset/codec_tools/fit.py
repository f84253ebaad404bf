"""Fit a mask codec to the masks of a data set and write it to a file (`maskset codecs fit`)."""

from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor

from maskset.checkpoint import write_tensors
from maskset.data import open_data
from maskset.data.dataset import Dataset
from maskset.errors import ConfigError
from maskset.files import check_new
from maskset.masks.codecs import files as codec_files
from maskset.masks.codecs.autoencoder import AutoencoderCodec
from maskset.masks.codecs.fittable import MAX_MASKS, FittableCodec
from maskset.masks.codecs.logit_pca import LogitPcaCodec
from maskset.masks.codecs.pca import PcaCodec
from maskset.masks.codecs.sparse import SparseCodec
from maskset.masks.targets import crop
from maskset.progress import track

FITTABLE: dict[str, type[FittableCodec]] = {
    codec.kind: codec for codec in (PcaCodec, SparseCodec, LogitPcaCodec, AutoencoderCodec)
}


def fit_codec(
    kind: str,
    data: str | Path,
    out: str | Path,
    *,
    size: int | None = None,
    length: int | None = None,
    beta: float | None = None,
    steps: int | None = None,
    split: str = "train",
    max_masks: int = MAX_MASKS,
    skip_broken: bool = False,
    progress: bool = True,
) -> FittableCodec:
    """Return a codec fitted to the masks of a data set, and write it to a file for `maskset.masks.codecs.files.load`.

    Args:
        kind: pca, sparse, logit-pca or autoencoder.
        data: what `maskset.data.open_data` takes.
        out: the .safetensors file.
        size: side S of the box-local mask, pixels; None: 28, for an autoencoder 112.
        length: D, how many numbers describe one mask; None: 60, for sparse and autoencoder 256.
        beta: for sparse: see `SparseCodec`.
        steps: for the autoencoder: number of batches of 64 masks; None: 3000, which takes hours on a CPU.
        split: which part of the data.
        max_masks: number of masks to use; if the data has more, images are drawn at random, always the same ones.
        skip_broken: skip images and annotations that `open_data` would refuse.
        progress: whether to show a progress bar on stderr.

    Raises:
        ConfigError: `kind` cannot be fitted, the data has too few masks, or `out` exists or cannot be written.
        maskset.errors.DataError: the data cannot be read.
    """
    if kind not in FITTABLE:
        raise ConfigError(f"a codec of kind {kind!r} cannot be fitted, only {', '.join(FITTABLE)}.")
    if beta is not None and kind != "sparse":
        raise ConfigError("only a sparse codec has a beta.")
    if steps is not None and kind != "autoencoder":
        raise ConfigError("only an autoencoder has steps.")
    if steps is not None and steps < 1:
        raise ConfigError(f"an autoencoder needs at least 1 step, got {steps}.")
    if max_masks < 1:
        raise ConfigError(f"max_masks must be at least 1, got {max_masks}.")
    settings = {"size": size, "length": length, "beta": beta}
    codec = FITTABLE[kind](**{name: value for name, value in settings.items() if value is not None})
    out = Path(out)
    check_new(out, ".safetensors")
    dataset = open_data(data, split, skip_broken=skip_broken)
    masks = sample_crops(dataset, codec.size, max_masks, f"reading {data} {split}", progress)
    if isinstance(codec, AutoencoderCodec):
        codec.eval().fit(masks, max_masks, steps, progress=progress)
    else:
        codec.fit(masks, max_masks)
    metadata = {**codec_files.metadata(codec), "source": f"{Path(data).absolute().name} {split}"}
    if isinstance(codec, SparseCodec):
        metadata["beta"] = f"{float(codec.beta):.6g}"
    write_tensors(codec.state_dict(), out, metadata)
    return codec


def sample_crops(data: Dataset, size: int, max_masks: int, title: str, progress: bool) -> Iterator[Bool[Tensor, "T S S"]]:
    """Yield the masks of images in a fixed random order, cropped to their annotated boxes, until there are `max_masks`."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    count = 0
    for index in track(order, len(order), title) if progress else order:
        targets = data.targets(index)
        yield crop(targets.masks, targets.boxes, size)
        count += len(targets)
        if count >= max_masks:
            return
