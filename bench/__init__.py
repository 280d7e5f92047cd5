"""The benchmark: arcbridge and its peers side by side, in one interleaved run, on this machine. See bench/README.md."""
