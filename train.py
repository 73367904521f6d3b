"""`accelerate launch train.py RECIPE [--field value ...]` in a checkout: the program itself is looplab/train.py."""

import sys

from looplab.train import TASKS, Recipe, fit, main, program, read_recipe

__all__ = ["TASKS", "Recipe", "fit", "main", "program", "read_recipe"]

if __name__ == "__main__":
    sys.exit(program("train.py"))
