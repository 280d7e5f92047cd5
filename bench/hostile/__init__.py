"""Hostile callers beside honest ones at real processes: what each attack takes, and what the honest notice of it."""
