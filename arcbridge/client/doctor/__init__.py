"""`doctor` of the client: looks at each hop of the way to a cluster, and says what is wrong with the first that fails.

`relay_hops` looks at the way to a relay and `kubeconfig_hop` at this machine; `access_judgement` makes findings of what
`examination` saw behind the relay, without a socket or a clock; `codes` has the stable names of the faults.
"""
