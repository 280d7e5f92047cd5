{{- define "relay.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "relay.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" }}
{{- else if contains (include "relay.name" .) .Release.Name }}
{{- .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "relay.name" .) | trunc 52 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "relay.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "relay.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "relay.selector" -}}
app.kubernetes.io/name: {{ include "relay.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "relay.labels" -}}
{{ include "relay.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/component: relay
app.kubernetes.io/part-of: arcbridge
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "relay.image" -}}
{{- if .Values.image.digest }}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) }}
{{- end }}
{{- end }}

{{- /* The port of a URL or of host:port; the second of the list where it has none. */ -}}
{{- define "relay.port" -}}
{{- $address := regexReplaceAll "^[a-z]+://" (index . 0) "" | splitList "/" | first }}
{{- regexMatch ":[0-9]+$" $address | ternary (regexFind "[0-9]+$" $address) (index . 1) }}
{{- end }}

{{- define "relay.servicePort" -}}
{{- default (include "relay.port" (list .Values.publicAddress "443")) .Values.service.port | int }}
{{- end }}

{{- /* TCP ports that pods may connect to: those of issuers, claim sources, NATS, audit sinks, the relays themselves, and those that
are named. Sorted, each once. */ -}}
{{- define "relay.egressPorts" -}}
{{- $ports := list (toString .Values.listenPort) (include "relay.port" (list .Values.publicAddress "443")) }}
{{- range .Values.networkPolicy.egressPorts }}{{ $ports = append $ports (toString .) }}{{ end }}
{{- range (.Values.authentication).jwt }}
{{- $ports = append $ports (include "relay.port" (list .issuer.url "443")) }}
{{- with .issuer.discoveryURL }}{{ $ports = append $ports (include "relay.port" (list . "443")) }}{{ end }}
{{- end }}
{{- range .Values.claimSources }}{{ $ports = append $ports (include "relay.port" (list . "443")) }}{{ end }}
{{- range .Values.fleet.servers }}{{ $ports = append $ports (include "relay.port" (list . "4222")) }}{{ end }}
{{- range .Values.auditSinks }}
{{- if ne .kind "stdout" }}{{ $ports = append $ports (include "relay.port" (list .address (eq .kind "http" | ternary "443" "6514"))) }}{{ end }}
{{- end }}
{{- $ports | uniq | sortAlpha | join "," }}
{{- end }}

{{- /* The lines of a table of TOML. JSON's strings, numbers and lists of strings are TOML's. */ -}}
{{- define "relay.table" -}}
{{- range $name, $value := . }}
{{ $name }} = {{ if kindIs "float64" $value }}{{ int64 $value }}{{ else }}{{ toJson $value }}{{ end }}
{{- end }}
{{- end }}

{{- /* What both containers of a pod have. */ -}}
{{- define "relay.env" -}}
- name: PYTHONDONTWRITEBYTECODE
  value: "1"
{{- if .Values.fleet.servers }}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
# Each relay's own part of the settings, which all pods share.
- name: ARCBRIDGE_FLEET_NAME
  value: $(POD_NAME)
- name: ARCBRIDGE_FLEET_INTERNAL_ADDRESS
  value: {{ printf "$(POD_NAME).%s-peers.%s.svc:%v" (include "relay.fullname" .) .Release.Namespace .Values.listenPort }}
{{- end }}
{{- with .Values.env }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "relay.mounts" -}}
- {name: config, mountPath: /etc/arcbridge, readOnly: true}
# Directories and no subPath: the kubelet brings changes to directories alone.
- {name: policy, mountPath: /etc/arcbridge-policy, readOnly: true}
{{- if .Values.authenticationConfigMap }}
- {name: authentication, mountPath: /etc/arcbridge-authentication, readOnly: true}
{{- end }}
- {name: data, mountPath: /var/lib/arcbridge}
{{- if .Values.tls.existingSecret }}
- {name: tls, mountPath: /run/secrets/arcbridge-tls, readOnly: true}
{{- end }}
{{- if .Values.fleet.existingSecret }}
- {name: nats, mountPath: /run/secrets/arcbridge-nats, readOnly: true}
{{- end }}
{{- if .Values.graph.existingSecret }}
- {name: graph, mountPath: /run/secrets/arcbridge-graph, readOnly: true}
{{- end }}
{{- if .Values.page.existingSecret }}
- {name: page, mountPath: /run/secrets/arcbridge-page, readOnly: true}
{{- end }}
{{- if .Values.auditSpool.existingSecret }}
- {name: audit-secret, mountPath: /run/secrets/arcbridge-audit, readOnly: true}
{{- end }}
{{- if .Values.clientFiles.volume }}
- {name: client, mountPath: /usr/local/share/arcbridge/client, readOnly: true}
{{- end }}
- {name: tmp, mountPath: /tmp}
{{- end }}

{{- define "relay.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "relay.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
# Once: files that the relay has made since keep their modes.
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "relay.check" -}}
- name: config-check
  image: {{ include "relay.image" . | quote }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  args: [--role, relay, config, check, --config, /etc/arcbridge/relay.toml]
  env:
    {{- include "relay.env" . | nindent 4 }}
  resources:
    {{- toYaml .Values.resources | nindent 4 }}
  securityContext:
    {{- include "relay.securityContext" . | nindent 4 }}
  volumeMounts:
    {{- include "relay.mounts" . | nindent 4 }}
{{- end }}

{{- /* The volumes of both pods, without those that differ: config, policy, data. */ -}}
{{- define "relay.volumes" -}}
{{- with .Values.authenticationConfigMap }}
- name: authentication
  configMap:
    name: {{ . }}
{{- end }}
{{- range $name, $secret := dict "tls" .Values.tls "nats" .Values.fleet "graph" .Values.graph "page" .Values.page "audit-secret" .Values.auditSpool }}
{{- with $secret.existingSecret }}
- name: {{ $name }}
  secret:
    secretName: {{ . }}
    defaultMode: 0440
{{- end }}
{{- end }}
{{- with .Values.clientFiles.volume }}
- name: client
  {{- toYaml . | nindent 2 }}
{{- end }}
# Private keys pass through a temporary file on their way into the TLS library: in memory, never on a disk.
- name: tmp
  emptyDir:
    medium: Memory
    sizeLimit: 16Mi
{{- end }}

{{- /* Of what is not a relay: no Service and no StatefulSet selects it. */ -}}
{{- define "relay.checkLabels" -}}
app.kubernetes.io/name: {{ include "relay.name" . }}-check
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: relay
app.kubernetes.io/part-of: arcbridge
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}
