"""Credentials of the user: logins, tokens of workloads and programs, their cache, and the keys they are bound to."""
