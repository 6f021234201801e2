"""The CustomResourceDefinition, generated from the models.

`python -m mlx_operator_api.crd` prints it; `--write DIRECTORY` writes `crds/` and the copy inside the CRDs chart under
the root of the repository. A test fails when those files differ from the models.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from .modelinstance import NAME_RULES, ModelInstance
from .names import CATEGORY, GROUP, KIND, PLURAL, SHORT_NAME, SINGULAR, VERSION
from .schema import Schema, structural, without_enums

FILE = f"{PLURAL}.yaml"
DIRECTORIES = ("crds", "helm/mlx-operator-crds/files")
"""Where the generated file lies, from the root of the repository."""
MAX_BYTES = 100_000
"""Plain `kubectl apply` stores the whole object once more in an annotation of at most 256 KiB."""

_HEADER = "# Generated from api/mlx_operator_api by `python -m mlx_operator_api.crd --write .`: do not edit.\n"


def schema() -> Schema:
    """The structural schema of a ModelInstance."""
    raw = ModelInstance.model_json_schema(by_alias=True, mode="validation")
    out = structural(raw, raw.get("$defs", {}))
    spec, status = out["properties"]["spec"], out["properties"]["status"]
    out["properties"] = {
        "apiVersion": {"type": "string", "description": f"{GROUP}/{VERSION}."},
        "kind": {"type": "string", "description": f"{KIND}."},
        "metadata": {
            "type": "object",
            # Declared because the rules on the root read it and point to it.
            "properties": {"name": {"type": "string"}},
        },
        "spec": spec,
        # Until the operator has seen an object, tools that wait must not take it for finished (kstatus: no news is good
        # news, but a generation that was not observed is not).
        "status": {**without_enums(status, keep=frozenset({"status"})), "default": {"observedGeneration": -1}},
    }
    out.update(NAME_RULES)
    return out


def _column(name: str, path: str, kind: str = "string", *, wide: bool = False, description: str) -> dict[str, Any]:
    column: dict[str, Any] = {"name": name, "type": kind, "jsonPath": path, "description": description}
    return {**column, "priority": 1} if wide else column


def columns() -> list[dict[str, Any]]:
    """What `kubectl get mi` shows; the wide ones with `-o wide`."""
    ready = '.status.conditions[?(@.type=="Ready")]'
    return [
        _column("Ready", f"{ready}.status", description="Whether the group answers requests."),
        _column("Reason", f"{ready}.reason", description="Why it does, or does not."),
        _column("Runners", ".status.runnersReady", description="Ranks that are ready, of all."),
        _column("Restarts", ".status.restarts", "integer", description="Failures since the last sustained Ready."),
        _column("Model", ".spec.model.source", description="Where the weights come from."),
        _column("Age", ".metadata.creationTimestamp", "date", description="Time since creation."),
        _column("Epoch", ".status.epoch", "integer", wide=True, description="Starts of the group."),
        _column("Sharding", ".spec.sharding", wide=True, description="How the model is split, where set."),
        _column("Endpoint", ".status.endpoint", wide=True, description="Base URL for clients in the cluster."),
    ]


def definition() -> dict[str, Any]:
    """The CustomResourceDefinition as JSON."""
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": columns(),
        "schema": {"openAPIV3Schema": schema()},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "plural": PLURAL,
                "singular": SINGULAR,
                "kind": KIND,
                "listKind": f"{KIND}List",
                "shortNames": [SHORT_NAME],
                "categories": [CATEGORY],
            },
            "versions": [version],
        },
    }


def text() -> str:
    """The CustomResourceDefinition as YAML, header included."""
    # Imported here: only who generates needs it; operator and runner do not.
    import yaml

    # Through JSON, so that parts that are shared in memory are written out and not as YAML anchors.
    return _HEADER + yaml.safe_dump(
        json.loads(json.dumps(definition())), sort_keys=False, width=120, allow_unicode=True
    )


def write(root: pathlib.Path) -> list[pathlib.Path]:
    """Write every copy under the root of the repository; returns the files."""
    files = [root / directory / FILE for directory in DIRECTORIES]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text(), encoding="utf-8")
    return files


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m mlx_operator_api.crd`."""
    parser = argparse.ArgumentParser(prog="python -m mlx_operator_api.crd", description="Print or write the CRD.")
    parser.add_argument("--write", metavar="ROOT", type=pathlib.Path, help="write the files of this repository")
    options = parser.parse_args(arguments)
    if options.write is None:
        sys.stdout.write(text())
        return 0
    for file in write(options.write):
        sys.stdout.write(f"{file}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
