"""The packages of the wheel; everything else about it is in pyproject.toml.

recipes/, hub_cards/ and docs/ lie at the top of the repository, and in the wheel within looplab/ (see
looplab/shipped.py): site-packages belongs to all projects, and these names are too general for it.
"""

from setuptools import find_packages, setup

FOLDERS = {"looplab.recipes": "recipes", "looplab.hub_cards": "hub_cards", "looplab.docs": "docs"}

setup(
    packages=[*find_packages(include=["modeling_looped", "data_builders", "looplab*"]), *FOLDERS],
    package_dir=FOLDERS,
)
