"""Configuration as JSON: every recipe comes back equal; what is unknown, missing or no choice is refused by name."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from pipeline.config import TrainConfig
from pipeline.evaluate import EvaluateConfig
from pipeline.noise.config import NoiseConfig
from pipeline.recipes import all_recipes
from pipeline.sections import from_json, to_json


@pytest.mark.parametrize("name", sorted(all_recipes()))
def test_every_recipe_comes_back_equal(name):
    config = all_recipes()[name].config
    text = json.dumps(to_json(config))
    assert from_json(TrainConfig, json.loads(text), "config.json") == config
    assert hash(config.augment) == hash(from_json(TrainConfig, json.loads(text), "x").augment)  # tuples, not lists


def test_every_option_away_from_its_default_comes_back_equal():
    config = EvaluateConfig(
        checkpoint=Path("runs/a"),
        data="val.manifest.json",
        noise=NoiseConfig(kind="gaussian", strength=0.1, site="blocks.1", during="both", group_size=None),
        orders=("shuffled",),
        output=Path("out.json"),
    )
    assert from_json(EvaluateConfig, json.loads(json.dumps(to_json(config))), "x") == config


def test_unknown_and_missing_options_are_refused_with_their_section():
    body = to_json(TrainConfig())
    from_json(TrainConfig, body, "config.json")
    body["optim"]["momentun"] = 0.9
    with pytest.raises(ValueError, match=r"config\.json: optim has options .* does not know: momentun"):
        from_json(TrainConfig, body, "config.json")
    del body["optim"]["momentun"], body["optim"]["lr"], body["seed"]
    with pytest.raises(ValueError, match=r"config\.json lacks options .*: seed"):
        from_json(TrainConfig, body, "config.json")
    body["seed"] = 0
    with pytest.raises(ValueError, match=r"config\.json: optim lacks options .*: lr"):
        from_json(TrainConfig, body, "config.json")


def test_a_value_out_of_range_is_refused_by_its_own_section():
    body = to_json(TrainConfig())
    body["epochs"] = 0
    with pytest.raises(ValueError, match="epochs is 0"):
        from_json(TrainConfig, body, "config.json")


@pytest.mark.parametrize(
    ("section", "option"),
    [("data", "format"), ("optim", "optimizer"), ("parallel", "strategy"), ("loss", "kind"), ("noise", "kind")],
)
def test_a_value_that_is_no_choice_is_refused(section, option):
    body = to_json(TrainConfig())
    body[section][option] = "nonsense"
    with pytest.raises(ValueError, match=rf"config\.json: {section}: {option} is 'nonsense': use one of "):
        from_json(TrainConfig, body, "config.json")


@dataclass(frozen=True)
class Inner:
    pair: tuple[float, float] = (0.1, 0.2)


@dataclass(frozen=True)
class Outer:
    path: Path | None = None
    choice: Literal["a", "b"] | None = None
    options: dict[str, int | str] = dataclasses.field(default_factory=dict)
    inner: Inner = dataclasses.field(default_factory=Inner)
    many: tuple[str, ...] = ()


def test_types_come_back():
    outer = Outer(Path("x"), "b", {"a": 1, "b": "c"}, Inner((1.0, 2.0)), ("p", "q"))
    assert to_json(outer) == {
        "path": "x",
        "choice": "b",
        "options": {"a": 1, "b": "c"},
        "inner": {"pair": [1.0, 2.0]},
        "many": ["p", "q"],
    }
    for section in (outer, Outer()):
        assert from_json(Outer, json.loads(json.dumps(to_json(section))), "x") == section
