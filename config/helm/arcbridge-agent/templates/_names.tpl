{{- define "agent.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "agent.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" }}
{{- else if contains (include "agent.name" .) .Release.Name }}
{{- .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "agent.name" .) | trunc 52 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- /* Objects without a namespace carry the release's: two releases in two namespaces must not share them. */ -}}
{{- define "agent.clustername" -}}
{{- printf "%s:%s" .Release.Namespace (include "agent.fullname" .) }}
{{- end }}

{{- define "agent.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "agent.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "agent.credential" -}}
{{- default (include "agent.fullname" .) .Values.credential.existingSecret }}
{{- end }}

{{- define "agent.selector" -}}
app.kubernetes.io/name: {{ include "agent.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- /* The instance label of a pod of a DaemonSet that drains: its own selector does not match it. Empty: pods keep theirs. Only
where the API server has the policy that narrows the right to do so, and not as the account `default`: that policy is about each pod
update by the agent's account, which other pods have too then. Nor with a pod certificate, which does not say to the API server which
pod it is of, so that the policy would refuse each pod. */ -}}
{{- define "agent.drainingInstance" -}}
{{- if and .Values.workload.leaveWhileDraining (eq .Values.workload.kind "DaemonSet") .Values.rbac.create (ne (include "agent.serviceAccount" .) "default") (not .Values.podCertificate.enabled) (semverCompare ">=1.30.0-0" .Capabilities.KubeVersion.Version) }}
{{- printf "%s-draining" .Release.Name }}
{{- end }}
{{- end }}

{{- /* The volume at the usual place of a ServiceAccount's files, where the chart makes it and not the admission plugin. */ -}}
{{- define "agent.apiServerVolume" -}}
{{- $certificate := .Values.podCertificate }}
{{- if $certificate.enabled }}
{{- if not (or (.Capabilities.APIVersions.Has "certificates.k8s.io/v1/PodCertificateRequest") (.Capabilities.APIVersions.Has "certificates.k8s.io/v1beta1/PodCertificateRequest")) }}
{{- fail "podCertificate.enabled: this cluster has no PodCertificateRequest (Kubernetes 1.37, or 1.35 with the feature gate of that name and certificates.k8s.io/v1beta1). Set it to false: the agent uses its ServiceAccount's token then. For `helm template` name the API with --api-versions" }}
{{- end }}
{{- if not $certificate.signerName }}
{{- fail "podCertificate.signerName: empty. Name the signer whose certificates this API server takes (--client-ca-file); Kubernetes runs none of its own" }}
{{- end }}
{{- end }}
{{- if or $certificate.enabled .Values.clusterTrustBundle }}
- name: api-server
  projected:
    defaultMode: 0440
    sources:
      {{- if $certificate.enabled }}
      - podCertificate:
          signerName: {{ $certificate.signerName }}
          keyType: {{ $certificate.keyType }}
          maxExpirationSeconds: {{ int64 $certificate.maxExpirationSeconds }}
          credentialBundlePath: credential-bundle.pem
          {{- with $certificate.userAnnotations }}
          userAnnotations:
            {{- toYaml . | nindent 12 }}
          {{- end }}
      {{- else }}
      - serviceAccountToken:
          path: token
          expirationSeconds: 3607
      {{- end }}
      {{- if .Values.clusterTrustBundle }}
      - clusterTrustBundle:
          path: ca.crt
          {{- with .Values.clusterTrustBundle.name }}
          name: {{ . }}
          {{- end }}
          {{- with .Values.clusterTrustBundle.signerName }}
          signerName: {{ . }}
          # Without a selector none would match.
          labelSelector: {{ toJson (default dict $.Values.clusterTrustBundle.labelSelector) }}
          {{- end }}
      {{- else }}
      - configMap:
          name: kube-root-ca.crt
          items: [{key: ca.crt, path: ca.crt}]
      {{- end }}
      - downwardAPI:
          items: [{path: namespace, fieldRef: {fieldPath: metadata.namespace}}]
{{- end }}
{{- end }}

{{- /* A duration of agent.toml ("9m45s") in whole seconds, rounded up. */ -}}
{{- define "agent.seconds" -}}
{{- $units := dict "ms" 0.001 "s" 1 "m" 60 "h" 3600 "d" 86400 "w" 604800 }}
{{- $seconds := 0.0 }}
{{- range regexFindAll "[0-9.]+(ms|s|m|h|d|w)" . -1 }}
{{- $seconds = addf $seconds (mulf (regexFind "[0-9.]+" . | float64) (get $units (regexFind "[a-z]+" .))) }}
{{- end }}
{{- ceil $seconds }}
{{- end }}

{{- /* What the kubelet gives a pod to end: the longest drain, and 15 s for the last answers and the log. */ -}}
{{- define "agent.gracePeriod" -}}
{{- $needed := add 15 (include "agent.seconds" .Values.session.drain | int64) }}
{{- $given := int64 (default $needed .Values.terminationGracePeriodSeconds) }}
{{- if lt $given $needed }}
{{- fail (printf "terminationGracePeriodSeconds: %d is too short for session.drain (%s) and 15 s for the last answers. Remove it: it follows from session.drain" $given .Values.session.drain) }}
{{- end }}
{{- $given }}
{{- end }}

{{- define "agent.labels" -}}
{{ include "agent.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/component: agent
app.kubernetes.io/part-of: arcbridge
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- /* auto: constrained where the API server enforces it. A 1.36 that has it switched off refuses every request. */ -}}
{{- define "agent.impersonation" -}}
{{- if ne .Values.impersonation.mode "auto" }}
{{- .Values.impersonation.mode }}
{{- else if semverCompare ">=1.36.0-0" .Capabilities.KubeVersion.Version }}
{{- "constrained" }}
{{- else }}
{{- "legacy" }}
{{- end }}
{{- end }}

{{- /* The names of a rule. "*" alone is a rule without names, never the name "*": the API server asks for that one when a
request has many groups, and would let all of them through. */ -}}
{{- define "agent.names" -}}
{{- if not (has "*" .) }}
resourceNames: {{ toJson . }}
{{- end }}
{{- end }}

{{- /* The groups that the agent may impersonate, as JSON: those of `impersonation`, and what may be lent. */ -}}
{{- define "agent.groups" -}}
{{- $groups := default list .Values.impersonation.groups }}
{{- if and .Values.elevation.enabled (not (has "*" $groups)) }}{{ $groups = concat $groups .Values.elevation.groups | uniq }}{{ end }}
{{- toJson $groups }}
{{- end }}

{{- /* The port of a URL or of host:port; 443 where it has none. */ -}}
{{- define "agent.port" -}}
{{- $address := . | trimPrefix "https://" | splitList "/" | first }}
{{- regexMatch ":[0-9]+$" $address | ternary (regexFind "[0-9]+$" $address) "443" }}
{{- end }}

{{- /* TCP ports that pods may connect to: those of relays, issuers, targets, audit sinks, spans and the bucket, and those that are named. Sorted, each once. */ -}}
{{- define "agent.egressPorts" -}}
{{- $ports := list }}
{{- range .Values.networkPolicy.egressPorts }}{{ $ports = append $ports (toString .) }}{{ end }}
{{- range .Values.relays }}{{ $ports = append $ports (include "agent.port" .) }}{{ end }}
{{- range (.Values.authentication).jwt }}
{{- $ports = append $ports (include "agent.port" .issuer.url) }}
{{- with .issuer.discoveryURL }}{{ $ports = append $ports (include "agent.port" .) }}{{ end }}
{{- end }}
{{- range .Values.targets }}{{ $ports = append $ports (include "agent.port" .address) }}{{ end }}
{{- range .Values.auditSinks }}
{{- if eq .kind "http" }}{{ $ports = append $ports (include "agent.port" .address) }}{{ end }}
{{- if eq .kind "syslog" }}{{ $ports = append $ports (regexFind "[0-9]+$" (regexFind ":[0-9]+$" .address) | default "6514") }}{{ end }}
{{- end }}
{{- with .Values.tracing.endpoint }}{{ $ports = append $ports (include "agent.port" .) }}{{ end }}
{{- with .Values.recording.bucket.endpoint }}{{ $ports = append $ports (include "agent.port" .) }}{{ end }}
{{- $ports | uniq | sortAlpha | join "," }}
{{- end }}

{{- define "agent.image" -}}
{{- if .Values.image.digest }}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) }}
{{- end }}
{{- end }}

{{- /* Which nodes a pod can get, as JSON. `named`: each alternative has a label that not every node has by itself. `open`: the labels
of alternatives without one that a kubelet cannot give to its own node. Nodes that are only excluded (NotIn) are not named. */ -}}
{{- define "agent.nodes" -}}
{{- $everyNode := "^(beta\\.kubernetes\\.io/.*|kubernetes\\.io/(os|arch)|(node|topology|failure-domain\\.beta)\\.kubernetes\\.io/(instance-type|zone|region))$" }}
{{- $selector := list }}
{{- range $key, $_ := default dict .Values.nodeSelector }}
{{- if not (regexMatch $everyNode $key) }}{{ $selector = append $selector $key }}{{ end }}
{{- end }}
{{- $required := dig "nodeAffinity" "requiredDuringSchedulingIgnoredDuringExecution" dict (default dict .Values.affinity) }}
{{- $alternatives := list }}
{{- range (default dict $required).nodeSelectorTerms }}
{{- $keys := $selector }}
{{- range concat (default list .matchExpressions) (default list .matchFields) }}
{{- $names := ternary (ne .key "kubernetes.io/hostname") (has .operator (list "In" "Gt" "Lt")) (eq .operator "Exists") }}
{{- if and $names (not (regexMatch $everyNode .key)) }}{{ $keys = append $keys .key }}{{ end }}
{{- end }}
{{- $alternatives = append $alternatives $keys }}
{{- end }}
{{- $named := true }}
{{- $open := list }}
{{- range default (list $selector) $alternatives }}
{{- if not . }}{{ $named = false }}{{ end }}
{{- if not (regexMatch "(^|[ .])node-restriction\\.kubernetes\\.io/|(^| )metadata\\.name( |$)" (join " " .)) }}{{ $open = concat $open . }}{{ end }}
{{- end }}
{{- dict "named" $named "open" (uniq $open) | toJson }}
{{- end }}
