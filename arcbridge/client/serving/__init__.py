"""Serves kubectl and other local programs: the local HTTPS endpoint and forwarded ports of a cluster."""
