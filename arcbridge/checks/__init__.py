"""Checks of a running role and of its settings: findings with stable names, for `doctor`, logs and metrics."""
