"""Options from the command line, and that questions are asked where only torch, timm and numpy are installed."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from bare_environment import REPOSITORY, run_bare

from benchmarks.harness import read_rows
from benchmarks.options import parse_options


@dataclass(frozen=True)
class Everything:
    """What an option can be.

    The second paragraph."""

    needed: int
    """No default: 100 % required."""
    rate: float = 0.5
    """A rate that takes
    two lines."""
    name: str = ""
    undocumented: bool = False
    folder: Path | None = None
    """None: nowhere."""
    kind: Literal["one", "two"] = "one"
    level: Literal[0, 1] | None = 1
    sizes: tuple[int, ...] = (1, 2)
    """Several."""
    kinds: tuple[Literal["a", "b"], ...] = ("a",)
    compile: bool = True

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"--rate {self.rate}: at least 0")


def parsed(*words: str) -> Everything:
    return parse_options(Everything, "python -m x", words)


def test_defaults_are_the_dataclasss():
    assert parsed("--needed", "3") == Everything(3)


def test_every_type_is_read():
    words = "--needed -3 --rate 1e-3 --name x-y --undocumented --folder a/b --kind two --level None --sizes 4 5 6"
    found = parsed(*words.split(), "--kinds", "b", "a", "--no-compile")
    assert found == Everything(-3, 1e-3, "x-y", True, Path("a/b"), "two", None, (4, 5, 6), ("b", "a"), False)
    assert parsed("--needed", "1", "--level", "0", "--folder", "None").level == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "--needed"),
        ("--needed x", "--needed: 'x' is no INTEGER"),
        ("--needed", "--needed: expected one argument"),
        ("--needed 1 --rate fast", "--rate: 'fast' is no NUMBER"),
        ("--needed 1 --rate -1", "--rate -1.0: at least 0"),
        ("--needed 1 --kind three", "--kind: 'three' is none of one, two"),
        ("--needed 1 --level 2", "--level: '2' is none of 0, 1"),
        ("--needed 1 --sizes", "--sizes"),
        ("--needed 1 --sizes 1 x", "--sizes: 'x' is no INTEGER"),
        ("--needed 1 --kinds a c", "--kinds: 'c' is none of a, b"),
        ("--need 1", "--need"),
        ("--needed 1 --what", "--what"),
        ("--needed 1 stray", "stray"),
    ],
)
def test_bad_words_are_refused_by_name(words, expected, capsys):
    with pytest.raises(ValueError) as error:
        parsed(*words.split())
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert capsys.readouterr() == ("", "")


def test_help_has_docstrings_and_defaults(capsys):
    with pytest.raises(SystemExit, match="0"):
        parsed("--help")
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "What an option can be. The second paragraph.",
        "--needed INTEGER No default: 100 % required. (required)",
        "A rate that takes two lines. (default: 0.5)",
        "--name TEXT (default: nothing)",
        "--undocumented, --no-undocumented (default: False)",
        "--folder PATH|None None: nowhere. (default: None)",
        "--kind one|two (default: one)",
        "Several. (default: 1 2)",
    ):
        assert part in text, part


def test_the_noises_are_measured_in_the_smallest_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # what is compiled is not the question here
    output = tmp_path / "noise.jsonl"
    words = ["noise", "--megabytes", "1", "--rounds", "1", "--device", "cpu", "--output", str(output)]
    text = run_bare([*words, "--parts", "gaussian", "norm_noise"])
    assert "noise: norm_noise, gaussian" in text and "operator | " in text
    assert "othing on a GPU was measured" in text
    assert {row["part"] for row in read_rows(output)} >= {"gaussian", "norm_noise, optimal_q, and back"}


@pytest.mark.parametrize("words", [(), ("PART=speed",)])
def test_make_gpu_names_its_parts(words):
    # `make test` runs this, and would have its own flags in the environment: then make says which folder it is in.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    words = ("make", "gpu", *words)
    done = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: make gpu PART=check, PART=noise, PART=train or PART=cifar\n")
