"""Models made of other models: dense to looped, Ouro's format, fewer bits.

It may import tasks/registry.py and what lies below.
"""
