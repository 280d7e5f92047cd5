#!/bin/sh
# Print the machine's own id token for the audience that arcbridge asks for: a cluster's, or the relay's where it is empty.
set -eu
audience=${ARCBRIDGE_TOKEN_AUDIENCE:-arcbridge-relay}
token=$(curl -fsS -H "Metadata-Flavor: Google" \
  "http://metadata.google.internal/computeMetadata/v1/instance/service-accounts/default/identity?format=full&audience=$audience")
printf '{"access_token": "%s"}\n' "$token"
