"""What the daemon tells a server at its start, as a JSON file; and what both say to each other later.

admin socket (daemon, or the server that follows → server)   hello | swap | release | drain
standby (daemon → server)                                    hello | succeed
observations (server → daemon)                               observation (one a batch) | counters (one a second)
"""

import msgspec

from tta.signatures import Trust


class ServerOptions(msgspec.Struct, kw_only=True):
    """Settings of one server process; see `configs/default.yaml` for what each means.

    Attributes:
        number: of this server among those of a daemon, from 0.
        device: "cpu", "cuda" or "auto", with the GPU's number after a colon where there are GPUs.
        key: file of the daemon's key pair, `public_key` its public half: another key is another service.
        clients: file of the list of clients.
        trust: what bundle to serve, and whose versions.
        time_us: microseconds since the epoch at least: prediction ids begin beyond those of any server before.
        standby: address of a server that loads and then waits to be told to `succeed`; "": it serves at once.
        parent: process id of the daemon, with which a server on standby dies.
    """

    bundle: str
    version_folder: str | None
    endpoint: str
    admin: str
    observe: str
    number: int = 0
    device: str
    precision: str = "fp32"
    gpu_memory_bytes: int | None = None
    threads: int
    decode_threads: int = 1
    max_batch_size: int
    max_wait_s: float
    queue_images: int
    queue_s: float
    max_message_bytes: int
    input_sample_rate: float
    observation_queue: int
    drain_s: float
    key: str | None = None
    public_key: str = ""
    clients: str | None = None
    trust: Trust = Trust()
    seed: int = 0
    time_us: int = 0
    standby: str = ""
    parent: int = 0

    def same_service(self, other: "ServerOptions") -> bool:
        """Whether a server started with `other` can be used as one started with these; the version may differ."""
        replace = msgspec.structs.replace
        ours, theirs = (
            replace(each, version_folder=None, time_us=0, standby="", parent=0) for each in (self, other)
        )
        return ours == theirs


class Observation(msgspec.Struct, kw_only=True):
    """Header of one batch's observation; frames follow: logits, features, then the images if `inputs`.

    Attributes:
        keys: who sent the images: (key, number of images) in order; empty if nobody gave a key.
    """

    op: str = "observation"
    epoch: int
    first_id: int
    version: int
    n: int
    inputs: bool
    keys: list[tuple[str, int]] = []


DURATION_BUCKETS_S = tuple(0.00025 * 2**i for i in range(15))  # 250 us .. 4 s
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Counters(msgspec.Struct, kw_only=True):
    """Totals of one server process (`number`) since its start (`epoch`)."""

    op: str = "counters"
    number: int = 0
    epoch: int
    requests: dict[str, int]
    rejected: dict[str, int]
    undeliverable: int
    repeated: int
    images: int
    batches: int
    observations_dropped: int
    queue_images: int
    histograms: dict[str, tuple[list[int], float]]
