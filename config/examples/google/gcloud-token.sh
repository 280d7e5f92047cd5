#!/bin/sh
# Print an id token of a service account for the audience that arcbridge asks for: a cluster's, or the relay's where it is empty.
# The caller needs the role "Service Account OpenID Connect Identity Token Creator" on it.
set -eu
account=deployer@example-project.iam.gserviceaccount.com
token=$(gcloud auth print-identity-token --impersonate-service-account="$account" --include-email \
  --audiences="${ARCBRIDGE_TOKEN_AUDIENCE:-arcbridge-relay}")
printf '{"access_token": "%s"}\n' "$token"
