"""Fine-tuning: what of other weights is taken."""

from dataclasses import replace

import pytest
import torch
from tiny import SMALLEST, TINY

from maskset.instances import Category
from maskset.systems import build
from maskset.training.transfer import transfer

SMALL = replace(TINY["solq"], backbone=SMALLEST)
FROZEN = replace(SMALLEST, norm="frozen", pretrained=True)


def named(*names: str) -> tuple[Category, ...]:
    return tuple(Category(name, i) for i, name in enumerate(names))


def model(categories, seed=0, **changes):
    torch.manual_seed(seed)
    return build(replace(SMALL, num_classes=len(categories), **changes), categories)


def copied(new, old):
    """Transfer between two models; return what was done, and both states, the new one's also from before."""
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    done = transfer(new, new.categories, old.state_dict(), old.categories)
    return done, new.state_dict(), old.state_dict(), before


def test_a_model_like_the_other_becomes_the_other():
    old, new = model(named("a", "b", "c"), seed=0), model(named("a", "b", "c"), seed=1)
    done, after, source, _ = copied(new, old)
    assert all(torch.equal(after[name], source[name]) for name in source)
    assert not done.initial
    assert not done.unused
    assert len(done.copied) + len(done.by_class) == len(source)


@pytest.mark.parametrize(("before", "after"), [("frozen", "batch"), ("batch", "frozen")])
def test_frozen_and_trained_batch_norms_start_from_each_other(before, after):
    networks = [model(named("a"), seed, backbone=replace(FROZEN, norm=norm)) for seed, norm in enumerate((before, after))]
    done, state, source, _ = copied(networks[1], networks[0])
    assert not done.initial
    assert not done.unused
    assert all(torch.equal(state[name], source[name]) for name in source)


def test_class_rows_go_by_name_and_new_classes_keep_their_start():
    old, new = model(named("cat", "dog", "cow"), seed=0), model(named("bird", "cow", "cat", "fly"), seed=1)
    done, after, source, before = copied(new, old)
    assert (done.classes, done.new_classes) == (["cow", "cat"], ["bird", "fly"])
    heads = [name for name in after if name.startswith("class_heads.")]
    assert done.by_class == heads
    assert len(heads) == 4  # two layers, weight and bias
    for name in heads:
        assert torch.equal(after[name][1], source[name][2])
        assert torch.equal(after[name][2], source[name][0])
        assert torch.equal(after[name][[0, 3]], before[name][[0, 3]])


def test_as_many_classes_of_other_names_are_not_taken_for_the_same():
    old, new = model(named("a", "b"), seed=0), model(named("b", "z"), seed=1)
    _, after, source, before = copied(new, old)
    assert torch.equal(after["class_heads.0.weight"][0], source["class_heads.0.weight"][1])
    assert torch.equal(after["class_heads.0.weight"][1], before["class_heads.0.weight"][1])


def test_more_queries_extend_the_old_ones():
    old, new = model(named("a"), seed=0), model(named("a"), seed=1, num_queries=20)
    done, after, source, before = copied(new, old)
    assert done.by_row == {"query_position": (12, 20), "query_content": (12, 20)}
    assert torch.equal(after["query_content"][:12], source["query_content"])
    assert torch.equal(after["query_content"][12:], before["query_content"][12:])


def test_fewer_queries_are_the_first():
    old, new = model(named("a"), seed=0), model(named("a"), seed=1, num_queries=5)
    _, after, source, _ = copied(new, old)
    assert torch.equal(after["query_position"], source["query_position"][:5])


def test_what_has_another_shape_starts_anew_and_is_named():
    old, new = model(named("a"), seed=0, mask_hidden_dim=32), model(named("a"), seed=1)
    done, after, _, before = copied(new, old)
    assert done.initial["mask_head.layers.0.weight"] == "[32, 32] in the file, [64, 32] in the model"
    assert torch.equal(after["mask_head.layers.0.weight"], before["mask_head.layers.0.weight"])


@pytest.mark.parametrize("name", ["solq", "soit"])
def test_the_proposals_keep_telling_any_object_from_background(name):
    config = replace(TINY[name], backbone=SMALLEST, **({"two_stage": True} if name == "solq" else {}))
    old, new = (build(replace(config, num_classes=len(names)), named(*names)) for names in (("a", "b", "c"), ("c", "d")))
    done, after, source, _ = copied(new, old)
    assert done.by_row["proposal_class_head.weight"] == (3, 2)
    assert torch.equal(after["proposal_class_head.weight"][0], source["proposal_class_head.weight"][0])


def test_only_a_tensor_of_queries_is_taken_in_part():
    old, new = (model(named("a"), two_stage=True, hidden_dim=width) for width in (32, 48))
    done, after, _, before = copied(new, old)
    assert not done.by_row
    assert torch.equal(after["proposals.query_norm.bias"], before["proposals.query_norm.bias"])
    assert done.initial["proposals.query_norm.bias"] == "[64] in the file, [96] in the model"


def test_what_is_only_in_one_of_them_is_named():
    old, new = model(named("a"), seed=0, decoder_layers=3), model(named("a"), seed=1, encoder_layers=2)
    done, *_ = copied(new, old)
    assert "decoder.2.cross_norm.weight" in done.unused
    assert done.initial["encoder.layers.1.norm.weight"] == "not in the file"


def test_the_report_says_all_of_it():
    old, new = model(named("cat", "dog"), decoder_layers=3), model(named("dog", "fox"), num_queries=20, encoder_layers=2)
    report = str(copied(new, old)[0])
    for line in (
        "copied completely: ",
        "classes in both: dog",
        "new classes: fox",
        "extended: query_content, 12 -> 20 rows",
    ):
        assert line in report
    assert "not copied: encoder.layers.1." in report
    assert "not in the model: decoder.2." in report


def test_nothing_shares_memory_with_the_weights_given():
    old, new = model(named("a"), seed=0), model(named("a"), seed=1)
    _, after, source, _ = copied(new, old)
    after["level_embedding"].add_(1)
    assert not torch.equal(after["level_embedding"], source["level_embedding"])
