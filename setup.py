"""The packages of the wheel; everything else about it is in pyproject.toml.

recipes/, studies/, hub_cards/, models/ and docs/ lie at the top of the repository, and in the wheel within looplab/
(see looplab/shipped.py): site-packages belongs to all projects, and these names are too general for it.
"""

from setuptools import find_packages, setup

FOLDERS = {f"looplab.{name}": name for name in ("recipes", "studies", "hub_cards", "models", "docs")}

setup(
    packages=[*find_packages(include=["modeling_looped", "data_builders*", "looplab*"]), *FOLDERS],
    package_dir=FOLDERS,
)
