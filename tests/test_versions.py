"""The version window is written down once: what is tested as oldest are the floors, and what CI installs is within."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from toys import ROOT


def direct_requirements() -> dict[str, Requirement]:
    """Name -> requirement, of the project and all its extras but itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    requirements = [Requirement(text) for group in groups for text in group]
    return {canonicalize_name(r.name): r for r in reversed(requirements) if r.name != project["name"]}


def pins(file: str) -> dict[str, Version]:
    lines = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / file).read_text(), re.MULTILINE)
    return {canonicalize_name(name): Version(version) for name, version in lines}


def test_the_oldest_versions_are_the_floors():
    floors = {
        name: Version(next(s.version for s in requirement.specifier if s.operator == ">="))
        for name, requirement in direct_requirements().items()
    }
    assert pins("constraints-oldest.txt") == floors


@pytest.mark.parametrize("name", direct_requirements())
def test_the_tested_version_is_admitted_and_pinned(name):
    assert pins("constraints.txt")[name] in direct_requirements()[name].specifier
