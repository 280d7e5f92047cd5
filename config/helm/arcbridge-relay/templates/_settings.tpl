{{- /* The files of the settings. JSON's strings, numbers and lists of strings are TOML's. */ -}}
{{- define "relay.settings" -}}
relay.toml: |
  listen = {{ printf ":%v" .Values.listenPort | toJson }}
  public_address = {{ toJson .Values.publicAddress }}
  # A directory that the relay makes: a volume itself may be open to every user.
  data_dir = "/var/lib/arcbridge/data"
  authentication = {{ empty .Values.authenticationConfigMap | ternary "authentication.yaml" "/etc/arcbridge-authentication/authentication.yaml" | toJson }}
  policy = "/etc/arcbridge-policy/policy.toml"
  policy_share = {{ int .Values.policyShare }}
  policy_hold = {{ toJson .Values.policyHold }}
  recovery_wait = {{ toJson .Values.recoveryWait }}
  proof = {{ toJson .Values.proof }}
  max_token_lifetime = {{ toJson .Values.maxTokenLifetime }}
  agent_certificate_life = {{ toJson .Values.agentCertificateLife }}
  workers = {{ int .Values.workers }}
  {{- with .Values.actorClients }}
  actor_clients = {{ toJson . }}
  {{- end }}
  {{- with .Values.claimSources }}
  claim_sources = {{ toJson . }}
  {{- end }}
  {{- with .Values.proxyProtocolFrom }}
  proxy_protocol_from = {{ toJson . }}
  {{- end }}
  {{- if .Values.tls.existingSecret }}

  [tls]
  certificate = "/run/secrets/arcbridge-tls/tls.crt"
  key = "/run/secrets/arcbridge-tls/tls.key"
  {{- end }}
  {{- with .Values.login }}

  [login]
  {{- include "relay.table" . | trim | nindent 2 }}
  {{- end }}
  {{- if .Values.page.settings }}

  [page]
  {{- include "relay.table" .Values.page.settings | trim | nindent 2 }}
  {{- if .Values.page.existingSecret }}
  client_secret_file = "/run/secrets/arcbridge-page/client-secret"
  {{- end }}
  {{- end }}
  {{- if .Values.clientFiles.volume }}

  [client]
  directory = "/usr/local/share/arcbridge/client"
  {{- end }}

  [audit]
  file = {{ toJson .Values.auditFile }}
  rotate_bytes = 67108864
  keep_bytes = {{ int64 .Values.auditSpool.bytes }}
  {{- range $name, $sink := .Values.auditSinks }}

  [audit.sinks.{{ $name }}]
  {{- include "relay.table" $sink | trim | nindent 2 }}
  {{- end }}
  {{- if .Values.fleet.servers }}

  [fleet]
  servers = {{ toJson .Values.fleet.servers }}
  {{- include "relay.table" .Values.fleet.settings | trim | nindent 2 }}
  {{- end }}
  {{- with .Values.limits }}

  [limits]
  {{- include "relay.table" (omit . "groups" "users" "actors") | trim | nindent 2 }}
  {{- range $kind, $tables := pick . "groups" "users" "actors" }}
  {{- range $who, $limits := $tables }}

  [limits.{{ $kind }}.{{ toJson $who }}]
  {{- include "relay.table" $limits | trim | nindent 2 }}
  {{- end }}
  {{- end }}
  {{- end }}

  [observe]
  listen = {{ printf ":%v" .Values.observe.port | toJson }}
  log_level = {{ toJson .Values.logLevel }}
  log_format = "json"
  {{- with .Values.settings }}

  {{- . | trim | nindent 2 }}
  {{- end }}
{{- with .Values.authentication }}
authentication.yaml: |
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "relay.policy" -}}
policy.toml: |
  {{- range $kind, $tables := .Values.policy }}
  {{- range $tables }}
  [[{{ $kind }}]]
  {{- include "relay.table" . | trim | nindent 2 }}
  {{- end }}
  {{- end }}
{{- end }}
