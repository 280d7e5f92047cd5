"""Recordings of `exec` and `attach`, sealed to recipients; imported only where settings have rules for them.

`recorder` decides what is recorded, `session_recording` reads one session along (`channels`), a thread makes it an
asciicast (`cast`) in a file (`sealed_file`), `bucket` carries finished files on. `opened` reads a file for a person who
has an identity. The agent has no identity: what it has written it cannot read (docs/decisions/0062).
"""
