"""Data of the tasks: `datasets` builders, tokenizers, and batches of one length and one depth."""

import lazy_loader

# A module is imported when one of its names is first used: most modules import torch and datasets, and `looped table`
# should not wait for them. The names are those of __init__.pyi.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
