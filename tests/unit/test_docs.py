"""The documentation is what the code says: generated pages are current, and links lead somewhere."""

import pathlib
import re

import pytest
from prometheus_client import generate_latest

from docs import generate, pages
from mlx_operator.metrics import Metrics as OperatorMetrics
from mlx_operator_api.conditions import ConditionType, Reason, Retry
from mlx_operator_api.runner import TaskName
from mlx_runner.supervisor import openapi
from mlx_runner.supervisor.config import Config
from mlx_runner.supervisor.metrics import Metrics
from mlx_runner.supervisor.supervisor import Supervisor

ROOT = generate.ROOT
PAGES = [ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "helm").glob("*/README.md"))]
LINK = re.compile(r"\[[^]]+\]\((?P<target>[^)#\s]+)[^)]*\)")


def test_every_generated_file_is_current() -> None:
    assert [str(file.relative_to(ROOT)) for file in generate.differing()] == [], "run: make generate"


def test_check_names_what_differs_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(["--check"]) == 0
    monkeypatch.setattr(pages, "troubleshooting", lambda: "something else")
    assert generate.main(["--check"]) == 1
    assert capsys.readouterr().out == "differs: docs/troubleshooting.md\nrun: make generate\n"


def test_the_troubleshooting_page_has_every_reason_once_with_its_remedy() -> None:
    text = pages.troubleshooting()
    for reason in Reason:
        assert len(re.findall(rf"^(### {reason}|\| `{reason}` \|.*)$", text.split("## Steps")[1], re.MULTILINE)) == 1, (
            reason
        )
        assert " ".join(reason.meaning.split()) in text
        assert reason.remedy in text


def test_every_failure_says_what_to_do() -> None:
    without = [reason for reason in Reason if reason.retry in (Retry.NEVER, Retry.WAIT) and not reason.remedy]
    assert without == []


def test_the_sections_start_in_the_order_of_the_catalogue() -> None:
    starts = [section[0].ordinal for section in pages.SECTIONS]
    assert starts == sorted(starts)
    assert starts[0] == 0


def test_every_way_of_retrying_and_every_condition_has_words() -> None:
    assert set(pages.RETRY_WORDS) == set(Retry)
    assert set(pages.docstrings(ConditionType)) == {kind.name for kind in ConditionType}


def test_the_architecture_page_shows_every_task_of_the_table() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for task in TaskName:
        assert f"| `{task}`" in text
    assert text.count("<!-- generated: ") == text.count("<!-- end -->") == 4


def test_the_metrics_page_has_every_metric_that_a_runner_prints_and_no_other() -> None:
    """What a busy runner prints, without the help of the page's own code."""
    supervisor = Supervisor(Config(uid="u", rank=0, token="t", state_dir=pathlib.Path("/nonexistent")))
    registry = Metrics(supervisor)
    printed = re.findall(r"^# TYPE (\S+) (\S+)$", registry.text().decode(), re.MULTILINE)
    printed = [(name, kind) for name, kind in printed if not name.endswith("_created")]
    for metric in registry.registry.collect():
        for sample in metric.samples:
            told = set(sample.labels) - {"le"}
            assert not told or told == set(registry.labels[metric.name]), sample.name
    runner, _ = _metrics_page()
    assert sorted(printed) == sorted(runner)


def test_the_metrics_page_has_every_metric_that_the_operator_prints_and_no_other() -> None:
    printed = re.findall(r"^# TYPE (\S+) (\S+)$", generate_latest(OperatorMetrics().registry).decode(), re.MULTILINE)
    ours = [(name, kind) for name, kind in printed if not name.startswith("process_")]
    assert len(ours) < len(printed), "those of the process are there"
    _, operator = _metrics_page()
    assert sorted(ours) == sorted(operator)


def _metrics_page() -> list[list[tuple[str, str]]]:
    """Name and type of every metric, of the runner and of the operator."""
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    parts = text.split("## Of the operator")
    return [re.findall(r"^\| `(\S+)` \| (\w+) \|", part, re.MULTILINE) for part in parts]


def test_the_serving_page_has_every_endpoint_and_every_field_of_every_body() -> None:
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert text.count("<!-- generated: ") == text.count("<!-- end -->") == 2
    for endpoint in openapi.ENDPOINTS:
        assert f"`{endpoint.method.upper()} {endpoint.path}`" in text
        for field in (
            openapi.document()["components"]["schemas"][endpoint.body.__name__]["properties"] if endpoint.body else ()
        ):
            assert f"`{field}`" in text


def test_a_block_that_nothing_generates_is_an_error() -> None:
    with pytest.raises(KeyError):
        generate.filled("<!-- generated: nothing -->\n<!-- end -->")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_inside_the_repository_lead_somewhere(page: pathlib.Path) -> None:
    targets = [found["target"] for found in LINK.finditer(page.read_text(encoding="utf-8"))]
    inside = [target for target in targets if "://" not in target]
    assert [target for target in inside if not (page.parent / target).exists()] == []
