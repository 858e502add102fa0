{{- define "decuwatch.name" -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{- define "decuwatch.selector" -}}
app.kubernetes.io/name: decuwatch
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: worker
{{- end -}}

{{- define "decuwatch.labels" -}}
{{ include "decuwatch.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "decuwatch.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag }}
{{- end -}}
{{- end -}}

{{/*
A value of settings as text. Helm reads every number of a values file as a float, which it would print as 8.388608e+06.
*/}}
{{- define "decuwatch.text" -}}
{{- if and (kindIs "float64" .) (eq . (floor .)) (lt . 1e15) (gt . -1e15) -}}
{{ printf "%.0f" . }}
{{- else -}}
{{ toString . }}
{{- end -}}
{{- end -}}

{{/* Seconds of a duration as Go writes it, rounded down. */}}
{{- define "decuwatch.seconds" -}}
{{- $from := toDate "2006-01-02" "2020-01-01" -}}
{{- sub ($from | mustDateModify . | unixEpoch) ($from | unixEpoch) -}}
{{- end -}}

{{/* The variables that the chart sets itself, as YAML. Settings may replace those that are not in "fixed". */}}
{{- define "decuwatch.variables" -}}
DECUWATCH_NATS_URL: {{ .Values.nats.url | quote }}
DECUWATCH_NATS_INBOX_PREFIX: {{ .Values.nats.inboxPrefix | quote }}
DECUWATCH_NATS_NKEY: {{ printf "/etc/decuwatch/nats/%s" .Values.nats.nkeySecret.key | quote }}
{{- if .Values.nats.caSecret.name }}
DECUWATCH_NATS_CA: {{ printf "/etc/decuwatch/nats-ca/%s" .Values.nats.caSecret.key | quote }}
{{- end }}
{{- if .Values.nats.tlsHandshakeFirst }}
DECUWATCH_NATS_TLS_HANDSHAKE_FIRST: "true"
{{- end }}
DECUWATCH_SCORING_ENSEMBLES: {{ join "," .Values.ensembles.paths | quote }}
DECUWATCH_SCORING_DEVICE: {{ ternary "cuda:0" "cpu" .Values.gpu.enabled | quote }}
DECUWATCH_METRICS_ADDRESS: "0.0.0.0:9464"
{{- if .Values.review.enabled }}
DECUWATCH_REVIEW_ADDRESS: "0.0.0.0:8080"
DECUWATCH_REVIEW_TOKEN_FILE: {{ printf "/etc/decuwatch/review/%s" .Values.review.tokenSecret.key | quote }}
{{- if .Values.review.url }}
DECUWATCH_REVIEW_URL: {{ .Values.review.url | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* All variables with plain values, as YAML: the chart's, and settings over them. */}}
{{- define "decuwatch.environment" -}}
{{- $variables := include "decuwatch.variables" . | fromYaml -}}
{{- range $name, $value := .Values.settings -}}
{{- $_ := set $variables $name (include "decuwatch.text" $value) -}}
{{- end -}}
{{ toYaml $variables }}
{{- end -}}

{{/* Refuses values that contradict each other; values.schema.json refuses those that are wrong by themselves. */}}
{{- define "decuwatch.check" -}}
{{- $fixed := dict
  "DECUWATCH_NATS_NKEY" "nats.nkeySecret"
  "DECUWATCH_NATS_CA" "nats.caSecret"
  "DECUWATCH_POSTGRES_URL" "postgres.urlSecret" -}}
{{- $_ := set $fixed "DECUWATCH_METRICS_ADDRESS" "nothing: the probes ask port 9464" -}}
{{- $_ := set $fixed "DECUWATCH_METRICS_TLS_CERT" "nothing: the probes speak plain HTTP" -}}
{{- $_ := set $fixed "DECUWATCH_METRICS_TLS_KEY" "nothing: the probes speak plain HTTP" -}}
{{- $_ := set $fixed "DECUWATCH_REVIEW_ADDRESS" "review.enabled" -}}
{{- $_ := set $fixed "DECUWATCH_REVIEW_TOKEN_FILE" "review.tokenSecret" -}}
{{- range $name, $value := .Values.settings -}}
{{- with get $fixed $name -}}
{{- fail (printf "settings.%s is what the chart sets; use %s" $name .) -}}
{{- end -}}
{{- end -}}
{{- $environment := include "decuwatch.environment" . | fromYaml -}}
{{- $device := get $environment "DECUWATCH_SCORING_DEVICE" -}}
{{- if and .Values.gpu.enabled (eq $device "cpu") -}}
{{- fail "settings.DECUWATCH_SCORING_DEVICE is cpu, but gpu.enabled asks for a GPU" -}}
{{- end -}}
{{- if and (not .Values.gpu.enabled) (ne $device "cpu") -}}
{{- fail (printf "settings.DECUWATCH_SCORING_DEVICE is %s, but gpu.enabled is false" $device) -}}
{{- end -}}
{{- if and .Values.gpu.enabled (not .Values.image.digest) (regexMatch "(^|[-_.])cpu([-_.]|$)" .Values.image.tag) -}}
{{- fail (printf "image.tag is %s, which is the image for CPUs, but gpu.enabled is true: use the cuda image"
  .Values.image.tag) -}}
{{- end -}}
{{- range $kind, $quantities := .Values.resources -}}
{{- if hasKey ($quantities | default dict) $.Values.gpu.resource -}}
{{- fail (printf "resources.%s.%s is what the chart sets; use gpu.enabled and gpu.count"
  $kind $.Values.gpu.resource) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.keda.enabled (gt (int64 .Values.keda.minReplicas) (int64 .Values.keda.maxReplicas)) -}}
{{- fail (printf "keda.minReplicas is %d, which is more than keda.maxReplicas, %d"
  (int64 .Values.keda.minReplicas) (int64 .Values.keda.maxReplicas)) -}}
{{- end -}}
{{- $drain := get $environment "DECUWATCH_CONSUMERS_DRAIN_TIMEOUT" | default "20s" -}}
{{- if le (int64 .Values.terminationGracePeriodSeconds) (add 10 (include "decuwatch.seconds" $drain | int64)) -}}
{{- fail (printf
  "terminationGracePeriodSeconds is %d, must be longer than DECUWATCH_CONSUMERS_DRAIN_TIMEOUT, %s, and 10 s"
  (int64 .Values.terminationGracePeriodSeconds) $drain) -}}
{{- end -}}
{{- end -}}

{{- define "decuwatch.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "decuwatch.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}
