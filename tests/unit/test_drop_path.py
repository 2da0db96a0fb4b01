"""Drop path keyed by sample: timm's arithmetic and mean, whatever the ranks, the micro-batch or recomputation."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from pipeline.noise.drop_path import DropPathKeys, KeyedDropPath
from pipeline.noise.reference import Purpose, random_words, stream_of

SEED, EPOCH = 3, 5
IDS = torch.tensor([7, 0, 1281166, 1 << 33, 8, 12])


def vit(rate: float = 0.5, **options) -> nn.Module:
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 2, "num_classes": 4}
    return timm.create_model("vit_tiny_patch16_224", drop_path_rate=rate, **small, **options)


def keyed(model: nn.Module, ids: Tensor = IDS, seed: int = SEED, epoch: int = EPOCH) -> tuple[nn.Module, DropPathKeys]:
    keys = DropPathKeys(model, seed)
    keys.set_batch(ids, epoch)
    return model.train(), keys


def pictures(n: int = 6) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def masks(ids: Tensor, rate: float = 0.5, seed: int = SEED, epoch: int = EPOCH, site: str = "0") -> Tensor:
    """What one site multiplies each sample by: (B,)."""
    holder = nn.ModuleDict({site: DropPath(rate)})
    keyed(holder, ids, seed, epoch)
    return holder[site](torch.ones(len(ids), 2, 3))[:, 0, 0]


def test_state_dict_keys_and_evaluation_stay_timm_s():
    plain, model = vit(), vit()
    keyed(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not any(isinstance(module, DropPath) for module in model.modules())
    assert sum(isinstance(module, KeyedDropPath) for module in model.modules()) == 4  # the first block's rate is 0
    assert torch.equal(model.eval()(pictures()), plain.eval()(pictures()))


def test_a_model_without_drop_path_stays_as_it_is():
    model = vit(rate=0.0)
    before = str(model)
    DropPathKeys(model, SEED)
    assert str(model) == before


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_as_many_are_dropped_as_timm_drops_and_the_mean_stays(rate):
    found = masks(torch.arange(20_000), rate)
    assert set(found.tolist()) == {0.0, torch.ones(()).div(1 - rate).item()}
    error = math.sqrt(rate * (1 - rate) / 20_000)
    assert abs((found == 0).float().mean() - rate) < 5 * error
    assert abs(found.mean() - 1) < 5 * error / (1 - rate)


def test_the_arithmetic_is_timm_s_for_the_same_mask(monkeypatch):
    words = random_words(1, IDS, SEED, torch.tensor(EPOCH), stream_of("0", Purpose.DROP_PATH))[:, 0]
    kept = (words >= round(0.3 * 2**32)).float()
    assert 0 < kept.sum() < len(IDS)
    monkeypatch.setattr(Tensor, "bernoulli_", lambda self, p: self.copy_(kept.view(self.shape)))
    for scale in (True, False):
        x = torch.randn(6, 4, 3)
        holder = nn.Sequential(DropPath(0.3, scale_by_keep=scale)).train()
        wanted = holder(x)
        assert torch.equal(keyed(holder)[0](x), wanted)


def test_masks_differ_by_site_epoch_seed_and_sample():
    ids = torch.arange(64)
    first = masks(ids)
    others = [masks(ids, seed=SEED + 1), masks(ids, epoch=EPOCH + 1), masks(ids, site="1"), masks(ids + 64)]
    assert all(10 < (first != other).sum() < 54 for other in others)


# Never edit these: a run resumed by a later version must drop the same.
def test_golden_masks():
    dropped = masks(torch.arange(24), 0.5, 7, 3, "blocks-1-drop_path1") == 0
    assert "".join(map(str, dropped.int().tolist())) == "100111011001101000101111"


def test_a_sample_s_result_depends_on_itself_alone():
    """Any micro-batch, any order: as two ranks, or accumulation, or a resumed run would have it."""
    model, keys = keyed(vit())
    x = pictures()
    whole = model(x)
    for part in (slice(0, 3), slice(3, 6), slice(1, 2), torch.tensor([4, 0, 5])):
        keys.set_batch(IDS[part], EPOCH)
        torch.testing.assert_close(model(x[part]), whole[part], rtol=0, atol=1e-6)
    keys.set_batch(IDS, EPOCH + 1)
    assert not torch.allclose(model(x), whole, atol=1e-3)


def test_recomputing_a_block_drops_the_same():
    """Activation checkpointing: the same gradients, to the bit."""
    gradients = []
    for recomputed in (False, True):
        model, _ = keyed(vit())
        model.set_grad_checkpointing(recomputed)
        torch.manual_seed(int(recomputed))  # torch's generator has no part in it
        model(pictures()).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_compiled_model_is_compiled_once_and_drops_the_same():
    model, keys = keyed(vit())
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for epoch in range(12):  # past the limit of recompilations
        keys.set_batch(IDS + epoch, epoch)
        assert torch.equal(compiled(pictures()), model(pictures()))
    assert counter.frame_count == 1


def test_resnets_drop_path_too():
    model = timm.create_model("resnet18", num_classes=4, drop_path_rate=0.5)
    keyed(model)
    assert sum(isinstance(module, KeyedDropPath) for module in model.modules()) == 7
    model(pictures()).sum().backward()


def test_other_rows_than_samples_are_refused_in_one_line():
    model, keys = keyed(vit())
    keys.set_batch(IDS[:4], EPOCH)
    with pytest.raises(ValueError, match=r"drop path at blocks\.1\.drop_path1: 6 rows, 4 sample ids") as error:
        model(pictures())
    assert "\n" not in str(error.value)


def test_a_copy_of_the_model_has_masks_of_its_own():
    """As the twin that evaluates the average has: it is no hidden part of the first."""
    model, keys = keyed(vit())
    twin = copy.deepcopy(model)
    keys.set_batch(IDS[:2], EPOCH)
    assert twin(pictures()).shape == (6, 4) and model(pictures(2)).shape == (2, 4)


def test_equal_hashes_of_two_sites_get_streams_of_their_own(monkeypatch):
    monkeypatch.setattr("pipeline.noise.drop_path.stream_of", lambda name, purpose: name.count("'"))
    model, _ = keyed(vit())
    streams = [module.stream for module in model.modules() if isinstance(module, KeyedDropPath)]
    assert streams == [0, 1, 2, 3]
