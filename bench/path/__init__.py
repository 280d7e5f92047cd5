"""The way between client and relay: longer and narrower, the same for every system."""
