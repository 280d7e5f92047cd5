"""Many agents, relays and users under one virtual clock: the product's own parts, over links in memory alone.

`world` puts them together, `model` says what may be observed, `plan` makes the outages of a seed.
"""
