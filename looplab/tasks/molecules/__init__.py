"""The task molecules: SMILES, measured by the molecules that a model writes.

It may import tasks/language and what lies below.
"""
