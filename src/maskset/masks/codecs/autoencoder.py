"""The autoencoder code of ISTR-SMT: a convolutional network learns to write a mask as D numbers, another to draw it from them."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from maskset.errors import ConfigError
from maskset.losses import squared_dice_loss
from maskset.masks.codecs.files import GREATEST, MOST_MASKS, require_enough, require_fitted, rows
from maskset.progress import track

CONTEXT_CHANNELS = 32  # of the features that may be added to a mask while it is drawn
BATCH, LEARNING_RATE = 64, 1e-3  # of learning
STEPS = 3000


class AutoencoderCodec(nn.Module):
    """Turns box-local masks into numbers by five convolutions, and back by doubling a small map four times.

    The encoder is fixed once it has been learnt; the decoder may be trained on. Both have batch norm, whose statistics in
    training are those of the masks at hand, so that a call in training mode must hold the masks that belong together, and no
    others.

    Args:
        size: side S of the mask, a multiple of 16 from 32 on, pixels.
        length: D, how many numbers describe a mask.

    Raises:
        ConfigError: `size` is none of these, or `length` is not positive.
    """

    fitted: Bool[Tensor, ""]

    def __init__(self, size: int = 112, length: int = 256) -> None:
        super().__init__()
        if not 32 <= size <= GREATEST or size % 16:
            raise ConfigError(f"an autoencoder needs a size of 32, 48, 64 or another multiple of 16 to {GREATEST}, got {size}.")
        if not 1 <= length <= size**2:
            raise ConfigError(f"an autoencoder of {size} x {size} masks needs a length of 1 to {size**2}, got {length}.")
        self.size, self.length = size, length
        layers: list[nn.Module] = []
        for before, after in [(1, 16), (16, 32), (32, 64), (64, 128)]:
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), BatchNorm(after), nn.ELU()]
        self.encoder = nn.Sequential(*layers, nn.Conv2d(128, length, size // 16)).requires_grad_(False)
        self.first = nn.Sequential(nn.ConvTranspose2d(length, 128, size // 16), BatchNorm(128), nn.ELU())
        self.doublings = nn.ModuleList(_doubling(*widths) for widths in [(128, 64), (64, CONTEXT_CHANNELS), (32, 16), (16, 16)])
        self.last = nn.Conv2d(16, 1, 1)
        self.register_buffer("fitted", torch.tensor(False))

    def fit(
        self,
        masks: Tensor | Iterable[Tensor],
        most_masks: int = MOST_MASKS,
        steps: int | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        """Learn encoder and decoder from masks [n S S] in [0, 1], given whole or in batches: hours on a CPU at full size.

        Adam on the dice loss, its rate divided by 10 after one and two thirds of the steps, on an accelerator if there is one.
        They are kept in memory (booleans take a byte per pixel); how they are batched does not matter.

        Args:
            masks: what to learn from.
            most_masks: how many count, the first ones.
            steps: how many batches of 64 masks are drawn; None: 3000.
            seed: of the first weights, and of the order in which masks are looked at.
            progress: whether to show how far it is on stderr.

        Raises:
            ConfigError: there is no mask; as few as the code has numbers do not matter here.
        """
        every = torch.cat([torch.zeros(0, self.size**2, dtype=torch.bool), *rows(masks, BATCH, most_masks)])
        if not len(every):
            require_enough(self, 0, 1)
        steps = STEPS if steps is None else steps
        turns = track(range(steps), steps, "learning the mask autoencoder", "steps") if progress else range(steps)
        home, was_training = self.fitted.device, self.training
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else home
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            for module in self.modules():
                if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
                    module.reset_parameters()
            self.to(device).train().encoder.requires_grad_(True)
            self.fitted.fill_(True)
            optimizer = torch.optim.Adam(self.parameters(), lr=LEARNING_RATE)
            schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 3, 2 * steps // 3])
            for _ in turns:
                some = every[torch.randint(len(every), (BATCH,))].view(-1, self.size, self.size).to(device).float()
                optimizer.zero_grad()
                squared_dice_loss(self.decode(self.encode(some)), some, least=1e-5).mean().backward()
                optimizer.step()
                schedule.step()
        self.to(home).train(was_training).encoder.requires_grad_(False)
        self.zero_grad()

    def encode(self, masks: Float[Tensor, "n S S"]) -> Float[Tensor, "n D"]:
        """Return the codes of masks with values in [0, 1].

        Raises:
            ConfigError: `fit` has not been called, nor fitted weights loaded.
        """
        require_fitted(self)
        return self.encoder(masks[:, None])[:, :, 0, 0]

    def decode(self, codes: Float[Tensor, "n D"], context: Float[Tensor, "n c s s"] | None = None) -> Float[Tensor, "n S S"]:
        """Return the probability of every pixel.

        Args:
            codes: of the masks.
            context: features of each mask's region, 32 channels on S / 4 cells, added when the map has that size.

        Raises:
            ConfigError: `fit` has not been called, nor fitted weights loaded.
        """
        require_fitted(self)
        drawn = self.first(codes[:, :, None, None])
        for doubling in self.doublings:
            drawn = doubling(drawn)
            if context is not None and drawn.shape[2] == self.size // 4:
                drawn = drawn + context
        return self.last(drawn)[:, 0].sigmoid()


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that an empty batch leaves as it is: the mean of nothing would be NaN for ever."""

    def forward(self, x: Float[Tensor, "n C h w"]) -> Float[Tensor, "n C h w"]:  # type: ignore[override]
        """Return x normalised by its own statistics in training, by the collected ones otherwise."""
        if len(x):
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps)


def _doubling(before: int, after: int) -> nn.Sequential:
    double = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
    return nn.Sequential(double, nn.Conv2d(before, after, 3, padding=1), BatchNorm(after), nn.ELU())
