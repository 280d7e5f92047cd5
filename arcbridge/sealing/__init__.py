"""Seals files to public keys, in the format of age (https://c2sp.org/age), and opens what was sealed."""
