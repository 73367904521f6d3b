"""Show a run to others: model card, upload to the Hub, demo page, server.

It may import tasks/registry.py and what lies below; it reads hub_cards/.
"""
