"""The audit log of a role: how records are chained (`chain`), written (`log`, `writer`, `rotation`), carried on
(`sinks`), found (`query`) and checked (`verify`).

It knows nothing of what is recorded: agent and relay have records of their own. Invariant: each line that leaves is one
JSON object, sealed into the chain of its file.
"""
