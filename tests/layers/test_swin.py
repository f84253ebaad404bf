"""Swin against the official code's arrays, against timm's network, and by what the paper says of it."""

import pytest
import torch
from goldens import golden, image, notes, weights
from torch import nn

from maskset.conversion.backbones import rename_swin
from maskset.layers.swin import (
    SWIN_SIZES,
    PatchMerging,
    SwinSize,
    SwinTransformer,
    join_windows,
    relative_positions,
    shift_mask,
    split_windows,
)

SMALL = SwinSize(16, (2, 2, 2, 2), (1, 2, 4, 8))


@pytest.fixture(scope="module")
def official_maps():
    """The maps of Swin-T filled by the recipe."""
    state = weights(notes("solq")["swin_t_state_dict"])
    swin = SwinTransformer(SWIN_SIZES["swin_tiny"]).eval()
    swin.load_state_dict(rename_swin({name.removeprefix("backbone.0.body."): value for name, value in state.items()}))
    with torch.no_grad():
        return swin(image("solq-swin", 101, 138)[None])


@pytest.mark.parametrize(("index", "name"), [(0, "S3"), (1, "S4"), (2, "S5")])
def test_the_maps_are_the_official_ones(official_maps, index, name):
    found = official_maps[index]
    assert list(found.shape) == golden("solq", f"swin_t.{name}.shape").tolist()
    measured = {
        "mean": found.mean(),
        "std": found.std(correction=0),
        "slice": found[:, :8, :4, :4],
        "chmean": found.mean((2, 3)),
    }
    for key, value in measured.items():
        torch.testing.assert_close(
            value, golden("solq", f"swin_t.{name}.{key}"), atol=1e-4, rtol=0, msg=lambda m, key=key: f"{key}: {m}"
        )


def timm_swin():
    import timm

    torch.manual_seed(0)
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=448,  # the last map is two windows wide: timm does not shift a single one
        embed_dim=SMALL.width,
        depths=SMALL.depths,
        num_heads=SMALL.heads,
        norm_layer=nn.LayerNorm,  # timm's own default has another eps than the authors' code
    ).eval()


def test_timms_weights_give_timms_features_where_nothing_is_padded():
    theirs, ours = timm_swin(), SwinTransformer(SMALL).eval()
    for parameter in theirs.parameters():  # biases and tables start at almost nothing, which would hide mistakes
        nn.init.normal_(parameter, std=0.1)
    fit = ours.load_state_dict(rename_swin(theirs.state_dict()), strict=False)
    assert {name.partition(".")[0] for name in fit.unexpected_keys} == {"norm", "head"}
    assert sorted(fit.missing_keys) == [f"stages.{s}.output_norm.{part}" for s in (1, 2, 3) for part in ("bias", "weight")]
    pixels = torch.randn(1, 3, 448, 448)
    with torch.no_grad():
        expected = theirs.forward_intermediates(pixels, indices=[1, 2, 3], intermediates_only=True)
        found = ours(pixels)
    for ours_, theirs_ in zip(found, expected, strict=True):
        normalized = nn.functional.layer_norm(theirs_.permute(0, 2, 3, 1), theirs_.shape[1:2]).permute(0, 3, 1, 2)
        torch.testing.assert_close(ours_, normalized, atol=1e-4, rtol=1e-4)


def test_swin_large_has_the_official_number_of_parameters():
    with torch.device("meta"):
        swin = SwinTransformer(SWIN_SIZES["swin_large"])
    assert sum(parameter.numel() for parameter in swin.parameters()) == 194_997_780


@pytest.mark.parametrize("size", [(1, 1), (30, 64), (65, 97)])
def test_any_size_of_image_gives_maps_of_rounded_up_sizes(size):
    maps = SwinTransformer(SMALL)(torch.randn(2, 3, *size))
    sides = [-(-side // 4) for side in size]
    for channels, found in zip((32, 64, 128), maps, strict=True):
        sides = [-(-side // 2) for side in sides]
        assert found.shape == (2, channels, *sides)


def test_an_image_does_not_depend_on_its_companions():
    torch.manual_seed(0)
    swin, pixels = SwinTransformer(SMALL).eval(), torch.randn(3, 3, 60, 80)
    for together, alone in zip(swin(pixels), swin(pixels[1:2]), strict=True):
        torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)


def test_every_parameter_has_a_gradient():
    torch.manual_seed(0)
    swin = SwinTransformer(SMALL)
    sum((x * torch.randn_like(x)).sum() for x in swin(torch.randn(1, 3, 70, 90))).backward()
    assert [name for name, p in swin.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_bfloat16_is_near_float32():
    torch.manual_seed(0)
    swin, pixels = SwinTransformer(SMALL).eval(), torch.randn(1, 3, 70, 90)
    exact = swin(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = swin(pixels)
    for a, b in zip(exact, rounded, strict=True):
        assert (a - b).abs().mean() < 0.05


def test_windows_are_cut_row_by_row_and_joined_again():
    x = torch.arange(14.0 * 21).view(1, 14, 21, 1)
    windows = split_windows(x)
    assert windows.shape == (6, 49, 1)
    assert torch.equal(windows[1, :8, 0], torch.tensor([7.0, 8, 9, 10, 11, 12, 13, 28]))
    assert torch.equal(join_windows(windows, x.shape), x)


def test_the_mask_parts_what_only_rolling_made_neighbors():
    mask = shift_mask(13, 14, torch.device("cpu"))
    assert mask.shape == (4, 49, 49)
    assert not mask[0].any()
    apart = mask[1].view(7, 7, 7, 7) == -100  # the right window: its last three columns were rolled around
    assert torch.equal(apart[2, 3], torch.arange(7).expand(7, 7) >= 4)
    assert apart[2, 3, 2, 4]
    assert not apart[2, 3, 6, 0]
    corner = mask[3].view(7, 7, 7, 7) == 0  # the last window has four parts
    assert [int(corner[y, x].sum()) for y, x in ((0, 0), (0, 6), (6, 0), (6, 6))] == [16, 12, 12, 9]


def test_the_bias_table_knows_relative_positions():
    index = relative_positions()
    assert (index.min(), index.max()) == (0, 168)
    assert len({int(index[i, i]) for i in range(49)}) == 1
    assert index[0, 8] == index[8, 16]  # one down, one right, anywhere
    assert index[0, 1] != index[1, 0]


def test_merging_takes_the_four_cells_down_before_right():
    merging = PatchMerging(2)
    merging.norm = nn.Identity()
    merging.reduction.weight.data = torch.tensor([[1.0, 100, 0, 0], [0, 0, 1, 100]])
    cells = torch.tensor([[1.0, 2, 3], [4, 5, 6]])[None, ..., None]
    assert merging(cells).tolist() == [[[[401, 502], [603, 0]]]]


def test_later_blocks_are_dropped_more_often():
    swin = SwinTransformer(SMALL, drop_path=0.7)
    skip = [block.drop_path.p for stage in swin.stages for block in stage.blocks]
    assert skip == pytest.approx([0.1 * i for i in range(8)])


def test_a_branch_is_skipped_for_whole_images():
    block = SwinTransformer(SMALL, drop_path=0.7).train().stages[-1].blocks[-1]
    kept = block.drop_path(torch.ones(64, 2, 3)).flatten(1)
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    assert sorted(set(kept[:, 0].tolist())) == pytest.approx([0, 1 / 0.3])


def test_the_authors_names_and_timms_differ_in_where_patches_are_merged():
    ours = "stages.1.merge.reduction.weight"
    value = torch.zeros(1)
    assert list(rename_swin({"layers.0.downsample.reduction.weight": value})) == [ours]
    assert list(rename_swin({"layers.1.downsample.reduction.weight": value})) == [ours]
