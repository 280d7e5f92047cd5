"""Settings: their declarations, the loader, what is wrong with them and where, and the files that they name."""
