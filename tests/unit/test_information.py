"""dS beside measured information: on pictures whose information is known, and by the command on a whole checkpoint."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numbers_reader import InMemoryPictures
from safetensors.torch import save_file

from pipeline import checkpoint as ckpt
from pipeline.__main__ import main
from pipeline.checkpoint import WEIGHTS_NAME
from pipeline.config import TrainConfig
from pipeline.data.augment import AugmentConfig
from pipeline.data.loader import DataConfig
from pipeline.information import (
    EntropyConfig,
    InformationRow,
    SiteFeatures,
    caveats,
    definition,
    measure,
    measure_information,
    noises,
    pool,
)
from pipeline.models import ModelConfig, create_model
from pipeline.noise import entropy
from pipeline.noise.config import NoiseConfig
from pipeline.noise.entropy import Interval
from pipeline.noise.inject import NoiseInjector
from pipeline.parallel import Ranks
from pipeline.sections import to_json

ALONE = Ranks(0, 1, launched=False)
N, CLASSES = 480, 4
CONFIG = EntropyConfig(Path("run"), Path("data"), batch=48, workers=0)


class Pictures(InMemoryPictures):
    """4 x 4 pictures in memory, each a weak sign of its class under strong noise."""

    def __init__(self) -> None:
        rng = np.random.RandomState(0)
        self.labels = rng.permutation(np.arange(N) % CLASSES).astype(np.int64)
        self.classes = tuple("abcd")
        signs = rng.randint(0, 256, (CLASSES, 4, 4, 3))
        mixed = 0.15 * signs[self.labels] + 0.85 * rng.randint(0, 256, (N, 4, 4, 3))
        self.pixels = mixed.round().astype(np.uint8)


class Plain(torch.nn.Module):
    """What arrives at `inner` is the normalised picture, flat."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
        self.inner = torch.nn.Linear(48, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.flatten(1))


def site(noise: NoiseConfig, batch: int = 48) -> SiteFeatures:
    model = Plain().eval()
    return SiteFeatures(model, NoiseInjector(model, replace(noise, during="eval"), 4, seed=0), Pictures(), batch, 0)


def normalised(reader: Pictures) -> np.ndarray:
    return ((reader.pixels / 255 - 0.5) / 0.25).transpose(0, 3, 1, 2).reshape(N, -1)


@pytest.mark.parametrize("where", ["inner", "image"])
def test_features_are_those_of_each_sample_whatever_the_order(where):
    own = site(NoiseConfig("optimal_q", site=where, group_size=4))
    expected = normalised(own.reader)
    ids = np.random.RandomState(1).permutation(N)
    with own.injector.off():
        np.testing.assert_allclose(own.collect(np.arange(N), 1), expected, atol=1e-6)
        np.testing.assert_allclose(own.collect(ids, 4), expected, atol=1e-6)
    assert own.entries_pooled == 1  # 4 x 4 pictures are as fine as the grid
    mixed = expected[ids].reshape(-1, 4, 48)
    mixed = (mixed + mixed.sum(1, keepdims=True)) / 5
    np.testing.assert_allclose(own.collect(ids, 4)[ids], mixed.reshape(N, 48), atol=1e-6)


def test_class_order_tells_of_the_label_and_shuffling_takes_away():
    """PAPER.md section 5 as information: one dS, positive, and a rise or a fall by the order alone."""
    in_class, shuffled = measure(site(NoiseConfig("optimal_q", site="inner", group_size=10)), CONFIG)
    assert [r.order for r in (in_class, shuffled)] == ["class", "shuffled"]
    assert in_class.entropy_change_nats == shuffled.entropy_change_nats == pytest.approx(9 * math.log(11))
    assert in_class.positive and shuffled.positive and in_class.transductive and shuffled.transductive
    assert in_class.change.low > 0 > shuffled.change.high
    assert in_class.noisy_probe_bound.nats > in_class.clean_probe_bound.nats > shuffled.noisy_probe_bound.nats
    assert in_class.class_mate_share > 0.95 and shuffled.class_mate_share < 0.4
    assert in_class.disagreement is None
    assert "positive by definition (dS = 21.58)" in shuffled.disagreement and "fell" in shuffled.disagreement
    for row in (in_class, shuffled):
        assert row.axes == 48 * 10 // (10 * CLASSES) == 12  # 48 groups of 4 classes
        assert row.label_entropy_nats == pytest.approx(math.log(CLASSES)) and row.num_images == N
        assert json.loads(json.dumps(row.to_json()))["disagreement"] == row.disagreement


@pytest.mark.parametrize(
    "noise", [NoiseConfig("gaussian", 3.0), NoiseConfig("salt_and_pepper", 0.7)], ids=lambda n: n.kind
)
def test_noise_of_each_sample_alone_is_harmful_and_measured_so(noise):
    (row,) = measure(site(noise), CONFIG)
    assert (row.order, row.k, row.transductive, row.class_mate_share) == ("manifest", 1, False, None)
    assert row.entropy_change_nats < 0 and not row.positive
    assert row.change.high < 0 and row.disagreement is None
    assert row.axes == 32


def test_a_group_of_one_is_the_plain_model():
    (row,) = measure(site(NoiseConfig("optimal_q", site="inner", group_size=1)), CONFIG)
    assert (row.k, row.entropy_change_nats, row.positive, row.change) == (1, 0.0, False, Interval(0, 0, 0))
    assert row.disagreement is None and row.clean == row.noisy and row.clean_probe_bound == row.noisy_probe_bound


def test_without_a_group_size_the_batch_is_the_group():
    in_class, _ = measure(site(NoiseConfig("optimal_q", site="inner", group_size=None), batch=10), CONFIG)
    fixed, _ = measure(site(NoiseConfig("optimal_q", site="inner", group_size=10)), CONFIG)
    assert in_class.k == fixed.k == 10
    assert in_class.noisy.nats == pytest.approx(fixed.noisy.nats, abs=1e-6)


def row(kind: str, change: tuple[float, float, float], ds: float) -> InformationRow:
    still = Interval(1.0, 0.9, 1.1)
    moved = Interval(*change)
    return InformationRow(
        kind, None, 10, "class", 1.0, True, 50, 3, ds, "entry", ds > 0, 2.3, still, still, moved, still, still
    )


@pytest.mark.parametrize(
    ("change", "ds", "words"),
    [
        ((0.2, 0.1, 0.3), 5.0, None),
        ((-0.2, -0.3, -0.1), -5.0, None),
        ((0.0, -0.1, 0.1), -5.0, None),
        ((0.0, 0.0, 0.0), 0.0, None),
        ((0.05, -0.01, 0.11), 5.0, "positive by definition (dS = 5), but the measured information .* did not rise"),
        ((-0.2, -0.3, -0.1), 5.0, "positive by definition .* fell (-0.200 nats, from -0.300 to -0.100;"),
        ((0.2, 0.1, 0.3), -5.0, "harmful by definition (dS = -5), but .* rose (+0.200 nats, from +0.100 to +0.300;"),
        ((0.2, 0.1, 0.3), 0.0, "harmful by definition .* rose"),
    ],
)
def test_the_sentence_stands_where_they_disagree_and_nowhere_else(change, ds, words):
    found = row("optimal_q", change, ds).disagreement
    assert (found is None) == (words is None)
    for part in (words or "").split(" .* "):
        assert part in (found or "")


def test_what_the_definition_does_not_say_stands_beside_every_table():
    for kind, ds, k in (("optimal_q", 5.0, 10), ("gaussian", -5.0, 2)):
        text = " ".join(caveats([row(kind, (0.2, 0.1, 0.3), ds)]))
        assert "depends on Q alone" in text and "unchanged" in text
        assert f"group of {k} would be 'positive' too (dS = {k * math.log(2):.4g} nats" in text


def test_pooled_features_by_shape():
    x = torch.arange(2 * 6 * 3.0).reshape(2, 6, 3)
    pooled, entries = pool(x, 1, image=False)
    assert entries == 5 and torch.equal(pooled, x[:, 1:].double().mean(1))
    maps = torch.randn(2, 3, 4, 4)
    pooled, entries = pool(maps, 0, image=False)
    assert entries == 16 and torch.equal(pooled, maps.double().mean((2, 3)))
    assert torch.equal(pool(maps.permute(0, 2, 3, 1), 0, image=False)[0], pooled)
    fields, entries = pool(torch.randn(2, 3, 32, 32), 0, image=True)
    assert fields.shape == (2, 48) and entries == 64
    picture = torch.zeros(1, 1, 8, 8)
    picture[0, 0, :2, 2:4] = 4.0  # the second of 4 x 4 fields
    assert pool(picture, 0, image=True)[0].tolist()[0] == [0, 4, *[0] * 14]
    assert pool(torch.randn(1, 3, 7, 6), 0, image=True)[0].shape == (1, 3 * 1 * 2)
    with pytest.raises(ValueError, match=r"noise\.site gets \(1, 2, 3, 4, 5\)"):
        pool(torch.zeros(1, 2, 3, 4, 5), 0, image=False)


def test_gaussian_noise_is_weaker_in_a_mean():
    joint = np.eye(3)
    one, per = definition(NoiseConfig("gaussian", 0.5), 1, joint, 2, 1)
    pooled, _ = definition(NoiseConfig("gaussian", 1.0), 1, joint, 2, 4)
    assert one == pooled == entropy.gaussian_change(joint, 2, 0.25)
    assert "2 features" in per


def test_each_level_and_group_size_is_measured_as_evaluation_has_it():
    own = NoiseConfig("circular_shift", 0.1, end_strength=0.4, during="train", group_size=8)
    (found,) = noises(CONFIG, own)
    assert (found.strength, found.end_strength, found.active(training=False)) == (0.4, None, True)
    several = list(noises(replace(CONFIG, levels=(0.1, 0.2), group_sizes=(2, 4)), own))
    assert [(n.strength, n.group_size) for n in several] == [(0.1, 2), (0.1, 4), (0.2, 2), (0.2, 4)]
    (named,) = noises(replace(CONFIG, noise=NoiseConfig("optimal_q", site="inner")), own)
    assert named.kind == "optimal_q"
    with pytest.raises(ValueError, match=r"noise\.kind is none.*name a noise"):
        list(noises(CONFIG, NoiseConfig()))
    with pytest.raises(ValueError, match=r"noise\.strength is 0\.5.*below 0\.5"):
        list(noises(replace(CONFIG, levels=(0.5,)), own))
    with pytest.raises(ValueError, match=r"noise\.group_size is 0: give at least 1"):
        list(noises(replace(CONFIG, group_sizes=(0,)), own))


@pytest.mark.parametrize(
    ("options", "name"),
    [({"batch": 0}, "batch"), ({"workers": -1}, "workers"), ({"axes": 0}, "axes"), ({"orders": ()}, "orders")],
)
def test_out_of_range_options_are_refused_by_name(options, name):
    with pytest.raises(ValueError, match=f"^{name} is"):
        replace(CONFIG, **options)


def test_features_that_are_no_numbers_are_refused():
    own = site(NoiseConfig("optimal_q", site="inner", group_size=4))
    own.reader.pixels[17] = 255  # the one white picture
    own.model.inner.register_forward_pre_hook(
        lambda module, args: (args[0].masked_fill((args[0] > 1.99).all(1, keepdim=True), np.nan),)
    )
    with own.injector.off(), pytest.raises(ValueError, match="features of sample 17 at inner are not finite"):
        own.collect(np.arange(N), 1)


# Whole checkpoints


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder with one checkpoint of an untrained model of the small split's three classes."""
    options = {"depth": 2, "embed_dim": 24, "num_heads": 2, "patch_size": 8}
    config = TrainConfig(
        run=tmp_path / "run",
        model=ModelConfig(name="vit_tiny_patch16_224", options=options),
        data=DataConfig(image_size=32),
        augment=AugmentConfig(randaugment="rand-m9-n2", eval_crop_share=0.5),
        noise=NoiseConfig("circular_shift", 0.3, site="blocks.1.attn", during="train", group_size=4),
    )
    torch.manual_seed(0)
    folder = ckpt.temporary_folder(config.run, 12)
    folder.mkdir(parents=True)
    save_file(create_model(config.model, 3, 32).state_dict(), folder / WEIGHTS_NAME)
    ckpt.write_json(folder / ckpt.CONFIG_NAME, to_json(config) | {"classes": ["ant", "bee", "cat"], "step": 12})
    ckpt.publish_generation(config.run, 12, keep=2)
    return config.run


def test_the_command_prints_the_table_and_writes_it(run, jpg_split, capsys):
    """Untrained, 24 pictures: without a noise that is named, the checkpoint's own is measured."""
    arguments = ["entropy", "--checkpoint", str(run), "--data", str(jpg_split), "--workers", "0"]
    assert main(arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "circul" in printed and "depends on Q alone" in printed and "unchanged" in printed
    body = json.loads((run / "entropy_step12_train_circular_shift_blocks.1.attn.json").read_text())
    assert body["step"] == 12 and body["noise"]["strength"] == 0.3
    assert [(r["order"], r["k"], r["num_images"]) for r in body["rows"]] == [("class", 4, 24), ("shuffled", 4, 24)]
    assert body["rows"][0]["entropy_change_nats"] == pytest.approx(-math.log(0.7**4 - 0.3**4))
    assert body["rows"][0]["axes"] == 2 and body["rows"][0]["positive"] is True
    for found in body["rows"]:
        assert (found["disagreement"] is None) == (found["change"]["low"] > 0)
        assert found["disagreement"] is None or found["disagreement"] in printed
        assert f"{found['noisy']['nats']:.3f} ±" in printed


@pytest.mark.parametrize("form", ["wds", "ffcv"])
def test_several_levels_are_several_rows(run, raw_split, tmp_path, form):
    noise = NoiseConfig("gaussian", 1.0, site="blocks.1")
    output = tmp_path / "own" / "x.json"
    config = EntropyConfig(
        run, str(raw_split), noise, levels=(0.0, 2.0), format=form, batch=10, workers=0, output=output
    )
    off, on = measure_information(config, ALONE)
    assert (off.level, off.entropy_change_nats, off.change) == (0.0, 0.0, Interval(0, 0, 0)) and not off.positive
    assert on.entropy_change_nats < 0 and on.noisy != on.clean == off.clean
    assert len(json.loads(output.read_text())["rows"]) == 2


def test_what_the_command_cannot_measure_is_refused_by_name(run, jpg_split, capsys):
    def refused(*options: str) -> str:
        assert main(["entropy", "--checkpoint", str(run), "--data", str(jpg_split), "--workers", "0", *options]) == 2
        return capsys.readouterr().err

    assert "noise.site means 2 places" in refused("--noise.kind", "optimal_q", "--noise.site", "blocks.*.attn")
    assert "noise.strength is 0.5" in refused("--levels", "0.5")
    message = refused("--group-sizes", "8")
    assert "3 independent samples (groups) of 3 classes" in message and "smaller groups" in message
    assert not list(run.glob("entropy*")), "something was written"
    with pytest.raises(ValueError, match="one process, here are 2 ranks"):
        measure_information(EntropyConfig(run, jpg_split), Ranks(0, 2, launched=True))
