"""A local Kubernetes cluster in network namespaces: real kubelets and containerd, no container engine, no image pulled.

``python -m tests.cluster up`` starts it; ``tests.cluster.cluster.Cluster`` is the same for tests, and
``tests.cluster.apiserver.ApiServer`` is the small sibling: etcd and an API server on loopback, without root.
"""
