"""The task molecules: SMILES, measured by what a model writes.

It may import tasks/language and what lies below.
"""
