{{- /*
All that the operator may do in a namespace that it serves, and why. What is not here it cannot do: it reads no
Secret but its own key, runs nothing in a pod, changes no spec, and touches no other kind.
*/ -}}
{{- define "mlx-operator.rules" -}}
# get: the newest state after a conflict; list, watch: what the operator works from.
- apiGroups: [mlx-operator.dev]
  resources: [modelinstances]
  verbs: [get, list, watch]
# patch: the status is the only part of a ModelInstance that the operator writes.
- apiGroups: [mlx-operator.dev]
  resources: [modelinstances/status]
  verbs: [patch]
# get, list, watch: what the scheduler and the kubelet did; create: one pod a rank; delete: to replace it. Pods are
# never updated, and no pods/exec, pods/log or pods/eviction is needed.
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, create, delete]
# create, patch: the client Service, by server-side apply; get, list, watch: to see that somebody changed it. It goes
# with its ModelInstance, by owner reference, so there is no delete.
- apiGroups: [""]
  resources: [services]
  verbs: [get, list, watch, create, patch]
# create: the token of an instance. Nothing else: get, list, watch, update and patch all answer with the data of a Secret.
- apiGroups: [""]
  resources: [secrets]
  verbs: [create]
# list: the words of the scheduler and the kubelet about a pod that waits.
- apiGroups: [""]
  resources: [events]
  verbs: [list]
# create: what the operator did, for kubectl describe; get, patch: to count a repetition on from what is there.
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [get, create, patch]
{{- end }}
