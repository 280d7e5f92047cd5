"""`forward TYPE/NAME`: local ports that lead to ports of pods, by the API server's own port-forward."""
