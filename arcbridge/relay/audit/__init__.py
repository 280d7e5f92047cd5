"""The relay's records: who did what to it (`record`), as its processes (`log`) and its commands (`commands`) have it
written.

It decides nothing but one thing: whether an act may be done while its record cannot be written. How records become a
log is `arcbridge.audit`'s.
"""
