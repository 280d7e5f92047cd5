"""The soak: hundreds of streams with checksums both ways, while relays are killed (`make soak`)."""
