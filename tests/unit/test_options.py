"""Options and logs: bad values name the flag, the value and the remedy."""

import json
import logging

import pytest

from mlx_operator.logs import JsonFormatter, LogfmtFormatter, RateLimit, decision
from mlx_operator.observe.shelf import Key
from mlx_operator.options import Address, OptionError, parse

GIVEN = ["--runner-image", "runner:1", "--namespace", "system"]


def test_a_flag_comes_before_its_environment_variable() -> None:
    environment = {"MLX_OPERATOR_RUNNER_IMAGE": "other:1", "MLX_OPERATOR_LOG_FORMAT": "json"}
    options = parse(GIVEN, environment)
    assert (options.runner_image, options.log_format) == ("runner:1", "json")


def test_namespaces_come_from_flags_or_from_a_list_in_the_environment() -> None:
    flags = [*GIVEN, "--watch-namespace", "a", "--watch-namespace", "b"]
    assert parse(flags, {}).watch_namespaces == ("a", "b")
    assert parse(GIVEN, {"MLX_OPERATOR_WATCH_NAMESPACE": "a, b,a"}).watch_namespaces == ("a", "b")
    assert parse(GIVEN, {}).watch_namespaces == ()


def test_addresses() -> None:
    options = parse([*GIVEN, "--metrics-bind", "off", "--probes-bind", "[::1]:8081"], {})
    assert options.metrics_bind is None
    assert options.probes_bind == Address("::1", 8081)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--namespace", "system"], ["--runner-image", "MLX_OPERATOR_RUNNER_IMAGE"]),
        ([*GIVEN, "--metrics-bind", "9090"], ["--metrics-bind", "'9090'", "HOST:PORT"]),
        ([*GIVEN, "--probes-bind", "h:99999"], ["--probes-bind", "'h:99999'"]),
        ([*GIVEN, "--sweep-min-seconds", "9", "--sweep-max-seconds", "5"], ["--sweep-min-seconds 9.0", "5.0"]),
        (["--runner-image", "runner:1"], ["--namespace", "MLX_OPERATOR_NAMESPACE"]),
    ],
)
def test_a_bad_option_names_itself_its_value_and_the_remedy(flags: list[str], words: list[str]) -> None:
    with pytest.raises(OptionError) as error:
        parse(flags, {})
    for word in words:
        assert word in str(error.value)


def test_every_process_has_an_identity_of_its_own() -> None:
    environment = {"POD_NAME": "operator-1"}
    first, second = parse(GIVEN, environment).identity, parse(GIVEN, environment).identity
    assert first.startswith("operator-1_")
    assert first != second


def test_a_decision_is_one_line_with_its_fields(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mlx_operator"):
        decision("pod created", instance=Key("default", "tiny"), rank=1, reason=None, note='two "words"\nand more')
    (record,) = caplog.records
    entry = json.loads(JsonFormatter().format(record))
    assert (entry["instance"], entry["rank"], entry["msg"]) == ("default/tiny", 1, "pod created")
    assert "reason" not in entry
    line = LogfmtFormatter().format(record)
    assert "\n" not in line
    assert 'instance=default/tiny rank=1 note="two \\"words\\"\\nand more"' in line


def test_noise_is_let_through_once_in_a_while() -> None:
    limit = RateLimit(seconds=3600)

    def passes(text: str, name: str = "kopf._cogs.clients") -> bool:
        return bool(limit.filter(logging.LogRecord(name, logging.ERROR, "", 0, text, (), None)))

    assert [passes("Request attempt #1/… failed; will retry: GET /api"), passes("another text")] == [True, True]
    assert not passes("Request attempt #1/… failed; will retry: GET /api")
    assert passes("Request attempt #1/… failed; will retry: GET /api", "kopf.other")
