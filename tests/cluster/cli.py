"""Command line of the local cluster: ``python -m tests.cluster COMMAND``."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.cluster import apiserver
from tests.cluster.cluster import Cluster
from tests.cluster.errors import ClusterError
from tests.cluster.paths import DEFAULT_NAME
from tests.cluster.waiting import tail, tell


def main(words: Sequence[str]) -> int:
    """Run one command; 0 when it succeeded, 1 with a sentence on standard error when not."""
    arguments = _parser().parse_args(words)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except ClusterError as error:
        tell(f"error: {error}")
        return 1
    except PermissionError as error:
        tell(f"error: {error.filename}: permission denied; the cluster is another user's: run this again with sudo.")
        return 1
    except KeyboardInterrupt:
        tell("interrupted; `up` goes on where it was, `down` removes everything.")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.cluster",
        description="A local Kubernetes cluster in network namespaces: real nodes, no container engine.",
    )
    parser.add_argument("--name", default=DEFAULT_NAME, help="name of the cluster (default: %(default)s)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    up = _command(commands, "up", _up, "start the cluster, or repair what is missing of it")
    up.add_argument("--nodes", type=int, metavar="N", help="number of nodes (default: as before, or 2)")
    up.add_argument("--port", type=int, default=0, help="loopback port of the API server (default: any free one)")
    _command(commands, "down", _down, "remove everything of the cluster, in whatever state it is")
    _command(commands, "status", _status, "say what runs and where the files are")
    load = _command(commands, "load-image", _load, "bring image archives into all nodes")
    load.add_argument("archives", nargs="+", type=Path, metavar="ARCHIVE", help="OCI layout, OCI or docker archive")
    _command(commands, "kubeconfig", _kubeconfig, "print the path of the kubeconfig")
    logs = _command(commands, "logs", _logs, "print the end of a component's log")
    logs.add_argument(
        "component", help="etcd, apiserver, controller-manager, scheduler, front, coredns, kubelet-n1 ..."
    )
    logs.add_argument("--lines", type=int, default=200, help="how much of it (default: %(default)s)")
    for name, run, text in (
        ("partition", _partition, "cut a node off the network"),
        ("heal", _heal, "undo partition"),
        ("stop-node", _stop_node, "take a node's power away"),
        ("start-node", _start_node, "give it back"),
    ):
        _command(commands, name, run, text).add_argument("node", metavar="NODE")
    server = _command(commands, "apiserver", _apiserver, "only etcd and an API server on loopback; needs no root")
    server.add_argument("action", choices=["up", "down"])
    return parser


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], int],
    text: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def _up(arguments: argparse.Namespace) -> int:
    cluster = Cluster(arguments.name, arguments.nodes, port=arguments.port)
    cluster.up()
    print(f"export KUBECONFIG={cluster.kubeconfig}")
    return 0


def _down(arguments: argparse.Namespace) -> int:
    Cluster(arguments.name).down()
    return 0


def _status(arguments: argparse.Namespace) -> int:
    cluster = Cluster(arguments.name)
    if not cluster.paths.root.exists():
        raise ClusterError(f"Cluster {arguments.name!r} is not there: start it with `python -m tests.cluster up`.")
    components = cluster.components()
    dead = [component for component in components if not cluster.running(component)]
    for component in components:
        print(f"{component:<22}{'stopped' if component in dead else 'running'}")
    for node in cluster.nodes():
        words = (
            "stopped on request" if node.stopped else "linked" if cluster.network.linked(node.name) else "partitioned"
        )
        print(f"{'node ' + node.name:<22}{words}")
    print(f"{'kubeconfig':<22}{cluster.kubeconfig}\n{'audit log':<22}{cluster.audit_log}")
    print(f"{'logs':<22}{cluster.paths.logs}\n{'programs':<22}{cluster.binaries}")
    return 1 if dead else 0


def _load(arguments: argparse.Namespace) -> int:
    cluster = Cluster(arguments.name)
    if not cluster.nodes():
        raise ClusterError(f"Cluster {arguments.name!r} has no nodes: start it with `python -m tests.cluster up`.")
    cluster.load_image(*arguments.archives)
    return 0


def _kubeconfig(arguments: argparse.Namespace) -> int:
    path = Cluster(arguments.name).kubeconfig
    if not path.exists():
        raise ClusterError(f"Cluster {arguments.name!r} is not there: start it with `python -m tests.cluster up`.")
    print(path)
    return 0


def _logs(arguments: argparse.Namespace) -> int:
    cluster = Cluster(arguments.name)
    if arguments.component == "coredns":
        print(cluster.kubectl("-n", "kube-system", "logs", "deploy/coredns", f"--tail={arguments.lines}"), end="")
        return 0
    known = [*cluster.components(), "coredns"]
    if arguments.component not in known:
        raise ClusterError(f"{arguments.component!r} is not a component; there are {', '.join(known)}.")
    print(tail(cluster.paths.log(arguments.component), arguments.lines))
    return 0


def _partition(arguments: argparse.Namespace) -> int:
    Cluster(arguments.name).partition(arguments.node)
    return 0


def _heal(arguments: argparse.Namespace) -> int:
    Cluster(arguments.name).heal(arguments.node)
    return 0


def _stop_node(arguments: argparse.Namespace) -> int:
    Cluster(arguments.name).stop_node(arguments.node)
    return 0


def _start_node(arguments: argparse.Namespace) -> int:
    Cluster(arguments.name).start_node(arguments.node)
    return 0


def _apiserver(arguments: argparse.Namespace) -> int:
    server = apiserver.named(arguments.name)
    if arguments.action == "down":
        server.stop()
        return 0
    server.start()
    print(f"export KUBECONFIG={server.kubeconfig}")
    return 0
