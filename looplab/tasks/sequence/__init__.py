"""The task sequence: questions with answers of any length, from files, data sets and generators.

It may import the files of tasks/ but the registry, language/, and what lies below.
"""
