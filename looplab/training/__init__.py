"""What train.py is made of: recipe, run folder, model, optimizers, objectives.

It may import tasks/registry.py and what lies below.
"""
