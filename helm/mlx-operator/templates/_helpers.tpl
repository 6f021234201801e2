{{- define "mlx-operator.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "mlx-operator.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else if contains (include "mlx-operator.name" .) .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "mlx-operator.name" .) | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "mlx-operator.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "mlx-operator.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "mlx-operator.selectorLabels" -}}
app.kubernetes.io/name: {{ include "mlx-operator.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end }}

{{- define "mlx-operator.labels" -}}
{{ include "mlx-operator.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: mlx-operator
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- /* Call with (list $ .Values.image). */ -}}
{{- define "mlx-operator.image" -}}
{{- $root := index . 0 }}
{{- $image := index . 1 }}
{{- printf "%s:%s" $image.repository (default $root.Chart.AppVersion $image.tag) }}
{{- end }}

{{- /* Names of cluster-wide objects carry the namespace: the chart may be installed in several. */ -}}
{{- define "mlx-operator.clusterName" -}}
{{- $name := include "mlx-operator.fullname" . }}
{{- if hasPrefix $name .Release.Namespace }}
{{- .Release.Namespace | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Namespace $name | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- /* Runner pods of every instance: the label that each child of a ModelInstance carries. */ -}}
{{- define "mlx-operator.runnerSelector" -}}
matchExpressions:
  - {key: mlx-operator.dev/instance, operator: Exists}
{{- end }}
