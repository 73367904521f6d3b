"""Make a model from another one: a looped model from a dense one or from Ouro's files, and weights of fewer bits.

It may import tasks/registry.py and what lies below.
"""
