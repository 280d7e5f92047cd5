"""The administrators' page: one read-only page of facts that the relay's commands give too, live while it is looked at.

`site` has its routes and bounds, `login` who may see it, `facts` what is true now, `lookups` what is asked of one user
or cluster, and `view` the HTML. No request to it changes anything at the relay, but for the caller's own cookie; it
knows nothing of what sessions carry.
"""
