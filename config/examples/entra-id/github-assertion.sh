#!/bin/sh
# Print the job's own token of GitHub Actions for the token exchange of Entra ID. Needs curl and jq.
set -eu
curl -fsS -H "Authorization: bearer $ACTIONS_ID_TOKEN_REQUEST_TOKEN" \
  "$ACTIONS_ID_TOKEN_REQUEST_URL&audience=api://AzureADTokenExchange" | jq -er .value
