"""Every setting of a daemon, with its unit, range and only default.

Precedence: command line > environment (`TTA_SERVER__MAX_BATCH_SIZE=64`) > YAML file > default.
`configs/default.yaml` lists the same settings; a test holds the two equal.
"""

import difflib
import ipaddress
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from tta.errors import ConfigError, InputError
from tta.protocol import ALWAYS_TAKEN_BYTES
from tta.signatures import check_signer

# Besides the names of blocks. `race` chooses among blocks, `cross-validate` does so exhaustively, `diagnosis`
# takes the one the diagnosis names; the others tune the whole network, as the paper's baselines do.
METHODS = ("all", "all-rates", "l1", "first-to-last", "last-to-first", "auto-rgn", "auto-snr")
SELECTIONS = ("race", "cross-validate", "diagnosis", *METHODS)

# No ";", which names a source address besides, and no abstract socket (ipc://@), which no permissions guard.
_ADDRESS = r"(tcp://[^,;]+|ipc://[^@,;][^,;]*)"
LearningRate = Annotated[float, Field(gt=0)]
Endpoint = Annotated[str, Field(pattern=rf"^{_ADDRESS}$")]
Endpoints = Annotated[str, Field(pattern=rf"^{_ADDRESS}(,{_ADDRESS})*$")]
MAX_SERVERS = 16  # their prediction ids have to fit a double

# YAML 1.1 reads a bare `off` as false.
_Off = BeforeValidator(lambda value: "off" if value is False else value)


class Section(BaseModel):
    """A group of settings; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ServerConfig(Section):
    """The process that answers predictions, or several of them."""

    endpoint: Endpoints = Field(
        "tcp://127.0.0.1:5555",
        description="where clients send predictions; several, with commas: a server each, on a GPU each",
    )
    threads: int = Field(1, ge=1, le=256, description="threads of one inference")
    decode_threads: int = Field(1, ge=1, le=64, description="JPEG and PNG files decoded at a time")
    max_batch_size: int = Field(32, ge=1, le=4096, description="images computed together at most")
    max_wait_s: float = Field(
        0.0,
        ge=0,
        le=1,
        description="seconds a batch waits to fill, beyond what has gathered while the model was busy",
    )
    queue_images: int = Field(
        1024, ge=1, description="images queued; beyond, clients get one request, up to twice"
    )
    queue_s: float = Field(
        5.0, gt=0, description="expected seconds of computation queued at most; more is refused"
    )
    max_message_bytes: int = Field(64 << 20, ge=ALWAYS_TAKEN_BYTES, description="largest frame taken, bytes")
    input_sample_rate: float = Field(1.0, ge=0, le=1, description="share of batches whose images the daemon keeps")
    observation_queue: int = Field(
        256, ge=1, description="batches queued for the daemon; more are dropped, counted"
    )
    drain_s: float = Field(10.0, ge=0, description="seconds to finish admitted requests at shutdown")
    gpu_memory_bytes: int | None = Field(
        None,
        ge=1 << 20,
        description="GPU memory of one version; two live in the server, up to five in the shadow; null: no limit",
    )

    @property
    def endpoints(self) -> list[str]:
        """Of each server."""
        return self.endpoint.split(",")

    @model_validator(mode="after")
    def _endpoints_differ(self) -> "ServerConfig":
        names = self.endpoints
        if len(set(names)) < len(names) or len(names) > MAX_SERVERS:
            raise ValueError(f"endpoint = {self.endpoint!r}: name each once, and at most {MAX_SERVERS}")
        return self


class DaemonConfig(Section):
    """The process that watches and decides."""

    control: Endpoint = Field("tcp://127.0.0.1:5556", description="where clients send labels and commands")
    http: str = Field("127.0.0.1:9100", description="HOST:PORT of /metrics, /livez and /readyz")
    webhook: Annotated[str, Field(pattern=r"^https?://\S+$")] | None = Field(
        None, description="where every event of the cycle is posted as JSON; null: nowhere"
    )
    bundles: Path | None = Field(
        None, description="folder in or below which `tta deploy` finds bundles; null: beside `bundle`"
    )
    former_bundles: int = Field(
        2, ge=0, description="bundles that served before of which labels, versions and regimes are kept"
    )
    images_age_s: float | None = Field(
        None, gt=0, description="seconds after which stored images and their labels are deleted; null: never"
    )
    ledger_bytes: int = Field(256 << 20, ge=1 << 20, description="memory for recent predictions, bytes")
    ledger_age_s: float = Field(3600.0, gt=0, description="seconds a prediction waits for its label")
    worker_timeout_s: float = Field(
        60.0, gt=0, description="seconds a process may stay silent before it is killed"
    )


class MonitorConfig(Section):
    """Drift detection."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    arl: float | None = Field(
        None,
        ge=100,
        validation_alias=AliasChoices("arl", "ert"),
        description="samples between two false alarms (also: ert); null: the bundle's",
    )
    stickiness: float | None = Field(
        None, ge=0, le=0.95, description="chance that a sample repeats the one before; null: measured"
    )
    min_effect: float = Field(
        0.5, ge=0, description="standard deviations a block must move before a shift is worth acting on"
    )
    accepted_loss: float = Field(
        0.02, ge=0, lt=1, description="predicted loss of accuracy that is still no reason to act"
    )
    label_arl: float = Field(2000.0, ge=100, description="labels between two false alarms of the error test")
    error_tolerance: float = Field(0.05, ge=0, lt=1, description="rise of the error rate that is still in order")
    window: int = Field(512, ge=64, description="samples that make a regime's fingerprint")


class LabelsConfig(Section):
    """The labelled buffer."""

    capacity: int = Field(20_000, ge=16, description="labels kept on disk")
    disk_bytes: int = Field(
        4 << 30,
        ge=1 << 20,
        description="disk for labels with their images, bytes: fewer are kept where they are large",
    )
    fit_fraction: float = Field(0.6, gt=0, lt=1, description="share of labels to fit; the rest judges")
    client_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="of the labels used that one client may give, where several may label; 1: trust each alone",
    )


class AdaptConfig(Section):
    """Surgery."""

    labels: int = Field(192, ge=16, description="labels since the onset before an adaptation starts")
    max_labels: int = Field(2000, ge=16, description="newest labels that fit, and that judge, at most")
    selection: str = Field(
        "race",
        description=f"{', '.join(SELECTIONS)}, or a block's name",
    )
    blocks: int = Field(2, ge=1, le=16, description="blocks that reach the second rung of the race")
    folds: int = Field(2, ge=2, le=10, description="folds of the choice on the fit labels")
    epochs: int = Field(
        20, ge=1, le=1000, description="passes over the fit labels; beside the window half, or more if few"
    )
    batch_size: int = Field(32, ge=2, description="labels a step")
    learning_rates: tuple[LearningRate, ...] = Field(
        (1e-3, 3e-3), min_length=1, description="of blocks before the head"
    )
    head_learning_rates: tuple[LearningRate, ...] = Field((1e-2, 1e-1), min_length=1, description="of the head")
    window: int = Field(
        1500,
        ge=64,
        description="unlabelled images to re-estimate normalisation from and to tune beside the labels",
    )
    unlabelled: float = Field(
        1.0, ge=0, le=100, description="weight of the unlabelled images in the final fit; 0: labels alone"
    )
    label_free: Annotated[Literal["immediate", "off"], _Off] = Field(
        "off",
        description="immediate: serve what can be made without labels until labels decide; off: wait for them",
    )
    rehearsal: Annotated[Literal["idle", "off"], _Off] = Field(
        "idle",
        description="idle: between shifts, tune normalisation for all regimes together; off: each learns alone",
    )
    augment: tuple[Literal["flip", "crop"], ...] = Field(
        ("flip", "crop"), description="changes that keep the class"
    )
    threads: int = Field(1, ge=1, le=256, description="threads of the adapter")
    nice: int = Field(10, ge=0, le=19, description="niceness of adapter and shadow")
    share: float = Field(
        1.0, ge=0.05, le=1, description="of the time that the adapter may compute, for a GPU knows no niceness"
    )
    budget_s: float = Field(600.0, gt=0, description="seconds an adaptation may take")
    memory_bytes: int = Field(
        1 << 30, ge=0, description="memory for stored outputs of a frozen first part of the network, bytes"
    )
    retry_labels: int = Field(64, ge=1, description="more labels to wait for after a rejection, at least")
    seed: int = Field(0, ge=0, description="of everything random")


class GateConfig(Section):
    """When a candidate may serve, and when it must go."""

    alpha: float = Field(
        0.05,
        gt=0,
        lt=0.5,
        description="chance of promoting one that is no better, in one shift, over all attempts",
    )
    max_class_drop: float = Field(
        0.2,
        ge=0,
        le=1,
        description="accuracy, less false calls, a class may lose against the serving version, if labels show it",
    )
    rollback_alpha: float = Field(0.05, gt=0, lt=0.5, description="chance of rolling back one that is no worse")
    probation_labels: int = Field(64, ge=1, description="live labels of different images that end probation")
    probation_s: float = Field(60.0, gt=0, description="seconds that end probation without labels")


class LibraryConfig(Section):
    """Regimes remembered."""

    capacity: int = Field(32, ge=1, description="regimes kept besides home")
    images: int = Field(512, ge=0, le=100_000, description="images kept of each regime on disk, for rehearsal")
    disk_bytes: int = Field(
        4 << 30, ge=0, description="disk for the images of all regimes, bytes: fewer are kept where they are large"
    )
    versions: int = Field(
        128,
        ge=1,
        description="newest versions kept on disk, rejected ones' notes among them, besides those in use",
    )
    recall: Annotated[Literal["immediate", "confirm", "off"], _Off] = Field(
        "immediate",
        description="immediate: serve a returning regime's version; confirm: when labels agree; off: only home's",
    )


class SecurityConfig(Section):
    """Who may connect over tcp, and whose models are served."""

    key: Path | None = Field(
        None, description="the daemon's NAME.key_secret, made by tta keygen; null: no keys, this machine only"
    )
    clients: Path | None = Field(
        None, description="YAML of the clients allowed, NAME: {key, roles}; read again when it changes"
    )
    plaintext: bool = Field(
        False, description="take tcp from other machines without keys: anybody there can change what is served"
    )
    signers: dict[str, str] | None = Field(
        None, description="NAME: KEY of whose bundles are served, see tta sign; null: unsigned ones too"
    )
    signing_key: Path | None = Field(
        None, description="PEM file; the daemon signs versions with it and serves no other; null: no signatures"
    )


class Config(BaseSettings):
    """The whole configuration; immutable."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix="TTA_", env_nested_delimiter="__", env_ignore_empty=True
    )

    bundle: Path = Field(Path("model.tta"), description="what to serve, made by tta package")
    state: Path = Field(Path("tta-state"), description="folder for versions, labels and state")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="for server, shadow and adapter")
    precision: Literal["fp32", "fp16"] = Field(
        "fp32", description="of the model on a GPU; fp16 needs a bundle packaged with --fp16"
    )
    mode: Annotated[Literal["off", "propose", "auto"], _Off] = Field(
        "auto", description="off: watch only; propose: ask before promoting; auto: act"
    )
    server: ServerConfig = ServerConfig()
    daemon: DaemonConfig = DaemonConfig()
    monitor: MonitorConfig = MonitorConfig()
    labels: LabelsConfig = LabelsConfig()
    adapt: AdaptConfig = AdaptConfig()
    gate: GateConfig = GateConfig()
    library: LibraryConfig = LibraryConfig()
    security: SecurityConfig = SecurityConfig()

    @model_validator(mode="after")
    def _nobody_gets_in_unasked(self) -> "Config":
        security = self.security
        if (security.key is None) != (security.clients is None):
            has, lacks = ("key", "clients") if security.clients is None else ("clients", "key")
            raise ValueError(f"security.{has} is set and security.{lacks} is not: set both, or neither")
        if security.signers is not None and security.signing_key is None:
            raise ValueError(
                "security.signers is set and security.signing_key is not: versions would be served unsigned; "
                "tta keygen --signing makes a key"
            )
        for name, key in (security.signers or {}).items():
            try:
                check_signer(key)
            except InputError as error:
                raise ValueError(f"security.signers.{name} = {key!r}: {error}") from error
        if security.key is None and not security.plaintext:
            named = {"daemon.control": [self.daemon.control], "server.endpoint": self.server.endpoints}
            for name, endpoint in ((name, e) for name, endpoints in named.items() for e in endpoints):
                if not is_local(endpoint):
                    raise ValueError(
                        f"{name} = {endpoint!r} lets other machines in, and nobody is asked for a key: set "
                        "security.key and security.clients (see tta keygen), or security.plaintext: true if "
                        "something else keeps strangers out"
                    )
        return self

    @model_validator(mode="after")
    def _half_precision_has_a_gpu(self) -> "Config":
        if self.precision == "fp16" and self.device == "cpu":
            raise ValueError("precision = fp16 needs a GPU, device = cpu has none: set device: auto or cuda")
        return self

    @model_validator(mode="after")
    def _labels_fit_the_buffer(self) -> "Config":
        if self.labels.capacity < 2 * self.adapt.labels:
            capacity, wanted = self.labels.capacity, self.adapt.labels
            raise ValueError(f"labels.capacity = {capacity} must be at least twice adapt.labels = {wanted}")
        return self

    def check_model(self, blocks: Sequence[str]) -> None:
        """Check what depends on the model.

        Raises:
            ConfigError: `adapt.selection` names no block of it.
        """
        if self.adapt.selection not in (*SELECTIONS, *blocks):
            known = ", ".join((*SELECTIONS, *blocks))
            raise ConfigError(f"adapt.selection = {self.adapt.selection!r}: write one of {known}")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Command line (init) over environment over YAML; see `load_config`."""
        assert isinstance(init_settings, InitSettingsSource)
        given = dict(init_settings.init_kwargs)
        file = InitSettingsSource(settings_cls, given.pop("_file", {}))
        return InitSettingsSource(settings_cls, given), env_settings, file


def is_local(endpoint: str) -> bool:
    """Whether only this machine reaches an endpoint."""
    scheme, _, rest = endpoint.partition("://")
    host = rest.rpartition(":")[0].strip("[]")
    try:
        return scheme != "tcp" or host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, an interface or *
        return False


def load_config(path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read, merge and check all settings.

    Args:
        path: YAML file, or None for defaults.
        overrides: from the command line, with dotted names: {"server.threads": 2}; YAML text or objects.

    Raises:
        ConfigError: unreadable, an unknown key (with the nearest known one), or a value out of range.
    """
    where = str(path) if path else "settings"
    loaded: Any = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(path.read_text()) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"{path} cannot be read: {reason}") from error
        if not isinstance(loaded, dict):
            raise ConfigError(f"{path}: expected settings as KEY: VALUE, got {type(loaded).__name__}")
        maps = [each for each in (loaded, *loaded.values()) if isinstance(each, dict)]
        odd = [key for each in maps for key in each if not isinstance(key, str)]  # YAML has others
        if odd:
            raise ConfigError(f"{path}: {odd[0]!r} is no name of a setting")
    nested: dict[str, Any] = {}
    for name, value in (overrides or {}).items():
        *sections, key = name.split(".")
        target = nested
        for section in sections:
            target = target.setdefault(section, {})
        try:
            target[key] = yaml.safe_load(value) if isinstance(value, str) else value
        except yaml.YAMLError as error:
            raise ConfigError(f"{name}={value}: the value is not YAML") from error
    try:
        return Config(_file=loaded, **nested)  # type: ignore[call-arg]
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(where, e) for e in error.errors())) from error


def _explain(where: str, error: Any) -> str:
    name, message = ".".join(str(part) for part in error["loc"]), error["msg"].removeprefix("Value error, ")
    if not name or error["type"] == "value_error":
        return f"{where}: {name + ': ' if name else ''}{message}"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, known_keys(), n=1, cutoff=0.5)
        return f"{where}: unknown key {name!r}" + (f": did you mean {near[0]!r}?" if near else "")
    return f"{where}: {name} = {error.get('input')!r}: {message}"


def known_keys() -> list[str]:
    """Dotted names of all settings."""
    keys = []
    for name, field in Config.model_fields.items():
        section = field.default
        keys += [f"{name}.{k}" for k in type(section).model_fields] if isinstance(section, Section) else [name]
    return keys


def default_yaml() -> str:
    """The contents of `configs/default.yaml`: every setting with its default and meaning."""
    lines = ["# Every setting with its default. A configuration file needs only what differs.", ""]
    for name, field in Config.model_fields.items():
        section = field.default
        if not isinstance(section, Section):
            lines.append(f"{name}: {_scalar(section)}  # {field.description}")
            continue
        lines += ["", f"# {type(section).__doc__}", f"{name}:"]
        for key, inner in type(section).model_fields.items():
            lines.append(f"  {key}: {_scalar(getattr(section, key))}  # {inner.description}")
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(str(v) for v in value) + "]"
    return "null" if value is None else str(value)
