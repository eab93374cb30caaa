"""Imports go one way, and other rules that can be checked automatically."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
from optional_packages import MODULES

ROOT = Path(__file__).parents[1]
PACKAGE = "transfusion_mot"
FILES = sorted(
    path
    for path in (*ROOT.glob("*.py"), *(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "evaluate").rglob("*.py"))
    if "__pycache__" not in path.parts
)
# Commands beside the modules that they are about.
COMMANDS = ("data.inspect", "data.cache")
# From the top to the ground; each may import what stands below it, and its own layer.
LAYERS = [
    ["train", "sample", "evaluate", "demo", *COMMANDS],
    ["run", "cli"],
    ["pipeline", "sampling"],
    ["training", "reporting"],
    ["evaluation"],
    ["autoencoder"],
    ["codec_training"],
    ["data"],
    ["models"],
    ["diffusion", "losses", "codecs"],
    ["schedulers"],
    ["config"],
    ["config_mistakes"],
    ["config_checks", "cores", "files", "hub_names", "installed", "outputs", "path_options"],
    ["errors", ""],
]


def part_of(module: str) -> str:
    """transfusion_mot.data.images => data; train => train; transfusion_mot => ""; of a command, all of its name."""
    if (command := module.removeprefix(f"{PACKAGE}.")) in COMMANDS:
        return command
    names = module.split(".")
    return names[0] if names[0] != PACKAGE else (names[1] if len(names) > 1 else "")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> list[tuple[str, str]]:
    """(module, name) of everything of ours that a file imports, wherever in the file it does."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [(node.module or "", alias.name) for alias in node.names]
    return [pair for pair in found if pair[0].split(".")[0] in (PACKAGE, "train", "sample", "evaluate")]


def import_graph() -> dict[str, set[str]]:
    """Modules of ours that each module names in its imports."""
    return {
        module_of(path): {name for module, name in imports_of(path) for name in (module, f"{module}.{name}")}
        for path in FILES
    }


def reached(start: str, graph: dict[str, set[str]]) -> set[str]:
    """Modules that an import of `start` imports, directly or not."""
    seen: set[str] = set()
    new = {start}
    while new := {module for one in new for module in graph.get(one, ())} - seen:
        seen |= new
    return seen


def layer_of(part: str) -> int:
    (layer,) = (index for index, parts in enumerate(LAYERS) if part in parts)
    return layer


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path))
def test_imports_go_down(path: Path) -> None:
    here = layer_of(part_of(module_of(path)))
    for module, name in imports_of(path):
        if module == PACKAGE and name and not name.startswith("__"):
            module = f"{PACKAGE}.{name}"
        assert layer_of(part_of(module)) >= here, f"{module_of(path)} imports {module}"
        assert here == 0 or part_of(module) not in LAYERS[0], f"{module_of(path)} imports the script {module}"


def test_there_is_no_cycle_between_modules() -> None:
    graph = import_graph()
    assert [module for module in graph if module in reached(module, graph)] == []


def test_a_pipeline_imports_nothing_of_the_training() -> None:
    found = reached(f"{PACKAGE}.pipeline", import_graph())
    assert f"{PACKAGE}.models.mot" in found
    assert [module for module in found if module.startswith(f"{PACKAGE}.training")] == []


def test_package_files_import_nothing_in_init() -> None:
    for path in (path for path in FILES if path.name == "__init__.py"):
        assert not [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)], path


# What names modalities: the presets, and what reads snapshots and metrics of an earlier version, which had these two.
PRESETS = {f"{PACKAGE}.{name}" for name in ("config", "config_checks", "sampling.convert", "training.metrics")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path))
def test_no_module_names_a_modality_but_text(path: Path) -> None:
    """As a key, an attribute of a mapping of modalities, or what a name is compared with."""
    if module_of(path) in PRESETS:
        return
    named = []
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            # `Literal["image"]` is the type of a medium.
            case ast.Subscript(value, ast.Constant("image" | "speech")) if ast.unparse(value) != "Literal":
                named.append(node.lineno)
            case ast.Compare(comparators=[ast.Constant("image" | "speech"), *_]):
                named.append(node.lineno)
            case ast.Attribute(attr="boi_id" | "eoi_id" | "images_per_row" | "diffusion_loss_weight"):
                named.append(node.lineno)
            case ast.Dict(keys=keys) if any(isinstance(k, ast.Constant) and k.value == "speech" for k in keys):
                named.append(node.lineno)
    assert named == []


def test_evaluate_is_a_folder_of_scripts() -> None:
    """PyPI has a package of that name, which a package here would hide."""
    assert not (ROOT / "evaluate" / "__init__.py").exists()
    assert {"fid.py", "clip_score.py", "captioning.py"} <= {path.name for path in (ROOT / "evaluate").glob("*.py")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path))
def test_private_names_stay_at_home(path: Path) -> None:
    private = [
        f"{module}.{name}"
        for module, name in imports_of(path)
        if any(part.startswith("_") and not part.startswith("__") for part in (*module.split("."), name))
    ]
    assert private == []


def test_latent_scale_and_shift_are_known_to_the_autoencoder_alone() -> None:
    words = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    knowing = {module_of(path) for path in FILES if any(word in path.read_text() for word in words)}
    assert knowing == {f"{PACKAGE}.codecs.autoencoder_kl"}


def test_every_public_function_and_class_says_what_it_does() -> None:
    missing = []
    for path in (path for path in FILES if path.is_relative_to(ROOT / PACKAGE)):
        tree = ast.parse(path.read_text())
        if path.name != "__init__.py" and ast.get_docstring(tree) is None:
            missing.append(module_of(path))
        missing += [
            f"{module_of(path)}.{node.name}"
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            and not node.name.startswith("_")
            and ast.get_docstring(node) is None
        ]
    assert missing == []


def test_tests_are_collected_without_the_packages_of_extras() -> None:
    """At the top of a file such a package is imported after `pytest.importorskip` of it."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {re.split(r"[\[<>=]", requirement)[0] for requirements in extras.values() for requirement in requirements}
    tools = {"mypy", "pytest", "pytest-xdist", "ruff", "transfusion-mot", "types-pyyaml", "types-tqdm"}
    assert names - tools == set(MODULES)
    needed = []
    for path in sorted((ROOT / "tests").glob("*.py")):
        skipped: set[str] = set()
        for node in ast.parse(path.read_text()).body:
            match node:
                case ast.Expr(ast.Call(ast.Attribute(attr="importorskip"), [ast.Constant(module)])):
                    skipped.add(module)
                case ast.Import() | ast.ImportFrom():
                    modules = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                    roots = {(module or "").split(".")[0] for module in modules}
                    needed += [(path.name, root) for root in (roots & set(MODULES.values())) - skipped]
    assert needed == []
