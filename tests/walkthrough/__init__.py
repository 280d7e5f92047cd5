"""Azure Arc's own walkthrough of cluster connect, and the organisation that plays it at Entra ID."""
