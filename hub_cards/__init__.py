"""Templates of what `looped publish` shows on the Hub: model cards, the dataset card, and the Space.

They are filled by looplab/publish/cards.py from the files of a run; a value that is missing there is an error.
"""
