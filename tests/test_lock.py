"""requirements.lock has one exact version for everything that pyproject.toml asks for."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def test_the_lock_pins_every_dependency_inside_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [Requirement(line) for lines in (project["dependencies"], *extras) for line in lines]
    pins: dict[str, list[str]] = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        pin = Requirement(line)
        (specifier,) = pin.specifier
        assert specifier.operator == "==", line
        pins.setdefault(canonicalize_name(pin.name), []).append(specifier.version)
    for requirement in wanted:
        if requirement.name != project["name"]:
            versions = pins[canonicalize_name(requirement.name)]
            # One for each Python that needs another.
            assert all(requirement.specifier.contains(version) for version in versions), requirement
