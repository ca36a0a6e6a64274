"""Settings: one default each, and clear errors."""

from pathlib import Path

import pytest

from tta.config import Config, default_yaml, load_config
from tta.errors import ConfigError

ROOT = Path(__file__).parents[1]


def test_default_yaml_is_the_coded_defaults() -> None:
    """configs/default.yaml lists every setting, equal to the default in code."""
    assert (ROOT / "configs" / "default.yaml").read_text() == default_yaml()
    assert load_config(ROOT / "configs" / "default.yaml") == Config()


def test_flags_beat_environment_beats_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line wins over the environment, which wins over the file."""
    file = tmp_path / "c.yaml"
    file.write_text("server: {threads: 2, max_batch_size: 8, max_wait_s: 0.5}\nmode: off\n")
    monkeypatch.setenv("TTA_SERVER__MAX_BATCH_SIZE", "16")
    monkeypatch.setenv("TTA_SERVER__MAX_WAIT_S", "0.25")

    config = load_config(file, {"server.max_wait_s": "0.125"})

    server = config.server
    assert (server.threads, server.max_batch_size, server.max_wait_s) == (2, 16, 0.125)
    assert config.mode == "off"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("server: {treads: 2}", "unknown key 'server.treads': did you mean 'server.threads'"),
        ("server: {threads: 0}", "server.threads = 0"),
        ("adapt: {learning_rates: [1e-3, 0.0]}", "adapt.learning_rates.1 = 0.0: Input should be greater than 0"),
        ("mode: sometimes", "mode = 'sometimes'"),
        ("gate: {alpha: 0.9}", "gate.alpha = 0.9"),
        ("server: {endpoint: 'tcp://a:1,tcp://a:1'}", "name each once"),
        ("server: {endpoint: 'tcp://a:1,b:2'}", "server.endpoint = 'tcp://a:1,b:2'"),
        ("{precision: fp16, device: cpu}", "precision = fp16 needs a GPU"),
        ("- a list", "expected settings"),
        ("a: [", "cannot be read"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, text: str, message: str) -> None:
    """A bad file gives an error that names the file, the key and the value."""
    file = tmp_path / "c.yaml"
    file.write_text(text)

    with pytest.raises(ConfigError) as caught:
        load_config(file)

    assert message in str(caught.value)
    assert str(file) in str(caught.value)
