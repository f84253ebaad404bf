"""The Swin transformer for detection (Liu et al., ICCV 2021), which computes maps at strides 4, 8, 16 and 32 of an image.

Images can have any size, unlike those for classification, since every block pads its map to whole windows. The zeros of that
padding take part in attention, as in the authors' detection code, which produced all published results. Implementations that
roll before padding, or mask the padding, differ at the right and bottom border.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from maskset.layers.blocks import Layer

PATCH = 4  # pixels, the side of a patch
WINDOW = 7  # cells, the side of a window
SHIFT = WINDOW // 2  # cells, how far every second block moves its windows


@dataclass(frozen=True)
class SwinSize:
    """The sizes of Swin-T, S, B or L (section 3.3).

    Attributes:
        width: C, channels of the first stage; each further stage has twice as many.
        depths: blocks in each stage.
        heads: attention heads in each stage.
    """

    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]


SWIN_SIZES = {
    "swin_tiny": SwinSize(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_small": SwinSize(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin_base": SwinSize(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "swin_large": SwinSize(192, (2, 2, 18, 2), (6, 12, 24, 48)),
}


class SwinTransformer(nn.Module):
    """The network of figure 3a: patch embedding, then stages of blocks; all stages but the first merge patches.

    Args:
        size: width, depths and heads.
        drop_path: maximum probability of skipping a residual branch; it rises linearly from 0 over the blocks.
        maps: how many of the last stages return a map.
    """

    def __init__(self, size: SwinSize, drop_path: float = 0.0, maps: int = 3) -> None:
        super().__init__()
        first_map = len(size.depths) - maps
        self.channels = [size.width * 2**stage for stage in range(first_map, len(size.depths))]
        self.patches = PatchEmbedding(size.width)
        skip = [drop_path * block / max(1, sum(size.depths) - 1) for block in range(sum(size.depths))]
        self.stages = nn.ModuleList()
        for stage, (depth, heads) in enumerate(zip(size.depths, size.heads, strict=True)):
            self.stages.append(SwinStage(size.width * 2**stage, depth, heads, skip[:depth], stage > 0, stage >= first_map))
            skip = skip[depth:]
        self.apply(_initialize)

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _ _ _"]]:
        """Return the normalized maps of the last stages, [B C h w]."""
        x = self.patches(pixels)
        maps = []
        for stage in self.stages:
            x, output = stage(x)
            if output is not None:
                maps.append(output.permute(0, 3, 1, 2))
        return maps


class PatchEmbedding(nn.Module):
    """Embeds each patch of 4 x 4 pixels as one cell ("patch partition" and "linear embedding")."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, width, PATCH, stride=PATCH)
        self.norm = nn.LayerNorm(width)

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B h w C"]:
        """Return one cell per patch; incomplete patches at the right and bottom border are padded with zeros."""
        height, width = pixels.shape[2:]
        pixels = F.pad(pixels, (0, -width % PATCH, 0, -height % PATCH))
        return self.norm(self.projection(pixels).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Merges each 2 x 2 cells to one cell with twice the channels.

    Args:
        width: C, channels of the result.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2 * width)
        self.reduction = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Float[Tensor, "B h w c"]) -> Float[Tensor, "B (h+1)//2 (w+1)//2 2*c"]:
        """Return the merged cells; an odd number of rows or columns is padded with zeros."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        corners = [x[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
        return self.reduction(self.norm(torch.cat(corners, -1)))


class SwinStage(nn.Module):
    """Blocks at one resolution. Windows are shifted in every second block.

    Args:
        width: C, channels.
        depth: number of blocks.
        heads: attention heads.
        skip: probability of skipping a residual branch, for each block.
        downsample: whether to merge patches first.
        returns_map: whether the stage returns a map.
    """

    def __init__(self, width: int, depth: int, heads: int, skip: list[float], downsample: bool, returns_map: bool) -> None:
        super().__init__()
        self.merge = PatchMerging(width) if downsample else None
        self.blocks = nn.ModuleList(Block(width, heads, SHIFT * (i % 2), skip[i]) for i in range(depth))
        self.output_norm = nn.LayerNorm(width) if returns_map else None

    def forward(self, x: Float[Tensor, "B _ _ _"]) -> tuple[Float[Tensor, "B h w C"], Float[Tensor, "B h w C"] | None]:
        """Return the features for the next stage, and the normalized features if the stage returns a map."""
        if self.merge is not None:
            x = self.merge(x)
        mask = shift_mask(x.shape[1], x.shape[2], x.device)
        for block in self.blocks:
            x = block(x, mask)
        return x, None if self.output_norm is None else self.output_norm(x)


class Block(Layer):
    """Attention inside windows, then an MLP, each with a layer norm before and a residual connection (figure 3b, equation 3).

    Args:
        width: C, channels.
        heads: attention heads.
        shift: number of cells by which windows are shifted down and to the right; 0: none.
        skip: probability, in training, that a residual branch is skipped for an image.
    """

    def __init__(self, width: int, heads: int, shift: int, skip: float) -> None:
        super().__init__()
        self.shift = shift
        self.attention_norm = nn.LayerNorm(width)
        self.attention = WindowAttention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = SwinMlp(width)
        self.drop_path = StochasticDepth(skip, "row")

    def forward(self, x: Float[Tensor, "B h w C"], mask: Float[Tensor, "n 49 49"]) -> Float[Tensor, "B h w C"]:
        """Return new features; `mask` is `shift_mask`'s."""
        x = x + self.drop_path(self._attend(self.attention_norm(x), mask))
        return x + self.drop_path(self.mlp(self.mlp_norm(x)))

    def _attend(self, x: Float[Tensor, "B h w C"], mask: Float[Tensor, "n 49 49"]) -> Float[Tensor, "B h w C"]:
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % WINDOW, 0, -height % WINDOW))
        if not self.shift:
            return join_windows(self.attention(split_windows(x), None), x.shape)[:, :height, :width]
        # Shifting windows down and right is the same as rolling the map up and left (figure 4).
        x = x.roll((-self.shift, -self.shift), (1, 2))
        x = join_windows(self.attention(split_windows(x), mask), x.shape)
        return x.roll((self.shift, self.shift), (1, 2))[:, :height, :width]


class WindowAttention(nn.Module):
    """Multi-head attention among the 49 cells of each window, with a learned bias for each relative position (equation 4)."""

    index: Int[Tensor, "49 49"]

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.bias_table = nn.Parameter(torch.zeros((2 * WINDOW - 1) ** 2, heads))
        self.output = nn.Linear(width, width)
        self.register_buffer("index", relative_positions(), persistent=False)

    def forward(self, windows: Float[Tensor, "b 49 C"], mask: Float[Tensor, "n 49 49"] | None) -> Float[Tensor, "b 49 C"]:
        """Return new features of the cells.

        Args:
            windows: all windows of the batch, image after image.
            mask: for each of an image's n windows, what is added to the attention of a cell (row) to a cell (column).
        """
        query, key, value = self.qkv(windows).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.bias_table[self.index].permute(2, 0, 1)[None]  # [1, heads, 49, 49]
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(len(windows) // len(mask), 1, 1, 1)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        return self.output(attended.transpose(1, 2).flatten(2))


class SwinMlp(nn.Module):
    """Two linear layers with GELU between; the hidden layer is four times as wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "*n C"]) -> Float[Tensor, "*n C"]:
        """Return new features of each cell."""
        return self.down(F.gelu(self.up(x)))


def split_windows(x: Float[Tensor, "B h w C"]) -> Float[Tensor, "b 49 C"]:
    """Return the windows of maps whose sides are multiples of 7, image after image, row-major like the cells in a window."""
    batch, height, width, channels = x.shape
    windows = x.view(batch, height // WINDOW, WINDOW, width // WINDOW, WINDOW, channels)
    return windows.transpose(2, 3).reshape(-1, WINDOW * WINDOW, channels)


def join_windows(windows: Float[Tensor, "b 49 C"], shape: tuple[int, ...]) -> Float[Tensor, "B h w C"]:
    """Return maps of `shape` from their windows."""
    batch, height, width, channels = shape
    x = windows.view(batch, height // WINDOW, width // WINDOW, WINDOW, WINDOW, channels)
    return x.transpose(2, 3).reshape(batch, height, width, channels)


def shift_mask(height: int, width: int, device: torch.device) -> Float[Tensor, "n 49 49"]:
    """Return an attention mask for each window: -100 between cells that are neighbors only because the map was rolled, else 0.

    Along each axis, a rolled map has whole windows, the remainder of the last window, and the cells that were rolled around.

    Args:
        height: of the map before it is padded to whole windows, cells.
        width: likewise.
        device: of the mask.
    """
    regions = []
    for cells in (height + -height % WINDOW, width + -width % WINDOW):
        position = torch.arange(cells, device=device)
        regions.append((position >= cells - WINDOW).int() + (position >= cells - SHIFT).int())
    region = 3.0 * regions[0][:, None] + regions[1][None, :]
    windows = split_windows(region[None, :, :, None])[:, :, 0]
    return -100.0 * (windows[:, :, None] != windows[:, None, :])


def relative_positions() -> Int[Tensor, "49 49"]:
    """Return which row of a bias table belongs to the position of a cell (row) relative to a cell (column) of a window."""
    cell = torch.arange(WINDOW * WINDOW)
    y, x = cell // WINDOW, cell % WINDOW
    down, right = (axis[:, None] - axis[None, :] + WINDOW - 1 for axis in (y, x))  # each in 0 ... 12
    return down * (2 * WINDOW - 1) + right


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, WindowAttention):
        nn.init.trunc_normal_(module.bias_table, std=0.02)
