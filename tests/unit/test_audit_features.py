"""Features kept before the noise: the answers are those of whole passes, bit for bit, and the disk is left clean."""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from numbers_reader import InMemoryPictures

from pipeline.audit import features
from pipeline.audit.cut import official_place, stages_of
from pipeline.audit.respondent import Passes, respondent_of
from pipeline.data.order import shuffled_order
from pipeline.noise.config import NoiseConfig

N, SIDE = 37, 32
VIT_SITES = ("blocks.3.attn", "blocks.2", "blocks.0.attn")
RESNET_SITES = ("layer4.1", "layer1.0.conv2")
NOISES = (
    NoiseConfig("optimal_q", during="eval", group_size=5),
    NoiseConfig("circular_shift", 0.3, during="eval", group_size=5, spare_prefix_tokens=False),
    NoiseConfig("gaussian", 0.5, during="eval"),
    NoiseConfig("salt_and_pepper", 0.2, during="eval", group_size=5),
)


class Pictures(InMemoryPictures):
    def __init__(self) -> None:
        rng = np.random.RandomState(0)
        self.labels = rng.permutation(np.arange(N) % 10).astype(np.int64)
        self.pixels = rng.randint(0, 256, (N, SIDE, SIDE, 3)).astype(np.uint8)
        self.classes = tuple("abcdefghij")


def model_of(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "resnet18":
        return timm.create_model(name, num_classes=10, zero_init_last=False).eval()  # else no block does anything
    options = {"depth": 4, "embed_dim": 48, "num_heads": 3, "patch_size": 8, "img_size": SIDE}
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **options).eval()


def passes(scratch: Path, keep_features: bool = True, batch: int = 15) -> Passes:
    return Passes(SIDE, 3, batch, 0, scratch, keep_features)


@pytest.mark.parametrize(("name", "sites"), [("vit", VIT_SITES), ("resnet18", RESNET_SITES)])
def test_answers_are_those_of_whole_passes_to_the_bit(name, sites, tmp_path):
    reader, told = Pictures(), []
    order = np.append(shuffled_order(N, 1)[:23], [8, 3, 8])  # some of them, two of them twice
    with (
        respondent_of(model_of(name), reader, sites, passes(tmp_path), told.append) as kept,
        respondent_of(model_of(name), reader, sites, passes(tmp_path, keep_features=False), told.append) as whole,
    ):
        assert torch.equal(kept.plain_logits, whole.plain_logits)
        assert set(kept.places) == set(sites) and whole.places == {}
        plain = whole.answers(NoiseConfig(), order)
        for noise in (replace(noise, site=site) for site in sites for noise in NOISES):
            one, other = kept.answers(noise, order), whole.answers(noise, order)
            assert one.sample_ids.tolist() == order.tolist()
            for a, b in zip(one.columns(), other.columns(), strict=True):
                assert np.array_equal(a, b), noise
            assert not np.array_equal(one.loss, plain.loss)  # it was noisy
    (line,) = told
    assert line.startswith(f"features of {N} pictures before {sites[0]}") and str(tmp_path) in line


def test_the_noise_is_gone_afterwards(tmp_path):
    model = model_of("vit")
    before = {name: type(module) for name, module in model.named_modules()}
    with respondent_of(model, Pictures(), ["blocks.3.attn"], passes(tmp_path), lambda line: None) as kept:
        kept.answers(NoiseConfig("optimal_q", site="blocks.3.attn", during="eval", group_size=5), np.arange(N))
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_clean_part_runs_once_for_each_picture_whatever_the_sites(tmp_path):
    model, seen = model_of("vit"), Counter()
    for number, block in enumerate(model.blocks):

        def count(module, args, out, number=number) -> None:
            if out.device.type != "meta":  # where shapes alone are asked for
                seen[number] += len(out)

        block.mlp.register_forward_hook(count)
    sites = ["blocks.2", "blocks.3.attn"]
    with respondent_of(model, Pictures(), sites, passes(tmp_path), lambda line: None) as kept:
        first = 15  # the first batch goes through once more whole, and once by each tail
        assert [seen[number] for number in (0, 1, 2, 3)] == [N + first, N + first, N + 2 * first, N + 3 * first]
        before = Counter(seen)
        for site in sites:
            kept.answers(NoiseConfig("optimal_q", site=site, during="eval", group_size=5), np.arange(N))
        assert seen - before == Counter({3: 2 * N, 2: N})


def test_several_sites_share_one_pass_and_their_size_is_said_first(tmp_path, monkeypatch):
    told, room = [], []
    monkeypatch.setattr("pipeline.audit.respondent.check_room", lambda folder, needed: room.append((len(told), needed)))
    with respondent_of(model_of("vit"), Pictures(), ["blocks.2", "blocks.3.attn"], passes(tmp_path), told.append):
        tokens = SIDE // 8 * (SIDE // 8) + 1
        assert room == [(1, 2 * N * tokens * 48 * 4)]  # asked for after it was told


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_on_the_disk(fails, tmp_path):
    seen = []

    def audited() -> None:
        with respondent_of(model_of("vit"), Pictures(), ["blocks.3.attn"], passes(tmp_path), lambda line: None):
            seen.append(os.listdir(tmp_path))
            if fails:
                raise KeyError("in the middle")

    if fails:
        with pytest.raises(KeyError):
            audited()
    else:
        audited()
    assert seen == [[]]  # not even while it runs: a kill leaves nothing
    assert os.listdir(tmp_path) == []


def test_the_room_that_was_taken_is_given_back(tmp_path):
    def taken() -> set[str]:
        found = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "(deleted)" in line}
        return {line for line in Path("/proc/self/maps").read_text().splitlines() if ".features-" in line} and found

    with respondent_of(model_of("vit"), Pictures(), ["blocks.3.attn"], passes(tmp_path), lambda line: None):
        assert taken()
    assert not taken()


def test_a_full_disk_is_refused_before_the_pass_with_the_mend(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(features.shutil, "disk_usage", lambda folder: usage)
    told = []
    with (
        pytest.raises(OSError, match=r"need 0\.00 GB, 0\.00 GB are free: name a larger disk with --scratch, or fewer"),
        respondent_of(model_of("vit"), Pictures(), ["blocks.3.attn"], passes(tmp_path), told.append),
    ):
        pass
    assert len(told) == 1 and os.listdir(tmp_path) == []


def test_a_disk_that_fills_up_is_refused_too(tmp_path, monkeypatch):
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="--scratch"):
        features.Features(3, {1: (2, 2)}, tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("site", ["image", "patch_embed"])
def test_a_site_with_nothing_before_it_is_passed_whole_and_said_so(site, tmp_path):
    told, reader = [], Pictures()
    with respondent_of(model_of("vit"), reader, [site, "blocks.3.attn"], passes(tmp_path), told.append) as kept:
        assert set(kept.places) == {"blocks.3.attn"}
        noise = NoiseConfig("optimal_q", site=site, during="eval", group_size=5)
        assert len(kept.answers(noise, np.arange(N))) == N
    assert told[0].startswith(f"no features are kept for {site} (nothing comes before it)")


class Other(timm.models.vision_transformer.VisionTransformer):
    """One that goes another way."""

    def forward_features(self, x, **options):
        return super().forward_features(x, **options) * 2


def test_an_unknown_family_is_passed_whole(tmp_path):
    model, told = model_of("vit"), []
    model.__class__ = Other
    assert stages_of(model, {"blocks.3"}) is None
    with respondent_of(model, Pictures(), ["blocks.3"], passes(tmp_path), told.append) as kept:
        assert kept.places == {}
    assert "the parts of a Other are not known" in told[0]


def test_parts_that_are_not_the_model_are_noticed_and_shouted(tmp_path):
    model, told, reader = model_of("vit"), [], Pictures()
    model.register_forward_hook(lambda module, args, out: out + 1)  # what no part knows of
    with respondent_of(model, reader, ["blocks.3"], passes(tmp_path), told.append) as kept:
        assert kept.places == {}
        with torch.no_grad():
            whole = kept.answers(NoiseConfig(), np.arange(N))
        assert kept.plain_logits.argmax(1).tolist() == whole.predicted.tolist()
        assert len(kept.plain_logits) == N and torch.isfinite(kept.plain_logits).all()
    assert told[-1].startswith("WARNING: the parts of this VisionTransformer do not give what the whole model gives")


def test_a_container_as_a_site_stays_whole_and_patterns_begin_at_their_first_module(tmp_path):
    sites = ["layer4", "layer*.0", "layer4.1"]
    with respondent_of(model_of("resnet18"), Pictures(), sites, passes(tmp_path), lambda line: None) as kept:
        names = {site: kept.stages[place].names for site, place in kept.places.items()}
    assert names == {"layer4": ("layer4",), "layer*.0": ("layer1.0",), "layer4.1": ("layer4",)}


def test_the_official_place():
    assert official_place(model_of("vit")) == "blocks.3.attn"
    assert official_place(model_of("resnet18")) == "layer4.1"
    with pytest.raises(ValueError, match="no place for a Linear: name one with --sites"):
        official_place(torch.nn.Linear(2, 2))
