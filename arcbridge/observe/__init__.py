"""Shows operators logs, metrics and health. Used by the command line and the roles, never by the layers below."""
