"""The tasks khop and composition: chains of relations, asked for the entity at their end.

It may import the files of tasks/ but the registry, and what lies below.
"""
