"""End to end with a real identity provider: Keycloak, the three roles and a real API server."""
