{{- define "blipq.labels" -}}
app.kubernetes.io/name: blipq
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}

{{- define "blipq.selector" -}}
app.kubernetes.io/name: blipq
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "blipq.producerImage" -}}
{{ .Values.image.producer.repository }}:{{ .Values.image.producer.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "blipq.workerImage" -}}
{{ .Values.image.worker.repository }}:{{ .Values.image.worker.tag | default .Chart.AppVersion }}
{{- end }}

{{- /* Of a pod: no rights, and no token but for an account of its own. */ -}}
{{- define "blipq.podSecurity" -}}
automountServiceAccountToken: {{ ternary "true" "false" (not (empty .account)) }}
{{- with .account }}
serviceAccountName: {{ . }}
{{- end }}
enableServiceLinks: false
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 1000
  runAsGroup: 1000
  fsGroup: 1000
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "blipq.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{- /* Pods of a component on different nodes, where that is possible. */ -}}
{{- define "blipq.spread" -}}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{ include "blipq.selector" . | nindent 8 }}
{{- end }}

{{- define "blipq.envFrom" -}}
{{- if .root.Values.secrets.common }}
- secretRef: {name: {{ .root.Values.secrets.common }}}
{{- end }}
{{- with .secret }}
- secretRef: {name: {{ . }}}
{{- end }}
{{- end }}

{{- /* Settings as environment variables, by name. */ -}}
{{- define "blipq.env" -}}
{{- range $name, $value := . }}
- {name: {{ $name }}, value: {{ $value | toString | quote }}}
{{- end }}
{{- end }}

{{- define "blipq.settings" -}}
{{- $trial := dict }}
{{- if .root.Values.trialRedis.enabled }}
{{- $trial = dict "BLIPQ_REDIS_URL" (printf "redis://%s-redis:6379/0" .root.Release.Name) }}
{{- end }}
{{- include "blipq.env" (mustMergeOverwrite (dict) $trial .root.Values.settings (.settings | default dict)) }}
{{- end }}

{{- /* Rules of network policies. */ -}}
{{- define "blipq.to" }}
- ports: [{protocol: TCP, port: {{ .port }}}]
  {{- with .cidrs }}
  to:
    {{- range . }}
    - ipBlock: {cidr: {{ . }}}
    {{- end }}
  {{- end }}
{{- end }}
{{- define "blipq.from" }}
- ports: [{protocol: TCP, port: {{ .port }}}]
  from:
    {{- range .namespaces }}
    - namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: {{ . }}}}
    {{- end }}
{{- end }}
