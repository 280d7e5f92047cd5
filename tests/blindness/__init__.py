"""What a relay can see of the traffic that it carries: docs/verify-blindness.md says how to find out."""
