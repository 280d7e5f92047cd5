"""What operators see: logs, metrics, health. Used by the command line and the roles, never by the layers below."""
