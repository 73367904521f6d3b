"""What text and molecules share: the next token at every token, halting by token, figures over tokens.

It may import the files of tasks/ but the registry, and what lies below.
"""
