"""What you do with a trained looped model: the commands of `looped`, see cli.py."""

from importlib import metadata

try:
    __version__ = metadata.version("looped-transformers")
except metadata.PackageNotFoundError:  # a checkout on the path that was never installed
    __version__ = "0+unknown"
