"""The base of the tasks text and molecules, which predict the next token at every token: training, halting, figures.

It may import the files of tasks/ but the registry, and what lies below.
"""
