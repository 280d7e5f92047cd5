#!/bin/sh
# Print the machine's own token of Entra ID for the audience that arcbridge asks for: the cluster's, or the relay's where it is empty.
set -eu
relay=22222222-2222-2222-2222-222222222222
curl -fsS -H "Metadata: true" \
  "http://169.254.169.254/metadata/identity/oauth2/token?api-version=2018-02-01&resource=api://${ARCBRIDGE_TOKEN_AUDIENCE:-$relay}"
