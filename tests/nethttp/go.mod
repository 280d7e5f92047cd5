// A server of Go's net/http for tests/differential: the standard library alone.
module arcbridge.io/tests/nethttp

go 1.26.0
