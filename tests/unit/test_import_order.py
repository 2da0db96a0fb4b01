"""The import order of DESIGN.md and the sizes of STYLE.md, read from the source: imports inside functions count too."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("data_prep", "pipeline", "jobs", "benchmarks")
MAX_FUNCTION_LINES, MAX_MODULE_LINES = 60, 400

# A unit may import units that stand in an earlier line, and those of its own line where that makes no circle.
ORDER = (
    ("data_prep.manifest",),
    (
        "pipeline.noise",
        "pipeline.sections",
        "pipeline.progress",
        "pipeline.pieces",
        "pipeline.patches",
        "pipeline.interrupt",
        "pipeline.watchdog",
        "pipeline.agreement",
        "pipeline.ledger",
        "pipeline.tracing",
        "pipeline.loss",
        "pipeline.moving_averages",
        "pipeline.intervals",
        "pipeline.precision",
        "pipeline.published",
        "pipeline.result_file",
        "pipeline.answers",
        "pipeline.page",
    ),
    (
        "pipeline.weights",
        "pipeline.freezing",
        "pipeline.models",
        "pipeline.data",
        "pipeline.optim",
        "pipeline.parallel",
        "pipeline.engine",
        "pipeline.checkpoint",
        "pipeline.metrics",
        "pipeline.flops",
    ),
    ("pipeline.accuracy", "pipeline.trained"),
    ("pipeline.evaluator",),
    ("pipeline.evaluate", "pipeline.evaluation_table"),
    ("pipeline.audit", "pipeline.information", "pipeline.variants"),
    ("pipeline.config",),
    ("pipeline.recipes",),
    ("pipeline.state",),
    ("pipeline.build",),
    ("pipeline.micro_batch", "pipeline.step"),
    ("pipeline.train",),
    ("pipeline.report",),
    ("pipeline.commands", "pipeline.doctor"),
    ("pipeline.__main__",),
    ("benchmarks",),
)
LEVELS = {unit: level for level, units in enumerate(ORDER) for unit in units}
LEAVES = ("data_prep.manifest", *ORDER[1])
# Names that would hide a library from a module that is run as a script in their folder.
HIDING = {"webdataset.py", "ffcv.py", "torch.py", "timm.py"}


def modules_of(root: Path) -> dict[str, Path]:
    """Dotted name -> file, of the packages that stand under root."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """All that a module imports, anywhere in it: our modules by full name, others by their first part."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                base = ".".join(package[: len(package) - node.level + 1] + ([base] if base else []))
            # `from pipeline import train` imports a module, `from pipeline.train import build` a name in one.
            found |= {full if (full := f"{base}.{alias.name}") in modules else base for alias in node.names}
    return {own if (own := longest(i, modules)) else i.split(".")[0] for i in found}


def longest(name: str, modules: dict[str, Path]) -> str | None:
    parts = name.split(".")
    return next((p for end in range(len(parts), 0, -1) if (p := ".".join(parts[:end])) in modules), None)


def unit_of(module: str) -> str:
    """The line of ORDER speaks of packages inside `pipeline` as wholes."""
    parts = module.split(".")
    return parts[0] if parts[0] == "benchmarks" else ".".join(parts[:2])


def order_faults(root: Path) -> list[str]:
    modules = modules_of(root)
    imports = {name: imports_of(name, path, modules) - {name} for name, path in modules.items()}
    faults = []
    for name, found in imports.items():
        package, ours = name.split(".")[0], {i for i in found if i.split(".")[0] in PACKAGES}
        if package == "data_prep":
            faults += [f"{name} imports {i}" for i in ours if not i.startswith("data_prep")]
            faults += [f"{name} imports torch" for i in found if i in ("torch", "torchvision", "timm", "numba")]
            if "ffcv" in found and name != "data_prep.beton_reader":
                faults.append(f"{name} imports ffcv, which brings torch")
        elif package == "jobs":
            allowed = ("jobs", "pipeline.recipes")
            faults += [f"{name} imports {i}" for i in ours if i not in allowed and not i.startswith("jobs.")]
        else:
            faults += pipeline_faults(name, ours)
    faults += [f"data_prep.manifest imports {i}" for i in sorted(imports.get("data_prep.manifest", ())) if not_std(i)]
    faults += [f"{' -> '.join(circle)} is a circle" for circle in circles(imports)]
    faults += [f"{path.relative_to(root)} hides a library" for path in modules.values() if path.name in HIDING]
    return sorted(set(faults))


def pipeline_faults(name: str, ours: set[str]) -> list[str]:
    """Of a module of pipeline or benchmarks."""
    unit, faults = unit_of(name), []
    if unit == "pipeline":
        return [f"pipeline/__init__.py imports {i}" for i in ours]
    if unit not in LEVELS:
        return [f"{unit} has no place in ORDER: give it one, here and in DESIGN.md"]
    for imported in ours - {"pipeline"}:
        other = unit_of(imported)
        if imported.startswith("data_prep"):
            if imported != "data_prep.manifest" and unit != "benchmarks":
                faults.append(f"{name} imports {imported}: of data_prep only the manifest")
        elif other not in LEVELS:
            faults.append(f"{name} imports {imported}")
        elif other != unit and (LEVELS[other] > LEVELS[unit] or unit in LEAVES):
            faults.append(f"{name} imports {imported}, which comes after it")
    return faults


def not_std(name: str) -> bool:
    return name.split(".")[0] not in sys.stdlib_module_names


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """One circle of imports, if there is any, by depth-first search."""
    done: set[str] = set()

    def visit(name: str, above: list[str]) -> list[str] | None:
        if name in above:
            return [*above[above.index(name) :], name]
        if name in done or name not in imports:
            return None
        for imported in sorted(imports[name]):
            if circle := visit(imported, [*above, name]):
                return circle
        done.add(name)
        return None

    return [circle for name in sorted(imports) if (circle := visit(name, []))][:1]


def size_faults(root: Path) -> list[str]:
    faults = []
    for path in modules_of(root).values():
        text, where = path.read_text(), path.relative_to(root)
        if (lines := len(text.splitlines())) >= MAX_MODULE_LINES:
            faults.append(f"{where} has {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines >= MAX_FUNCTION_LINES:
                    faults.append(f"{where}: {node.name} has {lines} lines")
    return faults


def imported_at_the_top(path: Path) -> set[str]:
    """First parts of what a module imports when it is imported itself; not inside functions or for types alone."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def test_imports_go_one_way():
    assert order_faults(ROOT) == []


def test_functions_and_modules_are_small():
    assert size_faults(ROOT) == []


def test_the_checker_sees_the_whole_tree():
    modules = modules_of(ROOT)
    for name in ("data_prep.manifest", "pipeline.noise.reference", "pipeline.train", "pipeline.recipes", "jobs.launch"):
        assert name in modules
    found = imports_of("pipeline.train", modules["pipeline.train"], modules)
    assert {"pipeline.checkpoint", "pipeline.build", "timm"} <= found
    # Imports inside functions.
    assert "pipeline.recipes" in imports_of("jobs.training", modules["jobs.training"], modules)
    assert "ffcv" in imports_of("data_prep.beton_reader", modules["data_prep.beton_reader"], modules)


@pytest.mark.parametrize("path", ["pipeline/recipes/__init__.py", "pipeline/__main__.py", "pipeline/doctor.py"])
def test_what_must_run_without_torch_imports_the_standard_library_alone(path):
    """Job launchers list recipes, and the doctor looks at machines, where nothing is installed."""
    assert not {name for name in imported_at_the_top(ROOT / path) if not_std(name)}


GOOD = {
    "data_prep/__init__.py": "",
    "data_prep/manifest.py": "import json",
    "data_prep/beton_reader.py": "def f():\n    import ffcv\n    from data_prep.manifest import x",
    "pipeline/__init__.py": "",
    "pipeline/noise/__init__.py": "",
    "pipeline/noise/config.py": "import torch",
    "pipeline/noise/inject.py": "from pipeline.noise.config import x\nfrom . import config",
    "pipeline/data/__init__.py": "",
    "pipeline/data/loader.py": "from data_prep.manifest import x\nfrom ..noise.config import x",
    "pipeline/evaluate.py": "from pipeline.data.loader import x\nfrom pipeline import sections",
    "pipeline/sections.py": "import json",
    "pipeline/config.py": "from pipeline.evaluate import x",
    "pipeline/recipes/__init__.py": "",
    "pipeline/train.py": "from pipeline.config import x",
    "jobs/__init__.py": "",
    "jobs/launch.py": "from pipeline.recipes import recipe_names\nfrom jobs import launch",
    "benchmarks/__init__.py": "",
    "benchmarks/loader.py": "import pipeline.train\nfrom data_prep.manifest import x",
}


def tree(root: Path, changes: dict[str, str]) -> Path:
    for name, text in (GOOD | changes).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def test_a_good_tree_has_no_fault(tmp_path):
    assert order_faults(tree(tmp_path, {})) == []
    assert size_faults(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("data_prep/plan.py", "from pipeline.sections import x", "data_prep.plan imports pipeline.sections"),
        ("data_prep/plan.py", "import torch.nn", "data_prep.plan imports torch"),
        ("data_prep/plan.py", "def f():\n    from torch import nn", "data_prep.plan imports torch"),
        ("data_prep/plan.py", "import ffcv.fields", "data_prep.plan imports ffcv"),
        ("data_prep/manifest.py", "import numpy", "data_prep.manifest imports numpy"),
        ("data_prep/manifest.py", "from data_prep.beton_reader import x", "data_prep.manifest imports data_prep.beton"),
        ("pipeline/data/order.py", "from data_prep.beton import x", "of data_prep only the manifest"),
        ("pipeline/data/order.py", "def f():\n    from pipeline.train import x", "pipeline.data.order imports"),
        ("pipeline/data/order.py", "from pipeline import evaluate", "imports pipeline.evaluate, which comes after"),
        ("pipeline/data/order.py", "from .. import config", "imports pipeline.config, which comes after it"),
        ("pipeline/noise/config.py", "from pipeline.data.loader import x", "imports pipeline.data.loader"),
        ("pipeline/noise/config.py", "from pipeline import sections", "imports pipeline.sections, which comes after"),
        ("pipeline/sections.py", "import pipeline.noise.config", "imports pipeline.noise.config, which comes after"),
        ("pipeline/progress.py", "from pipeline.sections import x", "imports pipeline.sections, which comes after it"),
        ("pipeline/models.py", "from pipeline.optim import x\n#", "pipeline.models imports pipeline"),
        ("pipeline/evaluate.py", "from pipeline.config import x", "imports pipeline.config, which comes after it"),
        ("pipeline/config.py", "from pipeline.recipes import x", "imports pipeline.recipes, which comes after it"),
        ("pipeline/train.py", "import benchmarks.loader", "imports benchmarks.loader, which comes after it"),
        ("pipeline/train.py", "import jobs.launch", "pipeline.train imports jobs.launch"),
        ("pipeline/newcomer.py", "", "pipeline.newcomer has no place in ORDER"),
        ("pipeline/__init__.py", "from pipeline.train import x", "pipeline/__init__.py imports pipeline.train"),
        ("pipeline/data/ffcv.py", "", "pipeline/data/ffcv.py hides a library"),
        ("data_prep/webdataset.py", "", "data_prep/webdataset.py hides a library"),
        ("jobs/launch.py", "from pipeline.config import x", "jobs.launch imports pipeline.config"),
        ("jobs/launch.py", "import pipeline.recipes.demo", "jobs.launch imports pipeline.recipes.demo"),
        ("jobs/launch.py", "from data_prep.manifest import x", "jobs.launch imports data_prep.manifest"),
        ("pipeline/noise/config.py", "from pipeline.noise.inject import x", "is a circle"),
    ],
)
def test_each_breach_is_found(tmp_path, name, text, fault):
    extra = {"pipeline/recipes/demo.py": "", "pipeline/optim.py": "", "pipeline/models.py": ""}
    if name == "pipeline/models.py":  # a circle within one line of ORDER
        extra, fault = {"pipeline/recipes/demo.py": "", "pipeline/optim.py": "import pipeline.models"}, "is a circle"
    found = order_faults(tree(tmp_path, extra | {name: text}))
    assert any(fault in line for line in found), found


def test_long_functions_and_modules_are_found(tmp_path):
    body = "\n".join(["    pass"] * 59)
    tree(tmp_path, {"pipeline/train.py": f"class C:\n    def f(self):\n{body.replace('    ', '        ')}"})
    assert size_faults(tmp_path) == ["pipeline/train.py: f has 60 lines"]
    tree(tmp_path, {"pipeline/train.py": "x = 1\n" * 399})
    assert size_faults(tmp_path) == ["pipeline/train.py has 400 lines"]
