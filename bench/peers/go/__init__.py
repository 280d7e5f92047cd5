"""Peers that are written in Go: a module each that pins them, and what their adapters share.

`MODULE/go.mod` names the programs in `tool` lines, `MODULE/go.sum` has the checksum of all they are made of.
"""
