"""The task text: plain text, measured by perplexity.

It may import tasks/language and what lies below.
"""
