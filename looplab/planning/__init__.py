"""`looped plan`: what the training of a recipe would take, before anything is trained.

It may import all tasks and training.
"""
