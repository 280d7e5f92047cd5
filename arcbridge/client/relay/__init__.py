"""Relays as the client knows them: their addresses, what was agreed on at the first contact, and the order to try."""
