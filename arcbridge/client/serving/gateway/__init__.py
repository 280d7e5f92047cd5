"""An HTTPS endpoint for many callers and many clusters: each request carries its caller's own tokens."""
