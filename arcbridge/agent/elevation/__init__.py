"""Lends groups to users for a time, by AccessRules and AccessRequests of the cluster. Imported only where groups may be
lent (`elevation.groups`)."""
