"""`audit --paper`: the official run and the published figures beside one's own."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from audit_runs import refused, sharded
from safetensors.torch import save_file
from small_shards import CLASSES

from pipeline.__main__ import main
from pipeline.audit import subject
from pipeline.models import ModelConfig, Preprocess, create_model
from pipeline.noise.config import NoiseConfig
from pipeline.noise.inject import NoiseInjector
from pipeline.published import HEADLINES


@pytest.fixture
def small_paper(monkeypatch, tmp_path) -> Path:
    """A file of weights of a ViT that is smaller than the paper's, of three classes."""
    monkeypatch.setitem(HEADLINES, 224, HEADLINES[224]._replace(model="vit_tiny_patch16_224"))
    monkeypatch.setattr(subject, "synsets", lambda name: CLASSES)
    torch.manual_seed(0)
    model = create_model(ModelConfig("vit_tiny_patch16_224"), len(CLASSES), 224)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_paper_sets_the_official_run_and_prints_what_is_published(small_paper, named_pictures, tmp_path, capsys):
    data = sharded(named_pictures, tmp_path / "shards")
    words = ["--paper", "224", "--ks", "10", "--shuffles", "1", "--victims", "2", "--workers", "0"]
    assert main(["audit", str(small_paper), str(data), *words]) == 0
    body = json.loads((tmp_path / "audit" / "audit.json").read_text())
    (noise,) = body["noises"]
    assert (noise["kind"], noise["site"], noise["spare_prefix_tokens"]) == ("optimal_q", "blocks.11.attn", True)
    assert body["published"]["marked"] == "published"
    assert body["weights_sha256"] == hashlib.sha256(small_paper.read_bytes()).hexdigest()
    out = capsys.readouterr().out
    assert "normalised by ImageNet's mean and deviation, where timm has 0.5" in " ".join(out.split())
    assert "84.53 % published" in out and "93.87 % published" in out
    page = (tmp_path / "audit" / "audit.html").read_text()
    assert "84.53 (published)" in page and "93.87 (published)" in page


def test_the_published_settings_are_the_paper_s():
    assert {r: tuple(p) for r, p in HEADLINES.items()} == {
        224: ("vit_base_patch16_224.augreg_in21k_ft_in1k", 84.53, 93.87),
        384: ("vit_base_patch16_384.augreg_in21k_ft_in1k", 86.01, 95.65),
    }


def test_paper_reads_pictures_as_the_official_loader_does(small_paper):
    official = subject.published_subject(small_paper, 224)
    assert (official.augment.eval_crop, official.augment.interpolation) == ("squash", "bilinear")
    assert official.data.image_size == 224
    preprocess = Preprocess(official.model, torch.device("cpu"), NoiseInjector(official.model, NoiseConfig(), 224, 0))
    assert preprocess.mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert preprocess.std.tolist() == pytest.approx([0.229, 0.224, 0.225])
    assert create_model(ModelConfig("vit_tiny_patch16_224"), 3, 224).pretrained_cfg["mean"] == (0.5, 0.5, 0.5)


def test_other_weights_and_other_classes_than_the_paper_s(small_paper, raw_split, tmp_path, capsys, monkeypatch):
    error = refused([str(small_paper), str(raw_split), "--paper", "384"], capsys)
    assert "weights.safetensors" in error and "another model" in error
    monkeypatch.setattr(subject, "synsets", lambda name: ("ant", "cow", "cat"))
    error = refused([str(small_paper), str(raw_split), "--paper", "224"], capsys)
    assert "has not ImageNet's classes" in error and "the first that differ are number 1, 'bee' and 'cow'" in error
    assert "name shards of ImageNet's validation pictures" in error
