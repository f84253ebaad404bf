"""The autoencoder codec of ISTR-SMT: one convolutional network encodes a mask as D numbers, another decodes them."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from maskset.errors import ConfigError
from maskset.losses import squared_dice_loss
from maskset.masks.codecs.fittable import MAX_MASKS, MAX_SIZE, FittableCodec
from maskset.progress import track

CONTEXT_CHANNELS = 32  # channels of the optional features that are added during decoding
BATCH, LEARNING_RATE = 64, 1e-3
STEPS = 3000


class AutoencoderCodec(FittableCodec):
    """Turns box-local masks into numbers with five convolutions, and back by upsampling a small map four times.

    The encoder is frozen after `fit`; the decoder may be trained further. Both have batch norm: in training mode, all masks of
    one call are normalized together.

    Args:
        size: side S of the mask, pixels; a multiple of 16 from 32 to 1024.
        length: D, number of values in a code.

    Raises:
        ConfigError: `size` is not such a number, or `length` is not positive.
    """

    kind = "autoencoder"

    def __init__(self, size: int = 112, length: int = 256) -> None:
        super().__init__(size, length)
        if not 32 <= size <= MAX_SIZE or size % 16:
            raise ConfigError(f"the size of an autoencoder must be a multiple of 16 from 32 to {MAX_SIZE}, got {size}.")
        if not 1 <= length <= size**2:
            raise ConfigError(f"an autoencoder of {size} x {size} masks needs a length of 1 to {size**2}, got {length}.")
        layers: list[nn.Module] = []
        for before, after in [(1, 16), (16, 32), (32, 64), (64, 128)]:
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), BatchNorm(after), nn.ELU()]
        self.encoder = nn.Sequential(*layers, nn.Conv2d(128, length, size // 16)).requires_grad_(False)
        self.first = nn.Sequential(nn.ConvTranspose2d(length, 128, size // 16), BatchNorm(128), nn.ELU())
        self.doublings = nn.ModuleList(_doubling(*widths) for widths in [(128, 64), (64, CONTEXT_CHANNELS), (32, 16), (16, 16)])
        self.last = nn.Conv2d(16, 1, 1)

    def fit(
        self,
        masks: Tensor | Iterable[Tensor],
        max_masks: int = MAX_MASKS,
        steps: int | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        """Fit encoder and decoder to masks [n S S] in [0, 1], in one tensor or in batches: hours on a CPU at full size.

        Adam on the dice loss, on an accelerator if there is one; the learning rate is divided by 10 after one and after two
        thirds of the steps. All masks are held in memory (booleans take a byte per pixel); the batch sizes do not matter.
        There may be fewer masks than numbers in a code.
        If fitting is interrupted, the codec counts as not fitted.

        Args:
            masks: to fit the networks to.
            max_masks: only the first ones are used.
            steps: number of batches of 64 masks; None: 3000.
            seed: of the initial weights and of the random batches.
            progress: whether to show a progress bar on stderr.

        Raises:
            ConfigError: there is no mask.
        """
        rows = torch.cat([torch.zeros(0, self.size**2, dtype=torch.bool), *self.rows(masks, BATCH, max_masks)])
        self.require_enough(len(rows), 1)
        steps = STEPS if steps is None else steps
        progress_range = track(range(steps), steps, "fitting the mask autoencoder", "steps") if progress else range(steps)
        home, was_training = self.fitted.device, self.training
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else home
        self.mark_fitted(False)
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.manual_seed(seed)
                for module in self.modules():
                    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
                        module.reset_parameters()
                self.to(device).train().encoder.requires_grad_(True)
                self._train_on(rows, progress_range, steps)
        finally:
            self.to(home).train(was_training).encoder.requires_grad_(False)
            self.zero_grad()
        self.mark_fitted()

    def _train_on(self, rows: Tensor, progress_range: Iterable[int], steps: int) -> None:
        optimizer = torch.optim.Adam(self.parameters(), lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 3, 2 * steps // 3])
        for _ in progress_range:
            batch = rows[torch.randint(len(rows), (BATCH,))].view(-1, self.size, self.size)
            batch = batch.to(self.fitted.device).float()
            optimizer.zero_grad()
            squared_dice_loss(self._decode(self._encode(batch)), batch, eps=1e-5).mean().backward()
            optimizer.step()
            schedule.step()

    def _encode(self, masks: Tensor) -> Tensor:
        return self.encoder(masks[:, None])[:, :, 0, 0]

    def decode(self, codes: Float[Tensor, "n D"], context: Float[Tensor, "n c s s"] | None = None) -> Float[Tensor, "n S S"]:
        """Return the probability of every pixel.

        Args:
            codes: of the masks.
            context: features of each mask's region, 32 channels of S / 4 x S / 4 cells, added to the map of that size.

        Raises:
            ConfigError: the codec has not been fitted.
        """
        self.require_fitted()
        return self._decode(codes, context)

    def _decode(self, codes: Tensor, context: Tensor | None = None) -> Tensor:
        maps = self.first(codes[:, :, None, None])
        for doubling in self.doublings:
            maps = doubling(maps)
            if context is not None and maps.shape[2] == self.size // 4:
                maps = maps + context
        return self.last(maps)[:, 0].sigmoid()


class BatchNorm(nn.BatchNorm2d):
    """Batch norm whose running statistics do not become NaN by an empty batch."""

    def forward(self, x: Float[Tensor, "n C h w"]) -> Float[Tensor, "n C h w"]:  # type: ignore[override]
        """Return x normalized by its own statistics in training mode, otherwise by the running ones."""
        if len(x):
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps)


def _doubling(before: int, after: int) -> nn.Sequential:
    double = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
    return nn.Sequential(double, nn.Conv2d(before, after, 3, padding=1), BatchNorm(after), nn.ELU())
