"""Make a model from another one: a looped model from a dense or a published looped one, and weights of fewer bits.

It may import tasks/registry.py and what lies below.
"""
