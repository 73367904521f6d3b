"""Templates of the model cards, the dataset card and the Space that `looped publish` puts on the Hub.

looplab/publish/cards.py fills them from the files of a run; a missing value is an error.
"""
