"""What every system promises. A new system needs a line in `tiny.TINY` and passes all of this."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress

import pytest
import torch
import torch.nn.functional as F
from fakes import Listed
from tiny import TINY, batch, shapes

from maskset import losses
from maskset.codec_tools.compare import reconstruct
from maskset.errors import ConfigError, MatchingError
from maskset.evaluation.average_precision import average_precision
from maskset.evaluation.evaluate import evaluate
from maskset.instances import Category, Instances, Masks
from maskset.kernels import library
from maskset.kernels.attention import implementations, using
from maskset.layers import blocks
from maskset.masks.paint import paint, paint_probabilities, paste_soft
from maskset.masks.resize import align_corners, aligned_bilinear, resample
from maskset.masks.targets import crop, downsample_by_4_opencv, downsample_by_stride, resize_align_corners
from maskset.structures import ImageBatch, ModelOutput
from maskset.systems import CONFIGS, System, build
from maskset.systems.isda import Isda
from maskset.systems.istr import Istr
from maskset.systems.istr_smt import IstrSmt
from maskset.systems.sextant import Sextant
from maskset.systems.soit import Soit
from maskset.systems.solq import Solq
from maskset.systems.sotr import Sotr

every_system = pytest.mark.parametrize("name", list(CONFIGS))


def tiny(name: str, **changes) -> System:
    torch.manual_seed(0)
    config = dataclasses.replace(TINY[name], **changes)
    model = build(config, tuple(Category(f"class {i}", i) for i in range(config.num_classes)))
    model.prepare(objects for _, objects in shapes(8))
    return model


def total(terms: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(terms.values())).sum()


def awake(model: System) -> System:
    """Return the model with every parameter moved off its start, so that no part is silent because of a zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def assert_same(found: ModelOutput, expected: ModelOutput, image: int, atol: float = 1e-4) -> None:
    for a, b in zip(found.layers, expected.layers, strict=True):
        for key in ("class_logits", "mask_params", "boxes"):
            x, y = getattr(a, key), getattr(b, key)
            assert (x is None) == (y is None)
            if x is not None:
                rtol = 0.1 * atol if key == "boxes" else 0  # ISTR's know no bounds
                torch.testing.assert_close(x[image], y[0], atol=atol, rtol=rtol)
    assert (found.mask_features is None) == (expected.mask_features is None)
    if found.mask_features is not None and expected.mask_features is not None:
        torch.testing.assert_close(found.mask_features[image], expected.mask_features[0], atol=atol, rtol=0)


def test_there_is_a_tiny_model_of_every_system():
    assert set(TINY) == set(CONFIGS)
    assert all(type(TINY[name]) is CONFIGS[name] and TINY[name].system == name for name in CONFIGS)


@every_system
def test_every_parameter_learns(name):
    model = tiny(name).train()
    images, objects = batch(shapes(3), model.config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        total(model.loss(model(images), images, objects)).backward()
        parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
        assert not [key for key, p in parameters.items() if p.grad is None or not p.grad.isfinite().all()], step
        silent = [key for key, p in parameters.items() if p.grad is not None and not p.grad.any()]
        optimizer.step()
    assert not silent


@every_system
def test_every_implementation_computes_the_same(name, monkeypatch):
    def run() -> list[torch.Tensor]:
        model = awake(tiny(name)).train()
        images, objects = batch(shapes(2), model.config)
        torch.manual_seed(0)
        terms = model.loss(model(images), images, objects)
        total(terms).backward()
        return [*terms.values(), *(p.grad for p in model.parameters() if p.grad is not None)]

    with using("reference"):
        monkeypatch.setenv(library.NATIVE_ENV, "off")
        expected = run()
    for way in [way for way, why in implementations().items() if why is None and way != "triton"]:
        monkeypatch.setenv(library.NATIVE_ENV, "")
        with using(way):
            for one, other in zip(run(), expected, strict=True):
                torch.testing.assert_close(one, other, atol=1e-4 * max(1.0, float(other.detach().abs().max())), rtol=1e-3)


@every_system
def test_a_batch_without_any_object_trains(name):
    model = tiny(name).train()
    images, objects = batch(shapes(2), model.config)
    terms = model.loss(model(images), images, [found[[]] for found in objects])
    total(terms).backward()
    assert total(terms).isfinite()
    missing = [k for k, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())]
    assert not missing


@every_system
def test_the_masks_of_a_loss_are_drawn_once_for_values_and_gradients(name, monkeypatch):
    walks, walk = [], losses._chunk_backward
    monkeypatch.setattr(losses, "_chunk_backward", lambda *inputs: walks.append(1) or walk(*inputs))
    model = tiny(name).train()
    images, objects = batch(shapes(2), model.config)
    total(model.loss(model(images), images, objects)).backward()
    assert len(walks) <= 1


@every_system
def test_masks_that_are_not_finite_do_not_crash_the_loss(name):
    model = awake(tiny(name)).train()
    images, objects = batch(shapes(2), model.config)
    output = model(images)
    if output.mask_features is not None:  # else masks are matched by nothing but their numbers
        output = dataclasses.replace(output, mask_features=output.mask_features * torch.nan)
    else:
        output.layers[-1] = dataclasses.replace(output.layers[-1], mask_params=output.layers[-1].mask_params * torch.nan)
    with suppress(MatchingError):  # which tells as well as a loss does
        assert not total(model.loss(output, images, objects)).isfinite()


@every_system
def test_an_images_result_does_not_depend_on_its_companions(name):
    model = awake(tiny(name)).eval()
    images, _ = batch(shapes(3), model.config)
    with torch.no_grad():
        together = model(images)
        sizes = [(64, 80)] * 3
        found = model.postprocess(together, images, sizes)
        for i in range(3):
            single = ImageBatch(images.pixels[i : i + 1], images.sizes[i : i + 1])
            alone = model(single)
            assert_same(together, alone, i)
            (expected,) = model.postprocess(alone, single, sizes[:1])
            torch.testing.assert_close(found[i].scores, expected.scores, atol=1e-5, rtol=0)
            clear = expected.scores.diff().abs() > 1e-5
            clear = torch.cat([clear, clear.new_ones(1)]) & torch.cat([clear.new_ones(1), clear])
            assert clear.sum() > len(clear) / 2
            assert torch.equal(found[i].labels[clear], expected.labels[clear])


@every_system
def test_an_image_on_a_larger_canvas_does_not_depend_on_its_companions(name):
    model = awake(tiny(name)).eval()
    small, large = shapes(1)[0], shapes(1, size=(96, 112))[0]
    images, _ = batch([small, large], model.config)
    with torch.no_grad():
        together = model(images)
        alone = model(ImageBatch(images.pixels[:1], images.sizes[:1]))
    assert_same(together, alone, 0)


@every_system
def test_a_thousand_objects_in_one_image(name):
    model = tiny(name).train()
    images, objects = batch(shapes(1), model.config)
    found = objects[0]
    many = [i % len(found) for i in range(1000)]
    crowd = dataclasses.replace(found[many], boxes=found.boxes[many] + torch.rand(1000, 1))
    terms = model.loss(model(images), images, [crowd])
    total(terms).backward()
    assert total(terms).isfinite()


@every_system
@pytest.mark.parametrize("classes", [1, 1200])
def test_one_class_and_very_many(name, classes):
    model = tiny(name, num_classes=classes).train()
    images, objects = batch(shapes(2), model.config)
    objects = [dataclasses.replace(found, labels=(found.labels * 400).clamp(max=classes - 1)) for found in objects]
    output = model(images)
    assert output.layers[-1].class_logits.shape[-1] == classes
    total(model.loss(output, images, objects)).backward()
    for result in model.postprocess(output, images, [(64, 80)] * 2, limit=50):
        assert len(result) <= 50
        assert result.categories == model.categories
        assert (result.labels < classes).all()  # of ISTR, all boxes may be outside


@every_system
def test_results_are_sorted_limited_and_of_the_size_asked_for(name):
    model = awake(tiny(name)).eval()
    images, _ = batch(shapes(2), model.config)
    with torch.no_grad():
        output = model(images)
    sizes = [(120, 77), (33, 200)]
    everything = model.postprocess(output, images, sizes, limit=10_000)
    for result, size in zip(everything, sizes, strict=True):
        assert result.masks.size == size
        assert result.scores is not None
        assert (result.scores.diff() <= 0).all()
        assert len(result) == len(result.boxes) == len(result.masks)
    for limit in (0, 1, 7):
        for result, full in zip(model.postprocess(output, images, sizes, limit=limit), everything, strict=True):
            # ISTR chooses the best first, then leaves out those whose box is outside of the image
            assert len(result) == limit or (len(result) < limit and name.startswith("istr"))
            assert torch.equal(result.scores, full.scores[: len(result)])
    middle = float(everything[0].scores.median())
    above = model.postprocess(output, images, sizes, limit=10_000, threshold=middle)[0]
    assert len(above) == int((everything[0].scores >= middle).sum())


@every_system
def test_bfloat16_runs_and_its_loss_is_in_float32(name):
    model = awake(tiny(name)).train()
    images, objects = batch(shapes(2), model.config)
    exact = total(model.loss(model(images), images, objects))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images)
        terms = model.loss(output, images, objects)
        results = model.postprocess(output, images, [(64, 80)] * 2)
    for name_of, term in model.loss(output, images, objects).items():
        assert terms[name_of].dtype == torch.float32
        assert torch.equal(term, terms[name_of])
    for found, expected in zip(results, model.postprocess(output, images, [(64, 80)] * 2), strict=True):
        assert found.masks == expected.masks
    total(terms).backward()
    assert total(terms).item() == pytest.approx(exact.item(), rel=0.2)


@every_system
def test_settings_that_are_not_finite_are_refused(name):
    with pytest.raises(ConfigError, match=r"model\.class_weight must be a finite number, got nan"):
        dataclasses.replace(TINY[name], class_weight=float("nan"))
    with pytest.raises(ConfigError, match=r"model\.input\.std must be a finite number, got inf"):
        dataclasses.replace(TINY[name].input, std=(0.2, float("inf"), 0.2))


@every_system
def test_an_image_of_one_pixel_works(name):
    model = tiny(name).train()
    images, _ = batch([(torch.zeros(3, 1, 1, dtype=torch.uint8), shapes(1)[0][1][[]])], model.config)
    output = model(images)
    assert total(model.loss(output, images, [Instances.empty((1, 1))])).isfinite()
    assert model.postprocess(output, images, [(1, 1)])[0].masks.size == (1, 1)


@every_system
def test_the_state_dict_holds_all_there_is(name):
    model, other = awake(tiny(name)).eval(), build(TINY[name]).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    images, _ = batch(shapes(1), model.config)
    with torch.no_grad():
        assert_same(other(images), model(images), 0, atol=0)


@every_system
def test_a_model_moves_to_another_device_whole(name):
    model = tiny(name).to("meta")
    images, _ = batch(shapes(1), model.config)
    output = model(images.to("meta"))
    tensors = [value for part in (output, *output.layers) for value in vars(part).values() if isinstance(value, torch.Tensor)]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}


WAITS = {"solq": 1, "soit": 2, "isda": 1, "istr": 1, "istr-smt": 2, "sotr": 0, "sextant": 1}


@every_system
def test_the_loss_waits_for_the_device_where_slots_are_matched_and_nowhere_else(name, monkeypatch):
    """Tensors of the meta device have no values: whoever asks for one fails. SOIT also matches proposals; ISTR-SMT draws targets
    in predicted boxes; SOTR matches nothing.
    """
    waits, copy = [], torch.Tensor.cpu

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        waits.extend([tensor] * tensor.is_meta)
        return torch.rand(tensor.shape) if tensor.is_meta else copy(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it knows no meta device
    model = tiny(name).train()
    images, objects = batch([*shapes(3), (torch.zeros(3, 64, 80, dtype=torch.uint8), Instances.empty((64, 80)))], model.config)
    model.loss(model(images), images, objects)  # the first time a fitted codec checks that it has been fitted
    model, images = model.to("meta"), images.to("meta")
    terms = model.loss(model(images), images, objects)
    assert len(waits) == WAITS[name]
    assert all(term.is_meta for term in terms.values())


@every_system
def test_layers_that_are_recomputed_keep_less_and_change_no_bit_of_a_gradient(name):
    model = awake(tiny(name, **({"dropout": 0.5} if hasattr(TINY[name], "dropout") else {}))).train()
    images, objects = batch(shapes(2), model.config)
    start = copy.deepcopy(model.state_dict())  # ISTR-SMT's batch norms would move
    found = []
    for _ in range(2):
        model.load_state_dict(start)
        model.zero_grad()
        torch.manual_seed(1)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.nbytes) or x, lambda x: x):
            output = model(images)
        total(model.loss(output, images, objects)).backward()
        gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        found.append((sum(kept), gradients, copy.deepcopy(model.state_dict())))
        blocks.recompute(model)
    (most, expected, after), (least, gradients, after_too) = found
    assert least < most
    assert gradients.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(gradients[key], expected[key])] == []
    assert all(torch.equal(after[key], after_too[key]) for key in after)


@every_system
def test_nothing_is_recomputed_in_evaluation_or_without_gradients(name, monkeypatch):
    model = tiny(name).eval()
    images, _ = batch(shapes(1), model.config)
    blocks.recompute(model)
    monkeypatch.delattr(blocks, "checkpoint")
    model(images)
    with torch.no_grad():
        model.train()(images)
    with pytest.raises(NameError):
        model(images)


@every_system
def test_evaluation_repeats_itself(name):
    model = awake(tiny(name, **({"dropout": 0.5} if hasattr(TINY[name], "dropout") else {}))).eval()
    images, _ = batch(shapes(2), model.config)
    with torch.no_grad():
        assert_same(model(images), model(ImageBatch(images.pixels[:1], images.sizes[:1])), 0)
        first, second = model(images), model(images)
    for a, b in zip(first.layers, second.layers, strict=True):
        assert torch.equal(a.class_logits, b.class_logits)


@every_system
def test_uint8_pixels_are_refused(name):
    model = tiny(name)
    with pytest.raises((ValueError, TypeError), match="normalized"):
        model(ImageBatch.from_images([shapes(1)[0][0]]))


@every_system
def test_a_canvas_that_is_no_multiple_of_the_divisor_is_refused(name):
    model = tiny(name, input=dataclasses.replace(TINY[name].input, divisor=32))
    images = ImageBatch(torch.zeros(1, 3, 64, 80), torch.tensor([[64, 80]]))
    with pytest.raises(ValueError, match=r"multiple of 32 pixels, got 64 x 80"):
        model(images)


@every_system
def test_objects_without_a_pixel_do_no_harm(name):
    model = tiny(name).train()
    images, objects = batch(shapes(1), model.config)
    empty = Instances(
        torch.tensor([0]), torch.tensor([[5.0, 5, 9, 9]]), Masks.from_dense(torch.zeros(1, 64, 80, dtype=torch.bool)), None, ()
    )
    assert total(model.loss(model(images), images, [empty])).isfinite()
    assert len(objects) == 1


class Examples(Listed):
    """A data set of a few images that are at hand."""

    def __init__(self, examples: list[tuple[torch.Tensor, Instances]]) -> None:
        super().__init__([objects for _, objects in examples])
        self._pixels = [pixels for pixels, _ in examples]

    def image(self, index: int) -> torch.Tensor:
        return self._pixels[index]


LEARNING_BY_HEART = {
    "solq": {"num_queries": 20, "mask_weight": 10.0},
    "soit": {"num_queries": 20, "mask_channels": 16},
    "isda": {"num_queries": 20, "mask_weight": 10.0},
    "sotr": {"grids": (16, 14, 12, 8, 6), "center_fraction": 0.1},  # no two of the objects share a cell
    "istr": {"num_queries": 20},
    "istr-smt": {"num_queries": 20, "autoencoder_steps": 300},
    "sextant": {"num_queries": 20},
}


@pytest.mark.slow
@every_system
def test_four_images_are_overfitted(name):
    """The AP reaches 0.9 of what the system's masks can reach on these images."""
    config = dataclasses.replace(TINY[name], hidden_dim=64, **LEARNING_BY_HEART[name])
    examples = Examples(shapes(4))
    torch.manual_seed(0)
    model = build(config, examples.categories).train()
    model.prepare(objects for _, objects in shapes(8))
    images, objects = batch(shapes(4), config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=600, pct_start=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        total(model.loss(model(images), images, objects)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    possible = average_precision(examples, best_results(model, examples), 100).mask_ap
    reached = evaluate(model.eval(), examples, progress=False).mask_ap
    assert reached >= 0.9 * possible


def best_results(model: System, examples: Examples) -> Iterator[tuple[int, Instances]]:
    """Yield the annotations as results, each with the mask that is left of it where the system makes its target of it."""
    for index in range(len(examples)):
        found = examples.targets(index)
        masks = LEFT[model.config.system](model, found)
        yield index, dataclasses.replace(found, masks=masks, scores=torch.ones(len(found)))


def after_the_code(model: Solq | Istr, found: Instances) -> Masks:
    return reconstruct(model.codec, found.masks, found.boxes)


def after_the_autoencoder(model: IstrSmt, found: Instances) -> Masks:
    """Return what is drawn without the context of an image, which can only add to it."""
    return reconstruct(model.eval().codec, found.masks, found.boxes)


def after_the_quarter_map(model: Isda, found: Instances) -> Masks:
    height, width = found.masks.size
    soft = downsample_by_stride(found.masks, model.config.mask_stride, (-(-height // 32) * 8, -(-width // 32) * 8))
    return paint_probabilities(soft, model.config.mask_stride, (height, width), (height, width))


def after_the_quarter_mask(model: Sotr, found: Instances) -> Masks:
    height, width = found.masks.size
    cells = downsample_by_4_opencv(found.masks, (-(-height // 32) * 8, -(-width // 32) * 8))
    return paint_probabilities(cells.float(), 4, (height, width), (height, width))


def drawn_in_its_region(model: Sextant, found: Instances) -> Masks:
    regions = model.region(found.boxes)
    return paste_soft(crop(found.masks, regions, model.config.mask_size).float(), regions, found.masks.size, 0.5)


def drawn_at_stride_8(model: Soit, found: Instances) -> Masks:
    """Return the masks as the best map of their logits at stride 8 draws them: no instance-aware transformer draws better."""
    (height, width), cells = found.masks.size, (found.masks.size[0] // 8, found.masks.size[1] // 8)
    wanted = resize_align_corners(found.masks, found.masks.size, (cells[0] * 4, cells[1] * 4), torch.device("cpu"))
    upsampled = (aligned_bilinear(cells[0], 4), aligned_bilinear(cells[1], 4))
    logits = torch.zeros(len(found), *cells, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for _ in range(300):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(resample(logits, *upsampled), wanted).backward()
        optimizer.step()
    to_size = (align_corners(cells[0] * 4, height), align_corners(cells[1] * 4, width))
    return paint(logits.detach(), [upsampled, torch.sigmoid, to_size], cutoff=0.0)


LEFT: dict[str, Callable] = {
    "solq": after_the_code,
    "soit": drawn_at_stride_8,
    "isda": after_the_quarter_map,
    "istr": after_the_code,
    "istr-smt": after_the_autoencoder,
    "sotr": after_the_quarter_mask,
    "sextant": drawn_in_its_region,
}
