"""HTTP of the relay: its API, the login settings and the files of the client, and the server that bounds them."""
