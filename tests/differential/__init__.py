"""The agent's general and fast paths beside h11, httptools and Go's net/http, over the network: what one of them reads
as a request or an answer, all do, and no byte of one user reaches another.

`python -m tests.differential --seconds N` tries more inputs than the tests do, and says how many of which class.
"""
