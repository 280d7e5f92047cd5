"""`doctor` of the client: looks at each hop of the way to a cluster, and says what is wrong with the first that fails.

`probes` acts and returns facts, `judgement` makes findings of facts without a socket or a clock, `examination` has the
order of the way, and `codes` the stable names of the faults.
"""
