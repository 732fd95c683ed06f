{{- define "image" -}}
{{- $tag := .Values.image.tag | default .Chart.AppVersion -}}
{{ .Values.image.repository }}{{ ternary "@" ":" (hasPrefix "sha256:" $tag) }}{{ $tag }}
{{- end }}

{{/* Labels of every object. The names are fixed, because a cluster has one installation. */}}
{{- define "labels" -}}
app.kubernetes.io/part-of: auth-daemon
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "daemonConfig" -}}
{{- $ca := dict
  "address" (.Values.ca.enabled | ternary (printf "auth-ca.%s.svc:15012" .Release.Namespace) .Values.ca.address)
  "rootFile" "/var/run/auth-ca/root-cert.pem"
  "tokenFile" "/var/run/secrets/auth-ca/token" -}}
{{- $kubernetes := .Values.daemon.nodeTaint | ternary (dict "nodeTaint" "manage") dict -}}
{{- if .Values.remoteClusters.namespace }}
{{- $remote := dict "namespace" .Values.remoteClusters.namespace -}}
{{- with .Values.remoteClusters.trustDomains }}{{ $_ := set $remote "trustDomains" . }}{{ end -}}
{{- $_ := set $kubernetes "remoteClusters" $remote -}}
{{- end -}}
{{- $discovery := dict "kubernetes" $kubernetes -}}
{{- with .Values.istio }}{{ if .enabled -}}
{{- $istiod := dict
  "address" .address
  "rootFile" "/var/run/istio/root-cert.pem"
  "tokenFile" "/var/run/secrets/istio/token"
  "clusterId" .clusterId -}}
{{- with .network }}{{ $_ := set $istiod "network" . }}{{ end -}}
{{- $_ := set $ca "clusterId" .clusterId -}}
{{- $discovery = dict "istiod" $istiod -}}
{{- end }}{{ end -}}
{{- $config := dict
  "trustDomain" .Values.trustDomain
  "mode" .Values.mode
  "discovery" $discovery
  "ca" $ca
  "drain" (printf "%ds" (int .Values.daemon.drainSeconds))
  "log" (dict "format" "json" "level" "info") -}}
{{- if ne .Values.metrics "daemon" }}{{ $_ := set $config "metrics" .Values.metrics }}{{ end -}}
{{- if .Values.daemon.nri }}{{ $_ := set $config "nri" "/run/nri/nri.sock" }}{{ end -}}
{{- if .Values.daemon.workloadApiSocket }}
{{- $_ := set $config "workloadApi" (dict "socket" "/run/auth-daemon/workload-api/api.sock") -}}
{{- end -}}
{{- with .Values.podNetworks }}{{ $_ := set $config "podNetworks" . }}{{ end -}}
{{- with .Values.serviceNetworks }}{{ $_ := set $config "serviceNetworks" . }}{{ end -}}
{{- mergeOverwrite $config (deepCopy .Values.daemon.config) | toYaml -}}
{{- end }}

{{- define "caConfig" -}}
{{- $kubernetes := dict "namespace" .Release.Namespace "rootConfigMap" .Values.ca.rootConfigMap -}}
{{- $attestation := dict "audience" .Values.ca.audience "nodeServiceAccount" (printf "%s/auth-daemon" .Release.Namespace) -}}
{{- $host := printf "auth-ca.%s.svc" .Release.Namespace -}}
{{- $config := dict
  "trustDomain" .Values.trustDomain
  "listen" "0.0.0.0:15012"
  "serverNames" (list $host (printf "%s.cluster.local" $host))
  "readiness" "0.0.0.0:15021"
  "operatorSocket" "/run/auth-daemon-ca/operator.sock"
  "kubernetes" $kubernetes
  "attestation" (dict "kubernetes" $attestation)
  "log" (dict "format" "json" "level" "info") -}}
{{- mergeOverwrite $config (deepCopy .Values.ca.config) | toYaml -}}
{{- end }}
