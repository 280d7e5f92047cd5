"""Azure Arc's own walkthrough of cluster connect, played at Entra ID."""
